/**
 * The agent of a Node program: preloaded by `node --require`, or loaded by `warmfork/worker`. It speaks the agent protocol, runs
 * the program's hooks and gives a fork its identity. It has no dependencies, keeps no program alive, and is silent in a process
 * that no supervisor has started.
 */
import events = require('node:events')
import fs = require('node:fs')
import net = require('node:net')
import timers = require('node:timers')

import connections = require('./connections.cjs')
import randomness = require('./randomness.cjs')
import requests = require('./requests.cjs')
import rest = require('./rest.cjs')
import threads = require('./threads.cjs')

const KEY = Symbol.for('warmfork.agent')
const PROTOCOL = 1
const VERSION = '0.1.0'
/** EX_SOFTWARE: what a fork ends with whose hooks failed. */
const FAILED_STATUS = 70
const MAX_LINE_TO_SUPERVISOR = 8 << 20
const MAX_LINE_TO_AGENT = 16 << 20
/** Of messages that nobody listens for yet. The oldest go first. */
const MAX_WAITING = 1_000
/** At most one message about requests in this time. */
const COUNT_MS = 100
/** Of a reason to refuse, in characters. */
const MAX_REASON = 1_000

/** Tests of programs replace those of the global object. */
const { setTimeout, clearTimeout } = timers

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
  | { type: 'checkpoint'; id: number; reason: string; timeoutMs: number }
  | { type: 'resumed'; id: number; error?: Failure }
  | Forked
  | { type: 'forkResult'; id: number; pid?: number; generation?: number; error?: Failure }
  | { type: 'keepResult'; id: number; generation?: number; error?: Failure }
  | { type: 'childExit'; pid: number; code: number | null; signal: string | null }
  | { type: 'message'; data: Payload; from?: number | 'parent' }
  | { type: 'error'; message: string }

type Checkpoint = Extract<Message, { type: 'checkpoint' }>

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

interface Exit {
  readonly code: number | null
  readonly signal: string | null
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

/**
 * Messages, and who listens to them. What comes before the first listener is kept for it: who asks for several forks at once has the
 * first one when the last one is there.
 */
class Mailbox<A extends unknown[]> {
  readonly #listeners: ((...message: A) => void)[] = []
  #waiting: A[] | undefined = []

  listen(listener: (...message: A) => void): void {
    this.#listeners.push(listener)
    if (!this.#waiting || this.#listeners.length > 1) return
    queueMicrotask(() => {
      const waiting = this.#waiting ?? []
      this.#waiting = undefined
      for (const message of waiting) this.deliver(...message)
    })
  }

  unlisten(listener: (...message: A) => void): void {
    const at = this.#listeners.lastIndexOf(listener)
    if (at >= 0) this.#listeners.splice(at, 1)
  }

  deliver(...message: A): void {
    if (!this.#waiting) {
      for (const listener of [...this.#listeners]) guarded(() => listener(...message))
      return
    }
    this.#waiting.push(message)
    if (this.#waiting.length > MAX_WAITING) this.#waiting.shift()
  }

  clear(): void {
    if (this.#waiting) this.#waiting.length = 0
  }
}

/** A fork, in the process that asked for it. */
class Offspring {
  readonly inbox = new Mailbox<[data: unknown]>()
  readonly exited: Promise<Exit>
  #settle!: (exit: Exit) => void

  constructor(
    readonly pid: number,
    readonly generation: number,
  ) {
    this.exited = new Promise((resolve) => {
      this.#settle = resolve
    })
  }

  end(exit: Exit): void {
    this.#settle(exit)
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
  readonly inbox = new Mailbox<[data: unknown, from: number | 'parent' | undefined]>()
  payload: ForkPayload | undefined
  #threads: InstanceType<typeof threads.Threads> | undefined
  readonly #calls = new Map<number, Call>()
  readonly #children = new Map<number, Offspring>()
  #sequence = 0
  /** For how many answers and ends the process is kept running. */
  #awaited = 0
  #socket: net.Socket | undefined
  #identity = ''
  /** Of a line whose end has not come. */
  #part: Buffer[] = []
  #partBytes = 0
  /** What has come and is not obeyed yet. */
  readonly #messages: Message[] = []
  #parking = false
  /** Why this process refuses that others are forked from it. */
  #unsafe: string | undefined
  /** Until the next message about requests. */
  #counting: NodeJS.Timeout | undefined

  /** Whether a supervisor answers. */
  get connected(): boolean {
    return this.#socket !== undefined
  }

  connect(path: string): void {
    const onCounted = () => this.#countSoon()
    this.#threads = new threads.Threads(onCounted)
    requests.watch(onCounted)
    const socket = net.connect(path)
    socket.unref()
    socket.on('error', () => this.#leave())
    socket.on('close', () => this.#leave())
    socket.on('data', (chunk: Buffer) => {
      if (this.#take(chunk)) this.#obeyAll()
      else this.#leave()
    })
    this.#socket = socket
    // The descriptor is there already. So this is written first when the connection is, whatever the program says until then.
    const fd = this.#fd
    this.#identity = identityOf(fd)
    const { pid, versions } = process
    const about = { agent: `node/${VERSION}`, runtime: 'node', version: versions.node, pid, fd }
    this.#say({ type: 'hello', protocol: PROTOCOL, ...about, counts: true })
  }

  ready(): void {
    if (this.#socket) this.#say({ type: 'ready' })
  }

  /** Requests that this process has answered. */
  get requests(): number {
    return requests.total() + (this.#threads?.counts.total ?? 0)
  }

  /** For good. */
  refuse(reason?: string): void {
    if (this.#unsafe !== undefined) return
    this.#unsafe = String(reason ?? 'the program has said that it is not fork-safe any more').slice(0, MAX_REASON)
    if (this.#socket) this.#say({ type: 'unsafe', reason: this.#unsafe })
  }

  #countSoon(): void {
    this.#counting ??= setTimeout(() => {
      this.#counting = undefined
      if (!this.#socket) return
      // The supervisor is behind: this is not to wait in memory, and not to keep the program running.
      if (this.#socket.writableLength > 0) this.#countSoon()
      else this.#say({ type: 'requests', total: this.requests, ms: requests.ms() + (this.#threads?.counts.ms ?? 0) })
    }, COUNT_MS).unref()
  }

  /** It has answered nothing, and what was in hand or held back is the source's. */
  #forgetRequests(): void {
    clearTimeout(this.#counting)
    this.#counting = undefined
    this.#threads?.becomeFork()
    dropRequests()
  }

  send(data: unknown, to?: number | 'parent'): void {
    if (!this.#socket) throw noSupervisor()
    this.#sayAtMost({ type: 'message', data: payloadOf(data), ...(to === undefined ? {} : { to }) })
  }

  /** Resolves in this process alone. In the fork `run` is called, and nobody waits any more. */
  fork(data: unknown, run: Run | undefined, generation?: number): Promise<Offspring> {
    return new Promise((resolve, reject) => {
      const members = {
        ...(generation === undefined ? {} : { generation }),
        ...(data === undefined ? {} : { data: payloadOf(data) }),
      }
      this.#call('fork', members, run, ({ pid, generation, error }) => {
        if (error || pid === undefined)
          return reject(new AgentError(error?.code ?? 'RESTORE_FAILED', error?.message ?? 'no fork came'))
        const child = new Offspring(pid, generation!)
        this.#children.set(pid, child)
        resolve(child)
      })
    })
  }

  /** The process is kept running until that fork ends. */
  async exitOf(child: Offspring): Promise<Exit> {
    this.#await(1)
    const exit = await child.exited
    this.#await(-1)
    return exit
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
    this.#await(1)
    try {
      this.#sayAtMost({ type: kind, id, ...members })
    } catch (error) {
      this.#calls.delete(id)
      this.#await(-1)
      throw error
    }
  }

  #answered(id: number, message: Answer): void {
    const call = this.#calls.get(id)
    if (!call) return
    this.#calls.delete(id)
    this.#await(-1)
    call.settle(message)
  }

  #await(more: number): void {
    this.#awaited += more
    if (this.#awaited > 0) this.#socket?.ref()
    else this.#socket?.unref()
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
    this.#write(`${JSON.stringify(message)}\n`)
  }

  /** With data of the program: for a line that is too long the supervisor would close the connection. */
  #sayAtMost(message: object): void {
    const line = `${JSON.stringify(message)}\n`
    const bytes = Buffer.byteLength(line)
    if (bytes > MAX_LINE_TO_SUPERVISOR) {
      const text = `what is to be sent has ${bytes} bytes as a line, and may have ${MAX_LINE_TO_SUPERVISOR}`
      throw new AgentError('BAD_OPTION', text)
    }
    this.#write(line)
  }

  #write(line: string): void {
    if (this.#socket?.connecting || this.#isIntact()) this.#socket!.write(line)
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
    for (const child of this.#children.values()) child.end({ code: null, signal: null })
    this.#children.clear()
    this.emit('disconnect')
  }

  /** @returns false for a line without an end */
  #take(chunk: Buffer): boolean {
    let start = 0
    for (let end = chunk.indexOf(10); end >= 0; end = chunk.indexOf(10, start)) {
      const message = messageOf(Buffer.concat([...this.#part, chunk.subarray(start, end)]))
      if (message) this.#messages.push(message)
      this.#part = []
      this.#partBytes = 0
      start = end + 1
    }
    const rest = chunk.length - start
    // The chunk is not ours to keep.
    if (rest > 0) this.#part.push(Buffer.from(chunk.subarray(start)))
    this.#partBytes += rest
    return this.#partBytes <= MAX_LINE_TO_AGENT
  }

  #obeyAll(): void {
    while (!this.#parking) {
      const message = this.#messages.shift()
      if (!message) return
      guarded(() => this.#obey(message))
    }
  }

  #obey(message: Message): void {
    switch (message.type) {
      case 'goodbye':
        this.#leave()
        return
      case 'checkpoint':
        this.#parking = true
        void this.#park(message).finally(() => {
          this.#parking = false
          this.#obeyAll()
        })
        return
      case 'forkResult':
      case 'keepResult':
        this.#answered(message.id, message)
        return
      case 'childExit':
        this.#children.get(message.pid)?.end({ code: message.code ?? null, signal: message.signal ?? null })
        this.#children.delete(message.pid)
        return
      case 'message': {
        if (!message.data) return
        const value = payloadValue(message.data)
        const child = typeof message.from === 'number' ? this.#children.get(message.from) : undefined
        if (child) child.inbox.deliver(value)
        else this.inbox.deliver(value, message.from)
      }
    }
  }

  async #park({ id, reason, timeoutMs }: Checkpoint): Promise<void> {
    const deadline = Date.now() + timeoutMs
    const isRefork = reason === 'refork'
    const refuse = (code: string, message: string) => this.#say({ type: 'refused', id, error: { code, message } })
    if (isRefork) {
      if (this.#unsafe !== undefined) return refuse('UNSAFE', this.#unsafe)
      // Before the hooks: a request is not to meet a program that has let go of its connections.
      const busy = await rest.untilNoneInHand(this.#threads, timeoutMs, deadline, () => this.#calls.size > 0)
      if (busy !== undefined) return refuse('BUSY', busy)
    }
    try {
      for (const hook of [...this.before].reverse()) {
        const promise = runHook(hook, [], timeoutMs, deadline)
        if (promise) await promise
      }
    } catch (error) {
      await this.#runAfter(timeoutMs)
      if (isRefork) rest.letGo(this.#threads)
      this.#say({ type: 'refused', id, error })
      return
    }
    if (isRefork && this.#unsafe !== undefined) {
      await this.#runAfter(timeoutMs)
      rest.letGo(this.#threads)
      return refuse('UNSAFE', this.#unsafe)
    }
    const running = (await this.#threads?.stop()) ?? []
    // What was said before has to be out: the next word is the last one.
    while (this.#socket && this.#socket.writableLength > 0) {
      await new Promise<void>((resolve) => this.#socket!.write('', () => resolve()))
    }
    const held = requests.heldConnections() + (this.#threads?.heldConnections ?? 0)
    const message = this.#wait({
      type: 'parked',
      id,
      ...(running.length > 0 ? { threads: running } : {}),
      ...(held > 0 ? { held } : {}),
    })
    if (message?.type === 'forked') {
      await this.#becomeFork(message)
      return
    }
    const error = await this.#runAfter(timeoutMs)
    if (isRefork) rest.letGo(this.#threads)
    if (message) this.#say({ type: 'running', ...(error ? { error } : {}) })
    else this.#leave()
  }

  /** The line that says who this is; undefined where the supervisor is gone. */
  #wait(parked: object): Message | undefined {
    if (!this.#isIntact()) return undefined
    const source = this.#identity
    const fd = this.#fd
    const handle = this.#handle
    handle.setBlocking(true)
    try {
      writeAll(fd, Buffer.from(`${JSON.stringify(parked)}\n`))
      const chunk = Buffer.allocUnsafe(65_536)
      for (;;) {
        const at = this.#messages.findIndex(({ type }) => type === 'resumed' || type === 'forked')
        if (at >= 0) return this.#messages.splice(at, 1)[0]
        const length = readSome(handle, chunk)
        const identity = identityOf(fd)
        if (identity !== this.#identity) {
          // A fork: another connection, under the same number. What came before is the source's.
          this.#identity = identity
          this.#messages.length = 0
          this.#part = []
          this.#partBytes = 0
        }
        if (length > 0 && this.#take(chunk.subarray(0, length))) continue
        // A fork that nobody tells who it is must not go on as its source.
        if (isOther(identity, source)) exitNow()
        return undefined
      }
    } catch {
      return undefined
    } finally {
      handle.setBlocking(false)
    }
  }

  /** A fork of a kept checkpoint was asked for after that: the image knows only that the checkpoint was asked for. */
  #openKeep(): Call | undefined {
    return [...this.#calls.values()].find(({ kind }) => kind === 'keep')
  }

  async #becomeFork(forked: Forked): Promise<void> {
    const { pid, timeoutMs, call } = forked
    renew(pid)
    const main = call === undefined ? undefined : (this.#calls.get(call) ?? this.#openKeep())?.run
    // They are the source's: nobody in this process hears of them.
    this.#calls.clear()
    this.#children.clear()
    this.inbox.clear()
    this.#await(-this.#awaited)
    try {
      this.#forgetRequests()
      const payload = apply(forked)
      this.payload = payload
      const deadline = Date.now() + timeoutMs
      for (const hook of [...this.onFork]) {
        const promise = runHook(hook, [payload], timeoutMs, deadline)
        if (!promise) continue
        // Other code runs from here on, and the hook may wait for a Worker.
        this.#threads?.release(pid)
        await promise
      }
      this.#threads?.release(pid)
      this.#say({ type: 'running' })
      if (main) Promise.resolve(payload).then(main).catch(crash)
    } catch (error) {
      const failure = error instanceof Error ? failureOf(error) : error
      try {
        writeAll(this.#fd, Buffer.from(`${JSON.stringify({ type: 'failed', error: failure })}\n`))
      } catch {
        // Nobody hears it.
      }
      exitNow()
    }
  }

  /** @returns of the first hook that failed */
  async #runAfter(timeoutMs: number): Promise<Failure | undefined> {
    const deadline = Date.now() + timeoutMs
    let failure: Failure | undefined
    for (const hook of [...this.after]) {
      try {
        const promise = runHook(hook, [], timeoutMs, deadline)
        if (!promise) continue
        this.#threads?.release(0)
        await promise
      } catch (error) {
        failure ??= error as Failure
      }
    }
    this.#threads?.release(0)
    return failure
  }
}

/** In a fork, of the thread that calls it. */
function dropRequests(): void {
  for (const socket of connections.destroyAll()) requests.quiet(socket)
  requests.drop()
}

/** Who a thread is in a fork. */
function renew(pid: number): void {
  Object.defineProperty(process, 'pid', { value: pid, configurable: true, enumerable: true })
  randomness.renew()
  // Wall-clock and monotonic time were in step when the process was started; the fork has slept in between.
  const value = Date.now() - performance.now()
  Object.defineProperty(performance, 'timeOrigin', { value, configurable: true, enumerable: true })
}

/**
 * Runs a hook until the deadline. So that nothing else runs between hooks that wait for nothing, there is a promise only where the hook
 * gave one. Throws and rejects with a `Failure` that names the hook.
 */
function runHook<A extends unknown[]>(
  hook: Hook<A>,
  parameters: A,
  timeoutMs: number,
  deadline: number,
): Promise<void> | undefined {
  try {
    const result = hook.run(...parameters)
    if (typeof (result as PromiseLike<unknown> | undefined)?.then !== 'function') return undefined
    let timer: NodeJS.Timeout | undefined
    const late = new Promise<never>((_, reject) => {
      const error = new Error(`it was not done within ${timeoutMs} ms`)
      timer = setTimeout(() => reject(error), Math.max(1, deadline - Date.now()))
    })
    return Promise.race([result, late]).then(
      () => clearTimeout(timer),
      (error) => {
        clearTimeout(timer)
        throw failureOf(error, hook.name)
      },
    )
  } catch (error) {
    throw failureOf(error, hook.name)
  }
}

function failureOf(error: unknown, hook?: string): Failure {
  const { message, stack } = error instanceof Error ? error : new Error(String(error))
  return { ...(hook === undefined ? {} : { hook }), message, ...(stack === undefined ? {} : { stack }) }
}

/** Without exit handlers: what they remove is the source's. */
function exitNow(): never {
  return (process as unknown as { reallyExit(status: number): never }).reallyExit(FAILED_STATUS)
}

/** What the program's code throws is as any other error that nobody catches, and keeps no message from being heard. */
function guarded(code: () => void): void {
  try {
    code()
  } catch (error) {
    crash(error)
  }
}

/** An error of the function that runs in a fork is the fork's own: it ends as by any error that nobody catches. */
function crash(error: unknown): void {
  setImmediate(() => {
    throw error
  })
}

/** Undefined for what is none. */
function messageOf(line: Buffer): Message | undefined {
  try {
    const value = JSON.parse(line.toString()) as Message | null
    return typeof value?.type === 'string' ? value : undefined
  } catch {
    return undefined
  }
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

/** Of two sockets. Their file system is one, and anything else was put there by the program itself. */
const isOther = (identity: string, than: string) => identity !== than && identity.split(':')[0] === than.split(':')[0]

function writeAll(fd: number, bytes: Buffer): void {
  for (let at = 0; at < bytes.length; ) at += fs.writeSync(fd, bytes, at)
}

/** Waits for bytes; 0 at the end of the connection. */
function readSome(handle: Handle, into: Buffer): number {
  for (;;) {
    try {
      return fs.readSync(handle.fd, into)
    } catch (error) {
      const { code } = error as NodeJS.ErrnoException
      // libuv does not repeat a read that a signal has interrupted; and who shares the connection can have made it non-blocking.
      if (code === 'EAGAIN') handle.setBlocking(true)
      else if (code !== 'EINTR') throw error
    }
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
    threads.serveThread((pid) => {
      renew(pid)
      dropRequests()
    })
    connections.watch()
    return undefined
  }
  const agent = new Agent()
  Object.defineProperty(globalThis, KEY, { value: agent })
  if (path !== undefined) {
    randomness.stand()
    agent.connect(path)
    connections.watch()
  }
  return agent
}

const agent = load()

export = { agent }
