/**
 * Reads the exit statuses of children that Node did not start (restored ones are our children by kernel, but unknown to
 * libuv). libuv waits for its own children by id, so the two do not take statuses from each other.
 */
import { type WaitResult, waitChild } from './libc.js'

export interface ExitStatus {
  /** Exit code, or null where a signal ended it. */
  code: number | null
  signal: NodeJS.Signals | null
}

export interface WatchedChild {
  /** Called once, with the exit status; after it the id may belong to somebody else. */
  exited(status: ExitStatus): void
  /** Called when somebody stops or continues the child. */
  stopped?(): void
  continued?(): void
}

/** Where exit statuses come from. An embedder that owns SIGCHLD passes its own. */
export interface Reaper {
  watch(pid: number, child: WatchedChild): void
  unwatch(pid: number): void
}

class SignalReaper implements Reaper {
  readonly #watched = new Map<number, WatchedChild>()
  readonly #onSignal = () => this.#collect()

  watch(pid: number, child: WatchedChild): void {
    if (this.#watched.size === 0) process.on('SIGCHLD', this.#onSignal)
    this.#watched.set(pid, child)
    // It may have ended before we listened.
    setImmediate(() => this.#look(pid))
  }

  unwatch(pid: number): void {
    if (this.#watched.delete(pid) && this.#watched.size === 0) process.off('SIGCHLD', this.#onSignal)
  }

  #collect(): void {
    for (const pid of [...this.#watched.keys()]) {
      try {
        this.#look(pid)
      } catch (error) {
        // One listener's error must not hide the others' exits: one signal stands for many.
        queueMicrotask(() => {
          throw error
        })
      }
    }
  }

  #look(pid: number): void {
    // Several changes may wait: stopped, continued, exited.
    for (;;) {
      const child = this.#watched.get(pid)
      if (!child) return
      const result: WaitResult = waitChild(pid)
      if (result.kind === 'running') return
      if (result.kind === 'stopped') child.stopped?.()
      else if (result.kind === 'continued') child.continued?.()
      else {
        this.unwatch(pid)
        child.exited(
          result.kind === 'exited' ? { code: result.code, signal: result.signal } : { code: null, signal: null },
        )
        return
      }
    }
  }
}

/** The reaper of this process. */
export const reaper: Reaper = new SignalReaper()
