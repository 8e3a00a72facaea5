/** A supervisor in a process of its own: to be killed, to run as somebody else, or to run under limits. */
import { type ChildProcess, spawn } from 'node:child_process'
import { createInterface } from 'node:readline'
import { fileURLToPath } from 'node:url'
import type { ExitStatus } from '../src/linux/reaper.js'
import type { SupervisorOptions } from '../src/options.js'

const SCRIPT = fileURLToPath(new URL('fixtures/robustness/supervisor.ts', import.meta.url))
const ROOT = fileURLToPath(new URL('..', import.meta.url))

/** What is said of a supervisor by its process. */
export interface RemoteState {
  state: string
  engine: string
  generation: number
  template: number
  parked: number[]
  children: number[]
  memory: string
  warnings: string[]
}

export interface RemoteError {
  code: string
  message: string
}

export interface ProcessOptions {
  /** What comes before `node`: setpriv, unshare, a shell that sets limits. */
  wrapper?: readonly string[]
  env?: Record<string, string>
}

export class SupervisorProcess {
  readonly process: ChildProcess
  /** Settles with the exit code, or the name of the signal. */
  readonly exited: Promise<number | string>
  /** Phases of the start that are done, `running` the last. */
  readonly phases: string[] = []
  readonly warnings: string[] = []
  failed: RemoteError | undefined
  stderr = ''
  readonly #calls = new Map<number, { resolve: (result: never) => void; reject: (error: Error) => void }>()
  #next = 0
  readonly #watchers = new Set<() => void>()

  constructor(options: SupervisorOptions, { wrapper = [], env = {} }: ProcessOptions = {}) {
    const [file, ...args] = [...wrapper, process.execPath, '--import', 'tsx', SCRIPT, JSON.stringify(options)]
    this.process = spawn(file!, args, {
      cwd: ROOT,
      // Only what marks the place: what a supervisor does with its own environment is not looked at here.
      env: { ...process.env, ...env },
      stdio: ['pipe', 'pipe', 'pipe'],
    })
    this.process.stdin!.on('error', () => {})
    this.process.stderr!.setEncoding('utf8').on('data', (text: string) => {
      this.stderr = (this.stderr + text).slice(-8192)
    })
    this.exited = new Promise((resolve) => {
      this.process.once('exit', (code, signal) => {
        for (const { reject } of this.#calls.values()) reject(new Error(`the supervisor ended: ${this.stderr}`))
        resolve(signal ?? code ?? -1)
        this.#tell()
      })
    })
    createInterface({ input: this.process.stdout! }).on('line', (line) => this.#hear(JSON.parse(line)))
  }

  get pid(): number {
    return this.process.pid!
  }

  #hear(message: {
    progress?: string
    warning?: string
    failed?: RemoteError
    id?: number
    result?: unknown
    error?: RemoteError
    message?: string
  }): void {
    if (message.progress) this.phases.push(message.progress)
    if (message.warning) this.warnings.push(`${message.warning}: ${message.message}`)
    if (message.failed) this.failed = message.failed
    const call = this.#calls.get(message.id ?? -1)
    if (call) {
      this.#calls.delete(message.id!)
      if (message.error) call.reject(Object.assign(new Error(message.error.message), message.error))
      else call.resolve(message.result as never)
    }
    this.#tell()
  }

  #tell(): void {
    for (const watcher of this.#watchers) watcher()
  }

  /** Resolves once the phase is done. Rejects where the process ends or fails before. */
  async reached(phase: string): Promise<void> {
    await new Promise<void>((resolve, reject) => {
      const watcher = () => {
        if (this.phases.includes(phase)) resolve()
        else if (this.failed) reject(Object.assign(new Error(this.failed.message), this.failed))
        else if (this.process.exitCode !== null || this.process.signalCode !== null)
          reject(new Error(`it ended before ${phase}: ${this.stderr}`))
        else return
        this.#watchers.delete(watcher)
      }
      this.#watchers.add(watcher)
      watcher()
    })
  }

  call<T>(action: string, ...args: unknown[]): Promise<T> {
    return new Promise((resolve, reject) => {
      const id = this.#next++
      this.#calls.set(id, { resolve, reject })
      this.process.stdin!.write(`${JSON.stringify({ id, action, args })}\n`)
    })
  }

  fork(): Promise<number> {
    return this.call('fork')
  }

  ask(pid: number, text: string): Promise<string> {
    return this.call('ask', pid, text)
  }

  /** Kills a child. */
  end(pid: number): Promise<ExitStatus> {
    return this.call('end', pid)
  }

  state(): Promise<RemoteState> {
    return this.call('state')
  }

  /** Stops it in good order. */
  async stop(): Promise<void> {
    await this.call('stop')
    this.process.stdin!.end()
    await this.exited
  }

  /** kill -9; resolves when it is dead. */
  async kill(): Promise<void> {
    this.process.kill('SIGKILL')
    await this.exited
  }
}
