/**
 * Leases: files in a generation's `leases` directory that say which process needs it. The name alone carries the lease,
 * so that taking one costs the making of an empty file (10 µs on ext4). It knows no manifest and removes no generation.
 *
 * A lease is valid while its process lives: the id with the same start time, on the same boot. So a holder that
 * crashes blocks nothing for ever.
 */
import { closeSync, lstatSync, openSync, readdirSync, readlinkSync, unlinkSync } from 'node:fs'
import { join } from 'node:path'
import { errnoOf } from '../errors.js'
import { bootId, isAlive, stat } from '../linux/proc.js'

export const LEASE_DIRECTORY = 'leases'

/** A process that needs the generation. */
export interface Holder {
  readonly pid: number
  readonly startTicks: number
}

/** How many leases that we have granted share one file, by its path: the same process may hold a generation twice. */
const shared = new Map<string, number>()

export class Lease implements Holder {
  readonly #path: string | undefined
  #released = false

  private constructor(
    readonly pid: number,
    readonly startTicks: number,
    path: string | undefined,
  ) {
    this.#path = path
  }

  /**
   * Takes a lease. On a full or read-only file system it is granted without a file: forks must go on there, and the
   * supervisor's own lease, taken before, still holds the generation. Throws ENOENT where the generation is gone.
   */
  static take(generationDirectory: string, holder: Holder): Lease {
    const path = join(generationDirectory, LEASE_DIRECTORY, leaseName(holder))
    const sharers = shared.get(path) ?? 0
    try {
      closeSync(openSync(path, 'wx', 0o600))
    } catch (error) {
      const errno = errnoOf(error)
      if (errno === 'ENOSPC' || errno === 'EDQUOT' || errno === 'EROFS') {
        return new Lease(holder.pid, holder.startTicks, undefined)
      }
      if (errno !== 'EEXIST') throw error
    }
    // A prune may have moved the directory away while the file was made. Where the path still leads to it, the move, if it
    // comes, comes later, and the prune looks for leases after it.
    lstatSync(path)
    shared.set(path, sharers + 1)
    return new Lease(holder.pid, holder.startTicks, path)
  }

  /** Whether other processes can see it: false where the file system let no file be made. */
  get recorded(): boolean {
    return this.#path !== undefined
  }

  /** Gives it back. Twice does no harm, nor does a generation that is gone. */
  release(): void {
    const path = this.#path
    if (path === undefined || this.#released) return
    this.#released = true
    const sharers = (shared.get(path) ?? 1) - 1
    if (sharers > 0) {
      shared.set(path, sharers)
      return
    }
    shared.delete(path)
    remove(path)
  }
}

/** The lease of this process in a directory that nobody can see yet; `take` finds it later. */
export function plantLease(generationDirectory: string): void {
  closeSync(openSync(join(generationDirectory, LEASE_DIRECTORY, leaseName(ourselves())), 'wx', 0o600))
}

/** This process, as a holder. */
export function ourselves(): Holder {
  return { pid: process.pid, startTicks: stat(process.pid)?.startTicks ?? 0 }
}

/** What is in the directory: living holders, and the files of dead ones. */
export interface LeaseSurvey {
  readonly holders: readonly Holder[]
  readonly dead: readonly string[]
}

/**
 * Reads the leases. `trustPids`: the caller is the only supervisor of the store, so a lease from another pid namespace
 * (a container that is gone) is dead; for anybody else it is alive, because its pid says nothing here.
 */
export function surveyLeases(generationDirectory: string, trustPids: boolean): LeaseSurvey {
  const directory = join(generationDirectory, LEASE_DIRECTORY)
  const holders: Holder[] = []
  const dead: string[] = []
  let names: string[] = []
  try {
    names = readdirSync(directory)
  } catch (error) {
    if (errnoOf(error) !== 'ENOENT') throw error
  }
  const here = place()
  for (const name of names) {
    const match = LEASE_NAME.exec(name)
    if (!match) continue
    const holder = { pid: Number(match[1]), startTicks: Number(match[2]) }
    const sameBoot = match[3] === here.boot
    const samePids = match[4] === here.pids
    const alive = sameBoot && (samePids ? isAlive(holder.pid, holder.startTicks) : !trustPids)
    if (alive) holders.push(holder)
    else dead.push(join(directory, name))
  }
  return { holders, dead }
}

/** Removes the files of dead holders. */
export function removeDead(survey: LeaseSurvey): void {
  for (const path of survey.dead) remove(path)
}

const LEASE_NAME = /^(\d+)-(\d+)-([0-9a-f]{8})-(\d+)$/

function leaseName({ pid, startTicks }: Holder): string {
  const { boot, pids } = place()
  return `${pid}-${startTicks}-${boot}-${pids}`
}

let known: { boot: string; pids: string } | undefined

/** The boot and the pid namespace in which our pids mean something: they cannot change while we run. */
function place(): { boot: string; pids: string } {
  known ??= { boot: bootId().replaceAll('-', '').slice(0, 8), pids: pidNamespace() }
  return known
}

function pidNamespace(): string {
  try {
    return /\d+/.exec(readlinkSync('/proc/self/ns/pid'))?.[0] ?? '0'
  } catch {
    return '0'
  }
}

function remove(path: string): void {
  try {
    unlinkSync(path)
  } catch (error) {
    const errno = errnoOf(error)
    if (errno !== 'ENOENT' && errno !== 'EROFS') throw error
  }
}
