/**
 * Ends processes with all that they have started: SIGTERM to each, which may end in peace and take its own along, then SIGKILL to
 * whatever is left. It knows processes by id and start time, and nothing of templates, children or engines.
 */

import { constants } from 'node:os'
import { setTimeout as sleep } from 'node:timers/promises'
import { allPids, isAlive, type ProcStat, read, stat } from './linux/proc.js'

const ON_LINUX = process.platform === 'linux'
const LOOK_AGAIN_MS = 25
const GONE_TIMEOUT_MS = 2_000

export interface Endable {
  readonly pid: number
  /** Settles when the process itself has ended; it never rejects. */
  readonly exited: Promise<unknown>
  /** Whether it is on a terminal, so that it can be told as one that hangs up tells. */
  readonly isTTY?: boolean
  kill(signal: NodeJS.Signals): boolean
}

/**
 * The processes of some sessions and their descendants, without zombies. Templates and children lead a session each, so that what
 * they started can be told even after they have ended and others adopted it. One scan of /proc, however many sessions.
 */
export function sessionMembers(leaders: ReadonlySet<number>): ProcStat[] {
  if (!ON_LINUX || leaders.size === 0) return []
  const all = new Map(
    allPids()
      .flatMap((pid) => stat(pid) ?? [])
      .map((each) => [each.pid, each]),
  )
  const known = new Map<number, boolean>()
  const belongs = (process_: ProcStat): boolean => {
    let answer = known.get(process_.pid)
    if (answer !== undefined) return answer
    // For the time of the walk, should the ids have changed under it into a circle.
    known.set(process_.pid, false)
    const parent = all.get(process_.ppid)
    answer = leaders.has(process_.pid) || leaders.has(process_.sid) || (parent !== undefined && belongs(parent))
    known.set(process_.pid, answer)
    return answer
  }
  return [...all.values()].filter((each) => each.state !== 'Z' && each.state !== 'X' && belongs(each))
}

/** Sends a signal to a process only if it is still the one that was seen. */
export function signalIfSame(seen: ProcStat, signal: NodeJS.Signals): void {
  if (!isAlive(seen.pid, seen.startTicks)) return
  try {
    process.kill(seen.pid, signal)
  } catch {
    // It ended in between, which is what was wanted.
  }
}

/**
 * Ends within a time: SIGTERM, `graceMs` for the processes and for what they started, then SIGKILL for the rest; with 0, SIGKILL at
 * once. Resolves when the processes themselves have ended.
 */
export async function endTrees(targets: readonly Endable[], graceMs: number): Promise<void> {
  if (targets.length === 0) return
  const leaders = new Set(targets.map((target) => target.pid))
  const members = sessionMembers(leaders)
  const startTicks = new Map(members.map((member) => [member.pid, member.startTicks]))
  const others = () => {
    // The id of one that has ended can be somebody else's by now, whose children are no business of ours.
    const ours = [...leaders].filter((pid) => (stat(pid)?.startTicks ?? startTicks.get(pid)) === startTicks.get(pid))
    const found = new Map([...members, ...sessionMembers(new Set(ours))].map((member) => [member.pid, member]))
    return [...found.values()].filter((each) => !leaders.has(each.pid) && isAlive(each.pid, each.startTicks))
  }
  const ended = Promise.all(targets.map((target) => target.exited))
  if (graceMs > 0) {
    const deadline = Date.now() + graceMs
    for (const target of targets) {
      target.kill('SIGTERM')
      // An interactive shell ignores the first, and heeds what comes when its terminal goes.
      if (target.isTTY && ignores(target.pid, 'SIGTERM')) target.kill('SIGHUP')
      // What is stopped does not see a SIGTERM before it is continued.
      target.kill('SIGCONT')
    }
    const over = new AbortController()
    await Promise.race([ended, sleep(graceMs, undefined, { signal: over.signal }).catch(() => {})])
    over.abort()
    // Who has not heard of it from its parent hears it now.
    for (const orphan of others()) signalIfSame(orphan, 'SIGTERM')
    while (ON_LINUX && Date.now() < deadline && others().length > 0) await sleep(LOOK_AGAIN_MS)
  }
  const left = others()
  for (const target of targets) {
    target.kill('SIGKILL')
    if (!ON_LINUX) killGroup(target.pid)
  }
  for (const member of left) signalIfSame(member, 'SIGKILL')
  await ended
  // A killed process needs a moment to be gone; one that waits in the kernel (state D) may need for ever.
  const giveUpAt = Date.now() + GONE_TIMEOUT_MS
  while (left.some((each) => isAlive(each.pid, each.startTicks)) && Date.now() < giveUpAt) await sleep(1)
}

function ignores(pid: number, signal: NodeJS.Signals): boolean {
  const ignored = /^SigIgn:\s*([0-9a-f]+)$/m.exec(read(`/proc/${pid}/status`) ?? '')?.[1]
  return ((BigInt(`0x${ignored ?? '0'}`) >> BigInt(constants.signals[signal] - 1)) & 1n) === 1n
}

function killGroup(leader: number): void {
  try {
    process.kill(-leader, 'SIGKILL')
  } catch {
    // No such group any more.
  }
}
