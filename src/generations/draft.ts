/**
 * A generation in the making: a temporary directory that a callback fills, and that is then sealed: owned by us, read-only,
 * its checksums taken, all of it on the disk. It knows no numbers and no other generation but those it is handed.
 */
import { chmod, chown, link, lstat, mkdir, readdir, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { WarmforkError } from '../errors.js'
import { encodeRuns, fileChecksum, type Run, runsChecksum } from './checksum.js'
import { sync } from './directories.js'
import type { Generation } from './generation.js'
import { type EarlierCopy, type FileToKeep, KEPT_DIRECTORY, keepFiles } from './kept-files.js'
import { LEASE_DIRECTORY } from './lease.js'
import type { MappedFile, StoredFile } from './manifest.js'

export const IMAGE_DIRECTORY = 'image'
const SCRATCH_DIRECTORY = 'scratch'

export interface DraftOptions {
  readonly number: number
  readonly finalDirectory: string
  readonly maxCopyBytes: number
  readonly earlierCopies: () => Promise<EarlierCopy[]>
}

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
    await mkdir(directory, { mode: 0o700 })
    for (const name of [IMAGE_DIRECTORY, KEPT_DIRECTORY, LEASE_DIRECTORY, SCRATCH_DIRECTORY]) {
      await mkdir(join(directory, name), { mode: 0o700 })
    }
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

  /** Keeps the files that the image maps or has open for reading; call it once. Gives what became of each. */
  async keepFiles(files: readonly FileToKeep[]): Promise<readonly MappedFile[]> {
    const options = { maxCopyBytes: this.#options.maxCopyBytes, earlierCopies: await this.#options.earlierCopies() }
    for (const entry of await keepFiles(this.directory, files, options)) this.#mapped.set(entry.path, entry)
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
      await link(join(from.directory, file), join(this.directory, file))
      this.#inherited.set(file, from.manifest.files[file]!)
    }
  }

  /**
   * Makes everything read-only and ours, takes the checksums and syncs. With `group`, its members may enter directories
   * and read files whose names they know.
   */
  async seal(pageFiles: readonly { name: string; runs: readonly Run[] }[], group: number | undefined): Promise<Sealed> {
    await rm(this.scratchDirectory, { recursive: true, force: true })
    const runsOf = new Map<string, readonly Run[]>()
    for (const { name, runs } of pageFiles) {
      await writeFile(join(this.directory, runsFile(name)), encodeRuns(runs), { flag: 'wx', mode: 0o600 })
      runsOf.set(name, runs)
    }
    const keptAs = new Map(this.mappedFiles.map((entry) => [entry.keptAs, entry]))
    const uid = process.geteuid?.() ?? 0
    const gid = group ?? process.getegid?.() ?? 0
    const files: Record<string, StoredFile> = {}
    let apparentBytes = 0
    let allocatedBytes = 0
    const found = await walk(this.directory)
    for (const name of found.files) {
      const path = join(this.directory, name)
      const kept = keptAs.get(name)
      // A kept file that is a link or a copy shared with others has the owner and mode of its original: leave it alone.
      if (!kept) {
        const stats = await lstat(path)
        if (stats.uid !== uid || stats.gid !== gid) await chown(path, uid, gid)
        const mode = group === undefined ? 0o400 : 0o440
        if ((stats.mode & 0o7777) !== mode) await chmod(path, mode)
      }
      // Synced before it is measured: ext4 allocates late.
      if (kept?.kept !== 'link') await sync(path)
      const stats = await lstat(path)
      if (kept?.kept !== 'link') {
        apparentBytes += stats.size
        allocatedBytes += stats.blocks * 512
      }
      const inherited = this.#inherited.get(name)
      const runs = runsOf.get(name)
      if (inherited) files[name] = inherited
      else if (runs) files[name] = { bytes: stats.size, sha256: await runsChecksum(path, runs), runs: runsFile(name) }
      else if (!kept || kept.kept === 'copy') files[name] = await fileChecksum(path)
    }
    for (const { name } of pageFiles) {
      if (files[name]) continue
      throw new WarmforkError('BAD_OPTION', {
        tried: 'make a generation',
        happened: `there is no page file ${name} in it`,
      })
    }
    for (const name of found.directories) {
      const path = join(this.directory, name)
      await chown(path, uid, gid)
      await chmod(path, group === undefined || name === LEASE_DIRECTORY ? 0o700 : 0o710)
      await sync(path)
    }
    return { files, sizes: { apparentBytes, allocatedBytes } }
  }
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
