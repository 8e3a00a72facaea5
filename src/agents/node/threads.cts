/**
 * Worker threads stand still while the process is parked: each thread's agent waits on a word of shared memory. It knows threads
 * and nothing of the supervisor.
 */
import workers = require('node:worker_threads')

import randomness = require('./randomness.cjs')

const CHANNEL = 'warmfork.threads'
/** A thread that is busy for longer is not waited for. */
const STANDSTILL_MS = 1_000

/** Words of the memory that a park shares. */
const STANDING = 0
const RELEASED = 1
/** The new process id in a fork, 0 where it is the same. */
const PID = 2
const WORDS = 3

type Word = { here: number } | { gone: number } | { park: SharedArrayBuffer } | { who: true }

/** The threads of the main thread's process. */
class Threads {
  readonly #channel = new workers.BroadcastChannel(CHANNEL)
  readonly #known = new Set<number>()
  /** Of this thread, that have been started and may not have said anything yet. */
  #started = 0
  #words: Int32Array | undefined

  constructor() {
    process.on('worker', (worker) => {
      this.#started++
      worker.once('exit', () => this.#started--)
    })
    this.#channel.onmessage = (event: unknown) => {
      const word = (event as { data: Word }).data
      if ('here' in word) this.#known.add(word.here)
      else if ('gone' in word) this.#known.delete(word.gone)
    }
    this.#channel.unref()
  }

  /** @returns names of those that do not stand still */
  async stop(): Promise<string[]> {
    const deadline = Date.now() + STANDSTILL_MS
    // One that is being started has no agent yet, and would not know that it is in a fork.
    while (this.#known.size < this.#started && Date.now() < deadline) await turn()
    if (this.#known.size === 0) return this.#started > 0 ? [`${this.#started} Workers without an agent`] : []
    const memory = new SharedArrayBuffer(WORDS * 4)
    const words = new Int32Array(memory)
    this.#words = words
    this.#channel.postMessage({ park: memory } satisfies Word)
    while (Atomics.load(words, STANDING) < this.#known.size && Date.now() < deadline) await turn()
    const missing = this.#known.size - Atomics.load(words, STANDING)
    return missing > 0 ? [`${missing} of ${this.#known.size} Workers`] : []
  }

  /** `pid` in a fork: then each gets new randomness before it goes on. */
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

/** A Worker's own part. */
function serveThread(): void {
  const channel = new workers.BroadcastChannel(CHANNEL)
  const say = (word: Word) => channel.postMessage(word)
  channel.onmessage = (event: unknown) => {
    const word = (event as { data: Word }).data
    if (!('park' in word)) return
    const words = new Int32Array(word.park)
    Atomics.add(words, STANDING, 1)
    while (Atomics.load(words, RELEASED) === 0) Atomics.wait(words, RELEASED, 0)
    const pid = Atomics.load(words, PID)
    if (pid === 0) return
    Object.defineProperty(process, 'pid', { value: pid, configurable: true, enumerable: true })
    randomness.renew()
  }
  channel.unref()
  say({ here: workers.threadId })
  process.once('exit', () => say({ gone: workers.threadId }))
}

export = { Threads, serveThread, isMainThread: workers.isMainThread }
