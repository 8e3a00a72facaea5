/**
 * One refork: a live child is chosen, brought to rest, checkpointed into a new generation and goes on; the generation is tried. It
 * knows children and an engine, and not what becomes of the generation.
 */
import type { Child } from '../child.js'
import type { CheckpointOptions, Engine, GenerationInfo } from '../engines/engine.js'
import { type ErrorCode, WarmforkError } from '../errors.js'
import { Halt } from '../halt.js'
import { descendants } from '../linux/proc.js'

export interface ReforkSettings {
  readonly engine: Engine
  readonly checkpoint: Omit<CheckpointOptions, 'signal' | 'onSourceFree' | 'durable' | 'reason'>
  readonly hookTimeoutMs: number
  /** How long a child may take to come to rest. */
  readonly restTimeoutMs: number
  readonly signal: AbortSignal
  readonly warn: (message: string) => void
}

/** What a refork made. */
export interface Refork {
  readonly generation: GenerationInfo
  /** Of the child that it was taken of. */
  readonly pid: number
  /** From the request on until the child stood still, in milliseconds. */
  readonly restMs: number
  /** How long it stood still, in milliseconds. */
  readonly standstillMs: number
}

/** What another child may be better at. */
const NEXT_MAY_DO: ReadonlySet<ErrorCode> = new Set<ErrorCode>([
  'CHILD_GONE',
  'NOT_AT_REST',
  'AGENT_LOST',
  'HOOK_FAILED',
  'REFORK_REFUSED',
])
/** How many children are tried, one after the other. */
const MOST_TRIES = 3

/**
 * The children that can be taken, the best first: those with the most requests, and among equals the oldest.
 * @param given the one that was asked for
 * @throws REFORK_REFUSED
 */
export function candidates(children: readonly Child[], generation: number, given?: Child): readonly Child[] {
  const tried = given ? `refork child ${given.pid}` : 'refork'
  const refused = (happened: string, remedy?: string) =>
    new WarmforkError('REFORK_REFUSED', { tried, happened, ...(remedy === undefined ? {} : { remedy }) })
  if (given) {
    if (given.state !== 'running') throw refused('it does not run', 'Give a child that runs.')
    if (given.refuses !== undefined) throw refused(`its program refuses: ${given.refuses}`)
    return [given]
  }
  const own = children.filter((child) => child.generation === generation && child.state === 'running')
  if (own.length === 0) throw refused(`no child of generation ${generation} runs`, 'Fork one, and let it do its work.')
  const willing = own.filter(({ refuses }) => refuses === undefined)
  if (willing.length === 0) throw refused(`all children refuse: ${own[0]!.refuses}`)
  return [...willing].sort((a, b) => b.requests - a.requests).slice(0, MOST_TRIES)
}

/** @throws of the last child that was tried: CHILD_GONE, NOT_AT_REST, AGENT_LOST, HOOK_FAILED, CHECKPOINT_FAILED, DISK_FULL … */
export async function reforkOneOf(
  children: readonly Child[],
  reason: string,
  settings: ReforkSettings,
): Promise<Refork> {
  let failure: unknown
  for (const child of children) {
    try {
      return await reforkOf(child, reason, settings)
    } catch (error) {
      failure = error
      if (!(error instanceof WarmforkError) || !NEXT_MAY_DO.has(error.code)) throw error
      if (child !== children.at(-1))
        settings.warn(`child ${child.pid} could not be reforked, the next is tried: ${error.message}`)
    }
  }
  throw failure
}

async function reforkOf(child: Child, reason: string, settings: ReforkSettings): Promise<Refork> {
  const { engine, hookTimeoutMs, restTimeoutMs, signal, warn } = settings
  const tried = `refork child ${child.pid}`
  const { agents } = child
  const startedAt = performance.now()
  let isFree = false
  let halt: Halt | undefined
  let stoodAt = 0
  let freeAt = 0
  const free = (error?: unknown) => {
    if (isFree) return
    isFree = true
    freeAt = performance.now()
    halt?.release()
    agents?.resume(error)
  }
  try {
    for (const warning of (await agents?.park('refork', hookTimeoutMs)) ?? []) warn(warning)
    stoodAt = performance.now()
    signal.throwIfAborted()
    const channels = agents?.channels() ?? []
    const silent = channels.find(({ agent }) => !agent.parked)
    if (silent) {
      const happened = `the agent in process ${silent.pid} gives no answer: its program hangs, or holds all its threads up`
      throw new WarmforkError('AGENT_LOST', { tried, happened })
    }
    const except = new Set(channels.flatMap(({ pid, agent }) => (agent.counts ? [pid] : [])))
    // Where agents wait in all of its processes, it stands still by itself.
    const isParked = agents !== undefined && [child.pid, ...descendants(child.pid)].every((pid) => except.has(pid))
    if (!isParked) halt = await Halt.atRest(child.pid, { tried, timeoutMs: restTimeoutMs, except, signal })
    if (!agents) stoodAt = performance.now()
    const generation = await engine.checkpoint(child.source(), {
      ...settings.checkpoint,
      reason,
      signal,
      durable: true,
      onSourceFree: () => free(),
    })
    free()
    return { generation, pid: child.pid, restMs: stoodAt - startedAt, standstillMs: freeAt - stoodAt }
  } catch (error) {
    free(error)
    if (child.state === 'ended') {
      throw new WarmforkError('CHILD_GONE', { tried, happened: 'it ended meanwhile', cause: error })
    }
    throw error
  }
}
