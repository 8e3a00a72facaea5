/**
 * An archive that is being read: its list first, whose digest and signature are checked before anything in it is believed, and
 * then its members, each compared with the list, into an empty directory. Whatever is not exactly as the list says is refused.
 * It knows neither stores nor machines.
 */
import { createHash, type KeyObject } from 'node:crypto'
import { type FileHandle, open } from 'node:fs/promises'
import { join } from 'node:path'
import { errnoOf } from '../../errors.js'
import type { Run } from '../checksum.js'
import type { NewPageFile } from '../draft.js'
import { decompressed } from './blocks.js'
import type { ByteReader } from './byte-reader.js'
import {
  type ArchiveContents,
  type ArchiveMember,
  CONTENTS_NAME,
  checkRuns,
  decodeContents,
  digestOf,
  MAX_CONTENTS_BYTES,
  SIGNATURE_NAME,
} from './contents.js'
import { invalid } from './failure.js'
import { keyName, MAX_SIGNATURE_BYTES, readSignature } from './signature.js'
import { BLOCK_BYTES, END, header, paddingBytes, parse, strange } from './tar.js'

export interface Expectations {
  /** As `export` gave it. */
  readonly digest?: string | undefined
  /** A public ed25519 key, which must have signed it. */
  readonly verify?: KeyObject | undefined
}

/** So much is hashed and written at once. */
const PIECE_BYTES = 512 << 10

export class Archive {
  private constructor(
    private readonly reader: ByteReader,
    readonly contents: ArchiveContents,
    readonly digest: string,
    /** The key that signed it. */
    readonly signedBy: string | undefined,
  ) {}

  /** Reads and checks what stands before the members. Throws ARCHIVE_INVALID, GENERATION_MISFIT (a newer format). */
  static async open(source: AsyncIterable<Uint8Array>, { digest, verify }: Expectations = {}): Promise<Archive> {
    const reader = await decompressed(source)
    try {
      const text = await leading(reader, CONTENTS_NAME, MAX_CONTENTS_BYTES)
      if (text === undefined) throw invalid('it does not begin with the list that `warmfork export` writes')
      const found = digestOf(text)
      if (digest !== undefined && digest !== found) {
        throw invalid(`its digest is ${found} and ${digest} was asked for`, {
          remedy: 'Do not use it, or name the digest that `warmfork export` printed for it.',
        })
      }
      const signature = await leading(reader, SIGNATURE_NAME, MAX_SIGNATURE_BYTES)
      const signer = signature && keyName(readSignature(signature, found))
      if (verify && signer !== keyName(verify)) {
        const happened =
          signer === undefined
            ? 'it is not signed'
            : `it was signed with another key, ${signer}, than ${keyName(verify)}`
        throw invalid(happened, { remedy: 'Do not use it, or name the public key of who exported it.' })
      }
      return new Archive(reader, decodeContents(text), found, signer)
    } catch (error) {
      await reader.close().catch(() => {})
      throw error
    }
  }

  /** Of all members, as they will lie on the disk. */
  get dataBytes(): number {
    return this.contents.members.reduce((sum, { bytes }) => sum + bytes, 0)
  }

  /**
   * Writes the members below a directory that has the directories of a generation, and no files of these names. Nothing of it
   * may be used before it returns. Throws ARCHIVE_INVALID, and what writing throws.
   */
  async unpack(directory: string, signal?: AbortSignal): Promise<NewPageFile[]> {
    const pageFiles: NewPageFile[] = []
    const before = new Set([CONTENTS_NAME, SIGNATURE_NAME])
    const names = new Set(this.contents.members.map(({ name }) => name))
    let runs: Buffer = Buffer.alloc(0)
    for (const member of this.contents.members) {
      const { name, bytes, apparentBytes } = member
      const found = await this.reader.take(BLOCK_BYTES, `the header of ${name}`)
      if (!found.equals(header(name, bytes))) throw strange(found, member, before, names)
      const stretches: readonly Run[] = apparentBytes === undefined ? [[0, bytes]] : checkRuns(runs, member)
      const keep = name.endsWith('.runs') ? Buffer.allocUnsafeSlow(bytes) : undefined
      await this.#unpackOne(directory, member, stretches, { keep, signal })
      if (keep) runs = keep
      if (apparentBytes !== undefined) pageFiles.push({ name, runs: stretches, sha256: member.sha256 })
      before.add(name)
    }
    await this.#expectEnd(before, names)
    return pageFiles
  }

  async close(): Promise<void> {
    await this.reader.close()
  }

  /** `keep`: gets the content, too. The stretches of a page file are no file here: sealing writes them. */
  async #unpackOne(
    directory: string,
    { name, bytes, sha256, apparentBytes }: ArchiveMember,
    stretches: readonly Run[],
    { keep, signal }: { keep: Buffer | undefined; signal: AbortSignal | undefined },
  ): Promise<void> {
    const hash = createHash('sha256')
    const handle = keep ? undefined : await open(join(directory, name), 'wx', 0o600)
    try {
      let at = 0
      for (const [offset, length] of stretches) {
        for (let done = 0; done < length; ) {
          signal?.throwIfAborted()
          const piece = await this.reader.some(Math.min(PIECE_BYTES, length - done))
          if (!piece) throw invalid(`it is cut short: it ends in its member ${name}`)
          // A thread writes while it is hashed.
          const writing = handle && writeAll(handle, piece, offset + done)
          writing?.catch(() => {})
          hash.update(piece)
          if (keep) piece.copy(keep, at)
          await writing
          done += piece.length
          at += piece.length
        }
      }
      await skipPadding(this.reader, name, bytes)
      if (hash.digest('hex') !== sha256) throw invalid(`its member ${name} has another content than its list says`)
      if (apparentBytes !== undefined) await handle?.truncate(apparentBytes)
    } catch (error) {
      if (errnoOf(error) !== 'EFBIG') throw error
      throw invalid(`its member ${name} has ${apparentBytes} bytes, more than files have on the store's file system`, {
        cause: error,
      })
    } finally {
      await handle?.close()
    }
  }

  async #expectEnd(before: ReadonlySet<string>, names: ReadonlySet<string>): Promise<void> {
    const end = await this.reader.take(END.length, 'its end')
    if (!end.equals(END)) throw strange(end.subarray(0, BLOCK_BYTES), undefined, before, names)
    if ((await this.reader.peek(1)).length > 0) throw invalid('something follows after its end')
  }
}

/** The content of a member that stands before all others; undefined where the next one is another. */
async function leading(reader: ByteReader, name: string, mostBytes: number): Promise<Buffer | undefined> {
  const block = await reader.peek(BLOCK_BYTES)
  const found = block.length < BLOCK_BYTES ? undefined : parse(block)
  if (found?.name !== name) return undefined
  const { bytes } = found
  if (!Number.isSafeInteger(bytes) || bytes < 0 || bytes > mostBytes) {
    throw invalid(`its member ${name} has ${bytes} bytes, and ${mostBytes} at most are read`)
  }
  if (!block.equals(header(name, bytes))) throw strange(block, { name, bytes }, new Set(), new Set([name]))
  await reader.take(BLOCK_BYTES, name)
  const content = await reader.take(bytes, `its member ${name}`)
  await skipPadding(reader, name, bytes)
  return content
}

async function skipPadding(reader: ByteReader, name: string, bytes: number): Promise<void> {
  const padding = await reader.take(paddingBytes(bytes), `its member ${name}`)
  if (padding.some((byte) => byte !== 0)) throw invalid(`what follows its member ${name} is damaged`)
}

async function writeAll(handle: FileHandle, bytes: Buffer, position: number): Promise<void> {
  for (let at = 0; at < bytes.length; ) {
    const { bytesWritten } = await handle.write(bytes, at, bytes.length - at, position + at)
    at += bytesWritten
  }
}
