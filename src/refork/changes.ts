/**
 * What changes which generation is in use, one after the other: reforks, rollbacks and pins, asked for, decided by the policy, or since
 * the first children of a generation crash. It knows which generation follows which, and neither pools nor workers: they follow.
 */
import { EventEmitter } from 'node:events'
import PQueue from 'p-queue'
import { isCrash } from '../backoff.js'
import type { Child, Resumption } from '../child.js'
import type { Engine, ForkedProcess, GenerationInfo } from '../engines/engine.js'
import { WarmforkError } from '../errors.js'
import type { ResolvedOptions } from '../options.js'
import type { Succession } from '../succession.js'
import { Canary } from './canary.js'
import { ReforkDriver } from './driver.js'
import type { ReforkDecision } from './observation.js'
import { ReforkPolicy } from './policy.js'
import { candidates, type Refork, reforkOneOf } from './refork.js'
import { tryGeneration } from './trial.js'

export interface ReforkOptions {
  /** The child to be taken. @default the one of the generation in use with the most requests */
  from?: Child
  /** Why, for people; it is kept with the generation. @default 'asked for' */
  reason?: string
}

export interface RollbackOptions {
  /** Number of the generation to go to. @default the newest before the one in use that was not rejected */
  to?: number
  /** Why, for people; it is kept. @default 'asked for' */
  reason?: string
}

/** The refork that was made last, or that came to nothing last. */
export interface LastRefork {
  /** When it was over. */
  readonly at: Date
  readonly reason: string
  /** Of the child that it was taken of, or was to be; undefined where none was found. */
  readonly pid?: number
  /** Number of the generation that it made; undefined where it failed. */
  readonly generation?: number
  /** Why it failed. */
  readonly error?: Error
}

export interface ChangeEvents {
  /** A new generation is in use. */
  generation: [generation: GenerationInfo]
  /** The policy has decided for a refork, or against one for another reason than before. */
  reforkDecision: [decision: ReforkDecision]
  /** A refork was made, and its generation passed its trial. */
  refork: [refork: Refork]
  /** A refork came to nothing: the generation before serves on. */
  reforkFailed: [error: Error]
  /** Forks come from an earlier generation again. */
  rollback: [to: number, from: number, reason: string]
}

export interface ChangesSettings {
  readonly engine: Engine
  readonly succession: Succession
  readonly options: ResolvedOptions
  /** Aborted when the supervisor stops. */
  readonly signal: AbortSignal
  /** Those that run. */
  readonly children: () => readonly Child[]
  readonly childOf: (forked: ForkedProcess) => Child
  /** What forks are given that nobody gives anything. */
  readonly resumption: () => Resumption
  /** @throws STOPPED where the supervisor does not run */
  readonly requireRunning: (tried: string) => void
  /** A generation was made, and nobody is served by it yet. */
  readonly note: (generation: GenerationInfo) => void
  /**
   * Pool and workers follow to the generation that is in use now. `isBad`: nobody is to have a child of the one before any more; else
   * the parked ones of it are given until there are others.
   */
  readonly follow: (isBad: boolean) => Promise<void>
  readonly info: (message: string) => void
  readonly warn: (kind: string, message: string, cause?: unknown) => void
}

export class Changes extends EventEmitter<ChangeEvents> {
  readonly #settings: ChangesSettings
  readonly #queue = new PQueue({ concurrency: 1 })
  readonly #canary: Canary
  readonly #driver: ReforkDriver | undefined
  #decision: ReforkDecision | undefined
  #lastRefork: LastRefork | undefined
  /** Of the generation in use: since when, and how many forks were made of it. */
  #inUse = { sinceMs: performance.now(), forks: 0 }
  #reforking: { readonly from: Child | undefined; readonly done: Promise<GenerationInfo> } | undefined

  constructor(settings: ChangesSettings) {
    super()
    this.#settings = settings
    this.#canary = new Canary(settings.options.canary)
    const { succession } = settings
    this.#watch(succession.source!.generation)
    this.#driver = this.#openDriver()
  }

  /** What the policy decided last. */
  get decision(): ReforkDecision | undefined {
    return this.#decision
  }

  /** The one that was made last, or came to nothing. */
  get lastRefork(): LastRefork | undefined {
    return this.#lastRefork
  }

  /** A second call for the same child, or for any, joins one that is under way. */
  refork({ from, reason = 'asked for' }: ReforkOptions): Promise<GenerationInfo> {
    if (this.#settings.engine.name === 'spawn') {
      const happened = 'the spawn engine starts each fork cold, and cannot copy a process'
      throw new WarmforkError('ENGINE_UNSUPPORTED', { tried: 'refork', happened })
    }
    if (this.#reforking && (from === undefined || from === this.#reforking.from)) return this.#reforking.done
    const done = this.#change('refork', () => this.#refork(from, reason))
    const reforking = { from, done }
    this.#reforking = reforking
    const over = () => {
      if (this.#reforking === reforking) this.#reforking = undefined
    }
    done.then(over, over)
    return done
  }

  /** The one in use is never chosen again. */
  rollback({ to, reason = 'asked for' }: RollbackOptions): Promise<GenerationInfo> {
    const { succession, warn } = this.#settings
    return this.#change('roll back', async () => {
      const from = succession.number
      const { number } = await succession.earlier(to)
      if (number === from) return succession.source!.generation
      const left = await succession.between(number, from)
      const generation = await this.#switchTo(number, true)
      // Those between came of it, or led to it: a later start must not begin with one of them.
      for (const one of left) await succession.reject(one, reason)
      warn('rollback', `generation ${from} is not used any more, and generation ${number} is again: ${reason}`)
      this.emit('rollback', number, from, reason)
      return generation
    })
  }

  pin(number: number): Promise<GenerationInfo> {
    const { succession } = this.#settings
    return this.#change('pin a generation', async () => {
      await succession.earlier(number)
      const generation = number === succession.number ? succession.source!.generation : await this.#switchTo(number)
      await succession.pin(number)
      return generation
    })
  }

  unpin(): Promise<void> {
    const { succession } = this.#settings
    return this.#change('unpin the generation', async () => {
      if (succession.pinned === undefined) return
      await succession.pin(undefined)
      const newest = await succession.newest()
      if (newest && newest.number !== succession.number) await this.#switchTo(newest.number)
    })
  }

  /** A child was forked, of whatever generation. */
  forked(child: Child): void {
    const { succession, warn, signal } = this.#settings
    if (child.generation === succession.number) this.#inUse.forks++
    this.#driver?.watch(child)
    if (!this.#canary.forked(child.generation)) return
    void child.exit.then((status) => {
      if (signal.aborted || !isCrash(status)) return
      const { generation } = child
      const reason = this.#canary.crashed(generation)
      if (reason === undefined || generation !== succession.number) return
      this.rollback({ reason }).catch((error) =>
        warn('rollback', `generation ${generation} is bad (${reason}), and stays in use: ${error}`, error),
      )
    })
  }

  /** No more is decided; what is under way ends by the signal. */
  async close(): Promise<void> {
    this.#driver?.close()
    await this.#queue.onIdle()
  }

  /** What was asked for and has not begun when the supervisor stops is refused. */
  #change<T>(tried: string, work: () => Promise<T>): Promise<T> {
    const { requireRunning, signal } = this.#settings
    return this.#queue.add(async () => {
      requireRunning(tried)
      try {
        return await work()
      } catch (error) {
        if (signal.aborted) requireRunning(tried)
        throw error
      }
    }) as Promise<T>
  }

  async #refork(from: Child | undefined, reason: string): Promise<GenerationInfo> {
    const { engine, succession, options, signal, children, childOf, resumption, note, info, warn } = this.#settings
    const { memory, descriptors, checkpointTimeoutMs, hookTimeoutMs, template, trial, ready } = options
    let made: GenerationInfo | undefined
    try {
      const refork = await reforkOneOf(candidates(children(), succession.number, from), reason, {
        engine,
        checkpoint: { memory, descriptors, timeoutMs: checkpointTimeoutMs },
        hookTimeoutMs,
        restTimeoutMs: template.restTimeoutMs,
        signal,
        warn: (message) => warn('refork', message),
      })
      made = refork.generation
      await tryGeneration(made.number, { ...trial, engine, ready, resumption: resumption(), signal, childOf })
      await succession.approve(made.number)
      note(made)
      const { pid, restMs, standstillMs } = refork
      this.#lastRefork = { at: new Date(), reason, pid, generation: made.number }
      const times = `rest ms=${restMs.toFixed(0)} stood still ms=${standstillMs.toFixed(0)}`
      info(`generation=${made.number} from child pid=${pid} (${reason}) ${times}`)
      if (succession.pinned === undefined) {
        await this.#switchTo(made.number)
        this.emit('generation', made)
      }
      this.emit('refork', refork)
      return made
    } catch (error) {
      if (made) {
        // Where it cannot be removed, it is not approved: a later start tries it before it uses it.
        const { number } = made
        await engine
          .discard(number)
          .catch((failure) =>
            warn('prune', `generation ${number}, which is bad, could not be removed: ${failure}`, failure),
          )
      }
      if (!signal.aborted) {
        warn('refork', `generation ${succession.number} serves on, since a refork failed: ${error}`, error)
        const child = from && { pid: from.pid }
        this.#lastRefork = { at: new Date(), reason, ...child, error: error as Error }
        this.emit('reforkFailed', error as Error)
      }
      throw error
    }
  }

  async #switchTo(number: number, isBad = false): Promise<GenerationInfo> {
    const { succession, follow, info } = this.#settings
    const generation = await succession.switchTo(number)
    this.#watch(generation)
    info(`generation=${number} is in use`)
    await follow(isBad)
    succession.prune()
    return generation
  }

  #watch({ number, reforks }: GenerationInfo): void {
    this.#inUse = { sinceMs: performance.now(), forks: 0 }
    this.#canary.watch(reforks > 0 ? number : 0)
  }

  /** Undefined where no refork is made but those that are asked for. */
  #openDriver(): ReforkDriver | undefined {
    const { engine, succession, options, requireRunning, children, warn } = this.#settings
    if (options.refork === false) return undefined
    if (engine.name === 'spawn') {
      warn('refork', 'no refork is made, since the spawn engine starts each fork cold')
      return undefined
    }
    return new ReforkDriver({
      policy: new ReforkPolicy(options.refork),
      children,
      generation: () => ({
        ...this.#inUse,
        number: succession.number,
        reforks: succession.source!.generation.reforks,
      }),
      whyNot: () => {
        try {
          requireRunning('refork')
        } catch {
          return 'the supervisor does not run'
        }
        if (succession.pinned !== undefined) return `generation ${succession.pinned} is pinned`
        return this.#queue.pending > 0 ? 'a change of the generation is under way' : undefined
      },
      refork: (from, reason) => this.refork({ from, reason }),
      onDecision: (decision) => this.#noteDecision(decision),
      warn: (message, cause) => warn('refork', message, cause),
    })
  }

  #noteDecision(decision: ReforkDecision): void {
    // Figures change each time: who wants to see each of them asks for the statistics.
    const kind = ({ from, why }: ReforkDecision) => `${from} ${why.replace(/[\d.]+/g, '')}`
    const isNews = this.#decision === undefined || kind(this.#decision) !== kind(decision)
    this.#decision = decision
    if (!isNews) return
    const { from, why } = decision
    this.#settings.info(from === undefined ? `no refork: ${why}` : `refork of child ${from}: ${why}`)
    this.emit('reforkDecision', decision)
  }
}
