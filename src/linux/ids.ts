/**
 * Chooses process and thread ids for forks. The kernel gives ids upwards and wraps; this goes downwards, starting behind
 * the kernel's last one, so that the two meet late, and comes back to an id only after all others: an id that a child
 * has just given up is the last to be used again.
 */
import { WarmforkError } from '../errors.js'
import { idInUse } from './libc.js'
import { lastPid, pidMax } from './proc.js'

/** The kernel keeps ids below 300 for what boots first, and never gives them again after wrapping. */
const LOWEST = 300

export class IdAllocator {
  readonly #reserved = new Set<number>()
  #next: number | undefined

  /** `count` ids that nobody uses now and that no other caller has; `release` gives them back. Throws PIDS_EXHAUSTED. */
  take(count: number): number[] {
    const most = pidMax() - 1
    this.#next ??= lastPid()
    const taken: number[] = []
    for (let tried = 0; tried <= most - LOWEST && taken.length < count; tried++) {
      this.#next -= 1
      if (this.#next < LOWEST || this.#next > most) this.#next = most
      if (this.#reserved.has(this.#next) || idInUse(this.#next)) continue
      taken.push(this.#next)
      this.#reserved.add(this.#next)
    }
    if (taken.length === count) return taken
    this.release(taken)
    throw new WarmforkError('PIDS_EXHAUSTED', {
      tried: `find ${count} free process ids`,
      happened: `fewer are free below kernel.pid_max (${most + 1})`,
    })
  }

  /** To be called when the ids are in use by their process, or never will be. */
  release(ids: Iterable<number>): void {
    for (const id of ids) this.#reserved.delete(id)
  }
}

/** The allocator of this process: engines share it, so that they do not choose the same ids. */
export const ids = new IdAllocator()
