/**
 * The compressed form of an archive: blocks that are compressed each for itself, so that all processors work on them, and that
 * say beforehand how large they are, so that memory is bounded whatever they hold. A gzip archive is a row of gzip members and
 * a zstd archive a row of zstd frames: `zcat`, `zstd -d` and tar read them. It knows nothing of what is in them.
 *
 * Before each block stand the lengths of its bytes and of their compressed form, and a checksum of that form, since gzip and
 * zstd have bits whose change nobody would see: in gzip in an extra field, in zstd in a frame that readers skip.
 */
import { createHash } from 'node:crypto'
import { promisify } from 'node:util'
import zlib from 'node:zlib'
import { ByteReader } from './byte-reader.js'
import { invalid } from './failure.js'
import { openZstd, type Zstd } from './zstd.js'

export type Compression = 'none' | 'gzip' | 'zstd'
export const COMPRESSIONS: readonly Compression[] = ['none', 'gzip', 'zstd']

const BLOCK_BYTES = 1 << 20
/** What cannot be compressed grows a little. */
const MOST_COMPRESSED_BYTES = BLOCK_BYTES + (64 << 10)
/** Of libuv's four threads, two are left for forks. */
const AT_ONCE = 2

/** Fast rather than small: measured in docs/exporting.md. */
const LEVELS = { gzip: 1, zstd: 1 } as const

const CHECK_BYTES = 12
const FIELD_BYTES = 8 + CHECK_BYTES

interface Codec {
  /** What stands before the fields. */
  readonly mark: Buffer
  compress(raw: Buffer): Promise<Uint8Array>
  decompress(body: Buffer, bytes: number): Promise<Uint8Array>
  close(): Promise<void>
}

const gzip = promisify<Uint8Array, zlib.ZlibOptions, Buffer>(zlib.gzip)
const gunzip = promisify<Uint8Array, zlib.ZlibOptions, Buffer>(zlib.gunzip)

/** Of zlib: a larger chunk takes a block as a whole. */
const LEAST_CHUNK_BYTES = 64

const GZIP_HEAD = Buffer.from([0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0xff])

const GZIP: Omit<Codec, 'close'> = {
  // With an extra field of 24 bytes, which holds one of 20 with our name.
  mark: Buffer.from([0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 0xff, FIELD_BYTES + 4, 0, 0x57, 0x46, FIELD_BYTES, 0]),
  compress: async (raw) =>
    (await gzip(raw, { level: LEVELS.gzip, chunkSize: MOST_COMPRESSED_BYTES })).subarray(GZIP_HEAD.length),
  decompress: (body, bytes) =>
    gunzip(Buffer.concat([GZIP_HEAD, body]), { maxOutputLength: bytes, chunkSize: Math.max(bytes, LEAST_CHUNK_BYTES) }),
}

function zstdCodec(zstd: Zstd): Codec {
  return {
    mark: Buffer.from([0x50, 0x2a, 0x4d, 0x18, FIELD_BYTES, 0, 0, 0]),
    compress: (raw) => zstd.compress(raw, LEVELS.zstd),
    decompress: (body, bytes) => zstd.decompress(body, bytes),
    close: () => zstd.close(),
  }
}

function codecOf(compression: 'gzip' | 'zstd'): Codec {
  return compression === 'gzip' ? { ...GZIP, close: async () => {} } : zstdCodec(openZstd())
}

/** Gathers what is written into blocks, compresses them and hands them on in their order. */
export class BlockWriter {
  readonly #codec: Codec | undefined
  #block = Buffer.allocUnsafeSlow(BLOCK_BYTES)
  #filled = 0
  /** What is compressed, the oldest first. */
  readonly #pending: { done: Promise<Buffer>; block: Buffer<ArrayBuffer> }[] = []
  #handing: Promise<void> = Promise.resolve()
  /** To be filled again: making them anew takes a tenth of the time that an export takes. */
  readonly #free: Buffer<ArrayBuffer>[] = []
  #written = 0

  constructor(
    compression: Compression,
    /** Has the bytes to itself until it resolves. */
    private readonly output: (bytes: Buffer) => Promise<void>,
  ) {
    this.#codec = compression === 'none' ? undefined : codecOf(compression)
  }

  /** Of what came out. */
  get bytesWritten(): number {
    return this.#written
  }

  /** The bytes are copied. */
  async write(bytes: Uint8Array): Promise<void> {
    for (let at = 0; at < bytes.length; ) {
      const length = Math.min(bytes.length - at, BLOCK_BYTES - this.#filled)
      this.#block.set(bytes.subarray(at, at + length), this.#filled)
      this.#filled += length
      at += length
      if (this.#filled === BLOCK_BYTES) await this.#next()
    }
  }

  async end(): Promise<void> {
    if (this.#filled > 0) await this.#next()
    while (this.#pending.length > 0) await this.#hand()
    await this.#handing
  }

  async close(): Promise<void> {
    await Promise.allSettled([...this.#pending.map(({ done }) => done), this.#handing])
    await this.#codec?.close()
  }

  async #next(): Promise<void> {
    const block = this.#block
    const filled = block.subarray(0, this.#filled)
    const done = this.#codec ? compressBlock(this.#codec, filled) : Promise.resolve(filled)
    // It may fail before anybody looks.
    done.catch(() => {})
    this.#pending.push({ done, block })
    this.#filled = 0
    while (this.#pending.length > AT_ONCE) await this.#hand()
    this.#block = this.#free.pop() ?? Buffer.allocUnsafeSlow(BLOCK_BYTES)
  }

  /** The oldest goes out while the next ones are filled. */
  async #hand(): Promise<void> {
    const { done, block } = this.#pending.shift()!
    const bytes = await done
    await this.#handing
    this.#written += bytes.length
    this.#handing = this.output(bytes).then(() => {
      // A thread may have it.
      if (block.length === BLOCK_BYTES) this.#free.push(block)
    })
    this.#handing.catch(() => {})
  }
}

async function compressBlock(codec: Codec, raw: Buffer): Promise<Buffer> {
  const rawBytes = raw.length
  const body = await codec.compress(raw)
  return Buffer.concat([codec.mark, fields(rawBytes, body), body])
}

function fields(rawBytes: number, body: Uint8Array): Buffer {
  const found = Buffer.alloc(FIELD_BYTES)
  found.writeUInt32LE(rawBytes, 0)
  found.writeUInt32LE(body.length, 4)
  const check = createHash('sha256').update(found.subarray(0, 8)).update(body).digest()
  check.copy(found, 8, 0, CHECK_BYTES)
  return found
}

/** The bytes of an archive, decompressed where they are compressed. Throws ARCHIVE_INVALID. */
export async function decompressed(source: AsyncIterable<Uint8Array>): Promise<ByteReader> {
  const reader = new ByteReader(source)
  const start = await reader.peek(4)
  if (start.length === 0) throw invalid('it is empty')
  if (start.equals(zstdMark)) return new ByteReader(blocksOf(reader, codecOf('zstd')))
  if (start.subarray(0, 2).equals(GZIP_HEAD.subarray(0, 2))) {
    return new ByteReader(blocksOf(reader, codecOf('gzip')))
  }
  if (start.equals(ZSTD_FRAME)) throw foreign('zstd -d')
  return reader
}

const zstdMark = Buffer.from([0x50, 0x2a, 0x4d, 0x18])
const ZSTD_FRAME = Buffer.from([0x28, 0xb5, 0x2f, 0xfd])

function foreign(command: string): Error {
  return invalid('it was compressed by another program than `warmfork export`, or is damaged', {
    remedy: `If it was compressed by hand, decompress it first: \`${command} < FILE | warmfork import -\`.`,
  })
}

async function* blocksOf(reader: ByteReader, codec: Codec): AsyncGenerator<Uint8Array> {
  const pending: Promise<Uint8Array>[] = []
  try {
    for (let number = 1; ; number++) {
      const head = await reader.peek(1)
      if (head.length > 0) {
        const block = nextBlock(reader, codec, number)
        const { raw } = await block
        raw.catch(() => {})
        pending.push(raw)
      }
      while (pending.length > (head.length > 0 ? AT_ONCE : 0)) yield await pending.shift()!
      if (head.length === 0) return
    }
  } finally {
    await Promise.allSettled(pending)
    await codec.close()
    await reader.close()
  }
}

/** Reads a block; its bytes come later, while the next one is read. */
async function nextBlock(reader: ByteReader, codec: Codec, number: number): Promise<{ raw: Promise<Uint8Array> }> {
  const what = `its compressed block ${number}`
  const mark = await reader.take(codec.mark.length, what)
  if (!mark.equals(codec.mark)) {
    if (number === 1) throw foreign(mark[0] === 0x1f ? 'gzip -d' : 'zstd -d')
    throw invalid(`${what} is damaged`)
  }
  const found = await reader.take(FIELD_BYTES, what)
  const rawBytes = found.readUInt32LE(0)
  const bodyBytes = found.readUInt32LE(4)
  if (rawBytes === 0 || rawBytes > BLOCK_BYTES || bodyBytes === 0 || bodyBytes > MOST_COMPRESSED_BYTES) {
    throw invalid(`${what} says that ${bodyBytes} bytes of it hold ${rawBytes}, which no block does`)
  }
  const body = await reader.take(bodyBytes, what)
  if (!fields(rawBytes, body).equals(found)) throw invalid(`${what} is damaged`)
  const raw = codec.decompress(body, rawBytes).then(
    (bytes) => {
      if (bytes.length !== rawBytes) throw invalid(`${what} holds ${bytes.length} bytes and not ${rawBytes}`)
      return bytes
    },
    (cause: unknown) => {
      throw invalid(`${what} cannot be decompressed`, { cause })
    },
  )
  return { raw }
}
