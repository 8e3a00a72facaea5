/** Readers of /proc. They return undefined where the process is gone, and know nothing of warmfork. */
import { closeSync, openSync, readdirSync, readFileSync, readlinkSync, readSync } from 'node:fs'

export interface ProcStat {
  pid: number
  comm: string
  /** One letter: R running, S sleeping, D waiting, T stopped, Z zombie, X dead. */
  state: string
  ppid: number
  pgid: number
  sid: number
  threads: number
  /** CPU time of it and of the children that it has waited for, user and system, in clock ticks (100 a second). */
  cpuTicks: number
  /** Since the boot, in clock ticks: with the pid it names a process for ever. */
  startTicks: number
}

/**
 * One buffer for all reads: readFileSync takes 64 KiB for each file whose size it is not told, which made 3 MiB of garbage
 * a fork, and so collections of the whole heap in the middle of forks.
 */
const buffer = Buffer.allocUnsafe(64 << 10)

/** Reads a file of /proc; undefined where the process is gone or is not ours to read. */
export function read(path: string): string | undefined {
  let fd: number | undefined
  try {
    fd = openSync(path, 'r')
    let text = ''
    for (let length = 1; length > 0; ) {
      length = readSync(fd, buffer, 0, buffer.length, null)
      text += buffer.toString('latin1', 0, length)
    }
    return text
  } catch {
    return undefined
  } finally {
    if (fd !== undefined) closeSync(fd)
  }
}

export function stat(pid: number): ProcStat | undefined {
  const text = read(`/proc/${pid}/stat`)
  if (!text) return undefined
  const close = text.lastIndexOf(')')
  const rest = text.slice(close + 2).split(' ')
  return {
    pid,
    comm: text.slice(text.indexOf('(') + 1, close),
    state: rest[0]!,
    ppid: Number(rest[1]),
    pgid: Number(rest[2]),
    sid: Number(rest[3]),
    threads: Number(rest[17]),
    cpuTicks: [11, 12, 13, 14].reduce((sum, i) => sum + Number(rest[i]), 0),
    startTicks: Number(rest[19]),
  }
}

/** Whether the process that had this id and start time still runs (a zombie does not). */
export function isAlive(pid: number, startTicks?: number): boolean {
  const found = stat(pid)
  if (!found || found.state === 'Z' || found.state === 'X') return false
  return startTicks === undefined || found.startTicks === startTicks
}

/**
 * Whether a process has ended or is about to: a zombie, one on its way out, or one for which SIGKILL waits. One that was
 * restored a moment ago runs until it takes its SIGSTOP: that is no end.
 */
export function isEnding(pid: number): boolean {
  const line = read(`/proc/${pid}/stat`)
  if (!line) return true
  const [state, ...rest] = line.slice(line.lastIndexOf(')') + 2).split(' ')
  const PF_EXITING = 0x4
  if (state === 'Z' || state === 'X' || Number(rest[5]) & PF_EXITING) return true
  const SIGKILL_BIT = 1n << 8n
  const pending = (read(`/proc/${pid}/status`) ?? '').matchAll(/^(?:SigPnd|ShdPnd):\t([0-9a-f]+)$/gm)
  return [...pending].some((found) => (BigInt(`0x${found[1]}`) & SIGKILL_BIT) !== 0n)
}

/** Whether an id is that of a process, and not of one of its further threads. */
export function isThreadGroup(pid: number): boolean {
  return new RegExp(`^Tgid:\\t${pid}$`, 'm').test(read(`/proc/${pid}/status`) ?? '')
}

/** This moment in clock ticks since the boot, as `startTicks` counts; a tick is 10 ms on all that Linux runs on today. */
export function nowTicks(): number {
  const TICKS_PER_SECOND = 100
  return Math.floor(Number.parseFloat(read('/proc/uptime') ?? '0') * TICKS_PER_SECOND)
}

/**
 * What changes whenever the first thread of a process runs (schedstat: run time, waiting time, time slices); empty where the
 * kernel does not say.
 */
export function runTrace(pid: number): string {
  return read(`/proc/${pid}/schedstat`) ?? ''
}

export function threadIds(pid: number): number[] {
  try {
    return readdirSync(`/proc/${pid}/task`).map(Number)
  } catch {
    return []
  }
}

/** The state of each thread of a process, as `/proc/PID/stat` has it: `R`, `S`, `D`, `T`, `t`, `Z` or `X`. Empty for one that is gone. */
export function threadStates(pid: number): string[] {
  return threadIds(pid).flatMap((thread) => {
    const text = read(`/proc/${pid}/task/${thread}/stat`)
    return text === undefined ? [] : (text[text.lastIndexOf(')') + 2] ?? 'X')
  })
}

export function allPids(): number[] {
  return readdirSync('/proc')
    .filter((name) => /^\d+$/.test(name))
    .map(Number)
}

/** A process and all that descend from it, parents before children. */
export function processTree(root: number): ProcStat[] {
  const first = stat(root)
  if (!first) return []
  const byParent = new Map<number, ProcStat[]>()
  for (const pid of allPids()) {
    const found = stat(pid)
    if (found) byParent.set(found.ppid, [...(byParent.get(found.ppid) ?? []), found])
  }
  const tree = [first]
  for (let i = 0; i < tree.length; i++) tree.push(...(byParent.get(tree[i]!.pid) ?? []))
  return tree
}

/** The processes that a process descends from, its parent first. */
export function ancestors(pid: number): number[] {
  const found: number[] = []
  for (let parent = stat(pid)?.ppid; parent; parent = stat(parent)?.ppid) found.push(parent)
  return found
}

/** The children of a process, in the order in which they came to it (for each of its threads). */
export function children(pid: number): number[] {
  return threadIds(pid).flatMap((thread) =>
    (read(`/proc/${pid}/task/${thread}/children`) ?? '').split(' ').filter(Boolean).map(Number),
  )
}

/** The id that a process has in its own pid namespace. */
export function namespacePid(pid: number): number | undefined {
  const line = /^NSpid:\t(.*)$/m.exec(read(`/proc/${pid}/status`) ?? '')?.[1]
  return line === undefined ? undefined : Number(line.split('\t').at(-1))
}

/** All that descend from a process, without a look at the other processes of the machine (`children` files, CONFIG_PROC_CHILDREN). */
export function descendants(root: number): number[] {
  const found: number[] = []
  const queue = [root]
  for (let pid = queue.pop(); pid !== undefined; pid = queue.pop()) {
    const below = children(pid)
    found.push(...below)
    queue.push(...below)
  }
  return found
}

/** Of /proc on all architectures of Linux. */
export const TICK_MS = 10

/** CPU time that a process and all that descend from it have used, in milliseconds; of what has ended, what was waited for. */
export function treeCpuMs(root: number): number {
  return [root, ...descendants(root)].reduce((sum, pid) => sum + (stat(pid)?.cpuTicks ?? 0), 0) * TICK_MS
}

/** What the descriptors of a process lead to: paths, `pipe:[INODE]`, `anon_inode:[eventpoll]`. */
export function openTargets(pid: number): string[] {
  let fds: string[]
  try {
    fds = readdirSync(`/proc/${pid}/fd`)
  } catch {
    return []
  }
  return fds.flatMap((fd) => {
    try {
      return readlinkSync(`/proc/${pid}/fd/${fd}`)
    } catch {
      return []
    }
  })
}

export interface MemoryUse {
  rssBytes: number
  pssBytes: number
  /** Anonymous memory: what the process has to itself. (`Private_Dirty` would count clean pages of a page file that is not yet written back.) */
  privateBytes: number
  /** Resident and not private: page files, libraries. */
  sharedBytes: number
}

/** From smaps_rollup, in bytes. */
export function memoryUse(pid: number): MemoryUse | undefined {
  const text = read(`/proc/${pid}/smaps_rollup`)
  if (!text) return undefined
  const kib = (key: string) => Number(new RegExp(`^${key}:\\s+(\\d+) kB`, 'm').exec(text)?.[1] ?? 0)
  const rssBytes = kib('Rss') * 1024
  const privateBytes = kib('Anonymous') * 1024
  return { rssBytes, pssBytes: kib('Pss') * 1024, privateBytes, sharedBytes: Math.max(0, rssBytes - privateBytes) }
}

export interface Mapping {
  start: bigint
  end: bigint
  /** `rwxp` as in maps. */
  perms: string
  offset: bigint
  inode: number
  /** Empty for anonymous memory; ends in ` (deleted)` where the file is gone. */
  path: string
  /** Two-letter kernel flags (`wf` wipe on fork, `dp` droppable …); only from `mappingsWithFlags`. */
  vmFlags: string[]
}

const MAPS_LINE = /^([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) \S+ (\d+)\s*(.*)$/

function parseMapping(line: string): Mapping | undefined {
  const m = MAPS_LINE.exec(line)
  if (!m) return undefined
  return {
    start: BigInt(`0x${m[1]}`),
    end: BigInt(`0x${m[2]}`),
    perms: m[3]!,
    offset: BigInt(`0x${m[4]}`),
    inode: Number(m[5]),
    path: m[6]!,
    vmFlags: [],
  }
}

export function mappings(pid: number): Mapping[] | undefined {
  return read(`/proc/${pid}/maps`)
    ?.split('\n')
    .flatMap((line) => parseMapping(line) ?? [])
}

/** The mappings with their kernel flags, from smaps: slower than `mappings`, since the kernel walks the page tables. */
export function mappingsWithFlags(pid: number): Mapping[] | undefined {
  const text = read(`/proc/${pid}/smaps`)
  if (!text) return undefined
  const found: Mapping[] = []
  for (const line of text.split('\n')) {
    if (line.startsWith('VmFlags:')) {
      const last = found.at(-1)
      if (last) last.vmFlags = line.slice(8).trim().split(' ')
    } else {
      const mapping = parseMapping(line)
      if (mapping) found.push(mapping)
    }
  }
  return found
}

/** The environment a process was started with, as `KEY=value` strings. */
export function environment(pid: number): string[] | undefined {
  return read(`/proc/${pid}/environ`)?.split('\0').filter(Boolean)
}

/** Differs at each boot of the machine. */
export function bootId(): string {
  return readFileSync('/proc/sys/kernel/random/boot_id', 'latin1').trim()
}

export function pidMax(): number {
  return Number(readFileSync('/proc/sys/kernel/pid_max', 'latin1'))
}

/** Inode of the pipe that a process has open on a descriptor; 0 where that is something else, or closed. */
export function pipeInode(pid: number, fd: number): bigint {
  try {
    return BigInt(/^pipe:\[(\d+)\]$/.exec(readlinkSync(`/proc/${pid}/fd/${fd}`))?.[1] ?? 0)
  } catch {
    return 0n
  }
}
