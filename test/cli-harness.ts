/** What the tests of the command line share: the real CLI as a process, supervisors that it runs, and a look for what is left behind. */
import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdtempSync, readdirSync, rmSync } from 'node:fs'
import { Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { expect } from 'vitest'
import { allPids, environment, isAlive } from '../src/linux/proc.js'
import { closeAll, makePipes } from '../src/pipes.js'

const REPOSITORY = fileURLToPath(new URL('..', import.meta.url))
/** Absolute, since the CLI is started in other directories too. */
const TSX = import.meta.resolve('tsx')
export const CLI = [process.execPath, '--import', TSX, join(REPOSITORY, 'src/cli/main.ts')] as const

/** Says `ready`, then does as its stdin says: `exit N`, `signal NAME`, `err TEXT`; else it repeats the line. */
export const APP = [process.execPath, join(REPOSITORY, 'test/fixtures/cli/app.mjs')] as const

export interface Result {
  readonly code: number | null
  readonly signal: NodeJS.Signals | null
  readonly stdout: string
  readonly stderr: string
}

export interface CallOptions {
  readonly input?: string
  readonly env?: Readonly<Record<string, string | undefined>>
  readonly cwd?: string
}

/** A running CLI, with real pipes as a shell makes them: Node's own would be socket pairs. */
export interface Started {
  readonly process: ChildProcess
  readonly stdin: Socket
  readonly stdout: Socket
  readonly stderr: Socket
}

export interface Running extends Started {
  readonly name: string
  readonly pid: number
  readonly socket: string
  readonly ended: Promise<Result>
}

let sequence = 0

export class Terminal {
  readonly directory = mkdtempSync(join(tmpdir(), 'warmfork-cli-'))
  readonly runtimeDirectory = join(this.directory, 'run')
  readonly store = join(this.directory, 'store')
  readonly #mark = `WARMFORK_CLI_TEST_${process.pid}_${sequence++}`
  readonly #running: Running[] = []

  /** Starts the CLI with these descriptors. */
  spawn(
    args: readonly string[],
    stdio: readonly number[] | 'pipe',
    { env = {}, cwd = this.directory }: CallOptions = {},
  ) {
    const [file, ...before] = CLI
    return spawn(file, [...before, ...args], {
      cwd,
      env: { ...process.env, NO_COLOR: undefined, FORCE_COLOR: undefined, ...env, [this.#mark]: '1' },
      stdio: stdio === 'pipe' ? stdio : [...stdio],
      timeout: 50_000,
      killSignal: 'SIGKILL',
    })
  }

  async start(args: readonly string[], options: CallOptions = {}): Promise<Started> {
    const { ours, theirs } = (await makePipes())!
    const child = this.spawn(args, theirs, options)
    closeAll(theirs)
    const stdin = new Socket({ fd: ours[0], readable: false, writable: true })
    stdin.on('error', () => {})
    const [stdout, stderr] = [ours[1], ours[2]].map((fd) => new Socket({ fd, readable: true, writable: false }))
    return { process: child, stdin, stdout: stdout!, stderr: stderr! }
  }

  /** Runs the CLI to its end. */
  async call(args: readonly string[], options: CallOptions = {}): Promise<Result> {
    const started = await this.start(args, options)
    started.stdin.end(options.input ?? '')
    return collect(started)
  }

  /** The flags that keep a command in this place. */
  get here(): string[] {
    return ['--runtime-directory', this.runtimeDirectory]
  }

  /** A supervisor, once forks can be had. */
  async run(
    name: string,
    args: readonly string[] = [],
    command: readonly string[] = APP,
    options: CallOptions = {},
  ): Promise<Running> {
    const flags = ['--json', '--name', name, '--store', this.store, ...this.here]
    const ready = args.some((arg) => arg.startsWith('--ready')) ? [] : ['--ready-output', 'ready']
    const started = await this.start(['run', ...flags, ...ready, ...args, '--', ...command], options)
    const ended = collect(started)
    const { pid, socket } = JSON.parse(await until(started.stdout, ended, /\n/)) as { pid: number; socket: string }
    const running = { ...started, name, pid, socket, ended }
    this.#running.push(running)
    return running
  }

  /** Processes that were started from here and live. */
  processes(): string[] {
    return allPids()
      .filter((pid) => pid !== process.pid && isAlive(pid) && environment(pid)?.includes(`${this.#mark}=1`))
      .map(String)
  }

  /** Ends what runs, and sees that nothing is left. */
  async leave(): Promise<void> {
    for (const running of this.#running) running.process.kill('SIGTERM')
    await Promise.all(this.#running.map(({ ended }) => ended))
    // A guard ends what a killed supervisor left.
    for (let i = 0; i < 100 && this.processes().length > 0; i++) await sleep(20)
    const processes = this.processes()
    const directories = namesIn(this.runtimeDirectory)
    rmSync(this.directory, { recursive: true })
    expect({ processes, directories }).toEqual({ processes: [], directories: [] })
  }
}

function namesIn(directory: string): string[] {
  try {
    return readdirSync(directory)
  } catch {
    return []
  }
}

/** What came over a stream by the time that it matched. */
export async function until(stream: Socket, ended: Promise<Result>, pattern: RegExp): Promise<string> {
  return new Promise((resolve, reject) => {
    let text = ''
    stream.on('data', (chunk) => {
      text += chunk
      if (pattern.test(text)) resolve(text)
    })
    void ended.then(({ code, stderr }) => reject(new Error(`it ended with ${code}: ${stderr}`)))
  })
}

/** What it wrote and how it ended. What it has left running may hold its pipes still: then they are not waited for. */
export async function collect({ process: child, stdout, stderr }: Started): Promise<Result> {
  const out: Buffer[] = []
  const err: Buffer[] = []
  stdout.on('data', (chunk: Buffer) => out.push(chunk))
  stderr.on('data', (chunk: Buffer) => err.push(chunk))
  const closed = Promise.all([once(stdout, 'close'), once(stderr, 'close')])
  const [code, signal] = await once(child, 'exit')
  await Promise.race([closed, sleep(2_000)])
  stdout.destroy()
  stderr.destroy()
  return { code, signal, stdout: Buffer.concat(out).toString(), stderr: Buffer.concat(err).toString() }
}
