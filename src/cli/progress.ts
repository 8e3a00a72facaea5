/** Shows how the start of a supervisor goes on, on stderr: a list with spinners on a terminal, plain lines else. It starts nothing. */
import { isatty } from 'node:tty'
import type { GenerationInfo } from '../engines/engine.js'
import type { StartPhase, Supervisor, Warning } from '../supervisor.js'
import { printError } from './output.js'
import { formatDuration, formatMiB } from './quantities.js'
import { visible } from './table.js'

export interface Plan {
  readonly command: readonly string[]
  /** Whether it may begin with a generation on disk. */
  readonly reuses: boolean
  readonly warmsUp: boolean
  readonly poolSize: number
}

export interface Progress {
  /** Follows the events of the supervisor; call it before anything has happened. */
  follow(supervisor: Supervisor): void
  warn(warning: Pick<Warning, 'message'>): void
  /** The start is over, well or not. */
  finish(error?: unknown): Promise<void>
}

const printWarning = ({ message }: Pick<Warning, 'message'>) => printError(`warmfork: warning: ${message}`)

/** No progress. Warnings still, since they are no progress. */
export const QUIET: Progress = { follow: () => {}, warn: printWarning, finish: async () => {} }

/** Nothing at all: stderr is for an error as JSON. */
export const SILENT: Progress = { ...QUIET, warn: () => {} }

/** @param lines asks for plain lines on a terminal too */
export function progress(plan: Plan, lines = false): Progress {
  // Some terminals do not say how wide they are; a list would be cut to nothing there.
  return lines || !isatty(2) || !process.stderr.columns ? new Lines(plan) : new List(plan)
}

const PHASES: readonly StartPhase[] = ['reuse', 'boot', 'ready', 'warmup', 'rest', 'checkpoint', 'pool']

function title(phase: StartPhase, { command, poolSize }: Plan): string {
  switch (phase) {
    case 'reuse':
      return 'look for a generation that fits'
    case 'boot':
      return `start ${visible(command.join(' ')).slice(0, 60)}`
    case 'ready':
      return 'wait until it is ready'
    case 'warmup':
      return 'warm it up'
    case 'rest':
      return 'wait until it has nothing in hand'
    case 'checkpoint':
      return 'checkpoint it'
    case 'pool':
      return `park ${poolSize} ${poolSize === 1 ? 'child' : 'children'}`
  }
}

/** What is to come, with this plan. */
function phasesOf(plan: Plan): StartPhase[] {
  const wanted: Partial<Record<StartPhase, boolean>> = {
    reuse: plan.reuses,
    warmup: plan.warmsUp,
    pool: plan.poolSize > 0,
  }
  return PHASES.filter((phase) => wanted[phase] ?? true)
}

/** How large the thing is that takes long. */
function sizeOf(supervisor: Supervisor): string {
  const bytes = supervisor.template?.memory?.rssBytes
  return bytes === undefined ? '' : ` (${formatMiB(bytes)} MiB)`
}

/** What came of the look for a generation on disk. */
function found({ generation }: Supervisor): string {
  return generation > 0 ? `generation ${generation}` : 'there is none'
}

function madeBy(supervisor: Supervisor): string {
  const generation = supervisor.generations().at(-1)
  return generation ? `, ${describe(generation)}` : ''
}

function describe(generation: GenerationInfo): string {
  const size = generation.sizeBytes > 0 ? `, ${formatMiB(generation.sizeBytes)} MiB on disk` : ''
  const memory = generation.memory === 'cow' ? 'memory is shared' : 'memory is copied'
  return `generation ${generation.number}: ${formatMiB(generation.rssBytes)} MiB${size}, ${memory}`
}

class Lines implements Progress {
  constructor(private readonly plan: Plan) {}

  follow(supervisor: Supervisor): void {
    supervisor.on('progress', (phase, elapsedMs) => {
      const phases = phasesOf(this.plan)
      if (!phases.includes(phase)) return
      const made = phase === 'checkpoint' ? madeBy(supervisor) : ''
      if (phase === 'reuse') return printError(`warmfork: ${title(phase, this.plan)}: ${found(supervisor)}`)
      printError(`warmfork: ${title(phase, this.plan)}: ${formatDuration(elapsedMs)}${made}`)
      // The one step that takes long with a large process is announced, too.
      if (phases[phases.indexOf(phase) + 1] === 'checkpoint') {
        printError(`warmfork: ${title('checkpoint', this.plan)}${sizeOf(supervisor)} …`)
      }
    })
  }

  warn(warning: Pick<Warning, 'message'>): void {
    printWarning(warning)
  }

  async finish(): Promise<void> {}
}

interface Step {
  readonly done: Promise<string>
  finish(text: string): void
  fail(error: unknown): void
  retitle?: (text: string) => void
}

class List implements Progress {
  readonly #steps = new Map<StartPhase, Step>()
  readonly #shown: Promise<unknown>
  /** Lines between those of the list would be overwritten by it. Undefined when it is done. */
  #held: Pick<Warning, 'message'>[] | undefined = []

  constructor(private readonly plan: Plan) {
    for (const phase of phasesOf(plan)) this.#steps.set(phase, step())
    this.#shown = this.#show()
  }

  follow(supervisor: Supervisor): void {
    supervisor.on('progress', (phase, elapsedMs) => {
      const made = phase === 'checkpoint' ? madeBy(supervisor) : ''
      const leftOut = this.plan.reuses && supervisor.template === undefined ? ' not needed' : ''
      for (const [each, { finish }] of this.#steps) {
        // A phase that the engine leaves out is over with the next one.
        if (PHASES.indexOf(each) < PHASES.indexOf(phase)) finish(leftOut)
        if (each === phase) finish(phase === 'reuse' ? ` ${found(supervisor)}` : ` ${formatDuration(elapsedMs)}${made}`)
      }
      const phases = phasesOf(this.plan)
      if (phases[phases.indexOf(phase) + 1] === 'checkpoint') {
        this.#steps.get('checkpoint')?.retitle?.(`${title('checkpoint', this.plan)}${sizeOf(supervisor)}`)
      }
    })
  }

  async finish(error?: unknown): Promise<void> {
    for (const { finish, fail } of this.#steps.values()) {
      if (error === undefined) finish('')
      else fail(error)
    }
    await this.#shown
    for (const warning of this.#held ?? []) printWarning(warning)
    this.#held = undefined
  }

  warn(warning: Pick<Warning, 'message'>): void {
    if (this.#held) this.#held.push(warning)
    else printWarning(warning)
  }

  async #show(): Promise<void> {
    const { Listr, ListrLogger, ProcessOutput } = await import('listr2')
    const list = new Listr(
      [...this.#steps].map(([phase, shown]) => ({
        title: title(phase, this.plan),
        task: async (_: unknown, task: { title: string }) => {
          shown.retitle = (text) => {
            task.title = text
          }
          const text = await shown.done
          if (text) task.title = `${task.title}:${text}`
        },
      })),
      {
        // stdout is for the one JSON document. What the program writes does not come through here.
        fallbackRendererCondition: () => false,
        rendererOptions: {
          logger: new ListrLogger({ processOutput: new ProcessOutput(process.stderr, process.stderr) }),
          showErrorMessage: false,
          collapseErrors: true,
        },
      },
    )
    // The error is reported by whoever started the supervisor.
    await list.run().catch(() => {})
  }
}

function step(): Step {
  let finish!: (text: string) => void
  let fail!: (error: unknown) => void
  const done = new Promise<string>((resolve, reject) => {
    finish = resolve
    fail = reject
  })
  done.catch(() => {})
  return { done, finish, fail }
}
