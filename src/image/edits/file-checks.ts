/**
 * Files that others use too, which a fork must take as they are. CRIU refuses to restore when an open file's size or mode
 * is not what it was. A log that has grown since would make every fork fail, of who writes it and of who reads it, so only
 * files whose content is memory of the fork (programs, libraries) keep that check. Record locks go too: `fork(2)` gives a child none, and a second child could not take them. And what waited in a
 * FIFO is there still, for whoever reads it first: each fork would add it again.
 */
import { mappedFiles } from '../address-space.js'
import type { ImageSet } from '../image-set.js'
import { FileEntry, PipeData } from '../schema.js'

/** Returns the paths whose checks were dropped. */
export function dropSizeChecks(set: ImageSet): string[] {
  const paths: string[] = []
  const files = set.files()
  const mapped = mappedFiles(set)
  for (const { id, regular } of files) {
    if (!regular || mapped.has(id) || regular.size === undefined) continue
    delete regular.size
    delete regular.mode
    paths.push(regular.name)
  }
  if (paths.length > 0) set.put('files.img', FileEntry, files)
  return paths
}

/** Returns how many locks were dropped. */
export function dropLocks(set: ImageSet): number {
  if (!set.has('filelocks.img')) return 0
  const count = set.file('filelocks.img').entries.length
  set.retain('filelocks.img', () => false)
  return count
}

/** Drops what waited in FIFOs, but for those that were unlinked: of such a one each fork gets its own. */
export function dropFifoData(set: ImageSet): void {
  if (!set.has('fifo-data.img')) return
  const unlinked = new Set(set.remaps().map(({ fileId }) => fileId))
  const own = new Set(set.files().flatMap(({ fifo }) => (fifo && unlinked.has(fifo.fileId ?? 0) ? [fifo.pipeId] : [])))
  const data = set.all('fifo-data.img', PipeData)
  set.retain('fifo-data.img', (index) => own.has(data[index]!.pipeId))
}
