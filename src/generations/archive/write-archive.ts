/**
 * Writes a generation as one stream: the list, its signature, then the members, of page files only the stretches that hold
 * data. What is read is compared with the generation's checksums on the way. It knows no file that the stream may become.
 */
import { createHash, type KeyObject } from 'node:crypto'
import { open } from 'node:fs/promises'
import { join } from 'node:path'
import { WarmforkError } from '../../errors.js'
import { fileChecksum, type Run, runsChecksum } from '../checksum.js'
import type { Generation } from '../generation.js'
import { currentPath, KEPT_DIRECTORY } from '../kept-files.js'
import { BlockWriter, type Compression } from './blocks.js'
import {
  type ArchiveContents,
  type ArchiveMember,
  CONTENTS_NAME,
  encodeContents,
  isPageFile,
  MAX_CONTENTS_BYTES,
  runsName,
  SIGNATURE_NAME,
} from './contents.js'
import { encodeSignature } from './signature.js'
import { END, header, paddingBytes } from './tar.js'

export interface WriteOptions {
  readonly compress: Compression
  /** A private ed25519 key. */
  readonly sign?: KeyObject | undefined
  readonly signal?: AbortSignal | undefined
}

export interface Written {
  /** `sha256:` and the SHA-256 of the list. */
  readonly digest: string
  /** Of the members, as they lie in the generation: without holes and uncompressed. */
  readonly dataBytes: number
  /** Of what was written. */
  readonly archiveBytes: number
}

const PIECE_BYTES = 1 << 20

/** Throws GENERATION_CORRUPT, GENERATION_MISFIT (a file that it maps has changed and was not kept), and what `output` throws. */
export async function writeArchive(
  generation: Generation,
  output: (bytes: Buffer) => Promise<void>,
  { compress, sign, signal }: WriteOptions,
): Promise<Written> {
  const contents = await contentsOf(generation, signal)
  const { text, digest } = encodeContents(contents)
  if (text.length > MAX_CONTENTS_BYTES) {
    const happened = `its list would have ${text.length} bytes, and ${MAX_CONTENTS_BYTES} at most are read`
    throw new WarmforkError('GENERATION_MISFIT', { tried: `export generation ${generation.number}`, happened })
  }
  const writer = new BlockWriter(compress, output)
  try {
    await writeWhole(writer, CONTENTS_NAME, text)
    if (sign) await writeWhole(writer, SIGNATURE_NAME, encodeSignature(digest, sign))
    for (const member of contents.members) await writeMember(writer, generation, member, signal)
    await writer.write(END)
    await writer.end()
    const dataBytes = contents.members.reduce((sum, { bytes }) => sum + bytes, 0)
    return { digest, dataBytes, archiveBytes: writer.bytesWritten }
  } finally {
    await writer.close()
  }
}

async function contentsOf(
  generation: Generation,
  signal: AbortSignal | undefined,
): Promise<Omit<ArchiveContents, 'format' | 'formatVersion'>> {
  const { manifest, directory } = generation
  const { name, number, createdAt, warmforkVersion, reforks, surroundings, memory, warnings, rssBytes } = manifest
  const { processes, edits, engineData, times } = manifest
  const { checkpointMs, prepareMs } = times
  return {
    generation: {
      ...{ name, number, createdAt, warmforkVersion, directory, surroundings, memory, warnings, rssBytes },
      ...{ processes, edits, engineData, checkpointMs, prepareMs },
      ...(reforks === undefined ? {} : { reforks }),
    },
    members: await membersOf(generation),
    files: await filesOf(generation, signal),
  }
}

async function membersOf(generation: Generation): Promise<ArchiveMember[]> {
  const { files } = generation.manifest
  const pageFiles = generation.pageFiles.sort()
  const runsFiles = new Set(pageFiles.map((name) => files[name]!.runs))
  const members: ArchiveMember[] = []
  for (const name of Object.keys(files).sort()) {
    // What it kept of the machine's files does not travel: the other machine must have its own, the very same.
    if (runsFiles.has(name) || pageFiles.includes(name) || name.startsWith(`${KEPT_DIRECTORY}/`)) continue
    members.push(await wholeMember(generation, name))
  }
  for (const name of pageFiles) {
    const { bytes: apparentBytes, sha256, runs: stored } = files[name]!
    if (!isPageFile(name) || stored !== runsName(name)) throw corrupt(generation, `its page file ${name} is none`)
    const runs = await generation.runs(name)
    const bytes = runs.reduce((sum, [, length]) => sum + length, 0)
    const path = join(generation.directory, name)
    members.push(await wholeMember(generation, stored))
    members.push({ name, bytes, sha256: sha256 ?? (await runsChecksum(path, runs)), apparentBytes })
  }
  return members
}

/** An ephemeral generation has no checksums of its own. */
async function wholeMember(generation: Generation, name: string): Promise<ArchiveMember> {
  const { bytes, sha256 } = generation.manifest.files[name]!
  return { name, bytes, sha256: sha256 ?? (await fileChecksum(join(generation.directory, name))).sha256 }
}

/** The content of each file that the image maps or has open: where it was upgraded since, that of the one that was kept. */
async function filesOf(generation: Generation, signal: AbortSignal | undefined): Promise<ArchiveContents['files']> {
  const files: ArchiveContents['files'] = []
  for (const entry of generation.manifest.mappedFiles) {
    signal?.throwIfAborted()
    const { path, use } = entry
    const now = currentPath(generation.directory, entry)
    if (now === undefined) {
      throw new WarmforkError('GENERATION_MISFIT', {
        tried: `export generation ${generation.number}`,
        happened: `the file ${path} is not the one it maps any more, and none was kept`,
      })
    }
    if (entry.inode === '0') files.push({ path, use, sizeBytes: 0, sha256: null })
    else {
      const { bytes, sha256 } = await fileChecksum(now)
      files.push({ path, use, sizeBytes: bytes, sha256 })
    }
  }
  return files
}

async function writeWhole(writer: BlockWriter, name: string, content: Buffer): Promise<void> {
  await writer.write(header(name, content.length))
  await writer.write(content)
  await writer.write(Buffer.alloc(paddingBytes(content.length)))
}

async function writeMember(
  writer: BlockWriter,
  generation: Generation,
  { name, bytes, sha256, apparentBytes }: ArchiveMember,
  signal: AbortSignal | undefined,
): Promise<void> {
  const runs: readonly Run[] = apparentBytes === undefined ? [[0, bytes]] : await generation.runs(name)
  const hash = createHash('sha256')
  const handle = await open(join(generation.directory, name), 'r')
  try {
    await writer.write(header(name, bytes))
    const piece = Buffer.allocUnsafeSlow(Math.min(PIECE_BYTES, Math.max(1, bytes)))
    for (const [offset, length] of runs) {
      for (let done = 0; done < length; ) {
        signal?.throwIfAborted()
        const wanted = Math.min(piece.length, length - done)
        const { bytesRead } = await handle.read(piece, 0, wanted, offset + done)
        if (bytesRead === 0) throw corrupt(generation, `its file ${name} ends too early`)
        hash.update(piece.subarray(0, bytesRead))
        await writer.write(piece.subarray(0, bytesRead))
        done += bytesRead
      }
    }
    await writer.write(Buffer.alloc(paddingBytes(bytes)))
  } finally {
    await handle.close()
  }
  if (hash.digest('hex') !== sha256) {
    throw corrupt(generation, `its file ${name} has another content than it was made with`)
  }
}

function corrupt({ number }: Generation, happened: string): WarmforkError {
  return new WarmforkError('GENERATION_CORRUPT', { tried: `export generation ${number}`, happened })
}
