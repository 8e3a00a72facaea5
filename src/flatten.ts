/** Flattening of generations whose supervisor does not run, for embedders and the command line: which store, and what may be flattened. */
import { flattenInto, isFlat } from './engines/criu/flatten.js'
import { WarmforkError } from './errors.js'
import { Store } from './generations/store.js'
import { Verdicts } from './generations/verdicts.js'

export interface FlattenOptions {
  /** The supervisor whose generation it is; it must not run. */
  name: string
  /** The directory of all stores. @default as of a supervisor */
  store?: string
  /** Its number. */
  generation: number
}

export interface FlattenedGeneration {
  /** Of the new generation; the one that was given where that is flat already. */
  readonly number: number
  /** What was written; 0 where it is flat already. */
  readonly writtenBytes: number
}

/**
 * Makes a generation with the same content, whose memory stands in one file of its own. The other one stays.
 * @throws GENERATION_NOT_FOUND, GENERATION_CORRUPT, GENERATION_MISFIT, STORE_LOCKED, DISK_FULL, BAD_OPTION
 */
export async function flattenGeneration({
  name,
  store: root,
  generation: number,
}: FlattenOptions): Promise<FlattenedGeneration> {
  const options = { name, ...(root === undefined ? {} : { root }) }
  const found = await generationIn(options, number)
  if (isFlat(found)) return { number, writtenBytes: 0 }
  const { uid, gid } = found.manifest.surroundings
  // Children of another user must get to their page files.
  const group = uid === process.geteuid?.() ? {} : { group: gid }
  await using store = await Store.open({ ...options, ...group, access: 'exclusive' })
  const verdicts = Verdicts.read(store.directory)
  const why = verdicts.whyNot(number)
  if (why !== undefined) {
    // The next supervisor would begin with the new one, under a number that nothing is known of.
    const happened = `it was rejected: ${why}`
    throw new WarmforkError('BAD_OPTION', {
      tried: `flatten generation ${number}`,
      happened,
      remedy: 'Flatten another.',
    })
  }
  const made = await flattenInto(store, await store.get(number))
  const { flattenedBytes } = made.manifest.edits as { flattenedBytes: number }
  // What passed its trial need not do so again.
  if (verdicts.isApproved(number)) await verdicts.approve(made.number)
  made.letGo()
  return { number: made.number, writtenBytes: flattenedBytes }
}

async function generationIn(options: { name: string; root?: string }, number: number) {
  await using store = await Store.open({ ...options, access: 'read' })
  return store.get(number)
}
