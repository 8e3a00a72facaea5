/**
 * The guard, seen from the supervisor: a tiny process in a session of its own that ends all that the supervisor made
 * once the supervisor goes, also by kill -9. A stop uses the same sweep, so that there is one way to end and it is
 * exercised at each stop. It knows processes and paths, and nothing of forks, engines or pools.
 *
 * A guard that dies is replaced some milliseconds later: only a supervisor that is killed within these has no guard. From
 * the exec on, the next one needs no supervisor any more: what it has to know lies in its pipe before it starts.
 */
import { type ChildProcess, spawn } from 'node:child_process'
import { closeSync, existsSync, writeSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { errnoOf, WarmforkError } from '../errors.js'
import { pipe, setNonblocking } from '../linux/libc.js'
import { stat } from '../linux/proc.js'

const builtGuard = fileURLToPath(new URL('../../native/prebuilt/linux-x64/warmfork-guard', import.meta.url))

/** Where the built guard lies; undefined where it was not built, or on a platform that it does not exist for. */
export function guardPath(): string | undefined {
  if (process.platform !== 'linux' || process.arch !== 'x64') return undefined
  return existsSync(builtGuard) ? builtGuard : undefined
}

/**
 * The variable that marks what a supervisor starts: whoever has it in the environment that it was started with is ended
 * by that supervisor's guard, even if it is tracked by nobody.
 */
export function guardVariable(token: string): string {
  return `WARMFORK_ID_${token}`
}

export interface GuardOptions {
  /** Called when the guard had died and another was started in its place, and told everything anew. */
  onRestart?: () => void
  /** Called once where no guard can be kept alive: from then on a kill -9 of the supervisor leaves processes behind. */
  onLost?: (error: Error) => void
  /** How long `start` and `ping` wait for an answer. @default 5000 */
  answerTimeoutMs?: number
  /** How long `end` waits for the sweep; the guard itself gives up after some 13 s. @default 20000 */
  sweepTimeoutMs?: number
}

export interface SweepResult {
  /** Processes that the guard ended. */
  swept: number
  /** Processes of ours that would not end: in an uninterruptible wait, or not ours to signal. */
  left: number
}

interface Tracked {
  startTicks: number
  kind: 'process' | 'criu' | 'expected'
}

/** A guard that has died this often within `RESTART_WINDOW_MS` is given up. */
const MAX_RESTARTS = 5
const RESTART_WINDOW_MS = 10_000
/** How soon lines that the pipe had no room for are tried again. */
const RETRY_MS = 20
const SAFE_TOKEN = /^[A-Za-z0-9_]{1,200}$/

export class Guard {
  readonly token: string
  readonly #binary: string
  readonly #options: Required<Pick<GuardOptions, 'answerTimeoutMs' | 'sweepTimeoutMs'>> & GuardOptions
  readonly #tracked = new Map<number, Tracked>()
  readonly #spared = new Set<number>()
  readonly #paths = new Map<string, 'f' | 'd' | 'e'>()
  #process: ChildProcess | undefined
  #writeFd: number | undefined
  /** Lines that the pipe had no room for. */
  #unwritten = Buffer.alloc(0)
  #retry: NodeJS.Timeout | undefined
  #answers = ''
  #waiting: Array<{ resolve: (line: string) => void; reject: (error: Error) => void }> = []
  #restarts: number[] = []
  #ending: Promise<SweepResult> | undefined

  private constructor(token: string, binary: string, options: GuardOptions) {
    this.token = token
    this.#binary = binary
    this.#options = { answerTimeoutMs: 5000, sweepTimeoutMs: 20_000, ...options }
  }

  /**
   * Starts a guard and waits until it answers. The token consists of letters, digits and underscores, and names the
   * variable (`guardVariable`) that marks the supervisor's processes.
   *
   * Throws BAD_OPTION, INSTALL_FAILED (not built), TIMEOUT.
   */
  static async start(token: string, options: GuardOptions = {}): Promise<Guard> {
    if (!SAFE_TOKEN.test(token)) {
      throw new WarmforkError('BAD_OPTION', {
        tried: 'start the guard',
        happened: `expected \`token\` to be of letters, digits and underscores, got \`${token}\` (${typeof token})`,
      })
    }
    const binary = guardPath()
    if (binary === undefined) {
      throw new WarmforkError('INSTALL_FAILED', {
        tried: 'start the guard',
        happened: `there is no ${builtGuard}`,
        remedy: 'Run `node scripts/build-native.mjs`, which needs a C compiler.',
      })
    }
    const guard = new Guard(token, binary, options)
    guard.#spawn()
    try {
      await guard.ping()
    } catch (error) {
      guard.#abandon()
      throw error
    }
    return guard
  }

  /** The guard's own process id; undefined between its death and the next one's start, and after `end`. */
  get pid(): number | undefined {
    return this.#process?.pid
  }

  /** From now on the process is ended with the supervisor. `startTicks` (/proc/PID/stat) tells it from a later one of the same id. */
  track(pid: number, startTicks: number): void {
    this.#track(pid, { startTicks, kind: 'process' })
  }

  /** As `track`, for a criu: it is ended before all others, so that it restores nothing more. */
  trackCriu(pid: number, startTicks: number): void {
    this.#track(pid, { startTicks, kind: 'criu' })
  }

  /**
   * A restore may give this id to a process, which starts at `startTicks` or later. Half restored it carries no mark yet, and it goes
   * on without its criu. Take it back by `track` or `forget`.
   */
  expect(pid: number, startTicks: number): void {
    this.#track(pid, { startTicks, kind: 'expected' })
  }

  /** Tracks a process that runs now; false where it is gone. */
  trackRunning(pid: number, kind: 'criu' | 'other' = 'other'): boolean {
    const found = stat(pid)
    if (!found) return false
    this.#track(pid, { startTicks: found.startTicks, kind: kind === 'criu' ? 'criu' : 'process' })
    return true
  }

  /** The process is gone, or is no longer the supervisor's business. */
  forget(pid: number): void {
    if (this.#tracked.delete(pid)) this.#tell(`- ${pid}`)
  }

  /** The process, its session and its descendants outlive the supervisor. */
  spare(pid: number): void {
    this.#tracked.delete(pid)
    this.#spared.add(pid)
    this.#tell(`~ ${pid}`)
  }

  /**
   * Removes a file, a directory with all in it, or one only if it is empty, after all processes have ended, in the order of the calls.
   * Throws BAD_OPTION for a path that is not absolute, or is the root.
   */
  removeAtEnd(path: string, kind: 'file' | 'directory' | 'empty directory' = 'directory'): void {
    const names = path.split('/').filter((name) => name !== '' && name !== '.')
    if (!path.startsWith('/') || names.length === 0 || names.includes('..') || path.includes('\0')) {
      throw new WarmforkError('BAD_OPTION', {
        tried: 'have a path removed at the end',
        happened: `expected an absolute path below the root, without \`..\`, got \`${path}\``,
      })
    }
    const letter = kind === 'file' ? 'f' : kind === 'directory' ? 'd' : 'e'
    this.#paths.set(path, letter)
    this.#tell(`${letter} ${escapePath(path)}`)
  }

  /** Takes a `removeAtEnd` back. */
  keep(path: string): void {
    if (this.#paths.delete(path)) this.#tell(`k ${escapePath(path)}`)
  }

  /** Resolves once the guard has read all that it was told before. Throws TIMEOUT. */
  async ping(): Promise<void> {
    if (!this.#process) throw this.#gone('reach the guard')
    const answer = this.#nextAnswer('reach the guard', this.#options.answerTimeoutMs)
    this.#tell('!')
    await answer
  }

  /**
   * The supervisor's stop: the guard ends all that is tracked or marked, removes the paths and ends itself. Resolves
   * when it has; the same promise for each call. Throws TIMEOUT.
   */
  end(): Promise<SweepResult> {
    this.#ending ??= this.#end()
    return this.#ending
  }

  async #end(): Promise<SweepResult> {
    try {
      return await this.#sweep()
    } catch (error) {
      // One that died before or during its sweep leaves its work undone: another does it.
      if (this.#process) throw error
      this.#spawn()
      return await this.#sweep()
    }
  }

  async #sweep(): Promise<SweepResult> {
    const tried = 'end what the supervisor made'
    const child = this.#process
    if (!child) throw this.#gone(tried)
    const closed = new Promise<void>((resolve) => child.once('close', () => resolve()))
    await this.#flush()
    const deadline = Date.now() + this.#options.sweepTimeoutMs
    // Registered before the pipe is closed, so that no answer comes too early. Answers to pings may come first.
    let answer = this.#nextAnswer(tried, this.#options.sweepTimeoutMs)
    this.#closePipe()
    for (;;) {
      const found = /^swept (\d+) left (\d+)$/.exec(await answer)
      if (found) {
        await closed
        return { swept: Number(found[1]), left: Number(found[2]) }
      }
      answer = this.#nextAnswer(tried, deadline - Date.now())
    }
  }

  #track(pid: number, tracked: Tracked): void {
    this.#tracked.set(pid, tracked)
    this.#spared.delete(pid)
    this.#tell(trackLine(pid, tracked))
  }

  #spawn(): void {
    const { read, write } = pipe()
    // A guard that somebody has stopped must not stop the supervisor too.
    setNonblocking(write, true)
    this.#writeFd = write
    this.#unwritten = Buffer.alloc(0)
    // Before it starts, so that there is no moment in which it does not know what the one before it knew.
    for (const line of this.#journal()) this.#tell(line)
    let child: ChildProcess
    try {
      // Its own environment is empty: a supervisor inside another one's child must not mark its guard as that one's.
      child = spawn(this.#binary, [this.token], {
        stdio: [read, 'pipe', 'ignore'],
        detached: true,
        cwd: '/',
        env: {},
      })
    } catch (error) {
      this.#closePipe()
      throw error
    } finally {
      closeSync(read)
    }
    this.#process = child
    this.#answers = ''
    // The guard keeps no supervisor alive that has nothing else to do.
    child.unref()
    const output = child.stdout!
    ;(output as unknown as { unref?: () => void }).unref?.()
    output.setEncoding('utf8').on('data', (text: string) => this.#hear(text))
    output.on('error', () => {})
    child.once('error', (error) => this.#died(child, error))
    child.once('close', () => this.#died(child))
  }

  #journal(): string[] {
    return [
      ...[...this.#tracked].map(([pid, tracked]) => trackLine(pid, tracked)),
      ...[...this.#spared].map((pid) => `~ ${pid}`),
      ...[...this.#paths].map(([path, letter]) => `${letter} ${escapePath(path)}`),
    ]
  }

  #tell(line: string): void {
    if (this.#writeFd === undefined) return
    const data = Buffer.from(`${line}\n`)
    this.#unwritten = this.#unwritten.length === 0 ? data : Buffer.concat([this.#unwritten, data])
    this.#write()
  }

  #write(): void {
    while (this.#unwritten.length > 0 && this.#writeFd !== undefined) {
      try {
        this.#unwritten = this.#unwritten.subarray(writeSync(this.#writeFd, this.#unwritten))
      } catch (error) {
        const errno = errnoOf(error)
        if (errno === 'EINTR') continue
        // EPIPE: it died, which 'close' will tell, and the next one is told everything.
        if (errno !== 'EAGAIN') this.#unwritten = Buffer.alloc(0)
        else this.#retryLater()
        return
      }
    }
  }

  #retryLater(): void {
    this.#retry ??= setTimeout(() => {
      this.#retry = undefined
      this.#write()
    }, RETRY_MS).unref()
  }

  async #flush(): Promise<void> {
    const deadline = Date.now() + this.#options.answerTimeoutMs
    while (this.#unwritten.length > 0 && Date.now() < deadline) {
      await new Promise((resolve) => setTimeout(resolve, RETRY_MS))
      this.#write()
    }
  }

  #closePipe(): void {
    clearTimeout(this.#retry)
    this.#retry = undefined
    if (this.#writeFd !== undefined) closeSync(this.#writeFd)
    this.#writeFd = undefined
  }

  #hear(text: string): void {
    const lines = (this.#answers + text).split('\n')
    this.#answers = lines.pop()!
    for (const line of lines) this.#waiting.shift()?.resolve(line)
  }

  async #nextAnswer(tried: string, timeoutMs: number): Promise<string> {
    // While it is awaited, the answer keeps the program alive.
    let timer: NodeJS.Timeout | undefined
    try {
      return await new Promise<string>((resolve, reject) => {
        const waiting = { resolve, reject }
        this.#waiting.push(waiting)
        timer = setTimeout(() => {
          this.#waiting = this.#waiting.filter((other) => other !== waiting)
          reject(
            new WarmforkError('TIMEOUT', {
              tried,
              happened: `the guard (pid ${this.#process?.pid}) did not answer within ${timeoutMs} ms`,
              remedy: 'See what holds the guard process up; it may have been stopped by a signal.',
            }),
          )
        }, timeoutMs)
      })
    } finally {
      clearTimeout(timer)
    }
  }

  #gone(tried: string, cause?: unknown): WarmforkError {
    return new WarmforkError('TIMEOUT', {
      tried,
      happened: 'the guard process has ended',
      remedy: 'See what ended it (the kernel log tells of memory shortage).',
      cause,
    })
  }

  #died(child: ChildProcess, cause?: Error): void {
    if (this.#process !== child) return
    this.#process = undefined
    this.#closePipe()
    const waiting = this.#waiting
    this.#waiting = []
    for (const { reject } of waiting) reject(this.#gone('reach the guard', cause))
    if (this.#ending) return
    const now = Date.now()
    this.#restarts = [...this.#restarts.filter((time) => now - time < RESTART_WINDOW_MS), now]
    if (this.#restarts.length > MAX_RESTARTS) {
      this.#options.onLost?.(this.#gone('keep a guard running', cause))
      return
    }
    try {
      this.#spawn()
    } catch (error) {
      this.#options.onLost?.(this.#gone('start the guard again', error))
      return
    }
    this.#options.onRestart?.()
  }

  /** After a failed start: no guard, and no sweep. */
  #abandon(): void {
    const child = this.#process
    this.#process = undefined
    child?.kill('SIGKILL')
    this.#closePipe()
  }
}

const LETTERS = { process: '+', criu: 'c', expected: 'x' } as const

function trackLine(pid: number, { startTicks, kind }: Tracked): string {
  return `${LETTERS[kind]} ${pid} ${startTicks}`
}

function escapePath(path: string): string {
  return path.replaceAll('\\', '\\\\').replaceAll('\n', '\\n')
}
