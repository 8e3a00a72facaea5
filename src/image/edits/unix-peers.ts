/**
 * Unix sockets that are connected to a process outside of the image: to a database, the system's log, D-Bus. Two processes cannot
 * have one connection. So a stream is closed in the fork, as TCP connections are (`--tcp-close`): the socket is there, its other
 * side is gone, and what waited in it to be read is the source's alone. A socket for datagrams has no state but where it sends to:
 * each fork connects one of its own to the same path.
 */
import type { ImageSet } from '../image-set.js'
import { FileEntry, SHUTDOWN_BOTH, SocketPacket, type UnixSocket } from '../schema.js'

/** CRIU's note on the far end of a connection to the outside. */
const USK_EXTERN = 1
const SOCK_DGRAM = 2

export interface UnixPeersOptions {
  /** Sockets that the fork gets from elsewhere, by inode: left as they are. */
  inherited: ReadonlySet<number>
  /** Sockets for datagrams that a fork is not to connect anew, by inode. */
  disconnected: ReadonlySet<number>
}

export interface UnixPeers {
  /** How many connections are closed in a fork. */
  closed: number
  /** Where forks connect sockets for datagrams to, as the kernel has the address: a path, or a name that begins with a zero. */
  reconnected: Uint8Array[]
}

/** Edits files.img and what waits in the sockets. */
export function detachUnixPeers(set: ImageSet, { inherited, disconnected }: UnixPeersOptions): UnixPeers {
  const files = set.files()
  const outside = new Map(files.flatMap(({ unix }) => (unix && unix.uflags & USK_EXTERN ? [[unix.ino, unix]] : [])))
  const detached = new Set<number>()
  const used = new Set<number>()
  const reconnected: Uint8Array[] = []
  let closed = 0
  for (const { unix } of files) {
    const peer = unix && outside.get(unix.peer)
    if (!unix || !peer) continue
    if (inherited.has(unix.ino)) {
      used.add(peer.ino)
      continue
    }
    detached.add(unix.id)
    // Its own address, where it has one, is the source's. (What a server accepts has the address that it listens at.)
    nameless(unix)
    if (unix.type === SOCK_DGRAM && peer.name.length > 0 && !disconnected.has(unix.ino)) {
      reconnected.push(peer.name)
      used.add(peer.ino)
      continue
    }
    unix.peer = 0
    // CRIU makes a pair of which it closes the other socket, as for a connection whose other side had ended before.
    if (unix.type !== SOCK_DGRAM) unix.shutdown = SHUTDOWN_BOTH
    closed++
  }
  if (detached.size === 0) return { closed, reconnected }
  set.put(
    'files.img',
    FileEntry,
    files.filter(({ unix }) => !unix || !(unix.uflags & USK_EXTERN) || used.has(unix.ino)),
  )
  dropPackets(set, detached)
  return { closed, reconnected }
}

/** Sockets for datagrams whose far end is not there at a fork: it gets them without one. Edits files.img. */
export function disconnectDatagrams(set: ImageSet, isGone: (address: Uint8Array) => boolean): void {
  const files = set.files()
  const gone = new Set(
    files.flatMap(({ unix }) => (unix && unix.uflags & USK_EXTERN && isGone(unix.name) ? [unix.ino] : [])),
  )
  if (gone.size === 0) return
  for (const { unix } of files) if (unix && gone.has(unix.peer)) unix.peer = 0
  set.put(
    'files.img',
    FileEntry,
    files.filter(({ unix }) => !unix || !gone.has(unix.ino)),
  )
}

function nameless(unix: UnixSocket): void {
  unix.name = new Uint8Array()
  delete unix.nameDirectory
  delete unix.deleted
}

function dropPackets(set: ImageSet, ids: ReadonlySet<number>): void {
  if (!set.has('sk-queues.img')) return
  const packets = set.all('sk-queues.img', SocketPacket)
  if (packets.some(({ idFor }) => ids.has(idFor))) {
    set.retain('sk-queues.img', (index) => !ids.has(packets[index]!.idFor))
  }
}
