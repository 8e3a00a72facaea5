/**
 * What a test may leave behind, and the look whether it did: processes, directories, sockets, mounts and descriptors. A process
 * belongs to a place also where it has cleared its environment and leads a session of its own: it maps or has open what lies there.
 */
import { lstatSync, readdirSync, readFileSync, readlinkSync } from 'node:fs'
import { join } from 'node:path'
import { afterEach, beforeEach, expect } from 'vitest'
import { allPids, environment, isAlive, stat } from '../src/linux/proc.js'
import type { SupervisorOptions } from '../src/options.js'
import type { StartOptions, Supervisor } from '../src/supervisor.js'
import { Place } from './engines-under-test.js'

/** What is there still; all of it empty where nothing was left. */
export interface Leftovers {
  processes: string[]
  /** Of supervisors, in the runtime directory. */
  directories: string[]
  /** Of derived images, in /dev/shm. */
  derived: string[]
  /** Drafts that are not swept, in the store. */
  drafts: string[]
  /** Unix sockets with an address in the place. */
  sockets: string[]
  mounts: string[]
}

export const NOTHING: Leftovers = { processes: [], directories: [], derived: [], drafts: [], sockets: [], mounts: [] }

function text(path: string): string {
  try {
    return readFileSync(path, 'latin1')
  } catch {
    return ''
  }
}

function entries(path: string): string[] {
  try {
    return readdirSync(path)
  } catch {
    return []
  }
}

/** Left there by others before these tests began: ids of supervisors come again. */
const stale = new Set(entries('/dev/shm'))

/** Descriptors, working directory and program of a process, as far as they are files. */
function openPaths(pid: number): string[] {
  const links = entries(`/proc/${pid}/fd`).map((fd) => `/proc/${pid}/fd/${fd}`)
  return [...links, `/proc/${pid}/cwd`, `/proc/${pid}/exe`].flatMap((link) => {
    try {
      return readlinkSync(link)
    } catch {
      return []
    }
  })
}

/** Processes that came to be for a place. `marks`: what stands in their environments or arguments. */
export function processesOf(directory: string, marks: readonly string[]): number[] {
  return allPids().filter((pid) => {
    if (pid === process.pid || !isAlive(pid)) return false
    const words = [...(environment(pid) ?? []), ...text(`/proc/${pid}/cmdline`).split('\0')]
    if (words.some((word) => marks.some((mark) => word.includes(mark)))) return true
    return text(`/proc/${pid}/maps`).includes(`${directory}/`) || openPaths(pid).some((path) => inside(path, directory))
  })
}

function inside(path: string, directory: string): boolean {
  return path === directory || path.startsWith(`${directory}/`)
}

/** The tokens of the supervisors that have a runtime directory now. */
export function tokensIn(runtimeDirectory: string): string[] {
  return entries(runtimeDirectory).flatMap((name) =>
    entries(join(runtimeDirectory, name)).flatMap((run) => /^run-(.+)$/.exec(run)?.[1] ?? []),
  )
}

/** `supervisors`: the ids of their processes. */
export function leftovers(place: Place, tokens: readonly string[] = [], supervisors = [process.pid]): Leftovers {
  const { directory, runtimeDirectory, mark } = place
  const store = join(directory, 'store')
  return {
    processes: processesOf(directory, [mark, ...tokens]).map(
      (pid) => `${pid} ${stat(pid)?.state} ${text(`/proc/${pid}/cmdline`).replaceAll('\0', ' ')}`,
    ),
    directories: entries(runtimeDirectory).flatMap((name) =>
      entries(join(runtimeDirectory, name)).map((run) => `${name}/${run}`),
    ),
    derived: entries('/dev/shm').filter(
      (name) => !stale.has(name) && supervisors.some((pid) => name.startsWith(`warmfork-${pid}-`)),
    ),
    drafts: entries(store).flatMap((name) =>
      entries(join(store, name, 'generations')).filter((generation) => generation.startsWith('.')),
    ),
    sockets: text('/proc/net/unix')
      .split('\n')
      .map((line) => line.trim().split(' ').at(-1) ?? '')
      .filter((address) => inside(address, directory)),
    mounts: text('/proc/self/mountinfo')
      .split('\n')
      .map((line) => line.split(' ')[4] ?? '')
      .filter((point) => inside(point, directory)),
  }
}

/** Descriptors of this process: what each leads to. What Node opens for itself on first use is left out, and what pidusage keeps for 5 s. */
export function openDescriptors(): string[] {
  return entries('/proc/self/fd')
    .flatMap((fd) => {
      try {
        return readlinkSync(`/proc/self/fd/${fd}`)
      } catch {
        return []
      }
    })
    .filter(
      (target) =>
        !/^(anon_inode:(inotify|\[(eventfd|eventpoll|io_uring)\])|\/dev\/(null|urandom)|\/proc\/\d+\/(fd|stat))$/.test(
          target,
        ),
    )
    .sort()
}

/** Zombies that this process has not reaped. */
export function zombies(): string[] {
  return allPids().flatMap((pid) => {
    const found = stat(pid)
    return found?.ppid === process.pid && found.state === 'Z' ? `${pid} ${found.comm}` : []
  })
}

/** A place that remembers its supervisors, so that they can be stopped before the look at what is left. */
export class CleanPlace extends Place {
  readonly #started: Supervisor[] = []

  constructor() {
    super('criu')
  }

  /** Started in the place, so that each process of it can be told by its working directory. */
  override options(options: Partial<SupervisorOptions> = {}): SupervisorOptions {
    return super.options({ cwd: this.directory, ...options })
  }

  override start(options: Partial<SupervisorOptions> = {}, start: StartOptions = {}): Promise<Supervisor> {
    return super.start(options, {
      ...start,
      onCreate: (supervisor) => {
        this.#started.push(supervisor)
        start.onCreate?.(supervisor)
      },
    })
  }

  async stopAll(): Promise<void> {
    await Promise.all(this.#started.map((supervisor) => supervisor.stop({ graceMs: 200 })))
  }
}

/**
 * A place for each test, in which the supervisors run in this very process. After each test they are stopped, and then no process,
 * directory, draft, socket, mount, zombie or descriptor may be left.
 */
export function useCleanPlace(): { readonly current: CleanPlace } {
  const holder = { current: undefined as unknown as CleanPlace }
  let descriptors: string[] = []
  beforeEach(() => {
    holder.current = new CleanPlace()
    descriptors = openDescriptors()
  })
  afterEach(async () => {
    const place = holder.current
    const tokens = tokensIn(place.runtimeDirectory)
    await place.stopAll()
    const left = leftovers(place, tokens)
    await place.leave()
    expect(left).toEqual(NOTHING)
    expect({ zombies: zombies(), descriptors: added(descriptors, openDescriptors()) }).toEqual({
      zombies: [],
      descriptors: [],
    })
  })
  return holder
}

function added(before: readonly string[], after: readonly string[]): string[] {
  const left = [...before]
  return after.filter((each) => {
    const at = left.indexOf(each)
    if (at >= 0) left.splice(at, 1)
    return at < 0
  })
}

/** Looks again until nothing is left, for some seconds: what was killed needs a moment to be gone. Gives what is left then. */
export async function untilNothingLeft(look: () => Leftovers, timeoutMs = 8_000): Promise<Leftovers> {
  for (const deadline = Date.now() + timeoutMs; ; ) {
    const left = look()
    if (Object.values(left).every((list: string[]) => list.length === 0) || Date.now() > deadline) return left
    await new Promise((resolve) => setTimeout(resolve, 20))
  }
}

export const exists = (path: string) => lstatSync(path, { throwIfNoEntry: false }) !== undefined
