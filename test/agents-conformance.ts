/**
 * Plays the supervisor's side of docs/agent-protocol.md for one small program that has an agent, and speaks to the program itself by
 * its stdin and stdout. It knows no runtime: each adds a spec in test/fixtures/agents-conformance, with the same program.
 *
 * The program reads commands, one a line with words between spaces, and prints objects, one a line, with an `event`:
 *
 * | command | what it does, and prints |
 * |---|---|
 * | (at start) | registers hooks with these names, each of which prints its name as `event` (`beforeA` …): before the checkpoint `beforeA`, then `beforeB`; after it `afterA`, `afterB`; on fork `forkA`, `forkB`; and a handler of messages. Prints `started` |
 * | `ready` | says that it is ready |
 * | `ping` | `pong` |
 * | `arm HOOK throw\|hang` | the hook of this name throws an error with the message `not now`, or never returns, the next time |
 * | `look [NAME…]` | `look`, with `args`, `cwd`, and `env` (an object of the variables of these names) as base64, `isFork`, `generation`, `pid`, and `data`: the payload, or `{"base64": …}` where it is bytes |
 * | `fork JSON` | asks for a fork with that data, and goes on with its commands meanwhile. Then `forked` with `pid`; in the fork `isFork`; `failed` with `code` where it could not |
 * | `keep` | asks for a checkpoint that stays; then `kept` with `generation`, or `failed` with `code`; in a fork of it `isFork` |
 * | `keepFork JSON` | asks for a fork from it; then `forked` with `pid`, or `failed` |
 * | `drop` | gives it back |
 * | `send JSON` | sends a message to the user of the supervisor |
 * | (a message) | `message`, with `data` as above and `from` |
 * | (the end of a fork) | `childExit` with `pid`, `code` and `signal` |
 * | `reuse FD PATH` | closes that descriptor and opens the file for appending under the same number; `reused` |
 * | `serve` | serves HTTP/1 on a free port of 127.0.0.1; `serving` with `port`. Each request that the program is given prints `request` with `path`, and is answered with `answered`: at once, but `/wait` after the command `answer` |
 * | `answer` | answers the requests to `/wait` |
 * | `unsafe [REASON]` | says that it is no longer fork-safe |
 * | `exit` | ends |
 */
import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdtempSync, rmSync } from 'node:fs'
import { createServer, type Server, type Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import type { FromAgent, Hello, ToAgent } from '../src/agents/protocol.js'
import { LineSplitter } from '../src/lines.js'

/** How long a program may take for an answer. JRuby needs seconds for its start. */
const TIMEOUT_MS = 30_000
/** How long is looked that something does not come. */
export const SILENCE_MS = 250

export interface RuntimeSpec {
  readonly name: string
  /** As the hello has it. */
  readonly runtime: string
  /** Why it cannot be tried here, or undefined. */
  missing(): string | undefined
  readonly command: readonly [string, ...string[]]
  /** What loads the agent. */
  readonly env: Readonly<Record<string, string>>
}

export type ProgramEvent = { event: string } & Record<string, unknown>

/** What has come and was not yet asked for. */
class Inbox<T> {
  readonly #items: T[] = []
  readonly #waiting: ((item: T | undefined) => void)[] = []
  #isOver = false

  constructor(private readonly what: string) {}

  push(item: T): void {
    const waiting = this.#waiting.shift()
    if (waiting) waiting(item)
    else this.#items.push(item)
  }

  end(): void {
    this.#isOver = true
    for (const waiting of this.#waiting.splice(0)) waiting(undefined)
  }

  /** Undefined where there will be none. */
  async next(): Promise<T | undefined> {
    if (this.#items.length > 0 || this.#isOver) return this.#items.shift()
    return new Promise((resolve, reject) => {
      const late = setTimeout(() => {
        this.#waiting.splice(this.#waiting.indexOf(settle), 1)
        reject(new Error(`nothing came from ${this.what} within ${TIMEOUT_MS} ms`))
      }, TIMEOUT_MS)
      const settle = (item: T | undefined) => {
        clearTimeout(late)
        resolve(item)
      }
      this.#waiting.push(settle)
    })
  }

  /** All that comes within some time. */
  async during(ms = SILENCE_MS): Promise<T[]> {
    await new Promise((resolve) => setTimeout(resolve, ms))
    return this.#items.splice(0)
  }
}

/** One connection of an agent, seen from the supervisor. */
export class AgentSide {
  readonly #inbox = new Inbox<FromAgent>('the agent')
  hello!: Hello

  constructor(readonly socket: Socket) {
    const lines = new LineSplitter(8 << 20)
    socket.on('error', () => {})
    socket.on('data', (chunk) => {
      for (const line of lines.push(chunk)) this.#inbox.push(JSON.parse(line.toString('utf8')))
    })
    socket.on('close', () => this.#inbox.end())
  }

  send(message: ToAgent | { type: 'unheardOf'; whatever: unknown }): void {
    this.socket.write(`${JSON.stringify(message)}\n`)
  }

  /** The next message, of whatever type; undefined at the end of the connection. */
  next(): Promise<FromAgent | undefined> {
    return this.#inbox.next()
  }

  async expect<T extends FromAgent['type']>(type: T): Promise<Extract<FromAgent, { type: T }>> {
    const message = await this.#inbox.next()
    if (message?.type !== type) throw new Error(`expected \`${type}\`, got ${JSON.stringify(message)}`)
    return message as Extract<FromAgent, { type: T }>
  }

  silence(ms?: number): Promise<FromAgent[]> {
    return this.#inbox.during(ms)
  }

  /** Asks for a checkpoint. */
  checkpoint(id: number, timeoutMs = 10_000, reason: 'template' | 'fork' | 'refork' = 'template'): void {
    this.send({ type: 'checkpoint', id, reason, timeoutMs })
  }
}

/** A program with its agent, from the start until `end`. */
export class Conformer {
  readonly directory = mkdtempSync(join(tmpdir(), 'warmfork-agent-'))
  readonly #events = new Inbox<ProgramEvent>('the program')
  readonly #agents = new Inbox<AgentSide>('the socket')
  readonly #sockets = new Set<Socket>()
  #server!: Server
  #process!: ChildProcess
  stderr = ''

  private constructor() {}

  static async start(spec: RuntimeSpec, env: Readonly<Record<string, string>> = {}): Promise<Conformer> {
    const conformer = new Conformer()
    const path = join(conformer.directory, 'agents.sock')
    conformer.#server = createServer((socket) => {
      conformer.#sockets.add(socket)
      conformer.#agents.push(new AgentSide(socket))
    })
    conformer.#server.listen(path)
    await once(conformer.#server, 'listening')
    const [program, ...args] = spec.command
    const child = spawn(program, args, {
      cwd: conformer.directory,
      env: { ...process.env, CONFORMANCE_UNSET: 'there', ...env, ...spec.env, WARMFORK_SOCKET: path },
      stdio: ['pipe', 'pipe', 'pipe'],
    })
    conformer.#process = child
    child.once('exit', () => conformer.#agents.end())
    child.stdin!.on('error', () => {})
    child.stderr!.on('data', (chunk) => {
      conformer.stderr += chunk
    })
    const lines = createInterface({ input: child.stdout! })
    lines.on('line', (line) => conformer.#events.push(JSON.parse(line)))
    lines.on('close', () => conformer.#events.end())
    return conformer
  }

  get pid(): number {
    return this.#process.pid!
  }

  get hasEnded(): boolean {
    return this.#process.exitCode !== null || this.#process.signalCode !== null
  }

  /** The next connection, with its hello, and not yet welcomed. */
  async connection(): Promise<AgentSide> {
    const agent = await this.#agents.next()
    if (!agent) throw new Error(`the program ended without a connection, and wrote: ${this.stderr}`)
    agent.hello = await agent.expect('hello')
    return agent
  }

  /** Greets the program, and waits until it is there. */
  async greet(): Promise<AgentSide> {
    const agent = await this.connection()
    agent.send({ type: 'welcome', protocol: 1 })
    await this.expect('started')
    return agent
  }

  say(command: string): void {
    this.#process.stdin!.write(`${command}\n`)
  }

  async expect(event: string): Promise<ProgramEvent> {
    const got = await this.#events.next()
    if (got?.event !== event) {
      throw new Error(`expected the event \`${event}\`, got ${JSON.stringify(got)}; stderr: ${this.stderr}`)
    }
    return got
  }

  async ask(command: string, event: string): Promise<ProgramEvent> {
    this.say(command)
    return this.expect(event)
  }

  /** What the program prints within some time. */
  async silence(ms?: number): Promise<string[]> {
    return (await this.#events.during(ms)).map(({ event }) => event)
  }

  /** Of the program, which ends by itself. */
  async exit(): Promise<{ code: number | null; signal: string | null }> {
    if (this.#process.exitCode === null && this.#process.signalCode === null) {
      await Promise.race([
        once(this.#process, 'exit'),
        new Promise((_, reject) => setTimeout(() => reject(new Error('it does not end')), TIMEOUT_MS).unref()),
      ])
    }
    return { code: this.#process.exitCode, signal: this.#process.signalCode }
  }

  /** The line that makes a fork of it: of the same process, as the one who says it is the same. */
  forked(more: Partial<Extract<ToAgent, { type: 'forked' }>> = {}): Extract<ToAgent, { type: 'forked' }> {
    return {
      type: 'forked',
      id: 1,
      pid: this.pid,
      ppid: process.pid,
      generation: 3,
      threads: {},
      seed: Buffer.alloc(32, 7).toString('base64'),
      timeoutMs: 10_000,
      worker: true,
      ...more,
    }
  }

  async end(): Promise<void> {
    if (this.#process.exitCode === null && this.#process.signalCode === null) {
      this.#process.kill('SIGKILL')
      await once(this.#process, 'exit')
    }
    for (const socket of this.#sockets) socket.destroy()
    const closed = once(this.#server, 'close')
    this.#server.close()
    await closed
    rmSync(this.directory, { recursive: true, force: true })
  }
}
