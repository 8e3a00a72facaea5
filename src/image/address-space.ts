/**
 * The memory of one process of an image, read by address: from the pages that the image holds, else from the file that
 * is mapped there, else zeros. Throws IMAGE_TRUNCATED where the pages file is shorter than its pagemap says.
 */
import { closeSync, fstatSync, openSync, readSync } from 'node:fs'
import { join } from 'node:path'
import { truncated } from './failure.js'
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

  constructor(
    private readonly set: ImageSet,
    readonly pid: number,
    /** Regular files of the image by id: what private file mappings read. */
    fileNames: ReadonlyMap<number, string> = fileNamesOf(set),
  ) {
    const { pagesId, runs } = readPagemap(set, `pagemap-${pid}.img`)
    this.pagesId = pagesId
    this.runs = runs
    this.vmas = set.memory(pid).vmas
    this.#fileNames = fileNames
    const name = pagesFile(pagesId)
    const needed = runs.reduce((sum, run) => sum + Number(run.end - run.start), 0)
    const size = needed === 0 ? 0 : fstatSync(this.#descriptor(join(set.directory, name))).size
    if (size < needed) throw truncated(name, `it has ${size} bytes, and its pagemap names ${needed}`)
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
      readSync(this.#descriptor(name), bytes, 0, length, Number(vma.pgoff + address - vma.start))
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
      fd = openSync(Buffer.from(bytesOf(path)), 'r')
      this.#open.set(path, fd)
    }
    return fd
  }
}

export function fileNamesOf(set: ImageSet): Map<number, string> {
  return new Map(set.files().flatMap(({ id, regular }) => (regular ? [[id, regular.name]] : [])))
}
