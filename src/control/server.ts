/**
 * The supervisor's side of the control socket: one socket for a name, who may speak, and the way from a line to a handler and back.
 * What the methods do is in handlers.ts. Whatever comes in, garbage too, may end that one connection and nothing else.
 */
import {
  chmodSync,
  closeSync,
  fstatSync,
  lstatSync,
  openSync,
  readFileSync,
  rmdirSync,
  unlinkSync,
  writeSync,
} from 'node:fs'
import { createServer, type Server, type Socket } from 'node:net'
import { dirname, join } from 'node:path'
import { errnoOf, WarmforkError } from '../errors.js'
import { LineSplitter } from '../lines.js'
import type { PeerCredentials } from '../linux/peer.js'
import type { TerminalSize } from '../terminal.js'
import {
  badMessage,
  type Hello,
  isId,
  isObject,
  MAX_LINE_BYTES,
  type MethodName,
  type Methods,
  PARAMS,
  PROTOCOL,
  type ServerMessage,
} from './protocol.js'
import { makeRuntimeDirectory, socketPath } from './runtime-directory.js'

/** A client, as the handlers see it. */
export interface Caller {
  /** Its process; 0 where it cannot be known. */
  readonly pid: number
  /** Aborted when the connection ends. */
  readonly signal: AbortSignal
  /** What its requests share, for as long as the connection lasts. */
  readonly forks: Map<number, ForkOfCaller>
}

/** A `fork` that is under way, for the `signal` requests that concern it. */
export interface ForkOfCaller {
  kill(signal: NodeJS.Signals): boolean
  /** False where it has no terminal. */
  resize(size: TerminalSize): boolean
}

export type Handlers = {
  readonly [M in MethodName]: (
    params: Methods[M]['params'],
    caller: Caller,
    request: { readonly id: number; emit(event: Methods[M]['event']): void },
  ) => Promise<Methods[M]['result']>
}

export interface ControlServerOptions {
  readonly runtimeDirectory: string
  readonly name: string
  readonly hello: Hello
  readonly handlers: Handlers
}

/** How long a client may take for its hello, and for the rest of a line that it has begun. */
const HELLO_TIMEOUT_MS = 10_000
/** More clients than that are not needed: each `warmfork fork` that runs is one. */
const MAX_CONNECTIONS = 1024
/** What a client may leave unread before it is given up: several statuses. */
const MAX_UNREAD_BYTES = 16 * 1024 * 1024

export class ControlServer {
  readonly path: string
  readonly #lock: RuntimeLock
  readonly #server: Server
  readonly #connections = new Set<Connection>()
  #inode: bigint | undefined
  #closing: Promise<void> | undefined

  private constructor(options: ControlServerOptions, lock: RuntimeLock, path: string, peer: PeerReader) {
    this.path = path
    this.#lock = lock
    this.#server = createServer({ allowHalfOpen: true }, (socket) => {
      const connection = new Connection(socket, options, peer)
      this.#connections.add(connection)
      socket.once('close', () => this.#connections.delete(connection))
    })
    this.#server.maxConnections = MAX_CONNECTIONS
  }

  /**
   * Listens at `<runtimeDirectory>/<name>/control.sock`, in the place of what a dead supervisor has left there.
   * @throws STORE_LOCKED where another supervisor of that name runs, STORE_UNSAFE, STORE_UNWRITABLE, BAD_OPTION (path too long)
   */
  static async listen(options: ControlServerOptions): Promise<ControlServer> {
    const path = socketPath(options.runtimeDirectory, options.name)
    const directory = makeRuntimeDirectory(options.runtimeDirectory, options.name)
    const lock = await RuntimeLock.take(directory, options.name)
    try {
      const server = new ControlServer(options, lock, path, await peerReader())
      await server.#listen()
      return server
    } catch (error) {
      lock.release()
      throw error
    }
  }

  async #listen(): Promise<void> {
    const tried = `listen at ${this.path}`
    try {
      unlinkIfThere(this.path)
      await new Promise<void>((resolve, reject) => {
        this.#server.once('error', reject)
        this.#server.listen(this.path, () => {
          this.#server.off('error', reject)
          resolve()
        })
      })
      // Until here the directory's mode has kept others out.
      chmodSync(this.path, 0o600)
      this.#inode = lstatSync(this.path, { bigint: true }).ino
    } catch (cause) {
      this.#server.close()
      throw new WarmforkError('STORE_UNWRITABLE', {
        tried,
        happened: errnoOf(cause) ?? String(cause),
        remedy: 'Make the directory writable, or choose another `--runtime-directory`.',
        cause,
      })
    }
    // A failed accept (no descriptor is free) must not end the supervisor; the client sees its connection refused or waits.
    this.#server.on('error', () => {})
  }

  /** Answers what is still under way, takes the socket away and ends the connections. May be called again. */
  close(): Promise<void> {
    this.#closing ??= this.#close()
    return this.#closing
  }

  async #close(): Promise<void> {
    const closed = new Promise<void>((resolve) => this.#server.close(() => resolve()))
    // Node has removed the socket's file by now if it was the one that it had made; another one is not ours to remove.
    if (lstatSync(this.path, { bigint: true, throwIfNoEntry: false })?.ino === this.#inode) unlinkIfThere(this.path)
    this.#lock.release()
    try {
      rmdirSync(dirname(this.path))
    } catch {
      // The supervisor or its guard keeps something there.
    }
    await Promise.all([...this.#connections].map((connection) => connection.finish()))
    await closed
  }
}

type PeerReader = (fd: number) => PeerCredentials | undefined

/** SO_PEERCRED is Linux's; elsewhere the socket's mode has to do. */
async function peerReader(): Promise<PeerReader> {
  if (process.platform !== 'linux') return () => undefined
  const { peerCredentials } = await import('../linux/peer.js')
  return peerCredentials
}

/** How long `finish` waits for requests that are under way. They end with the supervisor, so this is for what hangs. */
const FINISH_TIMEOUT_MS = 2_000

class Connection {
  readonly #socket: Socket
  readonly #options: ControlServerOptions
  readonly #lines = new LineSplitter(MAX_LINE_BYTES)
  readonly #gone = new AbortController()
  readonly #underWay = new Map<number, Promise<void>>()
  readonly #caller: Caller
  #greeted = false
  #lineTimer: NodeJS.Timeout | undefined

  constructor(socket: Socket, options: ControlServerOptions, readPeer: PeerReader) {
    this.#socket = socket
    this.#options = options
    const peer = credentials(socket, readPeer)
    this.#caller = { pid: peer?.pid ?? 0, signal: this.#gone.signal, forks: new Map() }
    socket.on('error', () => {})
    socket.once('close', () => {
      clearTimeout(this.#lineTimer)
      this.#gone.abort()
    })
    const uid = process.geteuid?.()
    if (peer && peer.uid !== uid && peer.uid !== 0) {
      const happened = `user ${peer.uid} may not speak to a supervisor of user ${uid}`
      this.#reject(badMessage(happened, 'Run the command as that user, or as root.'))
      return
    }
    this.#send({ hello: options.hello })
    this.#startTimer()
    socket.on('data', (chunk) => this.#read(chunk))
    socket.once('end', () => {
      if (this.#lines.pendingBytes > 0) this.#reject(badMessage('the connection ended in the middle of a line'))
      this.#gone.abort()
      void this.finish()
    })
  }

  /** Lets the requests that are under way end, and then the connection. */
  async finish(): Promise<void> {
    const timeout = new Promise<void>((resolve) => setTimeout(resolve, FINISH_TIMEOUT_MS).unref())
    await Promise.race([Promise.all(this.#underWay.values()), timeout])
    await new Promise<void>((resolve) => {
      if (this.#socket.destroyed) resolve()
      this.#socket.once('close', () => resolve())
      this.#socket.end(() => this.#socket.destroySoon())
      setTimeout(() => this.#socket.destroy(), FINISH_TIMEOUT_MS).unref()
    })
  }

  #startTimer(): void {
    this.#lineTimer ??= setTimeout(() => {
      const what = this.#greeted ? 'the rest of a line' : 'a hello'
      this.#reject(badMessage(`the client sent nothing for ${HELLO_TIMEOUT_MS} ms where ${what} was expected`))
    }, HELLO_TIMEOUT_MS).unref()
  }

  #stopTimer(): void {
    clearTimeout(this.#lineTimer)
    this.#lineTimer = undefined
  }

  #read(chunk: Buffer): void {
    let lines: Buffer[]
    try {
      lines = this.#lines.push(chunk)
    } catch (error) {
      this.#reject(badMessage((error as Error).message))
      return
    }
    for (const line of lines) {
      if (this.#socket.destroyed || this.#socket.writableEnded) return
      this.#take(line)
    }
    if (lines.length > 0) this.#stopTimer()
    if (!this.#greeted || this.#lines.pendingBytes > 0) this.#startTimer()
  }

  #take(line: Buffer): void {
    let message: unknown
    try {
      message = JSON.parse(line.toString('utf8'))
    } catch {
      this.#reject(badMessage('a line is no JSON'))
      return
    }
    if (!isObject(message)) {
      this.#reject(badMessage('a line is no object'))
    } else if (!this.#greeted) {
      this.#greet(message)
    } else {
      this.#request(message)
    }
  }

  #greet({ hello }: Record<string, unknown>): void {
    if (!isObject(hello) || typeof hello.protocol !== 'number') {
      this.#reject(badMessage('the first line is no hello'))
      return
    }
    if (hello.protocol !== PROTOCOL) {
      const { version } = this.#options.hello
      const happened = `the client speaks version ${hello.protocol} of the protocol, the supervisor (warmfork ${version}) version ${PROTOCOL}`
      this.#reject(badMessage(happened, `Use warmfork ${version} for both, or start the supervisor anew.`))
      return
    }
    this.#greeted = true
  }

  #request({ id, method, params = {} }: Record<string, unknown>): void {
    if (!isId(id)) {
      this.#reject(badMessage('a request has no id'))
      return
    }
    const read = this.#readRequest(id, method, params)
    if (read instanceof WarmforkError) {
      this.#send({ id, error: read.toJSON() })
      return
    }
    this.#underWay.set(
      id,
      this.#run(id, read.method, read.params).finally(() => this.#underWay.delete(id)),
    )
  }

  #readRequest(id: number, method: unknown, params: unknown): { method: MethodName; params: never } | WarmforkError {
    if (this.#underWay.has(id)) return badMessage(`the id ${id} is that of another request under way`)
    if (typeof method !== 'string' || !Object.hasOwn(PARAMS, method)) {
      const known = Object.keys(PARAMS).join(', ')
      return badMessage(`there is no method ${String(JSON.stringify(method)).slice(0, 60)}; there are ${known}`)
    }
    const read = isObject(params) ? PARAMS[method as MethodName](params) : undefined
    if (!read) return badMessage(`the params of ${method} are not what it takes`)
    return { method: method as MethodName, params: read as never }
  }

  async #run<M extends MethodName>(id: number, method: M, params: Methods[M]['params']): Promise<void> {
    try {
      const emit = (event: Methods[M]['event']) => this.#send({ id, event })
      const result = await this.#options.handlers[method](params, this.#caller, { id, emit })
      this.#send({ id, result })
    } catch (error) {
      this.#send({ id, error: describe(error) })
    }
  }

  #send(message: ServerMessage): void {
    if (this.#socket.destroyed || this.#socket.writableEnded) return
    this.#socket.write(`${JSON.stringify(message)}\n`)
    if (this.#socket.writableLength > MAX_UNREAD_BYTES) this.#socket.destroy()
  }

  /** Says why, and ends the connection. What still comes in is thrown away, so that the client can read the reason. */
  #reject(error: WarmforkError): void {
    this.#stopTimer()
    this.#socket.removeAllListeners('data')
    this.#socket.resume()
    this.#send({ error: error.toJSON() })
    this.#socket.end()
    setTimeout(() => this.#socket.destroy(), FINISH_TIMEOUT_MS).unref()
  }
}

function describe(error: unknown): Record<string, unknown> {
  if (error instanceof WarmforkError) return error.toJSON()
  const message = error instanceof Error ? error.message : String(error)
  return { tried: 'serve a request', happened: message, remedy: 'Look at the log of the supervisor.' }
}

/** Who is at the other end; undefined where the system does not tell. */
function credentials(socket: Socket, read: PeerReader): PeerCredentials | undefined {
  // The descriptor has no public name in Node; without it the socket's mode alone says who may connect.
  const fd = (socket as unknown as { _handle?: { fd?: number } })._handle?.fd
  return fd === undefined || fd < 0 ? undefined : read(fd)
}

/**
 * That there is one supervisor for a name and a runtime directory: a lock on a file beside the socket, which the kernel frees when its
 * holder ends, however it ends. To ask the socket itself would leave a moment in which two supervisors find it dead.
 */
class RuntimeLock {
  private constructor(
    private readonly path: string,
    private fd: number | undefined,
  ) {}

  static async take(directory: string, name: string): Promise<RuntimeLock> {
    const path = join(directory, 'lock')
    if (process.platform !== 'linux') return new RuntimeLock(path, undefined)
    // Loaded here, since it loads on Linux only.
    const { tryLock } = await import('../linux/libc.js')
    for (;;) {
      const fd = openSync(path, 'a+', 0o600)
      if (!tryLock(fd)) {
        const holder = /^\d+/.exec(readFileSync(path, 'latin1'))?.[0]
        closeSync(fd)
        throw new WarmforkError('STORE_LOCKED', {
          tried: `start the supervisor ${name}`,
          happened: `${holder === undefined ? 'another process' : `process ${holder}`} is a running supervisor of that name`,
          remedy: `Stop it with \`warmfork stop --name ${name}\`, or choose another \`--name\`.`,
        })
      }
      // Its last holder may have removed it between our open and our lock: such a lock locks nobody out.
      if (lstatSync(path, { throwIfNoEntry: false })?.ino === fstatSync(fd).ino) {
        writeSync(fd, `${process.pid}\n`)
        return new RuntimeLock(path, fd)
      }
      closeSync(fd)
    }
  }

  release(): void {
    if (this.fd === undefined) return
    if (lstatSync(this.path, { throwIfNoEntry: false })?.ino === fstatSync(this.fd).ino) unlinkIfThere(this.path)
    closeSync(this.fd)
    this.fd = undefined
  }
}

function unlinkIfThere(path: string): void {
  try {
    unlinkSync(path)
  } catch (error) {
    if (errnoOf(error) !== 'ENOENT') throw error
  }
}
