/** Files that were upgraded since the checkpoint: a fork maps the ones that its generation kept, under their names there. */
import type { ImageSet } from '../image-set.js'
import { FileEntry } from '../schema.js'

export function replaceFiles(set: ImageSet, replaced: ReadonlyMap<string, string>): void {
  const files = set.files()
  for (const { regular } of files) {
    const kept = regular && replaced.get(regular.name)
    if (regular && kept !== undefined) regular.name = kept
  }
  set.put('files.img', FileEntry, files)
}
