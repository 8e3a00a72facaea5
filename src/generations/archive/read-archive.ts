/**
 * Makes a generation of an archive: looks whether the machine fits and has room, unpacks into a draft of the store, and names
 * the page files by their new place. The store makes a generation of the draft only when all of that went well.
 */
import { rmSync, statfsSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { WarmforkError } from '../../errors.js'
import { replaceFiles } from '../../image/edits/replaced-files.js'
import { ImageSet } from '../../image/image-set.js'
import type { Draft } from '../draft.js'
import type { Generation } from '../generation.js'
import type { Filled, Store } from '../store.js'
import type { Archive } from './archive.js'
import { isPageFile } from './contents.js'
import { invalid, TRIED } from './failure.js'
import { checkFit, checkKept } from './fit.js'

export interface ImportInto {
  /** As surroundings have it: of the criu that would restore it. */
  readonly criuVersion: string
  readonly signal?: AbortSignal | undefined
}

/**
 * The new generation is held by this process until it calls `letGo`. Throws ARCHIVE_INVALID, GENERATION_MISFIT, DISK_FULL, and
 * what `Store.create` throws.
 */
export async function importInto(
  store: Store,
  archive: Archive,
  { criuVersion, signal }: ImportInto,
): Promise<Generation> {
  const { generation, files } = archive.contents
  const { surroundings, seen } = await checkFit(archive.contents, criuVersion, signal)
  checkRoom(store.directory, archive)
  const reason = `imported: generation ${generation.number} of ${generation.name}, ${archive.digest}`
  const { reforks = 0 } = generation
  return store.create({ parent: null, surroundings, reforks, reason }, async (draft): Promise<Filled> => {
    const pageFiles = await archive.unpack(draft.directory, signal)
    renamePageFiles(draft, generation.directory, new Set(pageFiles.map(({ name }) => name)))
    checkKept(await draft.keepFiles(files.map(({ path, use }) => ({ path, use }))), seen)
    signal?.throwIfAborted()
    const { memory, warnings, rssBytes, processes, edits, engineData, checkpointMs, prepareMs } = generation
    return { memory, pageFiles, warnings, rssBytes, processes, edits, engineData, checkpointMs, prepareMs }
  })
}

/** Before anything is written. Throws DISK_FULL. */
function checkRoom(directory: string, archive: Archive): void {
  const { bavail, bsize } = statfsSync(directory)
  // Each stretch may take a part of a block more.
  const needed = archive.dataBytes + archive.contents.members.length * bsize
  if (needed <= bavail * bsize) return
  throw new WarmforkError('DISK_FULL', {
    tried: TRIED,
    happened: `it needs ${mib(needed)} MiB in ${directory}, and ${mib(bavail * bsize)} are free`,
  })
}

const mib = (bytes: number) => Math.ceil(bytes / 2 ** 20)

/** The image names its page files by the paths that they had where it was exported. */
function renamePageFiles(draft: Draft, directory: string, pageFiles: ReadonlySet<string>): void {
  try {
    const set = ImageSet.read(draft.imageDirectory)
    const renamed = new Map(
      [...pageFiles].map((name) => [join(directory, name), join(draft.finalDirectory, name)] as const),
    )
    if (renamed.size > 0) replaceFiles(set, renamed)
    const known = new Set(renamed.values())
    for (const { regular } of set.files()) {
      const name = regular?.name ?? ''
      if (isPageFile(name.slice(name.lastIndexOf('/') + 1)) && !known.has(name)) {
        throw invalid(`its image maps the page file ${name}, which is not in it`)
      }
    }
    for (const name of set.changed) {
      const path = join(draft.imageDirectory, name)
      rmSync(path)
      writeFileSync(path, set.bytes(name), { flag: 'wx', mode: 0o600 })
    }
  } catch (cause) {
    if (!(cause instanceof WarmforkError) || !cause.code.startsWith('IMAGE_')) throw cause
    throw invalid(`its image does not decode: ${cause.happened}`, { cause })
  }
}
