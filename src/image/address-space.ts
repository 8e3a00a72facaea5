/**
 * The memory of one process of an image, read by address: from the pages that the image holds, else from the file that
 * is mapped there, else zeros.
 */
import { closeSync, constants, openSync, readSync } from 'node:fs'
import { join } from 'node:path'
import { corrupt } from './failure.js'
import type { ImageSet } from './image-set.js'
import { bytesOf } from './message.js'
import { PAGE, type PageRun, pagesFile, readPagemap, runsWithin } from './pagemap.js'
import { VMA_STATUS, type VmaEntry } from './schema.js'

export class AddressSpace {
  readonly pagesId: number
  readonly runs: readonly PageRun[]
  readonly vmas: readonly VmaEntry[]
  readonly #fileNames: ReadonlyMap<number, string>
  readonly #open = new Map<string, number>()

  /** Throws IMAGE_CORRUPT where mappings and pagemap do not fit each other. */
  constructor(
    private readonly set: ImageSet,
    readonly pid: number,
  ) {
    const { pagesId, runs } = readPagemap(set, `pagemap-${pid}.img`)
    this.pagesId = pagesId
    this.runs = runs
    // Guard pages lie inside of other mappings, and are listed after all of them (CRIU ≥ 4.2).
    this.vmas = set.memory(pid).vmas.filter(({ status }) => !(status & VMA_STATUS.GUARD))
    this.#fileNames = mappableFiles(set)
    checkMappings(pid, this.vmas, runs)
  }

  close(): void {
    for (const fd of this.#open.values()) closeSync(fd)
    this.#open.clear()
  }

  vmaAt(address: bigint): VmaEntry | undefined {
    return this.vmas.find((vma) => vma.start <= address && address < vma.end)
  }

  /** Offset in the pages file of the byte at an address; undefined where the image does not hold its page. */
  offsetOf(address: bigint): number | undefined {
    const [run] = runsWithin(this.runs, address, address + 1n)
    return run?.offset
  }

  /** `length` bytes inside one page; undefined where nothing is mapped there. */
  read(address: bigint, length: number): Buffer | undefined {
    const bytes = Buffer.alloc(length)
    const offset = this.offsetOf(address)
    if (offset !== undefined) {
      readSync(this.#descriptor(join(this.set.directory, pagesFile(this.pagesId))), bytes, 0, length, offset)
      return bytes
    }
    const vma = this.vmaAt(address)
    if (!vma) return undefined
    const name = vma.status & VMA_STATUS.FILE_PRIVATE ? this.#fileNames.get(Number(vma.shmid)) : undefined
    if (name !== undefined) {
      readSync(this.#descriptor(name), bytes, 0, length, vma.pgoff + address - vma.start)
    }
    return bytes
  }

  /** A 4-byte integer, or undefined where it is not mapped or runs over a page's border. */
  readInt32(address: bigint): number | undefined {
    return address % BigInt(PAGE) > BigInt(PAGE - 4) ? undefined : this.read(address, 4)?.readInt32LE()
  }

  readUint64(address: bigint): bigint | undefined {
    return address % BigInt(PAGE) > BigInt(PAGE - 8) ? undefined : this.read(address, 8)?.readBigUInt64LE()
  }

  #descriptor(path: string): number {
    let fd = this.#open.get(path)
    if (fd === undefined) {
      // Not to wait for a writer, should it be a FIFO.
      fd = openSync(Buffer.from(bytesOf(path)), constants.O_RDONLY | constants.O_NONBLOCK)
      this.#open.set(path, fd)
    }
    return fd
  }
}

/** The regular files of an image that their paths still lead to, by id: what private mappings of them read. */
export function mappableFiles(set: ImageSet): Map<number, string> {
  // Such a path may lead to another file by now: an upgrade puts the new library in the old one's place.
  const replaced = new Set(set.remaps().map(({ fileId }) => fileId))
  const files = set.files()
  return new Map(files.flatMap(({ id, regular }) => (regular && !replaced.has(id) ? [[id, regular.name]] : [])))
}

/** The files, by id, whose content is memory of processes: programs and what they map for themselves. */
export function mappedFiles(set: ImageSet): Set<number> {
  const mapped = new Set<number>()
  for (const { pid, dead } of set.processes()) {
    if (dead) continue
    const { exeFileId, vmas } = set.memory(pid)
    mapped.add(exeFileId)
    for (const { status, shmid } of vmas) if (status & VMA_STATUS.FILE_PRIVATE) mapped.add(Number(shmid))
  }
  return mapped
}

const PAGE_N = BigInt(PAGE)

function checkMappings(pid: number, vmas: readonly VmaEntry[], runs: readonly PageRun[]): void {
  let before = 0n
  for (const { start, end } of vmas) {
    if (start < before || end <= start || start % PAGE_N !== 0n || end % PAGE_N !== 0n) {
      throw corrupt(`mm-${pid}.img`, `its mapping at 0x${start.toString(16)} is out of order`)
    }
    before = end
  }
  let next = 0
  for (const run of runs) {
    // A run can lie over the border of two mappings.
    for (let at = run.start; at < run.end; at = vmas[next]!.end) {
      while (next < vmas.length && vmas[next]!.end <= at) next++
      if (next === vmas.length || vmas[next]!.start > at) {
        throw corrupt(`pagemap-${pid}.img`, `it names a page at 0x${at.toString(16)}, where nothing is mapped`)
      }
    }
  }
}
