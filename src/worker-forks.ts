/**
 * Forks that a program asks for itself, through its agent: its process is checkpointed into a generation of its own and forks of
 * that are made. Calls that come together share one checkpoint. It knows an engine, agents and children, and no pool.
 */
import { closeSync } from 'node:fs'
import type { AgentGroup, AgentRequest } from './agents/group.js'
import type { AgentLink } from './agents/link.js'
import { type AgentFailure, type Payload, payloadValue } from './agents/protocol.js'
import type { Child, Resumption } from './child.js'
import type { CheckpointOptions, Engine, ForkSource, SourceProcess, StdioFds } from './engines/engine.js'
import { WarmforkError } from './errors.js'
import { pidfdGetfd, pidfdOpen } from './linux/libc.js'
import type { ExitStatus } from './linux/reaper.js'

/** A process that can ask for forks: the template, or a child. */
export interface Parent {
  readonly pid: number
  readonly agents: AgentGroup
  /** Never rejects. */
  readonly exited: Promise<ExitStatus>
  /** What the engine must know of it, at rest. */
  source(): SourceProcess
}

export interface WorkerForksOptions {
  readonly engine: Engine
  readonly checkpoint: Omit<CheckpointOptions, 'signal' | 'onSourceFree' | 'durable'>
  readonly hookTimeoutMs: number
  readonly signal: AbortSignal
  /** Makes a child of it that runs; it is the supervisor's from then on. */
  readonly fork: (source: ForkSource, stdio: StdioFds, resumption: Resumption) => Promise<Child>
  readonly warn: (message: string, cause?: unknown) => void
}

interface Call {
  readonly link: AgentLink
  readonly id: number
  readonly kind: 'fork' | 'keep'
  readonly data?: Payload | undefined
}

/** A generation that was made for its parent alone. */
interface Made {
  readonly source: ForkSource
  /** Ids by which the program keeps it: `keep` was asked for. */
  holders: number
  /** Forks of it that are being made, or run: what they map must be there for a checkpoint of theirs. */
  alive: number
}

/** Descriptors of a process that its forks have too. */
const STREAMS = [0, 1, 2] as const

export class WorkerForks {
  readonly #options: WorkerForksOptions
  readonly #parents = new Set<ParentForks>()

  constructor(options: WorkerForksOptions) {
    this.#options = options
  }

  /** Serves the calls of a process from now on, until it ends. */
  serve(parent: Parent, askedBy?: AgentLink): void {
    const forks = new ParentForks(parent, this.#options, askedBy, (child, by) => this.serveChild(child, by))
    this.#parents.add(forks)
    void parent.exited.then(async () => {
      await forks.parentEnded()
      if (forks.isDone) this.#parents.delete(forks)
    })
  }

  /** The same for a child, where it has agents. `askedBy` is the agent of the process that asked for it. */
  serveChild(child: Child, askedBy?: AgentLink): void {
    const { pid, agents, exit } = child
    if (agents) this.serve({ pid, agents, exited: exit, source: () => child.source() }, askedBy)
  }

  /** Waits for what is under way, and gives back all generations. */
  async close(): Promise<void> {
    await Promise.all([...this.#parents].map((forks) => forks.close()))
    this.#parents.clear()
  }
}

class ParentForks {
  readonly #parent: Parent
  readonly #options: WorkerForksOptions
  readonly #askedBy: AgentLink | undefined
  readonly #serve: (child: Child, by: AgentLink) => void
  readonly #made = new Map<number, Made>()
  readonly #children = new Map<number, AgentLink>()
  #calls: Call[] = []
  #running: Promise<void> | undefined
  /** What goes on beside the calls: forks of kept checkpoints, generations that are being removed. */
  readonly #underWay = new Set<Promise<void>>()
  #closed = false

  constructor(
    parent: Parent,
    options: WorkerForksOptions,
    askedBy: AgentLink | undefined,
    serve: (child: Child, by: AgentLink) => void,
  ) {
    this.#parent = parent
    this.#options = options
    this.#askedBy = askedBy
    this.#serve = serve
    parent.agents.on('request', (request, link) => this.#hear(request, link))
  }

  /** Whether nothing is left of what was made for it. */
  get isDone(): boolean {
    return this.#made.size === 0
  }

  /** What it kept is let go, as soon as no fork of it needs it. */
  async parentEnded(): Promise<void> {
    this.#closed = true
    await this.#running
    for (const [number, made] of [...this.#made]) {
      made.holders = 0
      await this.#letGo(number)
    }
    await Promise.all(this.#underWay)
  }

  async close(): Promise<void> {
    this.#closed = true
    await this.#running
    await Promise.all(this.#underWay)
    for (const number of [...this.#made.keys()]) await this.#letGo(number, true)
  }

  #hear(request: AgentRequest, link: AgentLink): void {
    switch (request.type) {
      case 'fork':
        if (request.generation === undefined) this.#call({ link, id: request.id, kind: 'fork', data: request.data })
        else
          this.#beside(this.#forkAgain(request.generation, { link, id: request.id, kind: 'fork', data: request.data }))
        return
      case 'keep':
        this.#call({ link, id: request.id, kind: 'keep' })
        return
      case 'drop': {
        const made = this.#made.get(request.generation)
        if (made && made.holders > 0) made.holders--
        this.#beside(this.#letGo(request.generation))
        return
      }
      case 'message': {
        if (request.to === undefined) return
        const to = request.to === 'parent' ? this.#askedBy : this.#children.get(request.to)
        const from = request.to === 'parent' ? this.#parent.pid : ('parent' as const)
        if (to && !to.isClosed) to.send({ type: 'message', data: request.data, from })
        else link.send({ type: 'error', message: `there is no process ${request.to} to send a message to` })
      }
    }
  }

  #beside(work: Promise<void>): void {
    const done = work
      .catch((error) => this.#options.warn(`a generation of a program's own could not be given back: ${error}`, error))
      .finally(() => this.#underWay.delete(done))
    this.#underWay.add(done)
  }

  #call(call: Call): void {
    this.#calls.push(call)
    this.#running ??= this.#run().finally(() => {
      this.#running = undefined
    })
  }

  async #run(): Promise<void> {
    while (this.#calls.length > 0) {
      // Calls of the same moment come in one piece: they share the checkpoint.
      await new Promise(setImmediate)
      await this.#serveCalls()
    }
  }

  async #serveCalls(): Promise<void> {
    const { agents } = this.#parent
    let calls: Call[] = []
    try {
      if (this.#options.engine.name === 'spawn') {
        const happened = 'the spawn engine starts each fork cold, and cannot copy a process'
        throw new WarmforkError('ENGINE_UNSUPPORTED', { tried: 'fork a running process', happened })
      }
      if (this.#parent.source().terminal) {
        const happened = 'it is on a terminal, which two processes of two sessions cannot share'
        throw new WarmforkError('ENGINE_UNSUPPORTED', { tried: 'fork a running process', happened })
      }
      if (this.#closed) throw new WarmforkError('STOPPED', { tried: 'fork', happened: 'the supervisor was stopped' })
      for (const warning of await agents.park('fork', this.#options.hookTimeoutMs)) this.#options.warn(warning)
      // Whatever was asked for before it was parked is answered by this checkpoint.
      calls = this.#calls.splice(0)
      const made = await this.#checkpoint()
      await Promise.all(calls.map((call) => this.#answer(call, made)))
      await this.#letGo(made.source.generation.number)
    } catch (error) {
      for (const call of calls.length > 0 ? calls : this.#calls.splice(0)) refuse(call, error)
    }
  }

  async #checkpoint(): Promise<Made> {
    const { engine, checkpoint, signal } = this.#options
    const { agents } = this.#parent
    let isFree = false
    const free = (error?: unknown) => {
      if (!isFree) agents.resume(error)
      isFree = true
    }
    try {
      const generation = await engine.checkpoint(this.#parent.source(), {
        ...checkpoint,
        signal,
        durable: false,
        onSourceFree: () => free(),
      })
      free()
      const made: Made = { source: await engine.open(generation.number, { ahead: 0 }), holders: 0, alive: 0 }
      this.#made.set(generation.number, made)
      return made
    } catch (error) {
      free(error)
      throw error
    }
  }

  async #answer(call: Call, made: Made): Promise<void> {
    if (call.kind === 'fork') return this.#fork(call, made)
    made.holders++
    call.link.send({ type: 'keepResult', id: call.id, generation: made.source.generation.number })
  }

  async #forkAgain(number: number, call: Call): Promise<void> {
    const made = this.#made.get(number)
    if (!made || made.holders === 0) {
      const happened = 'it is no checkpoint that this process keeps'
      refuse(call, new WarmforkError('GENERATION_NOT_FOUND', { tried: `fork from generation ${number}`, happened }))
      return
    }
    await this.#fork(call, made)
    await this.#letGo(number)
  }

  async #fork(call: Call, made: Made): Promise<void> {
    made.alive++
    let stdio: number[] = []
    try {
      stdio = streamsOf(this.#parent.pid)
      const data = call.data === undefined ? {} : { data: payloadValue(call.data) }
      const resumption = { input: data, call: call.id }
      const child = await this.#options.fork(made.source, stdio as unknown as StdioFds, resumption)
      this.#children.set(child.pid, call.link)
      const link = child.agents?.worker
      if (link) this.#children.set(child.pid, link)
      this.#serve(child, call.link)
      call.link.send({ type: 'forkResult', id: call.id, pid: child.pid, generation: child.generation })
      void child.exit.then(async ({ code, signal }) => {
        // What it said last is heard before its end.
        await child.agents?.ended()
        this.#children.delete(child.pid)
        call.link.send({ type: 'childExit', pid: child.pid, code, signal })
        made.alive--
        this.#beside(this.#letGo(child.generation))
      })
    } catch (error) {
      made.alive--
      refuse(call, error)
    } finally {
      for (const fd of stdio) closeSync(fd)
    }
  }

  /** Gives a generation back that nobody keeps; its children have what they need of it. */
  async #letGo(number: number, force = false): Promise<void> {
    const made = this.#made.get(number)
    if (!made || (!force && (made.holders > 0 || made.alive > 0))) return
    this.#made.delete(number)
    await made.source.close()
    await this.#options.engine.discard(number)
  }
}

function refuse({ link, id, kind }: Call, error: unknown): void {
  const failure: AgentFailure = {
    message: error instanceof Error ? error.message : String(error),
    ...(error instanceof WarmforkError ? { code: error.code } : {}),
  }
  link.send(kind === 'fork' ? { type: 'forkResult', id, error: failure } : { type: 'keepResult', id, error: failure })
}

/** Copies of the standard streams of a process: a fork shares them with it, as after fork(2). */
function streamsOf(pid: number): number[] {
  const pidfd = pidfdOpen(pid)
  const taken: number[] = []
  try {
    for (const fd of STREAMS) taken.push(pidfdGetfd(pidfd, fd))
    return taken
  } catch (error) {
    for (const fd of taken) closeSync(fd)
    throw error
  } finally {
    closeSync(pidfd)
  }
}
