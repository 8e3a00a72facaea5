/**
 * What a Node program says to warmfork and hears from it: `import { worker } from 'warmfork/worker'`. Without a supervisor hooks are
 * kept and never called, and what needs one rejects with the code NO_SUPERVISOR.
 */
import { createRequire } from 'node:module'

/** What a fork was given. */
export interface ForkPayload {
  /** Bytes as a Buffer; undefined where nothing was given. */
  readonly data: unknown
  /** The arguments that took the place of those before; undefined where they are unchanged. What is no UTF-8 is a Buffer. */
  readonly args: readonly (string | Buffer)[] | undefined
  /** Variables that were set, and with `undefined` removed. */
  readonly env: Readonly<Record<string, string | Buffer | undefined>> | undefined
  readonly cwd: string | Buffer | undefined
  readonly pid: number
  readonly generation: number
}

/** A fork, seen from the process that asked for it. */
export interface WorkerChild {
  readonly pid: number
  readonly generation: number
  /** How it ended; both are null where the supervisor was gone before. Never rejects. Keeps this process running once it was asked for. */
  readonly exited: Promise<{ code: number | null; signal: string | null }>
  /** Sends bytes, or a value that JSON can have: its `worker.on('message')`. */
  send(data: unknown): void
  /** The last 1,000 messages from before the first listener are kept for that one. */
  on(event: 'message', listener: (data: unknown) => void): this
}

export interface ForkOptions {
  /** For the fork: bytes, or a value that JSON can have. */
  data?: unknown
}

/** Called in the fork, when its hooks are done. */
export type Run = (payload: ForkPayload) => unknown

/** A checkpoint of this process that stays: each fork of it costs a restore. `await using` drops it. */
export interface WorkerCheckpoint extends AsyncDisposable {
  readonly generation: number
  fork(options?: ForkOptions): Promise<WorkerChild>
  /** Gives it back; its forks live on. */
  drop(): void
}

export interface WorkerEvents {
  /** From the user of the supervisor, or with `from` from a process that this one has forked, or that has forked it. */
  message: (data: unknown, from: number | 'parent' | undefined) => void
  /** The supervisor is gone, or has sent this process away. */
  disconnect: () => void
}

export interface WarmforkWorker {
  /** Whether a supervisor is spoken to. */
  readonly connected: boolean
  readonly isFork: boolean
  /** Number of the generation that this process was forked from; undefined where it was booted. */
  readonly generation: number | undefined
  /** What this fork was given; undefined in a process that is none. */
  readonly payload: ForkPayload | undefined
  /** Says that the program is booted and warm: `ready: { agent: true }` of the supervisor. */
  ready(): void
  /**
   * HTTP requests that this process has answered, in all its threads: those of Node's own servers. 0 without a supervisor, and a fork
   * begins with 0.
   */
  readonly requests: number
  /**
   * Says that this process must not become the one that others are forked from (a refork), for good: it has begun what a copy
   * would repeat or break. It goes on working, and `fork()` and `checkpoint()` of its own do. A fork of it refuses as well.
   * @param reason for logs, at most 1,000 characters. @default that the program has said so
   */
  noLongerForkSafe(reason?: string): void
  /**
   * Called before each checkpoint, the last one first. Where it throws, or is not done in time, there is none.
   * @returns removes it
   */
  beforeCheckpoint(hook: () => unknown): () => void
  /** Called in the process that goes on after a checkpoint. */
  afterCheckpoint(hook: () => unknown): () => void
  /** Called in each fork before the program goes on there. Other code runs while a promise of it is waited for. */
  onFork(hook: (payload: ForkPayload) => unknown): () => void
  /**
   * Forks this process. Resolves in this process; in the fork `run` is called, and the promise never settles there.
   * @throws Error with `code`: NO_SUPERVISOR, HOOK_FAILED, CHECKPOINT_FAILED, RESTORE_FAILED and others of docs/errors.md
   */
  fork(options?: ForkOptions, run?: Run): Promise<WorkerChild>
  fork(run: Run): Promise<WorkerChild>
  /** `run` is called in each fork of it, where the promise never settles. */
  checkpoint(run?: Run): Promise<WorkerCheckpoint>
  /**
   * Sends bytes, or a value that JSON can have, to the user of the supervisor, or to the process that has forked this one.
   * @throws Error with `code`: NO_SUPERVISOR, and BAD_OPTION for more than 8 MiB
   */
  send(data: unknown, to?: 'parent'): void
  /** A listener does not keep the process running. Messages from before the first one are kept for it, the last 1,000 of them. */
  on<E extends keyof WorkerEvents>(event: E, listener: WorkerEvents[E]): void
  off<E extends keyof WorkerEvents>(event: E, listener: WorkerEvents[E]): void
}

interface Hook<A extends unknown[]> {
  readonly name: string
  readonly run: (...args: A) => unknown
}

/** A fork as the agent has it. */
interface Offspring {
  readonly pid: number
  readonly generation: number
  readonly inbox: Mailbox<[data: unknown]>
}

interface Mailbox<A extends unknown[]> {
  listen(listener: (...message: A) => void): void
  unlisten(listener: (...message: A) => void): void
}

/** The agent's side, which lives in a CommonJS module since it can be preloaded. */
interface Agent {
  readonly before: Hook<[]>[]
  readonly after: Hook<[]>[]
  readonly onFork: Hook<[ForkPayload]>[]
  readonly inbox: Mailbox<Parameters<WorkerEvents['message']>>
  readonly payload: ForkPayload | undefined
  readonly connected: boolean
  ready(): void
  readonly requests: number
  refuse(reason?: string): void
  send(data: unknown, to?: number | 'parent'): void
  fork(data: unknown, run: Run | undefined, generation?: number): Promise<Offspring>
  exitOf(child: Offspring): WorkerChild['exited']
  keep(run: Run | undefined): Promise<number>
  drop(generation: number): void
  on(event: 'disconnect', listener: () => void): unknown
  off(event: 'disconnect', listener: () => void): unknown
}

const shared = (globalThis as unknown as Record<symbol, Agent | undefined>)[Symbol.for('warmfork.agent')]
const agent = shared ?? (createRequire(import.meta.url)('./agent.cjs') as { agent: Agent | undefined }).agent

/** In a Worker there is no agent to speak to: its process's main thread has it. */
function main(): Agent {
  if (agent) return agent
  throw Object.assign(new Error('only the main thread of a process speaks to warmfork'), { code: 'NO_SUPERVISOR' })
}

function add<A extends unknown[]>(hooks: Hook<A>[], run: (...args: A) => unknown): () => void {
  if (typeof run !== 'function') throw new TypeError(`expected a hook to be a function, got ${typeof run}`)
  const hook = { name: run.name || callSite(), run }
  hooks.push(hook)
  return () => {
    const at = hooks.indexOf(hook)
    if (at >= 0) hooks.splice(at, 1)
  }
}

/** `app.js:12`, of the code that registers a hook without a name. */
function callSite(): string {
  const line = String(new Error().stack).split('\n')[4] ?? ''
  return /([^/\\]+:\d+):\d+\)?$/.exec(line)?.[1] ?? 'anonymous'
}

async function forked(options: ForkOptions, run: Run | undefined, generation?: number): Promise<WorkerChild> {
  const offspring = await main().fork(options.data, run, generation)
  let exited: WorkerChild['exited'] | undefined
  const child: WorkerChild = {
    pid: offspring.pid,
    generation: offspring.generation,
    get exited() {
      exited ??= main().exitOf(offspring)
      return exited
    },
    send: (data) => main().send(data, offspring.pid),
    on(_, listener) {
      offspring.inbox.listen(listener)
      return child
    },
  }
  return child
}

export const worker: WarmforkWorker = {
  get connected() {
    return agent?.connected ?? false
  },
  get isFork() {
    return agent?.payload !== undefined
  },
  get generation() {
    return agent?.payload?.generation
  },
  get payload() {
    return agent?.payload
  },
  ready: () => agent?.ready(),
  get requests() {
    return agent?.requests ?? 0
  },
  noLongerForkSafe: (reason) => main().refuse(reason),
  beforeCheckpoint: (hook) => add(main().before, hook),
  afterCheckpoint: (hook) => add(main().after, hook),
  onFork: (hook) => add(main().onFork, hook),
  async fork(first: ForkOptions | Run = {}, run?: Run) {
    return typeof first === 'function' ? forked({}, first) : forked(first, run)
  },
  async checkpoint(run) {
    const generation = await main().keep(run)
    const drop = () => main().drop(generation)
    return {
      generation,
      fork: (options = {}) => forked(options, undefined, generation),
      drop,
      [Symbol.asyncDispose]: async () => drop(),
    }
  },
  send: (data, to) => main().send(data, to),
  on(event, listener) {
    if (event === 'message') main().inbox.listen(listener as WorkerEvents['message'])
    else main().on('disconnect', listener as WorkerEvents['disconnect'])
  },
  off(event, listener) {
    if (event === 'message') main().inbox.unlisten(listener as WorkerEvents['message'])
    else main().off('disconnect', listener as WorkerEvents['disconnect'])
  },
}

export default worker
