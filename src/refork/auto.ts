/**
 * Whether a refork pays, measured: what requests cost a child that is fresh, against what they cost the warmest one; and the memory that
 * children no longer share. It keeps what it has seen, and nothing else.
 *
 * A refork that comes too early gives a generation that is hardly warmer, and a JIT compiler warms up for thousands of requests. So it
 * looks when the warmest child has answered 50 requests, 100, 200, 400 …; after each refork the first look is eight times later; and where
 * the gain is not great it waits until the child has stopped to become faster.
 */
import {
  FIRST_REQUESTS,
  type ObservedChild,
  type ReforkDecision,
  type ReforkObservation,
  warmestOf,
} from './observation.js'

/** A request of a fresh child has to cost this many times as much as one of the warmest. Below lies what a busy machine makes of it. */
const GAIN = 1.2
/** So much gain is taken at once, without waiting for more. */
const GREAT_GAIN = 1.5
/** Where the last half of a child's requests cost less than this share of the quarter before it, it becomes warmer yet. */
const IMPROVING = 0.9
/** How many times later the first look is after each refork, and the latest. */
const SPARSER = 8
const LATEST_FIRST_LOOK = 20_000
/** CPU time comes in steps of 10 ms: less than this many milliseconds say nothing. */
const LEAST_CPU_MS = 100
/** Samples of a child that are kept: the looks are at doublings. */
const MOST_SAMPLES = 400
/** Ended children whose first requests are remembered: enough for a median. */
const MOST_ENDED = 100
/** Memory that all children together would share again, from which on a refork pays by that alone. */
const LEAST_DRIFT_BYTES = 64 * 2 ** 20
const MEBI = 2 ** 20

/** What a request costs, in milliseconds; undefined where too little was seen. */
interface Cost {
  readonly latencyMs: number | undefined
  readonly cpuMs: number | undefined
}

interface Sample {
  readonly requests: number
  readonly requestMs: number | undefined
  readonly cpuMs: number
}

interface Seen {
  readonly samples: Sample[]
  /** Of its first requests. */
  fresh: Cost | undefined
}

export class AutoPolicy {
  #generation = 0
  /** Children of the generation in use. */
  #seen = new Map<number, Seen>()
  /** What the first requests of children that have ended cost. */
  #ended: Cost[] = []
  #lookAt = FIRST_REQUESTS
  #last = 'nothing was measured yet'
  /** A refork for memory was decided. Until it is made it is decided again; then memory is no reason any more. */
  #isForMemory = false
  #isMemoryReason = true

  observe(observation: ReforkObservation): ReforkDecision {
    const { generation, reforks, children } = observation
    if (generation !== this.#generation) this.#begin(generation, reforks)
    this.#note(children.filter((child) => child.generation === generation))
    const warmest = warmestOf(children, generation)
    if (typeof warmest === 'string') return { from: undefined, why: warmest }
    if (warmest.requests < this.#lookAt) {
      const soon = `the next look is at ${this.#lookAt} requests of a child, the busiest has answered ${warmest.requests}`
      return { from: undefined, why: `${this.#last}; ${soon}` }
    }
    const decision = this.#look(warmest, children)
    this.#last = decision.why
    // One that is to be made is decided anew until there is another generation: it can fail, or be put off.
    if (decision.from === undefined) while (this.#lookAt <= warmest.requests) this.#lookAt *= 2
    return decision
  }

  #begin(generation: number, reforks: number): void {
    this.#generation = generation
    this.#seen = new Map()
    this.#ended = []
    if (this.#isForMemory) this.#isMemoryReason = false
    this.#lookAt = Math.min(LATEST_FIRST_LOOK, FIRST_REQUESTS * SPARSER ** reforks)
  }

  #note(children: readonly ObservedChild[]): void {
    const alive = new Set(children.map(({ pid }) => pid))
    for (const [pid, { fresh }] of this.#seen) {
      if (alive.has(pid)) continue
      this.#seen.delete(pid)
      if (fresh) this.#ended.push(fresh)
      if (this.#ended.length > MOST_ENDED) this.#ended.shift()
    }
    for (const { pid, requests, requestMs, cpuMs, first } of children) {
      let seen = this.#seen.get(pid)
      const last = seen?.samples.at(-1)
      // Before its first request, or of an id that was given again.
      if (!seen || requests === 0 || (last && requests < last.requests)) {
        const idle = { requests: 0, requestMs: requestMs === undefined && requests > 0 ? undefined : 0 }
        // One that was seen for the first time in its work began at its fork with next to nothing; one that counts anew had used
        // what was seen of it last.
        const usedMs = last && cpuMs >= last.cpuMs ? last.cpuMs : 0
        seen = { samples: [{ ...idle, cpuMs: requests === 0 ? cpuMs : usedMs }], fresh: undefined }
        this.#seen.set(pid, seen)
      }
      if (requests === seen.samples.at(-1)!.requests) continue
      seen.samples.push({ requests, requestMs, cpuMs })
      // The early ones less dense: they are wanted by doublings only.
      if (seen.samples.length > MOST_SAMPLES)
        seen.samples.splice(1, 2 * 50, ...seen.samples.slice(1, 101).filter((_, i) => i % 2))
      // A busy child is long past its first requests when it is looked at.
      const early = first && first.requests <= requests ? first : seen.samples.at(-1)!
      if (!seen.fresh && early.requests >= FIRST_REQUESTS) seen.fresh = costBetween(seen.samples[0]!, early)
    }
  }

  #look(warmest: ObservedChild, children: readonly ObservedChild[]): ReforkDecision {
    const { samples } = this.#seen.get(warmest.pid)!
    const now = samples.at(-1)!
    const at = (most: number) => samples.findLast(({ requests }) => requests <= most)
    // Its last half: long enough for an average, and young. And the quarter before, to see whether it becomes faster yet.
    const half = at(Math.min(now.requests / 2, now.requests - FIRST_REQUESTS))
    const quarter = at((half?.requests ?? 0) / 2)
    const warm = half && costBetween(half, now)
    const before = half && quarter && half.requests - quarter.requests > 0 ? costBetween(quarter, half) : undefined
    const fresh = medianCost([...this.#ended, ...[...this.#seen.values()].flatMap((seen) => seen.fresh ?? [])])
    const drift = this.#drift(warmest, children)
    if (drift) return { from: warmest.pid, why: drift }
    const not = (why: string): ReforkDecision => ({ from: undefined, why })
    if (!warm || !fresh) return not(`child ${warmest.pid} has answered too few requests to compare`)
    const gain = gainOf(fresh, warm)
    if (!gain) return not(`the requests of child ${warmest.pid} cost too little to be measured`)
    const seen = `a request costs a fresh child ${gain.times.toFixed(2)} times what it costs child ${warmest.pid} after ${now.requests} (${gain.what}: ${gain.fresh.toFixed(2)} and ${gain.warm.toFixed(2)} ms)`
    if (gain.times < GAIN) return not(`${seen}: that does not pay`)
    const progress = before && gainOf(before, warm)
    const isImproving = !progress || 1 / progress.times < IMPROVING
    if (isImproving && gain.times < GREAT_GAIN) return not(`${seen}, and it still becomes faster`)
    return { from: warmest.pid, why: seen }
  }

  /**
   * Why a refork pays by memory alone: once. A program that rewrites its memory all the time, as some garbage collectors do, drifts
   * as before, and would be reforked for ever.
   */
  #drift({ pid, requests, privateBytes }: ObservedChild, children: readonly ObservedChild[]): string | undefined {
    if (privateBytes === undefined || !this.#isMemoryReason) return undefined
    const own = children.filter(({ generation }) => generation === this.#generation)
    const total = own.reduce((sum, child) => sum + (child.privateBytes ?? 0), 0)
    if (own.length < 2 || total < LEAST_DRIFT_BYTES) return undefined
    this.#isForMemory = true
    return `${own.length} children have ${(total / MEBI).toFixed(0)} MiB of their own, child ${pid} ${(privateBytes / MEBI).toFixed(0)} after ${requests} requests`
  }
}

function costBetween(from: Sample, to: Sample): Cost {
  const requests = to.requests - from.requests
  const cpuMs = to.cpuMs - from.cpuMs
  const latency =
    to.requestMs === undefined || from.requestMs === undefined ? undefined : (to.requestMs - from.requestMs) / requests
  return { latencyMs: latency, cpuMs: cpuMs >= LEAST_CPU_MS ? cpuMs / requests : undefined }
}

function medianCost(costs: readonly Cost[]): Cost | undefined {
  if (costs.length === 0) return undefined
  return {
    latencyMs: median(costs.flatMap(({ latencyMs }) => latencyMs ?? [])),
    cpuMs: median(costs.flatMap(({ cpuMs }) => cpuMs ?? [])),
  }
}

function median(values: readonly number[]): number | undefined {
  return [...values].sort((a, b) => a - b)[Math.floor((values.length - 1) / 2)]
}

/**
 * How many times more one costs than the other. CPU time where there is enough of it: it does not depend on how many requests come at
 * once. Undefined where neither can be compared.
 */
function gainOf(fresh: Cost, warm: Cost): { times: number; what: string; fresh: number; warm: number } | undefined {
  for (const [what, a, b] of [
    ['CPU', fresh.cpuMs, warm.cpuMs],
    ['latency', fresh.latencyMs, warm.latencyMs],
  ] as const) {
    if (a !== undefined && b !== undefined && b > 0) return { times: a / b, what, fresh: a, warm: b }
  }
  return undefined
}
