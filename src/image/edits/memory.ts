/**
 * Memory: private anonymous mappings become private mappings of one page file, so that a restore maps memory where
 * stock CRIU copies it, and all children share what they do not write. Private file mappings that the process wrote to
 * (relocated libraries, the JVM's class archive) likewise: their written stretches map the page file.
 *
 * A process that is a fork itself maps the page files of its generation already, and CRIU's image of it has only the
 * pages that it wrote since. Those mappings stay, and what was written goes into the new page file where that is worth
 * mappings of its own (see regions.ts).
 *
 * The edit changes mm, files and pagemap images and gives a plan; `prepare` carries out what the plan copies.
 */
import { type AddressSpace, mappableFiles } from '../address-space.js'
import type { ImageSet } from '../image-set.js'
import { earlier, later, PAGE, type PageRun, runsWithin, writePagemap } from '../pagemap.js'
import { FILE_TYPE, FileEntry, MADV, MAP, MmEntry, VMA_STATUS, type VmaEntry } from '../schema.js'
import { type Atom, COSTS, chooseMoved, countMappings, movedStretches } from './regions.js'

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
  /** How many mappings now map page files. */
  mappings: number
  /** Names of the inherited page files that are mapped still. */
  inherited: string[]
  /** What is written for the first time, and what older page files hold and is written once more, in bytes. */
  written: { firstBytes: number; againBytes: number }
}

/** A page file of the generation that the processes were forked from. */
export interface InheritedPageFile {
  /** In its generation, and in those that inherit it. */
  name: string
  /** The path by which the image names it: the processes mapped it there. */
  seenPath: string
  /** Path under which the children will open it. */
  path: string
  /** Stretches that hold data, ascending: [offset, length] in bytes. */
  runs: readonly (readonly [offset: number, length: number])[]
  sizeBytes: number
}

export interface MemoryEdit {
  /** Path under which the children open the page file. */
  pageFilePath: string
  /** Those that the processes map already. @default none */
  inherited?: readonly InheritedPageFile[]
  /** Whether all that maps an inherited page file moves to the new one, whatever it costs. @default false */
  flatten?: boolean
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
/** A page file more costs a fork an `open` for each of its mappings that follows one of another file: some 3 µs. */
const MOST_INHERITED_FILES = 15
/**
 * How many mappings a process may have more than regions, before more of what lies between them moves too. Measured with a Node
 * program of 500 MiB, ten checkpoints deep, 100 requests between (10 MiB written each), forks of all depths interleaved: with 600 a
 * fork takes 1.19 times what one of the first generation takes, and a checkpoint writes 27 to 31 MiB; with 256 it writes 55, with 1,000
 * a fork takes 1.4 to 1.5 times.
 */
const MOST_EXTRA_MAPPINGS = 600
/** From the end of a mapping to the end of its page file, at least. Less than `SLOT_GAP` for 65,530 mappings, the most there can be. */
const LEAST_ROOM = PAGE_FILE_LIMIT / 2 ** 16

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

type ProcessMemory = MemoryEdit['processes'][number]

export function planMemory(set: ImageSet, edit: MemoryEdit): MemoryPlan {
  const files = set.files()
  const paths = new Map(files.flatMap(({ id, regular }) => (regular ? [[id, regular] as const] : [])))
  const bySeenPath = new Map((edit.inherited ?? []).map((file) => [file.seenPath, file]))
  const inheritedById = new Map(
    files.flatMap(({ id, regular }) => {
      const file = regular && bySeenPath.get(regular.name)
      return file ? [[id, file] as const] : []
    }),
  )
  const inheritedOf = (vma: VmaEntry) =>
    vma.status & VMA_STATUS.FILE_PRIVATE ? inheritedById.get(Number(vma.shmid)) : undefined

  const mappable = mappableFiles(set)
  const isUnchanged = (id: number) => {
    const file = mappable.has(id) ? paths.get(id) : undefined
    return file !== undefined && edit.isUnchanged(file.name, file.size === undefined ? undefined : Number(file.size))
  }
  const { flatten = false } = edit
  const retired = flatten ? new Set(inheritedById.values()) : retiredFiles(set, edit.processes, inheritedOf)
  const wanted = edit.processes.map((process) => {
    const { vmas } = set.memory(process.memory.pid)
    const isLeftAlone = (vma: VmaEntry) =>
      process.leaveAlone.some(({ start, end }) => start < vma.end && vma.start < end)
    const regions = regionsOf(vmas, process, isLeftAlone, inheritedOf, flatten)
    const inRegions = new Set(regions.flat())
    const others = vmas.flatMap((vma) => {
      if (inRegions.has(vma) || isLeftAlone(vma) || inheritedOf(vma)) return []
      if (isVanishing(vma, paths)) return [{ start: vma.start, end: vma.end }]
      return process.isShared ? stretchesOf(vma, process.runs, isUnchanged) : []
    })
    const moved = movedWithin(regions, process, inheritedOf, retired)
    const stretches = [...others, ...moved].sort((a, b) => (a.start < b.start ? -1 : 1))
    return { ...process, vmas, stretches }
  })
  const slotCount = wanted.reduce((sum, { stretches }) => sum + stretches.length, 0)
  const gap = Math.max(SLOT_ALIGNMENT, Math.min(SLOT_GAP, Math.floor(PAGE_FILE_LIMIT / Math.max(1, slotCount))))

  const plan: MemoryPlan = {
    copies: [],
    kept: new Map(),
    pageFileSize: 0,
    mappings: 0,
    inherited: [],
    written: { firstBytes: 0, againBytes: 0 },
  }
  const entries = new PageFileEntries(files)
  for (const { memory, runs, keepOut, vmas, stretches } of wanted) {
    const changesPages = stretches.length > 0 || lengthOf(runs) !== lengthOf(memory.runs)
    // Nothing to change: its pages can be linked as they are.
    if (!changesPages && !vmas.some(inheritedOf)) continue
    const slots = stretches.map(({ start, end }) => {
      const offset = alignedLike(plan.pageFileSize, start)
      plan.pageFileSize = offset + Number(end - start) + gap
      return { start, end, offset }
    })
    const result: VmaEntry[] = []
    for (const vma of vmas) {
      const inherited = inheritedOf(vma)
      const within = vma.status & VMA_STATUS.GUARD ? [] : slotsWithin(slots, vma)
      for (const slot of within) {
        if (inherited) copyUnwritten(vma, slot, inherited, runs, plan.copies)
        else if (isFileBacked(vma)) {
          // What was not written is as in the file; the written pages come over it.
          const source = {
            kind: 'file' as const,
            path: paths.get(Number(vma.shmid))!.name,
            offset: Number(vma.pgoff + slot.start - vma.start),
          }
          plan.copies.push({ source, target: slot.offset, length: Number(slot.end - slot.start) })
        }
      }
      const parts = splitVma(vma, within, () => entries.idFor(memory.pid, edit.pageFilePath))
      if (inherited) {
        for (const part of parts) {
          if (within.some(({ start }) => start === part.start)) continue
          part.shmid = BigInt(entries.idFor(memory.pid, inherited.path))
          part.fdflags = 0
          plan.mappings += 1
        }
      }
      for (const part of parts) {
        const last = result.at(-1)
        // A slot over the border of two mappings is one mapping.
        if (last && isContinued(last, part) && slots.some(({ start, end }) => start < part.start && part.start < end)) {
          last.end = part.end
        } else result.push(part)
      }
    }
    plan.mappings += slots.length
    set.put(`mm-${memory.pid}.img`, MmEntry, [{ ...set.memory(memory.pid), vmas: result }])
    if (!changesPages) continue
    const kept: PageRun[] = []
    for (const run of runs) divideRun(run, slots, keepOut, memory.pid, plan.copies, kept)
    plan.kept.set(
      memory.pid,
      kept.map(({ offset, start, end }) => ({ sourceOffset: offset, length: Number(end - start) })),
    )
    writePagemap(set, `pagemap-${memory.pid}.img`, kept)
  }
  plan.inherited = (edit.inherited ?? []).filter(({ path }) => entries.has(path)).map(({ name }) => name)
  for (const { source, length } of plan.copies) {
    if (source.kind === 'file' && bySeenPath.has(source.path)) plan.written.againBytes += length
    else plan.written.firstBytes += length
  }
  const remaining = withoutPageFiles(set, files, inheritedById)
  if (entries.list.length > 0 || remaining.length < files.length) {
    set.put('files.img', FileEntry, [...remaining, ...entries.list])
  }
  return plan
}

/** The entries of page files, made as they are needed. */
class PageFileEntries {
  readonly list: FileEntry[] = []
  readonly #ids = new Map<string, number>()
  readonly #paths = new Set<string>()
  #next: number

  constructor(private readonly files: readonly FileEntry[]) {
    this.#next = files.reduce((most, { id }) => Math.max(most, id), 0) + 1
  }

  /**
   * Each process has entries of its own: criu takes mappings of a child and its parent at the same addresses and of the same
   * entry for one mapping that was inherited, whatever their offsets, and gives the child the parent's slot.
   */
  idFor(pid: number, path: string): number {
    const key = `${pid} ${path}`
    const known = this.#ids.get(key)
    if (known !== undefined) return known
    const id = this.#next++
    this.#ids.set(key, id)
    this.#paths.add(path)
    this.list.push(pageFileEntry(id, path, this.files))
    return id
  }

  has(path: string): boolean {
    return this.#paths.has(path)
  }
}

/** The entries for page files as CRIU wrote them name paths of another generation; nothing maps them any more. */
function withoutPageFiles(
  set: ImageSet,
  files: readonly FileEntry[],
  inherited: ReadonlyMap<number, InheritedPageFile>,
): FileEntry[] {
  if (inherited.size === 0) return [...files]
  // A program may have opened what it maps (/proc/self/map_files).
  const open = new Set(set.descriptors().map(({ entry }) => entry.id))
  for (const { id, regular } of files) if (regular && inherited.has(id)) regular.name = inherited.get(id)!.path
  return files.filter(({ id, regular }) => !regular || !inherited.has(id) || open.has(id))
}

type InheritedOf = (vma: VmaEntry) => InheritedPageFile | undefined

/**
 * The page files whose mappings move to the new one, since there are so many: those with the least that is mapped still.
 */
function retiredFiles(
  set: ImageSet,
  processes: readonly ProcessMemory[],
  inheritedOf: InheritedOf,
): ReadonlySet<InheritedPageFile> {
  const mapped = new Map<InheritedPageFile, number>()
  for (const { memory } of processes) {
    for (const vma of set.memory(memory.pid).vmas) {
      const file = inheritedOf(vma)
      if (!file) continue
      const length = Number(vma.end - vma.start)
      // What cannot be moved keeps its file.
      const bytes = isPlain(vma, VMA_STATUS.FILE_PRIVATE, PLAIN_FILE)
        ? dataWithin(file, Number(vma.pgoff), length).reduce((sum, [, bytes]) => sum + bytes, 0)
        : Number.POSITIVE_INFINITY
      mapped.set(file, (mapped.get(file) ?? 0) + bytes)
    }
  }
  const surplus = Math.max(0, mapped.size - MOST_INHERITED_FILES)
  const movable = [...mapped].filter(([, bytes]) => Number.isFinite(bytes)).sort(([, a], [, b]) => a - b)
  return new Set(movable.slice(0, surplus).map(([file]) => file))
}

/**
 * Runs of neighbouring mappings that differ in nothing but what they map, and of which one at least maps an inherited page
 * file: what was one mapping in the first generation.
 */
function regionsOf(
  vmas: readonly VmaEntry[],
  { isShared }: ProcessMemory,
  isLeftAlone: (vma: VmaEntry) => boolean,
  inheritedOf: InheritedOf,
  flatten: boolean,
): VmaEntry[][] {
  const regions: VmaEntry[][] = []
  if (!vmas.some(inheritedOf)) return regions
  for (const vma of vmas) {
    // What is locked, say, maps a file of ours already, and maps the other one just as well.
    const canMove = inheritedOf(vma)
      ? flatten || isPlain(vma, VMA_STATUS.FILE_PRIVATE, PLAIN_FILE)
      : isShared && isPlain(vma, VMA_STATUS.ANON_PRIVATE, PLAIN_ANONYMOUS)
    if (!canMove || isLeftAlone(vma)) continue
    const region = regions.at(-1)
    const last = region?.at(-1)
    if (region && last && isContinued(last, vma)) region.push(vma)
    else regions.push([vma])
  }
  return regions.filter((region) => region.some(inheritedOf))
}

/** What tells anonymous memory from a mapping of a file. Only anonymous memory is known as the heap. */
const CONTENT_STATUS = VMA_STATUS.ANON_PRIVATE | VMA_STATUS.FILE_PRIVATE | VMA_STATUS.HEAP

function isContinued(first: VmaEntry, second: VmaEntry): boolean {
  return (
    first.end === second.start &&
    first.prot === second.prot &&
    (first.flags & ~MAP.ANONYMOUS) === (second.flags & ~MAP.ANONYMOUS) &&
    (first.status & ~CONTENT_STATUS) === (second.status & ~CONTENT_STATUS) &&
    (first.madv ?? 0n) === (second.madv ?? 0n)
  )
}

/** The stretches of a process's regions that move to the new page file: where that is cheapest, and the mappings do not become too many. */
function movedWithin(
  regions: readonly (readonly VmaEntry[])[],
  process: ProcessMemory,
  inheritedOf: InheritedOf,
  retired: ReadonlySet<InheritedPageFile>,
): Stretch[] {
  const atoms = regions.map((region) => region.flatMap((vma) => atomsOf(vma, process, inheritedOf(vma), retired)))
  // Not mappings become dearer where they are too many, or more would be copied at each fork, but what is written along cheaper.
  for (let cheaper = 1; ; cheaper *= 2) {
    const moved = atoms.map((list) =>
      chooseMoved(
        list.map((atom) => ({ ...atom, moveCost: atom.moveCost / cheaper })),
        COSTS.mapping,
      ),
    )
    const mappings = atoms.reduce((sum, list, i) => sum + countMappings(list, moved[i]!), 0)
    // The search ends where mappings are many for another reason: stretches that cannot move.
    if (mappings <= regions.length + MOST_EXTRA_MAPPINGS || cheaper > 1e9) {
      return atoms.flatMap((list, i) => movedStretches(list, moved[i]!))
    }
  }
}

function atomsOf(
  vma: VmaEntry,
  { runs, isShared }: ProcessMemory,
  inherited: InheritedPageFile | undefined,
  retired: ReadonlySet<InheritedPageFile>,
): Atom[] {
  const written = runsWithin(runs, vma.start, vma.end)
  if (!inherited) return anonymousAtoms(vma, written)
  // Room to grow: behind the end of the file there are no zeros but SIGBUS.
  const hasRoom = inherited.sizeBytes - Number(vma.pgoff + vma.end - vma.start) >= LEAST_ROOM
  const mustMove = retired.has(inherited) || !hasRoom
  const atoms: Atom[] = []
  const add = (start: bigint, end: bigint, copied: number, moveCost: number) => {
    if (start >= end) return
    const stayCost = mustMove ? Number.POSITIVE_INFINITY : copied
    // A process that is copied at each fork shares what it has from its generation, and no more.
    const allowed = isShared || mustMove ? moveCost : Number.POSITIVE_INFINITY
    atoms.push({ start, end, stayCost, moveCost: allowed, joined: atoms.length > 0 })
  }
  const addUnwritten = (start: bigint, end: bigint) => {
    if (start >= end) return
    const data = dataWithin(inherited, Number(vma.pgoff + start - vma.start), Number(end - start))
    const bytes = data.reduce((sum, [, length]) => sum + length, 0)
    add(start, end, 0, (bytes / PAGE) * COSTS.movedPage)
  }
  let at = vma.start
  for (const { start, end } of written) {
    addUnwritten(at, start)
    add(start, end, copyCost([{ start, end }]), 0)
    at = end
  }
  addUnwritten(at, vma.end)
  return atoms
}

function copyCost(runs: readonly Stretch[]): number {
  return runs.length * COSTS.copiedRun + (Number(lengthOf(runs)) / PAGE) * COSTS.copiedPage
}

/** Anonymous memory between mappings of page files: what was discarded or added since. It moves as a whole, as in a first generation. */
function anonymousAtoms(vma: VmaEntry, written: readonly PageRun[]): Atom[] {
  const { start, end } = vma
  if (end - start < SPARSE_FROM) {
    // Empty memory is cheaper to fill than pages of a file.
    const moveCost = written.length > 0 ? 0 : (Number(end - start) / PAGE) * COSTS.movedPage
    return [{ start, end, stayCost: copyCost(written), moveCost, joined: false }]
  }
  const atoms: Atom[] = []
  const add = (from: bigint, to: bigint, runs: readonly PageRun[]) => {
    const moveCost = runs.length > 0 ? 0 : Number.POSITIVE_INFINITY
    if (from < to) atoms.push({ start: from, end: to, stayCost: copyCost(runs), moveCost, joined: atoms.length > 0 })
  }
  let at = start
  for (const stretch of merged(written, SPARSE_GAP)) {
    add(at, stretch.start, [])
    add(stretch.start, stretch.end, runsWithin(written, stretch.start, stretch.end))
    at = stretch.end
  }
  add(at, end, [])
  return atoms
}

/** The data of a page file inside a stretch of it: [offset, length]. */
function dataWithin({ runs }: InheritedPageFile, offset: number, length: number): [number, number][] {
  const found: [number, number][] = []
  let low = 0
  let high = runs.length
  while (low < high) {
    const middle = (low + high) >> 1
    if (runs[middle]![0] + runs[middle]![1] > offset) high = middle
    else low = middle + 1
  }
  for (let i = low; i < runs.length && runs[i]![0] < offset + length; i++) {
    const from = Math.max(runs[i]![0], offset)
    found.push([from, Math.min(runs[i]![0] + runs[i]![1], offset + length) - from])
  }
  return found
}

/** Plans to copy what a process has not written of a mapping of an inherited page file, where that moves. */
function copyUnwritten(
  vma: VmaEntry,
  slot: Slot,
  file: InheritedPageFile,
  runs: readonly PageRun[],
  copies: PageFileCopy[],
): void {
  const copy = (start: bigint, end: bigint) => {
    if (start >= end) return
    const offset = Number(vma.pgoff + start - vma.start)
    const target = slot.offset + Number(start - slot.start)
    for (const [at, length] of dataWithin(file, offset, Number(end - start))) {
      copies.push({ source: { kind: 'file', path: file.seenPath, offset: at }, target: target + at - offset, length })
    }
  }
  let at = slot.start
  for (const { start, end } of runsWithin(runs, slot.start, slot.end)) {
    copy(at, start)
    at = end
  }
  copy(at, slot.end)
}

/** The parts of slots that lie in a mapping. */
function slotsWithin(slots: readonly Slot[], { start, end }: Stretch): Slot[] {
  const found: Slot[] = []
  for (let i = firstEndingAfter(slots, start); i < slots.length && slots[i]!.start < end; i++) {
    const from = later(slots[i]!.start, start)
    found.push({
      start: from,
      end: earlier(slots[i]!.end, end),
      offset: slots[i]!.offset + Number(from - slots[i]!.start),
    })
  }
  return found
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
function splitVma(vma: VmaEntry, slots: readonly Slot[], fileId: () => number): VmaEntry[] {
  if (slots.length === 0) return [{ ...vma }]
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
      shmid: BigInt(fileId()),
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
