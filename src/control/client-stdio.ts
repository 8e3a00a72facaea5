/**
 * Takes the standard streams of the process at the other end of the control socket, for a child that is to have them.
 *
 * Node can send and receive no descriptors over its Unix sockets (SCM_RIGHTS), so the supervisor takes them itself:
 * by `pidfd_getfd`, which works for every kind of descriptor and shares its file position and flags, as after fork(2). It
 * needs the right to trace the client, which the same user and root have. Where Yama restricts that to descendants
 * (`kernel.yama.ptrace_scope` 1, Ubuntu's default, for those who are not root), /proc/PID/fd gives files, pipes and
 * terminals still, opened anew; sockets cannot be had that way.
 *
 * The pid comes from SO_PEERCRED. It could have been given to another process since, if the client died at once and the
 * ids came round; but only processes of the supervisor's own user and root get as far as this, who gain nothing by that.
 */
import { closeSync, constants, openSync, readFileSync } from 'node:fs'
import type { StdioFds } from '../engines/engine.js'
import { errnoOf, WarmforkError } from '../errors.js'
import { pidfdGetfd, pidfdOpen } from '../linux/libc.js'
import { seekTo } from '../linux/peer.js'

/** Its descriptors 0, 1 and 2; the caller closes them. Throws RESTORE_FAILED, FDS_EXHAUSTED, CHILD_GONE. */
export function takeStdio(pid: number): StdioFds {
  const taken: number[] = []
  let pidfd: number | undefined
  try {
    pidfd = pidfdOpen(pid)
    for (const fd of [0, 1, 2]) taken.push(take(pidfd, pid, fd))
    return taken as unknown as StdioFds
  } catch (error) {
    for (const fd of taken) closeSync(fd)
    throw failure(pid, error)
  } finally {
    if (pidfd !== undefined) closeSync(pidfd)
  }
}

function take(pidfd: number, pid: number, fd: number): number {
  try {
    return pidfdGetfd(pidfd, fd)
  } catch (error) {
    const code = errnoOf(error)
    if (code !== 'EPERM' && code !== 'EACCES' && code !== 'ENOSYS') throw error
    return reopen(pid, fd)
  }
}

/** The same file by /proc, with the flags and the position that it has there. */
function reopen(pid: number, fd: number): number {
  const info = readFileSync(`/proc/${pid}/fdinfo/${fd}`, 'latin1')
  const flags = Number.parseInt(/^flags:\s*(\d+)/m.exec(info)?.[1] ?? '0', 8)
  const kept = constants.O_RDONLY | constants.O_WRONLY | constants.O_RDWR | constants.O_APPEND
  const opened = openSync(`/proc/${pid}/fd/${fd}`, (flags & kept) | constants.O_NOCTTY)
  seekTo(opened, BigInt(/^pos:\s*(\d+)/m.exec(info)?.[1] ?? 0))
  return opened
}

function failure(pid: number, cause: unknown): WarmforkError {
  const tried = `take the standard streams of process ${pid}`
  const code = errnoOf(cause)
  if (code === 'EMFILE' || code === 'ENFILE') {
    return new WarmforkError('FDS_EXHAUSTED', { tried, happened: `no descriptor is free (${code})`, cause })
  }
  if (code === 'ESRCH' || code === 'ENOENT') {
    return new WarmforkError('CHILD_GONE', { tried, happened: 'it has ended', remedy: 'Run it again.', cause })
  }
  const happened =
    code === 'ENXIO'
      ? 'one of them is a socket, and the kernel lets no other process of this user take it'
      : `the kernel did not allow it (${code ?? String(cause)})`
  const remedy =
    code === 'ENXIO'
      ? 'Set kernel.yama.ptrace_scope to 0, run the supervisor as root, or give `warmfork fork` files or pipes.'
      : 'Run `warmfork fork` as the user of the supervisor, in the same pid namespace.'
  return new WarmforkError('RESTORE_FAILED', { tried, happened, remedy, cause })
}
