/**
 * Export and import of generations, for embedders and the command line: which store, which file, which criu. What an archive
 * looks like stands in generations/archive/.
 */
import type { KeyObject } from 'node:crypto'
import { open } from 'node:fs/promises'
import type { Readable, Writable } from 'node:stream'
import { findCriu, formatVersion } from './engines/criu/binary.js'
import { errnoOf, WarmforkError } from './errors.js'
import { Archive } from './generations/archive/archive.js'
import { COMPRESSIONS, type Compression } from './generations/archive/blocks.js'
import { TRIED } from './generations/archive/failure.js'
import { writeOutputFile } from './generations/archive/output-file.js'
import { importInto } from './generations/archive/read-archive.js'
import { keyName, privateKey, publicKey } from './generations/archive/signature.js'
import { writeArchive } from './generations/archive/write-archive.js'
import type { Generation } from './generations/generation.js'
import { Store } from './generations/store.js'
import { Verdicts } from './generations/verdicts.js'

export type { Compression } from './generations/archive/blocks.js'

export interface ExportOptions {
  /** The supervisor whose generation it is. */
  name: string
  /** The directory of all stores. @default as of a supervisor */
  store?: string
  /** Its number. @default the pinned one, else the newest that was not rejected */
  generation?: number
  /** The path of the archive, or a stream, which is left open. */
  file: string | Writable
  /** @default 'zstd' */
  compress?: Compression
  /** Whether a file that is there is replaced. @default false */
  force?: boolean
  /** A private ed25519 key (PEM) to sign the archive with. @default no signature */
  sign?: string | Buffer | KeyObject
  /** Ends the export; nothing is left of it. */
  signal?: AbortSignal
}

export interface ExportedGeneration {
  readonly name: string
  readonly number: number
  /** `sha256:…`: of the content, the same however it is compressed. To be given to `importGeneration`. */
  readonly digest: string
  /** The name of the key that signed it: `sha256:…` of its public part. */
  readonly signedBy?: string
  readonly compress: Compression
  /** Of the archive. */
  readonly archiveBytes: number
  /** Of what it holds, without the holes of page files. */
  readonly dataBytes: number
}

export interface ImportOptions {
  /** The path of the archive, or a stream, which is read to its end. */
  file: string | Readable
  /** The supervisor whose generation it is to be; it must not run. @default the name that the archive has */
  name?: string
  /** The directory of all stores. @default as of a supervisor */
  store?: string
  /** What `exportGeneration` gave; an archive with another digest is refused. */
  digest?: string
  /** A public ed25519 key (PEM): what it has not signed is refused. */
  verify?: string | Buffer | KeyObject
  /** Ends the import; nothing is left of it. */
  signal?: AbortSignal
}

export interface ImportedGeneration {
  readonly name: string
  /** Of the new generation. */
  readonly number: number
  readonly digest: string
  /** The name of the key that signed it, whether or not one was asked for. */
  readonly signedBy?: string
  /** Of what was unpacked, without the holes of page files. */
  readonly dataBytes: number
  /** What it was where it was exported. */
  readonly from: { readonly name: string; readonly number: number; readonly createdAt: Date }
}

/**
 * Writes a generation into one file, from which another machine with the same kernel, CPU, CRIU and files can fork. Supervisors
 * may run meanwhile. @throws GENERATION_NOT_FOUND, GENERATION_CORRUPT, GENERATION_MISFIT, BAD_OPTION, DISK_FULL
 */
export async function exportGeneration(options: ExportOptions): Promise<ExportedGeneration> {
  const { name, store: root, file, compress = 'zstd', force = false, signal } = options
  const tried = 'export a generation'
  if (!COMPRESSIONS.includes(compress)) {
    const happened = `expected \`compress\` to be ${COMPRESSIONS.join(', ')}, got ${JSON.stringify(compress)}`
    throw new WarmforkError('BAD_OPTION', { tried, happened })
  }
  const sign = options.sign === undefined ? undefined : privateKey(options.sign)
  await using store = await Store.open({ name, access: 'read', ...(root === undefined ? {} : { root }) })
  const generation = options.generation === undefined ? await chosen(store) : await store.get(options.generation)
  // It may be pruned meanwhile.
  generation.hold()
  try {
    const write = (append: (bytes: Buffer) => Promise<void>) =>
      writeArchive(generation, append, { compress, sign, signal })
    const written =
      typeof file === 'string'
        ? await writeOutputFile(file, { tried: `export generation ${generation.number}`, force }, write)
        : await write((bytes) => writeTo(file, bytes))
    const { number } = generation
    return { name, number, ...written, compress, ...(sign ? { signedBy: keyName(sign) } : {}) }
  } finally {
    generation.letGo()
  }
}

/**
 * Makes a generation of an archive. Nothing of it is used before it was verified as far as asked; what is refused leaves
 * nothing. @throws ARCHIVE_INVALID, GENERATION_MISFIT, DISK_FULL, STORE_LOCKED, BAD_OPTION
 */
export async function importGeneration(options: ImportOptions): Promise<ImportedGeneration> {
  const { file, digest, signal } = options
  if (digest !== undefined && !/^sha256:[0-9a-f]{64}$/.test(digest)) {
    const happened = `expected \`digest\` to be sha256: and 64 hexadecimal digits, got ${JSON.stringify(digest)}`
    throw new WarmforkError('BAD_OPTION', { tried: TRIED, happened })
  }
  const verify = options.verify === undefined ? undefined : publicKey(options.verify)
  const criuVersion = formatVersion(findCriu().version)
  try {
    const source = typeof file === 'string' ? piecesOf(file) : file
    const archive = await Archive.open(source, { digest, verify })
    try {
      const { generation: from } = archive.contents
      const name = options.name ?? from.name
      await using store = await openStore(name, options.store, from.surroundings)
      const made = await importInto(store, archive, { criuVersion, signal })
      made.letGo()
      return {
        name,
        number: made.number,
        digest: archive.digest,
        ...(archive.signedBy === undefined ? {} : { signedBy: archive.signedBy }),
        dataBytes: archive.dataBytes,
        from: { name: from.name, number: from.number, createdAt: new Date(from.createdAt) },
      }
    } finally {
      await archive.close()
    }
  } catch (error) {
    const { syscall } = error as NodeJS.ErrnoException
    if (error instanceof WarmforkError || errnoOf(error) === undefined || (syscall !== 'open' && syscall !== 'read'))
      throw error
    const happened = `${typeof file === 'string' ? file : 'the stream'} cannot be read: ${errnoOf(error)}`
    throw new WarmforkError('BAD_OPTION', {
      tried: TRIED,
      happened,
      remedy: 'Name an archive that can be read.',
      cause: error,
    })
  }
}

const PIECE_BYTES = 1 << 20

/** Each piece is there until the next one is asked for; that is read meanwhile. */
async function* piecesOf(path: string): AsyncGenerator<Buffer> {
  const handle = await open(path, 'r')
  const buffers = [Buffer.allocUnsafeSlow(PIECE_BYTES), Buffer.allocUnsafeSlow(PIECE_BYTES)]
  let next: ReturnType<typeof handle.read<Buffer>> | undefined
  try {
    for (let turn = 0; ; turn++) {
      const { bytesRead, buffer } = await (next ?? handle.read(buffers[0]!))
      if (bytesRead === 0) return
      next = handle.read(buffers[(turn + 1) % 2]!)
      next.catch(() => {})
      yield buffer.subarray(0, bytesRead)
    }
  } finally {
    await next?.catch(() => {})
    await handle.close()
  }
}

/** Children of another user must get to their page files. */
function openStore(name: string, root: string | undefined, { uid, gid }: { uid: number; gid: number }): Promise<Store> {
  return Store.open({
    name,
    access: 'exclusive',
    ...(root === undefined ? {} : { root }),
    ...(uid === process.geteuid?.() ? {} : { group: gid }),
  })
}

/** What a supervisor would fork from. */
async function chosen(store: Store): Promise<Generation> {
  const verdicts = Verdicts.read(store.directory)
  if (verdicts.pinned !== undefined) return store.get(verdicts.pinned)
  const generation = (await store.list()).filter(({ number }) => verdicts.whyNot(number) === undefined).at(-1)
  if (generation) return generation
  const happened = `there is none in ${store.directory}`
  throw new WarmforkError('GENERATION_NOT_FOUND', { tried: 'export the newest generation', happened })
}

/** Waits where the reader is slower. */
async function writeTo(stream: Writable, bytes: Buffer): Promise<void> {
  await new Promise<void>((resolve, reject) => {
    // The callback tells of it too; without a listener it would end the process.
    stream.once('error', reject)
    stream.write(bytes, (error) => {
      if (error) return reject(error)
      stream.off('error', reject)
      resolve()
    })
  })
}
