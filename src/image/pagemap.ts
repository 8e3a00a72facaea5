/** Which pages of a process the image holds, and where in the pages file each lies. */
import { corrupt } from './failure.js'
import { decodeIn } from './image-file.js'
import type { ImageSet } from './image-set.js'
import { encode } from './message.js'
import { PAGEMAP, PagemapEntry, PagemapHead } from './schema.js'

/** Page size of x86-64. */
export const PAGE = 4096
const PAGE_N = BigInt(PAGE)

/** A stretch of pages that the image holds. */
export interface PageRun {
  /** Address of the first page. */
  start: bigint
  /** Behind the last page. */
  end: bigint
  /** Where the first page lies in the pages file, in bytes. */
  offset: number
  /** As in the pagemap; always with PRESENT. */
  flags: number
}

export interface Pagemap {
  pagesId: number
  /** Ascending by address; adjacent entries may touch. */
  runs: PageRun[]
}

/** Flags of an entry whose pages stand in the parent image. */
export const PAGEMAP_PARENT = PAGEMAP.PARENT

export const pagesFile = (pagesId: number): string => `pages-${pagesId}.img`

export function readPagemap(set: ImageSet, name: string): Pagemap {
  const [head, ...entries] = set.file(name).entries
  if (!head) throw corrupt(name, 'it has no head')
  const { pagesId } = decodeIn(name, PagemapHead, head.message)
  const runs: PageRun[] = []
  let offset = 0
  for (const { message } of entries) {
    const entry = decodeIn(name, PagemapEntry, message)
    const flags = entry.flags ?? (entry.inParent ? PAGEMAP.PARENT : PAGEMAP.PRESENT)
    if (flags & PAGEMAP.PARENT)
      throw corrupt(name, 'it refers to a parent image, and forks are made of whole images only')
    const length = (entry.pages ?? BigInt(entry.compatPages)) * PAGE_N
    const previous = runs.at(-1)
    if ((previous && entry.vaddr < previous.end) || entry.vaddr % PAGE_N !== 0n)
      throw corrupt(name, `its entry at 0x${entry.vaddr.toString(16)} is out of order`)
    runs.push({ start: entry.vaddr, end: entry.vaddr + length, offset, flags })
    // Without PRESENT (lazy pages of a page server) no bytes stand in the pages file.
    if (!(flags & PAGEMAP.PRESENT)) throw corrupt(name, 'it names pages that the image does not hold')
    offset += Number(length)
  }
  return { pagesId, runs }
}

/** Replaces the runs; counts are written the way the image's version has them. */
export function writePagemap(set: ImageSet, name: string, runs: readonly PageRun[]): void {
  const [head, first] = set.file(name).entries
  const version41 = first !== undefined && decodeIn(name, PagemapEntry, first.message).pages === undefined
  const messages = runs.map(({ start, end, flags }) => {
    const count = (end - start) / PAGE_N
    return encode(PagemapEntry, {
      vaddr: start,
      flags,
      ...(version41 ? { compatPages: Number(count) } : { compatPages: 0, pages: count }),
    })
  })
  set.putMessages(name, [head!.message, ...messages])
}

/** Of two addresses. (Math.min takes no bigint.) */
export const earlier = (a: bigint, b: bigint): bigint => (a < b ? a : b)
export const later = (a: bigint, b: bigint): bigint => (a > b ? a : b)

/** The part of a sorted list of runs that lies in [start, end), cut at the borders. */
export function runsWithin(runs: readonly PageRun[], start: bigint, end: bigint): PageRun[] {
  const found: PageRun[] = []
  for (let i = firstRunEndingAfter(runs, start); i < runs.length && runs[i]!.start < end; i++) {
    found.push(cutRun(runs[i]!, start, end))
  }
  return found
}

/** The parts of a run inside [start, end); the run must touch it. */
function cutRun(run: PageRun, start: bigint, end: bigint): PageRun {
  const from = later(run.start, start)
  const to = earlier(run.end, end)
  return { start: from, end: to, offset: run.offset + Number(from - run.start), flags: run.flags }
}

function firstRunEndingAfter(runs: readonly PageRun[], address: bigint): number {
  let low = 0
  let high = runs.length
  while (low < high) {
    const middle = (low + high) >> 1
    if (runs[middle]!.end > address) high = middle
    else low = middle + 1
  }
  return low
}
