/**
 * The HTTP requests of this thread's servers: how many were answered, which are in hand, and holding back those that come. It knows
 * HTTP/1, HTTPS and HTTP/2 of Node, and nothing of the supervisor, of forks and of other threads.
 */
import async_hooks = require('node:async_hooks')
import net = require('node:net')
import timers = require('node:timers')
import type http = require('node:http')
import type http2 = require('node:http2')

/** Indexes of `counts`, which can be memory that another thread sees. */
const TOTAL = 0
const MS = 1
/** Requests that the program was given. */
const BEGUN = 2
const NUMBERS = 3
/** One that never ends could be left behind by a program that removes all listeners: that many are looked at again. */
const LOOK_AGAIN = 1_024
const MAX_PATH = 200

/** Their own, since tests of programs replace those of the global object. */
const now = performance.now.bind(performance)
const { setTimeout, clearTimeout, setImmediate } = timers

/** Of an answer: the request that it belongs to, and null once that has ended. */
const KEY = Symbol('warmfork.begun')

type Answer = (http.ServerResponse | http2.ServerHttp2Stream) & { [KEY]?: Begun | null }

/**
 * A request in hand. They are in a list, the oldest one first, and are found by their answers: a Map of them costs 1.3 µs a request,
 * this 0.4 µs of the 7 µs that the smallest one takes in Node 24 (150,000 of them on 16 connections, time of the main thread).
 */
interface Begun {
  readonly answer: Answer
  readonly since: number
  readonly request: http.IncomingMessage | http2.IncomingHttpHeaders
  before: Begun | undefined
  after: Begun | undefined
}

/** What a server would have told its listeners. */
interface Held {
  readonly server: net.Server
  readonly parameters: [event: string | symbol, ...rest: unknown[]]
  readonly connection: object | undefined
  /** What ends when the client leaves. */
  readonly channel: net.Socket | http2.ServerHttp2Stream
  readonly context: async_hooks.AsyncResource
}

interface InHand {
  readonly count: number
  readonly oldest: { readonly ageMs: number; readonly what: string } | undefined
}

let first: Begun | undefined
let last: Begun | undefined
let size = 0
const held: Held[] = []
/** Closed by `drop`: their servers are told of no error of theirs. */
const dropped = new WeakSet<object>()
let counts: Float64Array = new Float64Array(NUMBERS)
let lookAgainAt = LOOK_AGAIN
let isHolding = false
let onCounted = () => {}
let onEnd: (() => void) | undefined

/**
 * From now on. The servers of Node tell their listeners of requests by `emit`, which they all have from net.Server: it has one of
 * its own. Channels of diagnostics_channel would not do: they cannot hold back, and there are none for HTTP/2 in Node 20.
 */
function watch(told: () => void, memory?: Float64Array): void {
  onCounted = told
  if (memory) counts = memory
  const { prototype } = net.Server
  // Whoever replaces the one of EventEmitter later (node:domain) is asked too.
  const inherited: net.Server = Object.getPrototypeOf(prototype)
  const emit = function emit(this: net.Server, ...parameters: Held['parameters']): boolean {
    const what = parameters[1] as object | undefined
    switch (parameters[0]) {
      case 'request':
      case 'checkContinue':
      case 'checkExpectation': {
        const answer = parameters[2] as Answer | undefined
        // Those of HTTP/2 are made of a stream, which was seen before.
        if (!isHttp1(what) || typeof answer?.on !== 'function') break
        // It is in hand, and is given from one listener or server to the next.
        if (answer[KEY] !== undefined) break
        if (isHolding) return hold(this, parameters, what.socket, what.socket)
        begin(answer, what)
        break
      }
      case 'upgrade':
      case 'connect': {
        if (!isHolding || !isHttp1(what)) break
        return hold(this, parameters, what.socket, what.socket)
      }
      case 'stream': {
        if (!isHttp2Stream(what)) break
        if (isHolding) return hold(this, parameters, what.session, what)
        begin(what, parameters[2] as http2.IncomingHttpHeaders)
        break
      }
      case 'clientError':
      case 'tlsClientError':
        if (isDropped(parameters[2])) return true
    }
    return Reflect.apply(inherited.emit, this, parameters)
  }
  Object.defineProperty(prototype, 'emit', { value: emit, configurable: true, writable: true })
}

/** A socket, or what TLS is spoken over: before the handshake is done that one is destroyed. */
function isDropped(socket: unknown): boolean {
  const { _parent: parent } = socket as { _parent?: object }
  return dropped.has(socket as object) || (typeof parent === 'object' && dropped.has(parent))
}

function isHttp1(value: object | undefined): value is http.IncomingMessage {
  const major = (value as Partial<http.IncomingMessage> | undefined)?.httpVersionMajor
  return typeof major === 'number' && major < 2
}

function isHttp2Stream(value: object | undefined): value is http2.ServerHttp2Stream {
  return typeof value === 'object' && 'rstCode' in value && 'session' in value
}

function begin(answer: Answer, request: Begun['request']): void {
  counts[BEGUN]!++
  const entry: Begun = { answer, since: now(), request, before: last, after: undefined }
  if (last) last.after = entry
  else first = entry
  last = entry
  size++
  answer[KEY] = entry
  answer.on('close', onClose)
  if (size >= lookAgainAt) {
    lookAgain()
    lookAgainAt = Math.max(LOOK_AGAIN, 2 * size)
  }
}

function onClose(this: Answer): void {
  end(this)
}

function end(answer: Answer): void {
  const entry = answer[KEY]
  if (!entry) return
  answer[KEY] = null
  if (entry.before) entry.before.after = entry.after
  else first = entry.after
  if (entry.after) entry.after.before = entry.before
  else last = entry.before
  size--
  if (isAnswered(answer) && !isEventStream(answer)) {
    counts[TOTAL]!++
    counts[MS]! += now() - entry.since
    onCounted()
  }
  onEnd?.()
}

/** Not where the client has left before. */
function isAnswered(answer: Answer): boolean {
  return 'rstCode' in answer ? answer.rstCode === 0 && answer.headersSent : answer.writableFinished
}

/** One that has begun, whose end nobody can wait for. */
function isEventStream(answer: Answer): boolean {
  if (!answer.headersSent) return false
  if ('rstCode' in answer) return /^text\/event-stream/i.test(String(answer.sentHeaders?.['content-type'] ?? ''))
  // What was given to `writeHead` alone is nowhere but in the head itself.
  const { _header } = answer as unknown as { _header: string | null }
  return _header !== null && /^content-type: *text\/event-stream/im.test(_header)
}

/**
 * Ends those whose end was not told: Node 20 and 22 tell none of an answer that waits behind another one of its connection when that
 * is closed, and a program can remove all listeners of an answer.
 */
function lookAgain(): void {
  for (let entry = first; entry; entry = entry.after) {
    const { answer, request } = entry
    const isGone = !('rstCode' in answer) && (request as http.IncomingMessage).socket?.destroyed
    if (isGone || answer.destroyed || answer.writableFinished) end(answer)
  }
}

/** What is to be waited for. */
function inHand(): InHand {
  lookAgain()
  let count = 0
  let oldest: InHand['oldest']
  for (let entry = first; entry; entry = entry.after) {
    const { answer, since, request } = entry
    if (isEventStream(answer)) continue
    count++
    oldest ??= { ageMs: Math.round(now() - since), what: nameOf(request) }
  }
  return { count, oldest }
}

/** Method and path. What follows the path can be a secret. */
function nameOf(request: Begun['request']): string {
  const { method, url } = request as http.IncomingMessage
  const headers = request as http2.IncomingHttpHeaders
  const path = String(url ?? headers[':path'] ?? '').split('?', 1)[0]!
  return `${method ?? headers[':method']} ${path.slice(0, MAX_PATH)}`
}

/** Resolves when one has ended, and after some time. */
function nextEnd(ms: number): Promise<void> {
  return new Promise((resolve) => {
    const done = () => {
      clearTimeout(timer)
      onEnd = undefined
      resolve()
    }
    const timer = setTimeout(done, ms)
    onEnd = done
  })
}

function hold(
  server: net.Server,
  parameters: Held['parameters'],
  connection: object | undefined,
  channel: Held['channel'],
) {
  // The context of async_hooks is the one that the program's listeners would have had.
  held.push({ server, parameters, connection, channel, context: new async_hooks.AsyncResource('WARMFORK_HELD') })
  // Nobody of the program listens to it yet.
  channel.on('error', ignore)
  return true
}

function ignore(): void {}

/** From now on requests are not given to the program. */
function holdBack(): void {
  isHolding = true
}

/** Connections with a request that is held back. */
function heldConnections(): number {
  return new Set(held.map(({ connection }) => connection)).size
}

/** Gives the program what was held, but for what its client does not wait for any more. */
function letGo(): void {
  isHolding = false
  for (const { server, parameters, channel, context } of held.splice(0)) {
    channel.off('error', ignore)
    if (channel.destroyed) continue
    try {
      context.runInAsyncScope(() => server.emit(parameters[0] as string, ...parameters.slice(1)))
    } catch (error) {
      // As any other error that nobody catches, and the next one is served all the same.
      setImmediate(() => {
        throw error
      })
    }
  }
}

/** In a fork: it has answered nothing and has nothing in hand, and the program never hears of what was held. */
function drop(): void {
  isHolding = false
  for (let entry = first; entry; entry = entry.after) entry.answer[KEY] = null
  first = undefined
  last = undefined
  size = 0
  counts.fill(0, 0, NUMBERS)
  for (const { channel, connection } of held.splice(0)) {
    channel.destroy()
    ;(connection as http2.Http2Session | net.Socket | undefined)?.destroy()
  }
}

/** Its server says nothing of this one's end. */
function quiet(socket: object): void {
  dropped.add(socket)
}

export = {
  watch,
  inHand,
  nextEnd,
  holdBack,
  heldConnections,
  letGo,
  drop,
  quiet,
  total: () => counts[TOTAL]!,
  ms: () => counts[MS]!,
}
