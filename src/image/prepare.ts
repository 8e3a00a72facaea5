/**
 * Prepare: the edits that are made once, when a generation is created. Reads CRIU's image from one directory and writes
 * the edited one into another, with the page file beside. Everything is read, checked and planned before the first byte
 * is written; the caller throws the target away when this fails.
 */
import { linkSync, statSync, writeFileSync } from 'node:fs'
import { type FileHandle, open } from 'node:fs/promises'
import { join } from 'node:path'
import { AddressSpace } from './address-space.js'
import { dropFifoData, dropLocks, dropSizeChecks } from './edits/file-checks.js'
import { findIdPlaces, pagesOf } from './edits/identity.js'
import { inheritListeners, type Listener } from './edits/listeners.js'
import { type KeptRun, type MemoryPlan, type PageFileCopy, planMemory } from './edits/memory.js'
import { type InheritedTerminal, inheritTerminal } from './edits/terminal.js'
import { type Range, wipeRanges, withoutRanges } from './edits/wipe.js'
import { truncated } from './failure.js'
import { ImageSet } from './image-set.js'
import { bytesOf } from './message.js'
import { pagesFile } from './pagemap.js'

export interface PrepareOptions {
  /** Where CRIU wrote the image. */
  source: string
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
  /** Wipe-on-fork ranges seen in the processes, by pid; those that the image names are added. */
  wipe?: ReadonlyMap<number, readonly Range[]>
  /** Forks keep the ids of the image: places that remember them need not be known. @default false */
  keepsIds?: boolean
}

export interface PreparedImage {
  /** Stretches of the page file that hold data, ascending: [offset, length] in bytes. Empty where no memory is shared. */
  pageFileRuns: [number, number][]
  pageFileSize: number
  /** Bytes of memory that every fork copies. */
  copiedBytes: number
  listeners: Listener[]
  terminal: InheritedTerminal[]
  /** What was edited, for people. */
  edits: {
    sharedBytes: number
    mappings: number
    wipedRanges: number
    sizeChecksDropped: string[]
    locksDropped: number
    idPlaces: { runtime: string; count: number }[]
  }
}

/** How much is copied at once: a compromise between system calls and memory. */
const COPY_BYTES = 4 << 20

export async function prepare(options: PrepareOptions): Promise<PreparedImage> {
  const set = ImageSet.read(options.source)
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
    const plan = planMemory(set, { pageFilePath: options.pageFile.map, processes, isUnchanged: sameSize })
    const sizeChecksDropped = dropSizeChecks(set)
    const locksDropped = dropLocks(set)
    dropFifoData(set)
    const listeners = inheritListeners(set)
    const terminal = inheritTerminal(set)

    await writeImage(set, options, new Map(spaces.map((space) => [space.pid, space.pagesId])), plan)
    const pageFileRuns = plan.pageFileSize > 0 ? await writePageFile(options, spaces, plan) : []
    const all = places.flat()
    return {
      pageFileRuns,
      pageFileSize: plan.pageFileSize,
      copiedBytes: spaces.reduce((sum, { pid, pagesId }) => sum + copiedBytes(options.target, pid, pagesId, plan), 0),
      listeners,
      terminal,
      edits: {
        sharedBytes: pageFileRuns.reduce((sum, [, length]) => sum + length, 0),
        mappings: plan.mappings,
        wipedRanges: wiped.reduce((sum, ranges) => sum + ranges.length, 0),
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

function copiedBytes(target: string, pid: number, pagesId: number, plan: MemoryPlan): number {
  const kept = plan.kept.get(pid)
  return kept ? kept.reduce((sum, { length }) => sum + length, 0) : statSync(join(target, pagesFile(pagesId))).size
}

async function writeImage(
  set: ImageSet,
  options: PrepareOptions,
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
  await using files = await openPair(from, to)
  let at = 0
  for (const { sourceOffset, length } of runs) {
    await copyBytes(files.input, sourceOffset, files.output, at, length, from)
    at += length
  }
}

async function writePageFile(
  options: PrepareOptions,
  spaces: readonly AddressSpace[],
  plan: MemoryPlan,
): Promise<[number, number][]> {
  const pagesOfProcess = new Map(spaces.map(({ pid, pagesId }) => [pid, join(options.source, pagesFile(pagesId))]))
  const output = await open(options.pageFile.write, 'wx', 0o600)
  const inputs = new Map<string, FileHandle>()
  try {
    for (const { source, target, length } of plan.copies) {
      const path = source.kind === 'file' ? source.path : pagesOfProcess.get(source.pid)!
      const input = inputs.get(path) ?? (await open(Buffer.from(bytesOf(path)), 'r'))
      inputs.set(path, input)
      // A mapping may reach past the end of its file: the rest reads as zeros, which the hole gives.
      const { size } = source.kind === 'file' ? await input.stat() : { size: Number.POSITIVE_INFINITY }
      await copyBytes(input, source.offset, output, target, Math.min(length, Math.max(0, size - source.offset)), path)
    }
    await output.truncate(plan.pageFileSize)
    await output.chmod(0o400)
  } finally {
    for (const handle of [output, ...inputs.values()]) await handle.close()
  }
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

async function copyBytes(
  input: FileHandle,
  from: number,
  output: FileHandle,
  to: number,
  length: number,
  name: string,
): Promise<void> {
  const buffer = Buffer.allocUnsafe(Math.min(COPY_BYTES, length))
  for (let done = 0; done < length; ) {
    const { bytesRead } = await input.read(buffer, 0, Math.min(buffer.length, length - done), from + done)
    if (bytesRead === 0) throw truncated(name, `it ends at byte ${from + done}, and ${length - done} more are needed`)
    let written = 0
    while (written < bytesRead) {
      written += (await output.write(buffer, written, bytesRead - written, to + done + written)).bytesWritten
    }
    done += bytesRead
  }
}

async function openPair(from: string, to: string) {
  const input = await open(from, 'r')
  try {
    const output = await open(to, 'wx', 0o600)
    return {
      input,
      output,
      async [Symbol.asyncDispose]() {
        await input.close()
        await output.close()
      },
    }
  } catch (error) {
    await input.close()
    throw error
  }
}
