/**
 * Where agents connect: a Unix socket of one supervisor. Whoever belongs to a program that boots is handed to that program's group;
 * others are sent away. It knows process trees, and no engine.
 */
import { chmodSync, mkdtempSync, rmSync } from 'node:fs'
import { createServer, type Server, type Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { setImmediate as nextTurn, setTimeout as sleep } from 'node:timers/promises'
import { errnoOf, WarmforkError } from '../errors.js'
import { LineSplitter } from '../lines.js'
import { peerCredentials } from '../linux/peer.js'
import { ancestors } from '../linux/proc.js'
import { AgentGroup } from './group.js'
import { AgentLink } from './link.js'
import { encodeLine, type Hello, MAX_LINE_FROM_AGENT, PROTOCOL_VERSION, parseLine } from './protocol.js'

/** `sun_path` of a Unix socket's address holds 108 bytes, one of them for the end. */
const MAX_PATH_BYTES = 107
/** How long a connection may take for its hello. */
const HELLO_TIMEOUT_MS = 10_000
/** A hello can come before its program's start is told of. */
const EXPECTED_SOON_MS = 2_000
/** An agent each for the processes of some trees; more come by mistake. */
const MAX_CONNECTIONS = 1_024

export interface ReceptionOptions {
  /** Of the supervisor alone. */
  directory: string
  /** Called with what is to be removed should we die. */
  removeAtEnd: (path: string) => void
  warn: (message: string) => void
}

export class AgentReception {
  readonly #server: Server
  readonly #options: ReceptionOptions
  readonly #groups = new Map<number, AgentGroup>()
  readonly #waiting = new Set<() => void>()
  readonly #sockets = new Set<Socket>()
  /** Connections that have not said who they are, by the process that has made each. */
  readonly #unheard = new Map<Socket, { pid: number; heard: Promise<void> }>()

  private constructor(
    options: ReceptionOptions,
    /** Of the socket. */
    readonly path: string,
  ) {
    this.#options = options
    this.#server = createServer((socket) => {
      this.#sockets.add(socket)
      socket.once('close', () => this.#sockets.delete(socket))
      const heard = this.#receive(socket).finally(() => this.#unheard.delete(socket))
      this.#unheard.set(socket, { pid: credentials(socket)?.pid ?? 0, heard })
    })
    this.#server.maxConnections = MAX_CONNECTIONS
    // A failed accept, since no descriptor is free, must not end the supervisor.
    this.#server.on('error', () => {})
  }

  /** @throws STORE_UNWRITABLE */
  static async open(options: ReceptionOptions): Promise<AgentReception> {
    let path = join(options.directory, 'agents.sock')
    try {
      if (Buffer.byteLength(path) > MAX_PATH_BYTES) {
        const directory = mkdtempSync(join(tmpdir(), 'warmfork-'))
        chmodSync(directory, 0o711)
        options.removeAtEnd(directory)
        path = join(directory, 'agents.sock')
      }
      const reception = new AgentReception(options, path)
      await new Promise<void>((resolve, reject) => {
        reception.#server.once('error', reject)
        reception.#server.listen(path, () => resolve())
      })
      reception.#server.unref()
      // Workers can be other users; who may speak is decided by the process that connects.
      chmodSync(path, 0o666)
      return reception
    } catch (cause) {
      throw new WarmforkError('STORE_UNWRITABLE', {
        tried: `listen for agents at ${path}`,
        happened: errnoOf(cause) ?? String(cause),
        remedy: 'Make the runtime directory writable, or choose another `runtimeDirectory`.',
        cause,
      })
    }
  }

  /** The group of what the process and its descendants say from now on. */
  expect(pid: number): AgentGroup {
    const group = new AgentGroup()
    this.#groups.set(pid, group)
    for (const settle of this.#waiting) settle()
    return group
  }

  /**
   * Waits for those of a program that have connected and not said hello yet: an agent connects before its program's first line of code,
   * and speaks when the program lets it.
   */
  async heard(root: number, timeoutMs: number): Promise<void> {
    // A connection that waits to be accepted is, in the next turns.
    for (let turn = 0; turn < 2; turn++) await nextTurn()
    const unheard = [...this.#unheard.values()].filter(({ pid }) => [pid, ...ancestors(pid)].includes(root))
    if (unheard.length === 0) return
    const over = new AbortController()
    const late = sleep(timeoutMs, undefined, { signal: over.signal, ref: false }).catch(() => {})
    await Promise.race([Promise.all(unheard.map(({ heard }) => heard)), late])
    over.abort()
  }

  /** Nobody of that program is awaited any more. */
  forget(pid: number): void {
    this.#groups.delete(pid)
  }

  async close(): Promise<void> {
    const closed = new Promise<void>((resolve) => this.#server.close(() => resolve()))
    for (const socket of this.#sockets) socket.destroy()
    await closed
    if (dirname(this.path) !== this.#options.directory) rmSync(dirname(this.path), { recursive: true, force: true })
  }

  async #receive(socket: Socket): Promise<void> {
    socket.on('error', () => {})
    const refuse = (reason: string) => {
      socket.end(encodeLine({ type: 'goodbye', reason }))
      socket.destroySoon()
    }
    try {
      const said = await hello(socket)
      if (!said) {
        socket.destroy()
        return
      }
      const peer = credentials(socket)
      if (said.protocol !== PROTOCOL_VERSION) {
        const reason = `${said.agent} speaks version ${said.protocol} of the agent protocol, and this supervisor version ${PROTOCOL_VERSION}`
        this.#options.warn(reason)
        return refuse(reason)
      }
      // In a pid namespace of its own it does not know the pid by which it is known here.
      const pid = peer?.pid || said.pid
      const group = await this.#groupOf(pid)
      if (!group) return refuse('no program that boots')
      if (socket.destroyed) return
      const link = new AgentLink(socket, { ...said, pid })
      link.send({ type: 'welcome', protocol: PROTOCOL_VERSION })
      link.unref()
      group.add(link)
    } catch (error) {
      if (!(error instanceof SyntaxError) && !(error instanceof RangeError)) throw error
      this.#options.warn(`a connection to the agents' socket was closed, as it sent what is no hello: ${error.message}`)
      refuse(error.message)
    }
  }

  async #groupOf(pid: number): Promise<AgentGroup | undefined> {
    const deadline = Date.now() + EXPECTED_SOON_MS
    for (;;) {
      for (const one of [pid, ...ancestors(pid)]) {
        const group = this.#groups.get(one)
        if (group) return group
      }
      const left = deadline - Date.now()
      if (left <= 0) return undefined
      await new Promise<void>((resolve) => {
        const settle = () => {
          this.#waiting.delete(settle)
          resolve()
        }
        this.#waiting.add(settle)
        setTimeout(settle, Math.min(left, 100)).unref()
      })
    }
  }
}

/** The first line, whose rest is given back to the socket; undefined where none came. */
function hello(socket: Socket): Promise<Hello | undefined> {
  return new Promise((resolve, reject) => {
    const lines = new LineSplitter(MAX_LINE_FROM_AGENT)
    const timer = setTimeout(() => done(undefined), HELLO_TIMEOUT_MS).unref()
    const done = (said: Hello | undefined) => {
      clearTimeout(timer)
      socket.off('data', onData).off('close', onClose)
      socket.pause()
      resolve(said)
    }
    const onClose = () => done(undefined)
    const onData = (chunk: Buffer) => {
      try {
        const end = chunk.indexOf(10)
        const [line] = lines.push(end < 0 ? chunk : chunk.subarray(0, end + 1))
        if (!line) return
        const message = parseLine(line)
        if (message?.type !== 'hello') throw new SyntaxError('the first message is no `hello`')
        done(message)
        if (end + 1 < chunk.length) socket.unshift(chunk.subarray(end + 1))
      } catch (error) {
        clearTimeout(timer)
        socket.off('data', onData).off('close', onClose)
        reject(error)
      }
    }
    socket.on('data', onData).once('close', onClose)
  })
}

function credentials(socket: Socket): { pid: number } | undefined {
  // The descriptor has no public name in Node.
  const fd = (socket as unknown as { _handle?: { fd?: number } })._handle?.fd
  return fd === undefined || fd < 0 || process.platform !== 'linux' ? undefined : peerCredentials(fd)
}
