/**
 * One generation that lies in the store: what it holds, whether it is whole, whether it fits, and who needs it. It never
 * changes a file of the generation but its leases, and knows nothing of what the images mean.
 */
import { type BigIntStats, existsSync, lstatSync, readFileSync } from 'node:fs'
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import type { GenerationInfo } from '../engines/engine.js'
import { errnoOf, WarmforkError } from '../errors.js'
import { checksumNow, decodeRuns, fileChecksum, hasStrayData, type Run, runsChecksum } from './checksum.js'
import { EPHEMERAL_MARK, IMAGE_DIRECTORY, walk } from './draft.js'
import { currentPath, type EarlierCopy } from './kept-files.js'
import { type Holder, LEASE_DIRECTORY, Lease, ourselves, surveyLeases } from './lease.js'
import { isOurs } from './links.js'
import { MANIFEST_FILE, type Manifest, readManifest, type StoredFile } from './manifest.js'
import { differences, type Surroundings } from './surroundings.js'

/** What is compared at each fork to see that nobody touched a file since this process opened or made the generation. */
interface Trace {
  readonly path: string
  readonly name: string
  readonly size: bigint
  readonly mtimeNs: bigint
  readonly ino: bigint
  ctimeNs: bigint
  nlink: bigint
}

export interface OpenOptions {
  /** The store's own directory, to tell a removed store from a removed generation. */
  readonly storeDirectory: string
  /** Whether the caller is the store's only supervisor; see `surveyLeases`. */
  readonly trustPids: boolean
  /** Those that this process holds: the store lets them go when it is closed. */
  readonly held: Set<Generation>
}

/** A millisecond apart. */
const LEASE_ATTEMPTS = 4

export class Generation {
  readonly number: number
  readonly imageDirectory: string
  readonly #traces: Trace[]
  readonly #options: OpenOptions
  #hold: Lease | undefined

  private constructor(
    readonly directory: string,
    readonly manifest: Manifest,
    traces: Trace[],
    options: OpenOptions,
  ) {
    this.number = manifest.number
    this.imageDirectory = join(directory, IMAGE_DIRECTORY)
    this.#traces = traces
    this.#options = options
  }

  /**
   * Reads the manifest and looks at each file, without reading it: one that is missing or has another size is found here,
   * another content by `verify`. Throws GENERATION_CORRUPT, GENERATION_MISFIT (a newer format).
   */
  static async open(directory: string, number: number, options: OpenOptions): Promise<Generation> {
    const manifest = await readManifest(directory, number)
    const traces: Trace[] = []
    for (const [name, stored] of Object.entries(manifest.files)) {
      const path = join(directory, name)
      const stats = lstatSync(path, { bigint: true, throwIfNoEntry: false })
      if (!stats) throw corrupt(number, `its file ${name} is missing`)
      if (!stats.isFile()) throw corrupt(number, `its file ${name} is not a regular file`)
      if (Number(stats.size) !== stored.bytes) {
        throw corrupt(number, `its file ${name} has ${stats.size} bytes and had ${stored.bytes}`)
      }
      traces.push(trace(name, path, stats))
    }
    return new Generation(directory, manifest, traces, options)
  }

  get createdAt(): Date {
    return new Date(this.manifest.createdAt)
  }

  /** What a supervisor needs to know of it. */
  get info(): GenerationInfo {
    const { number, createdAt, manifest } = this
    const { parent, reforks = 0, reason, rssBytes, memory, warnings, sizes, times } = manifest
    const { checkpointMs } = times
    const about = { number, createdAt, parent, reforks, ...(reason === undefined ? {} : { reason }) }
    return { ...about, rssBytes, sizeBytes: sizes.allocatedBytes, memory, warnings, checkpointMs }
  }

  /** Whether it lives as long as the supervisor that made it: it is neither on the disk for sure nor has checksums of its own. */
  get ephemeral(): boolean {
    return this.manifest.ephemeral === true
  }

  /** Names of its page files, relative to its directory. */
  get pageFiles(): string[] {
    return Object.keys(this.manifest.files).filter((name) => this.manifest.files[name]!.runs !== undefined)
  }

  /** What it has kept of the files that it maps, with where each copy lies. */
  get keptCopies(): EarlierCopy[] {
    return this.manifest.mappedFiles.flatMap((entry) =>
      entry.keptAs === undefined ? [] : { entry, path: join(this.directory, entry.keptAs) },
    )
  }

  /** The stretches of a page file that hold data. Throws GENERATION_CORRUPT where there is no such page file. */
  async runs(pageFile: string): Promise<Run[]> {
    const name = this.manifest.files[pageFile]?.runs
    if (name === undefined) throw corrupt(this.number, `it has no page file ${pageFile}`)
    try {
      return decodeRuns(await readFile(join(this.directory, name)))
    } catch (cause) {
      throw corrupt(this.number, `its file ${name} cannot be read`, cause)
    }
  }

  /** Reads everything and compares it with the checksums, where there are any. Throws GENERATION_CORRUPT, naming the file. */
  async verify(signal?: AbortSignal): Promise<void> {
    await readManifest(this.directory, this.number)
    const { files, mappedFiles } = this.manifest
    const known = new Set([
      MANIFEST_FILE,
      ...(this.ephemeral ? [EPHEMERAL_MARK] : []),
      ...Object.keys(files),
      ...mappedFiles.map((entry) => entry.keptAs),
    ])
    const found = await walk(this.directory).catch((cause: unknown) => {
      throw corrupt(this.number, 'its directory does not hold what it should', cause)
    })
    for (const name of found.files) {
      if (!known.has(name) && !name.startsWith(`${LEASE_DIRECTORY}/`)) {
        throw corrupt(this.number, `there is a file in it that does not belong there, ${name}`)
      }
    }
    for (const [name, stored] of Object.entries(files)) await this.#verifyFile(name, stored, signal)
  }

  /**
   * Compares the checksums of what is small. A page file that has the inode and the time of its last change that it was sealed with
   * is believed to hold what it held: to read 500 MiB takes 0.3 s. Throws GENERATION_CORRUPT, naming the file.
   */
  async verifyQuickly(): Promise<void> {
    for (const [name, stored] of Object.entries(this.manifest.files)) {
      const { runs, mtimeNs, inode } = stored
      if (runs !== undefined && mtimeNs !== undefined && inode !== undefined) {
        const now = lstatSync(join(this.directory, name), { bigint: true, throwIfNoEntry: false })
        const isSame = now && String(now.ino) === inode && String(now.mtimeNs) === mtimeNs
        if (isSame && Number(now.size) === stored.bytes) continue
      }
      await this.#verifyFile(name, stored)
    }
  }

  async #verifyFile(name: string, stored: StoredFile, signal?: AbortSignal): Promise<void> {
    const path = join(this.directory, name)
    try {
      const bytes = lstatSync(path).size
      if (bytes !== stored.bytes)
        throw corrupt(this.number, `its file ${name} has ${bytes} bytes and had ${stored.bytes}`)
      const runs = stored.runs === undefined ? undefined : await this.runs(name)
      if (stored.sha256 === undefined) return
      const sha256 = runs ? await runsChecksum(path, runs, signal) : (await fileChecksum(path, signal)).sha256
      if (sha256 !== stored.sha256 || (runs && hasStrayData(path, runs))) {
        throw corrupt(this.number, `its file ${name} has another content than it was made with`)
      }
    } catch (cause) {
      signal?.throwIfAborted()
      if (cause instanceof WarmforkError) throw cause
      throw corrupt(this.number, `its file ${name} cannot be read to its end`, cause)
    }
  }

  /**
   * Sees that no file was touched since this process opened or made the generation: for every fork, 2 µs a file. Throws
   * GENERATION_CORRUPT; GENERATION_NOT_FOUND where it was removed as a whole, STORE_GONE where the store was.
   */
  checkUntouched(): void {
    for (const seen of this.#traces) {
      const now = lstatSync(seen.path, { bigint: true, throwIfNoEntry: false })
      if (!now) throw this.#missing(`its file ${seen.name} is missing`)
      if (now.size !== seen.size || now.mtimeNs !== seen.mtimeNs || now.ino !== seen.ino) {
        throw corrupt(this.number, `its file ${seen.name} was changed since it was made`)
      }
      if (now.ctimeNs === seen.ctimeNs) continue
      // A new or a removed link changes this time too: a refork links page files, and a prune unlinks them. Where neither we
      // know of it nor the number of links tells (a refork that failed elsewhere, a chmod), the content must: 0.3 s for
      // 500 MiB, once.
      if (!isOurs(seen.ctimeNs, now) && now.nlink === seen.nlink && !this.#sameContent(seen)) {
        throw corrupt(this.number, `its file ${seen.name} was changed since it was made`)
      }
      seen.ctimeNs = now.ctimeNs
      seen.nlink = now.nlink
    }
  }

  /**
   * Refuses a generation that was made in other surroundings, or whose mapped files are neither where they were nor kept.
   * Throws GENERATION_MISFIT with each reason.
   */
  checkFit(current: Surroundings): void {
    const reasons = this.misfits(current)
    if (reasons.length > 0) throw this.#misfit(reasons)
  }

  /** Why it cannot be used in these surroundings, each reason as a phrase; empty where it can. */
  misfits(current: Surroundings): string[] {
    const reasons = differences(this.manifest.surroundings, current)
    for (const entry of this.manifest.mappedFiles) {
      if (currentPath(this.directory, entry) === undefined) reasons.push(lostFile(entry))
    }
    return reasons
  }

  /** Where a file that the image names is to be taken from now; undefined where it changed and was not kept. */
  currentPath(path: string): string | undefined {
    const entry = this.manifest.mappedFiles.find((candidate) => candidate.path === path)
    return entry ? currentPath(this.directory, entry) : path
  }

  /**
   * The files that are not what they were, each with the kept one that takes its place: empty while nothing was upgraded.
   * For every fork, 2 µs a file. Throws GENERATION_MISFIT where one changed and was not kept.
   */
  replacedFiles(): Map<string, string> {
    const replaced = new Map<string, string>()
    for (const entry of this.manifest.mappedFiles) {
      const now = currentPath(this.directory, entry)
      if (now === undefined) throw this.#misfit([lostFile(entry)])
      if (now !== entry.path) replaced.set(entry.path, now)
    }
    return replaced
  }

  /** Says that a process needs this generation, until it ends or gives the lease back. Throws GENERATION_NOT_FOUND, STORE_GONE. */
  lease(pid: number, startTicks: number): Lease {
    for (let attempt = 1; ; attempt++) {
      try {
        return Lease.take(this.directory, { pid, startTicks })
      } catch (error) {
        if (errnoOf(error) !== 'ENOENT') throw error
        if (attempt === LEASE_ATTEMPTS) throw this.#missing('its directory of leases is missing')
        // A prune in another process puts back, within microseconds, a generation that it finds to be needed.
        Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 1)
      }
    }
  }

  /** Takes a lease for this process, until `letGo` or the end of the store's use. Throws as `lease` does; twice does no harm. */
  hold(): void {
    const { pid, startTicks } = ourselves()
    this.#hold ??= this.lease(pid, startTicks)
    this.#options.held.add(this)
  }

  /** Gives this process's lease back. */
  letGo(): void {
    this.#hold?.release()
    this.#hold = undefined
    this.#options.held.delete(this)
  }

  /** The living processes that need it. */
  leases(): readonly Holder[] {
    return surveyLeases(this.directory, this.#options.trustPids).holders
  }

  #sameContent({ name, path }: Trace): boolean {
    const { runs, sha256 } = this.manifest.files[name]!
    // One without lives no longer than we do; size and time of its last change are as they were.
    if (sha256 === undefined) return true
    const runsPath = runs === undefined ? undefined : join(this.directory, runs)
    if (runsPath !== undefined && hasStrayData(path, decodeRuns(readFileSync(runsPath)))) return false
    return checksumNow(path, runsPath) === sha256
  }

  #missing(what: string): WarmforkError {
    const tried = `use generation ${this.number}`
    if (!existsSync(this.#options.storeDirectory)) {
      return new WarmforkError('STORE_GONE', { tried, happened: `${this.#options.storeDirectory} is gone` })
    }
    if (!existsSync(this.directory)) {
      return new WarmforkError('GENERATION_NOT_FOUND', { tried, happened: `${this.directory} is gone` })
    }
    return corrupt(this.number, what)
  }

  #misfit(reasons: readonly string[]): WarmforkError {
    return new WarmforkError('GENERATION_MISFIT', {
      tried: `use generation ${this.number}`,
      happened: reasons.join('; '),
    })
  }
}

function trace(name: string, path: string, stats: BigIntStats): Trace {
  const { size, mtimeNs, ino, ctimeNs, nlink } = stats
  return { path, name, size, mtimeNs, ino, ctimeNs, nlink }
}

function corrupt(number: number, happened: string, cause?: unknown): WarmforkError {
  return new WarmforkError('GENERATION_CORRUPT', { tried: `use generation ${number}`, happened, cause })
}

function lostFile(entry: { path: string; reason?: string | undefined }): string {
  const why = entry.reason === undefined ? 'the kept one is not what it was either' : `none was kept: ${entry.reason}`
  return `the file ${entry.path} is not the one it maps any more (${why})`
}
