/** What criu is told, as pure functions: arguments of a dump, the request of a restore. */
import { GHOST_LIMIT_BYTES } from '../../descriptors/survey.js'
import { encode } from '../../image/message.js'
import { RestoreRequest } from './rpc.js'

export interface DumpOptions {
  pid: number
  directory: string
  logFile: string
  /** criu runs as the worker's user, with capabilities. */
  unprivileged: boolean
  timeoutMs: number
  /** What belongs to the outside, in criu's words: `unix[INODE]`. */
  external: readonly string[]
}

export function dumpArguments({ pid, directory, logFile, unprivileged, timeoutMs, external }: DumpOptions): string[] {
  return [
    'dump',
    ...['--tree', String(pid)],
    ...['--images-dir', directory],
    ...['--log-file', logFile],
    '-v2',
    '--no-default-config',
    // The source goes on after the checkpoint.
    '--leave-running',
    '--manage-cgroups=ignore',
    // The source keeps its connections and a child sees them closed.
    '--tcp-close',
    // What waits to be accepted stays where it is: the supervisor has the same listening socket, and so have its children.
    '--skip-in-flight',
    // Locks are recorded so that the dump succeeds; prepare drops them.
    '--file-locks',
    ...['--ghost-limit', String(GHOST_LIMIT_BYTES)],
    // In seconds: how long the tasks may take to stop.
    ...['--timeout', String(Math.max(1, Math.ceil(timeoutMs / 1000)))],
    ...external.flatMap((resource) => ['--external', resource]),
    ...(unprivileged ? ['--unprivileged'] : []),
  ]
}

export interface RestoreOptions {
  directory: string
  logFile: string
  /** 1: errors only; 4: everything, which costs milliseconds. */
  logLevel: 1 | 4
  /** Descriptors of the criu process, each with the key of what it takes the place of. */
  inherited: readonly { key: string; fd: number }[]
  unprivileged: boolean
}

const CRIU_REQUEST_RESTORE = 2
const CGROUPS_IGNORE = 0

export function restoreRequest({ directory, logFile, logLevel, inherited, unprivileged }: RestoreOptions): Uint8Array {
  return encode(RestoreRequest, {
    type: CRIU_REQUEST_RESTORE,
    options: {
      imagesDirectoryFd: -1,
      imagesDirectory: directory,
      logFile,
      logLevel,
      // A direct child of ours, so that its exit status is ours to read.
      restoreSibling: true,
      // Parked until SIGCONT.
      leaveStopped: true,
      tcpClose: true,
      // Sockets for datagrams are connected anew to paths outside.
      externalUnixSockets: true,
      manageCgroupsMode: CGROUPS_IGNORE,
      inheritFd: inherited.map(({ key, fd }) => ({ key, fd })),
      ...(unprivileged ? { unprivileged } : {}),
    },
  })
}
