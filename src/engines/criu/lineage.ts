/**
 * What the checkpoint of a fork takes over from the generation that it was forked from: page files, kept files, and what
 * CRIU's image of it does not tell. It knows no processes and makes no generation.
 */
import { join } from 'node:path'
import type { Draft } from '../../generations/draft.js'
import type { Generation } from '../../generations/generation.js'
import type { EarlierCopy, FileToKeep } from '../../generations/kept-files.js'
import type { Json } from '../../generations/manifest.js'
import type { NamedFile } from '../../image/contents.js'
import type { InheritedPageFile } from '../../image/edits/memory.js'
import type { Range } from '../../image/edits/wipe.js'
import type { ImageSet } from '../../image/image-set.js'

/** Wipe-on-fork ranges of a process of an image, as a manifest has them: addresses in hex. */
export interface WipedProcess {
  pid: number
  ranges: [start: string, end: string][]
}

export class Lineage {
  /** What the parent has kept, by the path where it lies. */
  readonly #copies: ReadonlyMap<string, EarlierCopy>

  private constructor(
    readonly parent: Generation,
    readonly pageFiles: readonly InheritedPageFile[],
  ) {
    this.#copies = new Map(parent.keptCopies.map((copy) => [copy.path, copy]))
  }

  /** `finalDirectory`: where the new generation will lie. Throws GENERATION_CORRUPT. */
  static async of(parent: Generation, finalDirectory: string): Promise<Lineage> {
    const pageFiles: InheritedPageFile[] = []
    for (const name of parent.pageFiles) {
      pageFiles.push({
        name,
        seenPath: join(parent.directory, name),
        path: join(finalDirectory, name),
        runs: await parent.runs(name),
        sizeBytes: parent.manifest.files[name]!.bytes,
      })
    }
    return new Lineage(parent, pageFiles)
  }

  /**
   * Files that the fork maps from where its generation kept them, with the paths that they had at first: the new generation
   * is to depend on no directory but its own. Where a file of that path is in use too, the two stay apart.
   */
  originals(set: ImageSet): Map<string, string> {
    const names = new Set(set.files().flatMap(({ regular }) => (regular ? [regular.name] : [])))
    const found = new Map<string, string>()
    for (const name of names) {
      const original = this.#copies.get(name)?.entry.path
      if (original !== undefined && !names.has(original)) found.set(name, original)
    }
    return found
  }

  /** Of the files that an image needs, those that the new generation is to keep, and how. */
  filesToKeep(files: readonly NamedFile[], originals: ReadonlyMap<string, string>): FileToKeep[] {
    const pageFiles = new Set(this.pageFiles.map(({ seenPath }) => seenPath))
    return files
      .filter(({ path }) => !pageFiles.has(path))
      .map((file) => {
        const original = originals.get(file.path)
        return original === undefined ? file : { ...file, path: original, keptBy: this.#copies.get(file.path)! }
      })
  }

  async link(draft: Draft, names: readonly string[]): Promise<void> {
    for (const name of names) await draft.inheritPageFile(this.parent, name)
  }

  /**
   * Ranges that a fork must zero, by the ids that the fork's processes have: CRIU 4.1 gives a child none of the flags by which
   * they could be seen. `pids`: its processes as they were forked, in the order of the image.
   */
  wiped(pids: readonly number[]): Map<number, Range[]> {
    const { engineData, processes } = this.parent.manifest
    const found = new Map<number, Range[]>()
    for (const [pid, ranges] of decodeWiped(engineData)) {
      const now = pids[processes.findIndex((process) => process.pid === pid)]
      if (now !== undefined) found.set(now, ranges)
    }
    return found
  }
}

/** Ranges as a manifest has them. */
export function encodeWiped(wiped: ReadonlyMap<number, readonly Range[]>): WipedProcess[] {
  return [...wiped]
    .filter(([, ranges]) => ranges.length > 0)
    .map(([pid, ranges]) => ({ pid, ranges: ranges.map(({ start, end }) => [start.toString(16), end.toString(16)]) }))
}

/** The reverse: what the data of an engine in a manifest say of it. */
export function decodeWiped(engineData: Json): Map<number, Range[]> {
  const wiped = (engineData as unknown as { wiped?: WipedProcess[] } | null)?.wiped ?? []
  return new Map(
    wiped.map(({ pid, ranges }) => [
      pid,
      ranges.map(([start, end]) => ({ start: BigInt(`0x${start}`), end: BigInt(`0x${end}`) })),
    ]),
  )
}
