/**
 * How criu is executed for one supervisor: as whom, with which environment, and who is told of the processes that come
 * to be (the guard, so that they end with the supervisor). It knows no images.
 */
import { chmodSync, chownSync, fchownSync } from 'node:fs'
import { nowTicks, stat } from '../../linux/proc.js'
import { giveSlave } from '../../linux/pty.js'
import type { Criu } from './binary.js'
import { ensureKernelCache } from './kdat.js'
import { CRIU_CAPABILITIES } from './rights.js'

/** A switch of CRIU's own fault injection: threads are followed with single steps of the tracer instead. */
const NO_HARDWARE_BREAKPOINTS = '130'

/** Told of every process, so that none outlives a supervisor that is killed. */
export interface ProcessRegistry {
  track(pid: number, startTicks: number): void
  trackCriu(pid: number, startTicks: number): void
  /** The id may soon be that of a process of ours, which is half restored then; `track` or `forget` takes it back. */
  expect(pid: number, startTicks: number): void
  forget(pid: number): void
  /** The directory with all in it, or the file, goes with the supervisor. */
  removeAtEnd(path: string, kind?: 'directory' | 'file'): void
}

export interface Worker {
  uid: number
  gid: number
}

export class Launcher {
  readonly argv: readonly string[]
  /** criu runs as the worker's user, with the capabilities that a restore needs and no more. */
  readonly unprivileged: boolean
  readonly env: Readonly<Record<string, string>>
  readonly #registry: ProcessRegistry
  /** Whom to give pipes and directories to, where criu and the children run as another user than we. */
  readonly #other: Worker | undefined

  private constructor(
    criu: Criu,
    env: Readonly<Record<string, string>>,
    registry: ProcessRegistry,
    other: Worker | undefined,
  ) {
    this.argv = criu.argv
    this.env = env
    this.#registry = registry
    this.#other = other
    this.unprivileged = other !== undefined || process.getuid?.() !== 0
  }

  /** `env` is criu's own; it carries the supervisor's token too, so that the guard finds criu by it. */
  static async prepare(
    criu: Criu,
    env: Readonly<Record<string, string>>,
    registry: ProcessRegistry,
    worker: Worker | undefined,
  ): Promise<Launcher> {
    const other = worker !== undefined && worker.uid !== process.getuid?.() ? worker : undefined
    const started = { ...criu, argv: other ? [...asUser(other), ...criu.argv] : criu.argv }
    const launcher = new Launcher(started, env, registry, other)
    // Without hardware breakpoints a restore of 30 threads takes 20 ms in place of 25, one of 100 threads 29 in place of 42.
    const cache = await ensureKernelCache(started, { unprivileged: launcher.unprivileged, ...other })
    return new Launcher(started, { CRIU_FAULT: NO_HARDWARE_BREAKPOINTS, ...env, ...cache.env }, registry, other)
  }

  started(pid: number): void {
    this.#registry.trackCriu(pid, stat(pid)?.startTicks ?? 0)
  }

  ended(pid: number): void {
    this.#registry.forget(pid)
  }

  /** The ids that a criu is about to give to processes: nothing of ours has one before this moment. */
  expect(pids: readonly number[]): void {
    const since = nowTicks()
    for (const pid of pids) this.#registry.expect(pid, since)
  }

  track(pid: number): void {
    this.#registry.track(pid, stat(pid)?.startTicks ?? 0)
  }

  forget(pid: number): void {
    this.#registry.forget(pid)
  }

  /** Whether children run as another user than we. */
  get hasOtherWorker(): boolean {
    return this.#other !== undefined
  }

  /** Makes a descriptor of ours (a pipe's end, which criu opens again by its name) the worker's. */
  readonly give = (fd: number): void => {
    if (this.#other) fchownSync(fd, this.#other.uid, this.#other.gid)
  }

  /** The same for a terminal. */
  readonly giveTerminal = (fd: number): void => {
    if (this.#other) giveSlave(fd, this.#other.uid)
  }

  /** Lets the worker enter a directory of ours, but not list it. */
  admit(path: string): void {
    if (!this.#other) return
    chownSync(path, process.getuid?.() ?? 0, this.#other.gid)
    chmodSync(path, 0o710)
  }

  /** As `give`, for a directory and what lies in it. */
  readonly givePath = (path: string): void => {
    if (this.#other) chownSync(path, this.#other.uid, this.#other.gid)
  }
}

function asUser({ uid, gid }: Worker): string[] {
  const capabilities = CRIU_CAPABILITIES.map((name) => `+${name}`).join(',')
  return [
    'setpriv',
    `--reuid=${uid}`,
    `--regid=${gid}`,
    '--clear-groups',
    `--inh-caps=-all,${capabilities}`,
    `--ambient-caps=-all,${capabilities}`,
    `--bounding-set=-all,${capabilities}`,
    '--',
  ]
}
