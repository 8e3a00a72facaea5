/**
 * The workers that a supervisor keeps running by itself: as many as it is told, each replaced when it ends, and replaced a few at a
 * time by children of a newer generation. It knows children and how to ask for one; not how one is made, nor what it serves.
 */
import { setTimeout as sleep } from 'node:timers/promises'
import { backoffMs } from './backoff.js'
import type { Child } from './child.js'
import { WarmforkError } from './errors.js'
import { Halt } from './halt.js'
import type { WorkerOptions } from './options.js'

export interface CrewSettings extends Required<WorkerOptions> {
  /** A child that runs and is the crew's. */
  readonly fork: () => Promise<Child>
  /** Whether children like this one are of yesterday. */
  readonly isOutdated: (child: Child) => boolean
  readonly warn: (kind: string, message: string, cause?: unknown) => void
  /** All workers are of today, after some were not. */
  readonly onRolledOut: (replaced: number) => void
}

export interface CrewState {
  /** How many workers are to run. */
  readonly size: number
  /** Those that do, oldest first. */
  readonly workers: readonly Child[]
  /** How many of them are to be replaced by children of the generation in use. */
  readonly outdated: number
}

/** Of the delays of `backoffMs`, where a rollout that fails begins: it has time. */
const SLOWLY = 5
/** One that ends this soon is replaced later and later. */
const SOON_MS = 1_000

export class Crew {
  readonly #settings: CrewSettings
  #size: number
  readonly #workers: Child[] = []
  /** Workers that are being ended: no place waits for them. */
  readonly #leaving = new Set<Child>()
  readonly #underWay = new Set<Promise<unknown>>()
  readonly #over = new AbortController()
  #starting = 0
  #failures = 0
  #retry: NodeJS.Timeout | undefined
  #rolling: Promise<void> | undefined

  constructor(settings: CrewSettings) {
    this.#settings = settings
    this.#size = settings.count
  }

  get state(): CrewState {
    const workers = this.#workers.filter((worker) => !this.#leaving.has(worker))
    return { size: this.#size, workers, outdated: workers.filter(this.#settings.isOutdated).length }
  }

  /**
   * Starts the workers.
   * @throws the error of the first that fails: a supervisor that cannot fork at all should not start
   */
  async start(): Promise<void> {
    const made = await Promise.allSettled(Array.from({ length: this.#size }, () => this.#add()))
    const failed = made.find((result) => result.status === 'rejected')
    if (failed) throw failed.reason
  }

  /** From now on so many run: of too many the oldest are ended, once they have nothing in hand. */
  resize(size: number): void {
    this.#size = size
    for (const worker of this.state.workers.slice(0, Math.max(0, this.state.workers.length - size)))
      this.#retire(worker)
    this.#fill()
  }

  /** Replaces the workers that are of yesterday, a few at a time. A second call while it goes on joins the first. */
  rollOut(): Promise<void> {
    this.#rolling ??= this.#track(this.#rollOut().finally(() => (this.#rolling = undefined)))
    return this.#rolling
  }

  async #rollOut(): Promise<void> {
    const { isOutdated, warn, onRolledOut } = this.#settings
    let replaced = 0
    let failures = 0
    while (!this.#over.signal.aborted) {
      const old = this.state.workers.filter(isOutdated)
      if (old.length === 0) break
      const results = await Promise.allSettled(old.slice(0, this.#atOnce).map((worker) => this.#replace(worker)))
      const failure = results.find((result) => result.status === 'rejected')
      if (!failure) failures = 0
      replaced += results.filter((result) => result.status === 'fulfilled').length
      if (!failure) continue
      if (this.#over.signal.aborted) return
      // The old ones serve on: later is soon enough.
      warn('rollout', `a worker could not be replaced, and serves on: ${failure.reason}`, failure.reason)
      await sleep(backoffMs(SLOWLY + failures++), undefined, { signal: this.#over.signal }).catch(() => {})
    }
    if (replaced > 0 && !this.#over.signal.aborted) onRolledOut(replaced)
  }

  get #atOnce(): number {
    return this.#settings.replaceAtOnce || Math.ceil(this.#size * 0.1)
  }

  /** The new one first, so that there are never fewer. */
  async #replace(old: Child): Promise<void> {
    const next = await this.#settings.fork()
    try {
      await next.ready
    } catch (error) {
      await next.end({ graceMs: 0 })
      throw error
    }
    if (this.#over.signal.aborted) return
    this.#take(next)
    await this.#retire(old)
  }

  /** Ends a worker that has nothing in hand: no other takes its place. Afterwards it is gone in any case. */
  #retire(worker: Child): Promise<void> {
    this.#leaving.add(worker)
    return this.#track(this.#leave(worker))
  }

  async #leave(worker: Child): Promise<void> {
    const { restTimeoutMs, warn } = this.#settings
    let halt: Halt | undefined
    try {
      const options = { tried: `replace worker ${worker.pid}`, timeoutMs: restTimeoutMs, signal: this.#over.signal }
      halt = await Halt.atRest(worker.pid, options)
    } catch (error) {
      if (this.#over.signal.aborted) return
      if (worker.state !== 'ended') warn('rollout', `worker ${worker.pid} is ended with work in hand: ${error}`, error)
    }
    // The signal to end is there before it goes on, so that it takes nothing more in hand.
    const ended = worker.end()
    halt?.release()
    await ended
  }

  #take(worker: Child): void {
    this.#workers.push(worker)
    const startedAt = performance.now()
    void worker.exit.then(() => {
      this.#workers.splice(this.#workers.indexOf(worker), 1)
      if (this.#leaving.delete(worker) || this.#over.signal.aborted) return
      if (performance.now() - startedAt < SOON_MS) this.#failed()
      else this.#fill()
    })
    setTimeout(() => {
      if (worker.state === 'running') this.#failures = 0
    }, SOON_MS).unref()
  }

  #fill(): void {
    if (this.#retry || this.#over.signal.aborted) return
    while (this.state.workers.length + this.#starting < this.#size) {
      this.#add().catch((error) => {
        if (this.#over.signal.aborted) return
        this.#settings.warn('worker', `a worker could not be started: ${error}`, error)
        this.#failed()
      })
    }
  }

  async #add(): Promise<void> {
    this.#starting++
    try {
      const worker = await this.#track(this.#settings.fork())
      if (this.#over.signal.aborted) return
      this.#take(worker)
    } finally {
      this.#starting--
    }
  }

  /** Later and later, as long as they end at once. */
  #failed(): void {
    this.#failures++
    clearTimeout(this.#retry)
    this.#retry = setTimeout(() => {
      this.#retry = undefined
      this.#fill()
    }, backoffMs(this.#failures)).unref()
  }

  #track<T>(work: Promise<T>): Promise<T> {
    const settled = work.then(
      () => {},
      () => {},
    )
    this.#underWay.add(settled)
    void settled.then(() => this.#underWay.delete(settled))
    return work
  }

  /** Replaces nobody any more, and waits for what is under way. The workers are the supervisor's to end. */
  async close(): Promise<void> {
    this.#over.abort(
      new WarmforkError('STOPPED', { tried: 'replace a worker', happened: 'the supervisor was stopped' }),
    )
    clearTimeout(this.#retry)
    while (this.#underWay.size > 0) await Promise.all(this.#underWay)
  }
}
