/**
 * Files: CRIU refuses to restore when an open file's size or mode is not what it was. A log that has grown since would
 * make every fork fail, so files that are open for writing lose that check. Record locks go too: `fork(2)` gives a child
 * none, and a second child could not take them.
 */
import type { ImageSet } from '../image-set.js'
import { FileEntry, OPEN } from '../schema.js'

/** Returns the paths whose checks were dropped. */
export function dropSizeChecks(set: ImageSet): string[] {
  const paths: string[] = []
  const files = set.files()
  for (const { regular } of files) {
    if (!regular || (regular.flags & OPEN.ACCMODE) === 0 || regular.size === undefined) continue
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
  set.putMessages('filelocks.img', [])
  return count
}
