/** `warmfork run`: a supervisor in the foreground, with its control socket, until a signal or `warmfork stop` ends it. */
import { readFileSync } from 'node:fs'
import type { Command } from 'commander'
import { generationStatus, supervisorHandlers } from '../control/handlers.js'
import { PROTOCOL } from '../control/protocol.js'
import { ControlServer } from '../control/server.js'
import { type ResolvedOptions, resolveOptions, type SupervisorOptions } from '../options.js'
import { type StopOptions, Supervisor } from '../supervisor.js'
import { JSON_OPTION, subcommand } from './command.js'
import { exitStatusOf } from './failure.js'
import { print, printError } from './output.js'
import { type Progress, progress, QUIET, SILENT } from './progress.js'
import { addRunFlags, type RunFlags, supervisorOptions } from './run-options.js'
import { WorkerOutput } from './worker-output.js'

export function runCommand(): Command {
  const command = subcommand('run', 'boot a command once, checkpoint it, and keep warm children of it parked', [
    ['warmfork run --ready-output listening -- node app.js', 'ready when it says so'],
    [
      'warmfork run --ready-http http://127.0.0.1:3000/ --warmup-http http://127.0.0.1:3000/list -- npm start',
      'warmed by requests',
    ],
    ['warmfork run --pool-size 8 --name shop -- java -jar shop.jar', 'eight children parked'],
    ['warmfork run --json -- node app.js', 'one line of JSON on stdout when forks can be had'],
  ])
    .usage('[options] -- <command> [argument...]')
    .argument('<command...>', 'the program and its arguments, as they are: no shell')
    .passThroughOptions()
  return addRunFlags(command)
    .option('--show-output', 'write what the template writes to stderr')
    .option('-q, --quiet', 'show no progress')
    .option(JSON_OPTION[0], 'print one line of JSON when forks can be had, and errors as JSON on stderr')
    .action(async (argv: [string, ...string[]], flags: RunFlags) => {
      const options = supervisorOptions(argv, flags)
      const status = await run(options, resolveOptions(options), flags)
      // Children that may outlive the supervisor must not hold it up by their streams.
      process.exit(status)
    })
}

const STOP_SIGNALS = ['SIGINT', 'SIGTERM', 'SIGHUP', 'SIGQUIT'] as const

/** Gives the exit status. */
async function run(options: SupervisorOptions, resolved: ResolvedOptions, flags: RunFlags): Promise<number> {
  const supervision = new Supervision(resolved)
  const control = await ControlServer.listen({
    runtimeDirectory: resolved.runtimeDirectory,
    name: resolved.name,
    hello: {
      protocol: PROTOCOL,
      version: supervision.version,
      name: resolved.name,
      pid: process.pid,
      store: resolved.store,
    },
    handlers: supervisorHandlers(supervision),
  })
  const shown = flags.json ? SILENT : flags.quiet ? QUIET : progress(planOf(resolved), flags.showOutput)
  try {
    await supervision.start(options, shown, flags)
    const supervisor = await supervision.started
    announce(supervisor, control.path, flags)
    supervision.showWorkers()
    await supervision.over
    await supervision.shown()
    return 0
  } catch (error) {
    // It was asked to end before it could start.
    if (supervision.stoppedBy === undefined) throw error
    return supervision.stoppedBy === 'control' ? 0 : exitStatusOf({ code: null, signal: supervision.stoppedBy })
  } finally {
    await control.close()
  }
}

function planOf({ command, reuse, warmup, pool }: ResolvedOptions) {
  return { command, reuses: reuse !== false, warmsUp: warmup !== undefined, poolSize: pool.size }
}

/** One supervisor from its creation to its end, for the signals and the control socket, which may come at any moment of it. */
class Supervision {
  readonly version = (
    JSON.parse(readFileSync(new URL('../../package.json', import.meta.url), 'utf8')) as { version: string }
  ).version
  readonly created: Promise<Supervisor>
  readonly started: Promise<Supervisor>
  /** Resolves when it has stopped, whoever stopped it. */
  readonly over: Promise<void>
  stoppedBy: (typeof STOP_SIGNALS)[number] | 'control' | undefined
  #supervisor: Supervisor | undefined
  readonly #starting = new AbortController()
  readonly #outputs: WorkerOutput[] = []
  #onCreated!: (supervisor: Supervisor) => void
  #onStarted!: (supervisor: Promise<Supervisor>) => void
  #onOver!: () => void

  constructor(readonly options: ResolvedOptions) {
    this.created = new Promise((resolve) => {
      this.#onCreated = resolve
    })
    this.started = new Promise((resolve) => {
      this.#onStarted = resolve
    })
    this.started.catch(() => {})
    this.over = new Promise((resolve) => {
      this.#onOver = resolve
    })
    for (const signal of STOP_SIGNALS) {
      process.on(signal, () => {
        // A second Ctrl-C is from somebody who does not want to wait.
        const quick = signal === 'SIGINT' && this.stoppedBy !== undefined
        this.stoppedBy ??= signal
        if (quick) this.#hurry()
        void this.stop({})
      })
    }
    // As Pitchfork has them. From the beginning, since their default actions end or stop a program.
    process.on('SIGUSR2', () => void this.#refork())
    process.on('SIGTTIN', () => this.#resizeWorkers('SIGTTIN', 1))
    process.on('SIGTTOU', () => this.#resizeWorkers('SIGTTOU', -1))
  }

  async #refork(): Promise<void> {
    const supervisor = this.#supervisor
    if (supervisor?.state !== 'running') return printError('warmfork: SIGUSR2: no refork, since it does not run yet')
    try {
      const { number } = await supervisor.refork({ reason: 'SIGUSR2' })
      const isUsed = supervisor.generation === number
      printError(`warmfork: generation ${number} is ${isUsed ? 'in use' : 'kept: another is pinned'}`)
    } catch (error) {
      printError(`warmfork: SIGUSR2: ${(error as Error).message}`)
    }
  }

  #resizeWorkers(signal: NodeJS.Signals, by: number): void {
    const supervisor = this.#supervisor
    const why =
      supervisor?.state !== 'running'
        ? 'it does not run yet'
        : this.options.workers.count === 0
          ? 'none are kept (`--workers`)'
          : undefined
    if (!supervisor || why !== undefined) {
      printError(`warmfork: ${signal}: no change of workers, since ${why}`)
      return
    }
    const count = Math.max(0, supervisor.workers.size + by)
    supervisor.resizeWorkers(count)
    printError(`warmfork: ${count} ${count === 1 ? 'worker' : 'workers'}`)
  }

  /** From now on what workers write is shown, from its beginning. */
  showWorkers(): void {
    for (const output of this.#outputs) output.begin()
  }

  /** Resolves when what workers wrote is written. */
  async shown(): Promise<void> {
    await Promise.all(this.#outputs.map((output) => output.finish()))
  }

  async start(options: SupervisorOptions, shown: Progress, flags: RunFlags): Promise<void> {
    const starting = Supervisor.start(options, {
      signal: this.#starting.signal,
      onCreate: (supervisor) => {
        this.#supervisor = supervisor
        supervisor.once('stopped', () => this.#onOver())
        supervisor.on('warning', (warning) => shown.warn(warning))
        if (flags.showOutput) supervisor.on('templateOutput', (_stream, chunk) => process.stderr.write(chunk))
        // Of `warmfork fork` each child has the streams of its client; those that have pipes are workers.
        if (this.options.workers.count > 0) this.#takeOutput(supervisor)
        shown.follow(supervisor)
        this.#onCreated(supervisor)
      },
    })
    this.#onStarted(starting)
    try {
      await starting
      await shown.finish()
    } catch (error) {
      await shown.finish(error)
      throw error
    }
  }

  #takeOutput(supervisor: Supervisor): void {
    const [stdout, stderr] = [new WorkerOutput(process.stdout), new WorkerOutput(process.stderr)]
    this.#outputs.push(stdout, stderr)
    supervisor.on('child', (child) => {
      if (!child.hasPipes) return
      stdout.show(child.pid, child.stdout)
      stderr.show(child.pid, child.stderr)
    })
  }

  async stop(options: StopOptions): Promise<void> {
    this.stoppedBy ??= 'control'
    this.#starting.abort()
    await this.#supervisor?.stop(options)
  }

  /** A stop that is under way keeps its grace time; what it waits for is ended here. */
  #hurry(): void {
    for (const child of this.#supervisor?.children ?? []) void child.end({ graceMs: 0 })
    const template = this.#supervisor?.template
    if (template?.running) process.kill(template.pid, 'SIGKILL')
  }
}

/** Says that forks can be had. */
function announce(supervisor: Supervisor, socket: string, { json, quiet }: RunFlags): void {
  const { name, engine, generation, pool } = supervisor
  if (json) {
    const made = supervisor.generations().map(generationStatus)
    const warnings = supervisor.warnings.map(({ kind, message }) => ({ kind, message }))
    const ready = {
      name,
      pid: process.pid,
      engine,
      generation,
      generations: made,
      poolSize: pool.size,
      socket,
      warnings,
    }
    print(JSON.stringify(ready))
  } else if (!quiet) {
    printError(`warmfork: ready: ${name} (pid ${process.pid}, engine ${engine}); warmfork fork --name ${name}`)
  }
}
