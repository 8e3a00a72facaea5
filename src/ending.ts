/**
 * Ends a process with all that it has started: SIGTERM to the process, which may end in peace and take its own along, then
 * SIGKILL to whatever is left. It knows processes by id and start time, and nothing of templates, children or engines.
 */
import { setTimeout as sleep } from 'node:timers/promises'
import { allPids, isAlive, type ProcStat, stat } from './linux/proc.js'

const ON_LINUX = process.platform === 'linux'
const LOOK_AGAIN_MS = 25

export interface Endable {
  readonly pid: number
  /** Settles when the process itself has ended; it never rejects. */
  readonly exited: Promise<unknown>
  kill(signal: NodeJS.Signals): boolean
}

/**
 * The processes of a session and their descendants, the leader's own descendants too where they left the session. Templates and
 * children lead a session each, so that what they started can be told even after they have ended and others adopted it.
 */
export function sessionMembers(leader: number): ProcStat[] {
  if (!ON_LINUX) return []
  const all = allPids().flatMap((pid) => stat(pid) ?? [])
  const found = new Set<number>([leader])
  const members: ProcStat[] = []
  // A process can stand before its parent in the list, since ids wrap: look until nothing is added.
  for (let before = -1; before !== members.length; ) {
    before = members.length
    for (const process of all) {
      if (process.pid === leader ? members.some((member) => member.pid === leader) : found.has(process.pid)) continue
      if (process.pid !== leader && process.sid !== leader && !found.has(process.ppid)) continue
      found.add(process.pid)
      members.push(process)
    }
  }
  return members.filter((member) => member.state !== 'Z' && member.state !== 'X')
}

/** Sends a signal to a process only if it is still the one that was seen. */
function signalIfSame(process_: ProcStat, signal: NodeJS.Signals): void {
  if (!isAlive(process_.pid, process_.startTicks)) return
  try {
    process.kill(process_.pid, signal)
  } catch {
    // It ended in between, which is what was wanted.
  }
}

/** Ends at once. SIGKILL reaches stopped processes too. */
export async function killTree(target: Endable): Promise<void> {
  const members = sessionMembers(target.pid)
  target.kill('SIGKILL')
  if (!ON_LINUX) killGroup(target.pid)
  for (const member of members) if (member.pid !== target.pid) signalIfSame(member, 'SIGKILL')
  await target.exited
}

/**
 * Ends within a time: SIGTERM, `graceMs` for the process and for what it started, then SIGKILL for the rest. Resolves when
 * the process itself has ended.
 */
export async function endTree(target: Endable, graceMs: number): Promise<void> {
  const members = sessionMembers(target.pid)
  const deadline = Date.now() + graceMs
  target.kill('SIGTERM')
  // What is stopped does not see a SIGTERM before it is continued.
  target.kill('SIGCONT')
  const left = new AbortController()
  await Promise.race([target.exited, sleep(graceMs, undefined, { signal: left.signal }).catch(() => {})])
  left.abort()
  if (!ON_LINUX) {
    target.kill('SIGKILL')
    killGroup(target.pid)
    await target.exited
    return
  }
  const others = () => {
    const now = new Map([...members, ...sessionMembers(target.pid)].map((member) => [member.pid, member]))
    now.delete(target.pid)
    return [...now.values()].filter((member) => isAlive(member.pid, member.startTicks))
  }
  while (Date.now() < deadline && others().length > 0) await sleep(LOOK_AGAIN_MS)
  target.kill('SIGKILL')
  for (const member of others()) signalIfSame(member, 'SIGKILL')
  await target.exited
}

function killGroup(leader: number): void {
  try {
    process.kill(-leader, 'SIGKILL')
  } catch {
    // No such group any more.
  }
}
