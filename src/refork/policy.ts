/**
 * When to refork, and of which child. A policy is given what is to be seen and gives a decision with its reason; it has no clock, no
 * timers and no processes of its own.
 */
import { z } from 'zod'
import { AutoPolicy } from './auto.js'
import { type ObservedChild, type ReforkDecision, type ReforkObservation, warmestOf } from './observation.js'

/** Thresholds. */
export interface ReforkThresholds {
  /**
   * When the first, the second, the third refork is made: how many requests the busiest child of the generation has answered, how
   * many forks were made of it, or how many seconds old it is.
   * @default [50, 100, 1_000], Pitchfork's
   */
  after?: readonly number[]
  /** @default 'requests' */
  unit?: 'requests' | 'forks' | 'seconds'
  /**
   * Whether the last threshold holds for all reforks after it; otherwise there are no more.
   * @default true
   */
  repeatLast?: boolean
  /**
   * How long no other is made after one that failed, in milliseconds: twice as long after each further failure, up to ten minutes.
   * @default 10_000, Pitchfork's
   */
  backoffMs?: number
  /**
   * How many reforks are made since the program was booted.
   * @default no limit
   */
  maxGenerations?: number
  /**
   * By how much the threshold of each child differs from the others', as a share, so that children do not reach it together.
   * @default 0.1
   */
  jitter?: number
}

/** When the supervisor reforks by itself. */
export type ReforkSetting = false | 'auto' | ReforkThresholds | ReforkFunction

/** A policy of the embedder's: whether, or which child by its pid, and why. */
export type ReforkFunction = (observation: ReforkObservation) => ReforkVerdict | Promise<ReforkVerdict>
/** `true`: the child of the generation in use with the most requests. */
export type ReforkVerdict = boolean | number | ReforkDecision

const DEFAULTS = {
  after: [50, 100, 1_000] as readonly number[],
  unit: 'requests' as const,
  repeatLast: true,
  backoffMs: 10_000,
  maxGenerations: Number.POSITIVE_INFINITY,
  jitter: 0.1,
}
const MOST_BACKOFF_MS = 600_000

const words = "to be false, 'auto', an object with `after`, or a function"
const positive = z.number({ error: 'to be a number above 0' }).positive('to be above 0')
const wholeWords = 'to be a whole number, 0 or more'
const afterWords = 'to be a non-empty array of numbers above 0'
const share = z.number({ error: 'to be a share, from 0 to 1' })
const thresholds = z.strictObject({
  after: z.array(positive, { error: afterWords }).min(1, afterWords).optional(),
  unit: z.enum(['requests', 'forks', 'seconds'], { error: "to be one of 'requests', 'forks', 'seconds'" }).optional(),
  repeatLast: z.boolean({ error: 'to be true or false' }).optional(),
  backoffMs: z.number({ error: 'to be a time in milliseconds' }).min(0, 'to be 0 or more milliseconds').optional(),
  // Infinity, the default, is no number to zod.
  maxGenerations: z
    .custom<number>(
      (value) => value === Number.POSITIVE_INFINITY || (Number.isInteger(value) && (value as number) >= 0),
      wholeWords,
    )
    .optional(),
  jitter: share.min(0, 'to be a share, from 0 to 1').max(1, 'to be a share, from 0 to 1').optional(),
})
/** What `refork` can be, for the check of options; each message is the phrase after "Expected `x` ". */
export const reforkSchema = z.unknown().superRefine((value, context) => {
  if (value === false || value === 'auto' || typeof value === 'function') return
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    context.addIssue({ code: 'custom', message: words })
    return
  }
  for (const issue of thresholds.safeParse(value).error?.issues ?? []) context.addIssue({ ...issue } as never)
})
/** The keys of thresholds, for the suggestion at an unknown one. */
export const REFORK_KEYS: readonly string[] = Object.keys(DEFAULTS)

export class ReforkPolicy {
  readonly #setting: ReforkSetting
  readonly #random: () => number
  readonly #auto = new AutoPolicy()
  /** A child's own threshold, as a share of the common one. */
  readonly #shares = new Map<number, number>()
  #failures = 0
  #notBefore = Number.NEGATIVE_INFINITY

  /** `random`: from 0 to 1, for the jitter. */
  constructor(setting: ReforkSetting, random: () => number = Math.random) {
    this.#setting = setting
    this.#random = random
  }

  /** Whether its decisions depend on the memory of children. */
  get looksAtMemory(): boolean {
    return this.#setting === 'auto' || typeof this.#setting === 'function'
  }

  /** Decides by what is to be seen now; call it again and again, each second or more often. */
  async observe(observation: ReforkObservation): Promise<ReforkDecision> {
    const setting = this.#setting
    if (setting === false) return no('reforks are switched off')
    const waitMs = this.#notBefore - observation.nowMs
    // It goes on looking meanwhile.
    const decision =
      setting === 'auto'
        ? this.#auto.observe(observation)
        : typeof setting === 'function'
          ? await this.#ask(setting, observation)
          : this.#byThresholds(withDefaults(setting), observation)
    if (decision.from === undefined || waitMs <= 0) return decision
    return no(`the last refork failed, and the next waits ${Math.ceil(waitMs / 1000)} s`)
  }

  /** What became of the refork that was decided. */
  outcome(result: 'succeeded' | 'failed', nowMs: number): void {
    if (result === 'succeeded') {
      this.#failures = 0
      this.#notBefore = Number.NEGATIVE_INFINITY
      return
    }
    const { backoffMs = DEFAULTS.backoffMs } = typeof this.#setting === 'object' ? this.#setting : {}
    this.#notBefore = nowMs + Math.min(MOST_BACKOFF_MS, backoffMs * 2 ** this.#failures++)
  }

  #byThresholds(options: Required<ReforkThresholds>, observation: ReforkObservation): ReforkDecision {
    const { after, unit, repeatLast, maxGenerations } = options
    const { reforks, children, generation, forks, generationAgeMs } = observation
    if (reforks >= maxGenerations) return no(`${reforks} reforks are as many as may be made (maxGenerations)`)
    const threshold = after[reforks] ?? (repeatLast ? after.at(-1) : undefined)
    if (threshold === undefined) return no(`${reforks} reforks are as many as there are thresholds`)
    const warmest = warmestOf(children, generation)
    if (typeof warmest === 'string') return no(warmest)
    switch (unit) {
      case 'forks': {
        const seen = `${forks} forks of generation ${generation}, where ${threshold} are the threshold`
        return forks >= threshold ? yes(warmest, seen) : no(seen)
      }
      case 'seconds': {
        const seen = `generation ${generation} is ${Math.floor(generationAgeMs / 1000)} s old, where ${threshold} s are the threshold`
        return generationAgeMs >= threshold * 1000 ? yes(warmest, seen) : no(seen)
      }
      case 'requests': {
        const own = Math.max(1, Math.round(threshold * this.#shareOf(warmest.pid, children, options.jitter)))
        const seen = `child ${warmest.pid} has answered ${warmest.requests} requests, where ${own} are its threshold`
        return warmest.requests >= own ? yes(warmest, seen) : no(seen)
      }
    }
  }

  #shareOf(pid: number, children: readonly ObservedChild[], jitter: number): number {
    const alive = new Set(children.map((child) => child.pid))
    for (const known of this.#shares.keys()) if (!alive.has(known)) this.#shares.delete(known)
    const share = this.#shares.get(pid) ?? 1 + jitter * (2 * this.#random() - 1)
    this.#shares.set(pid, share)
    return share
  }

  async #ask(policy: ReforkFunction, observation: ReforkObservation): Promise<ReforkDecision> {
    const verdict = await policy(observation)
    if (verdict === false) return no('the function `refork` says no')
    if (typeof verdict === 'object' && verdict !== null) return verdict
    // One without a `return`, in plain JavaScript, must not refork at each look.
    if (verdict !== true && typeof verdict !== 'number') return no('the function `refork` gave no verdict')
    if (typeof verdict === 'number') return { from: verdict, why: `the function \`refork\` names child ${verdict}` }
    const warmest = warmestOf(observation.children, observation.generation)
    return typeof warmest === 'string' ? no(warmest) : yes(warmest, 'the function `refork` says yes')
  }
}

/** A member that is there and undefined is one that is not there. */
function withDefaults(setting: ReforkThresholds): Required<ReforkThresholds> {
  const given = Object.fromEntries(Object.entries(setting).filter(([, value]) => value !== undefined))
  return { ...DEFAULTS, ...given }
}

const no = (why: string): ReforkDecision => ({ from: undefined, why })
const yes = (child: ObservedChild, why: string): ReforkDecision => ({ from: child.pid, why })
