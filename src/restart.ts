/**
 * Begins with a generation on disk, in place of a boot: the first of those that fit from which a fork can be had. It knows engines and
 * which generation follows which, and neither templates nor pools.
 */
import type { Candidate, Circumstances, Engine } from './engines/engine.js'
import { WarmforkError } from './errors.js'
import type { ResolvedOptions } from './options.js'
import { choose, isItsFault, isMisfit, lastKnown, type Misfit, mismatch, type Watched, words } from './reuse.js'
import type { Succession } from './succession.js'
import type { WatchedFiles } from './watch.js'

export interface RestartSettings {
  readonly engine: Engine
  readonly succession: Succession
  readonly reuse: Exclude<ResolvedOptions['reuse'], false>
  readonly circumstances: Circumstances
  /** Reads the watched files; what is known of them need not be read again. */
  readonly watch: (known: WatchedFiles | undefined) => Promise<Watched>
  /** Tries a generation that a refork made and whose supervisor ended before it was tried. */
  readonly tryOut: (generation: number) => Promise<void>
  /** Makes a fork of the generation in use: that it can be restored shows in no other way. */
  readonly firstFork: () => Promise<void>
  readonly warn: (message: string, cause?: unknown) => void
}

export interface Restart {
  /** The generation in use now; undefined where none can be used, and the program has to be booted. */
  readonly generation: number | undefined
  /** Others that could be used. */
  readonly others: readonly number[]
  /** The watched files as they were before anything was done. */
  readonly watched: Watched
}

/** @throws GENERATION_MISFIT where none can be used and that is to be an error; PORT_TAKEN, and what says that no fork can be made now */
export async function restart(settings: RestartSettings): Promise<Restart> {
  const { engine, succession, reuse, warn } = settings
  const candidates = (await engine.candidates?.(settings.circumstances)) ?? []
  const watched = await settings.watch(lastKnown(candidates))
  const decided = { pinned: succession.pinned, whyNot: (number: number) => succession.whyNot(number) }
  const { usable, misfits } = choose(candidates, decided, watched)
  const pinned = misfits.find(({ number }) => number === decided.pinned)
  if (pinned) warn(`the pinned generation is not used: ${words([pinned])}`)
  for (const [index, candidate] of usable.entries()) {
    const reason = await begin(candidate, settings)
    if (reason === undefined) {
      return { generation: candidate.number, others: usable.slice(index + 1).map(({ number }) => number), watched }
    }
    misfits.unshift({ number: candidate.number, reasons: [reason] })
    warn(`generation ${candidate.number} is not used: ${reason}`)
  }
  if (misfits.length > 0 && reuse.onMismatch === 'error') throw mismatch(sorted(misfits))
  if (misfits.length > 0)
    warn(`the program is booted, since no generation on disk can be used: ${words(sorted(misfits))}`)
  return { generation: undefined, others: [], watched }
}

const sorted = (misfits: readonly Misfit[]) => [...misfits].sort((a, b) => b.number - a.number)

/** Gives why it cannot be used; undefined where it is in use now. */
async function begin({ number, reforks }: Candidate, settings: RestartSettings): Promise<string | undefined> {
  const { engine, succession, reuse } = settings
  try {
    await engine.verify?.(number, reuse.verify === 'before' ? 'wholly' : 'quickly')
    if (reforks > 0 && !succession.isApproved(number)) await settings.tryOut(number)
    await succession.switchTo(number)
    await settings.firstFork()
    return undefined
  } catch (error) {
    // Its sockets have to be free for the next one, or for a program that is booted.
    await succession.leave()
    if (isItsFault(error)) await succession.reject(number, error.happened)
    else if (!isMisfit(error)) throw error
    return error instanceof WarmforkError ? error.happened : String(error)
  }
}
