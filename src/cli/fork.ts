/**
 * `warmfork fork`: a child on this terminal. Only what it needs is loaded, and this process writes nothing as long as the
 * child runs: the standard streams are the child's.
 */
import { readFileSync } from 'node:fs'
import { resolve } from 'node:path'
import { isatty } from 'node:tty'
import { type Command, InvalidArgumentError } from 'commander'
import { type ControlClient, connectToSupervisor } from '../control/client.js'
import { type ForkInputParams, PASSED_SIGNALS } from '../control/protocol.js'
import { defaultRuntimeDirectory } from '../control/runtime-directory.js'
import { WarmforkError } from '../errors.js'
import type { ExitStatus } from '../linux/reaper.js'
import { type Addressed, JSON_OPTION, NAME_OPTION, RUNTIME_OPTION, subcommand } from './command.js'
import { exitStatusOf } from './failure.js'
import { collect, collectEnv } from './repeated.js'

export function forkCommand(): Command {
  return subcommand('fork', "fork a child on this command's stdin, stdout and stderr; its exit status is ours", [
    ['warmfork fork', 'the only supervisor that runs'],
    ['echo hello | warmfork fork --name shop', 'its stdin is that of this command'],
    [
      'warmfork fork --env MODE=batch -- import july.csv',
      'a program with an agent gets arguments and variables of its own',
    ],
    ['warmfork fork --tty --name repl', 'a REPL whose supervisor was started with `warmfork run --tty`'],
  ])
    .option(...NAME_OPTION)
    .option(...RUNTIME_OPTION)
    .option('-t, --tty', 'give it a terminal of its own, shown on this one')
    .option('--env <key=value>', 'sets a variable in the child; may be repeated; needs an agent', collectEnv)
    .option('--unset-env <key>', 'removes a variable there; may be repeated', collect)
    .option('--cwd <directory>', 'where the child changes to; needs an agent')
    .option('--data <json>', 'the payload: a value in JSON; needs an agent', parseJson)
    .argument('[args...]', "the program's arguments, in place of those that it was booted with; needs an agent")
    .option(JSON_OPTION[0], "print errors as JSON on stderr; stdout is the child's")
    .action(async (args: string[], options: ForkFlags) => {
      const status = await fork(options, inputOf(args, options))
      // Nothing is left to wait for, and the exit handlers of this process cost milliseconds.
      process.exit(status)
    })
}

interface ForkFlags extends Addressed {
  tty?: boolean
  env?: Readonly<Record<string, string>>
  unsetEnv?: readonly string[]
  cwd?: string
  data?: unknown
}

/** Undefined where nothing is given: then no agent is needed. */
function inputOf(args: readonly string[], { env, unsetEnv, cwd, data }: ForkFlags): ForkInputParams | undefined {
  const variables = { ...env, ...Object.fromEntries((unsetEnv ?? []).map((key) => [key, null])) }
  const input = {
    ...(args.length > 0 ? { args } : {}),
    ...(Object.keys(variables).length > 0 ? { env: variables } : {}),
    ...(cwd === undefined ? {} : { cwd: resolve(cwd) }),
    ...(data === undefined ? {} : { data }),
  }
  return Object.keys(input).length > 0 ? input : undefined
}

function parseJson(text: string): unknown {
  try {
    return JSON.parse(text)
  } catch (error) {
    throw new InvalidArgumentError(`It is no JSON: ${(error as Error).message}.`)
  }
}

async function fork(
  { name, runtimeDirectory = defaultRuntimeDirectory(), tty }: ForkFlags,
  input: ForkInputParams | undefined,
): Promise<number> {
  if (tty) requireTerminal()
  const client = await connectToSupervisor(runtimeDirectory, name)
  const request = client.nextId
  // The child leads a session of its own, so that what the terminal sends arrives here only.
  for (const signal of PASSED_SIGNALS) {
    if (tty && signal === 'SIGWINCH') continue
    process.on(signal, () => {
      client.request('signal', { request, signal }).catch(() => {})
    })
  }
  try {
    const params = input ? { input } : {}
    return exitStatusOf(tty ? await onTerminal(client, request, params) : await client.request('fork', params))
  } finally {
    client.close()
  }
}

function requireTerminal(): void {
  const tried = 'fork on a terminal'
  if (!isatty(0) || !isatty(1)) {
    throw new WarmforkError('BAD_OPTION', {
      tried,
      happened: 'stdin and stdout of this command are no terminal',
      remedy: 'Leave `--tty` out, or run it on a terminal.',
    })
  }
  if (!inBackground()) return
  throw new WarmforkError('BAD_OPTION', {
    tried,
    happened: 'this command runs in the background, and would take the terminal from the shell',
    remedy: 'Run it in the foreground.',
  })
}

/** Where the terminal is another's, or this is a platform without /proc, nobody can tell. */
function inBackground(): boolean {
  if (process.platform !== 'linux') return false
  // What follows on the name: state, parent, own group, session, terminal, and the terminal's foreground group.
  const [, , group, , , foreground] = readFileSync('/proc/self/stat', 'latin1')
    .replace(/^.*\) /s, '')
    .split(' ')
  return foreground !== group && foreground !== '-1'
}

/**
 * As long as the child runs, this terminal is in raw mode. The supervisor reads it, writes to it and gives it back as it was; here
 * is done what remains where it cannot.
 */
async function onTerminal(
  client: ControlClient,
  request: number,
  params: { input?: ForkInputParams },
): Promise<ExitStatus> {
  const size = () => ({ columns: process.stdout.columns || 80, rows: process.stdout.rows || 24 })
  process.stdout.on('resize', () => {
    client.request('resize', { request, ...size() }).catch(() => {})
  })
  let before: Buffer | undefined
  // After a stop the shell has set the modes that it wants.
  process.on('SIGCONT', async () => {
    const { rawModes, setTerminalModes } = await import('../linux/pty.js')
    if (before) setTerminalModes(0, rawModes(before))
  })
  try {
    return await client.request('fork', { tty: size(), ...params }, ({ modes }) => {
      if (modes !== undefined) before = Buffer.from(modes, 'base64')
    })
  } finally {
    const modes = before
    before = undefined
    if (modes) {
      const { setTerminalModes } = await import('../linux/pty.js')
      setTerminalModes(0, modes)
    }
  }
}
