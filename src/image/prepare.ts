/**
 * Prepare: the edits that are made once, when a generation is created. Reads CRIU's image from one directory and writes
 * the edited one into another, with the page file beside. Everything is read, checked and planned before the first byte
 * is written; the caller throws the target away when this fails.
 */
import {
  chmodSync,
  closeSync,
  fstatSync,
  ftruncateSync,
  linkSync,
  openSync,
  readSync,
  statSync,
  writeFileSync,
  writeSync,
} from 'node:fs'
import { join } from 'node:path'
import { setImmediate as nextTurn } from 'node:timers/promises'
import { AddressSpace } from './address-space.js'
import { type Detached, type DetachOptions, detach } from './detach.js'
import { dropFifoData, dropLocks, dropSizeChecks } from './edits/file-checks.js'
import { findIdPlaces, pagesOf } from './edits/identity.js'
import { inheritListeners, type Listener } from './edits/listeners.js'
import { type InheritedPageFile, type KeptRun, type MemoryPlan, type PageFileCopy, planMemory } from './edits/memory.js'
import { replaceFiles } from './edits/replaced-files.js'
import { type InheritedTerminal, inheritTerminal } from './edits/terminal.js'
import { type Range, wipeRanges, withoutRanges } from './edits/wipe.js'
import { truncated } from './failure.js'
import { ImageSet } from './image-set.js'
import { bytesOf } from './message.js'
import { pagesFile } from './pagemap.js'

export interface PrepareOptions {
  /** Where CRIU wrote the image. */
  source: string
  /** The same, if it was read already; it is not changed. */
  image?: ImageSet
  /** An existing directory on the same file system; the edited image goes there. */
  target: string
  pageFile: {
    /** Where it is written now. */
    write: string
    /** The path under which children will open it. */
    map: string
  }
  /** Whether a process's memory is shared copy-on-write (true) or copied at each fork. */
  isShared: (pid: number) => boolean
  /** The page files of the generation that the processes were forked from. @default none */
  inherited?: readonly InheritedPageFile[]
  /** Files that the image is to name otherwise than CRIU did. @default none */
  renamed?: ReadonlyMap<string, string>
  /** Wipe-on-fork ranges seen in the processes, by pid; those that the image names are added. */
  wipe?: ReadonlyMap<number, readonly Range[]>
  /** What of the source's connections and descriptors a fork is to have otherwise. @default no change */
  detach?: DetachOptions
  /** Forks keep the ids of the image: places that remember them need not be known. @default false */
  keepsIds?: boolean
}

export interface PreparedImage {
  /** Stretches of the page file that hold data, ascending: [offset, length] in bytes. Empty where no memory is shared. */
  pageFileRuns: [number, number][]
  pageFileSize: number
  /** Names of the inherited page files that the image maps still. */
  inherited: string[]
  /** Bytes of memory that every fork copies. */
  copiedBytes: number
  listeners: Listener[]
  /** Where forks connect Unix sockets for datagrams to. */
  reconnected: readonly Uint8Array[]
  terminal: InheritedTerminal[]
  /** What was edited, for people. */
  edits: {
    sharedBytes: number
    /** Of what is shared: what the processes wrote, and what older page files hold and was written once more, for fewer mappings. */
    writtenBytes: number
    flattenedBytes: number
    mappings: number
    wipedRanges: number
    sizeChecksDropped: string[]
    locksDropped: number
    idPlaces: { runtime: string; count: number }[]
  } & Partial<Detached['edits']>
}

/** How much is read at once: a compromise between system calls and memory. */
const COPY_BYTES = 256 << 10
/** After so many bytes others have their turn: 0.5 ms (measured on ext4). */
const TURN_BYTES = 1 << 20

export async function prepare(options: PrepareOptions): Promise<PreparedImage> {
  const set = options.image?.copy() ?? ImageSet.read(options.source)
  const living = set.processes().filter(({ dead }) => !dead)
  const spaces = living.map(({ pid }) => new AddressSpace(set, pid))
  try {
    const places = living.map((process, i) => findIdPlaces(set, process, spaces[i]!, options.keepsIds))
    const wiped = living.map(({ pid }) => wipeRanges(set, pid, options.wipe?.get(pid)))
    const processes = spaces.map((memory, i) => ({
      memory,
      isShared: options.isShared(memory.pid),
      runs: withoutRanges(memory.runs, wiped[i]!),
      keepOut: pagesOf(places[i]!),
      leaveAlone: wiped[i]!,
    }))
    const plan = planMemory(set, {
      pageFilePath: options.pageFile.map,
      processes,
      isUnchanged: sameSize,
      ...(options.inherited ? { inherited: options.inherited } : {}),
    })
    if (options.renamed && options.renamed.size > 0) replaceFiles(set, options.renamed)
    const sizeChecksDropped = dropSizeChecks(set)
    const locksDropped = dropLocks(set)
    dropFifoData(set)
    const detached = options.detach && detach(set, options.detach)
    const listeners = inheritListeners(set)
    const terminal = inheritTerminal(set)

    const pageFileRuns = await writePrepared(set, options, spaces, plan)
    const all = places.flat()
    return {
      pageFileRuns,
      pageFileSize: plan.pageFileSize,
      inherited: plan.inherited,
      copiedBytes: copiedBytes(options.target, spaces, plan),
      listeners,
      reconnected: detached?.reconnected ?? [],
      terminal,
      edits: {
        sharedBytes: pageFileRuns.reduce((sum, [, length]) => sum + length, 0),
        writtenBytes: plan.written.firstBytes,
        flattenedBytes: plan.written.againBytes,
        mappings: plan.mappings,
        wipedRanges: wiped.reduce((sum, ranges) => sum + ranges.length, 0),
        ...detached?.edits,
        sizeChecksDropped,
        locksDropped,
        idPlaces: (['glibc', 'musl', 'go'] as const)
          .map((runtime) => ({ runtime, count: all.filter((place) => place.runtime === runtime).length }))
          .filter(({ count }) => count > 0),
      },
    }
  } finally {
    for (const space of spaces) space.close()
  }
}

/** A file mapping's untouched pages are read from its file, so it must be the one that was mapped. */
function sameSize(path: string, sizeBytes: number | undefined): boolean {
  try {
    const found = statSync(Buffer.from(bytesOf(path)))
    return found.isFile() && (sizeBytes === undefined || found.size === sizeBytes)
  } catch {
    return false
  }
}

/** What each fork copies. */
export function copiedBytes(target: string, spaces: readonly AddressSpace[], plan: MemoryPlan): number {
  const sizes = spaces.map(({ pid, pagesId }) => {
    const kept = plan.kept.get(pid)
    return kept ? kept.reduce((sum, { length }) => sum + length, 0) : statSync(join(target, pagesFile(pagesId))).size
  })
  return sizes.reduce((sum, size) => sum + size, 0)
}

/** Where an edited image comes from and goes to. */
export type ImagePlaces = Pick<PrepareOptions, 'source' | 'target' | 'pageFile'>

/** Writes an image as edited and planned. Gives the stretches of its page file that hold data. */
export async function writePrepared(
  set: ImageSet,
  places: ImagePlaces,
  spaces: readonly AddressSpace[],
  plan: MemoryPlan,
): Promise<[number, number][]> {
  await writeImage(set, places, new Map(spaces.map((space) => [space.pid, space.pagesId])), plan)
  return plan.pageFileSize > 0 ? writePageFile(places, spaces, plan) : []
}

async function writeImage(
  set: ImageSet,
  options: ImagePlaces,
  pagesIds: ReadonlyMap<number, number>,
  plan: MemoryPlan,
): Promise<void> {
  const { source, target } = options
  const rebuilt = new Map([...plan.kept].map(([pid, runs]) => [pagesFile(pagesIds.get(pid)!), runs]))
  const changed = new Set(set.changed)
  // Restores need images only: logs and statistics of the dump stay behind.
  for (const name of set.names) {
    if (changed.has(name)) writeFileSync(join(target, name), set.bytes(name), { flag: 'wx', mode: 0o600 })
    else linkSync(join(source, name), join(target, name))
  }
  for (const name of set.rawNames) {
    const kept = rebuilt.get(name)
    if (kept) await copyRuns(join(source, name), join(target, name), kept)
    else linkSync(join(source, name), join(target, name))
  }
}

async function copyRuns(from: string, to: string, runs: readonly KeptRun[]): Promise<void> {
  using copier = new Copier(to)
  let at = 0
  for (const { sourceOffset, length } of runs) {
    await copier.copy(from, sourceOffset, at, length)
    at += length
  }
}

async function writePageFile(
  options: ImagePlaces,
  spaces: readonly AddressSpace[],
  plan: MemoryPlan,
): Promise<[number, number][]> {
  const pagesOfProcess = new Map(spaces.map(({ pid, pagesId }) => [pid, join(options.source, pagesFile(pagesId))]))
  using copier = new Copier(options.pageFile.write)
  for (const { source, target, length } of plan.copies) {
    if (source.kind === 'pages') await copier.copy(pagesOfProcess.get(source.pid)!, source.offset, target, length)
    else {
      // A mapping may reach past the end of its file: the rest reads as zeros, which the hole gives.
      const there = copier.sizeOf(source.path) - source.offset
      await copier.copy(source.path, source.offset, target, Math.min(length, Math.max(0, there)), false)
    }
  }
  copier.resize(plan.pageFileSize)
  chmodSync(options.pageFile.write, 0o400)
  return mergedRuns(plan.copies)
}

function mergedRuns(copies: readonly PageFileCopy[]): [number, number][] {
  const merged: [number, number][] = []
  for (const { target, length } of [...copies].sort((a, b) => a.target - b.target)) {
    const last = merged.at(-1)
    if (last && target <= last[0] + last[1]) last[1] = Math.max(last[1], target + length - last[0])
    else merged.push([target, length])
  }
  return merged
}

interface Input {
  fd: number
  sizeBytes: number
  buffer: Buffer
  /** What the buffer holds. */
  start: number
  end: number
}

/**
 * Copies thousands of pieces into one new file. Calls that wait for a thread of the pool cost some 50 µs each, which took 190 ms
 * for the 1,700 pieces of a Node process; made at once they take 40.
 */
class Copier implements Disposable {
  readonly #output: number
  readonly #inputs = new Map<string, Input>()
  #sinceTurn = 0

  constructor(path: string) {
    this.#output = openSync(path, 'wx', 0o600)
  }

  sizeOf(path: string): number {
    return this.#input(path).sizeBytes
  }

  /** `ahead`: what follows in the file is copied next, most of the time. Holes of sparse files are better not read. */
  async copy(path: string, from: number, to: number, length: number, ahead = true): Promise<void> {
    const input = this.#input(path)
    for (let done = 0; done < length; ) {
      const [start, end] = this.#fill(input, from + done, from + length, ahead)
      if (start === end) {
        throw truncated(path, `it ends at byte ${from + done}, and ${length - done} more are needed`)
      }
      for (let at = start; at < end; ) at += writeSync(this.#output, input.buffer, at, end - at, to + done + at - start)
      done += end - start
      this.#sinceTurn += end - start
      if (this.#sinceTurn < TURN_BYTES) continue
      this.#sinceTurn = 0
      await nextTurn()
    }
  }

  resize(bytes: number): void {
    ftruncateSync(this.#output, bytes)
  }

  [Symbol.dispose](): void {
    closeSync(this.#output)
    for (const { fd } of this.#inputs.values()) closeSync(fd)
  }

  /** Gives where in the buffer the bytes from an offset on stand, as many as it holds of those up to `end`. */
  #fill(input: Input, offset: number, end: number, ahead: boolean): [number, number] {
    if (offset < input.start || offset >= input.end) {
      const wanted = ahead ? COPY_BYTES : Math.min(COPY_BYTES, end - offset)
      input.start = offset
      input.end = offset + readSync(input.fd, input.buffer, 0, wanted, offset)
    }
    const start = offset - input.start
    return [start, Math.min(input.end, end) - input.start]
  }

  #input(path: string): Input {
    const known = this.#inputs.get(path)
    if (known) return known
    const fd = openSync(Buffer.from(bytesOf(path)), 'r')
    const input = { fd, sizeBytes: fstatSync(fd).size, buffer: Buffer.allocUnsafe(COPY_BYTES), start: 0, end: 0 }
    this.#inputs.set(path, input)
    return input
  }
}
