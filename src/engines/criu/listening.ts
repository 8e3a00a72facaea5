/**
 * Sockets that children share, made anew: after a restart at the same addresses, for a trial at addresses that nobody knows. It
 * knows sockets and what is written down of them, and neither images nor generations.
 */
import { closeSync, lstatSync, mkdirSync, statSync, unlinkSync } from 'node:fs'
import { dirname } from 'node:path'
import { WarmforkError } from '../../errors.js'
import type { Listener } from '../../image/edits/listeners.js'
import {
  asFileOwner,
  bindSocket,
  connectSocket,
  isNonblocking,
  listenSocket,
  SystemError,
  setNonblocking,
  setSocketOption,
  socket,
  socketName,
  socketOption,
} from '../../linux/libc.js'

/** What is written down of a socket beside what an image says of it; bytes in hex. */
export interface SocketSettings {
  readonly protocol: number
  /** Whether it accepts connections; else it is only bound. */
  readonly listening: boolean
  readonly nonblocking: boolean
  /** Its address, as getsockname gives it. */
  readonly name: string
  /** Each that a socket can be given again, as getsockopt gives it. */
  readonly options: readonly (readonly [level: number, option: number, value: string])[]
  /** Where the program has set them, in bytes as it set them. */
  readonly sendBuffer?: number
  readonly receiveBuffer?: number
  /** Of the socket's path. */
  readonly file?: { readonly mode: number; readonly uid: number; readonly gid: number }
}

/** A listener with all that is needed to make it anew. */
export type SharedSocket = Listener & { readonly socket: SocketSettings }

export interface BoundSockets {
  /** By the inode of the program's socket. */
  readonly descriptors: ReadonlyMap<number, number>
  /** The port that each listens at, or the name of a Unix socket. */
  readonly addresses: ReadonlyMap<number, { readonly port: number } | string>
  /** Paths of Unix sockets that were made, with the inode of each. */
  readonly paths: ReadonlyMap<string, number>
  /** Closes the sockets, and removes their paths as far as they are still theirs. */
  close(): void
}

/** Whose files the paths of Unix sockets are to be, where they are not to be ours. */
export interface PathOwner {
  readonly uid: number
  readonly gid: number
}

const [AF_UNIX, AF_INET, AF_INET6] = [1, 2, 10]
const [SOL_SOCKET, IPPROTO_IP, IPPROTO_TCP, IPPROTO_IPV6] = [1, 0, 6, 41]
const SOCK_STREAM = 1
const [SO_REUSEADDR, SO_SNDBUF, SO_RCVBUF, SO_BINDTODEVICE, SO_ACCEPTCONN] = [2, 7, 8, 25, 30]
const [SO_SNDBUFFORCE, SO_RCVBUFFORCE, SO_PROTOCOL, SO_BUF_LOCK] = [32, 33, 38, 72]
const [SNDBUF_LOCK, RCVBUF_LOCK] = [1, 2]

/** Of the kernel's headers, those that can be read and set: what a program may have asked of a socket that it serves on. */
const OPTIONS: readonly (readonly [level: number, option: number, families?: readonly number[]])[] = [
  [SOL_SOCKET, SO_REUSEADDR],
  [SOL_SOCKET, 5], // SO_DONTROUTE
  [SOL_SOCKET, 6], // SO_BROADCAST
  [SOL_SOCKET, 9], // SO_KEEPALIVE
  [SOL_SOCKET, 10], // SO_OOBINLINE
  [SOL_SOCKET, 12], // SO_PRIORITY
  [SOL_SOCKET, 13], // SO_LINGER
  [SOL_SOCKET, 15], // SO_REUSEPORT
  [SOL_SOCKET, 16], // SO_PASSCRED
  [SOL_SOCKET, 18], // SO_RCVLOWAT
  [SOL_SOCKET, 20], // SO_RCVTIMEO
  [SOL_SOCKET, 21], // SO_SNDTIMEO
  [SOL_SOCKET, SO_BINDTODEVICE],
  [SOL_SOCKET, 29], // SO_TIMESTAMP
  [SOL_SOCKET, 34], // SO_PASSSEC
  [SOL_SOCKET, 36], // SO_MARK
  [IPPROTO_IP, 1, [AF_INET]], // IP_TOS
  [IPPROTO_IP, 2, [AF_INET]], // IP_TTL
  [IPPROTO_IP, 8, [AF_INET]], // IP_PKTINFO
  [IPPROTO_IP, 11, [AF_INET]], // IP_RECVERR
  [IPPROTO_IP, 12, [AF_INET]], // IP_RECVTTL
  [IPPROTO_IP, 13, [AF_INET]], // IP_RECVTOS
  [IPPROTO_IP, 15, [AF_INET, AF_INET6]], // IP_FREEBIND
  [IPPROTO_IP, 19, [AF_INET]], // IP_TRANSPARENT
  [IPPROTO_IPV6, 26, [AF_INET6]], // IPV6_V6ONLY
  [IPPROTO_IPV6, 25, [AF_INET6]], // IPV6_RECVERR
  [IPPROTO_IPV6, 49, [AF_INET6]], // IPV6_RECVPKTINFO
  [IPPROTO_IPV6, 51, [AF_INET6]], // IPV6_RECVHOPLIMIT
  [IPPROTO_IPV6, 66, [AF_INET6]], // IPV6_RECVTCLASS
  [IPPROTO_IPV6, 67, [AF_INET6]], // IPV6_TCLASS
  [IPPROTO_IPV6, 75, [AF_INET6]], // IPV6_TRANSPARENT
  [IPPROTO_TCP, 1, [AF_INET, AF_INET6]], // TCP_NODELAY
  [IPPROTO_TCP, 4, [AF_INET, AF_INET6]], // TCP_KEEPIDLE
  [IPPROTO_TCP, 5, [AF_INET, AF_INET6]], // TCP_KEEPINTVL
  [IPPROTO_TCP, 6, [AF_INET, AF_INET6]], // TCP_KEEPCNT
  [IPPROTO_TCP, 9, [AF_INET, AF_INET6]], // TCP_DEFER_ACCEPT
  [IPPROTO_TCP, 13, [AF_INET, AF_INET6]], // TCP_CONGESTION
  [IPPROTO_TCP, 18, [AF_INET, AF_INET6]], // TCP_USER_TIMEOUT
  [IPPROTO_TCP, 23, [AF_INET, AF_INET6]], // TCP_FASTOPEN
]

/** What is to be written down of a socket, read from a descriptor of it. */
export function describeSocket({ family, type, path }: Listener, fd: number): SocketSettings {
  const protocol = integer(fd, SOL_SOCKET, SO_PROTOCOL)
  const locked = integer(fd, SOL_SOCKET, SO_BUF_LOCK)
  const file = path === undefined ? undefined : lstatSync(path, { throwIfNoEntry: false })
  return {
    protocol,
    listening: integer(fd, SOL_SOCKET, SO_ACCEPTCONN) === 1,
    nonblocking: isNonblocking(fd),
    name: socketName(fd).toString('hex'),
    options: optionsOf(fd, family, type),
    // The kernel says the double of what was asked for.
    ...(locked & SNDBUF_LOCK ? { sendBuffer: integer(fd, SOL_SOCKET, SO_SNDBUF) / 2 } : {}),
    ...(locked & RCVBUF_LOCK ? { receiveBuffer: integer(fd, SOL_SOCKET, SO_RCVBUF) / 2 } : {}),
    ...(file?.isSocket() ? { file: { mode: file.mode & 0o777, uid: file.uid, gid: file.gid } } : {}),
  }
}

function optionsOf(fd: number, family: number, type: number): [number, number, string][] {
  return OPTIONS.flatMap(([level, option, families]) => {
    if (families && !families.includes(family)) return []
    if (level === IPPROTO_TCP && type !== SOCK_STREAM) return []
    const value = socketOption(fd, level, option)
    return value ? [[level, option, value.toString('hex')]] : []
  })
}

function integer(fd: number, level: number, option: number): number {
  const value = socketOption(fd, level, option)
  return value && value.length >= 4 ? value.readInt32LE() : 0
}

/** What two sockets have in common that are at the same address. */
export function addressKey({ family, type, port, address, path, socket: { protocol, name } }: SharedSocket): string {
  return family === AF_UNIX
    ? `unix ${type} ${path ?? Buffer.from(address).toString('hex')}`
    : `${family} ${type} ${protocol} ${port} ${name}`
}

/** An address for people. */
export function addressWords({ family, type, port, address, path }: Listener): string {
  if (family === AF_UNIX) return path ?? `@${Buffer.from(address.slice(1)).toString('utf8')}`
  const kind = type === SOCK_STREAM ? 'TCP' : 'UDP'
  return `${kind} port ${port} of ${ipWords(family, address)}`
}

function ipWords(family: number, address: Uint8Array): string {
  if (address.every((byte) => byte === 0)) return 'all addresses'
  if (family === AF_INET) return address.slice(0, 4).join('.')
  const bytes = Buffer.from(address)
  const groups = Array.from({ length: 8 }, (_, at) => bytes.readUInt16BE(at * 2).toString(16)).join(':')
  return groups.replace(/(?:^|:)0(?::0)+(?:$|:)/, '::')
}

/**
 * Makes sockets. `same`: at the addresses that they had, for children to serve on. `private`: of the same kinds, at ports and names
 * that the kernel chooses, which only this machine reaches. None is left where one cannot be made.
 * @throws PORT_TAKEN where somebody else serves at an address; GENERATION_MISFIT where one cannot be had here any more
 */
export function bindListeners(
  listeners: readonly SharedSocket[],
  how: 'same' | 'private',
  owner?: PathOwner,
): BoundSockets {
  const descriptors = new Map<number, number>()
  const addresses = new Map<number, { port: number } | string>()
  const paths = new Map<string, number>()
  const close = () => {
    for (const [path, inode] of paths) {
      if (lstatSync(path, { throwIfNoEntry: false })?.ino === inode) unlinkSync(path)
    }
    for (const fd of descriptors.values()) closeSync(fd)
    descriptors.clear()
    paths.clear()
  }
  try {
    for (const listener of listeners) {
      const { inode, family, path } = listener
      const fd = how === 'same' ? bindSame(listener, owner) : bindPrivate(listener)
      descriptors.set(inode, fd)
      if (how === 'same' && path !== undefined) paths.set(path, lstatSync(path).ino)
      addresses.set(inode, family === AF_UNIX ? nameWords(socketName(fd)) : { port: socketName(fd).readUInt16BE(2) })
    }
    return { descriptors, addresses, paths, close }
  } catch (error) {
    close()
    throw error
  }
}

const nameWords = (name: Buffer) => {
  const text = name.subarray(2)
  return text[0] === 0 ? `@${text.subarray(1).toString('utf8')}` : text.toString('utf8').replace(/\0.*$/s, '')
}

function bindSame(listener: SharedSocket, owner: PathOwner | undefined): number {
  const { family, path, socket: settings } = listener
  const tried = `listen at ${addressWords(listener)} again`
  const fd = makeSocket(listener)
  try {
    if (path !== undefined) bindPath(fd, path, listener, owner, tried)
    else {
      setOptions(fd, listener, tried)
      // Connections of an earlier life that wait for their time-out (TIME_WAIT) must not keep the port; no second listener gets in.
      if (family !== AF_UNIX && listener.type === SOCK_STREAM) setSocketOption(fd, SOL_SOCKET, SO_REUSEADDR, int(1))
      const name = Buffer.from(settings.name, 'hex')
      // One whose path was removed was reached by nobody any more.
      if (family === AF_UNIX && name[2] !== 0) autobound(fd)
      else bindSocket(fd, name)
      restoreReuse(fd, settings)
    }
    return begin(fd, listener)
  } catch (error) {
    closeSync(fd)
    throw bindError(error, tried)
  }
}

function bindPath(fd: number, path: string, listener: SharedSocket, owner: PathOwner | undefined, tried: string): void {
  const { type, socket: settings } = listener
  const file = settings.file ?? { mode: 0o755, uid: process.geteuid?.() ?? 0, gid: process.getegid?.() ?? 0 }
  const others = owner !== undefined && owner.uid !== process.geteuid?.()
  setOptions(fd, listener, tried)
  // In a directory of another user only what that user may do is done: who owns it could lead us astray.
  asFileOwner(others ? { uid: owner.uid, gid: file.gid } : undefined, () => {
    if (!statSync(dirname(path), { throwIfNoEntry: false })) mkdirSync(dirname(path), { recursive: true })
    removeStale(path, type, tried)
    const before = process.umask(0o777 & ~file.mode)
    try {
      bindSocket(fd, unixName(path))
    } finally {
      process.umask(before)
    }
  })
}

/** A path whose socket nobody has open any more: what a supervisor that was killed leaves. */
function removeStale(path: string, type: number, tried: string): void {
  const found = lstatSync(path, { throwIfNoEntry: false })
  if (!found) return
  if (!found.isSocket()) {
    const happened = `there is something else at ${path} now, which is no socket`
    throw new WarmforkError('PORT_TAKEN', { tried, happened, remedy: 'Move it away.' })
  }
  const errno = connectSocket(unixName(path), type)
  // ECONNREFUSED: a socket file without a socket. ENOENT: it was removed in this moment.
  if (errno === 'ECONNREFUSED') unlinkSync(path)
  else if (errno !== 'ENOENT') throw taken(tried)
}

/** The path may be too long for an address, and is not relative to us. */
function unixName(path: string): Buffer {
  const bytes = Buffer.from(path)
  if (bytes.length > 107) throw new SystemError('bind', 36, 'ENAMETOOLONG')
  return Buffer.concat([Buffer.from(Uint16Array.of(AF_UNIX).buffer), bytes, Buffer.of(0)])
}

function bindPrivate(listener: SharedSocket): number {
  const { family, socket: settings } = listener
  const tried = `make a socket like that at ${addressWords(listener)}`
  const attempts = family === AF_UNIX ? [autobound] : [behindLoopback, atLoopback]
  for (const [index, attempt] of attempts.entries()) {
    const fd = makeSocket(listener)
    try {
      setOptions(fd, listener)
      attempt(fd, Buffer.from(settings.name, 'hex'))
      return begin(fd, listener)
    } catch (error) {
      closeSync(fd)
      if (index === attempts.length - 1) throw bindError(error, tried)
    }
  }
  throw new RangeError('unreachable')
}

/** A name of the kernel's choice, that is no path. */
function autobound(fd: number): void {
  bindSocket(fd, Buffer.from(Uint16Array.of(AF_UNIX).buffer))
}

/** The same addresses, as far as they are reached from this machine: whoever knows one of them reaches this by it. */
function behindLoopback(fd: number, name: Buffer): void {
  // Linux ≥ 5.7 lets everybody.
  setSocketOption(fd, SOL_SOCKET, SO_BINDTODEVICE, Buffer.from('lo\0'))
  name.writeUInt16BE(0, 2)
  bindSocket(fd, name)
}

function atLoopback(fd: number, name: Buffer): void {
  name.writeUInt16BE(0, 2)
  if (name.readUInt16LE(0) === AF_INET) name.set([127, 0, 0, 1], 4)
  else name.set(Buffer.from([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]), 8)
  bindSocket(fd, name)
}

function makeSocket({ family, type, socket: { protocol } }: SharedSocket): number {
  return socket(family, type, protocol)
}

/** `tried`: that an option which cannot be set is an error. */
function setOptions(fd: number, { socket: settings }: SharedSocket, tried?: string): void {
  for (const [level, option, hex] of settings.options) {
    const value = Buffer.from(hex, 'hex')
    if (tried === undefined && option === SO_BINDTODEVICE && level === SOL_SOCKET) continue
    // Some need rights even to be set to what they are.
    if (socketOption(fd, level, option)?.equals(value)) continue
    try {
      setSocketOption(fd, level, option, value)
    } catch (cause) {
      if (tried === undefined) continue
      const happened = `its option ${option} of level ${level} cannot be set (${(cause as Error).message})`
      throw new WarmforkError('GENERATION_MISFIT', { tried, happened, cause })
    }
  }
  const { sendBuffer, receiveBuffer } = settings
  setBuffer(fd, SO_SNDBUFFORCE, SO_SNDBUF, sendBuffer)
  setBuffer(fd, SO_RCVBUFFORCE, SO_RCVBUF, receiveBuffer)
}

/** Beyond the system's limit only who may administrate the network. */
function setBuffer(fd: number, force: number, plain: number, bytes: number | undefined): void {
  if (bytes === undefined) return
  try {
    setSocketOption(fd, SOL_SOCKET, force, int(bytes))
  } catch {
    setSocketOption(fd, SOL_SOCKET, plain, int(bytes))
  }
}

function restoreReuse(fd: number, { options }: SocketSettings): void {
  const known = options.find(([level, option]) => level === SOL_SOCKET && option === SO_REUSEADDR)
  if (known) setSocketOption(fd, SOL_SOCKET, SO_REUSEADDR, Buffer.from(known[2], 'hex'))
}

function begin(fd: number, { backlog, socket: settings }: SharedSocket): number {
  if (settings.listening) listenSocket(fd, backlog)
  setNonblocking(fd, settings.nonblocking)
  return fd
}

function int(value: number): Buffer {
  const bytes = Buffer.alloc(4)
  bytes.writeInt32LE(value)
  return bytes
}

function taken(tried: string, cause?: unknown): WarmforkError {
  return new WarmforkError('PORT_TAKEN', { tried, happened: 'another process has it', cause })
}

function bindError(error: unknown, tried: string): unknown {
  if (!(error instanceof SystemError)) {
    const { code } = error as NodeJS.ErrnoException
    if (error instanceof WarmforkError || code === undefined) return error
    return new WarmforkError('GENERATION_MISFIT', { tried, happened: `the system gave ${code}`, cause: error })
  }
  if (error.code === 'EADDRINUSE') return taken(tried, error)
  return new WarmforkError('GENERATION_MISFIT', { tried, happened: `the system gave ${error.code}`, cause: error })
}
