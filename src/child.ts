/**
 * A child: what a fork gives its user. It wraps the engine's process with streams, an exit promise and figures. It knows
 * no pool and no supervisor.
 */
import { EventEmitter } from 'node:events'
import { closeSync, statSync } from 'node:fs'
import { Socket } from 'node:net'
import { Readable, Writable } from 'node:stream'
import pidusage from 'pidusage'
import { AgentGroup, type ForkInput } from './agents/group.js'
import { payloadOf, payloadValue } from './agents/protocol.js'
import { endTrees } from './ending.js'
import type { ForkedProcess, SourceProcess, SourceTerminal } from './engines/engine.js'
import { WarmforkError } from './errors.js'
import { descendants, isEnding, memoryUse, pipeInode } from './linux/proc.js'
import type { ExitStatus } from './linux/reaper.js'
import { OutputPipe, PIPE_BYTES, takeFromPipe } from './output-pipe.js'
import type { Terminal, TerminalSize } from './terminal.js'

/** A parked child has not run yet, a running one is the user's, an ended one has an exit status. */
export type ChildState = 'parked' | 'running' | 'ended'

/** Memory and CPU of a child with the processes that it has started. */
export interface ChildStats {
  readonly pid: number
  readonly generation: number
  readonly state: ChildState
  /** That it has answered, as far as they are counted. */
  readonly requests: number
  /** Whether anybody counts them. */
  readonly isCounted: boolean
  /** Memory that it has to itself. */
  readonly privateBytes: number
  /** Resident and shared with its siblings, or with others. */
  readonly sharedBytes: number
  /** Its proportional share: private memory, and of the shared as much as falls to it. */
  readonly pssBytes: number
  readonly rssBytes: number
  /** Of one core, since the last call if that was within some seconds, else since its start. */
  readonly cpuPercent: number
  readonly cpuSeconds: number
  /** Since the fork. */
  readonly elapsedMs: number
}

export interface EndOptions {
  /**
   * From SIGTERM to SIGKILL, in milliseconds.
   * @default `template.stopTimeoutMs` of the supervisor
   */
  graceMs?: number
}

export interface ChildEvents {
  /** It was continued and runs. */
  running: []
  /** Its program sent something through its agent: bytes, or a value that JSON can have. */
  message: [data: unknown]
  /** More requests were counted. */
  requests: [total: number]
  /** It is being ended, since its hooks failed. */
  hooksFailed: [error: WarmforkError]
  exit: [status: ExitStatus]
}

/**
 * pidusage remembers a process's last figures, and an open descriptor, by its id and for this long. Short, since an id can be
 * given to another process, and since the package cannot forget a single one.
 */
const CPU_MEMORY_MS = 5_000

/** @internal */
export interface ChildOptions {
  readonly stopTimeoutMs: number
  readonly hookTimeoutMs: number
  /** The process that its generation was taken of. */
  readonly origin: SourceProcess
}

/** What a child is continued with. @internal */
export interface Resumption {
  readonly size?: TerminalSize | undefined
  readonly input?: ForkInput | undefined
  /** Of the program's own request that it answers. */
  readonly call?: number | undefined
}

/** How long a fork whose hooks failed has to end by itself. */
const LAST_WORDS_MS = 500

/** How soon, and how seldom in the end, pipes of an ended child are looked at that others have open. */
const FIRST_LOOK_MS = 50
const LAST_LOOK_MS = 60_000

/**
 * One fork. Its stdout and stderr are pipes: what nobody reads stays in them, and a program that writes more than 64 KiB waits
 * until somebody reads. Read them, call `resume()` on the stream, or fork with descriptors of your own.
 */
export class Child extends EventEmitter<ChildEvents> {
  readonly pid: number
  /** Number of the generation that it was forked from. */
  readonly generation: number
  /** Resolves when it runs; with agents, when its hooks are done. Rejects with CHILD_GONE where it ended before. */
  readonly ready: Promise<void>
  /** How it ended. Never rejects. */
  readonly exit: Promise<ExitStatus>

  readonly #process: ForkedProcess
  readonly #stopTimeoutMs: number
  readonly #hookTimeoutMs: number
  readonly #origin: SourceProcess
  readonly #agents: AgentGroup | undefined
  readonly #counted = { requests: 0, ms: 0 }
  #state: ChildState = 'parked'
  #forkedAt: Date | undefined
  readonly #parkedSince = Date.now()
  #exitStatus: ExitStatus | undefined
  #markReady!: () => void
  #markGone!: (error: WarmforkError) => void
  /** The descriptors that no stream has taken over yet. */
  readonly #fds: [number | undefined, number | undefined, number | undefined]
  /** What was read of them at the end. */
  readonly #left: [never[], Buffer[], Buffer[]] = [[], [], []]
  #stdin: Writable | undefined
  #stdout: Readable | undefined
  #stderr: Readable | undefined
  readonly #lines: { chunks: Buffer[]; ended: boolean; iterator?: AsyncIterator<Buffer> } = { chunks: [], ended: false }
  readonly #hasPipes: boolean
  readonly #terminal: Terminal | undefined
  #look: NodeJS.Timeout | undefined

  /** @internal */
  constructor(process_: ForkedProcess, options: ChildOptions) {
    super()
    this.#origin = options.origin
    this.#process = process_
    this.#hookTimeoutMs = options.hookTimeoutMs
    this.#agents = process_.agents ?? (process_.channels.length > 0 ? AgentGroup.ofFork(process_.channels) : undefined)
    this.#agents?.unref()
    this.#agents?.on('request', (request) => {
      if (request.type === 'message' && request.to === undefined) this.emit('message', payloadValue(request.data))
    })
    this.#agents?.on('requests', () => this.emit('requests', this.requests))
    this.#stopTimeoutMs = options.stopTimeoutMs
    this.pid = process_.pid
    this.generation = process_.generation
    this.#terminal = process_.terminal
    this.#hasPipes = process_.pipes !== undefined || process_.streams !== undefined
    this.#fds = process_.pipes ? [...process_.pipes] : [undefined, undefined, undefined]
    if (process_.streams) {
      this.#stdin = quiet(process_.streams.stdin)
      this.#stdout = process_.streams.stdout
      this.#stderr = process_.streams.stderr
    }
    this.ready = new Promise((resolve, reject) => {
      this.#markReady = resolve
      this.#markGone = reject
    })
    this.ready.catch(() => {})
    this.exit = process_.exited.then((status) => this.#ended(status))
  }

  get state(): ChildState {
    return this.#state
  }

  /** When it was continued; undefined while it is parked. */
  get forkedAt(): Date | undefined {
    return this.#forkedAt
  }

  /** When it was made. */
  get parkedAt(): Date {
    return new Date(this.#parkedSince)
  }

  /** What lives on with it where it is left behind. @internal */
  get sparedPids(): readonly number[] {
    const { namespaceInit } = this.#process
    return namespaceInit === undefined ? [this.pid] : [this.pid, namespaceInit]
  }

  /** The same as `exit`. @internal */
  get exited(): Promise<ExitStatus> {
    return this.exit
  }

  /** Its exit status, once it has ended. */
  get exitStatus(): ExitStatus | undefined {
    return this.#exitStatus
  }

  /**
   * Its standard input. A write after its end is dropped; the write's callback and `error` listeners hear of it, but nothing is thrown.
   * @throws BAD_OPTION where the fork was given descriptors
   */
  get stdin(): Writable {
    this.#requirePipes('stdin')
    if (!this.#stdin) {
      const fd = this.#fds[0]
      this.#fds[0] = undefined
      const socket = fd === undefined ? closedWritable() : new Socket({ fd, readable: false, writable: true })
      this.#stdin = quiet(socket)
      if (this.#state === 'ended') socket.destroy()
    }
    return this.#stdin
  }

  /**
   * Its terminal: what it shows to read, what is typed to write, `resize(columns, rows)`, and `close()` to hang up.
   * @throws BAD_OPTION where its template was not booted on one
   */
  get terminal(): Terminal {
    if (this.#terminal) return this.#terminal
    throw new WarmforkError('BAD_OPTION', {
      tried: `open the terminal of child ${this.pid}`,
      happened: 'its template was not booted on one',
      remedy: 'Start the supervisor with `template: { tty: true }`.',
    })
  }

  /** Whether it has a terminal. */
  get isTTY(): boolean {
    return this.#terminal !== undefined
  }

  /** Whether it has pipes: neither descriptors of its caller nor a terminal. @internal */
  get hasPipes(): boolean {
    return this.#hasPipes
  }

  /** Its standard output. @throws BAD_OPTION where the fork was given descriptors */
  get stdout(): Readable {
    this.#requirePipes('stdout')
    this.#stdout ??= this.#open(1)
    return this.#stdout
  }

  /** Its standard error. @throws BAD_OPTION where the fork was given descriptors */
  get stderr(): Readable {
    this.#requirePipes('stderr')
    this.#stderr ??= this.#open(2)
    return this.#stderr
  }

  /**
   * The lines of its stdout, without their ends (`\n` or `\r\n`), as UTF-8. Leaving the loop early leaves the rest for a later `lines()`.
   * Use either this or the stream.
   */
  async *lines(): AsyncGenerator<string, void, void> {
    const state = this.#lines
    state.iterator ??= this.stdout.iterator({ destroyOnReturn: false })[Symbol.asyncIterator]()
    for (;;) {
      // Only the last chunk can hold a line end that was not seen before: a long line is not searched again.
      const last = state.chunks.at(-1)
      const end = last?.indexOf(10) ?? -1
      if (last && end >= 0) {
        const line = Buffer.concat([...state.chunks.slice(0, -1), last.subarray(0, end)])
        state.chunks = end + 1 < last.length ? [last.subarray(end + 1)] : []
        yield lineText(line)
      } else if (state.ended) {
        const rest = Buffer.concat(state.chunks)
        state.chunks = []
        if (rest.length > 0) yield lineText(rest)
        return
      } else {
        const next = await state.iterator.next()
        if (next.done) state.ended = true
        else state.chunks.push(next.value)
      }
    }
  }

  /**
   * Sends a signal to it.
   * @param signal default `SIGTERM`
   * @returns false where it has ended
   */
  kill(signal: NodeJS.Signals = 'SIGTERM'): boolean {
    return this.#state !== 'ended' && this.#process.kill(signal)
  }

  /** Ends it and what it has started: SIGTERM, then SIGKILL after the grace time. A parked child is killed at once. */
  async end(options: EndOptions = {}): Promise<ExitStatus> {
    const graceMs = this.#state === 'parked' ? 0 : (options.graceMs ?? this.#stopTimeoutMs)
    if (this.#state !== 'ended') await endTrees([this], graceMs)
    this.#process.endRest?.()
    return this.exit
  }

  /**
   * Memory (from smaps_rollup) and CPU.
   * @throws CHILD_GONE where it has ended
   */
  async stats(): Promise<ChildStats> {
    const pids = [this.pid, ...descendants(this.pid)]
    const memory = { privateBytes: 0, sharedBytes: 0, pssBytes: 0, rssBytes: 0 }
    for (const pid of pids) {
      const use = memoryUse(pid)
      if (!use) continue
      for (const key of Object.keys(memory) as (keyof typeof memory)[]) memory[key] += use[key]
    }
    let cpuPercent = 0
    let cpuMs = 0
    for (const use of await Promise.all(pids.map(cpuUse))) {
      cpuPercent += use?.cpu ?? 0
      cpuMs += use?.ctime ?? 0
    }
    if (this.#state === 'ended') throw this.#gone('measure it')
    const since = this.#forkedAt?.getTime() ?? this.#parkedSince
    return {
      pid: this.pid,
      generation: this.generation,
      state: this.#state,
      requests: this.requests,
      isCounted: this.isCounted,
      ...memory,
      cpuPercent,
      cpuSeconds: cpuMs / 1000,
      elapsedMs: Date.now() - since,
    }
  }

  /**
   * Continues a parked child. A terminal is given its size before: then the program notices (SIGWINCH) before it does anything else.
   * @internal
   * @throws CHILD_GONE where it has ended
   */
  resume({ size, input = {}, call }: Resumption = {}): void {
    if (this.#state === 'ended') throw this.#gone('continue it')
    if (this.#state === 'running') return
    // A signal to a process that has ended but was not reaped yet succeeds: look first. (Not afterwards: it may have done its work
    // by then, and somebody else would do it again.)
    if (process.platform === 'linux' && !this.#process.running && isEnding(this.pid)) throw this.#gone('continue it')
    if (size) this.#terminal?.resize(size.columns, size.rows)
    // The line that its agents wait for is there before they run.
    if (this.#agents) this.#awaitHooks(this.#agents, input, call)
    this.#process.resume()
    this.#run()
  }

  /** Called where somebody else continues it while it is parked. @internal */
  set onStrayResume(listener: () => void) {
    this.#process.onStrayResume = listener
  }

  #run(): void {
    this.#state = 'running'
    this.#forkedAt = new Date()
    if (!this.#agents) this.#markReady()
    this.emit('running')
  }

  #awaitHooks(agents: AgentGroup, input: ForkInput, call: number | undefined): void {
    const timeoutMs = this.#hookTimeoutMs
    const tried = `run the hooks of a fork (child ${this.pid})`
    const late = setTimeout(() => {
      const happened = `they were not done within ${timeoutMs} ms (hookTimeoutMs)`
      this.#hooksFailed(new WarmforkError('HOOK_FAILED', { tried, happened }))
    }, timeoutMs).unref()
    const about = { generation: this.generation, timeoutMs, ...(call === undefined ? {} : { call }) }
    agents.fork(input, about).then(
      () => {
        clearTimeout(late)
        if (this.#state === 'running') this.#markReady()
      },
      (error) => {
        clearTimeout(late)
        this.#hooksFailed(error)
      },
    )
  }

  /** A fork whose hooks failed is neither itself nor its source: it must not run. Its agent ends it, and if not we do. */
  #hooksFailed(error: WarmforkError): void {
    this.#markGone(error)
    this.emit('hooksFailed', error)
    setTimeout(() => {
      if (this.#state !== 'ended') this.end({ graceMs: 0 }).catch(() => {})
    }, LAST_WORDS_MS).unref()
  }

  /** What an engine must know to take a checkpoint of it. @internal */
  source(): SourceProcess {
    return {
      ...this.#origin,
      pid: this.pid,
      generation: this.generation,
      forkedPids: this.#process.pids,
      stdioInodes: [0, 1, 2].map((fd) => pipeInode(this.pid, fd)) as [bigint, bigint, bigint],
      channels: this.#agents?.channels() ?? [],
      ...(this.#terminal ? { terminal: this.#ownTerminal() } : {}),
    }
  }

  /** Its pty, which is not that of its origin. */
  #ownTerminal(): SourceTerminal {
    for (const fd of [0, 1, 2]) {
      const found = statSync(`/proc/${this.pid}/fd/${fd}`, { throwIfNoEntry: false })
      if (found?.isCharacterDevice()) return { rdev: found.rdev, dev: found.dev }
    }
    throw new WarmforkError('CHECKPOINT_FAILED', {
      tried: `checkpoint child ${this.pid}`,
      happened: 'it has its terminal on none of its standard streams any more',
    })
  }

  /** What it is to its agents; undefined where it has none. @internal */
  get agents(): AgentGroup | undefined {
    return this.#agents
  }

  /**
   * Sends bytes, or a value that JSON can have, to the program: `worker.on('message')`.
   * @throws NEEDS_AGENT, CHILD_GONE, BAD_OPTION
   */
  send(data: unknown): void {
    const tried = `send a message to child ${this.pid}`
    if (this.#state === 'ended') throw this.#gone(tried)
    const link = this.#agents?.worker
    if (!link || this.#state === 'parked') {
      throw new WarmforkError('NEEDS_AGENT', { tried, happened: 'its program runs no agent, or has lost it' })
    }
    try {
      link.send({ type: 'message', data: payloadOf(data) })
    } catch (error) {
      throw new WarmforkError('BAD_OPTION', { tried, happened: (error as Error).message })
    }
  }

  /** Requests that it has answered: as its agents count them, and as `countRequests` was told. */
  get requests(): number {
    return this.#counted.requests + (this.#agents?.requests.total ?? 0)
  }

  /** Whether its agents count requests, or `countRequests` was told of some. */
  get isCounted(): boolean {
    return this.#counted.requests > 0 || (this.#agents?.links.some(({ hello }) => hello.counts === true) ?? false)
  }

  /** The sum of the times of its requests, from begin to answer, in milliseconds, as far as they are known. */
  get requestMs(): number {
    return this.#counted.ms + (this.#agents?.requests.ms ?? 0)
  }

  /** Why its program refuses to be checkpointed for others (`noLongerForkSafe`); undefined where it does not. */
  get refuses(): string | undefined {
    return this.#agents?.unsafe
  }

  /**
   * Counts work that no agent counts: jobs, messages, requests of a protocol that it does not know. Reforks go by it.
   * @param count how many more
   * @param ms how long they took together, in milliseconds
   * @throws BAD_OPTION
   */
  countRequests(count = 1, ms = 0): void {
    const isCount = Number.isSafeInteger(count) && count >= 0
    if (!isCount || !(ms >= 0) || ms === Number.POSITIVE_INFINITY) {
      throw new WarmforkError('BAD_OPTION', {
        tried: `count requests of child ${this.pid}`,
        happened: isCount
          ? `expected \`ms\` to be a number from 0 on, got ${ms}`
          : `expected a whole number from 0 on, got ${count}`,
      })
    }
    this.#counted.requests += count
    this.#counted.ms += ms
    if (count > 0) this.emit('requests', this.requests)
  }

  /** Called once the descriptors are closed that nobody has asked for. @internal */
  onReleased?: () => void

  /** Whether it has descriptors open that nobody asked for. @internal */
  get holdsDescriptors(): boolean {
    return this.#fds.some((fd) => fd !== undefined)
  }

  /** Lets go of its streams, for a supervisor that stops and leaves it running. @internal */
  release(): void {
    this.#terminal?.unref()
    for (const stream of [this.#stdin, this.#stdout, this.#stderr]) (stream as Partial<Socket> | undefined)?.unref?.()
  }

  /** Closes what is left of its streams. @internal */
  close(): void {
    clearTimeout(this.#look)
    this.#fds.forEach((fd, i) => {
      if (fd !== undefined) closeSync(fd)
      this.#fds[i] = undefined
    })
    this.#stdin?.destroy()
    this.#stdout?.destroy()
    this.#stderr?.destroy()
    this.#terminal?.close()
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.end()
    this.close()
  }

  #requirePipes(name: string): void {
    if (this.#hasPipes) return
    if (this.#terminal) {
      throw new WarmforkError('BAD_OPTION', {
        tried: `open ${name} of child ${this.pid}`,
        happened: 'it is on a terminal, and has no pipes',
        remedy: 'Use `child.terminal`.',
      })
    }
    throw new WarmforkError('BAD_OPTION', {
      tried: `open ${name} of child ${this.pid}`,
      happened: 'it was forked with descriptors of the caller and has no pipes',
      remedy: "Fork with `stdio: 'pipe'`, or use your own ends of the descriptors.",
    })
  }

  #open(which: 1 | 2): Readable {
    const fd = this.#fds[which]
    this.#fds[which] = undefined
    if (fd === undefined) {
      const left = Readable.from(this.#left[which], { objectMode: false })
      this.#left[which] = []
      return left
    }
    const pipe = new OutputPipe(fd)
    if (this.#left[which].length > 0) pipe.unshift(Buffer.concat(this.#left[which]))
    this.#left[which] = []
    if (this.#state === 'ended') pipe.childEnded()
    return pipe
  }

  #ended(status: ExitStatus): ExitStatus {
    this.#state = 'ended'
    this.#exitStatus = status
    const gone = () => this.#markGone(this.#gone('wait for it to run'))
    if (this.#agents) {
      // What it said of its hooks before it ended says more.
      const agents = this.#agents
      void agents.ended().then(() => {
        gone()
        agents.close()
      })
    } else gone()
    if (this.#fds[0] !== undefined) closeSync(this.#fds[0])
    this.#fds[0] = undefined
    this.#stdin?.destroy()
    this.#terminal?.programEnded()
    this.#takeOver()
    this.emit('exit', status)
    return status
  }

  /**
   * Takes over what is left in its pipes and closes them. Others can have them open yet: the criu that has restored it, for a
   * moment, or what the child has started, for ever. So it looks again, more and more seldom.
   */
  #takeOver(againMs = FIRST_LOOK_MS): void {
    this.#look = undefined
    this.#readLeft(1)
    this.#readLeft(2)
    let isOver = true
    for (const stream of [this.#stdout, this.#stderr]) {
      if (stream instanceof OutputPipe && !stream.childEnded()) isOver = false
    }
    if (!this.holdsDescriptors) this.onReleased?.()
    else isOver = false
    if (isOver) return
    this.#look = setTimeout(() => this.#takeOver(Math.min(2 * againMs, LAST_LOOK_MS)), againMs).unref()
  }

  /**
   * Reads at once what an ended child has left in a pipe that nobody has opened, so that the descriptor can be closed: a loop
   * over many forks that ignores their output must not run out of descriptors. Where others hold the pipe still, it stays open.
   */
  #readLeft(which: 1 | 2): void {
    const fd = this.#fds[which]
    // What somebody goes on to write waits in the pipe until it is read.
    if (fd === undefined || this.#left[which].reduce((sum, { length }) => sum + length, 0) >= PIPE_BYTES) return
    const { chunks, ended } = takeFromPipe(fd)
    this.#left[which].push(...chunks)
    if (!ended) return
    closeSync(fd)
    this.#fds[which] = undefined
  }

  #gone(tried: string): WarmforkError {
    return new WarmforkError('CHILD_GONE', { tried: `${tried} (child ${this.pid})`, happened: 'it has ended' })
  }
}

/** A stream whose `error` nobody has to listen to: a program that ended no longer reads its stdin, which is no reason to crash. */
function quiet(stream: Writable): Writable {
  return stream.on('error', () => {})
}

function closedWritable(): Writable {
  const stream = new Writable({ write: (_chunk, _encoding, done) => done() })
  stream.destroy()
  return stream
}

function lineText(line: Buffer): string {
  return (line.at(-1) === 13 ? line.subarray(0, -1) : line).toString('utf8')
}

/** CPU use by pidusage; undefined where the process is gone. */
async function cpuUse(pid: number): Promise<pidusage.Status | undefined> {
  try {
    return await pidusage(pid, { maxage: CPU_MEMORY_MS })
  } catch {
    return undefined
  }
}
