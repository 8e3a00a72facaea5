/** What one check of the doctor is and answers. It knows no particular check. */
import type { Criu } from '../engines/criu/binary.js'

/** `fail`: forks cannot work. `warn`: they work, slower or not for all programs. */
export type CheckStatus = 'ok' | 'warn' | 'fail'

export interface CheckResult {
  readonly name: string
  readonly status: CheckStatus
  /** What was found, in one line. */
  readonly found: string
  /** What it costs that it is so, in one line. */
  readonly cost?: string
  /** How to mend it, in one line. */
  readonly remedy?: string
}

/** What the checks share. A check may learn something that later ones use. */
export interface CheckContext {
  /** The store to look at; need not exist yet. */
  readonly store: string
  readonly kernelRelease: string
  /** Whether the slow measurements are asked for. */
  readonly deep: boolean
  /** The criu that was found, or the error that says why there is none. */
  readonly criu: Criu | Error
}

/** One or more results; undefined where there is nothing to say on this machine. */
export type Check = (context: CheckContext) => Promise<CheckResult | undefined> | CheckResult | undefined
