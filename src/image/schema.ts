/**
 * The messages of CRIU's images that the edits read or change: field numbers as in CRIU 4.2, whose image files differ
 * from 4.1's in pagemap entries only (see `PagemapEntry`). What is not named here survives an edit as unknown fields.
 */
import { type MessageOf, message, optional, repeated, required } from './message.js'

export const InventoryEntry = message({
  imgVersion: required(1, 'uint32'),
  dumpUptime: optional(8, 'uint64'),
  tcpClose: optional(10, 'bool'),
})

export const PstreeEntry = message({
  pid: required(1, 'uint32'),
  ppid: required(2, 'uint32'),
  pgid: required(3, 'uint32'),
  sid: required(4, 'uint32'),
  threads: repeated(5, 'uint32'),
})
export type PstreeEntry = MessageOf<typeof PstreeEntry>

const X86Registers = message({
  ip: required(17, 'uint64'),
  sp: required(20, 'uint64'),
  fsBase: required(22, 'uint64'),
})

const X86ThreadInfo = message({
  /** Where the kernel writes 0 at the thread's end: glibc's own copy of the thread id. */
  clearTidAddr: required(1, 'uint64'),
  registers: required(2, X86Registers),
})

const PosixTimer = message({
  id: required(1, 'uint32'),
  /** Only of timers that signal one thread (SIGEV_THREAD_ID). */
  notifyThreadId: optional(11, 'int32'),
})

const TaskTimers = message({ posix: repeated(4, PosixTimer) })

const TaskCore = message({
  /** See TASK_DEAD. */
  taskState: required(1, 'uint32'),
  exitCode: required(2, 'uint32'),
  comm: required(6, 'string'),
  timers: optional(7, TaskTimers),
})

/** State of a zombie: it has an exit status and no memory. */
export const TASK_DEAD = 2
export const TASK_STOPPED = 3

const ThreadCore = message({
  deathSignal: optional(8, 'uint32'),
  comm: optional(13, 'string'),
})

export const CoreEntry = message({
  /** See X86_64. */
  machine: required(1, 'enum'),
  x86: optional(2, X86ThreadInfo),
  task: optional(3, TaskCore),
  thread: optional(5, ThreadCore),
})
export const X86_64 = 1
export type CoreEntry = MessageOf<typeof CoreEntry>

export const VmaEntry = message({
  start: required(1, 'uint64'),
  end: required(2, 'uint64'),
  pgoff: required(3, 'uint64'),
  shmid: required(4, 'uint64'),
  prot: required(5, 'uint32'),
  flags: required(6, 'uint32'),
  status: required(7, 'uint32'),
  fd: required(8, 'sint64'),
  madv: optional(9, 'uint64'),
  fdflags: optional(10, 'uint32'),
})
export type VmaEntry = MessageOf<typeof VmaEntry>

export const MmEntry = message({
  argStart: required(8, 'uint64'),
  argEnd: required(9, 'uint64'),
  envStart: required(10, 'uint64'),
  envEnd: required(11, 'uint64'),
  exeFileId: required(12, 'uint32'),
  vmas: repeated(14, VmaEntry),
})
export type MmEntry = MessageOf<typeof MmEntry>

/** Status bits of a VMA, from CRIU's image format. */
export const VMA_STATUS = {
  REGULAR: 1 << 0,
  STACK: 1 << 1,
  VSYSCALL: 1 << 2,
  VDSO: 1 << 3,
  HEAP: 1 << 5,
  FILE_PRIVATE: 1 << 6,
  FILE_SHARED: 1 << 7,
  ANON_SHARED: 1 << 8,
  ANON_PRIVATE: 1 << 9,
  SYSVIPC: 1 << 10,
  SOCKET: 1 << 11,
  VVAR: 1 << 12,
  AIORING: 1 << 13,
  MEMFD: 1 << 14,
  SHSTK: 1 << 15,
  GUARD: 1 << 16,
  UPROBES: 1 << 17,
} as const

/** Flags of mmap(2), as in the kernel's headers. */
export const MAP = {
  SHARED: 0x1,
  PRIVATE: 0x2,
  DROPPABLE: 0x8,
  ANONYMOUS: 0x20,
  GROWSDOWN: 0x100,
  LOCKED: 0x2000,
  HUGETLB: 0x40000,
} as const

/** Advice numbers of madvise(2): bit N of `madv` says that advice N was given. */
export const MADV = { WIPEONFORK: 18 } as const

export const PagemapHead = message({ pagesId: required(1, 'uint32') })

/** 4.1 counts pages in field 2; 4.2 in field 5, with field 2 as 0. What an image has, it keeps. */
export const PagemapEntry = message({
  vaddr: required(1, 'uint64'),
  compatPages: required(2, 'uint32'),
  inParent: optional(3, 'bool'),
  flags: optional(4, 'uint32'),
  pages: optional(5, 'uint64'),
})
export type PagemapEntry = MessageOf<typeof PagemapEntry>

/** Bits of a pagemap entry's flags. */
export const PAGEMAP = { PARENT: 1, LAZY: 2, PRESENT: 4 } as const

const FileOwner = message({
  uid: required(1, 'uint32'),
  euid: required(2, 'uint32'),
  signum: required(3, 'uint32'),
  pidType: required(4, 'uint32'),
  pid: required(5, 'uint32'),
})

export const FILE_TYPE = {
  REG: 1,
  PIPE: 2,
  FIFO: 3,
  INETSK: 4,
  UNIXSK: 5,
  EVENTFD: 6,
  EVENTPOLL: 7,
  INOTIFY: 8,
  SIGNALFD: 9,
  PACKETSK: 10,
  TTY: 11,
  FANOTIFY: 12,
  NETLINKSK: 13,
  NS: 14,
  TUNF: 15,
  EXT: 16,
  TIMERFD: 17,
  MEMFD: 18,
  BPFMAP: 19,
  PIDFD: 20,
} as const
export type FileTypeName = keyof typeof FILE_TYPE

export const RegularFile = message({
  id: required(1, 'uint32'),
  flags: required(2, 'uint32'),
  pos: required(3, 'uint64'),
  owner: required(5, FileOwner),
  name: required(6, 'string'),
  mountId: optional(7, 'sint32'),
  size: optional(8, 'uint64'),
  ext: optional(9, 'bool'),
  mode: optional(10, 'uint32'),
  buildId: repeated(11, 'uint32'),
  checksum: optional(12, 'uint32'),
  checksumConfig: optional(13, 'uint32'),
  checksumParameter: optional(14, 'uint32'),
})
export type RegularFile = MessageOf<typeof RegularFile>

export const InetSocket = message({
  id: required(1, 'uint32'),
  ino: required(2, 'uint32'),
  family: required(3, 'uint32'),
  type: required(4, 'uint32'),
  proto: required(5, 'uint32'),
  /** As in the kernel's tcp_states.h: 1 established, 10 listening. */
  state: required(6, 'uint32'),
  sourcePort: required(7, 'uint32'),
  destinationPort: required(8, 'uint32'),
  flags: required(9, 'uint32'),
  backlog: required(10, 'uint32'),
  sourceAddress: repeated(11, 'uint32'),
  destinationAddress: repeated(12, 'uint32'),
  owner: required(13, FileOwner),
  v6only: optional(15, 'bool'),
})
export type InetSocket = MessageOf<typeof InetSocket>
export const TCP_LISTEN = 10

export const UnixSocket = message({
  id: required(1, 'uint32'),
  ino: required(2, 'uint32'),
  type: required(3, 'uint32'),
  state: required(4, 'uint32'),
  flags: required(5, 'uint32'),
  uflags: required(6, 'uint32'),
  backlog: required(7, 'uint32'),
  peer: required(8, 'uint32'),
  owner: required(9, FileOwner),
  name: required(11, 'bytes'),
  /** See SHUTDOWN_BOTH. */
  shutdown: optional(12, 'enum'),
  /** Where a relative name begins. */
  nameDirectory: optional(14, 'string'),
  /** Its path was removed. */
  deleted: optional(15, 'bool'),
})
export type UnixSocket = MessageOf<typeof UnixSocket>
/** Neither side of a connection sends any more. */
export const SHUTDOWN_BOTH = 3

/** A FIFO; `fileId` is the regular file's entry that has its path. */
const FifoFile = message({ id: required(1, 'uint32'), pipeId: required(2, 'uint32'), fileId: optional(3, 'uint32') })

const PipeFile = message({
  id: required(1, 'uint32'),
  /** The inode of the pipe. */
  pipeId: required(2, 'uint32'),
  flags: required(3, 'uint32'),
  owner: required(4, FileOwner),
})

/** A file in memory; its pages stand where those of shared memory do. */
export const MemfdInode = message({ size: required(4, 'uint64'), shmid: required(5, 'uint32') })

const PidFd = message({
  id: required(1, 'uint32'),
  ino: required(2, 'uint32'),
  flags: required(3, 'uint32'),
  pid: required(4, 'int32'),
  owner: required(5, FileOwner),
})

const TtyFile = message({
  id: required(1, 'uint32'),
  /** Of its entry in `tty-info.img`. */
  infoId: required(2, 'uint32'),
  flags: required(3, 'uint32'),
  owner: required(4, FileOwner),
})

const EventPoll = message({
  id: required(1, 'uint32'),
  owner: required(3, FileOwner),
  watched: repeated(4, message({ fd: required(2, 'uint32') })),
})

/** Of the other kinds of open files only the owner matters here: it names a process. */
const owned = (owner: number) => message({ id: required(1, 'uint32'), owner: required(owner, FileOwner) })

export const FileEntry = message({
  type: required(1, 'enum'),
  id: required(2, 'uint32'),
  regular: optional(3, RegularFile),
  inet: optional(4, InetSocket),
  packet: optional(6, owned(6)),
  netlink: optional(7, owned(11)),
  eventfd: optional(8, owned(3)),
  eventpoll: optional(9, EventPoll),
  signalfd: optional(10, owned(3)),
  timerfd: optional(12, owned(3)),
  inotify: optional(13, owned(4)),
  fanotify: optional(14, owned(3)),
  external: optional(15, owned(5)),
  unix: optional(16, UnixSocket),
  fifo: optional(17, FifoFile),
  pipe: optional(18, PipeFile),
  tty: optional(19, TtyFile),
  memfd: optional(20, owned(4)),
  bpfMap: optional(21, owned(4)),
  pidfd: optional(22, PidFd),
})
export type FileEntry = MessageOf<typeof FileEntry>

export const FdinfoEntry = message({
  id: required(1, 'uint32'),
  flags: required(2, 'uint32'),
  type: required(3, 'enum'),
  fd: required(4, 'uint32'),
})
export type FdinfoEntry = MessageOf<typeof FdinfoEntry>

export const IdsEntry = message({ vmId: required(1, 'uint32'), filesId: required(2, 'uint32') })

export const FsEntry = message({ cwdId: required(1, 'uint32'), rootId: required(2, 'uint32') })

/** What stands in for a file whose path names it no more. */
export const RemapEntry = message({
  fileId: required(1, 'uint32'),
  remapId: required(2, 'uint32'),
  /** See REMAP_GHOST. */
  type: optional(3, 'enum'),
})
/** An unlinked file, whose content the image holds. */
export const REMAP_GHOST = 1

export const TtyInfoEntry = message({
  id: required(1, 'uint32'),
  type: required(2, 'enum'),
  sid: required(6, 'uint32'),
  pgrp: required(7, 'uint32'),
  rdev: required(8, 'uint32'),
  dev: optional(13, 'uint32'),
})

/** Heads of entries that raw bytes follow. */
export const PipeData = message({ pipeId: required(1, 'uint32'), bytes: required(2, 'uint32') })
export const SocketPacket = message({
  idFor: required(1, 'uint32'),
  length: required(2, 'uint32'),
  /** Files that are on the way with it (SCM_RIGHTS), by id. */
  passed: repeated(4, message({ rights: repeated(2, 'uint32') })),
})
export const TcpStream = message({ inqLength: required(1, 'uint32'), outqLength: required(3, 'uint32') })
export const GhostFile = message({ chunks: optional(9, 'bool') })
export const GhostChunk = message({ length: required(1, 'uint64'), offset: required(2, 'uint64') })

/** Flags of open(2) that the edits look at. */
export const OPEN = {
  ACCMODE: 0o3,
  WRONLY: 0o1,
  RDWR: 0o2,
  APPEND: 0o2000,
  NONBLOCK: 0o4000,
  CLOEXEC: 0o2000000,
  PATH: 0o10000000,
} as const
