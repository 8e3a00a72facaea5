/**
 * The other side of the control socket: a connection to a supervisor, and the finding of the right one. Light, since every
 * `warmfork fork` loads it.
 */
import { connect, type Socket } from 'node:net'
import { dirname } from 'node:path'
import { errnoOf, WarmforkError } from '../errors.js'
import { LineSplitter } from '../lines.js'
import { errorFrom, type Hello, isObject, MAX_LINE_BYTES, type MethodName, type Methods, PROTOCOL } from './protocol.js'
import { checkOwner, namesWithSocket, socketPath } from './runtime-directory.js'

/** How long a supervisor may take to say hello: it is busy with one thing at a time for milliseconds only. */
const HELLO_TIMEOUT_MS = 5_000

interface Pending {
  resolve(result: unknown): void
  reject(error: unknown): void
  onEvent: ((event: unknown) => void) | undefined
}

export class ControlClient {
  /** Settles when the connection has ended; it never rejects. */
  readonly closed: Promise<void>
  readonly #socket: Socket
  readonly #path: string
  readonly #lines = new LineSplitter(MAX_LINE_BYTES)
  readonly #pending = new Map<number, Pending>()
  #hello: Hello | undefined
  #onHello: Pending | undefined
  #nextId = 1
  #failure: WarmforkError | undefined

  private constructor(socket: Socket, path: string) {
    this.#socket = socket
    this.#path = path
    socket.on('error', () => {})
    socket.on('data', (chunk) => this.#read(chunk))
    this.closed = new Promise((resolve) =>
      socket.once('close', () => {
        this.#end()
        resolve()
      }),
    )
  }

  /**
   * Connects and reads the supervisor's hello.
   * @throws NO_SUPERVISOR where nobody listens there, TIMEOUT, STORE_UNSAFE, BAD_OPTION (another protocol)
   */
  static async connect(path: string): Promise<ControlClient> {
    const socket = await connected(path)
    const client = new ControlClient(socket, path)
    const hello = new Promise<unknown>((resolve, reject) => {
      client.#onHello = { resolve, reject, onEvent: undefined }
    })
    client.#write({ hello: { protocol: PROTOCOL } })
    const timer = setTimeout(() => {
      client.#failure = new WarmforkError('TIMEOUT', {
        tried: `speak to the supervisor at ${path}`,
        happened: `it did not answer for ${HELLO_TIMEOUT_MS} ms`,
        remedy: 'See whether it is stopped (SIGSTOP) or hangs.',
      })
      socket.destroy()
    }, HELLO_TIMEOUT_MS)
    try {
      await hello
      return client
    } catch (error) {
      socket.destroy()
      throw error
    } finally {
      clearTimeout(timer)
    }
  }

  get hello(): Hello {
    return this.#hello!
  }

  /** The id that the next request gets. */
  get nextId(): number {
    return this.#nextId
  }

  /**
   * Sends a request and waits for its result.
   * @throws The supervisor's error; STOPPED where the connection ends first
   */
  request<M extends MethodName>(
    method: M,
    params: Methods[M]['params'],
    onEvent?: (event: Methods[M]['event']) => void,
  ): Promise<Methods[M]['result']> {
    const id = this.#nextId++
    return new Promise((resolve, reject) => {
      if (this.#socket.destroyed) {
        reject(this.#failure ?? this.#goneError())
        return
      }
      this.#pending.set(id, {
        resolve: resolve as (result: unknown) => void,
        reject,
        onEvent: onEvent as ((event: unknown) => void) | undefined,
      })
      this.#write({ id, method, params })
    })
  }

  close(): void {
    this.#socket.destroy()
  }

  #write(message: unknown): void {
    this.#socket.write(`${JSON.stringify(message)}\n`)
  }

  #read(chunk: Buffer): void {
    try {
      for (const line of this.#lines.push(chunk)) this.#take(JSON.parse(line.toString('utf8')))
    } catch (cause) {
      this.#failure ??= new WarmforkError('BAD_OPTION', {
        tried: `speak to the supervisor at ${this.#path}`,
        happened: 'what answers there does not speak the protocol of warmfork',
        remedy: 'See what listens there, and remove it.',
        cause,
      })
      this.#socket.destroy()
    }
  }

  #take(message: unknown): void {
    if (!isObject(message)) throw new TypeError('no object')
    if (this.#hello === undefined) {
      this.#greet(message)
      return
    }
    const pending = this.#pending.get(Number(message.id))
    if (message.error !== undefined) {
      const error = errorFrom(isObject(message.error) ? message.error : {})
      if (pending) {
        this.#pending.delete(Number(message.id))
        pending.reject(error)
      } else this.#failure = error
    } else if ('event' in message) {
      pending?.onEvent?.(message.event)
    } else if (pending) {
      this.#pending.delete(Number(message.id))
      pending.resolve(message.result)
    }
  }

  #greet(message: Record<string, unknown>): void {
    if (isObject(message.error)) {
      this.#failure = errorFrom(message.error)
      return
    }
    const hello = message.hello as Hello
    if (!isObject(hello)) throw new TypeError('no hello')
    if (hello.protocol !== PROTOCOL) {
      this.#failure = new WarmforkError('BAD_OPTION', {
        tried: `speak to the supervisor at ${this.#path}`,
        happened: `it speaks version ${hello.protocol} of the protocol (warmfork ${hello.version}) and this is version ${PROTOCOL}`,
        remedy: `Use warmfork ${hello.version} for both, or start the supervisor anew.`,
      })
      this.#socket.destroy()
      return
    }
    this.#hello = hello
    this.#onHello?.resolve(undefined)
  }

  #end(): void {
    const error = this.#failure ?? this.#goneError()
    this.#onHello?.reject(error)
    for (const { reject } of this.#pending.values()) reject(error)
    this.#pending.clear()
  }

  #goneError(): WarmforkError {
    return new WarmforkError('STOPPED', {
      tried: `speak to the supervisor ${this.#hello?.name ?? `at ${this.#path}`}`,
      happened: 'it ended, or closed the connection',
    })
  }
}

async function connected(path: string): Promise<Socket> {
  try {
    checkOwner(dirname(path))
    return await new Promise<Socket>((resolve, reject) => {
      const socket = connect(path)
      socket.once('error', reject)
      socket.once('connect', () => {
        socket.off('error', reject)
        resolve(socket)
      })
    })
  } catch (cause) {
    const code = errnoOf(cause)
    if (code === 'ENOENT' || code === 'ECONNREFUSED') {
      throw new WarmforkError('NO_SUPERVISOR', {
        tried: `speak to the supervisor at ${path}`,
        happened: code === 'ENOENT' ? 'there is no such socket' : 'it is the socket of a supervisor that has ended',
        cause,
      })
    }
    if (code === 'EACCES' || code === 'EPERM') {
      throw new WarmforkError('NO_SUPERVISOR', {
        tried: `speak to the supervisor at ${path}`,
        happened: 'this user may not',
        remedy: 'Run the command as the user of the supervisor, or as root.',
        cause,
      })
    }
    throw cause
  }
}

/** Connections to all supervisors that run below a runtime directory, in the order of their names. The caller closes them. */
export async function runningSupervisors(runtimeDirectory: string): Promise<ControlClient[]> {
  const clients: ControlClient[] = []
  try {
    for (const name of namesWithSocket(runtimeDirectory)) {
      try {
        clients.push(await ControlClient.connect(socketPath(runtimeDirectory, name)))
      } catch (error) {
        // What a dead supervisor left is nobody's trouble.
        if (!(error instanceof WarmforkError && (error.code === 'NO_SUPERVISOR' || error.code === 'STOPPED')))
          throw error
      }
    }
    return clients
  } catch (error) {
    for (const client of clients) client.close()
    throw error
  }
}

/**
 * The supervisor of that name, or the only one that runs.
 * @throws NO_SUPERVISOR, which lists those that run, and what `connect` throws
 */
export async function connectToSupervisor(runtimeDirectory: string, name?: string): Promise<ControlClient> {
  if (name !== undefined) {
    try {
      return await ControlClient.connect(socketPath(runtimeDirectory, name))
    } catch (error) {
      if (!(error instanceof WarmforkError && error.code === 'NO_SUPERVISOR')) throw error
      const running = await namesOfRunning(runtimeDirectory)
      throw new WarmforkError('NO_SUPERVISOR', {
        tried: `reach the supervisor ${name}`,
        happened:
          running.length === 0
            ? `no supervisor runs (looked in ${runtimeDirectory})`
            : `none of that name runs; running: ${running.join(', ')}`,
        cause: error,
      })
    }
  }
  const clients = await runningSupervisors(runtimeDirectory)
  const [first, ...others] = clients
  if (first && others.length === 0) return first
  for (const client of clients) client.close()
  throw new WarmforkError('NO_SUPERVISOR', {
    tried: 'choose a supervisor',
    happened: first
      ? `several run: ${clients.map(({ hello }) => hello.name).join(', ')}`
      : `none runs (looked in ${runtimeDirectory})`,
    ...(first ? { remedy: 'Name one with `--name`.' } : {}),
  })
}

async function namesOfRunning(runtimeDirectory: string): Promise<string[]> {
  const clients = await runningSupervisors(runtimeDirectory)
  for (const client of clients) client.close()
  return clients.map(({ hello }) => hello.name)
}
