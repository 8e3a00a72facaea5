/** What `supervisor.fork()` can be told, and the check of it. It starts nothing. */
import type { ForkInput } from './agents/group.js'
import { payloadOf } from './agents/protocol.js'
import type { StdioFds } from './engines/engine.js'
import { WarmforkError } from './errors.js'
import { badOption, type StdioOption, ttySchema } from './options.js'
import type { TerminalSize } from './terminal.js'

export interface ForkRequest {
  /**
   * Descriptors go past the pool: the fork is made when it is asked for. They stay the caller's to close.
   * @default The supervisor's `stdio`
   */
  stdio?: StdioOption
  /**
   * Of a template that was booted on a terminal; with `true` the fork's is as large as the template's.
   * @default true for such a template
   */
  tty?: true | TerminalSize
  /** Gives up waiting for the fork. */
  signal?: AbortSignal
  /** The program's arguments from now on, in place of those that it was booted with. Needs an agent. */
  args?: readonly (string | Uint8Array)[]
  /** Variables to set, or with `undefined` to remove. Needs an agent. */
  env?: Readonly<Record<string, string | Uint8Array | undefined>>
  /** Where to change to. Needs an agent. */
  cwd?: string | Uint8Array
  /** For the program: bytes, or a value that JSON can have. At most 8 MiB. Needs an agent. */
  data?: unknown
}

const FORK_KEYS = ['stdio', 'tty', 'signal', 'args', 'env', 'cwd', 'data'] as const
const AGENT_KEYS = ['args', 'env', 'cwd', 'data'] as const
const INHERITED: StdioFds = [0, 1, 2]
const MAX_INPUT_BYTES = 8 << 20

export interface ForkSurroundings {
  readonly stdio: StdioOption
  readonly hasTerminal: boolean
  /** Why there is no agent that could be given something; undefined where there is one. */
  readonly whyNoAgent: string | undefined
}

/** A request that was found good. */
export interface ForkPlan {
  /** Undefined for pipes, or a terminal. */
  readonly stdio: StdioFds | undefined
  readonly size: TerminalSize | undefined
  readonly input: ForkInput
}

/** @throws BAD_OPTION, NEEDS_AGENT */
export function planFork(request: ForkRequest, surroundings: ForkSurroundings): ForkPlan {
  for (const key of Object.keys(request)) {
    if ((FORK_KEYS as readonly string[]).includes(key)) continue
    const words = 'not to be there, since a fork has no such option'
    throw badOption(key, words, request[key as keyof ForkRequest], 'Remove it.')
  }
  checkTerminal(request, surroundings.hasTerminal)
  return {
    stdio: descriptors(request.stdio ?? surroundings.stdio),
    size: typeof request.tty === 'object' ? request.tty : undefined,
    input: checkInput(request, surroundings.whyNoAgent),
  }
}

function descriptors(stdio: StdioOption): StdioFds | undefined {
  if (stdio === 'pipe') return undefined
  if (stdio === 'inherit') return INHERITED
  if (Array.isArray(stdio) && stdio.length === 3 && stdio.every((fd) => Number.isInteger(fd) && fd >= 0)) {
    return stdio as unknown as StdioFds
  }
  throw badOption('stdio', "to be 'pipe', 'inherit' or three descriptors", stdio)
}

function checkTerminal({ tty, stdio }: ForkRequest, hasTerminal: boolean): void {
  if (hasTerminal && stdio !== undefined && stdio !== 'pipe') {
    const remedy = 'Use `tty`, or `warmfork fork --tty`.'
    throw badOption('stdio', 'not to be there, since the template was booted on a terminal', stdio, remedy)
  }
  if (tty === undefined) return
  if (!hasTerminal) {
    const remedy = 'Start the supervisor with `template: { tty: true }`, or `warmfork run --tty`.'
    throw badOption('tty', 'not to be there, since the template was not booted on a terminal', tty, remedy)
  }
  if ((tty as boolean) === false || !ttySchema.safeParse(tty).success) {
    throw badOption('tty', 'to be true, or an object with `columns` and `rows` from 1 to 65535', tty)
  }
}

function checkInput(request: ForkRequest, whyNoAgent: string | undefined): ForkInput {
  const { args, env, cwd, data } = request
  const needing = AGENT_KEYS.find((key) => request[key] !== undefined)
  if (!needing) return {}
  if (args !== undefined) {
    if (!Array.isArray(args)) throw badOption('args', 'to be an array of strings or bytes', args)
    for (const [index, arg] of args.entries()) checkText(`args[${index}]`, arg)
  }
  if (env !== undefined) {
    if (typeof env !== 'object' || env === null || Array.isArray(env)) {
      throw badOption('env', 'to be an object of strings', env)
    }
    for (const [key, value] of Object.entries(env)) {
      if (key === '' || /[=\0]/.test(key)) throw badOption('env', 'to have names without `=` and NUL', key)
      if (value !== undefined) checkText(`env.${key}`, value)
    }
  }
  if (cwd !== undefined) {
    checkText('cwd', cwd)
    if (cwd.length === 0) throw badOption('cwd', 'not to be empty', cwd)
  }
  if (whyNoAgent !== undefined) {
    throw new WarmforkError('NEEDS_AGENT', { tried: `fork with \`${needing}\``, happened: whyNoAgent })
  }
  const input: ForkInput = {
    ...(args === undefined ? {} : { args }),
    ...(env === undefined ? {} : { env }),
    ...(cwd === undefined ? {} : { cwd }),
    ...(data === undefined ? {} : { data }),
  }
  checkSize(input)
  return input
}

function checkText(path: string, value: unknown): void {
  const isText = typeof value === 'string' || value instanceof Uint8Array
  if (!isText) throw badOption(path, 'to be a string or bytes', value)
  if (typeof value === 'string' ? value.includes('\0') : value.includes(0)) {
    throw badOption(path, 'to be without NUL, which ends a string of the system', value)
  }
}

/** All of it travels on one line. */
function checkSize({ args = [], env = {}, data }: ForkInput): void {
  let payload = 0
  try {
    payload = data === undefined ? 0 : Buffer.byteLength(JSON.stringify(payloadOf(data)))
  } catch (error) {
    throw badOption('data', 'to be bytes, or a value that JSON can have', data, String((error as Error).message))
  }
  const texts = [...args, ...Object.values(env)]
  const bytes = texts.reduce<number>((sum, text) => sum + (text === undefined ? 0 : text.length), payload)
  if (bytes <= MAX_INPUT_BYTES) return
  throw new WarmforkError('BAD_OPTION', {
    tried: 'fork with `args`, `env` and `data`',
    happened: `they have ${bytes} bytes, and may have ${MAX_INPUT_BYTES}`,
    remedy: 'Write what is larger to a file, and give the fork its path.',
  })
}
