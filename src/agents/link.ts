/**
 * One connection to one agent, seen from the supervisor: what it says becomes events, what it is to do becomes lines. It holds the
 * agent to the protocol, and knows no supervisor, no engine and no fork.
 */
import { EventEmitter } from 'node:events'
import type { Socket } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import { WarmforkError } from '../errors.js'
import { LineSplitter } from '../lines.js'
import {
  type AgentFailure,
  encodeLine,
  type Forked,
  type FromAgent,
  type Hello,
  MAX_LINE_FROM_AGENT,
  MAX_LINE_TO_AGENT,
  parseLine,
  type ToAgent,
} from './protocol.js'

/** An agent ends its hooks itself when they take too long: this much later one that says nothing is given up. */
const GRACE_MS = 2_000

export interface LinkEvents {
  ready: []
  running: [error: AgentFailure | undefined]
  failed: [error: AgentFailure]
  /** Requests that its process has answered since it became itself, and the sum of their times in milliseconds. */
  requests: [total: number, ms: number]
  /** Its process must never be the one that others are forked from. */
  unsafe: [reason: string]
  request: [request: Extract<FromAgent, { type: 'fork' | 'keep' | 'drop' | 'message' }>]
  /** `reason` where it was closed for what it said. */
  close: [reason: string | undefined]
}

export class AgentLink extends EventEmitter<LinkEvents> {
  readonly #socket: Socket
  readonly #lines = new LineSplitter(MAX_LINE_FROM_AGENT)
  #hello: Hello
  #isReady = false
  #isClosed = false
  #asked:
    | { id: number; settle: (answer: Extract<FromAgent, { type: 'parked' | 'refused' }> | undefined) => void }
    | undefined
  #sequence = 0
  #heldRequests = 0
  #unsafe: string | undefined
  #held: ToAgent[] | undefined

  /**
   * The socket's bytes from after the hello on are this object's, as is the socket. `unsafe`: what the process said of itself
   * before it was copied.
   */
  constructor(socket: Socket, hello: Hello, unsafe?: string) {
    super()
    this.#unsafe = unsafe
    this.#socket = socket
    this.#hello = hello
    socket.on('error', () => {})
    socket.on('data', (chunk) => this.#read(chunk))
    // The agent's end was closed: by the program, or with it.
    socket.once('end', () => this.close())
    socket.once('close', () => this.close())
    // It may have been paused after the hello.
    socket.resume()
  }

  get hello(): Hello {
    return this.#hello
  }

  get pid(): number {
    return this.#hello.pid
  }

  get isReady(): boolean {
    return this.#isReady
  }

  get isClosed(): boolean {
    return this.#isClosed
  }

  /** Connections whose next request it holds back, while it is parked. */
  get heldRequests(): number {
    return this.#heldRequests
  }

  /** Why its process must never be the one that others are forked from; undefined where it may. */
  get unsafe(): string | undefined {
    return this.#unsafe
  }

  /** Id of the checkpoint that it was last asked for. */
  get checkpointId(): number {
    return this.#sequence
  }

  /**
   * While it waits in its read nothing but the line that it waits for is sent: the rest follows it.
   * @throws RangeError for more than an agent takes
   */
  send(message: ToAgent): void {
    if (message.type === 'message') checkLength(message)
    if (this.#held) this.#held.push(message)
    else this.#write(message)
  }

  #write(message: ToAgent): void {
    if (!this.#isClosed) this.#socket.write(encodeLine(message))
  }

  #release(): void {
    const held = this.#held ?? []
    this.#held = undefined
    for (const message of held) this.#write(message)
  }

  /**
   * Runs the hooks before a checkpoint and has the agent wait in its read.
   * @returns names of threads that go on all the same
   * @throws HOOK_FAILED, NOT_AT_REST, REFORK_REFUSED, and AGENT_LOST where it says nothing or is gone
   */
  async park(reason: 'template' | 'fork' | 'refork', timeoutMs: number): Promise<readonly string[]> {
    const tried = `run the hooks before the checkpoint in process ${this.pid} (${this.#hello.runtime})`
    if (this.#isClosed) throw new WarmforkError('AGENT_LOST', { tried, happened: 'its connection is closed' })
    const id = ++this.#sequence
    const answered = new Promise<Extract<FromAgent, { type: 'parked' | 'refused' }> | undefined>((settle) => {
      this.#asked = { id, settle }
    })
    this.send({ type: 'checkpoint', id, reason, timeoutMs })
    this.#held = []
    const over = new AbortController()
    const late = sleep(timeoutMs + GRACE_MS, 'late' as const, { signal: over.signal, ref: false }).catch(
      () => undefined,
    )
    const answer = await Promise.race([answered, late])
    over.abort()
    this.#asked = undefined
    if (answer === 'late') {
      throw new WarmforkError('AGENT_LOST', {
        tried,
        happened: `its agent gave no answer within ${timeoutMs + GRACE_MS} ms: the program may hold its event loop, or all its threads, up`,
      })
    }
    if (answer === undefined) {
      throw new WarmforkError('AGENT_LOST', { tried, happened: 'it has closed the connection' })
    }
    if (answer.type === 'refused') {
      this.#release()
      throw refusal(tried, answer.error)
    }
    this.#heldRequests = answer.held ?? 0
    return answer.threads ?? []
  }

  /** Lets the source go on after a checkpoint; with an error where there was none. */
  resumed(error?: AgentFailure): void {
    this.#heldRequests = 0
    this.#write({ type: 'resumed', id: this.#sequence, ...(error ? { error } : {}) })
    this.#release()
  }

  /** Tells a fork who it is: the first line on its new connection. */
  forked(message: Forked): void {
    this.#write(message)
    this.#release()
  }

  /** Closes the connection; what was sent goes out before. */
  close(reason?: string): void {
    if (this.#isClosed) return
    this.#isClosed = true
    this.#asked?.settle(undefined)
    this.#socket.end()
    this.#socket.destroySoon()
    this.emit('close', reason)
  }

  /** Neither holds the process up when nothing else is left to do. */
  unref(): void {
    this.#socket.unref()
  }

  #read(chunk: Buffer): void {
    if (this.#isClosed) return
    try {
      for (const line of this.#lines.push(chunk)) {
        const message = parseLine(line)
        if (message && !this.#isClosed) this.#obey(message)
      }
    } catch (error) {
      if (!(error instanceof SyntaxError) && !(error instanceof RangeError)) throw error
      this.send({ type: 'error', message: error.message })
      this.close(`it sent what is no message: ${error.message}`)
    }
  }

  #obey(message: FromAgent): void {
    switch (message.type) {
      case 'hello':
        // A program that replaces itself (exec) keeps no connection; this is a second word of the same one.
        this.#hello = message
        return
      case 'ready':
        this.#isReady = true
        this.emit('ready')
        return
      case 'parked':
      case 'refused':
        if (this.#asked?.id === message.id) this.#asked.settle(message)
        return
      case 'running':
        this.emit('running', message.error)
        return
      case 'failed':
        this.emit('failed', message.error)
        return
      case 'requests':
        this.emit('requests', message.total, message.ms)
        return
      case 'unsafe':
        this.#unsafe = message.reason ?? 'it said so'
        this.emit('unsafe', this.#unsafe)
        return
      default:
        this.emit('request', message)
    }
  }
}

function checkLength(message: ToAgent): void {
  const { length } = encodeLine(message)
  if (length <= MAX_LINE_TO_AGENT) return
  throw new RangeError(`a message of ${length} bytes, where an agent takes ${MAX_LINE_TO_AGENT}`)
}

/** What a `refused` says: by its code, or that a hook failed. */
function refusal(tried: string, error: AgentFailure): WarmforkError {
  if (error.code === 'BUSY') return new WarmforkError('NOT_AT_REST', { tried, happened: error.message })
  if (error.code === 'UNSAFE') return new WarmforkError('REFORK_REFUSED', { tried, happened: error.message })
  return hookFailed(tried, error)
}

export function hookFailed(tried: string, { hook, message, stack }: AgentFailure): WarmforkError {
  const where = hook === undefined ? '' : `the hook \`${hook}\` failed: `
  return new WarmforkError('HOOK_FAILED', {
    tried,
    happened: `${where}${message}`,
    ...(stack === undefined ? {} : { output: stack }),
  })
}
