/**
 * Listeners: CRIU would bind a listening socket's port again for every copy, and look at no inherited descriptor for
 * internet sockets. Turned into an entry for a regular file of an invented name, the socket is taken from a descriptor
 * that the supervisor hands in (`--inherit-fd fd[N]:NAME`), and no file of that name is ever opened.
 * Bound UDP sockets are the same case.
 */
import type { ImageSet } from '../image-set.js'
import { FdinfoEntry, FILE_TYPE, FileEntry, type InetSocket, TCP_LISTEN } from '../schema.js'

export interface Listener {
  /** CRIU's key for `--inherit-fd`: the invented path without its leading slash. */
  key: string
  /** Inode of the template's socket. */
  inode: number
  /** AF_INET (2) or AF_INET6 (10). */
  family: number
  /** SOCK_STREAM (1) or SOCK_DGRAM (2). */
  type: number
  port: number
  /** The address as the kernel has it, 4 or 16 bytes. */
  address: Uint8Array
  backlog: number
  v6only: boolean
}

const SOCK_DGRAM = 2
const O_RDWR = 2

/** Whether a socket belongs to nobody but its port: it listens, or it is bound and has no peer. */
function isShared(socket: InetSocket): boolean {
  if (socket.state === TCP_LISTEN) return true
  return socket.type === SOCK_DGRAM && socket.sourcePort !== 0 && socket.destinationPort === 0
}

/** Edits files and fdinfo images; returns what the supervisor has to hand in at each restore. */
export function inheritListeners(set: ImageSet): Listener[] {
  const listeners: Listener[] = []
  const ids = new Set<number>()
  const files = set.files()
  const mountId = files.find(({ regular }) => regular)?.regular?.mountId
  const edited = files.map((file) => {
    const socket = file.inet
    if (!socket || !isShared(socket)) return file
    const name = `/warmfork/listener/${file.id}`
    listeners.push({
      key: name.slice(1),
      inode: socket.ino,
      family: socket.family,
      type: socket.type,
      port: socket.sourcePort,
      address: new Uint8Array(Uint32Array.from(socket.sourceAddress).buffer),
      backlog: socket.backlog,
      v6only: socket.v6only === true,
    })
    ids.add(file.id)
    const { owner } = socket
    const flags = O_RDWR | socket.flags
    const regular = {
      id: file.id,
      flags,
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
