/**
 * The agent of a Node program: preloaded by `node --require`, or loaded by `warmfork/worker`. It speaks the agent protocol, runs
 * the program's hooks and gives a fork its identity. It has no dependencies, keeps no program alive, and is silent in a process
 * that no supervisor has started.
 */
import events = require('node:events')
import fs = require('node:fs')
import net = require('node:net')
import randomness = require('./randomness.cjs')
import threads = require('./threads.cjs')

const KEY = Symbol.for('warmfork.agent')
const PROTOCOL = 1
const VERSION = '0.1.0'
/** EX_SOFTWARE: what a fork ends with whose hooks failed. */
const FAILED_STATUS = 70

type Text = string | { base64: string }
type Payload = { json: unknown } | { base64: string }
interface Failure {
  hook?: string
  message: string
  stack?: string
  code?: string
}

interface Forked {
  type: 'forked'
  pid: number
  ppid: number
  generation: number
  timeoutMs: number
  worker: boolean
  args?: Text[]
  env?: { set: Record<string, Text>; unset: string[] }
  cwd?: Text
  data?: Payload
  call?: number
}

type Message =
  | { type: 'welcome' }
  | { type: 'goodbye'; reason: string }
  | { type: 'checkpoint'; id: number; timeoutMs: number }
  | { type: 'resumed'; id: number; error?: Failure }
  | Forked
  | { type: 'forkResult'; id: number; pid?: number; generation?: number; error?: Failure }
  | { type: 'keepResult'; id: number; generation?: number; error?: Failure }
  | { type: 'childExit'; pid: number; code: number | null; signal: string | null }
  | { type: 'message'; data: Payload; from?: number | 'parent' }
  | { type: 'error'; message: string }

/** What a fork was given. */
interface ForkPayload {
  readonly data: unknown
  readonly args: readonly (string | Buffer)[] | undefined
  readonly env: Readonly<Record<string, string | Buffer | undefined>> | undefined
  readonly cwd: string | Buffer | undefined
  readonly pid: number
  readonly generation: number
}

/** To a call of the program. */
interface Answer {
  readonly pid?: number
  readonly generation?: number
  readonly error?: Failure
}

type Run = (payload: ForkPayload) => unknown
interface Call {
  readonly kind: 'fork' | 'keep'
  readonly settle: (message: Answer) => void
  readonly run: Run | undefined
}

interface Hook<A extends unknown[]> {
  readonly name: string
  readonly run: (...args: A) => unknown
}

class AgentError extends Error {
  override readonly name = 'WarmforkWorkerError'
  constructor(
    readonly code: string,
    message: string,
  ) {
    super(message)
  }
}

/** The socket, which has to be usable in both ways: with the event loop, and in one blocking read. */
interface Handle {
  readonly fd: number
  setBlocking(on: boolean): number
}

class Agent extends events.EventEmitter {
  readonly before: Hook<[]>[] = []
  readonly after: Hook<[]>[] = []
  readonly onFork: Hook<[ForkPayload]>[] = []
  payload: ForkPayload | undefined
  readonly #threads = new threads.Threads()
  readonly #calls = new Map<number, Call>()
  readonly #children = new Map<number, events.EventEmitter>()
  #sequence = 0
  #socket: net.Socket | undefined
  #identity = ''
  #kept = Buffer.alloc(0)
  #readySaid = false
  #parking = false

  /** Whether a supervisor answers. */
  get connected(): boolean {
    return this.#socket !== undefined
  }

  connect(path: string): void {
    const socket = net.connect(path)
    socket.unref()
    socket.on('error', () => this.#leave())
    socket.on('close', () => this.#leave())
    socket.on('data', (chunk: Buffer) => this.#read(chunk))
    socket.once('connect', () => {
      this.#identity = identityOf(this.#fd)
      this.#say({
        type: 'hello',
        protocol: PROTOCOL,
        agent: `node/${VERSION}`,
        runtime: 'node',
        version: process.versions.node,
        pid: process.pid,
        fd: this.#fd,
      })
      if (this.#readySaid) this.#say({ type: 'ready' })
    })
    this.#socket = socket
  }

  ready(): void {
    this.#readySaid = true
    if (this.#socket && !this.#socket.connecting) this.#say({ type: 'ready' })
  }

  send(data: unknown, to?: number | 'parent'): void {
    if (!this.#socket) throw noSupervisor()
    this.#say({ type: 'message', data: payloadOf(data), ...(to === undefined ? {} : { to }) })
  }

  /** Resolves in this process alone. In the fork `run` is called, and nobody waits any more. */
  fork(
    data: unknown,
    run: Run | undefined,
    generation?: number,
  ): Promise<{ pid: number; generation: number; events: events.EventEmitter }> {
    return new Promise((resolve, reject) => {
      const members = {
        ...(generation === undefined ? {} : { generation }),
        ...(data === undefined ? {} : { data: payloadOf(data) }),
      }
      this.#call('fork', members, run, ({ pid, generation, error }) => {
        if (error || pid === undefined)
          return reject(new AgentError(error?.code ?? 'RESTORE_FAILED', error?.message ?? 'no fork came'))
        const child = new events.EventEmitter()
        this.#children.set(pid, child)
        resolve({ pid, generation: generation!, events: child })
      })
    })
  }

  keep(run: Run | undefined): Promise<number> {
    return new Promise((resolve, reject) => {
      this.#call('keep', {}, run, ({ generation, error }) => {
        if (error || generation === undefined)
          return reject(new AgentError(error?.code ?? 'CHECKPOINT_FAILED', error?.message ?? 'no checkpoint came'))
        resolve(generation)
      })
    })
  }

  drop(generation: number): void {
    if (this.#socket) this.#say({ type: 'drop', generation })
  }

  #call(kind: 'fork' | 'keep', members: object, run: Run | undefined, settle: (message: Answer) => void): void {
    if (!this.#socket) throw noSupervisor()
    const id = ++this.#sequence
    this.#calls.set(id, { kind, settle, run })
    // Somebody waits for the answer.
    this.#socket.ref()
    this.#say({ type: kind, id, ...members })
  }

  #answered(id: number, message: Answer): void {
    const call = this.#calls.get(id)
    this.#calls.delete(id)
    if (this.#calls.size === 0) this.#socket?.unref()
    call?.settle(message)
  }

  get #handle(): Handle {
    return (this.#socket as unknown as { _handle: Handle })._handle
  }

  get #fd(): number {
    return this.#handle?.fd ?? -1
  }

  /** Programs close what they do not know, and the number is given to another file: nothing of ours may go there. */
  #isIntact(): boolean {
    return this.#socket !== undefined && this.#identity !== '' && identityOf(this.#fd) === this.#identity
  }

  #say(message: object): void {
    if (this.#socket?.connecting || this.#isIntact()) this.#socket!.write(`${JSON.stringify(message)}\n`)
    else this.#leave()
  }

  #leave(): void {
    const socket = this.#socket
    if (!socket) return
    this.#socket = undefined
    // A descriptor that is another file's is not ours to close.
    if (
      this.#identity === '' ||
      identityOf((socket as unknown as { _handle: Handle | null })._handle?.fd ?? -1) === this.#identity
    )
      socket.destroy()
    const error = { code: 'NO_SUPERVISOR', message: 'the connection to the supervisor is lost' }
    for (const id of [...this.#calls.keys()]) this.#answered(id, { error })
    this.emit('disconnect')
  }

  #read(chunk: Buffer): void {
    this.#kept = Buffer.concat([this.#kept, chunk])
    this.#obeyKept()
  }

  #obeyKept(): void {
    while (!this.#parking) {
      const line = this.#line()
      if (line === undefined) return
      this.#obey(line)
    }
  }

  #line(): Message | undefined {
    const end = this.#kept.indexOf(10)
    if (end < 0) return undefined
    const text = this.#kept.toString('utf8', 0, end)
    this.#kept = this.#kept.subarray(end + 1)
    try {
      return JSON.parse(text) as Message
    } catch {
      return { type: 'error', message: 'no JSON' }
    }
  }

  #obey(message: Message): void {
    switch (message.type) {
      case 'goodbye':
        this.#leave()
        return
      case 'checkpoint':
        this.#parking = true
        void this.#park(message.id, message.timeoutMs).finally(() => {
          this.#parking = false
          this.#obeyKept()
        })
        return
      case 'forkResult':
      case 'keepResult':
        this.#answered(message.id, message)
        return
      case 'childExit':
        this.#children.get(message.pid)?.emit('exit', message.code, message.signal)
        this.#children.delete(message.pid)
        return
      case 'message': {
        const value = payloadValue(message.data)
        const child = typeof message.from === 'number' ? this.#children.get(message.from) : undefined
        if (child) child.emit('message', value)
        else this.emit('message', value, message.from)
      }
    }
  }

  async #park(id: number, timeoutMs: number): Promise<void> {
    const done: Hook<[]>[] = []
    try {
      await within(timeoutMs, [...this.before].reverse(), (hook) => {
        done.push(hook)
        return hook.run()
      })
    } catch (error) {
      await this.#runAfter()
      this.#say({ type: 'refused', id, error })
      return
    }
    const running = await this.#threads.stop()
    // What was said before has to be out: the next word is the last one.
    await new Promise<void>((resolve) => (this.#socket ? this.#socket.write('', () => resolve()) : resolve()))
    const message = this.#wait({ type: 'parked', id, ...(running.length > 0 ? { threads: running } : {}) })
    if (message?.type === 'forked') {
      await this.#becomeFork(message)
      return
    }
    this.#threads.release(0)
    const error = await this.#runAfter()
    this.#say({ type: 'running', ...(error ? { error } : {}) })
  }

  /** Undefined where the supervisor is gone: then this process goes on as it was. */
  #wait(parked: object): Message | undefined {
    if (!this.#isIntact()) {
      this.#leave()
      return undefined
    }
    const fd = this.#fd
    const handle = this.#handle
    handle.setBlocking(true)
    const others: Message[] = []
    try {
      writeAll(fd, Buffer.from(`${JSON.stringify(parked)}\n`))
      const chunk = Buffer.allocUnsafe(65_536)
      for (;;) {
        for (let line = this.#line(); line; line = this.#line()) {
          if (line.type === 'resumed' || line.type === 'forked') return line
          others.push(line)
        }
        const length = fs.readSync(fd, chunk, 0, chunk.length, null)
        if (length === 0) return undefined
        this.#kept = Buffer.concat([this.#kept, chunk.subarray(0, length)])
      }
    } catch {
      return undefined
    } finally {
      // In a fork it is another connection, under the same number.
      this.#identity = identityOf(fd)
      handle.setBlocking(false)
      for (const message of others) setImmediate(() => this.#obey(message))
    }
  }

  /** A fork of a kept checkpoint was asked for after that: the image knows only that the checkpoint was asked for. */
  #openKeep(): Call | undefined {
    return [...this.#calls.values()].find(({ kind }) => kind === 'keep')
  }

  async #becomeFork(forked: Forked): Promise<void> {
    const { pid, timeoutMs, call } = forked
    Object.defineProperty(process, 'pid', { value: pid, configurable: true, enumerable: true })
    randomness.renew()
    const run = call === undefined ? undefined : (this.#calls.get(call) ?? this.#openKeep())?.run
    // They are the source's: nobody in this process hears of them.
    this.#calls.clear()
    this.#children.clear()
    this.#socket?.unref()
    let hook: Hook<[ForkPayload]> | undefined
    try {
      closeConnections(this.#socket)
      // Wall-clock and monotonic time were in step when the process was started; the fork has slept in between.
      Object.defineProperty(performance, 'timeOrigin', {
        value: Date.now() - performance.now(),
        configurable: true,
        enumerable: true,
      })
      const payload = apply(forked)
      this.payload = payload
      this.#threads.release(pid)
      this.emit('fork', payload)
      await within(timeoutMs, [...this.onFork], (each) => {
        hook = each
        return each.run(payload)
      })
      hook = undefined
      this.#say({ type: 'running' })
      if (run) void Promise.resolve(run(payload)).catch(crash)
    } catch (error) {
      if (hook === undefined && (error as Failure).hook === undefined) (error as Failure).message ??= String(error)
      const failure = isFailure(error) ? error : failureOf(error)
      try {
        writeAll(this.#fd, Buffer.from(`${JSON.stringify({ type: 'failed', error: failure })}\n`))
      } catch {
        // Nobody hears it.
      }
      // Without exit handlers: what they remove is the source's.
      ;(process as unknown as { reallyExit(status: number): never }).reallyExit(FAILED_STATUS)
    }
  }

  async #runAfter(): Promise<Failure | undefined> {
    let failure: Failure | undefined
    for (const hook of [...this.after]) {
      try {
        await hook.run()
      } catch (error) {
        failure ??= failureOf(error, hook.name)
      }
    }
    return failure
  }
}

/** Runs hooks one after the other, for at most a time. Rejects with a `Failure` that names the hook. */
async function within<H extends { readonly name: string }>(
  timeoutMs: number,
  hooks: readonly H[],
  run: (hook: H) => unknown,
): Promise<void> {
  const deadline = Date.now() + timeoutMs
  for (const hook of hooks) {
    let timer: NodeJS.Timeout | undefined
    try {
      const result = run(hook)
      if (typeof (result as PromiseLike<unknown> | undefined)?.then !== 'function') continue
      const late = new Promise<never>((_, reject) => {
        timer = setTimeout(
          () => reject(new Error(`it was not done within ${timeoutMs} ms`)),
          Math.max(1, deadline - Date.now()),
        )
      })
      await Promise.race([result, late])
    } catch (error) {
      throw failureOf(error, hook.name)
    } finally {
      clearTimeout(timer)
    }
  }
}

function failureOf(error: unknown, hook?: string): Failure {
  const { message, stack } = error instanceof Error ? error : new Error(String(error))
  return { ...(hook === undefined ? {} : { hook }), message, ...(stack === undefined ? {} : { stack }) }
}

const isFailure = (error: unknown): error is Failure =>
  !(error instanceof Error) && typeof (error as Failure)?.message === 'string'

/** An error of the function that runs in a fork is the fork's own: it ends as by any error that nobody catches. */
function crash(error: unknown): void {
  setImmediate(() => {
    throw error
  })
}

const noSupervisor = () =>
  new AgentError('NO_SUPERVISOR', 'no supervisor of warmfork has started this process, or it is gone')

function identityOf(fd: number): string {
  try {
    const { dev, ino } = fs.fstatSync(fd, { bigint: true })
    return `${dev}:${ino}`
  } catch {
    return ''
  }
}

function writeAll(fd: number, bytes: Buffer): void {
  for (let at = 0; at < bytes.length; ) at += fs.writeSync(fd, bytes, at)
}

/** TCP connections are closed in a fork: the program hears it now, and not at its next request on one that it had kept. */
function closeConnections(own: net.Socket | undefined): void {
  const handles = (process as unknown as { _getActiveHandles(): unknown[] })._getActiveHandles()
  for (const one of handles) {
    if (!(one instanceof net.Socket) || one === own) continue
    const kind = (one as unknown as { _handle: object | null })._handle?.constructor.name
    if (kind === 'TCP') one.destroy()
  }
}

function apply({ pid, generation, args, env, cwd, data }: Forked): ForkPayload {
  if (args) process.argv.splice(2, Number.POSITIVE_INFINITY, ...args.map(stringOf))
  for (const [name, text] of Object.entries(env?.set ?? {})) process.env[name] = stringOf(text)
  for (const name of env?.unset ?? []) delete process.env[name]
  if (cwd !== undefined) changeDirectory(cwd)
  return {
    data: data === undefined ? undefined : payloadValue(data),
    args: args?.map(textOf),
    env: env && {
      ...Object.fromEntries(Object.entries(env.set).map(([name, text]) => [name, textOf(text)])),
      ...Object.fromEntries(env.unset.map((name) => [name, undefined])),
    },
    cwd: cwd === undefined ? undefined : textOf(cwd),
    pid,
    generation,
  }
}

function changeDirectory(cwd: Text): void {
  if (typeof cwd === 'string') {
    process.chdir(cwd)
    return
  }
  // Node takes a string only, and this is none.
  const fd = fs.openSync(Buffer.from(cwd.base64, 'base64'), fs.constants.O_RDONLY | fs.constants.O_DIRECTORY)
  try {
    process.chdir(`/proc/self/fd/${fd}`)
  } finally {
    fs.closeSync(fd)
  }
}

const textOf = (text: Text) => (typeof text === 'string' ? text : Buffer.from(text.base64, 'base64'))
/** process.argv and process.env hold strings: what is no UTF-8 has replacement characters there, and its bytes in the payload. */
const stringOf = (text: Text) => textOf(text).toString()

function payloadOf(data: unknown): Payload {
  if (data instanceof Uint8Array)
    return { base64: Buffer.from(data.buffer, data.byteOffset, data.byteLength).toString('base64') }
  if (JSON.stringify(data) === undefined) throw new TypeError(`a value of type ${typeof data} cannot be sent`)
  return { json: data }
}

const payloadValue = (payload: Payload) => ('json' in payload ? payload.json : Buffer.from(payload.base64, 'base64'))

function load(): Agent | undefined {
  const shared = globalThis as unknown as Record<symbol, Agent | undefined>
  if (shared[KEY]) return shared[KEY]
  const path = process.env.WARMFORK_SOCKET
  if (!threads.isMainThread) {
    if (path === undefined) return undefined
    randomness.stand()
    threads.serveThread()
    return undefined
  }
  const agent = new Agent()
  Object.defineProperty(globalThis, KEY, { value: agent })
  if (path !== undefined) {
    randomness.stand()
    agent.connect(path)
  }
  return agent
}

const agent = load()

export = { agent, AgentError }
