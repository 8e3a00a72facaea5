/** Who is at the other end of a Unix socket, through koffi. It knows nothing of warmfork. */
import koffi from 'koffi'
import { SystemError } from './libc.js'

const lib = koffi.load(null)
const getsockopt = lib.func(
  'int getsockopt(int fd, int level, int name, _Out_ void *value, _Inout_ unsigned int *length)',
)
const lseek = lib.func('int64_t lseek(int fd, int64_t offset, int whence)')

export interface PeerCredentials {
  /** 0 where the process is in a pid namespace that ours does not see. */
  readonly pid: number
  readonly uid: number
  readonly gid: number
}

/** The process that connected, as it was then (SO_PEERCRED). */
export function peerCredentials(fd: number): PeerCredentials {
  const SOL_SOCKET = 1
  const SO_PEERCRED = 17
  const value = Buffer.alloc(12)
  const length = [value.length]
  if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, value, length) !== 0) {
    throw new SystemError('getsockopt', koffi.errno(), `errno ${koffi.errno()}`)
  }
  return { pid: value.readInt32LE(0), uid: value.readUInt32LE(4), gid: value.readUInt32LE(8) }
}

/** Sets the position of an open file; false where it has none (a pipe, a terminal). */
export function seekTo(fd: number, position: bigint): boolean {
  const SEEK_SET = 0
  return Number(lseek(fd, position, SEEK_SET)) >= 0
}
