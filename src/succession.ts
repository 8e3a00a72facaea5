/**
 * Which generation forks come from, and how one follows the other: switch, rollback, pin, prune. It knows an engine and the verdicts,
 * and nothing of how a generation comes to be, of pools or of children.
 */
import type { Engine, ForkedProcess, ForkOptions, ForkSource, GenerationInfo } from './engines/engine.js'
import { WarmforkError } from './errors.js'
import type { Verdicts } from './generations/verdicts.js'

export interface SuccessionOptions {
  readonly engine: Engine
  /** Undefined for an engine that keeps nothing on a disk. */
  readonly verdicts: Verdicts | undefined
  /** How many generations stay beside the one in use, the newest. */
  readonly keep: number
  readonly warn: (message: string, cause?: unknown) => void
}

interface Opened {
  readonly source: ForkSource
  /** Forks that are being made of it. */
  users: number
  isOver: boolean
}

export class Succession {
  readonly #options: SuccessionOptions
  #current: Opened | undefined
  readonly #closing = new Set<Promise<void>>()
  /** Numbers of those that were in use in this life. */
  readonly #used = new Set<number>()
  #pruning: Promise<void> | undefined
  #pruneAgain = false
  #isClosed = false

  constructor(options: SuccessionOptions) {
    this.#options = options
  }

  /** Where forks come from; undefined before the first switch. */
  get source(): ForkSource | undefined {
    return this.#current?.source
  }

  /** The number of the generation in use; 0 while there is none. */
  get number(): number {
    return this.#current?.source.generation.number ?? 0
  }

  get pinned(): number | undefined {
    return this.#options.verdicts?.pinned
  }

  /** Why a generation is never chosen again; undefined where it may be. */
  whyNot(number: number): string | undefined {
    return this.#options.verdicts?.whyNot(number)
  }

  /** From now on forks come from this generation. @throws GENERATION_NOT_FOUND, GENERATION_CORRUPT, GENERATION_MISFIT */
  async switchTo(number: number): Promise<GenerationInfo> {
    const source = await this.#options.engine.open(number)
    const before = this.#current
    this.#current = { source, users: 0, isOver: false }
    this.#used.add(number)
    if (before) {
      before.isOver = true
      if (before.users === 0) this.#close(before)
    }
    return source.generation
  }

  /** @throws what the engine throws; STOPPED where there is nothing to fork from */
  async fork(options: ForkOptions): Promise<ForkedProcess> {
    const current = this.#current
    if (!current) throw new WarmforkError('STOPPED', { tried: 'fork', happened: 'there is no generation in use' })
    current.users++
    try {
      return await current.source.fork(options)
    } finally {
      current.users--
      if (current.isOver && current.users === 0) this.#close(current)
    }
  }

  #close({ source }: Opened): void {
    const closing = source.close().finally(() => this.#closing.delete(closing))
    this.#closing.add(closing)
  }

  /**
   * The generation that a rollback goes to: the given one, else the newest one before the current that was not rejected, and that the
   * current one comes from or that was in use before it. Others in the store can be of another version of the application.
   * @throws GENERATION_NOT_FOUND, GENERATION_MISFIT for one that was rejected
   */
  async earlier(to?: number): Promise<GenerationInfo> {
    const tried = to === undefined ? `roll generation ${this.number} back` : `roll back to generation ${to}`
    const all = await this.#options.engine.list()
    if (to !== undefined) {
      const reason = this.whyNot(to)
      if (reason !== undefined) {
        throw new WarmforkError('GENERATION_MISFIT', { tried, happened: `it was rejected: ${reason}` })
      }
    }
    const related = new Set([...this.#used, ...ancestors(this.number, all)])
    const found = all.findLast(({ number }) =>
      to === undefined
        ? number < this.number && related.has(number) && this.whyNot(number) === undefined
        : number === to,
    )
    if (found) return found
    const happened =
      to === undefined ? 'no earlier generation is there that can be used' : 'there is no generation of that number'
    throw new WarmforkError('GENERATION_NOT_FOUND', { tried, happened })
  }

  /** Numbers of those after one generation and up to another that were not rejected. */
  async between(after: number, upTo: number): Promise<readonly number[]> {
    const all = await this.#options.engine.list()
    return all.flatMap(({ number }) =>
      number > after && number <= upTo && this.whyNot(number) === undefined ? [number] : [],
    )
  }

  /** The newest that was not rejected. */
  async newest(): Promise<GenerationInfo | undefined> {
    return (await this.#options.engine.list()).findLast(({ number }) => this.whyNot(number) === undefined)
  }

  async reject(number: number, reason: string): Promise<void> {
    await this.#options.verdicts?.reject(number, reason)
  }

  /** Whether it passed its trial; one of an engine that keeps nothing needs none. */
  isApproved(number: number): boolean {
    return this.#options.verdicts?.isApproved(number) ?? true
  }

  /** There is no generation in use any more, until the next switch. */
  async leave(): Promise<void> {
    const current = this.#current
    this.#current = undefined
    if (current && !current.isOver) {
      current.isOver = true
      if (current.users === 0) this.#close(current)
    }
    await Promise.all(this.#closing)
  }

  /** It passed its trial. */
  async approve(number: number): Promise<void> {
    await this.#options.verdicts?.approve(number)
  }

  async pin(number: number | undefined): Promise<void> {
    await this.#options.verdicts?.pin(number)
  }

  /** Removes, in the background, the generations that nobody needs any more. */
  prune(): void {
    this.#pruneAgain = true
    this.#pruning ??= this.#prune().finally(() => {
      this.#pruning = undefined
    })
  }

  async #prune(): Promise<void> {
    const { engine, keep, warn } = this.#options
    while (this.#pruneAgain && !this.#isClosed) {
      this.#pruneAgain = false
      try {
        await Promise.all(this.#closing)
        const others = (await engine.list())
          .map(({ number }) => number)
          .filter((number) => number !== this.number && number !== this.pinned)
        const usable = others.filter((number) => this.whyNot(number) === undefined)
        const kept = new Set(keep > 0 ? usable.slice(-keep) : [])
        for (const number of others) if (!kept.has(number)) await engine.discard(number)
      } catch (error) {
        warn(`old generations could not be removed: ${error}`, error)
      }
    }
  }

  async close(): Promise<void> {
    this.#isClosed = true
    await this.#pruning
    if (this.#current && !this.#current.isOver) this.#close(this.#current)
    if (this.#current) this.#current.isOver = true
    await Promise.all(this.#closing)
  }
}

/** The generations that one was made of, one of the other. */
export function ancestors(number: number, all: readonly { number: number; parent: number | null }[]): number[] {
  const found: number[] = []
  const parents = new Map(all.map((one) => [one.number, one.parent]))
  for (let at = parents.get(number); at; at = parents.get(at)) found.push(at)
  return found
}
