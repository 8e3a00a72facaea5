/**
 * Memory: private anonymous mappings become private mappings of one page file, so that a restore maps memory where
 * stock CRIU copies it, and all children share what they do not write. Private file mappings that the process wrote to
 * (relocated libraries, the JVM's class archive) likewise: their written stretches map the page file.
 *
 * The edit changes mm, files and pagemap images and gives a plan; `prepare` carries out what the plan copies.
 */
import { type AddressSpace, mappableFiles } from '../address-space.js'
import type { ImageSet } from '../image-set.js'
import { earlier, later, PAGE, type PageRun, runsWithin, writePagemap } from '../pagemap.js'
import { FILE_TYPE, FileEntry, MADV, MAP, MmEntry, VMA_STATUS, type VmaEntry } from '../schema.js'

/** Where a stretch of the page file comes from. */
export interface PageFileCopy {
  source: { kind: 'pages'; pid: number; offset: number } | { kind: 'file'; path: string; offset: number }
  /** In the page file, in bytes. */
  target: number
  length: number
}

/** A run of a process's pages that stays in its pages file. */
export interface KeptRun {
  sourceOffset: number
  length: number
}

export interface MemoryPlan {
  copies: PageFileCopy[]
  /** For each process, what its new pages file holds, in order. */
  kept: Map<number, KeptRun[]>
  /** Size of the (sparse) page file, in bytes. */
  pageFileSize: number
  /** How many mappings now map the page file. */
  mappings: number
}

export interface MemoryEdit {
  /** Path under which the children open the page file. */
  pageFilePath: string
  /** All living processes. */
  processes: readonly {
    memory: AddressSpace
    /** Whether it shares its memory; otherwise it keeps all its pages in the image. */
    isShared: boolean
    /** Pages of the process that a fork gets: all that the image has, but for wiped ones. */
    runs: readonly PageRun[]
    /** Addresses of pages, ascending, that stay out of the page file (see the identity edit). */
    keepOut: readonly bigint[]
    /** Ranges that this edit must not touch (see the wipe edit). */
    leaveAlone: readonly { start: bigint; end: bigint }[]
  }[]
  /** Whether the file that a mapping names is still the one that was mapped. */
  isUnchanged: (path: string, sizeBytes: number | undefined) => boolean
}

/**
 * Distance between the end of a slot and the next slot: an mremap that grows a mapping runs into a hole (zeros) of the
 * page file, not into a neighbour's memory. Less where very many slots would pass the 16 TiB that a file of ext4 may have.
 */
const SLOT_GAP = 1 << 30
const PAGE_FILE_LIMIT = 8 * 2 ** 40
/** Slots start at the same offset inside 2 MiB as their addresses, as huge pages and the kernel's fault-around want it. */
const SLOT_ALIGNMENT = 1 << 21
/** From this size on a mapping that is mostly empty is not given a slot as a whole (sanitizers reserve terabytes). */
const SPARSE_FROM = 1n << 30n
/** Stretches of pages closer than this become one: each mapping costs a fork some 10 µs. */
const SPARSE_GAP = 16n << 20n
/** The same for written pages of a file mapping; what lies between is copied from the file. */
const FILE_GAP = 16n * BigInt(PAGE)
/** Fewer written pages than these stay in the image: copying them is cheaper than a mapping. */
const FILE_STRETCH_MIN = 16n * BigInt(PAGE)

/** Bits that a VMA may have and still be converted. */
const PLAIN_ANONYMOUS = VMA_STATUS.REGULAR | VMA_STATUS.ANON_PRIVATE | VMA_STATUS.HEAP
const PLAIN_FILE = VMA_STATUS.REGULAR | VMA_STATUS.FILE_PRIVATE
/**
 * HotSpot's performance data: shared with nobody but tools that look at it, and removed when its process ends or another
 * JVM starts and misses that process. Each child gets a copy of its own.
 */
const VANISHING_FILE = /\/hsperfdata_[^/]+\/\d+$/
const NOT_CONVERTED = MAP.GROWSDOWN | MAP.LOCKED | MAP.HUGETLB | MAP.DROPPABLE

function isPlain(vma: VmaEntry, kind: number, bits: number): boolean {
  return (
    (vma.status & kind) !== 0 &&
    (vma.status & ~bits) === 0 &&
    (vma.flags & NOT_CONVERTED) === 0 &&
    // Other advice is given again, but lost with the first discard, for which the shim puts fresh memory there: V8 asks for
    // DONTFORK for its whole heap, to make fork(2) cheaper, and bears that.
    (((vma.madv ?? 0n) >> BigInt(MADV.WIPEONFORK)) & 1n) === 0n
  )
}

interface Stretch {
  start: bigint
  end: bigint
}

/** A stretch with its place in the page file, in bytes. */
interface Slot extends Stretch {
  offset: number
}

export function planMemory(set: ImageSet, edit: MemoryEdit): MemoryPlan {
  const files = set.files()
  // Each process has an entry of its own for the page file: criu takes mappings of a child and its parent at the same addresses
  // and of the same entry for one mapping that was inherited, whatever their offsets, and gives the child the parent's slot.
  const firstFileId = files.reduce((most, { id }) => Math.max(most, id), 0) + 1
  const paths = new Map(files.flatMap(({ id, regular }) => (regular ? [[id, regular] as const] : [])))

  const mappable = mappableFiles(set)
  const isUnchanged = (id: number) => {
    const file = mappable.has(id) ? paths.get(id) : undefined
    return file !== undefined && edit.isUnchanged(file.name, file.size === undefined ? undefined : Number(file.size))
  }
  const wanted = edit.processes.map(({ memory, isShared, runs, keepOut, leaveAlone }) => ({
    memory,
    runs,
    keepOut,
    stretches: set.memory(memory.pid).vmas.map((vma) => {
      if (leaveAlone.some(({ start, end }) => start < vma.end && vma.start < end)) return []
      if (isVanishing(vma, paths)) return [{ start: vma.start, end: vma.end }]
      return isShared ? stretchesOf(vma, runs, isUnchanged) : []
    }),
  }))
  const slots = wanted.reduce(
    (sum, { stretches }) => sum + stretches.reduce((inner, list) => inner + list.length, 0),
    0,
  )
  const gap = Math.max(SLOT_ALIGNMENT, Math.min(SLOT_GAP, Math.floor(PAGE_FILE_LIMIT / Math.max(1, slots))))

  const plan: MemoryPlan = { copies: [], kept: new Map(), pageFileSize: 0, mappings: 0 }
  const pageFiles: FileEntry[] = []
  for (const [order, { memory, runs, keepOut, stretches }] of wanted.entries()) {
    // Nothing to change: its pages can be linked as they are.
    if (stretches.every((list) => list.length === 0) && lengthOf(runs) === lengthOf(memory.runs)) continue
    const mm = set.memory(memory.pid)
    const vmas: VmaEntry[] = []
    const shared: Slot[] = []
    for (const [index, vma] of mm.vmas.entries()) {
      const slots = stretches[index]!.map(({ start, end }) => {
        const offset = alignedLike(plan.pageFileSize, start)
        plan.pageFileSize = offset + Number(end - start) + gap
        return { start, end, offset }
      })
      for (const { start, end, offset } of isFileBacked(vma) ? slots : []) {
        // What was not written is as in the file; the written pages come over it.
        const { name } = paths.get(Number(vma.shmid))!
        const source = { kind: 'file' as const, path: name, offset: Number(vma.pgoff + start - vma.start) }
        plan.copies.push({ source, target: offset, length: Number(end - start) })
      }
      vmas.push(...splitVma(vma, slots, firstFileId + order))
      plan.mappings += slots.length
      shared.push(...slots)
    }
    const kept: PageRun[] = []
    for (const run of runs) divideRun(run, shared, keepOut, memory.pid, plan.copies, kept)
    set.put(`mm-${memory.pid}.img`, MmEntry, [{ ...mm, vmas }])
    plan.kept.set(
      memory.pid,
      kept.map(({ offset, start, end }) => ({ sourceOffset: offset, length: Number(end - start) })),
    )
    writePagemap(set, `pagemap-${memory.pid}.img`, kept)
    if (shared.length > 0) pageFiles.push(pageFileEntry(firstFileId + order, edit.pageFilePath, files))
  }
  if (pageFiles.length > 0) set.put('files.img', FileEntry, [...files, ...pageFiles])
  return plan
}

const lengthOf = (runs: readonly Stretch[]) => runs.reduce((sum, { start, end }) => sum + end - start, 0n)

function pageFileEntry(id: number, name: string, files: readonly FileEntry[]): FileEntry {
  const owner = { uid: 0, euid: 0, signum: 0, pidType: 0, pid: 0 }
  // A mount id of -1, CRIU's default, makes it look the path up from the root.
  const regular = { id, flags: 0, pos: 0n, owner, name, buildId: [], ...mountOf(files) }
  return { type: FILE_TYPE.REG, id, regular }
}

/** The page file is found from the root, like the program's own files. */
function mountOf(files: readonly FileEntry[]): { mountId?: number } {
  const mountId = files.find(({ regular }) => regular)?.regular?.mountId
  return mountId === undefined ? {} : { mountId }
}

function isVanishing(vma: VmaEntry, paths: ReadonlyMap<number, { name: string }>): boolean {
  return (vma.status & VMA_STATUS.FILE_SHARED) !== 0 && VANISHING_FILE.test(paths.get(Number(vma.shmid))?.name ?? '')
}

/** The parts of a mapping that shall map the page file, ascending. */
function stretchesOf(vma: VmaEntry, pages: readonly PageRun[], isUnchanged: (fileId: number) => boolean): Stretch[] {
  const runs = runsWithin(pages, vma.start, vma.end)
  if (runs.length === 0) return []
  if (isPlain(vma, VMA_STATUS.ANON_PRIVATE, PLAIN_ANONYMOUS)) {
    if (vma.end - vma.start < SPARSE_FROM) return [{ start: vma.start, end: vma.end }]
    return merged(runs, SPARSE_GAP)
  }
  if (isPlain(vma, VMA_STATUS.FILE_PRIVATE, PLAIN_FILE) && isUnchanged(Number(vma.shmid))) {
    return merged(runs, FILE_GAP).filter(({ start, end }) => end - start >= FILE_STRETCH_MIN)
  }
  return []
}

function merged(runs: readonly PageRun[], gap: bigint): Stretch[] {
  const found: Stretch[] = []
  for (const { start, end } of runs) {
    const last = found.at(-1)
    if (last && start - last.end <= gap) last.end = end
    else found.push({ start, end })
  }
  return found
}

function alignedLike(from: number, address: bigint): number {
  const inside = Number(address % BigInt(SLOT_ALIGNMENT))
  const base = Math.floor(from / SLOT_ALIGNMENT) * SLOT_ALIGNMENT + inside
  return base >= from ? base : base + SLOT_ALIGNMENT
}

/** A mapping cut into the parts that map the page file and those that stay what they are. */
function splitVma(vma: VmaEntry, slots: readonly Slot[], fileId: number): VmaEntry[] {
  if (slots.length === 0) return [vma]
  const parts: VmaEntry[] = []
  const stays = (start: bigint, end: bigint) => {
    if (start < end)
      parts.push({ ...vma, start, end, pgoff: isFileBacked(vma) ? vma.pgoff + start - vma.start : vma.pgoff })
  }
  let at = vma.start
  for (const { start, end, offset } of slots) {
    stays(at, start)
    parts.push({
      ...vma,
      start,
      end,
      pgoff: BigInt(offset),
      shmid: BigInt(fileId),
      flags: (vma.flags & ~(MAP.ANONYMOUS | MAP.SHARED)) | MAP.PRIVATE,
      status: (vma.status & ~(VMA_STATUS.ANON_PRIVATE | VMA_STATUS.FILE_SHARED)) | VMA_STATUS.FILE_PRIVATE,
      // How the file was open: the page file is open for reading only.
      fdflags: 0,
    })
    at = end
  }
  stays(at, vma.end)
  return parts
}

const isFileBacked = (vma: VmaEntry) => (vma.status & (VMA_STATUS.FILE_PRIVATE | VMA_STATUS.FILE_SHARED)) !== 0

/** Sends each part of a run to its slot in the page file, or keeps it. A run can lie over the border of two mappings. */
function divideRun(
  run: PageRun,
  shared: readonly Slot[],
  keepOut: readonly bigint[],
  pid: number,
  copies: PageFileCopy[],
  kept: PageRun[],
): void {
  const keep = (start: bigint, end: bigint) => {
    if (start >= end) return
    const offset = run.offset + Number(start - run.start)
    const last = kept.at(-1)
    if (last && last.end === start && last.offset + Number(last.end - last.start) === offset) last.end = end
    else kept.push({ start, end, offset, flags: run.flags })
  }
  let at = run.start
  for (let i = firstEndingAfter(shared, run.start); i < shared.length && shared[i]!.start < run.end; i++) {
    const slot = shared[i]!
    keep(at, slot.start)
    at = later(at, slot.start)
    const end = earlier(slot.end, run.end)
    // The whole part goes to the page file; pages that each fork writes stand in the image too and are laid over it.
    copies.push({
      source: { kind: 'pages', pid, offset: run.offset + Number(at - run.start) },
      target: slot.offset + Number(at - slot.start),
      length: Number(end - at),
    })
    for (const page of keepOut) if (page >= at && page < end) keep(page, page + BigInt(PAGE))
    at = end
  }
  keep(at, run.end)
}

function firstEndingAfter(shared: readonly Slot[], address: bigint): number {
  let low = 0
  let high = shared.length
  while (low < high) {
    const middle = (low + high) >> 1
    if (shared[middle]!.end > address) high = middle
    else low = middle + 1
  }
  return low
}
