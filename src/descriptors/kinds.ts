/**
 * The kinds of what a process can have open, each with what becomes of it in a fork. It is the one table that the survey, the
 * options and the documentation agree on. It knows no process and no image.
 */

/**
 * What a fork has in place of a descriptor of its source.
 * - `keep`: the same thing (a listener, a device), or a copy of its state that the fork has to itself (a pipe within the tree, an eventfd).
 * - `reopen`: one of its own, opened or connected anew.
 * - `close`: its end, or none at all.
 * - `error`: nothing; there is no checkpoint.
 */
export type DescriptorPolicy = 'keep' | 'reopen' | 'close' | 'error'

interface Kind {
  /** For people, with an article. */
  readonly words: string
  /** The default first, then what else can be asked for. */
  readonly policies: readonly [DescriptorPolicy, ...DescriptorPolicy[]]
  /** What is warned of where nobody has asked for the policy by name. */
  readonly risk?: string
  /** What to do where there is no checkpoint because of it. */
  readonly remedy?: string
}

const CLOSE_FIRST = 'Close it before the checkpoint and open it after the fork'

export const DESCRIPTOR_KINDS = {
  'file-read': { words: 'a file open for reading', policies: ['reopen', 'close', 'error'] },
  'file-append': { words: 'a file open for appending', policies: ['reopen', 'close', 'error'] },
  'file-write': {
    words: 'a file open for writing',
    policies: ['reopen', 'close', 'error'],
    risk: 'each fork writes from the position that the program had at the checkpoint, over what others have written; open it for appending (O_APPEND), or after the fork',
  },
  'file-unlinked': { words: 'an unlinked file', policies: ['keep', 'close', 'error'] },
  directory: { words: 'a directory', policies: ['reopen', 'close', 'error'] },
  fifo: { words: 'a FIFO', policies: ['reopen', 'close', 'error'] },
  'tcp-listener': { words: 'a TCP listener', policies: ['keep', 'close', 'error'] },
  'tcp-connection': { words: 'a TCP connection', policies: ['close', 'error'] },
  'udp-bound': { words: 'a bound UDP socket', policies: ['keep', 'close', 'error'] },
  'udp-connection': { words: 'a connected UDP socket', policies: ['reopen', 'close', 'error'] },
  'unix-listener': { words: 'a Unix listener', policies: ['keep', 'close', 'error'] },
  'unix-connection': { words: 'a Unix connection to another program', policies: ['close', 'error'] },
  'unix-datagram': { words: 'a Unix socket for datagrams to another program', policies: ['reopen', 'close', 'error'] },
  'unix-bound': { words: 'a bound Unix socket for datagrams', policies: ['keep', 'close', 'error'] },
  'socket-inside': { words: 'a socket of the program to itself, or to nobody yet', policies: ['keep', 'error'] },
  'socket-other': { words: 'a raw, packet or netlink socket', policies: ['keep', 'close', 'error'] },
  'pipe-inside': { words: 'a pipe within the program', policies: ['keep', 'error'] },
  'pipe-outside': {
    words: 'a pipe to another program',
    policies: ['close', 'error'],
    risk: 'a fork reads its end, and writes to nobody (EPIPE)',
  },
  'pipe-inherited': { words: 'a pipe that the supervisor has open too', policies: ['close', 'error'] },
  terminal: { words: 'a terminal', policies: ['keep', 'error'] },
  eventfd: { words: 'an eventfd', policies: ['keep', 'close', 'error'] },
  epoll: { words: 'an epoll set', policies: ['keep', 'error'] },
  timerfd: { words: 'a timerfd', policies: ['keep', 'close', 'error'] },
  signalfd: { words: 'a signalfd', policies: ['keep', 'close', 'error'] },
  inotify: { words: 'an inotify instance', policies: ['keep', 'close', 'error'] },
  fanotify: { words: 'a fanotify group', policies: ['keep', 'close', 'error'] },
  memfd: { words: 'a file in memory (memfd)', policies: ['keep', 'close', 'error'] },
  pidfd: { words: 'a pidfd of the program itself', policies: ['keep', 'close', 'error'] },
  device: { words: 'a device without state', policies: ['keep', 'close', 'error'] },
  lock: {
    words: 'a lock on a file',
    policies: ['close', 'error'],
    risk: 'the program keeps it and no fork has it, whatever it believes; take it after the fork',
  },
  'file-unlinked-large': {
    words: 'an unlinked file of more than 64 MiB',
    policies: ['error', 'keep'],
    remedy: `${CLOSE_FIRST}: each fork would get a copy.`,
  },
  'netlink-unread': {
    words: 'a netlink socket with something to be read',
    policies: ['error', 'keep'],
    remedy: 'Let the program read it first.',
  },
  'pidfd-outside': {
    words: 'a pidfd of a process outside of the program',
    policies: ['error', 'keep'],
    remedy: `${CLOSE_FIRST}.`,
  },
  'pty-master': {
    words: 'a pseudo-terminal that the program controls',
    policies: ['error', 'keep'],
    remedy: 'Open it after the fork.',
  },
  'io-uring': {
    words: 'an io_uring',
    policies: ['error', 'keep'],
    remedy: 'Let the program go without io_uring: warmfork does so for programs that are linked dynamically.',
  },
  'device-other': { words: 'a device with state', policies: ['error', 'keep'], remedy: `${CLOSE_FIRST}.` },
  'socket-unknown': {
    words: 'a socket of a family that CRIU does not know',
    policies: ['error', 'keep'],
    remedy: `${CLOSE_FIRST}. For multipath TCP of Go programs: GODEBUG=multipathtcp=0.`,
  },
  'file-hidden': {
    words: 'a file without a path (a POSIX message queue, secret memory, a detached mount)',
    policies: ['error', 'keep'],
    remedy: `${CLOSE_FIRST}.`,
  },
  'sysv-memory': {
    words: 'System V shared memory',
    policies: ['error', 'keep'],
    remedy: 'Attach it after the fork, or use POSIX shared memory (shm_open) instead.',
  },
  kernel: {
    words: 'a handle on a part of the kernel (perf, userfaultfd, bpf, landlock)',
    policies: ['error', 'keep'],
    remedy: `${CLOSE_FIRST}.`,
  },
} as const satisfies Record<string, Kind>

export type DescriptorKind = keyof typeof DESCRIPTOR_KINDS

export const descriptorKind = (kind: DescriptorKind): Kind => DESCRIPTOR_KINDS[kind]

export const isDescriptorKind = (name: string): name is DescriptorKind => Object.hasOwn(DESCRIPTOR_KINDS, name)
