/**
 * Worker threads stand still while the process is parked: each thread's agent waits on a word of shared memory. So the main thread
 * learns of their requests too, and has them hold back. It knows threads and nothing of the supervisor.
 */
import workers = require('node:worker_threads')

import requests = require('./requests.cjs')

const CHANNEL = 'warmfork.threads'
/** A thread that is busy for longer is not waited for. */
const STANDSTILL_MS = 1_000
/** A Worker whose own code runs has loaded its agent before, if it has one: its word may be this much later. */
const WORD_MS = 50
/** A word of a thread that has ended can come after the news of its end; of older ones there is none any more. */
const MAX_ENDED = 1_000
/** How often a thread says what it has in hand while it is asked. */
const LOOK_MS = 5
/** At most one word of a count in this time. */
const COUNT_MS = 25

/** Words of the memory that a park shares, before one for each thread that stands still. */
const RELEASED = 0
/** The new process id in a fork, 0 where it is the same. */
const PID = 1
const FIRST = 2

/** Numbers that a thread shares as long as it lives. The first three are those of requests.cts. */
const TOTAL = 0
const MS = 1
const BEGUN = 2
/** Requests in hand when it last looked, and the age of the oldest one. */
const IN_HAND = 3
const AGE_MS = 4
/** Connections with a request that is held back. */
const HELD = 5
/** Number of the last question that it has obeyed. */
const ASKED = 6
const NUMBERS = 7

type Word =
  /** `thread` was started by another one. */
  | { started: number; by: number }
  /** Its own code runs. */
  | { online: number }
  | { gone: number }
  /** Its agent is there, and these are its numbers. */
  | { here: number; numbers: SharedArrayBuffer }
  /** Its numbers have changed. */
  | { counted: number }
  /** All are to say what they have in hand from now on, and to hold back what comes where `hold` is true. */
  | { look: number; hold: boolean }
  | { letGo: true }
  /** All stand still; the memory has a word for each of the threads, in this order. */
  | { park: SharedArrayBuffer; threads: number[] }

interface Thread {
  by: number
  onlineSince: number | undefined
  hasAgent: boolean
  numbers: Float64Array | undefined
}

/** The threads of the main thread's process. */
class Threads {
  readonly #channel = new workers.BroadcastChannel(CHANNEL)
  readonly #threads = new Map<number, Thread>()
  readonly #ended = new Set<number>()
  readonly #onCounted: () => void
  /** Of threads that have ended. */
  readonly #past = { total: 0, ms: 0 }
  #words: Int32Array | undefined
  #question = 0
  /** What is asked of all threads, of those too that come later. */
  #asked: Word | undefined

  constructor(onCounted: () => void) {
    this.#onCounted = onCounted
    tellOfWorkers((word) => this.#hear(word))
    this.#channel.onmessage = (event: unknown) => this.#hear((event as { data: Word }).data)
    this.#channel.unref()
  }

  #hear(word: Word): void {
    if ('started' in word) this.#thread(word.started).by = word.by
    else if ('online' in word) this.#thread(word.online).onlineSince = Date.now()
    else if ('here' in word) {
      const thread = this.#thread(word.here)
      thread.hasAgent = true
      thread.numbers = new Float64Array(word.numbers)
      if (this.#asked) this.#channel.postMessage(this.#asked)
    } else if ('counted' in word) this.#onCounted()
    else if ('gone' in word) this.#forget(word.gone)
  }

  /** Numbers of threads are given once. Of one that has ended this is nobody's record. */
  #thread(id: number): Thread {
    const thread = this.#threads.get(id) ?? { by: 0, onlineSince: undefined, hasAgent: false, numbers: undefined }
    if (!this.#ended.has(id)) this.#threads.set(id, thread)
    return thread
  }

  /** With those that it has started, which end with it, and of which it tells no more. */
  #forget(id: number): void {
    const numbers = this.#threads.get(id)?.numbers
    if (numbers && numbers[TOTAL]! > 0) {
      this.#past.total += numbers[TOTAL]!
      this.#past.ms += numbers[MS]!
      this.#onCounted()
    }
    this.#threads.delete(id)
    this.#ended.add(id)
    if (this.#ended.size > MAX_ENDED) this.#ended.delete(this.#ended.values().next().value!)
    for (const [other, { by }] of this.#threads) if (by === id) this.#forget(other)
  }

  get #numbers(): Float64Array[] {
    return [...this.#threads.values()].flatMap(({ numbers }) => numbers ?? [])
  }

  /** Requests that Workers have answered, and the sum of their times. */
  get counts(): { readonly total: number; readonly ms: number } {
    let { total, ms } = this.#past
    for (const numbers of this.#numbers) {
      total += numbers[TOTAL]!
      ms += numbers[MS]!
    }
    return { total, ms }
  }

  get heldConnections(): number {
    return this.#numbers.reduce((sum, numbers) => sum + numbers[HELD]!, 0)
  }

  /** Has them say what they have in hand, until `letGo`. */
  look(hold: boolean): void {
    this.#question++
    this.#asked = { look: this.#question, hold }
    if (this.#threads.size > 0) this.#channel.postMessage(this.#asked)
  }

  /** As they say. One that has not heard the question has something in hand, where it has served requests. */
  inHand(): { count: number; oldest: { ageMs: number; what: string } | undefined } {
    let count = 0
    let oldest: { ageMs: number; what: string } | undefined
    for (const [id, { numbers }] of this.#threads) {
      if (!numbers) continue
      const hasHeard = numbers[ASKED] === this.#question
      const own = hasHeard ? numbers[IN_HAND]! : Math.sign(numbers[BEGUN]!)
      const ageMs = hasHeard ? Math.round(numbers[AGE_MS]!) : 0
      count += own
      if (own > 0 && ageMs >= (oldest?.ageMs ?? 0)) oldest = { ageMs, what: `in Worker ${id}` }
    }
    return { count, oldest }
  }

  letGo(): void {
    this.#asked = undefined
    if (this.#threads.size > 0) this.#channel.postMessage({ letGo: true } satisfies Word)
  }

  /** In a fork, while they stand still: it has answered nothing. */
  becomeFork(): void {
    this.#asked = undefined
    this.#past.total = 0
    this.#past.ms = 0
    for (const numbers of this.#numbers) numbers.fill(0)
  }

  /** @returns names of those that do not stand still */
  async stop(): Promise<string[]> {
    if (this.#threads.size === 0) return []
    const deadline = Date.now() + STANDSTILL_MS
    const until = async (isSo: () => boolean) => {
      while (!isSo() && Date.now() < deadline) await turn()
    }
    // One that is being started has no agent yet, and would not know that it is in a fork.
    const isKnown = ({ hasAgent, onlineSince }: Thread) =>
      hasAgent || (onlineSince !== undefined && Date.now() - onlineSince > WORD_MS)
    await until(() => [...this.#threads.values()].every(isKnown))
    const threads = [...this.#threads].filter(([, { hasAgent }]) => hasAgent).map(([id]) => id)
    const words = new Int32Array(new SharedArrayBuffer((FIRST + threads.length) * 4))
    this.#words = words
    this.#channel.postMessage({ park: words.buffer as SharedArrayBuffer, threads } satisfies Word)
    const stands = (id: number) => {
      const at = threads.indexOf(id)
      return at >= 0 && Atomics.load(words, FIRST + at) === 1
    }
    await until(() => threads.every((id) => stands(id) || !this.#threads.has(id)))
    return [...this.#threads]
      .filter(([id]) => !stands(id))
      .map(([id, { hasAgent }]) => `Worker ${id} (${hasAgent ? 'busy' : 'without an agent'})`)
  }

  /** `pid` in a fork: then each gives itself a new identity before it goes on. Does nothing where none stands still. */
  release(pid: number): void {
    const words = this.#words
    if (!words) return
    this.#words = undefined
    Atomics.store(words, PID, pid)
    Atomics.store(words, RELEASED, 1)
    Atomics.notify(words, RELEASED)
  }
}

const turn = () => new Promise((resolve) => setTimeout(resolve, 1))

/** Tells of the Workers that this thread starts. */
function tellOfWorkers(say: (word: Word) => void): void {
  process.on('worker', (worker) => {
    const id = worker.threadId
    // It has ended before this was told.
    if (id < 0) return
    say({ started: id, by: workers.threadId })
    worker.once('online', () => say({ online: id }))
    worker.once('exit', () => say({ gone: id }))
  })
}

/** A Worker's own part. `becomeFork` is called in a fork, before the thread goes on. */
function serveThread(becomeFork: (pid: number) => void): void {
  const channel = new workers.BroadcastChannel(CHANNEL)
  const numbers = new Float64Array(new SharedArrayBuffer(NUMBERS * 8))
  let soon: NodeJS.Timeout | undefined
  let looking: NodeJS.Timeout | undefined
  const say = (word: Word) => channel.postMessage(word)
  const tellCount = () => {
    soon ??= setTimeout(() => {
      soon = undefined
      say({ counted: workers.threadId })
    }, COUNT_MS).unref()
  }
  const look = () => {
    const { count, oldest } = requests.inHand()
    numbers[IN_HAND] = count
    numbers[AGE_MS] = oldest?.ageMs ?? 0
    numbers[HELD] = requests.heldConnections()
  }
  const lookNoMore = () => {
    clearInterval(looking)
    looking = undefined
  }
  channel.onmessage = (event: unknown) => {
    const word = (event as { data: Word }).data
    if ('look' in word) {
      if (word.hold) requests.holdBack()
      look()
      numbers[ASKED] = word.look
      looking ??= setInterval(look, LOOK_MS).unref()
    } else if ('letGo' in word) {
      lookNoMore()
      requests.letGo()
    } else if ('park' in word) {
      const words = new Int32Array(word.park)
      const at = word.threads.indexOf(workers.threadId)
      // The last look: from here on nothing is read.
      if (looking) look()
      if (at >= 0) Atomics.store(words, FIRST + at, 1)
      while (Atomics.load(words, RELEASED) === 0) Atomics.wait(words, RELEASED, 0)
      const pid = Atomics.load(words, PID)
      if (pid === 0) return
      lookNoMore()
      clearTimeout(soon)
      soon = undefined
      becomeFork(pid)
    }
  }
  channel.unref()
  requests.watch(tellCount, numbers)
  tellOfWorkers(say)
  say({ here: workers.threadId, numbers: numbers.buffer as SharedArrayBuffer })
  process.once('exit', () => say({ gone: workers.threadId }))
}

export = { Threads, serveThread, isMainThread: workers.isMainThread }
