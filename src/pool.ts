import type { Child } from './child.js'

export interface PoolState {
  /** How many are to be parked. */
  readonly size: number
  /** Those that are, oldest first. */
  readonly parked: readonly Child[]
  /** How many are being made. */
  readonly starting: number
}
