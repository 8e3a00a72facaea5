/**
 * What a process tree has open, from /proc: each descriptor with its kind, as far as it matters for a fork. It reads, and decides
 * nothing. What changes while it looks is seen as it was or not at all: the image has the last word.
 */
import { closeSync, readdirSync, readlinkSync, type Stats, statSync } from 'node:fs'
import { errnoOf } from '../errors.js'
import { pidfdGetfd, pidfdOpen, socketFamily } from '../linux/libc.js'
import { read } from '../linux/proc.js'
import { type UnixSocketState, unixSockets } from '../linux/unix-sockets.js'
import type { DescriptorKind } from './kinds.js'

export interface OpenDescriptor {
  readonly pid: number
  /** -1 for what a process has mapped and not open. */
  readonly fd: number
  readonly kind: DescriptorKind
  /** What it leads to: a path, an address, or the kernel's name for it. */
  readonly target: string
  /** Of a pipe or a socket. */
  readonly inode?: number
}

/** Flags of open(2). */
const O_ACCMODE = 0o3
const O_WRONLY = 0o1
const O_RDWR = 0o2
const O_APPEND = 0o2000
const O_PATH = 0o10000000

const CONNECTED = 1
const LISTENING = 10
/** Column of /proc/net/netlink: bytes that wait to be read. */
const NETLINK_RECEIVED = 4
const SOCK_DGRAM = 2
const AF_INET = 2
const AF_INET6 = 10
const AF_UNIX = 1

/** Major numbers of devices. */
const MEMORY_DEVICES = 1
const TERMINALS = 4
const TERMINAL_ALIASES = 5
const PTY_SLAVES = 136
const PTY_MASTER = [5, 2] as const

/** How much of an unlinked open file is kept in the image: CRIU's own 1 MiB is less than what JVMs and interpreters unlink. */
export const GHOST_LIMIT_BYTES = 64 << 20

/** By the kernel's name for it, without `anon_inode:` and brackets. */
const ANONYMOUS: Readonly<Record<string, DescriptorKind>> = {
  eventfd: 'eventfd',
  eventpoll: 'epoll',
  timerfd: 'timerfd',
  signalfd: 'signalfd',
  inotify: 'inotify',
  fanotify: 'fanotify',
  io_uring: 'io-uring',
}

/** Processes of a tree as `processTree` gives them. */
export function surveyTree(pids: readonly number[]): OpenDescriptor[] {
  const sockets = new Sockets(pids)
  const descriptors = pids.flatMap((pid) => rawDescriptors(pid))
  const pipes = pipeEnds(descriptors)
  const owned = new Set(descriptors.flatMap(({ link }) => inodeOf(link, 'socket') ?? []))
  let ours: ReadonlySet<string> | undefined
  const tree = new Set(pids)
  const found: OpenDescriptor[] = []
  for (const raw of descriptors) {
    const { pid, fd, link } = raw
    const pipe = inodeOf(link, 'pipe')
    const socket = inodeOf(link, 'socket')
    if (pipe !== undefined) {
      found.push({ pid, fd, kind: pipeKind(link, pipes.get(pipe) === BOTH_ENDS), target: link, inode: pipe })
    } else if (socket !== undefined) {
      found.push({ pid, fd, inode: socket, ...sockets.describe(raw, socket, owned) })
    } else {
      found.push({ pid, fd, kind: kindOf(raw, tree), target: link })
    }
    for (const lock of raw.locks) found.push({ pid, fd, kind: 'lock', target: `${lock} ${link}` })
  }
  for (const pid of pids) {
    for (const target of sharedMemory(pid)) found.push({ pid, fd: -1, kind: 'sysv-memory', target })
  }
  return found

  function pipeKind(link: string, isInside: boolean): DescriptorKind {
    if (isInside) return 'pipe-inside'
    ours ??= ownPipes()
    return ours.has(link) ? 'pipe-inherited' : 'pipe-outside'
  }
}

interface RawDescriptor {
  readonly pid: number
  readonly fd: number
  readonly link: string
  readonly flags: number
  readonly mountId: string
  /** The process of a pidfd. */
  readonly process: number | undefined
  /** Kinds of the locks that are held by it: FLOCK, POSIX, OFDLCK, LEASE. */
  readonly locks: readonly string[]
  readonly stats: Stats | undefined
  /** The mounts that its process sees. */
  readonly mounts: () => ReadonlySet<string>
}

function rawDescriptors(pid: number): RawDescriptor[] {
  let names: string[]
  try {
    names = readdirSync(`/proc/${pid}/fd`)
  } catch {
    return []
  }
  let known: ReadonlySet<string> | undefined
  const mounts = () => {
    known ??= mountIds(pid)
    return known
  }
  return names.flatMap((name) => {
    try {
      const link = readlinkSync(`/proc/${pid}/fd/${name}`)
      const info = read(`/proc/${pid}/fdinfo/${name}`)
      if (info === undefined) return []
      const process = /^Pid:\s+(-?\d+)$/m.exec(info)?.[1]
      return {
        pid,
        fd: Number(name),
        link,
        flags: Number.parseInt(/^flags:\s+([0-7]+)$/m.exec(info)?.[1] ?? '0', 8),
        mountId: /^mnt_id:\s+(\d+)$/m.exec(info)?.[1] ?? '',
        process: process === undefined ? undefined : Number(process),
        locks: [...info.matchAll(/^lock:\s+\d+: (\w+)/gm)].map((lock) => lock[1]!),
        stats: link.startsWith('/') ? statSync(`/proc/${pid}/fd/${name}`) : undefined,
        mounts,
      }
    } catch (error) {
      // It was closed just now, or is not ours to look at: then CRIU has the word.
      if (errnoOf(error) === undefined) throw error
      return []
    }
  })
}

function mountIds(pid: number): ReadonlySet<string> {
  const text = read(`/proc/${pid}/mountinfo`) ?? ''
  return new Set(text.split('\n').map((line) => line.slice(0, line.indexOf(' '))))
}

/** Pipes that this process was started with and has passed on without knowing (CI systems and shells leave such). */
function ownPipes(): ReadonlySet<string> {
  const links = readdirSync('/proc/self/fd').flatMap((fd) => {
    try {
      return readlinkSync(`/proc/self/fd/${fd}`)
    } catch {
      return []
    }
  })
  return new Set(links.filter((link) => link.startsWith('pipe:')))
}

function inodeOf(link: string, kind: 'pipe' | 'socket'): number | undefined {
  if (!link.startsWith(`${kind}:[`)) return undefined
  return Number(link.slice(kind.length + 2, -1))
}

const READ_END = 1
const WRITE_END = 2
const BOTH_ENDS = 3

/** Which ends of each pipe the tree has. */
function pipeEnds(descriptors: readonly RawDescriptor[]): Map<number, number> {
  const ends = new Map<number, number>()
  for (const { link, flags } of descriptors) {
    const inode = inodeOf(link, 'pipe')
    if (inode === undefined) continue
    const access = flags & O_ACCMODE
    const end = access === O_RDWR ? BOTH_ENDS : access === O_WRONLY ? WRITE_END : READ_END
    ends.set(inode, (ends.get(inode) ?? 0) | end)
  }
  return ends
}

function kindOf(
  { link, flags, stats, mountId, mounts, process }: RawDescriptor,
  tree: ReadonlySet<number>,
): DescriptorKind {
  const anonymous = /^anon_inode:\[?([^\]]+)\]?$/.exec(link)?.[1] ?? /^(pidfd):/.exec(link)?.[1]
  if (anonymous === 'pidfd') {
    return process === undefined || process <= 0 || tree.has(process) ? 'pidfd' : 'pidfd-outside'
  }
  if (anonymous !== undefined) return ANONYMOUS[anonymous] ?? 'kernel'
  if (!stats) return 'file-read'
  if (link.startsWith('/memfd:')) return 'memfd'
  if (stats.isCharacterDevice()) return deviceKind(stats.rdev)
  if (stats.isBlockDevice()) return 'device-other'
  // One that cannot be read has a single, empty line.
  if (mounts().size > 1 && !mounts().has(mountId)) return 'file-hidden'
  if (stats.isFIFO()) return 'fifo'
  if (stats.isDirectory()) return 'directory'
  if (stats.nlink === 0) return stats.size > GHOST_LIMIT_BYTES ? 'file-unlinked-large' : 'file-unlinked'
  if (flags & O_PATH || (flags & O_ACCMODE) === 0) return 'file-read'
  return flags & O_APPEND ? 'file-append' : 'file-write'
}

function deviceKind(rdev: number): DescriptorKind {
  const major = (rdev >> 8) & 0xfff
  const minor = (rdev & 0xff) | ((rdev >> 12) & 0xfff00)
  if (major === MEMORY_DEVICES) return 'device'
  if (major === PTY_MASTER[0] && minor === PTY_MASTER[1]) return 'pty-master'
  const isTerminal =
    (major === TERMINALS && minor > 0) || major === TERMINAL_ALIASES || (major >= PTY_SLAVES && major < PTY_SLAVES + 8)
  return isTerminal ? 'terminal' : 'device-other'
}

/** What it has attached, by the kernel's names (`/SYSV…`). */
function sharedMemory(pid: number): string[] {
  // Most machines have none, and a list of mappings can be long.
  const isNone = sharesOur('ipc', pid) && (read('/proc/sysvipc/shm') ?? '').trimEnd().split('\n').length === 1
  if (isNone) return []
  return [...(read(`/proc/${pid}/maps`) ?? '').matchAll(/ (\/SYSV[0-9a-f]{8}) \(deleted\)$/gm)].map((line) => line[1]!)
}

type Described = { kind: DescriptorKind; target: string }

/** Tables of /proc/PID/net, the likeliest first. */
const TABLES = [
  'tcp',
  'tcp6',
  'udp',
  'udp6',
  'netlink',
  'raw',
  'raw6',
  'icmp',
  'icmp6',
  'udplite',
  'udplite6',
  'packet',
]

/** The sockets of the tree's network namespace, read as far as they are asked for. */
class Sockets {
  readonly #pid: number
  readonly #known = new Map<number, Described>()
  readonly #unread = [...TABLES]
  #unix: ReadonlyMap<number, UnixSocketState> | undefined

  constructor(pids: readonly number[]) {
    this.#pid = pids[0] ?? 0
  }

  describe({ pid, fd }: RawDescriptor, inode: number, owned: ReadonlySet<number>): Described {
    const target = `socket:[${inode}]`
    this.#unix ??= sharesOur('net', this.#pid) ? unixSockets() : new Map()
    const unix = this.#unix.get(inode)
    if (unix) return describeUnix(unix, this.#unix.get(unix.peer), owned)
    const known = this.#find(inode)
    // Multipath TCP stands among TCP.
    const isSure = known !== undefined && !known.kind.startsWith('tcp-')
    if (!isSure && !isKnownFamily(pid, fd)) return { kind: 'socket-unknown', target: known?.target ?? target }
    return known ?? { kind: 'socket-inside', target }
  }

  #find(inode: number): Described | undefined {
    while (!this.#known.has(inode) && this.#unread.length > 0) this.#read(this.#unread.shift()!)
    return this.#known.get(inode)
  }

  #read(table: string): void {
    const lines = (read(`/proc/${this.#pid}/net/${table}`) ?? '').split('\n').slice(1)
    for (const line of lines) {
      const columns = line.trim().split(/\s+/)
      const entry =
        table === 'netlink' || table === 'packet' ? otherSocket(table, columns) : internetSocket(table, columns)
      if (entry) this.#known.set(entry.inode, entry)
    }
  }
}

/** `0: 0100007F:1F90 0100007F:C350 01 … INODE …`, addresses in hexadecimal as the kernel has them. */
function internetSocket(table: string, columns: readonly string[]): (Described & { inode: number }) | undefined {
  const [, local, remote, state, , , , , , inode] = columns
  if (inode === undefined) return undefined
  const protocol = table.startsWith('tcp') ? 'tcp' : table.startsWith('udp') ? 'udp' : 'raw'
  const target = `${protocol} ${address(local!)}${isSet(remote!) ? ` to ${address(remote!)}` : ''}`
  return { inode: Number(inode), kind: internetKind(protocol, Number.parseInt(state!, 16), remote!), target }
}

function otherSocket(table: string, columns: readonly string[]): (Described & { inode: number }) | undefined {
  const inode = Number(columns.at(-1))
  if (!(inode > 0)) return undefined
  const isUnread = table === 'netlink' && Number(columns[NETLINK_RECEIVED]) > 0
  return { inode, kind: isUnread ? 'netlink-unread' : 'socket-other', target: table }
}

function internetKind(protocol: 'tcp' | 'udp' | 'raw', state: number, remote: string): DescriptorKind {
  if (protocol === 'raw') return 'socket-other'
  if (protocol === 'udp') return isSet(remote) ? 'udp-connection' : 'udp-bound'
  return state === LISTENING ? 'tcp-listener' : 'tcp-connection'
}

const isSet = (address: string) => !/^0+:0000$/.test(address)

/** `0100007F:1F90` as `127.0.0.1:8080`. */
function address(text: string): string {
  const [host, port] = text.split(':') as [string, string]
  const bytes = (host.match(/.{8}/g) ?? []).flatMap((word) => [...Buffer.from(word, 'hex').reverse()])
  const number = Number.parseInt(port, 16)
  if (bytes.length === 4) return `${bytes.join('.')}:${number}`
  const groups = Array.from({ length: 8 }, (_, i) => ((bytes[2 * i]! << 8) | bytes[2 * i + 1]!).toString(16))
  return `[${new URL(`http://[${groups.join(':')}]`).hostname.slice(1, -1)}]:${number}`
}

function describeUnix(
  { type, state, name, peer }: UnixSocketState,
  other: UnixSocketState | undefined,
  owned: ReadonlySet<number>,
): { kind: DescriptorKind; target: string } {
  if (state === LISTENING) return { kind: 'unix-listener', target: name }
  const isOutside = peer !== 0 && !owned.has(peer)
  const target = `unix ${other?.name || name || (peer === 0 ? 'unconnected' : `socket:[${peer}]`)}`
  if (type === SOCK_DGRAM) {
    if (isOutside) return { kind: 'unix-datagram', target }
    return { kind: name !== '' && peer === 0 ? 'unix-bound' : 'socket-inside', target }
  }
  // One whose other side is gone is connected yet, to nobody.
  return { kind: state === CONNECTED && isOutside ? 'unix-connection' : 'socket-inside', target }
}

function sharesOur(namespace: 'net' | 'ipc', pid: number): boolean {
  try {
    return readlinkSync(`/proc/${pid}/ns/${namespace}`) === readlinkSync(`/proc/self/ns/${namespace}`)
  } catch {
    return false
  }
}

/** Sockets that are in no table are new ones, of families that CRIU knows, or of others. */
function isKnownFamily(pid: number, fd: number): boolean {
  const opened: number[] = []
  try {
    opened.push(pidfdOpen(pid))
    opened.push(pidfdGetfd(opened[0]!, fd))
    const { family, protocol } = socketFamily(opened[1]!)
    return family === AF_UNIX || ((family === AF_INET || family === AF_INET6) && protocol <= 255 && protocol !== SCTP)
  } catch {
    // Without the right to look: CRIU has the word.
    return true
  } finally {
    for (const each of opened) closeSync(each)
  }
}

const SCTP = 132
