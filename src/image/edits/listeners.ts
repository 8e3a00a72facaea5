/**
 * Listeners: CRIU would bind a listening socket's address again for every copy, and look at no inherited descriptor for
 * internet sockets; of a Unix socket it would remove the path first, so that the newest copy alone were reached. Turned into
 * an entry for a regular file of an invented name, the socket is taken from a descriptor that the supervisor hands in
 * (`--inherit-fd fd[N]:NAME`), and no file of that name is ever opened. Sockets that are bound and have no peer, for datagrams
 * or not listening yet, are the same case.
 */
import { resolve } from 'node:path'
import type { ImageSet } from '../image-set.js'
import {
  FdinfoEntry,
  FILE_TYPE,
  FileEntry,
  type InetSocket,
  type RegularFile,
  TCP_LISTEN,
  type UnixSocket,
} from '../schema.js'

export interface Listener {
  /** CRIU's key for `--inherit-fd`: the invented path without its leading slash. */
  key: string
  /** Inode of the template's socket. */
  inode: number
  /** AF_UNIX (1), AF_INET (2) or AF_INET6 (10). */
  family: number
  /** SOCK_STREAM (1), SOCK_DGRAM (2) or SOCK_SEQPACKET (5). */
  type: number
  /** 0 for a Unix socket. */
  port: number
  /** The address as the kernel has it: 4 or 16 bytes, or the name of a Unix socket, with a zero first where it is no path. */
  address: Uint8Array
  backlog: number
  v6only: boolean
  /** Of a Unix socket that has one, absolute. */
  path?: string
}

const AF_UNIX = 1
const SOCK_DGRAM = 2
/** As in the kernel's tcp_states.h: of a socket that neither listens nor is connected. */
const TCP_CLOSE = 7
const O_RDWR = 2
/** CRIU's note on the far end of a connection to the outside: it has the state of a listener, and is nobody's in the image. */
const USK_EXTERN = 1

/** Edits files and fdinfo images; returns what the supervisor has to hand in at each restore. */
export function inheritListeners(set: ImageSet): Listener[] {
  const listeners: Listener[] = []
  const ids = new Set<number>()
  const files = set.files()
  const mountId = files.find(({ regular }) => regular)?.regular?.mountId
  const edited = files.map((file) => {
    const name = `/warmfork/listener/${file.id}`
    const listener = inetListener(name.slice(1), file.inet) ?? unixListener(name.slice(1), file.unix)
    if (!listener) return file
    listeners.push(listener)
    ids.add(file.id)
    const { owner, flags } = (file.inet ?? file.unix)!
    const regular: RegularFile = {
      id: file.id,
      flags: O_RDWR | flags,
      pos: 0n,
      owner,
      name,
      buildId: [],
      ...(mountId === undefined ? {} : { mountId }),
    }
    return { type: FILE_TYPE.REG, id: file.id, regular }
  })
  if (listeners.length === 0) return []
  set.put('files.img', FileEntry, edited)
  for (const image of new Set(set.descriptors().map((one) => one.image))) {
    const entries = set.all(image, FdinfoEntry)
    set.put(
      image,
      FdinfoEntry,
      entries.map((entry) => (ids.has(entry.id) ? { ...entry, type: FILE_TYPE.REG } : entry)),
    )
  }
  return listeners
}

/** Undefined for a socket that belongs to a connection, or to nothing yet. */
function inetListener(key: string, socket: InetSocket | undefined): Listener | undefined {
  if (!socket) return undefined
  const { ino: inode, family, type, state, sourcePort: port, destinationPort, backlog } = socket
  const isBound = (type === SOCK_DGRAM || state === TCP_CLOSE) && port !== 0 && destinationPort === 0
  if (state !== TCP_LISTEN && !isBound) return undefined
  const address = new Uint8Array(Uint32Array.from(socket.sourceAddress).buffer)
  return { key, inode, family, type, port, address, backlog, v6only: socket.v6only === true }
}

function unixListener(key: string, socket: UnixSocket | undefined): Listener | undefined {
  if (!socket || (socket.uflags & USK_EXTERN) !== 0) return undefined
  const { ino: inode, type, state, backlog, name: address, peer } = socket
  const isBound = (type === SOCK_DGRAM || state === TCP_CLOSE) && address.length > 0 && peer === 0
  if (state !== TCP_LISTEN && !isBound) return undefined
  const path = pathOf(socket)
  return { key, inode, family: AF_UNIX, type, port: 0, address, backlog, v6only: false, ...(path ? { path } : {}) }
}

function pathOf({ name, nameDirectory, deleted }: UnixSocket): string | undefined {
  if (deleted || name.length === 0 || name[0] === 0) return undefined
  const end = name.indexOf(0)
  const path = Buffer.from(end < 0 ? name : name.subarray(0, end)).toString('utf8')
  return resolve('/', nameDirectory ?? '', path)
}
