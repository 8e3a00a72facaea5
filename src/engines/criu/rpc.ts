/** The messages of criu's own protocol (rpc.proto) that a restore needs; field numbers as in CRIU 4.2. */
import { type MessageOf, message, optional, repeated, required } from '../../image/message.js'

const InheritFd = message({ key: required(1, 'string'), fd: required(2, 'int32') })

const Options = message({
  imagesDirectoryFd: required(1, 'int32'),
  externalUnixSockets: optional(4, 'bool'),
  logLevel: optional(9, 'int32'),
  logFile: optional(10, 'string'),
  restoreSibling: optional(26, 'bool'),
  inheritFd: repeated(27, InheritFd),
  manageCgroupsMode: optional(34, 'enum'),
  tcpClose: optional(52, 'bool'),
  unprivileged: optional(67, 'bool'),
  imagesDirectory: optional(68, 'string'),
  leaveStopped: optional(69, 'bool'),
})

export const RestoreRequest = message({ type: required(1, 'enum'), options: optional(2, Options) })

export const Response = message({
  type: required(1, 'enum'),
  success: required(2, 'bool'),
  restored: optional(4, message({ pid: required(1, 'int32') })),
  errno: optional(7, 'int32'),
  errorMessage: optional(9, 'string'),
})
export type Response = MessageOf<typeof Response>

/** Of `stats-dump`, all in microseconds. */
export const DumpStatistics = message({
  dump: optional(
    1,
    message({
      freezingTime: required(1, 'uint32'),
      frozenTime: required(2, 'uint32'),
      memdumpTime: required(3, 'uint32'),
      memwriteTime: required(4, 'uint32'),
      pagesWritten: optional(7, 'uint64'),
    }),
  ),
})
