/**
 * The parked children: keeps a number of them ready and hands out the oldest. It knows children and how to ask for a new one, not
 * how one is made.
 */
import PQueue from 'p-queue'
import { backoffMs } from './backoff.js'
import type { Child, Resumption } from './child.js'
import { errnoOf, WarmforkError } from './errors.js'

export interface PoolState {
  /** How many are to be parked. */
  readonly size: number
  /** Those that are, oldest first. */
  readonly parked: readonly Child[]
  /** How many are being made. */
  readonly starting: number
}

export interface PoolSettings {
  readonly size: number
  readonly maxParkedMs: number
  readonly refillConcurrency: number
  /** Makes a child that is parked. */
  readonly make: () => Promise<Child>
  readonly warn: (kind: string, message: string, cause?: unknown) => void
}

/** A child that ends this soon after it was parked counts as a refill that failed: making the next at once would go on for ever. */
const SOON_MS = 1_000

export class Pool {
  readonly #settings: PoolSettings
  readonly #queue: PQueue
  #size: number
  /** Oldest first. */
  readonly #parked: Child[] = []
  /** Refills that wait or are under way. */
  #starting = 0
  #failures = 0
  #closed = false
  #retry: NodeJS.Timeout | undefined
  #expiry: NodeJS.Timeout | undefined
  /** Those that were put out and are being ended. */
  readonly #ending = new Set<Promise<unknown>>()
  readonly #replacing = new Set<Child>()

  constructor(settings: PoolSettings) {
    this.#settings = settings
    this.#size = settings.size
    this.#queue = new PQueue({ concurrency: settings.refillConcurrency })
  }

  get state(): PoolState {
    return { size: this.#size, parked: [...this.#parked], starting: this.#starting }
  }

  /**
   * Fills the pool for the first time.
   * @throws the error of the first fork that fails: a supervisor that cannot fork at all should not start
   */
  async fill(): Promise<void> {
    const made = Array.from({ length: this.#size }, () => this.#add())
    const failed = (await Promise.allSettled(made)).find((result) => result.status === 'rejected')
    if (failed) throw failed.reason
  }

  /**
   * Continues the oldest parked child, on a terminal of that size if it has one, and gives it; undefined where there is none. The
   * place is filled again.
   */
  claim(resumption: Resumption = {}, isGood: (child: Child) => boolean = () => true): Child | undefined {
    for (let child = this.#next(isGood); child; child = this.#next(isGood)) {
      // The refill is work for the same two hands: it begins when the claim has been answered.
      setImmediate(() => this.#refill())
      try {
        child.resume(resumption)
        return child
      } catch (error) {
        // It died in this moment. There may be others.
        if (!(error instanceof WarmforkError) || error.code !== 'CHILD_GONE') throw error
        this.#end(child)
      }
    }
    return undefined
  }

  /** Those that are not being replaced come first. */
  #next(isGood: (child: Child) => boolean): Child | undefined {
    const good = this.#parked.filter(isGood)
    const child = good.find((one) => !this.#replacing.has(one)) ?? good[0]
    if (child) this.#remove(child)
    return child
  }

  /**
   * All that are parked are of yesterday, and are replaced.
   * @param atOnce whether they go before their successors are there: they are not to be had any more
   * @returns resolves when none of them is left
   */
  async turnOver(atOnce: boolean): Promise<void> {
    const old = [...this.#parked]
    if (!atOnce) {
      await Promise.all(old.map((child) => this.#replace(child)))
      return
    }
    for (const child of old) if (this.#remove(child)) this.#end(child)
    this.#refill()
  }

  /** From now on so many are kept parked: the oldest of too many are ended, and missing ones are made in the background. */
  resize(size: number): void {
    this.#size = size
    while (this.#parked.length > size) {
      const child = this.#parked[0]!
      this.#remove(child)
      this.#end(child)
    }
    this.#refill()
  }

  /** Ends all parked children, and waits for those under way. */
  async close(): Promise<void> {
    this.#closed = true
    clearTimeout(this.#retry)
    clearTimeout(this.#expiry)
    this.#queue.clear()
    for (const child of this.#parked.splice(0)) this.#end(child)
    await this.#queue.onIdle()
    await Promise.all(this.#ending)
  }

  #refill(): void {
    if (this.#closed || this.#retry) return
    while (this.#parked.length - this.#replacing.size + this.#starting < this.#size) {
      this.#add().catch((error) => this.#failed(error))
    }
  }

  async #add(): Promise<void> {
    this.#starting++
    try {
      const child = await this.#queue.add(async () => (this.#closed ? undefined : this.#settings.make()))
      if (!child) return
      // The pool may have become smaller meanwhile; one that replaces another comes before that one goes.
      const surplus = this.#parked.length - this.#replacing.size >= this.#size
      if (this.#closed || surplus) this.#end(child)
      else this.#park(child)
    } finally {
      this.#starting--
    }
  }

  #park(child: Child): void {
    this.#parked.push(child)
    child.onStrayResume = () => {
      if (!this.#remove(child)) return
      this.#end(child)
      this.#settings.warn('stray-resume', `parked child ${child.pid} was continued by somebody else, and is replaced`)
      this.#refill()
    }
    child.exit.then((status) => {
      if (!this.#remove(child)) return
      const how = status.signal ? `by ${status.signal}` : `with status ${status.code}`
      const error = new WarmforkError('CHILD_GONE', {
        tried: 'keep a child parked',
        happened: `child ${child.pid} ended ${how}`,
      })
      if (Date.now() - child.parkedAt.getTime() < SOON_MS) this.#failed(error)
      else {
        this.#settings.warn('parked-ended', `parked child ${child.pid} ended ${how}, and is replaced`, error)
        this.#refill()
      }
    })
    if (child.state === 'parked') setTimeout(() => this.#settled(child), SOON_MS).unref()
    this.#scheduleExpiry()
  }

  /** A parked child that has lived for a while: forks work. */
  #settled(child: Child): void {
    if (child.state !== 'ended') this.#failures = 0
  }

  #remove(child: Child): boolean {
    this.#replacing.delete(child)
    const at = this.#parked.indexOf(child)
    if (at >= 0) this.#parked.splice(at, 1)
    return at >= 0
  }

  #failed(error: unknown): void {
    if (this.#closed) return
    const delayMs = backoffMs(++this.#failures)
    const reason = error instanceof Error ? error.message : String(errnoOf(error) ?? error)
    this.#settings.warn(
      'refill-failed',
      `the pool could not be refilled and waits ${Math.round(delayMs)} ms: ${reason}`,
      error,
    )
    // A failure during the wait makes it longer.
    clearTimeout(this.#retry)
    this.#retry = setTimeout(() => {
      this.#retry = undefined
      this.#refill()
    }, delayMs).unref()
  }

  #scheduleExpiry(): void {
    clearTimeout(this.#expiry)
    const oldest = this.#parked.find((child) => !this.#replacing.has(child))
    if (!oldest || this.#closed) return
    const inMs = oldest.parkedAt.getTime() + this.#settings.maxParkedMs - Date.now()
    this.#expiry = setTimeout(() => this.#replace(oldest), Math.max(0, inMs)).unref()
  }

  /** Makes another first and then ends the old one, so that the pool does not run empty. */
  async #replace(old: Child): Promise<void> {
    const isParked = this.#parked.includes(old)
    if (isParked) this.#replacing.add(old)
    this.#scheduleExpiry()
    if (!isParked) return
    try {
      await this.#add()
    } catch (error) {
      // The next refill is in its place.
      this.#failed(error)
    }
    if (this.#remove(old)) this.#end(old)
  }

  #end(child: Child): void {
    const ended = child.end({ graceMs: 0 }).finally(() => {
      child.close()
      this.#ending.delete(ended)
    })
    this.#ending.add(ended)
  }
}
