/**
 * One `.img` file of CRIU: two magic numbers, then entries, each a length and a message. After some kinds of entries
 * raw bytes follow (`payload`). Pages and the archives of namespaces have no magic: those are raw, and not read here.
 */
import { corrupt, truncated } from './failure.js'
import { type Decoded, DecodeError, decode, type Fields, type Message } from './message.js'
import { GhostChunk, GhostFile, PipeData, SocketPacket, TcpStream } from './schema.js'

/** What CRIU ≥ 1.1 puts before the magic of the kind: images, and its own service files (stats). The inventory, which says the version, has none. */
const COMMON_MAGIC = 0x54564319
const SERVICE_MAGIC = 0x55105940
const INVENTORY_MAGIC = 0x58313116

export interface ImageEntry {
  readonly message: Uint8Array
  /** Raw bytes that follow the message in the file. */
  readonly payload?: Uint8Array
}

export interface ImageFile {
  readonly family: typeof COMMON_MAGIC | typeof SERVICE_MAGIC | null
  readonly magic: number
  readonly entries: readonly ImageEntry[]
}

/** Whether a file of an image directory has no framing: memory pages, archives, dumps of other programs. */
export function isRaw(name: string): boolean {
  return (
    /^pages-/.test(name) ||
    /^(tmpfs|ifaddr|route6?|rule|ip6?tables|nftables|netns-(ct|exp))-/.test(name) ||
    // These are framed, with payloads that nobody here reads; they stand in images of namespaces and of BPF maps only.
    /^(ipcns-(shm|msg)|autofs)-|^bpfmap-data\./.test(name)
  )
}

const MAGIC = {
  ghostFile: 0x52583605,
  pipesData: 0x56453709,
  fifoData: 0x59333054,
  socketQueues: 0x56264026,
  tcpStream: 0x51465506,
}

export function parseImageFile(name: string, bytes: Uint8Array): ImageFile {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
  if (bytes.length < 8) throw truncated(name, `it has ${bytes.length} bytes, fewer than its magic numbers`)
  const first = view.getUint32(0, true)
  const family = first === COMMON_MAGIC || first === SERVICE_MAGIC ? first : null
  if (family === null && first !== INVENTORY_MAGIC) {
    throw corrupt(name, `it starts with 0x${first.toString(16)}, which is no magic number of a CRIU image`)
  }
  const magic = family === null ? first : view.getUint32(4, true)
  const entries: ImageEntry[] = []
  let at = family === null ? 4 : 8
  const take = (length: number, what: string): Uint8Array => {
    if (length > bytes.length - at)
      throw truncated(name, `${what} at offset ${at} needs ${length} bytes and ${bytes.length - at} are left`)
    at += length
    return bytes.subarray(at - length, at)
  }
  let chunked = false
  while (at < bytes.length) {
    if (bytes.length - at < 4)
      throw truncated(name, `${bytes.length - at} bytes are left at offset ${at}, fewer than an entry's length`)
    const length = view.getUint32(at, true)
    at += 4
    const message = take(length, 'an entry')
    if (magic === MAGIC.ghostFile && entries.length === 0) {
      chunked = decodeIn(name, GhostFile, message).chunks === true
      if (chunked || at === bytes.length) entries.push({ message })
      else entries.push({ message, payload: take(bytes.length - at, 'the content') })
      continue
    }
    const following = chunked ? Number(decodeIn(name, GhostChunk, message).length) : payloadLength(name, magic, message)
    entries.push(following > 0 ? { message, payload: take(following, 'the data of an entry') } : { message })
  }
  return { family, magic, entries }
}

function payloadLength(name: string, magic: number, message: Uint8Array): number {
  switch (magic) {
    case MAGIC.pipesData:
    case MAGIC.fifoData:
      return decodeIn(name, PipeData, message).bytes
    case MAGIC.socketQueues:
      return decodeIn(name, SocketPacket, message).length
    case MAGIC.tcpStream: {
      const { inqLength, outqLength } = decodeIn(name, TcpStream, message)
      return inqLength + outqLength
    }
    default:
      return 0
  }
}

export function buildImageFile(file: ImageFile): Uint8Array {
  const magics = file.family === null ? [file.magic] : [file.family, file.magic]
  const head = 4 * magics.length
  const size = file.entries.reduce(
    (sum, { message, payload }) => sum + 4 + message.length + (payload?.length ?? 0),
    head,
  )
  const bytes = Buffer.allocUnsafe(size)
  let at = 0
  for (const magic of magics) at = bytes.writeUInt32LE(magic, at)
  for (const { message, payload } of file.entries) {
    at = bytes.writeUInt32LE(message.length, at)
    bytes.set(message, at)
    at += message.length
    if (payload) {
      bytes.set(payload, at)
      at += payload.length
    }
  }
  return bytes
}

/** `decode`, with the file's name in the error. */
export function decodeIn<F extends Fields>(name: string, schema: Message<F>, bytes: Uint8Array): Decoded<F> {
  try {
    return decode(schema, bytes)
  } catch (cause) {
    if (cause instanceof DecodeError) throw corrupt(name, cause.message, cause)
    throw cause
  }
}
