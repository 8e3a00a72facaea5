/**
 * How criu is executed for one supervisor: as whom, with which environment, and who is told of the processes that come
 * to be (the guard, so that they end with the supervisor). It knows no images.
 */
import { chownSync, fchownSync } from 'node:fs'
import { userInfo } from 'node:os'
import { stat } from '../../linux/proc.js'
import type { Criu } from './binary.js'

/** Told of every process, so that none outlives a supervisor that is killed. */
export interface ProcessRegistry {
  track(pid: number, startTicks: number): void
  trackCriu(pid: number, startTicks: number): void
  forget(pid: number): void
}

export interface Worker {
  uid: number
  gid: number
}

export class Launcher {
  readonly argv: readonly string[]
  /** criu runs as the worker's user, with the capabilities that a restore needs and no more. */
  readonly unprivileged: boolean

  constructor(
    criu: Criu,
    /** criu's own; it carries the supervisor's token too, so that the guard finds it. */
    readonly env: Readonly<Record<string, string>>,
    private readonly registry: ProcessRegistry,
    private readonly worker: Worker | undefined,
  ) {
    const { uid } = userInfo()
    const other = worker !== undefined && worker.uid !== uid
    this.unprivileged = other || uid !== 0
    this.argv = other ? [...asUser(worker), ...criu.argv] : criu.argv
  }

  started(pid: number): void {
    this.registry.trackCriu(pid, stat(pid)?.startTicks ?? 0)
  }

  ended(pid: number): void {
    this.registry.forget(pid)
  }

  track(pid: number): void {
    this.registry.track(pid, stat(pid)?.startTicks ?? 0)
  }

  forget(pid: number): void {
    this.registry.forget(pid)
  }

  /** Makes a descriptor of ours (a pipe's end, which criu opens again by its name) the worker's. */
  readonly give = (fd: number): void => {
    if (this.worker && this.argv.length > 0 && this.unprivileged && process.getuid?.() === 0)
      fchownSync(fd, this.worker.uid, this.worker.gid)
  }

  /** The same for a path: a derived directory and what lies in it. */
  readonly givePath = (path: string): void => {
    if (this.worker && this.unprivileged && process.getuid?.() === 0) chownSync(path, this.worker.uid, this.worker.gid)
  }
}

/** The capabilities that criu needs where it is not root: to choose ids, to stop and to read processes, to set their limits. */
export const CRIU_CAPABILITIES = ['checkpoint_restore', 'sys_ptrace', 'sys_admin', 'setpcap'] as const

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
