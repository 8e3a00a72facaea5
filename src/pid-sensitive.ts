/**
 * Programs that are known not to bear a new process id, told from outside by what they map, what they have open and where they
 * wait. It knows processes, and nothing of engines and images.
 */
import { readFileSync, readlinkSync } from 'node:fs'
import { basename } from 'node:path'
import { openTargets, processTree, read, threadIds } from './linux/proc.js'

/** CPython keeps the pid beside the running loop, and with another one says that there is none; from 3.12 on it does not. */
const FIRST_PYTHON_WITHOUT_CHECK = 12

/** Of a mapped library or program: `python3.11`, `libpython3.12.so.1.0`, `_asyncio.cpython-313-x86_64-linux-gnu.so`. */
const PYTHON = /\/(?:lib)?python3\.(\d+)[^/]*$/
const ASYNCIO = /\/(?:_asyncio|loop)\.cpython-3(\d+)-[^/]*\.so$/

/** epoll_wait, epoll_pwait and epoll_pwait2 of x86-64. */
const EPOLL_WAITS = new Set(['232', '281', '441'])

/**
 * What the user should hear of a tree that is about to be forked with fresh ids: a sentence for each process that is known not
 * to go on with another pid. An agent that is parked in it is not waiting in its event loop, and sees to that itself.
 */
export function pidWarnings(root: number, withAgents: ReadonlySet<number> = new Set()): string[] {
  return processTree(root).flatMap(({ pid, comm }) => {
    if (hasJobControl(pid)) {
      return (
        `Process ${pid} (${comm}) is a shell with job control, and remembers its process group: its forks end at the first program ` +
        "that they start. Start the supervisor with `identity: 'namespace'`, with which they keep it (docs/identity.md)."
      )
    }
    if (withAgents.has(pid) || !hasRunningLoop(pid)) return []
    return (
      `Process ${pid} (${comm}) waits in an asyncio event loop, which does not go on under another process id: its forks will fail ` +
      'with "no running event loop". Let it load the agent, which corrects that, or start the supervisor with ' +
      "`identity: 'namespace'`, with which forks keep their ids (docs/identity.md)."
    )
  })
}

/** bash and dash were seen to end; the others remember their group too. */
const SHELL = /^(ba|da|z|k|mk|pdk|ya|a)?sh(\d(\.\d+)*)?$/

/** Whether a process is a shell that hands its terminal to what it starts. Such a one ignores SIGTSTP, since nobody could continue it. */
function hasJobControl(pid: number): boolean {
  if (!SHELL.test(executableName(pid))) return false
  const SIGTSTP_BIT = 1n << 19n
  const ignored = /^SigIgn:\t([0-9a-f]+)$/m.exec(read(`/proc/${pid}/status`) ?? '')?.[1]
  return (BigInt(`0x${ignored ?? 0}`) & SIGTSTP_BIT) !== 0n
}

/** By the name of the file that a process executes. */
const REPEATING: readonly [RegExp, string][] = [
  [/^(node|nodejs)$/, 'Math.random(), crypto.randomUUID() and crypto.randomInt()'],
  [/^(bun|deno)$/, 'Math.random() and crypto.randomUUID()'],
  [/^python3?(\.\d+)?$/, 'random, uuid.uuid1() and the names of temporary files'],
  [/^ruby(\d(\.\d+)*)?$/, 'rand and Random'],
  [/^java$/, 'java.util.Random, Math.random(), UUID.randomUUID() and SecureRandom'],
]

/** What forks of a tree will draw alike, since no agent sees to it: a sentence for each kind of runtime. */
export function repeatWarnings(root: number, withAgents: ReadonlySet<number>): string[] {
  const found = new Map<string, string>()
  for (const { pid } of processTree(root)) {
    if (withAgents.has(pid)) continue
    const name = executableName(pid)
    const repeated = REPEATING.find(([pattern]) => pattern.test(name))?.[1]
    if (repeated) {
      found.set(
        name,
        `Process ${pid} (${name}) runs no agent: its forks draw the same values from ${repeated} (docs/uniqueness.md).`,
      )
    }
  }
  return [...found.values()]
}

/**
 * What the user should hear of forks that keep their ids: OpenSSL draws new random bytes when it sees another pid, and else goes on
 * where the template stood. An agent adds to its state where the runtime lets it; Node has no way to.
 */
export function keptIdWarnings(root: number, withAgents: ReadonlySet<number>): string[] {
  const found = new Map<string, string>()
  for (const { pid } of processTree(root)) {
    const name = executableName(pid)
    const isNode = /^(node|nodejs)$/.test(name)
    if (!isNode && (withAgents.has(pid) || !/\/libcrypto[^/]*\.so/.test(read(`/proc/${pid}/maps`) ?? ''))) continue
    const remedy = isNode ? 'Node has no call to renew it' : 'an agent would renew it'
    found.set(
      name,
      `OpenSSL in process ${pid} (${name}) does not notice a fork that keeps its ids: all forks draw the same random bytes from it, ` +
        `keys and tokens too. Take \`identity: 'fresh'\` for programs that need those (docs/identity.md); ${remedy}.`,
    )
  }
  return [...found.values()]
}

function executableName(pid: number): string {
  try {
    return basename(readlinkSync(`/proc/${pid}/exe`))
  } catch {
    return ''
  }
}

/** Whether a process is CPython below 3.12 with asyncio (or uvloop) loaded, one of whose threads waits in epoll. */
function hasRunningLoop(pid: number): boolean {
  const maps = read(`/proc/${pid}/maps`)
  if (!maps?.includes('python')) return false
  const paths = new Set(maps.split('\n').flatMap((line) => /\/.*$/.exec(line)?.[0] ?? []))
  const minor = (pattern: RegExp) => [...paths].map((path) => pattern.exec(path)?.[1]).find((found) => found)
  // Where asyncio is built in, it cannot be told apart from what else waits in epoll.
  const asyncio = minor(ASYNCIO)
  const python = minor(PYTHON) ?? asyncio
  if (asyncio === undefined || Number(python) >= FIRST_PYTHON_WITHOUT_CHECK) return false
  if (!openTargets(pid).some((target) => target === 'anon_inode:[eventpoll]')) return false
  return threadIds(pid).some((thread) => waitsInEpoll(pid, thread))
}

/** True also where the kernel does not say in which call a thread waits. */
function waitsInEpoll(pid: number, thread: number): boolean {
  try {
    return EPOLL_WAITS.has(readFileSync(`/proc/${pid}/task/${thread}/syscall`, 'latin1').split(' ')[0]!)
  } catch {
    return true
  }
}
