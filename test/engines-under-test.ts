/** What tests of supervisors share: the engines that they run for, and a place that is checked for leftovers when it is left. */
import { chmodSync, mkdirSync, mkdtempSync, readdirSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterEach, beforeEach, expect } from 'vitest'
import type { Child } from '../src/child.js'
import { allPids, environment, isAlive, stat } from '../src/linux/proc.js'
import type { SupervisorOptions } from '../src/options.js'
import { type StartOptions, Supervisor } from '../src/supervisor.js'

/** `WARMFORK_TEST_ENGINES=spawn` leaves CRIU out, where only the supervisor is worked on. */
export const ENGINES = (process.env.WARMFORK_TEST_ENGINES?.split(',') ?? ['spawn', 'criu']) as ('spawn' | 'criu')[]

export const PROGRAMS = fileURLToPath(new URL('fixtures/programs/', import.meta.url))

/** The program that does as its stdin says. */
export const APP: readonly [string, ...string[]] = [process.execPath, join(PROGRAMS, 'app.mjs')]

let sequence = 0

export class Place {
  readonly directory = mkdtempSync(join(tmpdir(), 'warmfork-test-'))
  readonly runtimeDirectory = join(this.directory, 'run')
  /** In the environment of all that is started here. */
  readonly mark = `WARMFORK_TEST_${process.pid}_${sequence++}`
  /** By start time, since an id can be given again. */
  readonly #before = new Map(allPids().map((pid) => [pid, stat(pid)?.startTicks]))
  readonly #supervisors: Supervisor[] = []
  /** The marks of the supervisors, which their criu processes carry too. */
  readonly #tokens = new Set<string>()

  constructor(readonly engine: 'spawn' | 'criu') {
    // Workers of another user must get through.
    chmodSync(this.directory, 0o711)
    mkdirSync(this.runtimeDirectory, { mode: 0o711 })
  }

  options(options: Partial<SupervisorOptions> = {}): SupervisorOptions {
    return {
      engine: this.engine,
      command: APP,
      ready: { output: 'ready' },
      store: join(this.directory, 'store'),
      runtimeDirectory: this.runtimeDirectory,
      ...options,
      env: { ...process.env, ...options.env, [this.mark]: '1' },
    }
  }

  async start(options: Partial<SupervisorOptions> = {}, start: StartOptions = {}): Promise<Supervisor> {
    return Supervisor.start(this.options(options), {
      ...start,
      onCreate: (supervisor) => {
        this.#supervisors.push(supervisor)
        supervisor.on('progress', () => {
          const mark = environment(supervisor.template?.pid ?? 0)?.find((entry) => entry.startsWith('WARMFORK_ID_'))
          if (mark) this.#tokens.add(mark)
        })
        start.onCreate?.(supervisor)
      },
    })
  }

  /** Processes that are there now, were not before, and came from here: they carry the mark, or a supervisor's, or are ours. */
  processes(): string[] {
    return allPids()
      .filter((pid) => isAlive(pid) && this.#before.get(pid) !== stat(pid)?.startTicks)
      .filter((pid) => {
        const marked = environment(pid)?.some((entry) => entry === `${this.mark}=1` || this.#tokens.has(entry))
        return marked || stat(pid)?.ppid === process.pid
      })
      .map((pid) => `${pid} ${stat(pid)?.comm}`)
  }

  /** Resolves when nothing is left of a supervisor that was killed. */
  async swept(): Promise<void> {
    await eventually(() => this.processes().length === 0, 'all processes are ended')
    await eventually(() => readdirSync(this.runtimeDirectory).length === 0, 'its directories are removed')
  }

  async leave(): Promise<void> {
    const stopped = await Promise.allSettled(this.#supervisors.map((supervisor) => supervisor.stop({ graceMs: 200 })))
    const processes = this.processes()
    const directories = readdirSync(this.runtimeDirectory)
    // A test that fails leaves nothing either.
    for (const entry of processes) process.kill(Number(entry.split(' ')[0]), 'SIGKILL')
    rmSync(this.directory, { recursive: true })
    expect(stopped.filter((result) => result.status === 'rejected')).toEqual([])
    expect({ processes, directories }).toEqual({ processes: [], directories: [] })
  }
}

/** A place for each test of a file or block, which must be empty at its end. */
export function usePlace(engine: 'spawn' | 'criu'): { readonly current: Place } {
  const holder = { current: undefined as unknown as Place }
  beforeEach(() => {
    holder.current = new Place(engine)
  })
  afterEach(() => holder.current.leave())
  return holder
}

/** Sends the app one command and gives the line that it answers. */
export async function ask(child: Child, command: string): Promise<string> {
  child.stdin.write(`${command}\n`)
  for await (const line of child.lines()) return line
  throw new Error(`the app ended without an answer to ${command}`)
}

/** Looks again until it is so, for at most ten seconds. */
export async function eventually(condition: () => boolean, what: string): Promise<void> {
  for (const deadline = Date.now() + 10_000; !condition(); ) {
    if (Date.now() > deadline) throw new Error(`it did not come to this within 10 s: ${what}`)
    await new Promise((resolve) => setTimeout(resolve, 10))
  }
}
