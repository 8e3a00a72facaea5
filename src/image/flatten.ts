/**
 * Flatten: a prepared image that maps the page files of its ancestors becomes one that maps a single page file of its own, with
 * the same memory byte for byte. Reads one directory and writes another, and knows neither processes nor generations.
 */
import { AddressSpace } from './address-space.js'
import { findIdPlaces, pagesOf } from './edits/identity.js'
import { type InheritedPageFile, planMemory } from './edits/memory.js'
import type { Range } from './edits/wipe.js'
import { ImageSet } from './image-set.js'
import { copiedBytes, type ImagePlaces, writePrepared } from './prepare.js'

export interface FlattenOptions extends ImagePlaces {
  /** The page files that the image maps. */
  pageFiles: readonly InheritedPageFile[]
  /** Wipe-on-fork ranges, by pid, which stay as they are. @default none */
  wiped?: ReadonlyMap<number, readonly Range[]>
}

export interface FlatImage {
  /** Stretches of the page file that hold data, ascending: [offset, length] in bytes. */
  pageFileRuns: [number, number][]
  /** Names of those that a process has open: a fork must find them. */
  stillOpen: string[]
  /** Bytes of memory that every fork copies. */
  copiedBytes: number
  /** What was written, in bytes: all of it stood in other files before. */
  flattenedBytes: number
  mappings: number
}

/** Throws IMAGE_CORRUPT and what else reading an image throws. */
export async function flatten(options: FlattenOptions): Promise<FlatImage> {
  const set = ImageSet.read(options.source)
  const living = set.processes().filter(({ dead }) => !dead)
  const spaces = living.map(({ pid }) => new AddressSpace(set, pid))
  try {
    // Whether each thread's place had to be known was asked when the image was prepared.
    const places = living.map((process, i) => findIdPlaces(set, process, spaces[i]!, true))
    const names = new Set(options.pageFiles.map(({ seenPath }) => seenPath))
    const ids = new Set(
      set.files().flatMap(({ id, regular }) => (regular && names.has(regular.name) ? [BigInt(id)] : [])),
    )
    const plan = planMemory(set, {
      pageFilePath: options.pageFile.map,
      inherited: options.pageFiles,
      flatten: true,
      processes: spaces.map((memory, i) => ({
        memory,
        // One whose memory is copied goes on to be.
        isShared: memory.vmas.some(({ shmid }) => ids.has(shmid)),
        runs: memory.runs,
        keepOut: pagesOf(places[i]!),
        leaveAlone: options.wiped?.get(memory.pid) ?? [],
      })),
      // What is mapped of the machine's files was weighed when the image was prepared.
      isUnchanged: () => false,
    })
    const pageFileRuns = await writePrepared(set, options, spaces, plan)
    const named = new Set(set.files().map(({ regular }) => regular?.name))
    return {
      pageFileRuns,
      stillOpen: options.pageFiles.filter(({ path }) => named.has(path)).map(({ name }) => name),
      copiedBytes: copiedBytes(options.target, spaces, plan),
      flattenedBytes: plan.written.firstBytes + plan.written.againBytes,
      mappings: plan.mappings,
    }
  } finally {
    for (const space of spaces) space.close()
  }
}
