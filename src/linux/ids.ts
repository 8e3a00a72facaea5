/**
 * Chooses process and thread ids for forks. The kernel gives ids upwards and wraps; this goes downwards, so that the two
 * meet seldom and pass each other at once, from a place of its own, so that several supervisors do not choose the same.
 * It comes back to an id only after all others: an id that a child has just given up is the last to be used again.
 */
import { randomInt } from 'node:crypto'
import { WarmforkError } from '../errors.js'
import { idInUse } from './libc.js'
import { pidMax } from './proc.js'

/** The kernel keeps ids below 300 for what boots first, and never gives them again after wrapping. */
const LOWEST = 300

export class IdAllocator {
  readonly #reserved = new Set<number>()
  #next: number | undefined

  /** `count` ids that nobody uses now and that no other caller has; `release` gives them back. Throws PIDS_EXHAUSTED. */
  take(count: number): number[] {
    const most = pidMax() - 1
    this.#next ??= randomInt(LOWEST, most + 1)
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
