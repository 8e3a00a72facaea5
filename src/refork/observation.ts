/**
 * What a policy of reforks is shown, and what it gives. It knows numbers only.
 */

/** How many requests of a child are its first ones: enough for an average, and before a compiler has done much. */
export const FIRST_REQUESTS = 50

export interface ObservedChild {
  readonly pid: number
  readonly generation: number
  /** That it has answered since it was forked. */
  readonly requests: number
  /** The sum of their times, in milliseconds; undefined where nobody tells. */
  readonly requestMs: number | undefined
  readonly aliveMs: number
  /** The same figures when it had answered its first 50, or as soon after that as anybody told; undefined before. */
  readonly first?:
    | { readonly requests: number; readonly requestMs: number | undefined; readonly cpuMs: number }
    | undefined
  /** CPU time since it was booted or forked, in milliseconds, in steps of ten. */
  readonly cpuMs: number
  /** Memory of its own; undefined where it was not looked at. */
  readonly privateBytes: number | undefined
  /** Why it is never to be reforked; undefined where it may be. */
  readonly refuses: string | undefined
}

export interface ReforkObservation {
  /** Of a clock that nobody sets. */
  readonly nowMs: number
  /** Number of the one in use. */
  readonly generation: number
  readonly generationAgeMs: number
  /** Made of it. */
  readonly forks: number
  /** That lie between the boot and this generation. */
  readonly reforks: number
  /** Those that run, of whatever generation, oldest first. */
  readonly children: readonly ObservedChild[]
}

export interface ReforkDecision {
  /** Pid of the child to be reforked; undefined: none now. */
  readonly from: number | undefined
  /** What was seen, as a phrase with its figures. */
  readonly why: string
}

/** The child of a generation with the most requests, the oldest among equals; a phrase where there is none. */
export function warmestOf(children: readonly ObservedChild[], generation: number): ObservedChild | string {
  // One of an older generation has lost its place to the new one.
  const own = children.filter((child) => child.generation === generation)
  if (own.length === 0) return `no child of generation ${generation} runs`
  const willing = own.filter(({ refuses }) => refuses === undefined)
  if (willing.length === 0) return `all children of generation ${generation} refuse: ${own[0]!.refuses}`
  return willing.reduce((best, child) => (child.requests > best.requests ? child : best))
}
