/**
 * Derive: the small edits made for each fork. A prepared image is loaded once; for given fresh ids it yields the few
 * files that differ and the names under which the rest is linked, so that a fork's own directory is a handful of links.
 */
import { mkdirSync, readFileSync, statSync, symlinkSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { AddressSpace } from './address-space.js'
import { setDeathSignal } from './edits/death-signal.js'
import { findVariable, type TextPlace } from './edits/environment.js'
import { renumberGhosts } from './edits/ghosts.js'
import {
  filesWithIds,
  findIdPlaces,
  type IdPlace,
  idsOf,
  renamedFile,
  renamedTree,
  renameIdsInside,
} from './edits/identity.js'
import { replaceFiles } from './edits/replaced-files.js'
import { disconnectDatagrams } from './edits/unix-peers.js'
import { corrupt } from './failure.js'
import { ImageSet } from './image-set.js'
import { PAGE, PAGEMAP_PARENT, type PageRun, pagesFile, writePagemap } from './pagemap.js'
import { PstreeEntry } from './schema.js'

/** Fresh ids for the ids of an image: every process and thread. */
export type FreshIds = ReadonlyMap<number, number>

export interface DerivedImage {
  /** Files of its own, by name. */
  files: Map<string, Uint8Array>
  /** Name in the derived directory → name in the prepared one. */
  links: Map<string, string>
  rootPid: number
  pids: number[]
}

/**
 * Up to this size a process's pages file is written anew for each fork, with its ids in it. A larger one (memory that
 * is copied) is reached as a parent image instead, and only the pages with ids are written.
 */
const REWRITE_MAX_BYTES = 1 << 20

interface ProcessPages {
  pid: number
  pagesId: number
  places: (IdPlace & { offset: number })[]
  texts: (TextPlace & { offset: number })[]
  /** The whole pages file, where it is small; else only the pages that hold ids, one after the other. */
  bytes: Buffer
  /** Set where the rest is taken from a parent image. */
  parent?: { runs: PageRun[] }
}

/** A prepared image in memory, ready to be derived from. */
export class ForkImage {
  readonly ids: readonly number[]
  readonly rootPid: number
  /** All processes, the root first. */
  readonly processes: readonly { pid: number; ppid: number; threads: readonly number[]; stopped: boolean }[]
  readonly pids: readonly number[]
  readonly #set: ImageSet
  readonly #pages: ProcessPages[]
  readonly #withIds: string[]

  /**
   * `deathSignal`: forks stop with their supervisor. `replaced`: files that are to be taken from elsewhere. `keepsIds`: forks have
   * the ids of the image (in a pid namespace each), and memory is left as it is.
   * Throws IMAGE_TRUNCATED, IMAGE_CORRUPT, IMAGE_VERSION, IMAGE_UNSUPPORTED.
   */
  constructor(
    readonly directory: string,
    options: {
      deathSignal: boolean
      keepsIds?: boolean
      replaced?: ReadonlyMap<string, string>
      /** Of where Unix sockets for datagrams are connected to: whether forks get those unconnected. */
      isUnreachable?: (address: Uint8Array) => boolean
      /** A variable of the environment that forks have under another name, of the same length. */
      variable?: { from: string; to: string } | undefined
    },
  ) {
    const set = ImageSet.read(directory)
    this.#set = set
    this.ids = idsOf(set)
    const processes = set.processes()
    this.processes = processes.map(({ pid, ppid, threads, stopped }) => ({ pid, ppid, threads: [...threads], stopped }))
    this.pids = processes.map(({ pid }) => pid)
    this.rootPid = this.pids[0]!
    const { keepsIds = false, variable } = options
    this.#pages =
      keepsIds && !variable
        ? []
        : processes.filter(({ dead }) => !dead).map((process) => loadPages(set, process, keepsIds, variable))
    if (options.deathSignal) setDeathSignal(set)
    if (options.replaced && options.replaced.size > 0) replaceFiles(set, options.replaced)
    if (options.isUnreachable) disconnectDatagrams(set, options.isUnreachable)
    this.#withIds = filesWithIds(set)
  }

  /** `fork`: a number that no other fork under way has; by default the root's id is one. */
  derive(ids: FreshIds, fork?: number): DerivedImage {
    const set = this.#set.copy()
    const tree = renamedTree(set, ids)
    set.put('pstree.img', PstreeEntry, tree)
    renameIdsInside(set, this.#withIds, ids)
    const files = new Map<string, Uint8Array>()
    const links = new Map<string, string>()
    for (const pages of this.#pages) this.#addPages(set, pages, ids, files, links)
    const rootPid = ids.get(this.rootPid)!
    const ghosts = renumberGhosts(set, fork ?? rootPid)
    const changed = new Set(set.changed)
    for (const name of set.names) {
      const renamed = ghosts.get(name) ?? renamedFile(name, ids)
      if (changed.has(name)) files.set(renamed, set.bytes(name))
      else links.set(renamed, name)
    }
    for (const name of set.rawNames) if (!files.has(name)) links.set(name, name)
    return { files, links, rootPid, pids: tree.map(({ pid }) => pid) }
  }

  /** The pages that hold ids; and where those are not all, the parent image that has the others. */
  #addPages(
    set: ImageSet,
    { pid, pagesId, places, texts, bytes, parent }: ProcessPages,
    ids: FreshIds,
    files: Map<string, Uint8Array>,
    links: Map<string, string>,
  ): void {
    const patched = Buffer.from(bytes)
    for (const { offset, width, threadId } of places) {
      if (width === 8) patched.writeBigUInt64LE(BigInt(ids.get(threadId)!), offset)
      else patched.writeInt32LE(ids.get(threadId)!, offset)
    }
    for (const { offset, bytes: text } of texts) patched.set(text, offset)
    const pages = pagesFile(pagesId)
    files.set(pages, patched)
    if (!parent) return
    const pagemap = `pagemap-${pid}.img`
    writePagemap(set, pagemap, parent.runs)
    links.set(`parent/${renamedFile(pagemap, ids)}`, pagemap)
    links.set(`parent/${pages}`, pages)
  }
}

function loadPages(
  set: ImageSet,
  process: ReturnType<ImageSet['processes']>[number],
  keepsIds: boolean,
  variable: { from: string; to: string } | undefined,
): ProcessPages {
  const memory = new AddressSpace(set, process.pid)
  try {
    const { pid } = process
    const { pagesId } = memory
    const { envStart, envEnd } = set.memory(pid)
    const path = join(set.directory, pagesFile(pagesId))
    const located = <T extends { address: bigint }>(place: T) => {
      const offset = memory.offsetOf(place.address)
      if (offset === undefined)
        throw corrupt(
          pagesFile(pagesId),
          `it lacks the page at 0x${place.address.toString(16)}, which holds a thread id`,
        )
      return { ...place, offset }
    }
    const places = keepsIds ? [] : findIdPlaces(set, process, memory).map(located)
    const texts = variable ? findVariable(memory, [envStart, envEnd], variable).map(located) : []
    const found = { pid, pagesId, places, texts }
    if (statSync(path).size <= REWRITE_MAX_BYTES) return { ...found, bytes: readFileSync(path) }
    return partialPages(memory, found)
  } finally {
    memory.close()
  }
}

/** Only the pages that hold what is changed; all other runs are marked as the parent image's. */
function partialPages(memory: AddressSpace, found: Omit<ProcessPages, 'bytes' | 'parent'>): ProcessPages {
  const size = BigInt(PAGE)
  const changed = [...found.places, ...found.texts].map(({ address }) => address & ~(size - 1n))
  const own = [...new Set(changed)].sort((a, b) => (a < b ? -1 : 1))
  const bytes = Buffer.concat(own.map((page) => memory.read(page, PAGE)!))
  const runs: PageRun[] = []
  let next = 0
  for (const run of memory.runs) {
    let at = run.start
    while (next < own.length && own[next]! < run.end) {
      const page = own[next++]!
      if (at < page) runs.push({ start: at, end: page, offset: 0, flags: PAGEMAP_PARENT })
      runs.push({ start: page, end: page + size, offset: 0, flags: run.flags })
      at = page + size
    }
    if (at < run.end) runs.push({ start: at, end: run.end, offset: 0, flags: PAGEMAP_PARENT })
  }
  const located = <T extends { address: bigint }>(place: T) => ({
    ...place,
    offset: own.indexOf(place.address & ~(size - 1n)) * PAGE + Number(place.address % size),
  })
  return { ...found, places: found.places.map(located), texts: found.texts.map(located), bytes, parent: { runs } }
}

/** Writes a derived image into a new directory, mode 0700. `onPath` is called with what was made, for a change of owner. */
export function writeDerived(
  derived: DerivedImage,
  prepared: string,
  directory: string,
  onPath?: (path: string) => void,
): void {
  const made = [directory]
  mkdirSync(directory, { mode: 0o700 })
  if ([...derived.links.keys()].some((name) => name.startsWith('parent/'))) made.push(join(directory, 'parent'))
  if (made.length > 1) mkdirSync(made[1]!, { mode: 0o700 })
  for (const [name, bytes] of derived.files) {
    writeFileSync(join(directory, name), bytes, { flag: 'wx', mode: 0o600 })
    made.push(join(directory, name))
  }
  for (const [name, target] of derived.links) symlinkSync(join(prepared, target), join(directory, name))
  if (onPath) for (const path of made) onPath(path)
}
