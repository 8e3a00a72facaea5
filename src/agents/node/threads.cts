/**
 * Worker threads stand still while the process is parked: each thread's agent waits on a word of shared memory. It knows threads
 * and nothing of the supervisor.
 */
import workers = require('node:worker_threads')

const CHANNEL = 'warmfork.threads'
/** A thread that is busy for longer is not waited for. */
const STANDSTILL_MS = 1_000
/** A Worker whose own code runs has loaded its agent before, if it has one: its word may be this much later. */
const WORD_MS = 50
/** A word of a thread that has ended can come after the news of its end; of older ones there is none any more. */
const MAX_ENDED = 1_000

/** Words of the memory that a park shares, before one for each thread that stands still. */
const RELEASED = 0
/** The new process id in a fork, 0 where it is the same. */
const PID = 1
const FIRST = 2

type Word =
  /** `thread` was started by another one. */
  | { started: number; by: number }
  /** Its own code runs. */
  | { online: number }
  | { gone: number }
  /** Its agent is there. */
  | { here: number }
  /** All stand still; the memory has a word for each of the threads, in this order. */
  | { park: SharedArrayBuffer; threads: number[] }

interface Thread {
  by: number
  onlineSince: number | undefined
  hasAgent: boolean
}

/** The threads of the main thread's process. */
class Threads {
  readonly #channel = new workers.BroadcastChannel(CHANNEL)
  readonly #threads = new Map<number, Thread>()
  readonly #ended = new Set<number>()
  #words: Int32Array | undefined

  constructor() {
    tellOfWorkers((word) => this.#hear(word))
    this.#channel.onmessage = (event: unknown) => this.#hear((event as { data: Word }).data)
    this.#channel.unref()
  }

  #hear(word: Word): void {
    if ('started' in word) this.#thread(word.started).by = word.by
    else if ('online' in word) this.#thread(word.online).onlineSince = Date.now()
    else if ('here' in word) this.#thread(word.here).hasAgent = true
    else if ('gone' in word) this.#forget(word.gone)
  }

  /** Numbers of threads are given once. Of one that has ended this is nobody's record. */
  #thread(id: number): Thread {
    const thread = this.#threads.get(id) ?? { by: 0, onlineSince: undefined, hasAgent: false }
    if (!this.#ended.has(id)) this.#threads.set(id, thread)
    return thread
  }

  /** With those that it has started, which end with it, and of which it tells no more. */
  #forget(id: number): void {
    this.#threads.delete(id)
    this.#ended.add(id)
    if (this.#ended.size > MAX_ENDED) this.#ended.delete(this.#ended.values().next().value!)
    for (const [other, { by }] of this.#threads) if (by === id) this.#forget(other)
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
  const say = (word: Word) => channel.postMessage(word)
  channel.onmessage = (event: unknown) => {
    const word = (event as { data: Word }).data
    if (!('park' in word)) return
    const words = new Int32Array(word.park)
    const at = word.threads.indexOf(workers.threadId)
    if (at >= 0) Atomics.store(words, FIRST + at, 1)
    while (Atomics.load(words, RELEASED) === 0) Atomics.wait(words, RELEASED, 0)
    const pid = Atomics.load(words, PID)
    if (pid !== 0) becomeFork(pid)
  }
  channel.unref()
  tellOfWorkers(say)
  say({ here: workers.threadId })
  process.once('exit', () => say({ gone: workers.threadId }))
}

export = { Threads, serveThread, isMainThread: workers.isMainThread }
