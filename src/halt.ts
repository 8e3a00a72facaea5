/**
 * Brings a running tree of processes to stand still at a moment at which it has nothing in hand, as far as that can be seen from
 * outside. A look at a process that runs says what was; one at a process that stands still says what is. It knows signals and
 * /proc, and nothing of forks.
 */
import { setTimeout as sleep } from 'node:timers/promises'
import { WarmforkError } from './errors.js'
import { descendants, isAlive, stat, threadStates } from './linux/proc.js'
import { whatIsInHand } from './rest.js'

export interface HaltOptions {
  /** Phrase for the error, "checkpoint child 7". */
  readonly tried: string
  readonly timeoutMs: number
  /** Processes whose agents know that they have nothing in hand. */
  readonly except?: ReadonlySet<number>
  readonly signal?: AbortSignal | undefined
}

/** How long processes may take to stand still after SIGSTOP: one in the middle of a read from a disk finishes that first. */
const STOP_MS = 200
/** While they stand still nothing changes by itself: what was sent this long ago is an answer that is complete. */
const QUIET_MS = 5
/** Between two looks the program works on; not always as long, or a client in the same step would be met each time. */
const WORK_MS = 5

export class Halt {
  readonly #stopped: readonly number[]
  #isReleased = false

  private constructor(stopped: readonly number[]) {
    this.#stopped = stopped
  }

  /**
   * Tries until the tree stands still and has nothing in hand.
   * @throws NOT_AT_REST that names what is in hand, CHILD_GONE, or the reason of `signal`
   */
  static async atRest(root: number, options: HaltOptions): Promise<Halt> {
    const { tried, timeoutMs, except, signal } = options
    const until = performance.now() + timeoutMs
    for (;;) {
      signal?.throwIfAborted()
      if (!isAlive(root)) throw new WarmforkError('CHILD_GONE', { tried, happened: `process ${root} has ended` })
      const halt = await Halt.of(root)
      let busy: string | undefined = 'it did not stand still'
      try {
        if (halt) busy = await whatIsInHand(root, { quietMs: QUIET_MS, ...(except ? { except } : {}) })
        if (halt && busy === undefined) return halt
      } catch (error) {
        halt?.release()
        throw error
      }
      halt?.release()
      if (performance.now() > until) {
        const happened = `after ${timeoutMs} ms it is busy yet: ${busy}`
        throw new WarmforkError('NOT_AT_REST', { tried, happened })
      }
      await sleep(WORK_MS * (0.5 + Math.random()), undefined, signal ? { signal } : {})
    }
  }

  /** Stops a tree as it is; undefined where it does not come to stand still. */
  static async of(root: number): Promise<Halt | undefined> {
    const until = performance.now() + STOP_MS
    // A parent before its children, so that no more come; and again, for one that came meanwhile.
    const stopped = new Set<number>()
    for (;;) {
      const tree = [root, ...descendants(root)]
      // What somebody else has stopped stays so.
      const running = tree.filter((pid) => !stopped.has(pid) && !/[TtZX]/.test(stat(pid)?.state ?? 'X'))
      for (const pid of running) if (send(pid, 'SIGSTOP')) stopped.add(pid)
      const still = tree.every((pid) => threadStates(pid).every((state) => /[TtZX]/.test(state)))
      const halt = new Halt([...stopped])
      if (still && running.length === 0) return halt
      if (performance.now() > until) {
        halt.release()
        return undefined
      }
      if (!still) await sleep(1)
    }
  }

  /** Lets it go on. Twice does no harm. */
  release(): void {
    if (this.#isReleased) return
    this.#isReleased = true
    // Children before parents: a shell that waits must not find its child stopped.
    for (const pid of [...this.#stopped].reverse()) send(pid, 'SIGCONT')
  }
}

function send(pid: number, name: NodeJS.Signals): boolean {
  try {
    return process.kill(pid, name)
  } catch {
    return false
  }
}
