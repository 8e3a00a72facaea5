/** How long to wait before the next try. It knows numbers and a clock, and nothing of what is tried. */
import type { ExitStatus } from './linux/reaper.js'
import type { CrashOptions } from './options.js'

/** PM2's: 1.5 times longer at each failure, from 100 ms to 15 s. */
const FIRST_MS = 100
const FACTOR = 1.5
const MOST_MS = 15_000

/** The delay before the n-th try again (from 1). */
export function backoffMs(n: number): number {
  return Math.min(MOST_MS, FIRST_MS * FACTOR ** (n - 1))
}

const CRASH_SIGNALS: ReadonlySet<string> = new Set(['SIGSEGV', 'SIGBUS', 'SIGILL', 'SIGABRT', 'SIGFPE'])

/**
 * Slows forks down while children crash right after them. All children share one address layout, so that a crash tells an attacker
 * something; at the speed of forks that would be hundreds of guesses a second.
 */
export class CrashBackoff {
  readonly #options: Required<CrashOptions>
  readonly #now: () => number
  #crashes = 0
  #nextAt = 0

  constructor(options: Required<CrashOptions>, now: () => number = Date.now) {
    this.#options = options
    this.#now = now
  }

  /** Crashes in a row. */
  get crashes(): number {
    return this.#crashes
  }

  get isLoop(): boolean {
    return this.#crashes >= this.#options.giveUpAfter
  }

  get isDelaying(): boolean {
    return this.#crashes >= this.#options.delayAfter
  }

  /**
   * Tells of the end of a child.
   * @returns true where it counts as a crash
   */
  ended(status: ExitStatus, ranMs: number): boolean {
    if (isCrash(status) && ranMs < this.#options.soonMs) {
      this.#crashes++
      if (this.isDelaying) this.#nextAt = Math.max(this.#nextAt, this.#now() + this.#delayMs())
      return true
    }
    // One that ended well takes one crash back, not all: else an attacker would only have to mix good requests in.
    if (this.#crashes > 0 && !this.isLoop) this.#crashes--
    return false
  }

  /** What is forked from now on is another generation. */
  reset(): void {
    this.#crashes = 0
    this.#nextAt = 0
  }

  /** How long the next fork has to wait, in milliseconds. Each call takes a turn: the one after it waits longer. */
  takeTurn(): number {
    if (!this.isDelaying) return 0
    const at = Math.max(this.#now(), this.#nextAt)
    this.#nextAt = at + this.#delayMs()
    return at - this.#now()
  }

  #delayMs(): number {
    return backoffMs(this.#crashes - this.#options.delayAfter + 1)
  }
}

/** Whether a process ended as one does that is broken: by a signal of the kernel's, not of somebody's. */
export function isCrash({ signal, code }: ExitStatus): boolean {
  return CRASH_SIGNALS.has(signal ?? '') || isShellCrash(code)
}

/** A shell, or a runtime that catches the signal, ends with 128 and the signal's number: 139 for SIGSEGV. */
function isShellCrash(code: number | null): boolean {
  return code !== null && [132, 134, 135, 136, 139].includes(code)
}
