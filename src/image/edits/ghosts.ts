/**
 * Ghosts: files that were unlinked while open. CRIU makes each anew beside the path that it had, under a name that ends
 * with its number in the image (`.cr.<number>.ghost`), opens it and unlinks it. Two restores at once would make the same
 * one, and the second fails; so would all after one that was killed in between. So each fork gives them new numbers.
 */
import type { ImageSet } from '../image-set.js'
import { REMAP_GHOST, RemapEntry } from '../schema.js'

/** The file of the image that holds a ghost's content. */
export const ghostFile = (id: number) => `ghost-file-${id.toString(16)}.img`

/** Process ids are below 4,194,304 (2 to the 22nd), so this many numbers of 32 bits are there for each. */
const PER_PROCESS = 1024

/** Numbers the ghosts by the root's new id. Returns the new names of their image files, by the old ones. */
export function renumberGhosts(set: ImageSet, fork: number): Map<string, string> {
  const remaps = set.remaps()
  const ghosts = remaps.filter(({ type }) => type === REMAP_GHOST)
  if (ghosts.length === 0) return new Map()
  // Several open files can share one ghost.
  const olds = [...new Set(ghosts.map(({ remapId }) => remapId))]
  const numbers = new Map(olds.map((old, index) => [old, (fork * PER_PROCESS + index) % 2 ** 32]))
  for (const ghost of ghosts) ghost.remapId = numbers.get(ghost.remapId)!
  set.put('remap-fpath.img', RemapEntry, remaps)
  return new Map([...numbers].map(([old, number]) => [ghostFile(old), ghostFile(number)]))
}
