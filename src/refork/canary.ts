/**
 * Watches the first children of a new generation: where too many of them crash, the generation is bad, however it passed its trial.
 * It counts, and knows no processes.
 */
import type { CanaryOptions } from '../options.js'

export class Canary {
  readonly #options: Required<CanaryOptions> | false
  #generation = 0
  #forked = 0
  #crashed = 0

  constructor(options: Required<CanaryOptions> | false) {
    this.#options = options
  }

  /** From now on the children of this generation are watched, and of no other. */
  watch(generation: number): void {
    this.#generation = generation
    this.#forked = 0
    this.#crashed = 0
  }

  /** @returns whether the child is one of those that are watched */
  forked(generation: number): boolean {
    if (this.#options === false || generation !== this.#generation || this.#forked >= this.#options.children)
      return false
    this.#forked++
    return true
  }

  /**
   * One of those that are watched has crashed.
   * @returns why the generation is bad, as a phrase; undefined where it is not, or was called so before
   */
  crashed(generation: number): string | undefined {
    if (this.#options === false || generation !== this.#generation) return undefined
    this.#crashed++
    if (this.#crashed <= this.#options.crashes) return undefined
    this.#generation = 0
    return `${this.#crashed} of its first ${this.#forked} children crashed`
  }
}
