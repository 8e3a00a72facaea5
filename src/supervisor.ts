/**
 * The supervisor: template → generations → pool → children. It ties the parts together and ends what it has made; it knows no
 * image, no CRIU and no command line.
 */
import { EventEmitter } from 'node:events'
import type { Child, ChildStats, EndOptions } from './child.js'
import type { EngineName, GenerationInfo } from './engines/engine.js'
import type { ErrorCode } from './errors.js'
import type { MemoryUse } from './linux/proc.js'
import type { ExitStatus } from './linux/reaper.js'
import type { StdioOption, SupervisorOptions } from './options.js'
import type { PoolState } from './pool.js'

export type SupervisorState = 'starting' | 'running' | 'stopping' | 'stopped'

/** The steps of a start, in order. `rest` waits for the template to have nothing in hand, `pool` for the first parked children. */
export type StartPhase = 'boot' | 'ready' | 'warmup' | 'rest' | 'checkpoint' | 'pool'

/** Something that goes on working, but not as the user may think. */
export interface Warning {
  /** Names the kind: `engine-spawn`, `memory-copy`, `refill-failed`, `stray-resume`, `crashes`, `parked-ended`. */
  readonly kind: string
  /** What is the case, why, and what to do. */
  readonly message: string
  readonly code?: ErrorCode
  readonly cause?: unknown
}

export interface SupervisorEvents {
  /** A step of the start is done, and took that long. */
  progress: [phase: StartPhase, elapsedMs: number]
  warning: [warning: Warning]
  /** A child was continued and is the user's now. */
  child: [child: Child]
  childExit: [child: Child, status: ExitStatus]
  generation: [generation: GenerationInfo]
  templateOutput: [stream: 'stdout' | 'stderr', chunk: Buffer]
  templateExit: [status: ExitStatus]
  stopped: []
}

export interface StartOptions {
  /** Ends the start, with all that it has made; `start` rejects with the signal's reason. */
  signal?: AbortSignal
  /** Called with the supervisor before anything else is done, so that the events of the start can be listened to. */
  onCreate?: (supervisor: Supervisor) => void
}

export interface ForkRequest {
  /**
   * Descriptors go past the pool: the fork is made when it is asked for. They stay the caller's to close.
   * @default The supervisor's `stdio`
   */
  stdio?: StdioOption
  /** Gives up waiting for the fork. */
  signal?: AbortSignal
  /** Not before agents: NEEDS_AGENT. */
  args?: readonly string[]
  /** Not before agents: NEEDS_AGENT. */
  env?: Readonly<Record<string, string>>
  /** Not before agents: NEEDS_AGENT. */
  cwd?: string
  /** Not before agents: NEEDS_AGENT. */
  data?: unknown
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
  readonly pool: PoolState
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

/**
 * Boots a program once and forks it from then on. It keeps the event loop alive until it is stopped.
 *
 * ```js
 * await using supervisor = await Supervisor.start({ command: ['node', 'app.js'], ready: { output: /ready/ }, pool: { size: 4 } })
 * const child = await supervisor.fork()
 * ```
 */
export declare class Supervisor extends EventEmitter<SupervisorEvents> {
  /**
   * Boots the template, checkpoints it and fills the pool. Resolves when forks can be had.
   * @throws BAD_OPTION, TEMPLATE_START_FAILED, TEMPLATE_EXITED, TEMPLATE_NOT_READY, WARMUP_FAILED, NOT_AT_REST, CHECKPOINT_FAILED,
   * the errors of the store and those of a first fork
   */
  static start(options: SupervisorOptions, start?: StartOptions): Promise<Supervisor>
  readonly name: string
  get state(): SupervisorState
  /** The engine in use. */
  get engine(): EngineName
  /** Children that run, oldest first. */
  get children(): readonly Child[]
  /** Number of the generation that forks come from. */
  get generation(): number
  get pool(): PoolState
  get template(): TemplateState | undefined
  /** All warnings so far, those of the start too. */
  get warnings(): readonly Warning[]
  readonly runtimeDirectory: string
  readonly store: string
  /** The generations that this supervisor has made, oldest first. */
  generations(): readonly GenerationInfo[]
  /**
   * A new child. Resolves when it is continued and its pid is known.
   * @throws NEEDS_AGENT, RESTORE_FAILED, TIMEOUT, PIDS_EXHAUSTED, FDS_EXHAUSTED, CRASH_LOOP, STOPPED
   */
  fork(request?: ForkRequest): Promise<Child>
  stats(): Promise<SupervisorStats>
  /** Ends all that the supervisor has made. May be called at any time and again: each call resolves when it is done. */
  stop(options?: StopOptions): Promise<void>
  [Symbol.asyncDispose](): Promise<void>
}
export type { EndOptions }
