/**
 * What is said over the control socket: one JSON object a line. This table is all that the two sides share; it knows no
 * socket and no supervisor, and stays light, since every `warmfork fork` loads it.
 *
 * Both sides begin with a hello that names the protocol's version. Then the client sends requests `{id, method, params}` and
 * gets, for each, any number of `{id, event}` and at last `{id, result}` or `{id, error}`. An error without an id concerns
 * the connection, which ends after it.
 */
import type { ChildStats } from '../child.js'
import type { EngineName, MemoryMode } from '../engines/engine.js'
import { ERROR_CODES, type ErrorCode, WarmforkError } from '../errors.js'
import type { MemoryUse } from '../linux/proc.js'
import type { ExitStatus } from '../linux/reaper.js'
import type { ReforkDecision } from '../refork/observation.js'
import type { SupervisorState, SupervisorStats } from '../supervisor.js'
import type { TerminalSize } from '../terminal.js'

/** Changes with every change that the other side could misunderstand. */
export const PROTOCOL = 1

/** Longest line that is read. The longest that is needed (a status with 1,000 children) is 300 KiB. */
export const MAX_LINE_BYTES = 4 * 1024 * 1024

/** Characters of a reason: it stands in tables. */
const MAX_REASON = 1_000

/** What the supervisor says of itself at once. */
export interface Hello {
  readonly protocol: number
  /** Of warmfork. */
  readonly version: string
  readonly name: string
  readonly pid: number
  /** Where its generations are: the root, which holds one directory for each name. */
  readonly store: string
}

export interface GenerationStatus {
  readonly number: number
  /** ISO 8601. */
  readonly createdAt: string
  /** The generation whose child it was taken of; null for one of a template. */
  readonly parent: number | null
  /** How many reforks lie between it and the template. */
  readonly reforks: number
  /** Why it was made, where somebody said so. */
  readonly reason?: string
  readonly rssBytes: number
  readonly sizeBytes: number
  readonly memory: MemoryMode
  readonly checkpointMs: number
  readonly warnings: readonly string[]
}

export interface WarningStatus {
  readonly kind: string
  readonly message: string
}

export interface ChildStatus extends ChildStats {
  /** `worker`: the supervisor keeps it running by itself; `child`: somebody asked for it. */
  readonly role: 'worker' | 'child' | 'parked'
  /** Whether forks come from another generation by now. */
  readonly outdated: boolean
}

/** `LastRefork` without what JSON cannot hold. */
export interface LastReforkStatus {
  /** ISO 8601. */
  readonly at: string
  readonly reason: string
  /** Of the child that it was taken of, or was to be; null where none was found. */
  readonly pid: number | null
  /** The one that it made; null where it failed. */
  readonly generation: number | null
  /** Why it failed. */
  readonly error: string | null
}

/** `SupervisorStats` without what JSON cannot hold. */
export interface Status {
  readonly name: string
  readonly pid: number
  readonly version: string
  readonly state: SupervisorState
  readonly engine: EngineName
  readonly command: readonly string[]
  readonly startedAt: string
  readonly uptimeMs: number
  /** Number of the generation that forks come from; 0 while there is none. */
  readonly generation: number
  readonly generations: readonly GenerationStatus[]
  readonly template: {
    readonly pid: number
    readonly running: boolean
    readonly readyMs: number
    readonly memory: MemoryUse | null
  } | null
  /** The one that forks come from until it is unpinned; null where none is pinned. */
  readonly pinned: number | null
  /** What the policy of reforks decided last; null where there is none. */
  readonly reforkDecision: ReforkDecision | null
  /** The one that was made last, or came to nothing; null where there was none. */
  readonly lastRefork: LastReforkStatus | null
  readonly pool: { readonly size: number; readonly starting: number }
  /** Those that the supervisor keeps running by itself: how many are to be, and which of the children they are. */
  readonly workers: { readonly size: number; readonly outdated: number; readonly pids: readonly number[] }
  /** The parked ones first, then those that run, each oldest first. */
  readonly children: readonly ChildStatus[]
  readonly forks: SupervisorStats['forks']
  readonly warnings: readonly WarningStatus[]
}

/** What a fork is given, for its program's agent. */
export interface ForkInputParams {
  readonly args?: readonly string[]
  /** `null` removes a variable. */
  readonly env?: Readonly<Record<string, string | null>>
  readonly cwd?: string
  readonly data?: unknown
}

/** The methods: what each takes, tells meanwhile and gives. */
export interface Methods {
  status: { params: Record<string, never>; event: never; result: Status }
  /**
   * A child on the standard streams of the client's process. The result comes when the child has ended; where the client's
   * connection ends before that, the child gets SIGHUP. With `tty` the child has a terminal of its own, of that size, whose other
   * side is the client's terminal (its 0 and 1). That one is in raw mode as long as the child runs; `modes` in the event are those
   * that it had before (the kernel's `struct termios` in base64), should the supervisor not be there to set them again.
   */
  fork: {
    params: { tty?: TerminalSize; input?: ForkInputParams }
    event: { pid: number; generation: number; modes?: string }
    result: ExitStatus
  }
  /** Sends a signal to the child of a `fork` that was asked for on this connection; it waits for a child that is not there yet. */
  signal: { params: { request: number; signal: NodeJS.Signals }; event: never; result: { delivered: boolean } }
  /** Gives the terminal of the child of a `fork` another size. */
  resize: { params: { request: number } & TerminalSize; event: never; result: { delivered: boolean } }
  /** Makes a generation of a child (`from`, its pid; default: the one with the most requests), and goes over to it. */
  refork: {
    params: { from?: number; reason?: string }
    event: never
    /** `inUse`: whether forks come from it, which they do not where another is pinned. */
    result: { generation: GenerationStatus; inUse: boolean; pid: number; restMs: number; standstillMs: number }
  }
  /** Goes back to an earlier generation. */
  rollback: { params: { to?: number; reason?: string }; event: never; result: { generation: number; from: number } }
  /** Stays with a generation; `null`: goes back to the newest. */
  pin: { params: { generation: number | null }; event: never; result: { generation: number } }
  /** Changes how many workers are kept running. */
  workers: { params: { count: number }; event: never; result: { count: number } }
  /** Ends the supervisor; the result comes when all that it had made has ended. */
  stop: { params: { graceMs?: number }; event: never; result: Record<string, never> }
}
export type MethodName = keyof Methods

/** Reads the params of each method; undefined where they are not what the method takes. */
export const PARAMS: {
  readonly [M in MethodName]: (params: Record<string, unknown>) => Methods[M]['params'] | undefined
} = {
  status: (params) => (hasOnly(params) ? {} : undefined),
  fork: (params) => {
    const { tty, input } = params
    if (!hasOnly(params, 'tty', 'input')) return undefined
    if (input !== undefined && !isInput(input)) return undefined
    const given = input === undefined ? {} : { input }
    if (tty === undefined) return given
    return isObject(tty) && hasOnly(tty, 'columns', 'rows') && isSize(tty) ? { tty, ...given } : undefined
  },
  signal: (params) => {
    const { request, signal } = params
    if (!hasOnly(params, 'request', 'signal') || !isId(request)) return undefined
    return isSignal(signal) ? { request, signal } : undefined
  },
  resize: (params) => {
    const { request, columns, rows } = params
    if (!hasOnly(params, 'request', 'columns', 'rows') || !isId(request)) return undefined
    const size = { columns, rows }
    return isSize(size) ? { request, ...size } : undefined
  },
  refork: (params) => {
    const { from, reason } = params
    if (!hasOnly(params, 'from', 'reason') || !isReason(reason)) return undefined
    if (from !== undefined && !isNumber(from)) return undefined
    return { ...(from === undefined ? {} : { from }), ...(reason === undefined ? {} : { reason }) }
  },
  rollback: (params) => {
    const { to, reason } = params
    if (!hasOnly(params, 'to', 'reason') || !isReason(reason)) return undefined
    if (to !== undefined && !isNumber(to)) return undefined
    return { ...(to === undefined ? {} : { to }), ...(reason === undefined ? {} : { reason }) }
  },
  pin: (params) => {
    const { generation } = params
    if (!hasOnly(params, 'generation')) return undefined
    return generation === null || isNumber(generation) ? { generation } : undefined
  },
  workers: (params) => {
    const { count } = params
    return hasOnly(params, 'count') && (count === 0 || isNumber(count)) ? { count: count as number } : undefined
  },
  stop: (params) => {
    const { graceMs } = params
    if (!hasOnly(params, 'graceMs')) return undefined
    if (graceMs === undefined) return {}
    return typeof graceMs === 'number' && graceMs >= 0 && graceMs < 2 ** 31 ? { graceMs } : undefined
  },
}

/** The signals that can be passed on to a child. */
export const PASSED_SIGNALS = [
  'SIGHUP',
  'SIGINT',
  'SIGQUIT',
  'SIGTERM',
  'SIGUSR1',
  'SIGUSR2',
  'SIGCONT',
  'SIGWINCH',
] as const satisfies NodeJS.Signals[]

const isSignal = (value: unknown): value is NodeJS.Signals => (PASSED_SIGNALS as readonly unknown[]).includes(value)

const isNumber = (value: unknown): value is number => Number.isSafeInteger(value) && (value as number) > 0
const isReason = (value: unknown): value is string | undefined =>
  value === undefined || (typeof value === 'string' && value.length <= MAX_REASON)

function isInput(value: unknown): value is ForkInputParams {
  if (!isObject(value) || !hasOnly(value, 'args', 'env', 'cwd', 'data')) return false
  const { args = [], env = {}, cwd = '' } = value
  const isText = (text: unknown) => typeof text === 'string'
  return (
    Array.isArray(args) &&
    args.every(isText) &&
    isObject(env) &&
    Object.values(env).every((text) => text === null || isText(text)) &&
    isText(cwd)
  )
}

function isSize(size: { columns?: unknown; rows?: unknown }): size is TerminalSize {
  const isCells = (value: unknown) => Number.isInteger(value) && (value as number) >= 1 && (value as number) <= 65_535
  return isCells(size.columns) && isCells(size.rows)
}

function hasOnly(params: Record<string, unknown>, ...keys: string[]): boolean {
  return Object.keys(params).every((key) => keys.includes(key))
}

export interface Request {
  readonly id: number
  readonly method: MethodName
  readonly params: Record<string, unknown>
}

export type ServerMessage =
  | { hello: Hello }
  | { id: number; event: unknown }
  | { id: number; result: unknown }
  | { id?: number; error: Record<string, unknown> }

/** Ids of requests are chosen by the client. */
export const isId = (value: unknown): value is number => Number.isSafeInteger(value) && (value as number) >= 0

export const isObject = (value: unknown): value is Record<string, unknown> =>
  typeof value === 'object' && value !== null && !Array.isArray(value)

/** The error for a message that is not of this protocol. */
export function badMessage(happened: string, remedy?: string): WarmforkError {
  return new WarmforkError('BAD_OPTION', {
    tried: 'read from the control socket',
    happened,
    remedy: remedy ?? 'Speak to it with `warmfork`; the lines are described in its protocol.',
  })
}

/** An error that came over the socket, as one of ours. */
export function errorFrom(json: Record<string, unknown>): WarmforkError {
  const text = (key: string, fallback: string) => (typeof json[key] === 'string' ? (json[key] as string) : fallback)
  const code = text('code', '')
  return new WarmforkError(code in ERROR_CODES ? (code as ErrorCode) : 'BAD_OPTION', {
    tried: text('tried', 'do it'),
    happened: text('happened', text('message', 'the supervisor gave no reason')),
    ...(typeof json.remedy === 'string' ? { remedy: json.remedy } : {}),
    ...(typeof json.output === 'string' ? { output: json.output } : {}),
  })
}
