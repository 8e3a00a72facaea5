/**
 * Which generation on disk a supervisor can begin with, in place of a boot: pinned first, else the newest that fits. It knows what
 * engines say of their generations, what was decided about them and what files are watched; it opens none and forks nothing.
 */
import { accessSync, constants, realpathSync, statSync } from 'node:fs'
import { delimiter, join, resolve } from 'node:path'
import { PROTOCOL_VERSION } from './agents/protocol.js'
import type { Candidate } from './engines/engine.js'
import { WarmforkError } from './errors.js'
import type { WatchedSource } from './generations/surroundings.js'
import type { ResolvedOptions } from './options.js'
import {
  changes,
  changeWords,
  DEFAULT_GLOBS,
  decodeWatched,
  encodeWatched,
  type WatchedFiles,
  watchedFiles,
} from './watch.js'

/** A generation that cannot be used, and why: each reason a phrase. */
export interface Misfit {
  readonly number: number
  readonly reasons: readonly string[]
}

/** The application's own files at one moment. */
export interface Watched {
  readonly globs: readonly string[]
  readonly files: WatchedFiles
}

/** What was decided about generations. */
export interface Decided {
  readonly pinned: number | undefined
  whyNot(number: number): string | undefined
}

/**
 * Options that stand in an image, so that no fork of it can have others: each as a phrase, with its value in words. What is left out can
 * be changed from one start to the next.
 */
export function bakedOptions(options: ResolvedOptions): Record<string, string> {
  const { template, identity, memory, agent, descriptors, warmup, command, cwd, env } = options
  const words = (value: unknown) =>
    JSON.stringify(value, (_, part) => (typeof part === 'function' ? String(part) : part))
  return {
    'the program of the command': programOf(command[0], cwd, env.PATH) ?? command[0],
    'the option `template.tty`': template.tty ? 'a terminal' : 'no terminal',
    'the option `template.secrets`': words([...template.secrets].sort()),
    'the option `identity`': identity,
    'the option `memory`': memory,
    'the option `descriptors`': words(Object.entries(descriptors).sort(([a], [b]) => (a < b ? -1 : 1))),
    'the option `warmup`': warmup ? words(warmup) : 'none',
    'the option `agent`': agent ? 'on' : 'off',
    'the protocol of agents': agent ? `version ${PROTOCOL_VERSION}` : 'none',
  }
}

/** Where execvp finds it. */
function programOf(name: string, cwd: string, path = '/usr/local/bin:/usr/bin:/bin'): string | undefined {
  const places = name.includes('/')
    ? [resolve(cwd, name)]
    : path.split(delimiter).map((one) => join(resolve(cwd, one), name))
  for (const place of places) {
    try {
      accessSync(place, constants.X_OK)
      return realpathSync(place)
    } catch {
      // The next.
    }
  }
  return undefined
}

/**
 * The files that are watched, as they are now.
 * @param known as they were before: what was not touched since is not read again
 * @throws BAD_OPTION
 */
export async function watch(
  { command, cwd, reuse, store, runtimeDirectory }: ResolvedOptions,
  known: WatchedFiles | undefined,
  signal: AbortSignal,
): Promise<Watched> {
  const globs = reuse ? (reuse.watch ?? DEFAULT_GLOBS) : []
  // What a command names first is its script, as a rule; after it come files that a program may write.
  const script = command.slice(1).find((word) => statSync(resolve(cwd, word), { throwIfNoEntry: false })?.isFile())
  const except = [store, runtimeDirectory]
  const files = await watchedFiles({
    cwd,
    globs,
    files: script ? [script] : [],
    except,
    ...(known ? { known } : {}),
    signal,
  })
  return { globs, files }
}

/** As a generation keeps them. */
export function asSource({ globs, files }: Watched): WatchedSource {
  return { globs: [...globs], files: encodeWatched(files) }
}

/** What the newest of some generations knew of files. */
export function lastKnown(candidates: readonly Candidate[]): WatchedFiles | undefined {
  for (const { watched } of candidates) {
    const files = watched && filesOf(watched)
    if (files) return files
  }
  return undefined
}

function filesOf({ files }: WatchedSource): WatchedFiles | undefined {
  try {
    return decodeWatched(files)
  } catch {
    return undefined
  }
}

/** Tells those that can be used, in the order in which they are to be tried, from those that cannot. */
export function choose(
  candidates: readonly Candidate[],
  { pinned, whyNot }: Decided,
  now: Watched,
): { usable: Candidate[]; misfits: Misfit[] } {
  const usable: Candidate[] = []
  const misfits: Misfit[] = []
  for (const candidate of [...candidates].sort((a, b) => b.number - a.number)) {
    const { number, watched } = candidate
    const rejected = whyNot(number)
    const reasons = [
      ...(rejected === undefined ? [] : [`it was rejected: ${rejected}`]),
      ...candidate.reasons,
      ...watchReasons(watched, now),
    ]
    if (reasons.length > 0) misfits.push({ number, reasons })
    else if (number === pinned) usable.unshift(candidate)
    else usable.push(candidate)
  }
  return { usable, misfits }
}

function watchReasons(watched: WatchedSource | undefined, now: Watched): string[] {
  // One that is damaged has said so already.
  if (!watched) return ['it was not written down which files of the application it was made of']
  if (JSON.stringify(watched.globs) !== JSON.stringify(now.globs)) {
    return [`the globs of watched files were ${JSON.stringify(watched.globs)} and are ${JSON.stringify(now.globs)} now`]
  }
  const files = filesOf(watched)
  return files ? changeWords(changes(files, now.files)) : ['what it says of watched files is damaged']
}

/** Most generations that are told of, the newest. */
const MOST_TOLD = 3

/** Why none can be used, as a sentence without the final stop. */
export function words(misfits: readonly Misfit[]): string {
  const told = misfits.slice(0, MOST_TOLD).map(({ number, reasons }) => `generation ${number}: ${reasons.join(', ')}`)
  const others = misfits.length - told.length
  return [...told, ...(others > 0 ? [`and ${others} more`] : [])].join('; ')
}

export function mismatch(misfits: readonly Misfit[]): WarmforkError {
  return new WarmforkError('GENERATION_MISFIT', {
    tried: 'start from a generation on disk',
    happened: words(misfits),
    remedy: "Set `reuse.onMismatch` to 'cold', or start once without `reuse`, so that a generation is made that fits.",
  })
}

/** Whether an error says that a generation is bad, not that something is missing at the moment. */
export function isItsFault(error: unknown): error is WarmforkError {
  return error instanceof WarmforkError && (FAULTS.has(error.code) || error.code.startsWith('IMAGE_'))
}

const FAULTS: ReadonlySet<string> = new Set(['RESTORE_FAILED', 'GENERATION_CORRUPT', 'TRIAL_FAILED'])

/** Whether an error says that a generation cannot be used now, and may be another time. */
export function isMisfit(error: unknown): error is WarmforkError {
  return error instanceof WarmforkError && MISFITS.has(error.code)
}

const MISFITS: ReadonlySet<string> = new Set(['GENERATION_MISFIT', 'GENERATION_NOT_FOUND', 'TIMEOUT'])
