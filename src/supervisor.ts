/**
 * The supervisor: template → generations → pool → children. It ties the parts together and ends what it has made; it knows no
 * image, no CRIU and no command line.
 */
import { randomBytes } from 'node:crypto'
import { EventEmitter, setMaxListeners } from 'node:events'
import { chmodSync, mkdirSync, rmdirSync, rmSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { destination, type Logger, pino } from 'pino'
import { AgentDesk } from './agents/desk.js'
import { payloadValue } from './agents/protocol.js'
import { CrashBackoff } from './backoff.js'
import { Boot } from './boot.js'
import { Child, type ChildStats, type Resumption } from './child.js'
import { Crew, type CrewState } from './crew.js'
import { endTrees } from './ending.js'
import type { Engine, EngineName, ForkedProcess, GenerationInfo, SourceProcess, StdioFds } from './engines/engine.js'
import { type ErrorCode, errnoOf, WarmforkError } from './errors.js'
import { type ForkRequest, planFork } from './fork-request.js'
import type { Guard } from './guard/guard.js'
import { type MemoryUse, memoryUse } from './linux/proc.js'
import type { ExitStatus } from './linux/reaper.js'
import { type ResolvedOptions, resolveOptions, type SupervisorOptions } from './options.js'
import { keptIdWarnings, pidWarnings, repeatWarnings } from './pid-sensitive.js'
import { Pool, type PoolState } from './pool.js'
import { untilReady } from './readiness.js'
import {
  type ChangeEvents,
  Changes,
  type LastRefork,
  type ReforkOptions,
  type RollbackOptions,
} from './refork/changes.js'
import type { ReforkDecision } from './refork/observation.js'
import { tryGeneration } from './refork/trial.js'
import { untilAtRest } from './rest.js'
import type { Watched } from './reuse.js'
import { Succession } from './succession.js'
import type { Template } from './template.js'
import { type Identity, resolveIdentity } from './user.js'
import { WorkerForks } from './worker-forks.js'

export type SupervisorState = 'starting' | 'running' | 'stopping' | 'stopped'

/**
 * The steps of a start, in order. `reuse` looks for a generation to begin with (with the option of that name): those up to `checkpoint`
 * are left out where there is one. `rest` waits for the template to have nothing in hand, `pool` for the first parked children.
 */
export type StartPhase = 'reuse' | 'boot' | 'ready' | 'warmup' | 'rest' | 'checkpoint' | 'pool'

/** Something that goes on working, but not as the user may think. */
export interface Warning {
  /**
   * Names the kind: `agent`, `engine-spawn`, `no-guard`, `generation`, `hooks`, `identity`, `refill-failed`, `repeats`, `stray-resume`,
   * `parked-ended`, `crashes`, `refork`, `reuse`, `rollback`, `rollout`, `worker`, `prune`, `stop-failed`.
   */
  readonly kind: string
  /** What is the case, why, and what to do. */
  readonly message: string
  readonly code?: ErrorCode
  readonly cause?: unknown
}

export interface SupervisorEvents extends ChangeEvents {
  /** A step of the start is done, and took that long. */
  progress: [phase: StartPhase, elapsedMs: number]
  warning: [warning: Warning]
  /** A child was continued and is the user's now. */
  child: [child: Child]
  childExit: [child: Child, status: ExitStatus]
  /** All workers are of the generation in use, after some were not. */
  rolledOut: [replaced: number]
  templateOutput: [stream: 'stdout' | 'stderr', chunk: Buffer]
  templateExit: [status: ExitStatus]
  /** The template's program sent something through its agent. */
  templateMessage: [data: unknown]
  stopped: []
}

export interface StartOptions {
  /** Ends the start, with all that it has made; `start` rejects with the signal's reason. */
  signal?: AbortSignal
  /** Called with the supervisor before anything else is done, so that the events of the start can be listened to. */
  onCreate?: (supervisor: Supervisor) => void
}

export interface TemplateState {
  readonly pid: number
  readonly running: boolean
  /** From its start to its readiness. */
  readonly readyMs: number
  /** Undefined where it has ended. */
  readonly memory: MemoryUse | undefined
}

export interface SupervisorStats {
  readonly name: string
  readonly state: SupervisorState
  readonly engine: EngineName
  readonly pid: number
  readonly command: readonly string[]
  readonly startedAt: Date
  readonly uptimeMs: number
  /** Number of the generation that forks come from. */
  readonly generation: number
  readonly template: TemplateState | undefined
  /** The one that forks come from until it is unpinned, where one is pinned. */
  readonly pinned: number | undefined
  /** What the policy of reforks decided last, and why; undefined where there is none. */
  readonly reforkDecision: ReforkDecision | undefined
  /** The refork that was made last, or came to nothing; undefined where there was none. */
  readonly lastRefork: LastRefork | undefined
  readonly pool: PoolState
  readonly workers: { readonly size: number; readonly outdated: number }
  readonly children: readonly ChildStats[]
  readonly forks: {
    readonly fromPool: number
    readonly direct: number
    readonly failed: number
  }
}

export interface StopOptions {
  /**
   * How long children and the template have after SIGTERM before they are killed, in milliseconds.
   * @default `template.stopTimeoutMs`
   */
  graceMs?: number
}

/** Longest delay of a Node timer. */
const FOREVER_MS = 2 ** 31 - 1

/** Errors that say that CRIU cannot work here, in contrast to a failure of it. */
const CRIU_CANNOT: ReadonlySet<ErrorCode> = new Set<ErrorCode>(['CRIU_MISSING', 'CRIU_TOO_OLD', 'CRIU_RIGHTS'])

/**
 * Boots a program once and forks it from then on. It keeps the event loop alive until it is stopped.
 *
 * ```js
 * await using supervisor = await Supervisor.start({ command: ['node', 'app.js'], ready: { output: /ready/ }, pool: { size: 4 } })
 * const child = await supervisor.fork()
 * ```
 */
export class Supervisor extends EventEmitter<SupervisorEvents> {
  readonly name: string
  readonly store: string
  readonly runtimeDirectory: string

  readonly #options: ResolvedOptions
  readonly #log: Logger
  readonly #startedAt = new Date()
  /** Marks all that is started for this supervisor, in its environment. */
  readonly #token = randomBytes(12).toString('hex')
  readonly #keepAlive = setInterval(() => {}, FOREVER_MS)
  /** Aborted by a stop, and by the signal of the start. */
  readonly #over = new AbortController()
  readonly #crashes: CrashBackoff
  readonly #children = new Set<Child>()
  /** Ended, with pipes open that others hold too. */
  readonly #holding = new Set<Child>()
  readonly #inFlight = new Set<Promise<unknown>>()
  readonly #generations: GenerationInfo[] = []
  readonly #warnings: Warning[] = []
  readonly #forks = { fromPool: 0, direct: 0, failed: 0 }
  #state: SupervisorState = 'starting'
  #starting: Promise<void> = Promise.resolve()
  #stopping: Promise<void> | undefined
  #identity: Identity | undefined
  #directory = ''
  #guard: Guard | undefined
  #engine: Engine | undefined
  #boots: Boot | undefined
  #template: Template | undefined
  #readyMs = 0
  #succession: Succession | undefined
  #agents: AgentDesk | undefined
  #workerForks: WorkerForks | undefined
  /** The application's own files before the boot, where they are watched. */
  #watched: Watched | undefined
  /** The first fork of a restart, which shows that there can be some. */
  #spare: Child | undefined
  /** What the first checkpoint was taken of. */
  #origin: SourceProcess | undefined
  #pool: Pool | undefined
  #crew: Crew | undefined
  #changes: Changes | undefined

  private constructor(options: ResolvedOptions) {
    super()
    this.#options = options
    // Each fork under way listens.
    setMaxListeners(0, this.#over.signal)
    this.name = options.name
    this.store = options.store
    this.runtimeDirectory = options.runtimeDirectory
    this.#crashes = new CrashBackoff(options.crashes)
    this.#log = typeof options.log === 'string' ? levelLogger(options.log) : options.log
  }

  /**
   * Boots the template and checkpoints it, or with `reuse` begins with a generation on disk; then fills the pool. Resolves when forks
   * can be had.
   * @throws BAD_OPTION, GENERATION_MISFIT, PORT_TAKEN, TEMPLATE_START_FAILED, TEMPLATE_EXITED, TEMPLATE_NOT_READY, WARMUP_FAILED, NOT_AT_REST, CHECKPOINT_FAILED,
   * the errors of the store and those of a first fork
   */
  static async start(options: SupervisorOptions, start: StartOptions = {}): Promise<Supervisor> {
    const supervisor = new Supervisor(resolveOptions(options))
    const { signal } = start
    const onAbort = () => supervisor.#over.abort(signal!.reason)
    try {
      start.onCreate?.(supervisor)
      signal?.throwIfAborted()
      signal?.addEventListener('abort', onAbort)
      supervisor.#starting = supervisor.#start()
      await supervisor.#starting
      if (supervisor.#state !== 'starting') throw supervisor.#stopped('start')
      supervisor.#state = 'running'
      return supervisor
    } catch (error) {
      // That something could not be ended must not hide why it was to be.
      await supervisor.stop().catch((failure) => supervisor.#warn('stop-failed', String(failure), failure))
      throw error
    } finally {
      signal?.removeEventListener('abort', onAbort)
    }
  }

  get state(): SupervisorState {
    return this.#state
  }

  /** The engine in use; before one is chosen, `criu` or `spawn` as asked for. */
  get engine(): EngineName {
    return this.#engine?.name ?? (this.#options.engine === 'spawn' ? 'spawn' : 'criu')
  }

  /** Children that run, oldest first. */
  get children(): readonly Child[] {
    return [...this.#children]
  }

  /** Number of the generation that forks come from; 0 while there is none. */
  get generation(): number {
    return this.#succession?.number ?? 0
  }

  /** Number of the generation that forks come from until it is unpinned; undefined where none is pinned. */
  get pinned(): number | undefined {
    return this.#succession?.pinned
  }

  /** The children that the supervisor keeps running by itself. */
  get workers(): CrewState {
    return this.#crew?.state ?? { size: this.#options.workers.count, workers: [], outdated: 0 }
  }

  get pool(): PoolState {
    return this.#pool?.state ?? { size: this.#options.pool.size, parked: [], starting: 0 }
  }

  get template(): TemplateState | undefined {
    if (!this.#template) return undefined
    const { pid, status } = this.#template
    return { pid, running: status === undefined, readyMs: this.#readyMs, memory: status ? undefined : memoryUse(pid) }
  }

  /** All warnings so far, those of the start too. */
  get warnings(): readonly Warning[] {
    return [...this.#warnings]
  }

  /** The generations that this supervisor has made, oldest first; those that were pruned too. */
  generations(): readonly GenerationInfo[] {
    return [...this.#generations]
  }

  /** Why a generation is never chosen again; undefined where it may be. */
  whyRejected(number: number): string | undefined {
    return this.#succession?.whyNot(number)
  }

  /**
   * A new child. Resolves when it is continued and its pid is known.
   * @throws NEEDS_AGENT, RESTORE_FAILED, TIMEOUT, PIDS_EXHAUSTED, FDS_EXHAUSTED, CRASH_LOOP, STOPPED
   */
  async fork(request: ForkRequest = {}): Promise<Child> {
    this.#requireRunning('fork')
    const { stdio, resumption } = this.#plan(request)
    request.signal?.throwIfAborted()
    return this.#forkOn(stdio, resumption, request.signal)
  }

  #plan(request: ForkRequest): { stdio: StdioFds | undefined; resumption: Resumption } {
    const { stdio, size, input } = planFork(request, {
      stdio: this.#options.stdio,
      hasTerminal: this.#options.template.tty !== undefined,
      whyNoAgent: this.#whyNoAgent,
    })
    return { stdio, resumption: { size, input: { ...input, env: { ...this.#agents!.secrets, ...input.env } } } }
  }

  /** `isGood`: of the parked ones, which may be taken. */
  async #forkOn(
    stdio: StdioFds | undefined,
    resumption: Resumption,
    signal?: AbortSignal,
    isGood?: (child: Child) => boolean,
  ): Promise<Child> {
    await this.#waitForTurn(signal)
    const startedAt = performance.now()
    const claimed = stdio === undefined ? this.#pool?.claim(resumption, isGood) : undefined
    const child = claimed ?? (await this.#forkDirectly(() => this.#make(stdio), signal, resumption))
    if (claimed) this.#forks.fromPool++
    else this.#forks.direct++
    this.#adopt(child, performance.now() - startedAt)
    this.#workerForks?.serveChild(child)
    return child
  }

  /**
   * Changes how many children are kept parked.
   * @throws BAD_OPTION, STOPPED
   */
  resizePool(size: number): void {
    this.#requireRunning('resize the pool')
    if (!Number.isInteger(size) || size < 0) {
      throw new WarmforkError('BAD_OPTION', {
        tried: 'resize the pool',
        happened: `expected \`size\` to be a whole number from 0 on, got \`${size}\` (${typeof size})`,
      })
    }
    this.#pool?.resize(size)
  }

  /** Changes how many workers are kept running. @throws BAD_OPTION, STOPPED */
  resizeWorkers(count: number): void {
    this.#requireRunning('change the number of workers')
    if (!Number.isInteger(count) || count < 0) {
      throw new WarmforkError('BAD_OPTION', {
        tried: 'change the number of workers',
        happened: `expected \`count\` to be a whole number from 0 on, got \`${count}\` (${typeof count})`,
      })
    }
    this.#crew!.resize(count)
  }

  /**
   * Checkpoints a warmed child into a new generation, tries that, and has pool, workers and later forks come from it. The child
   * goes on with its work. A second call for the same child, or for any, joins one that is under way.
   * @throws REFORK_REFUSED, NOT_AT_REST, HOOK_FAILED, AGENT_LOST, CHILD_GONE, CHECKPOINT_FAILED, TRIAL_FAILED, DISK_FULL,
   * ENGINE_UNSUPPORTED, STOPPED: the generation in use stays in use
   */
  async refork(options: ReforkOptions = {}): Promise<GenerationInfo> {
    this.#requireRunning('refork')
    return this.#changes!.refork(options)
  }

  /**
   * Has forks come from an earlier generation again. The one in use is never chosen again.
   * @throws GENERATION_NOT_FOUND, GENERATION_CORRUPT, GENERATION_MISFIT, STOPPED
   */
  async rollback(options: RollbackOptions = {}): Promise<GenerationInfo> {
    this.#requireRunning('roll back')
    return this.#changes!.rollback(options)
  }

  /**
   * Has forks come from this generation until `unpin`: no refork is made by itself, and none that is asked for is used.
   * @throws GENERATION_NOT_FOUND, GENERATION_CORRUPT, GENERATION_MISFIT, STOPPED
   */
  async pin(number: number): Promise<GenerationInfo> {
    this.#requireRunning('pin a generation')
    return this.#changes!.pin(number)
  }

  /** Has forks come from the newest generation again. @throws STOPPED */
  async unpin(): Promise<void> {
    this.#requireRunning('unpin the generation')
    await this.#changes!.unpin()
  }

  /**
   * Figures of the supervisor and all its children.
   * @throws STOPPED
   */
  async stats(): Promise<SupervisorStats> {
    if (this.#state === 'stopped') throw this.#stopped('give figures')
    const children = await Promise.all(this.children.map((child) => child.stats().catch(() => undefined)))
    return {
      name: this.name,
      state: this.#state,
      engine: this.engine,
      pid: process.pid,
      command: this.#options.command,
      startedAt: this.#startedAt,
      uptimeMs: Date.now() - this.#startedAt.getTime(),
      generation: this.generation,
      pinned: this.pinned,
      reforkDecision: this.#changes?.decision,
      lastRefork: this.#changes?.lastRefork,
      template: this.template,
      pool: this.pool,
      workers: { size: this.workers.size, outdated: this.workers.outdated },
      children: children.filter((stats) => stats !== undefined),
      forks: { ...this.#forks },
    }
  }

  /** Ends all that the supervisor has made. May be called at any time and again: each call resolves when it is done. */
  stop(options: StopOptions = {}): Promise<void> {
    this.#stopping ??= this.#stop(options.graceMs ?? this.#options.template.stopTimeoutMs)
    return this.#stopping
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.stop()
  }

  async #start(): Promise<void> {
    const { pool } = this.#options
    const signal = this.#over.signal
    this.#identity = await resolveIdentity(this.#options.user, this.#options.group)
    signal.throwIfAborted()
    await this.#startGuard()
    signal.throwIfAborted()
    this.#boots = new Boot({
      options: this.#options,
      identity: this.#identity,
      mark: this.#mark,
      guard: () => this.#guard,
      agents: () => this.#agents,
      isForCriu: () => this.#engine?.name === 'criu',
    })
    this.#engine = await this.#openEngine()
    signal.throwIfAborted()
    await this.#waitForEarlier()
    this.#agents = await this.#openAgents()
    signal.throwIfAborted()

    this.#succession = await this.#openSuccession()
    const { reuse } = this.#options
    if (reuse !== false && this.engine === 'spawn') {
      this.#warn('reuse', 'the program is booted, since the spawn engine leaves nothing on disk')
    }
    const canReuse = reuse !== false && this.engine === 'criu'
    const isReused = canReuse && (await this.#phase('reuse', () => this.#restart(reuse)))
    if (!isReused) await this.#boot()
    signal.throwIfAborted()
    this.#serveWorkers(this.#template)
    this.#pool = new Pool({
      ...pool,
      make: () => this.#make(),
      warn: (kind, message, cause) => this.#warn(kind, message, cause),
    })
    this.#crew = new Crew({
      ...this.#options.workers,
      fork: () => this.#forkWorker(),
      isOutdated: (child) => child.generation !== this.generation,
      warn: (kind, message, cause) => this.#warn(kind, message, cause),
      onRolledOut: (replaced) => {
        this.#log.info(`${replaced} workers are replaced by children of generation ${this.generation}`)
        this.emit('rolledOut', replaced)
        this.#succession?.prune()
      },
    })
    this.#changes = this.#openChanges()
    await this.#phase('pool', () => Promise.all([this.#pool!.fill(), this.#crew!.start()]))
    await this.#endSpare()
  }

  #openChanges(): Changes {
    const changes = new Changes({
      engine: this.#engine!,
      succession: this.#succession!,
      options: this.#options,
      signal: this.#over.signal,
      children: () => this.children,
      childOf: (forked) => this.#childOf(forked),
      resumption: () => ({ input: { env: this.#agents!.secrets } }),
      requireRunning: (tried) => this.#requireRunning(tried),
      note: (generation) => this.#noteGeneration(generation),
      follow: async (isBad) => {
        this.#crashes.reset()
        void this.#crew?.rollOut()
        await this.#pool?.turnOver(isBad)
      },
      info: (message) => this.#log.info(message),
      warn: (kind, message, cause) => this.#warn(kind, message, cause),
    })
    changes.on('generation', (generation) => this.emit('generation', generation))
    changes.on('reforkDecision', (decision) => this.emit('reforkDecision', decision))
    changes.on('refork', (refork) => this.emit('refork', refork))
    changes.on('reforkFailed', (error) => this.emit('reforkFailed', error))
    changes.on('rollback', (to, from, reason) => this.emit('rollback', to, from, reason))
    return changes
  }

  /** Boots the template and takes the first generation of it. */
  async #boot(): Promise<void> {
    const { command, template: settings, ready, warmup } = this.#options
    const signal = this.#over.signal
    const template = await this.#phase('boot', async () => {
      this.#template = await this.#boots!.start()
      return this.#template
    })
    template.on('output', (stream, chunk) => this.emit('templateOutput', stream, chunk))
    await this.#phase('ready', () => untilReady(template, ready, command, signal))
    this.#readyMs = Date.now() - template.startedAt
    this.#log.info(`template=${this.name} pid=${template.pid} ready ms=${this.#readyMs}`)
    if (warmup) await this.#phase('warmup', () => this.#boots!.warm(template, signal))
    // A cold start carries nothing over that could be in hand.
    if (this.#engine!.name !== 'spawn') {
      await this.#phase('rest', () => untilAtRest(template, command, settings.restTimeoutMs, signal))
    }
    const generation = await this.#phase('checkpoint', () => this.#checkpoint(template))
    template.exited.then((status) => {
      this.#log.info(`template=${this.name} pid=${template.pid} exited ${statusWords(status)}`)
      this.emit('templateExit', status)
    })
    if (settings.afterCheckpoint === 'end') await template.end(settings.stopTimeoutMs)
    await this.#succession!.switchTo(generation.number)
    signal.throwIfAborted()
    this.emit('generation', generation)
  }

  /** Begins with a generation on disk; false where there is none that can be used. */
  async #restart(reuse: Exclude<ResolvedOptions['reuse'], false>): Promise<boolean> {
    const signal = this.#over.signal
    const [{ restart }, { bakedOptions, watch }] = await Promise.all([import('./restart.js'), import('./reuse.js')])
    const { command, cwd, ready, trial } = this.#options
    const uid = this.#identity?.uid ?? process.getuid?.() ?? 0
    const gid = this.#identity?.gid ?? process.getgid?.() ?? 0
    const declaredEnv = await this.#boots!.declaredEnv()
    const circumstances = { command, cwd, uid, gid, declaredEnv, options: bakedOptions(this.#options) }
    this.#origin = { ...circumstances, pid: 0, stdioInodes: [0n, 0n, 0n], channels: [] }
    const { generation, others, watched } = await restart({
      engine: this.#engine!,
      succession: this.#succession!,
      reuse,
      circumstances,
      watch: (known) => watch(this.#options, known, signal),
      tryOut: async (number) => {
        const resumption = { input: { env: this.#agents!.secrets } }
        const childOf = (forked: ForkedProcess) => this.#childOf(forked)
        await tryGeneration(number, { ...trial, engine: this.#engine!, ready, resumption, signal, childOf })
        await this.#succession!.approve(number)
      },
      firstFork: async () => {
        this.#requireSecretsTaker(this.#succession!.source!.channels)
        this.#spare = await this.#make()
      },
      warn: (message, cause) => this.#warn('reuse', message, cause),
    })
    this.#watched = watched
    if (generation === undefined) return false
    this.#log.info(`generation=${generation} is in use, without a boot`)
    for (const warning of this.#succession!.source!.generation.warnings) this.#warn('generation', warning)
    if (reuse.verify === 'later') this.#verifyLater(generation, others)
    return true
  }

  /** Reads what the start has believed: forks do not wait for it. */
  #verifyLater(number: number, others: readonly number[]): void {
    const signal = this.#over.signal
    const verified = sleep(VERIFY_DELAY_MS, undefined, { signal, ref: false })
      .then(() => this.#engine!.verify!(number, 'wholly', signal))
      .catch(async (error: unknown) => {
        if (signal.aborted || (error as WarmforkError).code !== 'GENERATION_CORRUPT') return
        const { happened } = error as WarmforkError
        this.#warn('reuse', `generation ${number} is damaged, and no more forks are made of it: ${happened}`, error)
        await this.#succession!.reject(number, happened)
        if (number !== this.generation || others.length === 0) return
        await this.rollback({ to: others[0]!, reason: happened })
      })
      .catch((error) => this.#warn('reuse', `no other generation could be used either: ${error}`, error))
    this.#inFlight.add(verified)
    void verified.then(() => this.#inFlight.delete(verified))
  }

  /** A supervisor of this name that was killed: its guard may still be ending what it made. */
  async #waitForEarlier(): Promise<void> {
    if (this.engine !== 'criu') return
    const { noteSupervisor, untilEarlierIsGone } = await import('./guard/earlier.js')
    const directory = join(this.store, this.name)
    await untilEarlierIsGone(directory, this.#over.signal)
    noteSupervisor(directory, this.#token)
  }

  async #forgetNote(): Promise<void> {
    const { forgetSupervisor } = await import('./guard/earlier.js')
    forgetSupervisor(join(this.store, this.name), this.#token)
  }

  async #openSuccession(): Promise<Succession> {
    const { store, name, keep } = this.#options
    const { Verdicts } = await import('./generations/verdicts.js')
    return new Succession({
      engine: this.#engine!,
      verdicts: this.engine === 'criu' ? Verdicts.read(join(store, name)) : undefined,
      keep,
      warn: (message, cause) => this.#warn('prune', message, cause),
    })
  }

  async #forkWorker(): Promise<Child> {
    const { stdio, resumption } = this.#plan({})
    // One of the generation before would be replaced at once.
    const isCurrent = (child: Child) => child.generation === this.generation
    const child = await this.#forkOn(stdio, resumption, undefined, isCurrent)
    // What nobody listens to, since its `child` event, is not kept: a full pipe would hold the worker up.
    const streams = stdio ? [] : child.isTTY ? [child.terminal] : [child.stdout, child.stderr]
    for (const stream of streams) if (stream.listenerCount('data') === 0) stream.resume()
    return child
  }

  async #phase<T>(phase: StartPhase, work: () => Promise<T>): Promise<T> {
    const startedAt = performance.now()
    const result = await work()
    this.#over.signal.throwIfAborted()
    this.emit('progress', phase, performance.now() - startedAt)
    return result
  }

  async #startGuard(): Promise<void> {
    const { runtimeDirectory, name } = this.#options
    const parent = join(runtimeDirectory, name)
    // Of this supervisor alone: another of the same name, which is about to be refused, must not touch it.
    this.#directory = join(parent, `run-${this.#token}`)
    try {
      mkdirSync(runtimeDirectory, { recursive: true, mode: 0o700 })
      for (const path of [parent, this.#directory]) mkdirSync(path, { recursive: true, mode: 0o700 })
      // A worker of another user enters, and cannot list.
      if (this.#identity) for (const path of [runtimeDirectory, parent, this.#directory]) chmodSync(path, 0o711)
    } catch (cause) {
      throw new WarmforkError('STORE_UNWRITABLE', {
        tried: `make the runtime directory ${this.#directory}`,
        happened: errnoOf(cause) ?? String(cause),
        remedy: 'Make it writable, or choose another `runtimeDirectory`.',
        cause,
      })
    }
    if (process.platform !== 'linux') {
      this.#warn('no-guard', 'on this platform nothing ends the children of a supervisor that is killed with SIGKILL')
      return
    }
    // Loaded here, since it does not load anywhere else than on Linux.
    const { Guard } = await import('./guard/guard.js')
    this.#guard = await Guard.start(this.#token, {
      onLost: (error) =>
        this.#warn('no-guard', `nothing ends the children of a supervisor that is killed: ${error.message}`, error),
    })
    this.#guard.removeAtEnd(this.#directory)
    // A control socket can be in it, or another supervisor of that name.
    this.#guard.removeAtEnd(parent, 'empty directory')
  }

  async #openEngine(): Promise<Engine> {
    const { engine } = this.#options
    if (engine === 'spawn') return this.#boots!.spawnEngine()
    try {
      if (process.platform !== 'linux') {
        throw new WarmforkError('CRIU_MISSING', {
          tried: 'use the criu engine',
          happened: `there is no CRIU for ${process.platform}`,
          remedy: 'Run on Linux to fork by restoring.',
        })
      }
      const { CriuEngine } = await import('./engines/criu/engine.js')
      const { name, store, orphans, identity, forkTimeoutMs } = this.#options
      return await CriuEngine.open({
        name,
        store,
        runtimeDirectory: this.#directory,
        env: { PATH: process.env.PATH ?? '/usr/sbin:/usr/bin:/sbin:/bin', [this.#mark]: '1' },
        mark: this.#mark,
        registry: this.#guard!,
        ...(this.#identity ? { worker: this.#identity } : {}),
        deathSignal: orphans === 'end',
        identity,
        forkTimeoutMs,
      })
    } catch (error) {
      const cannot = error instanceof WarmforkError && CRIU_CANNOT.has(error.code)
      if (engine === 'criu' || !cannot) throw error
      this.#warn('engine-spawn', `each fork is a cold start, since CRIU cannot be used here: ${error.message}`, error)
      return this.#boots!.spawnEngine()
    }
  }

  get #mark(): string {
    return `WARMFORK_ID_${this.#token}`
  }

  async #checkpoint(template: Template): Promise<GenerationInfo> {
    const { memory, descriptors, checkpointTimeoutMs } = this.#options
    let generation: GenerationInfo
    const agents = this.engine === 'criu' ? template.agents : undefined
    await this.#agents?.heard(template)
    const about = await this.#aboutSource()
    for (const warning of (await agents?.park('template', this.#options.hookTimeoutMs)) ?? [])
      this.#warn('agent', warning)
    let failure: unknown
    try {
      const source = { ...template.source(), ...about }
      this.#checkAgents(source)
      this.#origin = source
      generation = await this.#engine!.checkpoint(source, {
        memory,
        descriptors,
        timeoutMs: checkpointTimeoutMs,
        signal: this.#over.signal,
      })
    } catch (error) {
      failure = error
      // That it ended says more than what was seen of it.
      if (template.status) throw template.exitError('checkpoint the template', error)
      throw error
    } finally {
      agents?.resume(failure)
    }
    this.#noteGeneration(generation)
    return generation
  }

  /** What a later supervisor must know of the template to use a generation of it. */
  async #aboutSource(): Promise<Pick<SourceProcess, 'options' | 'watched'>> {
    if (this.engine !== 'criu') return {}
    const { asSource, bakedOptions, watch } = await import('./reuse.js')
    const options = bakedOptions(this.#options)
    const before = this.#watched
    if (!before) return { options }
    const { changes, changeWords, withUnknown } = await import('./watch.js')
    const found = changes(before.files, (await watch(this.#options, before.files, this.#over.signal)).files)
    if (found.length === 0) return { options, watched: asSource(before) }
    const words = changeWords(found).join(', ')
    this.#warn('reuse', `watched files changed during the boot, and no later start uses this generation: ${words}`)
    return { options, watched: asSource({ ...before, files: withUnknown(before.files, found) }) }
  }

  #noteGeneration(generation: GenerationInfo): void {
    this.#generations.push(generation)
    // The last ones are enough: a supervisor can run for years.
    if (this.#generations.length > MOST_GENERATIONS) this.#generations.shift()
    const { number, rssBytes, checkpointMs } = generation
    this.#log.info(
      `generation=${number} memory=${generation.memory} rss=${rssBytes} checkpoint ms=${checkpointMs.toFixed(0)}`,
    )
    for (const warning of generation.warnings) this.#warn('generation', warning)
  }

  /**
   * What forks will repeat or cannot bear, where no agent sees to it.
   * @throws NEEDS_AGENT where there are secrets to be handed over
   */
  #checkAgents(source: SourceProcess): void {
    const parked = this.#requireSecretsTaker(source.channels)
    if (this.engine !== 'criu') return
    const isFresh = this.#options.identity === 'fresh'
    const warnings = isFresh ? pidWarnings(source.pid, parked) : keptIdWarnings(source.pid, parked)
    for (const message of warnings) this.#warn('identity', message)
    for (const message of repeatWarnings(source.pid, parked)) this.#warn('repeats', message)
  }

  /**
   * @returns the ids of the processes whose agents wait for what a fork is given
   * @throws NEEDS_AGENT where there are secrets to be handed over, and nobody to take them
   */
  #requireSecretsTaker(channels: SourceProcess['channels']): Set<number> {
    const parked = new Set(channels.flatMap(({ pid, agent }) => (agent.parked ? [pid] : [])))
    if (Object.keys(this.#agents?.secrets ?? {}).length > 0 && parked.size === 0) {
      throw new WarmforkError('NEEDS_AGENT', {
        tried: 'withhold `template.secrets` from the template',
        happened: `${this.#whyNoAgent ?? 'its program runs no agent'}, and nobody could hand them to its forks`,
      })
    }
    return parked
  }

  /** Undefined where forks can be given something. */
  get #whyNoAgent(): string | undefined {
    // Forks of the spawn engine are booted, each with agents of its own.
    const live = this.engine === 'spawn' ? this.#template?.agents : undefined
    return this.#agents?.whyNone(this.#succession?.source?.channels ?? [], live)
  }

  #openAgents(): Promise<AgentDesk> {
    const { agent, env, template, hookTimeoutMs } = this.#options
    const others = this.#identity !== undefined && this.#identity.uid !== process.getuid?.()
    return AgentDesk.open({
      enabled: agent,
      env,
      secrets: template.secrets,
      directory: this.#directory,
      copyTo: others && this.#engine?.name === 'criu' ? join(this.store, this.name, 'agents') : undefined,
      hookTimeoutMs,
      removeAtEnd: (path) => this.#guard?.removeAtEnd(path),
      warn: (message) => this.#warn('agent', message),
    })
  }

  /** Serves what programs ask for through their agents. */
  #serveWorkers(template: Template | undefined): void {
    const { memory, descriptors, checkpointTimeoutMs, hookTimeoutMs, template: settings } = this.#options
    this.#workerForks = new WorkerForks({
      engine: this.#engine!,
      checkpoint: { memory, descriptors, timeoutMs: checkpointTimeoutMs },
      hookTimeoutMs,
      signal: this.#over.signal,
      fork: async (source, stdio, resumption) => {
        if (this.#state !== 'running' && this.#state !== 'starting') throw this.#stopped('fork')
        const startedAt = performance.now()
        const make = async () => this.#childOf(await source.fork({ stdio, signal: this.#over.signal }))
        const child = await this.#forkDirectly(make, undefined, resumption)
        this.#forks.direct++
        this.#adopt(child, performance.now() - startedAt)
        return child
      },
      warn: (message, cause) => this.#warn('agent', message, cause),
    })
    if (!template?.agents || settings.afterCheckpoint === 'end') return
    const { agents } = template
    agents.on('request', (request) => {
      if (request.type === 'message' && request.to === undefined)
        this.emit('templateMessage', payloadValue(request.data))
    })
    const { pid, exited } = template
    this.#workerForks.serve({ pid, agents, exited, source: () => template.source() })
  }

  /** A parked child. */
  async #make(stdio?: StdioFds): Promise<Child> {
    const spare = this.#spare
    if (!stdio && spare) {
      this.#spare = undefined
      if (spare.state === 'parked' && spare.generation === this.generation) return spare
      await spare.end({ graceMs: 0 })
      spare.close()
    }
    for (;;) {
      const forked = await this.#succession!.fork({ ...(stdio ? { stdio } : {}), signal: this.#over.signal })
      const child = this.#childOf(forked)
      // Where another generation came into use meanwhile, it is of yesterday before it has run.
      if (child.generation === this.generation || this.#state === 'stopping') return child
      await child.end({ graceMs: 0 })
      child.close()
    }
  }

  /** Where nobody took the first fork of a restart. */
  async #endSpare(): Promise<void> {
    const spare = this.#spare
    this.#spare = undefined
    await spare?.end({ graceMs: 0 })
    spare?.close()
  }

  #childOf(forked: ForkedProcess): Child {
    const { template, hookTimeoutMs } = this.#options
    const child = new Child(forked, { stopTimeoutMs: template.stopTimeoutMs, hookTimeoutMs, origin: this.#origin! })
    child.on('hooksFailed', (error) => this.#warn('hooks', error.message, error))
    if (child.agents) this.#agents?.watch(child.agents)
    return child
  }

  async #forkDirectly(
    make: () => Promise<Child>,
    signal: AbortSignal | undefined,
    resumption: Resumption,
  ): Promise<Child> {
    const making = make()
    const settled = making.then(
      () => {},
      () => {},
    )
    this.#inFlight.add(settled)
    settled.then(() => this.#inFlight.delete(settled))
    const interrupted = abortOf([this.#over.signal, signal])
    try {
      const child = await Promise.race([making, interrupted.promise])
      child.resume(resumption)
      return child
    } catch (error) {
      this.#forks.failed++
      // It may come yet, when nobody waits for it any more.
      const put = making.then(async (child) => {
        await child.end({ graceMs: 0 })
        child.close()
      })
      const ended = put.catch(() => {})
      this.#inFlight.add(ended)
      ended.then(() => this.#inFlight.delete(ended))
      throw this.#state === 'running' ? error : this.#stopped('fork')
    } finally {
      interrupted.off()
    }
  }

  #adopt(child: Child, ms: number): void {
    this.#children.add(child)
    this.#changes?.forked(child)
    if (this.#options.orphans === 'leave') for (const pid of child.sparedPids) this.#guard?.spare(pid)
    this.#log.info(`child pid=${child.pid} gen=${child.generation} forked ms=${ms.toFixed(1)}`)
    child.exit.then((status) => this.#ended(child, status))
    this.emit('child', child)
  }

  #ended(child: Child, status: ExitStatus): void {
    this.#children.delete(child)
    // It may have been the last that needed its generation.
    if (child.generation !== this.generation && this.#state === 'running') this.#succession?.prune()
    if (child.holdsDescriptors) {
      this.#holding.add(child)
      child.onReleased = () => this.#holding.delete(child)
    }
    this.#log.info(`child pid=${child.pid} gen=${child.generation} exited ${statusWords(status)}`)
    if (this.#state === 'running') {
      const ranMs = Date.now() - (child.forkedAt?.getTime() ?? 0)
      if (this.#crashes.ended(status, ranMs) && this.#crashes.isDelaying) {
        const what = this.#crashes.isLoop ? 'no more forks are made' : 'further forks are delayed'
        this.#warn('crashes', `${this.#crashes.crashes} children in a row crashed right after their fork, ${what}`)
      }
    }
    this.emit('childExit', child, status)
  }

  /** @throws CRASH_LOOP */
  async #waitForTurn(signal: AbortSignal | undefined): Promise<void> {
    const delayMs = this.#crashes.isLoop ? 0 : this.#crashes.takeTurn()
    if (delayMs > 0) {
      const interrupted = abortOf([this.#over.signal, signal])
      const over = new AbortController()
      try {
        await Promise.race([sleep(delayMs, undefined, { signal: over.signal }), interrupted.promise])
      } catch (error) {
        throw this.#state === 'running' ? error : this.#stopped('fork')
      } finally {
        over.abort()
        interrupted.off()
      }
    }
    if (!this.#crashes.isLoop) return
    throw new WarmforkError('CRASH_LOOP', {
      tried: 'fork',
      happened: `${this.#crashes.crashes} children in a row crashed within ${this.#options.crashes.soonMs} ms of their fork`,
    })
  }

  async #stop(graceMs: number): Promise<void> {
    this.#state = 'stopping'
    this.#over.abort(this.#stopped('go on'))
    await this.#starting.catch(() => {})
    const failures: unknown[] = []
    const step = async (work: () => Promise<unknown> | undefined) => {
      try {
        await work()
      } catch (error) {
        // One thing that cannot be ended must not keep the others.
        failures.push(error)
      }
    }
    await step(() => this.#changes?.close())
    await step(() => this.#crew?.close())
    await step(() => this.#pool?.close())
    await step(() => this.#endSpare())
    while (this.#inFlight.size > 0) await Promise.all(this.#inFlight)
    const leave = this.#options.orphans === 'leave'
    const ending = [
      ...(leave ? [] : this.#children),
      ...(this.#template && !this.#template.status ? [this.#template] : []),
    ]
    await step(() => endTrees(ending, graceMs))
    for (const child of leave ? this.#children : this.#holding) {
      if (leave) child.release()
      else child.close()
    }
    await step(() => this.#workerForks?.close())
    await step(() => this.#succession?.close())
    await step(() => this.#engine?.close())
    await step(() => this.#agents?.close())
    // It ends what is left, and removes our directory.
    await step(() => this.#guard?.end())
    await step(() => this.#engine?.settled?.())
    if (this.#engine?.name === 'criu') await step(() => this.#forgetNote())
    this.#removeDirectories()
    clearInterval(this.#keepAlive)
    this.#state = 'stopped'
    this.emit('stopped')
    if (failures.length > 0) throw failures[0]
  }

  #removeDirectories(): void {
    if (!this.#directory) return
    rmSync(this.#directory, { recursive: true, force: true })
    try {
      rmdirSync(dirname(this.#directory))
    } catch {
      // A control socket is in it, or another supervisor of that name.
    }
  }

  #warn(kind: string, message: string, cause?: unknown): void {
    const warning: Warning = {
      kind,
      message,
      ...(cause === undefined ? {} : { cause }),
      ...(cause instanceof WarmforkError ? { code: cause.code } : {}),
    }
    this.#warnings.push(warning)
    // The last ones are enough: a supervisor can run for years.
    if (this.#warnings.length > MOST_WARNINGS) this.#warnings.shift()
    this.#log.warn(`${kind}: ${message}`)
    this.emit('warning', warning)
  }

  #requireRunning(tried: string): void {
    if (this.#state === 'running') return
    if (this.#state !== 'starting') throw this.#stopped(tried)
    throw new WarmforkError('STOPPED', {
      tried,
      happened: 'the supervisor has not started yet',
      remedy: 'Wait for `Supervisor.start`.',
    })
  }

  #stopped(tried: string): WarmforkError {
    return new WarmforkError('STOPPED', { tried, happened: 'the supervisor was stopped' })
  }
}

/** First the children that were waited for. */
const VERIFY_DELAY_MS = 1_000

/** How many generations are remembered. */
const MOST_GENERATIONS = 1_000

/** How many warnings are kept. */
const MOST_WARNINGS = 100

function levelLogger(level: string): Logger {
  // stdout is the embedder's.
  return level === 'silent' ? pino({ level }) : pino({ level, name: 'warmfork' }, destination({ dest: 2, sync: true }))
}

function statusWords({ code, signal }: ExitStatus): string {
  return `code=${code} signal=${signal}`
}

/** A promise that rejects with the reason of the first signal that is aborted, without leaving listeners behind. */
function abortOf(signals: readonly (AbortSignal | undefined)[]): { promise: Promise<never>; off: () => void } {
  const stops: (() => void)[] = []
  const promise = new Promise<never>((_, reject) => {
    for (const signal of signals) {
      if (!signal) continue
      const onAbort = () => reject(signal.reason)
      if (signal.aborted) onAbort()
      signal.addEventListener('abort', onAbort)
      stops.push(() => signal.removeEventListener('abort', onAbort))
    }
  })
  promise.catch(() => {})
  return {
    promise,
    off: () => {
      for (const stop of stops) stop()
    },
  }
}
