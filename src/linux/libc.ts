/**
 * The system calls that Node lacks, through koffi. Everything that is particular to x86-64 (system call numbers)
 * stands in this file. Each function throws a `SystemError` with `code` (`EAGAIN` …), like Node's own.
 */
import { closeSync } from 'node:fs'
import { constants } from 'node:os'
import koffi from 'koffi'

const lib = koffi.load(null)

const c = {
  waitpid: lib.func('int waitpid(int pid, _Out_ int *status, int options)'),
  pipe2: lib.func('int pipe2(_Out_ int *fds, int flags)'),
  socket: lib.func('int socket(int domain, int type, int protocol)'),
  connect: lib.func('int connect(int fd, const void *address, unsigned int length)'),
  bind: lib.func('int bind(int fd, const void *address, unsigned int length)'),
  listen: lib.func('int listen(int fd, int backlog)'),
  getsockname: lib.func('int getsockname(int fd, _Out_ void *address, _Inout_ unsigned int *length)'),
  setsockopt: lib.func('int setsockopt(int fd, int level, int name, const void *value, unsigned int length)'),
  setfsuid: lib.func('int setfsuid(unsigned int uid)'),
  setfsgid: lib.func('int setfsgid(unsigned int gid)'),
  socketpair: lib.func('int socketpair(int domain, int type, int protocol, _Out_ int *fds)'),
  fcntl: lib.func('int fcntl(int fd, int command, int argument)'),
  flock: lib.func('int flock(int fd, int operation)'),
  kill: lib.func('int kill(int pid, int signal)'),
  prctl: lib.func('int prctl(int option, unsigned long a, unsigned long b, unsigned long c, unsigned long d)'),
  send: lib.func('long send(int fd, const void *data, size_t length, int flags)'),
  recv: lib.func('long recv(int fd, _Out_ void *data, size_t length, int flags)'),
  lseek: lib.func('int64_t lseek(int fd, int64_t offset, int whence)'),
  getsockopt: lib.func('int getsockopt(int fd, int level, int name, _Out_ void *value, _Inout_ unsigned int *length)'),
  syscall3: lib.func('long syscall(long number, long a, long b, long c)'),
}

/** System call numbers of x86-64 (arm64 shares the numbers from 424 on). */
const SYS = { pidfd_open: 434, pidfd_getfd: 438 } as const

/** Where a number has two names, the first in the alphabet: EAGAIN, not EWOULDBLOCK. */
const ERRNO_NAMES = new Map(
  Object.entries(constants.errno)
    .sort(([a], [b]) => (a < b ? 1 : -1))
    .map(([name, number]) => [number as number, name]),
)

export class SystemError extends Error {
  override readonly name = 'SystemError'
  constructor(
    readonly syscall: string,
    readonly errno: number,
    readonly code: string,
  ) {
    super(`${syscall}: ${code}`)
  }
}

export function systemError(syscall: string, errno: number): SystemError {
  return new SystemError(syscall, errno, ERRNO_NAMES.get(errno) ?? `errno ${errno}`)
}

function check(syscall: string, result: number): number {
  if (result >= 0) return result
  throw systemError(syscall, koffi.errno())
}

const O_CLOEXEC = 0o2000000
const O_NONBLOCK = 0o4000
const F_GETFL = 3
const F_SETFL = 4

/** A pipe, both ends close-on-exec: a child gets an end only where it is handed one. */
export function pipe(): { read: number; write: number } {
  const fds = [0, 0]
  check('pipe2', c.pipe2(fds, O_CLOEXEC))
  return { read: fds[0]!, write: fds[1]! }
}

/** A second descriptor for what one names, close-on-exec, of at least the given number. */
export function duplicate(fd: number, atLeast = 3): number {
  const F_DUPFD_CLOEXEC = 1030
  return check('fcntl', c.fcntl(fd, F_DUPFD_CLOEXEC, atLeast))
}

/** A pair of connected Unix sockets that keep message boundaries (SOCK_SEQPACKET), close-on-exec. */
export function seqpacketPair(): [number, number] {
  const AF_UNIX = 1
  const SOCK_SEQPACKET = 5
  const fds = [0, 0]
  check('socketpair', c.socketpair(AF_UNIX, SOCK_SEQPACKET | O_CLOEXEC, 0, fds))
  return [fds[0]!, fds[1]!]
}

/** A pair of connected Unix sockets for streams of bytes, blocking and close-on-exec. */
export function streamPair(): [number, number] {
  const AF_UNIX = 1
  const SOCK_STREAM = 1
  const fds = [0, 0]
  check('socketpair', c.socketpair(AF_UNIX, SOCK_STREAM | O_CLOEXEC, 0, fds))
  return [fds[0]!, fds[1]!]
}

/** Sends one message; never raises SIGPIPE. */
export function send(fd: number, data: Uint8Array): void {
  const MSG_NOSIGNAL = 0x4000
  check('send', c.send(fd, data, data.length, MSG_NOSIGNAL))
}

/** A socket, close-on-exec. */
export function socket(domain: number, type: number, protocol: number): number {
  return check('socket', c.socket(domain, type | O_CLOEXEC, protocol))
}

/** Reads one message into a buffer, waiting for it; gives its length. */
export function receive(fd: number, buffer: Uint8Array): number {
  return check('recv', Number(c.recv(fd, buffer, buffer.length, 0)))
}

/** Gives a socket its address, as the kernel has it. */
export function bindSocket(fd: number, address: Uint8Array): void {
  check('bind', c.bind(fd, address, address.length))
}

export function listenSocket(fd: number, backlog: number): void {
  check('listen', c.listen(fd, backlog))
}

/** The address that a socket is bound to, as the kernel has it. */
export function socketName(fd: number): Buffer {
  const address = Buffer.alloc(128)
  const length = [address.length]
  check('getsockname', c.getsockname(fd, address, length))
  return address.subarray(0, length[0])
}

/** The value of a socket's option; undefined where sockets of that kind have none. */
export function socketOption(fd: number, level: number, option: number): Buffer | undefined {
  const value = Buffer.alloc(128)
  const length = [value.length]
  return c.getsockopt(fd, level, option, value, length) === 0 ? value.subarray(0, length[0]) : undefined
}

export function setSocketOption(fd: number, level: number, option: number, value: Uint8Array): void {
  check('setsockopt', c.setsockopt(fd, level, option, value, value.length))
}

/** Tries to reach a Unix socket's address, and gives why it cannot be reached; undefined where it can. */
export function connectSocket(address: Uint8Array, type: number): string | undefined {
  const AF_UNIX = 1
  const fd = socket(AF_UNIX, type, 0)
  try {
    setNonblocking(fd, true)
    if (c.connect(fd, address, address.length) === 0) return undefined
    return systemError('connect', koffi.errno()).code
  } finally {
    closeSync(fd)
  }
}

/** Whether O_NONBLOCK is set on the open file description. */
export function isNonblocking(fd: number): boolean {
  return (check('fcntl', c.fcntl(fd, F_GETFL, 0)) & O_NONBLOCK) !== 0
}

/**
 * Does something at once with the rights that another user has over files, on this thread alone (setfsuid): what is made is that
 * user's. Only root can; for others, and without an owner, nothing is changed.
 */
export function asFileOwner<T>(owner: { uid: number; gid: number } | undefined, action: () => T): T {
  if (!owner) return action()
  const [uid, gid] = [process.geteuid!(), process.getegid!()]
  c.setfsgid(owner.gid)
  c.setfsuid(owner.uid)
  try {
    return action()
  } finally {
    c.setfsuid(uid)
    c.setfsgid(gid)
  }
}

/** Whether somebody takes datagrams at a Unix socket's address (as the kernel has it: a path, or a name with a zero first). */
export function takesDatagrams(address: Uint8Array): boolean {
  const [AF_UNIX, SOCK_DGRAM] = [1, 2]
  const fd = socket(AF_UNIX, SOCK_DGRAM, 0)
  try {
    const family = Buffer.from(Uint16Array.of(AF_UNIX).buffer)
    const whole = Buffer.concat([family, address])
    return c.connect(fd, whole, whole.length) === 0
  } finally {
    closeSync(fd)
  }
}

/** Of a socket, its family (`AF_INET` is 2) and protocol. */
export function socketFamily(fd: number): { family: number; protocol: number } {
  const [SOL_SOCKET, SO_PROTOCOL, SO_DOMAIN] = [1, 38, 39]
  const read = (name: number) => {
    const value = Buffer.alloc(4)
    check('getsockopt', c.getsockopt(fd, SOL_SOCKET, name, value, [4]))
    return value.readInt32LE()
  }
  return { family: read(SO_DOMAIN), protocol: read(SO_PROTOCOL) }
}

/** Whether a message waits to be read. */
export function hasMessage(fd: number): boolean {
  const MSG_PEEK_DONTWAIT = 0x2 | 0x40
  return Number(c.recv(fd, Buffer.alloc(1), 1, MSG_PEEK_DONTWAIT)) > 0
}

/** Sets or clears O_NONBLOCK on the open file description. */
export function setNonblocking(fd: number, on: boolean): void {
  const flags = check('fcntl', c.fcntl(fd, F_GETFL, 0))
  check('fcntl', c.fcntl(fd, F_SETFL, on ? flags | O_NONBLOCK : flags & ~O_NONBLOCK))
}

/** Takes an exclusive lock on an open file without waiting; false where another holder has it. */
export function tryLock(fd: number): boolean {
  const LOCK_EX_NB = 2 | 4
  if (c.flock(fd, LOCK_EX_NB) === 0) return true
  const errno = koffi.errno()
  if (errno === constants.errno.EWOULDBLOCK || errno === constants.errno.EINTR) return false
  throw systemError('flock', errno)
}

export type WaitResult =
  | { kind: 'running' }
  | { kind: 'exited'; code: number | null; signal: NodeJS.Signals | null }
  | { kind: 'stopped'; signal: number }
  | { kind: 'continued' }
  /** Not our child, or somebody else has read its status. */
  | { kind: 'none' }

/** Some numbers have an old name too (SIGIOT is SIGABRT, SIGPOLL is SIGIO): the one that Node gives comes first in its table. */
const SIGNAL_NAMES = new Map(
  Object.entries(constants.signals)
    .reverse()
    .map(([name, number]) => [number as number, name]),
)

/** The name of a signal number; `SIG64` style for the real-time ones that Node has no name for. */
export function signalName(number: number): NodeJS.Signals {
  return (SIGNAL_NAMES.get(number) ?? `SIG${number}`) as NodeJS.Signals
}

/** What has happened to one child since the last call, without waiting (waitpid with WNOHANG|WUNTRACED|WCONTINUED). */
export function waitChild(pid: number): WaitResult {
  const WNOHANG_WUNTRACED_WCONTINUED = 1 | 2 | 8
  const out = [0]
  const result = c.waitpid(pid, out, WNOHANG_WUNTRACED_WCONTINUED)
  if (result === 0) return { kind: 'running' }
  if (result < 0) return { kind: 'none' }
  const status = out[0]!
  if (status === 0xffff) return { kind: 'continued' }
  if ((status & 0xff) === 0x7f) return { kind: 'stopped', signal: (status >> 8) & 0xff }
  const signal = status & 0x7f
  if (signal === 0) return { kind: 'exited', code: (status >> 8) & 0xff, signal: null }
  return { kind: 'exited', code: null, signal: signalName(signal) }
}

/** A descriptor that names a process, safe against its id being given to another (pidfd_open, Linux 5.3). */
export function pidfdOpen(pid: number): number {
  return check('pidfd_open', Number(c.syscall3(SYS.pidfd_open, pid, 0, 0)))
}

/** A copy of another process's descriptor (pidfd_getfd, Linux 5.6; needs ptrace rights over it). */
export function pidfdGetfd(pidfd: number, fd: number): number {
  return check('pidfd_getfd', Number(c.syscall3(SYS.pidfd_getfd, pidfd, fd, 0)))
}

/** Whether a socket is a stream (SO_TYPE is SOCK_STREAM). */
export function isStreamSocket(fd: number): boolean {
  const [SOL_SOCKET, SO_TYPE, SOCK_STREAM] = [1, 3, 1]
  const type = Buffer.alloc(4)
  check('getsockopt', c.getsockopt(fd, SOL_SOCKET, SO_TYPE, type, [4]))
  return type.readInt32LE() === SOCK_STREAM
}

/** Whether an id is in use as a process, a thread or a process group. */
export function idInUse(id: number): boolean {
  if (c.kill(id, 0) === 0) return true
  if (koffi.errno() !== constants.errno.ESRCH) return true
  if (c.kill(-id, 0) === 0) return true
  return koffi.errno() !== constants.errno.ESRCH
}

/** Sends a signal by id; false where there is no such process. */
export function sendSignal(pid: number, signal: number): boolean {
  if (c.kill(pid, signal) === 0) return true
  const errno = koffi.errno()
  if (errno === constants.errno.ESRCH) return false
  throw systemError('kill', errno)
}

/** Where the next data of a sparse file begin, from a position on (lseek with SEEK_DATA); undefined where only a hole follows. */
export function nextData(fd: number, from: number): number | undefined {
  const SEEK_DATA = 3
  return seek(fd, from, SEEK_DATA)
}

/** Where the next hole of a sparse file begins; its end counts as one. Undefined behind the end. */
export function nextHole(fd: number, from: number): number | undefined {
  const SEEK_HOLE = 4
  return seek(fd, from, SEEK_HOLE)
}

function seek(fd: number, from: number, whence: number): number | undefined {
  const found = Number(c.lseek(fd, from, whence))
  if (found >= 0) return found
  const errno = koffi.errno()
  if (errno === constants.errno.ENXIO) return undefined
  throw new SystemError('lseek', errno, ERRNO_NAMES.get(errno) ?? `errno ${errno}`)
}

/** Calls that a probe can make without effect: null or impossible arguments. */
const PROBES = {
  ptrace: [101, 17, 0, 0],
  unshare: [272, 0, 0, 0],
  process_vm_readv: [310, 0, 0, 0],
  kcmp: [312, 0, 0, 0],
  io_uring_setup: [425, 0, 0, 0],
  pidfd_open: [SYS.pidfd_open, 0, 0, 0],
  clone3: [435, 0, 0, 0],
  pidfd_getfd: [SYS.pidfd_getfd, -1, -1, 0],
} as const

export type SystemCallProbe = keyof typeof PROBES

/** Whether the kernel has a system call and no filter (seccomp) forbids it to this process. */
export function probeSystemCall(name: SystemCallProbe): boolean {
  const [number, a, b, d] = PROBES[name]
  if (Number(c.syscall3(number, a, b, d)) >= 0) return true
  const errno = koffi.errno()
  return errno !== constants.errno.ENOSYS && errno !== constants.errno.EPERM && errno !== constants.errno.EACCES
}

/** The number of a signal's name. Throws a RangeError where there is no such signal. */
export function signalNumber(name: NodeJS.Signals): number {
  const number = constants.signals[name]
  if (number === undefined) throw new RangeError(`no signal is called ${name}`)
  return number
}

export interface TcpInfo {
  /** How long ago it last gave and took data, by the kernel's ticks (4 ms at CONFIG_HZ=250). */
  lastDataSentMs: number
  lastDataReceivedMs: number
  /** Of what was sent, as much as the other side has acknowledged. */
  bytesAcknowledged: bigint
  bytesReceived: bigint
  /** What the program has written and the kernel has not sent yet, not once. */
  bytesNotSent: number
}

/** What the kernel knows of a TCP connection (TCP_INFO, Linux 4.6). */
export function tcpInfo(fd: number): TcpInfo {
  const IPPROTO_TCP = 6
  const TCP_INFO = 11
  const info = Buffer.alloc(148)
  check('getsockopt', c.getsockopt(fd, IPPROTO_TCP, TCP_INFO, info, [info.length]))
  // struct tcp_info: 8 bytes, 24 numbers of 32 bits, then four of 64 bits and three of 32.
  return {
    lastDataSentMs: info.readUInt32LE(44),
    lastDataReceivedMs: info.readUInt32LE(52),
    bytesAcknowledged: info.readBigUInt64LE(120),
    bytesReceived: info.readBigUInt64LE(128),
    bytesNotSent: info.readUInt32LE(144),
  }
}
