/**
 * A generation in the making: a temporary directory that a callback fills, and that is then sealed: owned by us, read-only,
 * its checksums taken, all of it on the disk. It knows no numbers and no other generation but those it is handed.
 */
import {
  chmodSync,
  chownSync,
  closeSync,
  lstatSync,
  mkdirSync,
  openSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from 'node:fs'
import { link, readdir } from 'node:fs/promises'
import { join } from 'node:path'
import PQueue from 'p-queue'
import { WarmforkError } from '../errors.js'
import { decodeRuns, encodeRuns, fileChecksum, type Run, runsChecksum } from './checksum.js'
import { sync } from './directories.js'
import type { Generation } from './generation.js'
import { type EarlierCopy, type FileToKeep, KEPT_DIRECTORY, keepFiles } from './kept-files.js'
import { LEASE_DIRECTORY } from './lease.js'
import { changingLinks } from './links.js'
import type { MappedFile, StoredFile } from './manifest.js'

export const IMAGE_DIRECTORY = 'image'
/** An empty file: the generation goes with its supervisor. Of a file's content nothing is sure after a power cut, of its name it is. */
export const EPHEMERAL_MARK = 'ephemeral'
const SCRATCH_DIRECTORY = 'scratch'

export interface DraftOptions {
  readonly number: number
  readonly finalDirectory: string
  /** Whether it is to survive a power cut and its supervisor. */
  readonly durable: boolean
  readonly maxCopyBytes: number
  readonly earlierCopies: () => Promise<EarlierCopy[]>
}

/** How many files are synced and read for their checksums at once: of libuv's four threads, some are left for forks. */
const SYNCS_AT_ONCE = 2

/** What is filled. The callback may give its directories to a worker's user; sealing takes them back. */
export class Draft {
  /** Of the generation that this becomes. */
  readonly number: number
  /** Where the generation will lie: what the image says of where its page files are. */
  readonly finalDirectory: string
  readonly #inherited = new Map<string, StoredFile>()
  readonly #mapped = new Map<string, MappedFile>()
  readonly #options: DraftOptions

  private constructor(
    /** Where it is filled; renamed in the end, so nothing in the image may name it. */
    readonly directory: string,
    options: DraftOptions,
  ) {
    this.number = options.number
    this.finalDirectory = options.finalDirectory
    this.#options = options
  }

  static async begin(directory: string, options: DraftOptions): Promise<Draft> {
    mkdirSync(directory, { mode: 0o700 })
    for (const name of [IMAGE_DIRECTORY, KEPT_DIRECTORY, LEASE_DIRECTORY, SCRATCH_DIRECTORY]) {
      mkdirSync(join(directory, name), { mode: 0o700 })
    }
    if (!options.durable) closeSync(openSync(join(directory, EPHEMERAL_MARK), 'wx', 0o400))
    return new Draft(directory, options)
  }

  /** On the same file system, for the raw dump that prepare reads; removed before the generation is sealed. */
  get scratchDirectory(): string {
    return join(this.directory, SCRATCH_DIRECTORY)
  }

  /** Where the image goes that forks are made of. */
  get imageDirectory(): string {
    return join(this.directory, IMAGE_DIRECTORY)
  }

  /**
   * Keeps the files that the image maps or has open for reading; call it once. What `parent` has kept is linked again. Gives
   * what became of each.
   */
  async keepFiles(files: readonly FileToKeep[], parent?: Generation): Promise<readonly MappedFile[]> {
    const kept = await keepFiles(this.directory, files, {
      maxCopyBytes: this.#options.maxCopyBytes,
      earlierCopies: parent ? [] : await this.#options.earlierCopies(),
      fromParent: parent?.keptCopies ?? [],
    })
    for (const entry of kept) this.#mapped.set(entry.path, entry)
    return this.mappedFiles
  }

  get mappedFiles(): readonly MappedFile[] {
    return [...this.#mapped.values()]
  }

  /**
   * Links a page file of another generation in, under its own name, with its runs and checksum: a refork whose image still
   * maps the memory of its parent. Throws GENERATION_CORRUPT where the other one has no such file.
   */
  async inheritPageFile(from: Generation, name: string): Promise<void> {
    const stored = from.manifest.files[name]
    if (stored?.runs === undefined) {
      throw new WarmforkError('GENERATION_CORRUPT', {
        tried: `take the page file ${name} from generation ${from.number}`,
        happened: 'there is none of that name',
      })
    }
    for (const file of [name, stored.runs]) {
      const path = join(from.directory, file)
      await changingLinks([path], () => link(path, join(this.directory, file)))
      this.#inherited.set(file, from.manifest.files[file]!)
    }
  }

  /**
   * Makes everything read-only and ours; of a durable one it takes the checksums and syncs. With `group`, its members may
   * enter directories and read files whose names they know.
   */
  async seal(pageFiles: readonly NewPageFile[], group: number | undefined): Promise<Sealed> {
    rmSync(this.scratchDirectory, { recursive: true, force: true })
    const fresh = new Map(pageFiles.map((pageFile) => [pageFile.name, pageFile]))
    for (const { name, runs } of pageFiles) {
      writeFileSync(join(this.directory, runsFile(name)), encodeRuns(runs), { flag: 'wx', mode: 0o600 })
    }
    const keptAs = new Map(this.mappedFiles.map((entry) => [entry.keptAs, entry]))
    const found = await walk(this.directory)
    // A kept file that is a link or a copy shared with others has the owner and mode of its original: leave it alone.
    const own = found.files.filter((name) => name !== EPHEMERAL_MARK && !keptAs.has(name))
    for (const name of own) this.#give(name, group, group === undefined ? 0o400 : 0o440)
    for (const { name } of pageFiles) {
      if (own.includes(name)) continue
      throw new WarmforkError('BAD_OPTION', {
        tried: 'make a generation',
        happened: `there is no page file ${name} in it`,
      })
    }
    const files: Record<string, StoredFile> = {}
    const sizes = { apparentBytes: 0, allocatedBytes: 0 }
    const queue = new PQueue({ concurrency: SYNCS_AT_ONCE })
    const measure = async (name: string): Promise<void> => {
      const kept = keptAs.get(name)
      if (kept?.kept === 'link') return
      const path = join(this.directory, name)
      // Synced before it is measured: ext4 allocates late.
      if (this.#options.durable) await sync(path)
      const stats = lstatSync(path)
      const pageFile = fresh.get(name)
      const runs = pageFile?.runs
      sizes.apparentBytes += stats.size
      const data = runs ? runs.reduce((sum, [, length]) => sum + length, 0) : stats.size
      const written = this.#options.durable || this.#inherited.has(name)
      sizes.allocatedBytes += written ? stats.blocks * 512 : Math.ceil(data / 4096) * 4096
      if (!kept || kept.kept === 'copy') files[name] = await this.#stored(name, stats.size, pageFile)
    }
    const measured = found.files.filter((name) => name !== EPHEMERAL_MARK)
    if (this.#options.durable) await queue.addAll(measured.map((name) => () => measure(name)))
    else for (const name of measured) await measure(name)
    for (const name of found.directories) {
      this.#give(name, group, group === undefined || name === LEASE_DIRECTORY ? 0o700 : 0o710)
      if (this.#options.durable) await sync(join(this.directory, name))
    }
    return { files, sizes }
  }

  #give(name: string, group: number | undefined, mode: number): void {
    const path = join(this.directory, name)
    const uid = process.geteuid?.() ?? 0
    const gid = group ?? process.getegid?.() ?? 0
    const stats = lstatSync(path)
    if (stats.uid !== uid || stats.gid !== gid) chownSync(path, uid, gid)
    if ((stats.mode & 0o7777) !== mode) chmodSync(path, mode)
  }

  async #stored(name: string, bytes: number, pageFile: NewPageFile | undefined): Promise<StoredFile> {
    const inherited = this.#inherited.get(name)
    const { durable } = this.#options
    // What an ephemeral generation left without a checksum gets one when it is to last.
    if (inherited && (!durable || inherited.sha256 !== undefined)) return inherited
    const path = join(this.directory, name)
    if (pageFile) {
      const { runs, sha256 } = pageFile
      const { mtimeNs, ino } = lstatSync(path, { bigint: true })
      return {
        bytes,
        runs: runsFile(name),
        mtimeNs: String(mtimeNs),
        inode: String(ino),
        ...(durable ? { sha256: sha256 ?? (await runsChecksum(path, runs)) } : {}),
      }
    }
    if (inherited?.runs !== undefined) {
      const known = decodeRuns(readFileSync(join(this.directory, inherited.runs)))
      return { ...inherited, sha256: await runsChecksum(path, known) }
    }
    return durable ? fileChecksum(path) : { bytes }
  }
}

/** A page file that was written into a draft. */
export interface NewPageFile {
  readonly name: string
  readonly runs: readonly Run[]
  /** Over its runs, where the filler knows it: reading all of it again takes 0.6 s for a gibibyte. */
  readonly sha256?: string
}

export interface Sealed {
  readonly files: Record<string, StoredFile>
  readonly sizes: { apparentBytes: number; allocatedBytes: number }
}

function runsFile(pageFile: string): string {
  return `${pageFile}.runs`
}

/** All files and directories below one, as relative paths, the deepest first; anything else is refused. */
export async function walk(directory: string): Promise<{ files: string[]; directories: string[] }> {
  const files: string[] = []
  const directories: string[] = []
  const visit = async (prefix: string): Promise<void> => {
    for (const entry of await readdir(join(directory, prefix), { withFileTypes: true })) {
      const name = prefix === '' ? entry.name : `${prefix}/${entry.name}`
      if (entry.isDirectory()) {
        await visit(name)
        directories.push(name)
      } else if (entry.isFile()) files.push(name)
      else {
        throw new WarmforkError('IMAGE_UNSUPPORTED', {
          tried: `read the directory of a generation, ${directory}`,
          happened: `${name} is neither a file nor a directory`,
        })
      }
    }
  }
  await visit('')
  return { files: files.sort(), directories }
}
