/** The flags of `warmfork run`, and what they mean as options of a supervisor: one flag an option. It starts nothing. */
import { type Command, InvalidArgumentError, Option } from 'commander'
import {
  badOption,
  type CrashOptions,
  type PoolOptions,
  type ReadyOption,
  type ReuseOptions,
  type SupervisorOptions,
  type TemplateOptions,
  type WarmupOption,
} from '../options.js'
import { parseCount, parseDuration } from './quantities.js'
import { collect, collectEnv } from './repeated.js'

export interface RunFlags {
  readonly json?: boolean
  readonly quiet?: boolean
  readonly showOutput?: boolean

  readonly name?: string
  readonly cwd?: string
  readonly env?: Readonly<Record<string, string>>
  readonly declaredEnv?: readonly string[]
  readonly secret?: readonly string[]
  readonly user?: string
  readonly group?: string

  readonly readyOutput?: RegExp | string
  readonly readyStream?: 'stdout' | 'stderr' | 'both'
  readonly readyPort?: { readonly port: number; readonly host?: string }
  readonly readyHttp?: string
  readonly readyFile?: string
  readonly readyDelay?: number
  readonly readyIdle?: number
  readonly readyAgent?: boolean
  readonly readyTimeout?: number

  readonly warmupHttp?: readonly string[]
  readonly warmupTimes?: number
  readonly warmupConcurrency?: number
  readonly warmupCommand?: string
  readonly warmupTimeout?: number

  readonly engine?: 'auto' | 'criu' | 'spawn'
  readonly memory?: 'auto' | 'cow' | 'copy'
  readonly identity?: 'fresh' | 'namespace'
  readonly tty?: boolean
  readonly afterCheckpoint?: 'continue' | 'end'
  readonly bootTimeout?: number
  readonly restTimeout?: number
  readonly stopTimeout?: number
  readonly checkpointTimeout?: number
  readonly forkTimeout?: number
  readonly agent?: boolean
  readonly hookTimeout?: number

  readonly poolSize?: number
  readonly maxParked?: number
  readonly refillConcurrency?: number
  readonly crashSoon?: number
  readonly crashDelayAfter?: number
  readonly crashGiveUpAfter?: number
  readonly orphans?: 'end' | 'leave'

  readonly workers?: number
  readonly refork?: 'auto' | 'off' | readonly number[]
  readonly reforkUnit?: 'requests' | 'forks' | 'seconds'
  readonly keep?: number

  readonly reuse?: boolean
  readonly watch?: readonly string[]
  readonly onMismatch?: 'cold' | 'error'
  readonly verify?: 'later' | 'before'

  readonly store?: string
  readonly runtimeDirectory?: string
  readonly logLevel?: SupervisorOptions['log'] & string
}

/** The kinds of readiness: one of them, or none. */
const READY_FLAGS = [
  'ready-output',
  'ready-port',
  'ready-http',
  'ready-file',
  'ready-delay',
  'ready-idle',
  'ready-agent',
]

/** Adds the flags to the command. */
export function addRunFlags(command: Command): Command {
  // commander hands a parser the value before, too, where the flag is repeated.
  const add = <T>(flags: string, description: string, parse?: (text: string, before: T) => T) =>
    command.addOption(parse ? new Option(flags, description).argParser(parse) : new Option(flags, description))
  const choose = (flags: string, description: string, choices: readonly string[]) =>
    command.addOption(new Option(flags, description).choices(choices))
  const ready = (flags: string, description: string, parse?: (text: string) => unknown) => {
    const option = new Option(flags, description).conflicts(
      READY_FLAGS.map(camelCase).filter((other) => other !== camelCase(flags.slice(2).split(' ')[0]!)),
    )
    command.addOption(parse ? option.argParser(parse) : option)
  }

  add('-n, --name <name>', 'names the supervisor (default: made from directory and command)')
  add('--cwd <directory>', 'where the command is started (default: here)')
  add('--env <key=value>', 'sets a variable for the command; may be repeated', collectEnv)
  add('--declared-env <key>', 'a variable that a generation depends on; may be repeated', collect)
  add('--secret <key>', 'a variable that forks get and the template does not; may be repeated', collect)
  add('--user <user>', 'runs the command as this user; only root can')
  add('--group <group>', 'and as this group')

  ready(
    '--ready-output <text>',
    'ready when a line of the output contains the text, or matches it if written /like this/',
    parsePattern,
  )
  choose('--ready-stream <stream>', 'which output: both by default', ['stdout', 'stderr', 'both'])
  ready('--ready-port <port>', 'ready when it accepts a connection at PORT or HOST:PORT', parsePort)
  ready('--ready-http <url>', 'ready when a GET is answered with a status from 200 to 299')
  ready('--ready-file <file>', 'ready when the file appears')
  ready('--ready-delay <time>', 'ready after that time', parseDuration)
  ready('--ready-idle <time>', 'ready when it was idle for that time (default: 1s)', parseDuration)
  ready('--ready-agent', 'ready when the program says so through its agent')
  add('--ready-timeout <time>', 'how long that may take (default: the boot time-out)', parseDuration)

  command.addOption(
    new Option('--warmup-http <url>', 'asks for the URL before the checkpoint; may be repeated')
      .argParser(collect)
      .conflicts('warmupCommand'),
  )
  add('--warmup-times <n>', 'how often each (default: 10)', parseCount)
  add('--warmup-concurrency <n>', 'how many requests at once (default: 2)', parseCount)
  add('--warmup-command <line>', 'runs the line in a shell before the checkpoint')
  add('--warmup-timeout <time>', 'how long the warm-up may take (default: 1m)', parseDuration)

  choose('--engine <engine>', 'what forks: criu restores, spawn starts anew (default: auto)', ['auto', 'criu', 'spawn'])
  choose('--memory <mode>', 'children share memory (cow) or copy it (default: auto)', ['auto', 'cow', 'copy'])
  choose('--identity <mode>', 'ids of their own (fresh, the default), or those of the template (namespace)', [
    'fresh',
    'namespace',
  ])
  command.option('-t, --tty', 'boots the command on a terminal, and gives each fork one of its own')
  choose('--after-checkpoint <what>', 'what the template does then (default: continue)', ['continue', 'end'])
  add('--boot-timeout <time>', 'from the start to readiness (default: 1m)', parseDuration)
  add('--rest-timeout <time>', 'how long the checkpoint waits for rest (default: 10s)', parseDuration)
  add('--stop-timeout <time>', 'from SIGTERM to SIGKILL (default: 5s)', parseDuration)
  add('--checkpoint-timeout <time>', 'how long a checkpoint may take (default: 2m)', parseDuration)
  add('--fork-timeout <time>', 'how long a restore may take (default: 10s)', parseDuration)

  command.option('--no-agent', 'gives Node, Python and Ruby programs no agent')
  add('--hook-timeout <time>', 'how long hooks of the program may take (default: 10s)', parseDuration)

  add('--pool-size <n>', 'how many children are kept parked (default: 1)', parseCount)
  add('--max-parked <time>', 'children that are parked for longer are replaced (default: 1m)', parseDuration)
  add('--refill-concurrency <n>', 'how many are made at once (default: 2)', parseCount)
  add('--crash-soon <time>', 'a crash counts within that time (default: 1s)', parseDuration)
  add('--crash-delay-after <n>', 'from so many crashes in a row on, forks are delayed (default: 5)', parseCount)
  add('--crash-give-up-after <n>', 'from so many crashes in a row on, forks are refused (default: 16)', parseCount)
  choose('--orphans <what>', 'what becomes of children without a supervisor (default: end)', ['end', 'leave'])

  add('--workers <n>', 'children that are kept running, and replaced when they end (default: 0)', parseCount)
  add('--refork <when>', 'a warmed child becomes the next generation: auto, off (default), or 50,100,1000', parseRefork)
  choose('--refork-unit <unit>', 'what such numbers count (default: requests)', ['requests', 'forks', 'seconds'])
  add('--keep <n>', 'generations that a refork leaves for a rollback (default: 2)', parseCount)

  command.option('--reuse', 'begins with the newest generation on disk that fits, without a boot')
  add('--watch <glob>', 'with --reuse: files whose changes forbid that (default: sources); may be repeated', collect)
  choose('--on-mismatch <what>', 'with --reuse, where no generation fits (default: cold)', ['cold', 'error'])
  choose('--verify <when>', 'with --reuse, when all of its memory is read (default: later)', ['later', 'before'])

  add('--store <directory>', 'the directory of the generations')
  add('--runtime-directory <directory>', 'the directory of the control sockets')
  choose('--log-level <level>', 'writes a log to stderr (default: silent)', [
    'fatal',
    'error',
    'warn',
    'info',
    'debug',
    'trace',
    'silent',
  ])
  return command
}

/** `auto`, `off`, or thresholds. */
function parseRefork(text: string): 'auto' | 'off' | number[] {
  if (text === 'auto' || text === 'off') return text
  if (/^[1-9]\d{0,8}(,[1-9]\d{0,8})*$/.test(text)) return text.split(',').map(Number)
  throw new InvalidArgumentError('Write `auto`, `off`, or numbers as `50,100,1000`.')
}

const camelCase = (flag: string) => flag.replace(/-(.)/g, (_, letter: string) => letter.toUpperCase())

/** `/like this/i` is a regular expression, all else a text. A path in slashes has to be written as one. */
function parsePattern(text: string): RegExp | string {
  const match = /^\/(.+)\/([imsu]*)$/s.exec(text)
  if (!match) return text
  try {
    return new RegExp(match[1]!, match[2])
  } catch (error) {
    throw new InvalidArgumentError(`${(error as Error).message}.`)
  }
}

function parsePort(text: string): { port: number; host?: string } {
  const match = /^(?:(.+):)?(\d{1,5})$/.exec(text)
  const port = Number(match?.[2])
  if (!match || port < 1 || port > 65_535) throw new InvalidArgumentError('Write PORT or HOST:PORT.')
  // [::1]:80
  return match[1] === undefined ? { port } : { port, host: match[1].replace(/^\[(.*)\]$/, '$1') }
}

/** The flags as options. What was not said is left out, so that the defaults stand in one place. */
export function supervisorOptions(command: readonly [string, ...string[]], flags: RunFlags): SupervisorOptions {
  const template = defined<TemplateOptions>({
    afterCheckpoint: flags.afterCheckpoint,
    bootTimeoutMs: flags.bootTimeout,
    restTimeoutMs: flags.restTimeout,
    stopTimeoutMs: flags.stopTimeout,
    tty: flags.tty,
    secrets: flags.secret,
  })
  const pool = defined<PoolOptions>({
    size: flags.poolSize,
    maxParkedMs: flags.maxParked,
    refillConcurrency: flags.refillConcurrency,
  })
  const crashes = defined<CrashOptions>({
    soonMs: flags.crashSoon,
    delayAfter: flags.crashDelayAfter,
    giveUpAfter: flags.crashGiveUpAfter,
  })
  return {
    ...defined<Omit<SupervisorOptions, 'command'>>({
      name: flags.name,
      cwd: flags.cwd,
      env: flags.env && { ...process.env, ...flags.env },
      declaredEnv: flags.declaredEnv,
      user: flags.user === undefined ? undefined : nameOrId(flags.user),
      group: flags.group === undefined ? undefined : nameOrId(flags.group),
      ready: ready(flags),
      warmup: warmup(flags),
      engine: flags.engine,
      memory: flags.memory,
      identity: flags.identity,
      checkpointTimeoutMs: flags.checkpointTimeout,
      forkTimeoutMs: flags.forkTimeout,
      agent: flags.agent === false ? false : undefined,
      hookTimeoutMs: flags.hookTimeout,
      orphans: flags.orphans,
      workers: flags.workers,
      refork: refork(flags),
      keep: flags.keep,
      reuse: reuse(flags),
      store: flags.store,
      runtimeDirectory: flags.runtimeDirectory,
      log: flags.logLevel,
    }),
    command,
    template,
    pool,
    crashes,
  }
}

function ready(flags: RunFlags): ReadyOption | undefined {
  const timed = defined({ timeoutMs: flags.readyTimeout })
  const { readyOutput, readyPort, readyHttp, readyFile, readyDelay, readyIdle, readyAgent } = flags
  if (readyOutput !== undefined) return { output: readyOutput, ...defined({ stream: flags.readyStream }), ...timed }
  if (readyPort !== undefined) return { ...readyPort, ...timed }
  if (readyHttp !== undefined) return { http: readyHttp, ...timed }
  if (readyFile !== undefined) return { file: readyFile, ...timed }
  if (readyDelay !== undefined) return { delayMs: readyDelay, ...timed }
  if (readyIdle !== undefined) return { idleMs: readyIdle, ...timed }
  if (readyAgent) return { agent: true, ...timed }
  return flags.readyTimeout === undefined ? undefined : { idleMs: 1_000, ...timed }
}

/** @throws BAD_OPTION where it is said what is counted, and not until when */
function refork({ refork: when, reforkUnit: unit }: RunFlags): SupervisorOptions['refork'] {
  if (typeof when === 'object') return { after: when, ...defined({ unit }) }
  if (unit !== undefined) throw badOption('--refork', 'to be numbers beside `--refork-unit`', when)
  return when === 'off' ? false : when
}

/** @throws BAD_OPTION where something is said of a reuse that is not asked for */
function reuse({ reuse: wanted, watch, onMismatch, verify }: RunFlags): SupervisorOptions['reuse'] {
  const options = defined<ReuseOptions>({ watch, onMismatch, verify })
  if (wanted) return options
  if (Object.keys(options).length === 0) return undefined
  throw badOption('--reuse', 'to be there beside `--watch`, `--on-mismatch` and `--verify`', undefined)
}

function warmup(flags: RunFlags): WarmupOption | undefined {
  const timed = defined({ timeoutMs: flags.warmupTimeout })
  if (flags.warmupCommand !== undefined) return { command: ['/bin/sh', '-c', flags.warmupCommand], ...timed }
  if (flags.warmupHttp === undefined) return undefined
  const { warmupTimes: times, warmupConcurrency: concurrency } = flags
  return { http: flags.warmupHttp, ...defined({ times, concurrency }), ...timed }
}

const nameOrId = (text: string) => (/^\d+$/.test(text) ? Number(text) : text)

/** Without the keys that have no value: an option that is `undefined` is not the same as one that is not there. */
function defined<T extends object>(values: { [K in keyof T]: T[K] | undefined }): T {
  return Object.fromEntries(Object.entries(values).filter(([, value]) => value !== undefined)) as T
}
