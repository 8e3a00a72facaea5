/** What the methods of the control socket do, on a supervisor. It knows the public API of the supervisor, and no socket. */
import { closeSync } from 'node:fs'
import { isatty } from 'node:tty'
import type { ForkInput } from '../agents/group.js'
import type { Child, ChildStats } from '../child.js'
import type { GenerationInfo, StdioFds } from '../engines/engine.js'
import { WarmforkError } from '../errors.js'
import type { LastRefork } from '../refork/changes.js'
import type { Refork } from '../refork/refork.js'
import type { StopOptions, Supervisor } from '../supervisor.js'
import type { TerminalSize } from '../terminal.js'
import { takeStdio } from './client-stdio.js'
import type { ChildStatus, ForkInputParams, GenerationStatus, LastReforkStatus, Status } from './protocol.js'
import type { Caller, Handlers } from './server.js'
import type { TerminalLink } from './terminal-link.js'

export interface Controlled {
  /** Of warmfork. */
  readonly version: string
  /** There as soon as it exists, before it has started. */
  readonly created: Promise<Supervisor>
  /** Resolves when forks can be had; rejects where the start fails. */
  readonly started: Promise<Supervisor>
  /** Ends the supervisor, during its start too; resolves when all that it made has ended. */
  stop(options: StopOptions): Promise<void>
}

export function supervisorHandlers(controlled: Controlled): Handlers {
  return {
    status: async () => statusOf(await controlled.created, controlled.version),

    async fork({ tty, input }, caller, request) {
      // Signals that come before the child does wait for it.
      const waiting: NodeJS.Signals[] = []
      let child: Child | undefined
      let size = tty
      caller.forks.set(request.id, {
        kill: (signal) => (child ? child.kill(signal) : waiting.push(signal) > 0),
        resize: (wanted) => {
          if (!size) return false
          size = wanted
          child?.terminal.resize(wanted.columns, wanted.rows)
          return true
        },
      })
      try {
        const supervisor = await until(caller.signal, controlled.started)
        if (tty) {
          const on = await forkOnTerminal(supervisor, caller, tty, forkInput(input))
          child = on.child
          if (size && size !== tty) child.terminal.resize(size.columns, size.rows)
          request.emit({ pid: child.pid, generation: child.generation, modes: on.link.modes })
          for (const signal of waiting) child.kill(signal)
          return await linked(caller, child, on.link)
        }
        child = await forkOn(supervisor, caller, forkInput(input))
        request.emit({ pid: child.pid, generation: child.generation })
        for (const signal of waiting) child.kill(signal)
        return await outlivingNot(caller, child)
      } finally {
        caller.forks.delete(request.id)
      }
    },

    async signal({ request, signal }, caller) {
      return { delivered: caller.forks.get(request)?.kill(signal) ?? false }
    },

    async resize({ request, columns, rows }, caller) {
      return { delivered: caller.forks.get(request)?.resize({ columns, rows }) ?? false }
    },

    async refork({ from, reason }, caller) {
      const supervisor = await until(caller.signal, controlled.started)
      const child = from === undefined ? undefined : supervisor.children.find(({ pid }) => pid === from)
      if (from !== undefined && !child) {
        throw new WarmforkError('CHILD_GONE', {
          tried: `refork child ${from}`,
          happened: 'no child of that pid runs',
          remedy: 'List those that do with `warmfork ps`.',
        })
      }
      // Others may be under way before it.
      const made = new Map<number, Refork>()
      const note = (refork: Refork) => made.set(refork.generation.number, refork)
      supervisor.on('refork', note)
      try {
        const options = { ...(child ? { from: child } : {}), ...(reason === undefined ? {} : { reason }) }
        const { number } = await supervisor.refork(options)
        const { generation, ...times } = made.get(number)!
        return { generation: generationStatus(generation), inUse: supervisor.generation === number, ...times }
      } finally {
        supervisor.off('refork', note)
      }
    },

    async rollback(options, caller) {
      const supervisor = await until(caller.signal, controlled.started)
      const from = supervisor.generation
      return { generation: (await supervisor.rollback(options)).number, from }
    },

    async pin({ generation }, caller) {
      const supervisor = await until(caller.signal, controlled.started)
      if (generation === null) await supervisor.unpin()
      else await supervisor.pin(generation)
      return { generation: supervisor.generation }
    },

    async workers({ count }, caller) {
      const supervisor = await until(caller.signal, controlled.started)
      supervisor.resizeWorkers(count)
      return { count }
    },

    async stop(options) {
      await controlled.stop(options)
      return {}
    },
  }
}

function forkInput({ env, ...input }: ForkInputParams = {}): ForkInput {
  if (!env) return input
  return { ...input, env: Object.fromEntries(Object.entries(env).map(([key, value]) => [key, value ?? undefined])) }
}

async function forkOn(supervisor: Supervisor, caller: Caller, input: ForkInput): Promise<Child> {
  const stdio = stdioOf(caller)
  try {
    return await supervisor.fork({ stdio, signal: caller.signal, ...input })
  } finally {
    for (const fd of stdio) closeSync(fd)
  }
}

/** A child on a terminal of its own, linked to that of the client. */
async function forkOnTerminal(supervisor: Supervisor, caller: Caller, tty: TerminalSize, given: ForkInput) {
  const [input, output, errors] = stdioOf(caller)
  closeSync(errors)
  let child: Child | undefined
  try {
    for (const fd of [input, output]) {
      if (!isatty(fd)) {
        throw new WarmforkError('BAD_OPTION', {
          tried: 'fork on the terminal of the client',
          happened: 'its stdin and stdout are no terminal',
          remedy: 'Run `warmfork fork --tty` on a terminal.',
        })
      }
    }
    // Loaded here, since it does not load anywhere else than on Linux.
    const { TerminalLink } = await import('./terminal-link.js')
    child = await supervisor.fork({ tty, signal: caller.signal, ...given })
    return { child, link: new TerminalLink(child.terminal, input, output) }
  } catch (error) {
    child?.terminal.close()
    for (const fd of [input, output]) closeSync(fd)
    throw error
  }
}

/** The exit of a child on a terminal. Where the client goes, the child's terminal hangs up. */
async function linked(caller: Caller, child: Child, link: TerminalLink) {
  const abandon = () => link.abandon()
  caller.signal.addEventListener('abort', abandon)
  if (caller.signal.aborted) abandon()
  try {
    const status = await child.exit
    if (!caller.signal.aborted) await link.finish()
    return status
  } finally {
    caller.signal.removeEventListener('abort', abandon)
  }
}

/** @throws RESTORE_FAILED, FDS_EXHAUSTED, CHILD_GONE */
function stdioOf(caller: Caller): StdioFds {
  if (caller.pid === 0) {
    throw new WarmforkError('RESTORE_FAILED', {
      tried: 'take the standard streams of the client',
      happened: 'the kernel does not tell its process id here',
      remedy: 'Run `warmfork fork` in the pid namespace of the supervisor, on Linux.',
    })
  }
  return takeStdio(caller.pid)
}

/** The exit of a child whose client may go: then the child is told as a terminal that hangs up tells its programs. */
async function outlivingNot(caller: Caller, child: Child) {
  const hangUp = () => {
    child.kill('SIGHUP')
    // What is stopped does not see a SIGHUP before it is continued.
    child.kill('SIGCONT')
  }
  caller.signal.addEventListener('abort', hangUp)
  if (caller.signal.aborted) hangUp()
  try {
    return await child.exit
  } finally {
    caller.signal.removeEventListener('abort', hangUp)
  }
}

/** The promise's result, or the signal's reason where that is first. */
async function until<T>(signal: AbortSignal, promise: Promise<T>): Promise<T> {
  signal.throwIfAborted()
  let stop = () => {}
  const aborted = new Promise<never>((_, reject) => {
    stop = () => reject(signal.reason)
    signal.addEventListener('abort', stop)
  })
  try {
    return await Promise.race([promise, aborted])
  } finally {
    signal.removeEventListener('abort', stop)
  }
}

export async function statusOf(supervisor: Supervisor, version: string): Promise<Status> {
  const stats = await supervisor.stats()
  const parked = await Promise.all(stats.pool.parked.map(statsIfThere))
  const workers = supervisor.workers.workers.map(({ pid }) => pid)
  const childStatus = (child: ChildStats): ChildStatus => ({
    ...child,
    role: child.state === 'parked' ? 'parked' : workers.includes(child.pid) ? 'worker' : 'child',
    outdated: child.generation !== stats.generation,
  })
  return {
    name: stats.name,
    pid: stats.pid,
    version,
    state: stats.state,
    engine: stats.engine,
    command: stats.command,
    startedAt: stats.startedAt.toISOString(),
    uptimeMs: Math.round(stats.uptimeMs),
    generation: stats.generation,
    generations: supervisor.generations().map(generationStatus),
    template: stats.template ? { ...stats.template, memory: stats.template.memory ?? null } : null,
    pinned: stats.pinned ?? null,
    reforkDecision: stats.reforkDecision ?? null,
    lastRefork: stats.lastRefork ? lastReforkStatus(stats.lastRefork) : null,
    pool: { size: stats.pool.size, starting: stats.pool.starting },
    workers: { ...stats.workers, pids: workers },
    children: [...parked.filter((child) => child !== undefined), ...stats.children].map(childStatus),
    forks: stats.forks,
    warnings: supervisor.warnings.map(({ kind, message }) => ({ kind, message })),
  }
}

/** Undefined where it ended meanwhile. */
async function statsIfThere(child: Child): Promise<ChildStats | undefined> {
  try {
    return await child.stats()
  } catch {
    return undefined
  }
}

function lastReforkStatus({ at, reason, pid, generation, error }: LastRefork): LastReforkStatus {
  const made = { pid: pid ?? null, generation: generation ?? null }
  return { at: at.toISOString(), reason, ...made, error: error?.message ?? null }
}

export function generationStatus(info: GenerationInfo): GenerationStatus {
  return { ...info, createdAt: info.createdAt.toISOString() }
}
