/**
 * What a supervisor can be told, its defaults, and the check of it. The types carry the documentation; the schema holds
 * what comes from configuration files and plain JavaScript to the same rules. This file starts nothing and reads no disk.
 */
import { createHash } from 'node:crypto'
import { basename, extname, resolve } from 'node:path'
import type { Logger } from 'pino'
import { z } from 'zod'
import type { Child } from './child.js'
import { defaultRuntimeDirectory } from './control/runtime-directory.js'
import type { DescriptorPolicy } from './descriptors/kinds.js'
import { type DescriptorPolicies, whyNoPolicy } from './descriptors/policies.js'
import type { IdentityMode, MemoryMode } from './engines/engine.js'
import { WarmforkError } from './errors.js'
import { defaultRoot } from './generations/directories.js'
import { REFORK_KEYS, type ReforkSetting, reforkSchema } from './refork/policy.js'
import type { TerminalSize } from './terminal.js'

/** What a condition or a warm-up of the embedder's sees of the template. */
export interface TemplateView {
  /** Process id of the command that was started. */
  readonly pid: number
  /** The last 64 KiB of what it wrote to stdout and stderr, in the order in which it was read. */
  readonly output: string
  /** Aborted when the template ends, the time-out passes or the supervisor stops. */
  readonly signal: AbortSignal
}

interface Timed {
  /**
   * How long it may take, in milliseconds. Exceeding it is TEMPLATE_NOT_READY.
   * @default `template.bootTimeoutMs`
   */
  timeoutMs?: number
}

/** Ready when a line of the output matches. */
export interface ReadyByOutput extends Timed {
  /** A regular expression, or a text that the line contains. */
  output: RegExp | string
  /** @default 'both' */
  stream?: 'stdout' | 'stderr' | 'both'
}

/** Ready when a TCP port accepts a connection. */
export interface ReadyByPort extends Timed {
  port: number
  /** @default '127.0.0.1' */
  host?: string
}

/** Ready when a GET of the URL is answered with a status from 200 to 299. */
export interface ReadyByHttp extends Timed {
  http: string
}

/** Ready when the file exists. A file that exists before the start would say nothing: then its time of change has to be newer. */
export interface ReadyByFile extends Timed {
  /** Relative to the command's `cwd`. */
  file: string
}

/** Ready after a time, in milliseconds. Give another condition where there is one: boots differ. */
export interface ReadyByDelay extends Timed {
  delayMs: number
}

/**
 * Ready when neither output nor (on Linux) notable CPU use of its processes was seen for this time, in milliseconds. A program
 * that waits for something outside, a database for example, looks idle too.
 */
export interface ReadyByIdleness extends Timed {
  idleMs: number
}

/** Called again each 50 ms until it gives something else than `false`. A rejection is TEMPLATE_NOT_READY with it as `cause`. */
// biome-ignore lint/suspicious/noConfusingVoidType: a condition that resolves without a value is met.
export type ReadyFunction = (template: TemplateView) => boolean | void | Promise<boolean | void>

/** Ready when the program says so through its agent (`worker.ready()`). */
export interface ReadyByAgent extends Timed {
  agent: true
}

/** Ready when the function says so. */
export interface ReadyByFunction extends Timed {
  check: ReadyFunction
}

export type ReadyOption =
  | ReadyByOutput
  | ReadyByPort
  | ReadyByHttp
  | ReadyByFile
  | ReadyByDelay
  | ReadyByIdleness
  | ReadyByAgent
  | ReadyByFunction
  | ReadyFunction

interface TimedWarmup {
  /**
   * How long the warm-up may take, in milliseconds. Exceeding it is WARMUP_FAILED.
   * @default 60_000
   */
  timeoutMs?: number
}

/** A command that is run when the template is ready; a status other than 0 is WARMUP_FAILED. */
export interface WarmupByCommand extends TimedWarmup {
  /** Run in the template's `cwd` with its environment and `WARMFORK_TEMPLATE_PID`. */
  command: readonly [string, ...string[]]
}

/** GET requests. An answer with status 400 or above, or none, is WARMUP_FAILED. All connections are closed afterwards. */
export interface WarmupByHttp extends TimedWarmup {
  http: string | readonly string[]
  /**
   * How often each URL is asked for.
   * @default 10
   */
  times?: number
  /**
   * How many requests are under way at once.
   * @default 2
   */
  concurrency?: number
}

export type WarmupFunction = (template: TemplateView) => unknown

/** A function of the embedder's; its rejection is WARMUP_FAILED. */
export interface WarmupByFunction extends TimedWarmup {
  run: WarmupFunction
}

export type WarmupOption = WarmupByCommand | WarmupByHttp | WarmupByFunction | WarmupFunction

export interface TemplateOptions {
  /**
   * Variables of the environment that the template is booted without and each fork gets: what must not be in an image. Needs an agent
   * in the program.
   * @default []
   */
  secrets?: readonly string[]
  /**
   * Whether the template goes on after the checkpoint, or is ended then.
   * @default 'continue'
   */
  afterCheckpoint?: 'continue' | 'end'
  /**
   * From the start of the command to its readiness, in milliseconds.
   * @default 60_000
   */
  bootTimeoutMs?: number
  /**
   * How long the checkpoint waits for the template to have nothing in hand, in milliseconds. Exceeding it is NOT_AT_REST.
   * @default 10_000
   */
  restTimeoutMs?: number
  /**
   * From SIGTERM to SIGKILL, in milliseconds.
   * @default 5_000
   */
  stopTimeoutMs?: number
  /**
   * Boots it on a terminal, of 80 columns and 24 rows or of the size given, and gives each fork a terminal of its own. Linux only.
   * @default false
   */
  tty?: boolean | TerminalSize
}

export interface PoolOptions {
  /**
   * How many children are kept parked. 0: each fork is made when it is asked for.
   * @default 1, or 0 where `stdio` is not 'pipe'
   */
  size?: number
  /**
   * A child that was parked for longer is replaced, since its monotonic clock jumps by that time when it is continued. In milliseconds.
   * @default 60_000
   */
  maxParkedMs?: number
  /**
   * How many children are made at once to refill the pool.
   * @default 2
   */
  refillConcurrency?: number
}

/**
 * When to stop forking because children crash (SIGSEGV, SIGBUS, SIGILL, SIGABRT, SIGFPE) right after their fork. All children share
 * one address layout, as after `fork(2)`: whoever can crash them one by one can guess it byte by byte, unless forks become slow.
 */
export interface CrashOptions {
  /**
   * A crash counts where the child ran for less than this, in milliseconds.
   * @default 1_000
   */
  soonMs?: number
  /**
   * From this many crashes in a row on, forks are delayed: by 100 ms, and 1.5 times more at each further crash, up to 15 s.
   * @default 5
   */
  delayAfter?: number
  /**
   * From this many crashes in a row on, `fork()` gives CRASH_LOOP. 16 is PM2's `max_restarts`.
   * @default 16
   */
  giveUpAfter?: number
}

/** The workers that the supervisor keeps running by itself. */
export interface WorkerOptions {
  /** How many. */
  count: number
  /**
   * How many are replaced at once by children of a newer generation; 0 for a tenth of them, rounded up.
   * @default 0
   */
  replaceAtOnce?: number
  /**
   * How long a worker that is replaced may take to come to rest, in milliseconds; then it is ended with what it has in hand.
   * @default 30_000
   */
  restTimeoutMs?: number
}

/** A check of the embedder's: it throws, or rejects, where the generation is bad. `ports`: where the child listens, by the port that its program asked for. */
export type TrialCheck = (
  child: Child,
  about: { readonly ports: ReadonlyMap<number, number>; readonly signal: AbortSignal },
) => unknown

/** How a generation that a refork made is tried before it is used. */
export interface TrialOptions {
  /**
   * How long its first fork may take to be ready and to pass, in milliseconds.
   * @default 10_000
   */
  timeoutMs?: number
  /**
   * How long it has to live on after that, in milliseconds.
   * @default 200
   */
  settleMs?: number
  /** What it has to pass beside the `ready` condition, as far as that can be asked again (`port`, `http`, a function). */
  check?: TrialCheck
}

/** When a generation that a refork made is rolled back by itself: more than `crashes` of its first `children` crash. */
export interface CanaryOptions {
  /** @default 10 */
  children?: number
  /** @default 2 */
  crashes?: number
}

/** How a supervisor begins with a generation that an earlier one has left, in place of a boot. docs/reforking.md says more. */
export interface ReuseOptions {
  /**
   * The application's own files, as globs relative to `cwd`, `!` before those that are left out: where one was changed, added or removed
   * since the program read them, the generation is not used. The first file that the command names is watched in any case.
   * @default Source and configuration by their usual names, but for `node_modules`, `vendor` and the like
   */
  watch?: readonly string[]
  /**
   * What is done where generations are there and none can be used: the program is booted (`cold`), or the start fails with
   * GENERATION_MISFIT.
   * @default 'cold'
   */
  onMismatch?: 'cold' | 'error'
  /**
   * When the memory of a generation is read as a whole and compared with its checksums: `later`, in the background while it
   * serves, or `before` it serves (0.3 s for 500 MiB that are cached). Everything else is compared before in either case.
   * @default 'later'
   */
  verify?: 'later' | 'before'
}

/** What a child's 0, 1 and 2 are: pipes of its own, the supervisor's own descriptors, or the caller's. */
export type StdioOption = 'pipe' | 'inherit' | readonly [stdin: number, stdout: number, stderr: number]

export type LogLevel = 'fatal' | 'error' | 'warn' | 'info' | 'debug' | 'trace' | 'silent'

export interface SupervisorOptions {
  /** The program and its arguments, given to it byte for byte: no shell. */
  command: readonly [string, ...string[]]
  /**
   * Where the command is started.
   * @default `process.cwd()`
   */
  cwd?: string
  /**
   * Environment of the template, and so of all its children. `undefined` values are left out.
   * @default `process.env`
   */
  env?: Readonly<Record<string, string | undefined>>
  /**
   * Names the supervisor, its part of the store and its control socket. Letters, digits, `.`, `_` and `-`, at most 64.
   * @default The last parts of `cwd` and command with a short hash of both, `shop-server-1f0c9a`
   */
  name?: string
  /**
   * The directory of the generations; it must be on a file system that allows `exec`.
   * @default `$WARMFORK_STORE`, `/var/lib/warmfork` for root, else `$XDG_STATE_HOME/warmfork` or `~/.local/state/warmfork`
   */
  store?: string
  /**
   * The directory of sockets and of what lives no longer than the supervisor.
   * @default `/run/warmfork` for root, else `$XDG_RUNTIME_DIR/warmfork` or `warmfork-UID` in the temporary directory
   */
  runtimeDirectory?: string
  /**
   * `criu` forks by restoring, `spawn` starts the command anew for each fork. `auto` takes criu where it can work, else spawn, with a warning.
   * @default 'auto'
   */
  engine?: 'auto' | 'criu' | 'spawn'
  /**
   * How children get their memory: `cow` shares it copy-on-write, `copy` copies it. `auto` copies where sharing would not be safe.
   * @default 'auto'
   */
  memory?: MemoryMode | 'auto'
  /**
   * `fresh` gives each fork process and thread ids of its own. `namespace` gives it a pid namespace of its own, in which it keeps those of
   * the template: for programs that cannot bear a new pid. docs/identity.md says when each.
   * @default 'fresh'
   */
  identity?: IdentityMode
  /**
   * What forks have in place of what the template has open, where that is not to be the default of its kind: policies by kind
   * (`'unix-connection'`) or by path (`'/var/log/**'`, which goes before the kind). See docs/descriptors.md.
   * @default {}
   */
  descriptors?: DescriptorPolicies
  /**
   * When the template is ready.
   * @default `{ idleMs: 1000 }`
   */
  ready?: ReadyOption
  /** What is done with the ready template before the checkpoint, so that children start warm. */
  warmup?: WarmupOption
  template?: TemplateOptions
  pool?: PoolOptions
  /**
   * Children that the supervisor keeps running by itself: it replaces those that end, and after a refork all of them, a few at a time.
   * A number stands for `{ count }`.
   * @default 0
   */
  workers?: number | WorkerOptions
  /**
   * When the supervisor reforks by itself: never; when it measures that it pays; at thresholds; or as a function says.
   * @default false
   */
  refork?: ReforkSetting
  /**
   * How many generations stay for a rollback beside the one in use, when a refork makes a new one.
   * @default 2
   */
  keep?: number
  /**
   * Whether to begin with the newest generation on disk that fits, without a boot. `true` stands for `{}`.
   * @default false
   */
  reuse?: boolean | ReuseOptions
  trial?: TrialOptions
  /** @default { children: 10, crashes: 2 } */
  canary?: CanaryOptions | false
  crashes?: CrashOptions
  /** Name or number of the user that the template and its children run as; only root can ask for it. */
  user?: string | number
  /**
   * Name or number of the group.
   * @default The group of `user`
   */
  group?: string | number
  /**
   * Environment keys that a generation depends on: with another value of one of them it is not used again.
   * @default []
   */
  declaredEnv?: readonly string[]
  /**
   * What becomes of running children when the supervisor goes, whether by `stop()` or by `kill -9`.
   * @default 'end'
   */
  orphans?: 'end' | 'leave'
  /**
   * What `fork()` uses where it is not told.
   * @default 'pipe'
   */
  stdio?: StdioOption
  /**
   * A pino logger, or the level of one that writes to stderr.
   * @default 'silent'
   */
  log?: Logger | LogLevel
  /**
   * How long a checkpoint may take, in milliseconds.
   * @default 120_000
   */
  checkpointTimeoutMs?: number
  /**
   * Whether Node, Python and Ruby programs get their agents, by NODE_OPTIONS, PYTHONPATH and RUBYOPT. docs/agents.md says what
   * works without.
   * @default true
   */
  agent?: boolean
  /**
   * How long all hooks of a program may take, before a checkpoint and in a fork each, in milliseconds. Exceeding it is HOOK_FAILED.
   * @default 10_000
   */
  hookTimeoutMs?: number
  /**
   * How long a restore may take, in milliseconds. The spawn engine boots for each fork, and has `template.bootTimeoutMs` for it.
   * @default 10_000
   */
  forkTimeoutMs?: number
}

/** All kinds of readiness in one form. */
export type Readiness = { timeoutMs: number } & (
  | { kind: 'output'; output: RegExp | string; stream: 'stdout' | 'stderr' | 'both' }
  | { kind: 'port'; port: number; host: string }
  | { kind: 'http'; url: string }
  | { kind: 'file'; path: string }
  | { kind: 'delay'; delayMs: number }
  | { kind: 'idle'; idleMs: number }
  | { kind: 'agent' }
  | { kind: 'function'; check: ReadyFunction }
)

/** All kinds of warm-up in one form. */
export type Warmup = { timeoutMs: number } & (
  | { kind: 'command'; command: readonly [string, ...string[]] }
  | { kind: 'http'; urls: readonly string[]; times: number; concurrency: number }
  | { kind: 'function'; run: WarmupFunction }
)

/** The options with every default filled in. */
export interface ResolvedOptions {
  readonly command: readonly [string, ...string[]]
  /** Absolute. */
  readonly cwd: string
  readonly env: Readonly<Record<string, string>>
  readonly name: string
  readonly store: string
  readonly runtimeDirectory: string
  readonly engine: 'auto' | 'criu' | 'spawn'
  readonly memory: MemoryMode | 'auto'
  readonly descriptors: DescriptorPolicies
  readonly identity: IdentityMode
  readonly ready: Readiness
  readonly warmup: Warmup | undefined
  readonly template: Readonly<Required<Omit<TemplateOptions, 'tty'>>> & { readonly tty: TerminalSize | undefined }
  readonly pool: Readonly<Required<PoolOptions>>
  readonly workers: Readonly<Required<WorkerOptions>>
  readonly refork: ReforkSetting
  readonly keep: number
  readonly reuse:
    | false
    | (Readonly<Required<Omit<ReuseOptions, 'watch'>>> & { readonly watch: readonly string[] | undefined })
  readonly trial: Readonly<Required<Omit<TrialOptions, 'check'>>> & { readonly check: TrialCheck | undefined }
  readonly canary: Readonly<Required<CanaryOptions>> | false
  readonly crashes: Readonly<Required<CrashOptions>>
  readonly user: string | number | undefined
  readonly group: string | number | undefined
  readonly declaredEnv: readonly string[]
  readonly orphans: 'end' | 'leave'
  readonly stdio: StdioOption
  readonly log: Logger | LogLevel
  readonly checkpointTimeoutMs: number
  readonly forkTimeoutMs: number
  readonly agent: boolean
  readonly hookTimeoutMs: number
}

const LOG_LEVELS = ['fatal', 'error', 'warn', 'info', 'debug', 'trace', 'silent'] as const
/** Longest delay of a Node timer: a longer one would fire at once. */
const MAX_MS = 2 ** 31 - 1

// Each schema's `error` is the phrase after "Expected `x` ".
const ms = z
  .number({ error: 'to be a time in milliseconds' })
  .min(0, 'to be 0 or more milliseconds')
  .max(MAX_MS, `to be at most ${MAX_MS} ms`)
const positiveMs = ms.gt(0, 'to be more than 0 milliseconds')
const count = (least: number) => {
  const words = `to be a whole number, ${least} or more`
  return z.number({ error: words }).int(words).min(least, words)
}
const noNul = (text: string) => !text.includes('\0')
const text = z.string({ error: 'to be a string' }).refine(noNul, 'to be a string without NUL')
const filledText = text.min(1, 'not to be empty')
const argvWords = 'to be a non-empty array of strings, the program first'
const argv = z
  .array(text, { error: argvWords })
  .min(1, argvWords)
  .superRefine((parts, context) => {
    if (parts[0] === '') context.addIssue({ code: 'custom', path: [0], message: 'not to be empty' })
  })
const httpUrl = filledText.refine((url) => /^https?:\/\//.test(url) && URL.canParse(url), 'to be an http or https URL')
const isFunction = (value: unknown): value is (...args: never[]) => unknown => typeof value === 'function'
const port = count(1).max(65_535, 'to be a port, 1 to 65535')
const id = z.union([filledText, count(0)], { error: 'to be a name or a number' })
const oneOf = <const T extends readonly [string, ...string[]]>(values: T) =>
  z.enum(values, { error: `to be one of ${values.map((value) => `'${value}'`).join(', ')}` })
const group = <T extends z.ZodRawShape>(shape: T) => z.strictObject(shape, { error: 'to be an object' })
const isLogger = (value: unknown): value is Logger =>
  typeof value === 'object' &&
  value !== null &&
  LOG_LEVELS.every((level) => isFunction((value as Record<string, unknown>)[level]))

const ttyWords = 'to be true, or an object with `columns` and `rows`'
const cells = count(1).max(65_535, 'to be at most 65535')
/** What a terminal can be told to be. */
export const ttySchema = z.union([z.boolean(), z.strictObject({ columns: cells, rows: cells })], { error: ttyWords })

const POLICIES = ['keep', 'reopen', 'close', 'error'] as const satisfies DescriptorPolicy[]
const descriptorPolicies = z
  .record(z.string(), oneOf(POLICIES), { error: 'to be an object of policies' })
  .superRefine((policies, context) => {
    for (const [key, policy] of Object.entries(policies)) {
      const message = whyNoPolicy(key, policy)
      if (message !== undefined) context.addIssue({ code: 'custom', path: [key], message })
    }
  })

const timeoutMs = positiveMs.optional()
const READY_KINDS = {
  output: group({
    output: z.union([z.instanceof(RegExp), filledText], { error: 'to be a regular expression or a string' }),
    stream: oneOf(['stdout', 'stderr', 'both']).optional(),
    timeoutMs,
  }),
  port: group({ port, host: filledText.optional(), timeoutMs }),
  http: group({ http: httpUrl, timeoutMs }),
  file: group({ file: filledText, timeoutMs }),
  delayMs: group({ delayMs: ms, timeoutMs }),
  idleMs: group({ idleMs: positiveMs, timeoutMs }),
  agent: group({ agent: z.literal(true, { error: 'to be true' }), timeoutMs }),
  check: group({ check: z.custom<ReadyFunction>(isFunction, 'to be a function'), timeoutMs }),
}
const urlsWords = 'to be an http or https URL, or an array of such'
const WARMUP_KINDS = {
  command: group({ command: argv, timeoutMs }),
  http: group({
    http: z.union([httpUrl, z.array(httpUrl).min(1, urlsWords)], { error: urlsWords }),
    times: count(1).optional(),
    concurrency: count(1).optional(),
    timeoutMs,
  }),
  run: group({ run: z.custom<WarmupFunction>(isFunction, 'to be a function'), timeoutMs }),
}

/** An object that is told by which of the kinds' keys it has; so that the error speaks of that kind alone, not of all in a union. */
function byKey(kinds: Record<string, z.ZodType>) {
  const keys = Object.keys(kinds)
  const words = `to be a function or an object with one of ${keys.map((key) => `\`${key}\``).join(', ')}`
  return z.unknown().superRefine((value, context) => {
    if (isFunction(value)) return
    const found = typeof value === 'object' && value !== null ? keys.filter((key) => key in value) : []
    const kind = found.length === 1 ? kinds[found[0]!] : undefined
    if (!kind) {
      context.addIssue({ code: 'custom', message: words })
      return
    }
    for (const issue of kind.safeParse(value).error?.issues ?? []) context.addIssue({ ...issue } as never)
  })
}

const schema = z.strictObject(
  {
    command: argv,
    cwd: filledText.optional(),
    env: z
      .record(
        filledText.refine((key) => !key.includes('='), 'to be a name without `=`'),
        text.optional(),
        { error: 'to be an object of strings' },
      )
      .optional(),
    name: filledText
      .regex(/^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$/, 'to be letters, digits, `.`, `_` and `-`, at most 64')
      .optional(),
    store: filledText.optional(),
    runtimeDirectory: filledText.optional(),
    engine: oneOf(['auto', 'criu', 'spawn']).optional(),
    memory: oneOf(['auto', 'cow', 'copy']).optional(),
    descriptors: descriptorPolicies.optional(),
    identity: oneOf(['fresh', 'namespace']).optional(),
    ready: byKey(READY_KINDS).optional(),
    warmup: byKey(WARMUP_KINDS).optional(),
    template: group({
      afterCheckpoint: oneOf(['continue', 'end']).optional(),
      bootTimeoutMs: positiveMs.optional(),
      restTimeoutMs: ms.optional(),
      stopTimeoutMs: ms.optional(),
      tty: ttySchema.optional(),
      secrets: z.array(filledText, { error: 'to be an array of strings' }).optional(),
    }).optional(),
    pool: group({
      size: count(0).optional(),
      maxParkedMs: positiveMs.optional(),
      refillConcurrency: count(1).optional(),
    }).optional(),
    workers: z
      .union([count(0), group({ count: count(0), replaceAtOnce: count(0).optional(), restTimeoutMs: ms.optional() })], {
        error: 'to be a number of workers, or an object with `count`',
      })
      .optional(),
    refork: reforkSchema.optional(),
    keep: count(0).optional(),
    reuse: z
      .preprocess(
        (value) => (typeof value === 'boolean' ? {} : value),
        z.strictObject(
          {
            watch: z.array(filledText, { error: 'to be an array of globs' }).optional(),
            onMismatch: oneOf(['cold', 'error']).optional(),
            verify: oneOf(['later', 'before']).optional(),
          },
          { error: 'to be true, false or an object' },
        ),
      )
      .optional(),
    trial: group({
      timeoutMs: positiveMs.optional(),
      settleMs: ms.optional(),
      check: z.custom<TrialCheck>(isFunction, 'to be a function').optional(),
    }).optional(),
    canary: z
      .union([z.literal(false), group({ children: count(1).optional(), crashes: count(0).optional() })], {
        error: 'to be false, or an object with `children` and `crashes`',
      })
      .optional(),
    crashes: group({
      soonMs: ms.optional(),
      delayAfter: count(1).optional(),
      giveUpAfter: count(1).optional(),
    }).optional(),
    user: id.optional(),
    group: id.optional(),
    declaredEnv: z.array(filledText, { error: 'to be an array of strings' }).optional(),
    orphans: oneOf(['end', 'leave']).optional(),
    stdio: z
      .union([oneOf(['pipe', 'inherit']), z.tuple([count(0), count(0), count(0)])], {
        error: "to be 'pipe', 'inherit' or three descriptors",
      })
      .optional(),
    log: z
      .custom<Logger | LogLevel>(
        (value) => LOG_LEVELS.includes(value as LogLevel) || isLogger(value),
        'to be a pino logger or a level',
      )
      .optional(),
    checkpointTimeoutMs: positiveMs.optional(),
    forkTimeoutMs: positiveMs.optional(),
    agent: z.boolean({ error: 'to be true or false' }).optional(),
    hookTimeoutMs: positiveMs.optional(),
  },
  { error: 'to be an object' },
)

/** Every key that an option object can have, by the path of that object; for the suggestion at an unknown one. */
const KEYS: Record<string, string[]> = {
  '': Object.keys(schema.shape),
  template: ['afterCheckpoint', 'bootTimeoutMs', 'restTimeoutMs', 'stopTimeoutMs', 'tty', 'secrets'],
  pool: ['size', 'maxParkedMs', 'refillConcurrency'],
  refork: [...REFORK_KEYS],
  workers: ['count', 'replaceAtOnce', 'restTimeoutMs'],
  trial: ['timeoutMs', 'settleMs', 'check'],
  canary: ['children', 'crashes'],
  reuse: ['watch', 'onMismatch', 'verify'],
  crashes: ['soonMs', 'delayAfter', 'giveUpAfter'],
  ready: [...new Set(Object.values(READY_KINDS).flatMap((kind) => Object.keys(kind.shape)))],
  warmup: [...new Set(Object.values(WARMUP_KINDS).flatMap((kind) => Object.keys(kind.shape)))],
}

/** How many characters must be put in, taken out or changed to get from one word to the other (Levenshtein). */
function distance(from: string, to: string): number {
  let row = Array.from({ length: to.length + 1 }, (_, i) => i)
  for (let i = 1; i <= from.length; i++) {
    const next = [i]
    for (let j = 1; j <= to.length; j++) {
      next[j] = Math.min(next[j - 1]! + 1, row[j]! + 1, row[j - 1]! + (from[i - 1] === to[j - 1] ? 0 : 1))
    }
    row = next
  }
  return row[to.length]!
}

/** The known key that looks most like the given one, or undefined where none is near. */
function nearestKey(key: string, known: readonly string[]): string | undefined {
  const [best] = known
    .map((candidate) => ({ candidate, edits: distance(key.toLowerCase(), candidate.toLowerCase()) }))
    .sort((a, b) => a.edits - b.edits)
  return best && best.edits <= Math.max(2, Math.floor(key.length / 3)) ? best.candidate : undefined
}

/** A value as it stands in a message: short, and with its type. */
function shown(value: unknown): string {
  const type = value === null ? 'null' : Array.isArray(value) ? 'array' : typeof value
  let words: string
  try {
    words =
      typeof value === 'string'
        ? value
        : value instanceof RegExp
          ? String(value)
          : (JSON.stringify(value) ?? String(value))
  } catch {
    words = String(value)
  }
  if (words.length > 60) words = `${words.slice(0, 57)}…`
  return `\`${words}\` (${type})`
}

function valueAt(root: unknown, path: readonly PropertyKey[]): unknown {
  return path.reduce<unknown>((value, key) => (value as Record<PropertyKey, unknown> | undefined)?.[key], root)
}

function pathName(path: readonly PropertyKey[]): string {
  return (
    path.map((key, i) => (typeof key === 'number' ? `[${key}]` : i === 0 ? String(key) : `.${String(key)}`)).join('') ||
    'options'
  )
}

/** An error in the one style of bad arguments: ``Expected `pool.size` to be …, got `-1` (number)``. */
export function badOption(path: string, expected: string, value: unknown, remedy?: string): WarmforkError {
  return new WarmforkError('BAD_OPTION', {
    tried: 'use the options',
    happened: `Expected \`${path}\` ${expected}, got ${shown(value)}`,
    ...(remedy === undefined ? {} : { remedy }),
  })
}

function firstError(input: unknown, issue: z.core.$ZodIssue): WarmforkError {
  if (issue.code === 'unrecognized_keys') {
    const key = issue.keys[0]!
    const path = [...issue.path, key]
    const parent = pathName(issue.path)
    const nearest = nearestKey(key, KEYS[issue.path.length === 0 ? '' : parent] ?? [])
    const remedy = nearest === undefined ? 'Remove it.' : `Did you mean \`${pathName([...issue.path, nearest])}\`?`
    return badOption(pathName(path), 'not to be there, since there is no such option', valueAt(input, path), remedy)
  }
  return badOption(pathName(issue.path), issue.message, valueAt(input, issue.path))
}

/**
 * Checks the options and fills in the defaults.
 * @throws BAD_OPTION that names the first wrong option
 */
export function resolveOptions(input: SupervisorOptions): ResolvedOptions {
  const parsed = schema.safeParse(input)
  if (!parsed.success) throw firstError(input, parsed.error.issues[0]!)
  const cwd = resolve(input.cwd ?? process.cwd())
  const template = {
    afterCheckpoint: input.template?.afterCheckpoint ?? 'continue',
    bootTimeoutMs: input.template?.bootTimeoutMs ?? 60_000,
    restTimeoutMs: input.template?.restTimeoutMs ?? 10_000,
    stopTimeoutMs: input.template?.stopTimeoutMs ?? 5_000,
    tty: terminalSize(input.template?.tty),
    secrets: [...(input.template?.secrets ?? [])],
  }
  const crashes = {
    soonMs: input.crashes?.soonMs ?? 1_000,
    delayAfter: input.crashes?.delayAfter ?? 5,
    giveUpAfter: input.crashes?.giveUpAfter ?? Math.max(16, input.crashes?.delayAfter ?? 0),
  }
  if (crashes.giveUpAfter < crashes.delayAfter) {
    throw badOption('crashes.giveUpAfter', 'to be `crashes.delayAfter` or more', crashes.giveUpAfter)
  }
  if (template.tty && (input.stdio ?? 'pipe') !== 'pipe') {
    throw badOption('stdio', 'not to be there beside `template.tty`, since forks have terminals then', input.stdio)
  }
  return {
    command: [...input.command],
    cwd,
    env: withoutUndefined(input.env ?? process.env),
    name: input.name ?? defaultName(input.command, cwd),
    store: resolve(input.store ?? defaultRoot()),
    runtimeDirectory: resolve(input.runtimeDirectory ?? defaultRuntimeDirectory()),
    engine: input.engine ?? 'auto',
    memory: input.memory ?? 'auto',
    descriptors: { ...input.descriptors },
    identity: input.identity ?? 'fresh',
    ready: readiness(input.ready ?? { idleMs: 1_000 }, cwd, template.bootTimeoutMs),
    warmup: input.warmup === undefined ? undefined : warmup(input.warmup),
    template,
    pool: {
      // A parked child has pipes: it is of no use where forks get other descriptors.
      size: input.pool?.size ?? ((input.stdio ?? 'pipe') === 'pipe' ? 1 : 0),
      maxParkedMs: input.pool?.maxParkedMs ?? 60_000,
      refillConcurrency: input.pool?.refillConcurrency ?? 2,
    },
    workers: workers(input.workers ?? 0),
    refork: input.refork ?? false,
    keep: input.keep ?? 2,
    reuse: reuse(input.reuse ?? false),
    trial: {
      timeoutMs: input.trial?.timeoutMs ?? 10_000,
      settleMs: input.trial?.settleMs ?? 200,
      check: input.trial?.check,
    },
    canary: input.canary === false ? false : { children: 10, crashes: 2, ...input.canary },
    crashes,
    user: input.user,
    group: input.group,
    declaredEnv: [...(input.declaredEnv ?? [])],
    orphans: input.orphans ?? 'end',
    stdio: input.stdio ?? 'pipe',
    log: input.log ?? 'silent',
    checkpointTimeoutMs: input.checkpointTimeoutMs ?? 120_000,
    forkTimeoutMs: input.forkTimeoutMs ?? 10_000,
    agent: input.agent ?? true,
    hookTimeoutMs: input.hookTimeoutMs ?? 10_000,
  }
}

/** That of a VT100, as every terminal emulator has it at first. */
const DEFAULT_SIZE: TerminalSize = { columns: 80, rows: 24 }

function terminalSize(tty: boolean | TerminalSize | undefined): TerminalSize | undefined {
  if (!tty) return undefined
  return tty === true ? DEFAULT_SIZE : { columns: tty.columns, rows: tty.rows }
}

function withoutUndefined(env: Readonly<Record<string, string | undefined>>): Record<string, string> {
  return Object.fromEntries(Object.entries(env).filter((entry): entry is [string, string] => entry[1] !== undefined))
}

function workers(option: number | WorkerOptions): Required<WorkerOptions> {
  const { count, replaceAtOnce = 0, restTimeoutMs = 30_000 } = typeof option === 'number' ? { count: option } : option
  return { count, replaceAtOnce, restTimeoutMs }
}

function reuse(option: boolean | ReuseOptions): ResolvedOptions['reuse'] {
  if (option === false) return false
  const { watch, onMismatch = 'cold', verify = 'later' } = option === true ? {} : option
  return { watch, onMismatch, verify }
}

function readiness(option: ReadyOption, cwd: string, bootTimeoutMs: number): Readiness {
  if (typeof option === 'function') return { kind: 'function', check: option, timeoutMs: bootTimeoutMs }
  const timeoutMs = option.timeoutMs ?? bootTimeoutMs
  if ('output' in option) return { kind: 'output', output: option.output, stream: option.stream ?? 'both', timeoutMs }
  if ('port' in option) return { kind: 'port', port: option.port, host: option.host ?? '127.0.0.1', timeoutMs }
  if ('http' in option) return { kind: 'http', url: option.http, timeoutMs }
  if ('file' in option) return { kind: 'file', path: resolve(cwd, option.file), timeoutMs }
  if ('delayMs' in option)
    return { kind: 'delay', delayMs: option.delayMs, timeoutMs: Math.max(timeoutMs, option.delayMs + 1) }
  if ('agent' in option) return { kind: 'agent', timeoutMs }
  if ('idleMs' in option) return { kind: 'idle', idleMs: option.idleMs, timeoutMs }
  return { kind: 'function', check: option.check, timeoutMs }
}

function warmup(option: WarmupOption): Warmup {
  if (typeof option === 'function') return { kind: 'function', run: option, timeoutMs: 60_000 }
  const timeoutMs = option.timeoutMs ?? 60_000
  if ('command' in option) return { kind: 'command', command: [...option.command], timeoutMs }
  if ('http' in option) {
    const urls = typeof option.http === 'string' ? [option.http] : [...option.http]
    return { kind: 'http', urls, times: option.times ?? 10, concurrency: option.concurrency ?? 2, timeoutMs }
  }
  return { kind: 'function', run: option.run, timeoutMs }
}

/**
 * The name of a supervisor that was given none: readable, and different for another command or directory.
 * `shop-server-1f0c9a` for `node server.js` in `/srv/shop`.
 */
export function defaultName(command: readonly [string, ...string[]], cwd: string): string {
  // The first argument that is no option: `server.js` of `node --enable-source-maps server.js`.
  const script = command.slice(1).find((part) => !part.startsWith('-') && /^[\w./@+-]+$/.test(part))
  const word = (path: string) =>
    basename(path, extname(path))
      .replace(/[^A-Za-z0-9_-]+/g, '-')
      .replace(/^-+|-+$/g, '')
  const hash = createHash('sha256')
    .update(JSON.stringify([command, cwd]))
    .digest('hex')
    .slice(0, 6)
  const words = [word(cwd), word(script ?? command[0])].filter(Boolean).map((part) => part.slice(0, 28))
  return [...words, hash].join('-').replace(/^[^A-Za-z0-9]+/, '')
}
