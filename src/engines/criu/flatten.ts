/**
 * Flattens a generation: a new one with the same content and one page file of its own, made of files alone. No process is
 * needed, neither the one that it was taken of nor criu.
 */
import { join } from 'node:path'
import type { Generation } from '../../generations/generation.js'
import type { Filled, Store } from '../../generations/store.js'
import { flatten } from '../../image/flatten.js'
import { decodeWiped, Lineage } from './lineage.js'
import { pageFileName } from './page-file-name.js'

/** Whether a generation has its memory in one file, or has none that is shared. */
export function isFlat(generation: Generation): boolean {
  return generation.pageFiles.length <= 1
}

/**
 * Makes a flat generation of another one, which stays. The new one is held by this process until it calls `letGo`; it outlives its
 * supervisor where the other one does. Throws GENERATION_MISFIT (a file that it maps is lost), GENERATION_CORRUPT, and what `Store.create`
 * throws.
 */
export async function flattenInto(store: Store, generation: Generation): Promise<Generation> {
  // It may be pruned meanwhile.
  generation.hold()
  try {
    const { surroundings, reforks = 0, mappedFiles, edits, engineData, times } = generation.manifest
    const { memory, warnings, rssBytes, processes } = generation.manifest
    // A file that was neither left as it was nor kept cannot be had back.
    generation.replacedFiles()
    // The new checksums must not be those of damage.
    await generation.verify()
    const meta = {
      parent: generation.number,
      surroundings,
      reforks,
      reason: `flattened: generation ${generation.number}`,
      durable: !generation.ephemeral,
    }
    return await store.create(meta, async (draft): Promise<Filled> => {
      const before = performance.now()
      const name = pageFileName(draft.number)
      const lineage = await Lineage.of(generation, draft.finalDirectory)
      const flat = await flatten({
        source: generation.imageDirectory,
        target: draft.imageDirectory,
        pageFile: { write: join(draft.directory, name), map: join(draft.finalDirectory, name) },
        pageFiles: lineage.pageFiles,
        wiped: decodeWiped(engineData),
      })
      await lineage.link(draft, flat.stillOpen)
      const kept = new Map(generation.keptCopies.map((copy) => [copy.entry.path, copy]))
      await draft.keepFiles(
        mappedFiles.map(({ path, use }) => {
          const keptBy = kept.get(path)
          return { path, use, ...(keptBy ? { keptBy } : {}) }
        }),
        generation,
      )
      const { pageFileRuns: runs, flattenedBytes, copiedBytes, mappings } = flat
      return {
        memory,
        warnings,
        rssBytes,
        processes,
        pageFiles: runs.length > 0 ? [{ name, runs }] : [],
        edits: {
          ...(edits as Record<string, never>),
          ...{ sharedBytes: flattenedBytes, writtenBytes: 0, flattenedBytes, copiedBytes, mappings },
        },
        engineData,
        checkpointMs: times.checkpointMs,
        prepareMs: Math.round(performance.now() - before),
      }
    })
  } finally {
    generation.letGo()
  }
}
