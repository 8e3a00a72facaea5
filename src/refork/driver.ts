/**
 * Asks the policy again and again, with what is to be seen of the children, and has it done what the policy decides. It knows
 * children and a clock, and neither thresholds nor how a refork is made.
 */
import type { Child } from '../child.js'
import { memoryUse, treeCpuMs } from '../linux/proc.js'
import { FIRST_REQUESTS, type ObservedChild, type ReforkDecision, type ReforkObservation } from './observation.js'
import type { ReforkPolicy } from './policy.js'

export interface ReforkDriverSettings {
  readonly policy: ReforkPolicy
  /** Those that run. */
  readonly children: () => readonly Child[]
  readonly generation: () => {
    readonly number: number
    readonly reforks: number
    readonly forks: number
    readonly sinceMs: number
  }
  /** Why no refork may be made now, whatever the policy says; undefined where one may. */
  readonly whyNot: () => string | undefined
  readonly refork: (from: Child, why: string) => Promise<unknown>
  readonly onDecision: (decision: ReforkDecision) => void
  readonly warn: (message: string, cause?: unknown) => void
}

/** Between two looks: soon enough for the first threshold of a busy server. */
const LOOK_MS = 250
/** Memory changes slower than requests come. */
const MEMORY_MS = 5_000

export class ReforkDriver {
  readonly #settings: ReforkDriverSettings
  readonly #privateBytes = new Map<number, number>()
  readonly #seenAt = new WeakMap<Child, number>()
  readonly #first = new WeakMap<Child, NonNullable<ObservedChild['first']>>()
  #memoryAt = Number.NEGATIVE_INFINITY
  #timer: NodeJS.Timeout | undefined
  #isClosed = false

  constructor(settings: ReforkDriverSettings) {
    this.#settings = settings
    this.#lookLater()
  }

  close(): void {
    this.#isClosed = true
    clearTimeout(this.#timer)
  }

  /** One look after the other: one waits for what the look before has led to. */
  #lookLater(): void {
    if (this.#isClosed) return
    this.#timer = setTimeout(() => {
      void this.#look()
        .catch((error) => this.#settings.warn(`the policy of reforks failed: ${error}`, error))
        .finally(() => this.#lookLater())
    }, LOOK_MS).unref()
  }

  async #look(): Promise<void> {
    const { policy, whyNot, refork, onDecision } = this.#settings
    if (whyNot() !== undefined) return
    const children = new Map(this.#settings.children().map((child) => [child.pid, child]))
    const decision = await policy.observe(this.#observe([...children.values()]))
    const from = decision.from === undefined ? undefined : children.get(decision.from)
    onDecision(decision)
    if (!from || this.#isClosed || whyNot() !== undefined) return
    try {
      await refork(from, decision.why)
      policy.outcome('succeeded', performance.now())
    } catch {
      // The supervisor has told why.
      policy.outcome('failed', performance.now())
    }
  }

  /** Notes a child's first requests in the moment in which they are told: at the next look it can be far beyond. */
  watch(child: Child): void {
    this.#firstSeen(child, performance.now())
    const note = () => {
      if (child.requests < FIRST_REQUESTS) return
      child.off('requests', note)
      const { requests, requestMs } = child
      this.#first.set(child, {
        requests,
        requestMs: requestMs > 0 ? requestMs : undefined,
        cpuMs: treeCpuMs(child.pid),
      })
    }
    child.on('requests', note)
  }

  /** The clock of forkedAt can be set. */
  #firstSeen(child: Child, nowMs: number): number {
    const at = this.#seenAt.get(child) ?? nowMs
    this.#seenAt.set(child, at)
    return at
  }

  #observe(children: readonly Child[]): ReforkObservation {
    const { number, reforks, forks, sinceMs } = this.#settings.generation()
    const nowMs = performance.now()
    // It costs some milliseconds for each child.
    if (this.#settings.policy.looksAtMemory && nowMs - this.#memoryAt >= MEMORY_MS) {
      this.#memoryAt = nowMs
      this.#privateBytes.clear()
      for (const { pid } of children) {
        const use = memoryUse(pid)
        if (use) this.#privateBytes.set(pid, use.privateBytes)
      }
    }
    return {
      nowMs,
      generation: number,
      generationAgeMs: nowMs - sinceMs,
      forks,
      reforks,
      children: children.map((child) => ({
        pid: child.pid,
        generation: child.generation,
        requests: child.requests,
        requestMs: child.requestMs > 0 ? child.requestMs : undefined,
        aliveMs: nowMs - this.#firstSeen(child, nowMs),
        cpuMs: treeCpuMs(child.pid),
        first: this.#first.get(child),
        privateBytes: this.#privateBytes.get(child.pid),
        refuses: child.refuses,
      })),
    }
  }
}
