/**
 * The store: one directory for each supervisor's name, and in it the generations, immutable and numbered. It makes them,
 * finds them and removes them; it knows nothing of what images mean, of restores or of pools.
 *
 *     <root>/<name>/lock                      held by the one supervisor of that name
 *     <root>/<name>/next                      the number that the next generation gets: numbers are never used again
 *     <root>/<name>/generations/<number>/     manifest.json, image/, page files, files/ (kept ones), leases/
 *     <root>/<name>/generations/.tmp-…        one in the making; .dead-… one being removed
 */
import { randomBytes } from 'node:crypto'
import { constants, type Dirent, existsSync, lstatSync, readFileSync, renameSync } from 'node:fs'
import { chmod, chown, type FileHandle, open, readdir, readFile, rename, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { errnoOf, WarmforkError } from '../errors.js'
import { tryLock } from '../linux/libc.js'
import { isAlive, stat } from '../linux/proc.js'
import { checkExec, checkName, checkSafe, defaultRoot, ensureDirectory, storeError, sync } from './directories.js'
import { Draft, EPHEMERAL_MARK, type NewPageFile, walk } from './draft.js'
import { Generation } from './generation.js'
import type { EarlierCopy } from './kept-files.js'
import { plantLease, removeDead, surveyLeases } from './lease.js'
import { changingLinks } from './links.js'
import { encodeManifest, FORMAT_VERSION, type Json, MANIFEST_FILE, type Manifest } from './manifest.js'
import type { Surroundings } from './surroundings.js'

export interface StoreOptions {
  /**
   * Where the stores of all names are.
   * @default WARMFORK_STORE, else /var/lib/warmfork for root, else ${XDG_STATE_HOME:-~/.local/state}/warmfork
   */
  root?: string
  /** Of the supervisor: a directory's name. */
  name: string
  /** `exclusive`: the one supervisor of that name. `read`: anybody else; such a store can prune, but make nothing. */
  access: 'exclusive' | 'read'
  /** Id of a group whose members (workers with a user of their own) may enter the directories, not list them, and read files by name. */
  group?: number
  /**
   * How much each generation may copy of the files it maps, where neither reflinks nor hard links work.
   * @default 536870912
   */
  keepCopyMaxBytes?: number
}

/** What the caller of `create` knows before the generation is filled. */
export interface NewGeneration {
  /** The generation whose child it is taken of; null for one of a template. */
  parent: number | null
  surroundings: Surroundings
  /** How many checkpoints of forks lie between it and the template. @default 0 */
  reforks?: number
  /** Why it is made, for people. */
  reason?: string | undefined
  /**
   * Whether it is to survive a power cut and its supervisor. One that is not is neither synced nor has checksums, which takes
   * most of the time that making one takes; later supervisors do not use it and remove it.
   * @default true
   */
  durable?: boolean
}

/** What only the filler knows. */
export interface Filled {
  memory: 'cow' | 'copy'
  /** The page files that the filler wrote, by name relative to the draft, with the stretches that hold data. */
  pageFiles: readonly NewPageFile[]
  warnings: readonly string[]
  /** Of the source, at the checkpoint. */
  rssBytes: number
  processes: readonly { pid: number; threads: number; comm: string }[]
  /** What prepare changed, for `warmfork inspect`. */
  edits: Json
  /** What the engine must know again at each fork. */
  engineData: Json
  checkpointMs: number
  prepareMs: number
}

export interface PruneOptions {
  /** The newest that stay, whatever else is said. */
  keep?: number
  /** Only those that are older. */
  olderThanMs?: number
  /** Exactly these; the other two do not count then. */
  numbers?: readonly number[]
}

export interface Pruned {
  removed: number[]
  /** Those that were to go and had to stay, and why. */
  kept: { number: number; reason: string }[]
}

/** A generation that cannot be used. */
export interface BrokenGeneration {
  number: number
  directory: string
  error: WarmforkError
}

const NUMBER = /^[1-9]\d{0,14}$/
const TEMPORARY = /^\.tmp-(\d+)-(\d+)-[0-9a-f]+$/
const DEAD = /^\.dead-([1-9]\d{0,14})-(\d+)-(\d+)-[0-9a-f]+$/
const DEFAULT_KEEP_COPY_BYTES = 512 * 1024 * 1024

export class Store {
  readonly directory: string
  readonly name: string
  readonly #generations: string
  readonly #group: number | undefined
  readonly #keepCopyMaxBytes: number
  /** Undefined for a store that is only read. */
  #lock: FileHandle | undefined
  /** Of the directory that was opened: a store that was removed and made again by somebody is not ours. */
  readonly #inode: number | undefined
  readonly #held = new Set<Generation>()
  /** Ephemeral generations of earlier supervisors. */
  readonly #strange = new Set<number>()
  #closed = false
  readonly #creating = new Set<Promise<unknown>>()
  #reserving: Promise<unknown> = Promise.resolve()

  private constructor(
    directory: string,
    options: StoreOptions,
    inode: number | undefined,
    lock: FileHandle | undefined,
  ) {
    this.directory = directory
    this.name = options.name
    this.#generations = join(directory, 'generations')
    this.#group = options.group
    this.#keepCopyMaxBytes = options.keepCopyMaxBytes ?? DEFAULT_KEEP_COPY_BYTES
    this.#inode = inode
    this.#lock = lock
  }

  /**
   * Opens a supervisor's store. `exclusive` makes it where it is missing, locks it and sweeps what a crash has left; `read` finds
   * nothing in one that is missing. Throws BAD_OPTION, STORE_LOCKED, STORE_UNSAFE, STORE_NOEXEC, STORE_UNWRITABLE.
   */
  static async open(options: StoreOptions): Promise<Store> {
    checkName(options.name)
    const root = options.root ?? defaultRoot()
    const directory = join(root, options.name)
    if (options.access === 'read') {
      try {
        if (!lstatSync(directory, { throwIfNoEntry: false })) return new Store(directory, options, undefined, undefined)
        checkSafe(root)
        return new Store(directory, options, checkSafe(directory).ino, undefined)
      } catch (error) {
        throw storeError(error, `open the store at ${directory}`)
      }
    }
    const { group } = options
    // The root serves names with different groups: anybody may enter it, and only the name's directory asks who.
    ensureDirectory(root, group === undefined ? 0o700 : 0o711)
    const { ino } = ensureDirectory(directory, group === undefined ? 0o700 : 0o710, group)
    const lock = await takeLock(directory).catch((error: unknown) => {
      throw storeError(error, `lock the store at ${directory}`)
    })
    const store = new Store(directory, options, ino, lock)
    try {
      ensureDirectory(store.#generations, group === undefined ? 0o700 : 0o710, group)
      checkExec(store.#generations)
      await store.#sweep()
      await store.#leaveEphemeral()
      return store
    } catch (error) {
      await store.close()
      throw storeError(error, `open the store at ${directory}`)
    }
  }

  /** The names that have a store below the root, in order. */
  static async names(root: string = defaultRoot()): Promise<string[]> {
    const entries = await readdir(root, { withFileTypes: true }).catch(() => [])
    return entries.flatMap((entry) => (entry.isDirectory() && /^[A-Za-z0-9]/.test(entry.name) ? entry.name : [])).sort()
  }

  /**
   * Makes a generation: `fill` fills a temporary directory, which is then sealed, synced and renamed to its number. Whatever fails
   * leaves nothing of it. This process holds the new one until it calls `letGo`, or else a prune could take it away at once. Throws what `fill` throws; DISK_FULL, STORE_UNWRITABLE, STORE_GONE, STOPPED.
   */
  async create(meta: NewGeneration, fill: (draft: Draft) => Promise<Filled>): Promise<Generation> {
    const tried = `make a generation in ${this.directory}`
    if (this.#closed) throw new WarmforkError('STOPPED', { tried, happened: 'the store is closed' })
    if (!this.#lock) throw new WarmforkError('BAD_OPTION', { tried, happened: 'the store is open for reading only' })
    const creating = this.#create(meta, fill).catch((error: unknown) => {
      this.#checkThere(tried, error)
      throw storeError(error, tried)
    })
    const settled = creating.then(
      () => undefined,
      () => undefined,
    )
    this.#creating.add(settled)
    void settled.then(() => this.#creating.delete(settled))
    return creating
  }

  async #create(meta: NewGeneration, fill: (draft: Draft) => Promise<Filled>): Promise<Generation> {
    this.#checkThere(`make a generation in ${this.directory}`)
    const durable = meta.durable ?? true
    const number = await this.#reserveNumber(durable)
    const directory = this.#path(number)
    const temporary = join(this.#generations, `.tmp-${ownMark()}`)
    let made = temporary
    try {
      const draft = await Draft.begin(temporary, {
        number,
        finalDirectory: directory,
        durable,
        maxCopyBytes: this.#keepCopyMaxBytes,
        earlierCopies: () => this.#earlierCopies(),
      })
      const filled = await fill(draft)
      const before = performance.now()
      const sealed = await draft.seal(filled.pageFiles, this.#group)
      const { checkpointMs, prepareMs, pageFiles: _, ...known } = filled
      const manifest: Manifest = {
        formatVersion: FORMAT_VERSION,
        number,
        parent: meta.parent,
        ...(meta.reforks ? { reforks: meta.reforks } : {}),
        ...(meta.reason === undefined ? {} : { reason: meta.reason }),
        name: this.name,
        ...(durable ? {} : { ephemeral: true }),
        createdAt: new Date().toISOString(),
        warmforkVersion: warmforkVersion(),
        surroundings: {
          ...meta.surroundings,
          command: [...meta.surroundings.command],
          declaredEnv: { ...meta.surroundings.declaredEnv },
        },
        ...known,
        warnings: [...filled.warnings],
        processes: [...filled.processes],
        mappedFiles: [...draft.mappedFiles],
        files: sealed.files,
        sizes: sealed.sizes,
        times: { checkpointMs, prepareMs, syncMs: Math.round(performance.now() - before) },
      }
      const path = join(temporary, MANIFEST_FILE)
      await writeFile(path, encodeManifest(manifest), { flag: 'wx', mode: 0o400 })
      await this.#give(path, 0o440)
      if (durable) await sync(path)
      await this.#give(temporary, 0o710)
      if (durable) await sync(temporary)
      // Before anybody can see it, so that no prune comes in between.
      plantLease(temporary)
      await rename(temporary, directory)
      made = directory
      if (durable) await sync(this.#generations)
      const generation = await this.#open(number)
      generation.hold()
      return generation
    } catch (error) {
      await removeTree(made).catch(() => undefined)
      throw error
    }
  }

  /** Lets the workers' group in, where there is one. */
  async #give(path: string, mode: number): Promise<void> {
    if (this.#group === undefined) return
    await chown(path, process.geteuid?.() ?? 0, this.#group)
    await chmod(path, mode)
  }

  /** Those that can be used, the oldest first; `survey` names the others too. */
  async list(): Promise<Generation[]> {
    return (await this.survey()).generations
  }

  /** All generations, the oldest first, and those that cannot be used with the reason. */
  async survey(): Promise<{ generations: Generation[]; broken: BrokenGeneration[] }> {
    const generations: Generation[] = []
    const broken: BrokenGeneration[] = []
    for (const number of await this.#numbers()) {
      if (this.#strange.has(number)) continue
      try {
        generations.push(await this.#open(number))
      } catch (error) {
        if (!(error instanceof WarmforkError)) throw storeError(error, `read generation ${number}`)
        // Somebody pruned it since it was listed.
        if (!existsSync(this.#path(number))) continue
        broken.push({ number, directory: this.#path(number), error })
      }
    }
    return { generations, broken }
  }

  /** Throws GENERATION_NOT_FOUND, GENERATION_CORRUPT, GENERATION_MISFIT (a newer format), STORE_GONE. */
  async get(number: number): Promise<Generation> {
    const tried = `use generation ${number}`
    this.#checkThere(tried)
    if (!existsSync(this.#path(number))) throw notFound(tried, this.directory, number)
    if (this.#strange.has(number)) {
      throw new WarmforkError('GENERATION_MISFIT', {
        tried,
        happened: 'it was made for the time of an earlier supervisor',
      })
    }
    return this.#open(number)
  }

  /** The newest that can be used by a supervisor that starts: an ephemeral one is for those who made it. */
  async newest(): Promise<Generation | undefined> {
    return (await this.list()).filter(({ ephemeral }) => !ephemeral).at(-1)
  }

  /**
   * Removes generations that nobody needs. Ephemeral ones count for neither `keep` nor `olderThanMs`: they go as soon as nobody
   * needs them. With `keep` or `olderThanMs`, corrupt ones go too; with neither and no `numbers`, only
   * what is left of dead processes. Throws GENERATION_NOT_FOUND for a number that is not there.
   */
  async prune(options: PruneOptions): Promise<Pruned> {
    const tried = `prune the store at ${this.directory}`
    try {
      await this.#sweep()
      await this.#leaveEphemeral(this.#strange)
      const result: Pruned = { removed: [], kept: [] }
      for (const number of await this.#chosen(options, tried)) {
        const reason = await this.#remove(number)
        if (reason === undefined) result.removed.push(number)
        else result.kept.push({ number, reason })
      }
      return result
    } catch (error) {
      throw storeError(error, tried)
    }
  }

  /**
   * Waits for what is in the making, lets go what this process holds, removes what is ephemeral and not needed, and gives the
   * lock back. Twice does no harm.
   */
  async close(): Promise<void> {
    this.#closed = true
    await Promise.all(this.#creating)
    for (const generation of this.#held) generation.letGo()
    await this.#leaveEphemeral().catch(() => undefined)
    const lock = this.#lock
    this.#lock = undefined
    if (!lock) return
    await lock.truncate(0).catch(() => undefined)
    await lock.close()
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close()
  }

  async #chosen({ keep, olderThanMs, numbers }: PruneOptions, tried: string): Promise<number[]> {
    for (const [option, value] of Object.entries({ keep, olderThanMs })) {
      if (value === undefined || (value >= 0 && !Number.isNaN(value))) continue
      throw new WarmforkError('BAD_OPTION', { tried, happened: `expected \`${option}\` to be 0 or more, got ${value}` })
    }
    if (numbers) {
      for (const number of numbers) if (!existsSync(this.#path(number))) throw notFound(tried, this.directory, number)
      return [...new Set(numbers)].sort((a, b) => a - b)
    }
    if (keep === undefined && olderThanMs === undefined) return []
    const { generations, broken } = await this.survey()
    const now = Date.now()
    const durable = generations.filter(({ ephemeral }) => !ephemeral)
    const surplus = durable
      .slice(0, Math.max(0, durable.length - (keep ?? 0)))
      .filter((generation) => olderThanMs === undefined || now - generation.createdAt.getTime() > olderThanMs)
    // One of a newer format is somebody else's, and may be whole.
    const corrupt = broken.filter(({ error }) => error.code === 'GENERATION_CORRUPT')
    const unneeded = generations.filter(({ ephemeral, directory }) => ephemeral && this.#inUse(directory) === undefined)
    return [...surplus, ...unneeded, ...corrupt].map(({ number }) => number).sort((a, b) => a - b)
  }

  /** Removes one; gives the reason where it must stay. */
  async #remove(number: number): Promise<string | undefined> {
    const path = this.#path(number)
    const inUse = this.#inUse(path)
    if (inUse !== undefined) return inUse
    // Out of the way first, so that nobody can take a lease any more; then look again, for one that was taken meanwhile.
    // All at once, so that a lease that is wanted by this very process never falls in between.
    const dead = join(this.#generations, `.dead-${number}-${ownMark()}`)
    try {
      renameSync(path, dead)
    } catch (error) {
      if (errnoOf(error) === 'ENOENT') return undefined
      throw error
    }
    const taken = this.#inUse(dead)
    if (taken !== undefined) {
      renameSync(dead, path)
      return taken
    }
    await removeTree(dead)
    return undefined
  }

  #inUse(directory: string): string | undefined {
    const survey = surveyLeases(directory, this.#lock !== undefined)
    removeDead(survey)
    if (survey.holders.length === 0) return undefined
    const pids = survey.holders.map(({ pid }) => pid).sort((a, b) => a - b)
    return `in use by ${pids.length === 1 ? 'process' : 'processes'} ${pids.join(', ')}`
  }

  /**
   * Removes the ephemeral generations of earlier supervisors; all that are there at the start are such. One whose children
   * have outlived its supervisor stays as long as they live, and is not used. At the end the same of our own.
   */
  async #leaveEphemeral(numbers?: ReadonlySet<number>): Promise<void> {
    if (!this.#lock) return
    for (const number of numbers ?? (await this.#numbers())) {
      if (!existsSync(join(this.#path(number), EPHEMERAL_MARK))) this.#strange.delete(number)
      else if ((await this.#remove(number)) === undefined) this.#strange.delete(number)
      else this.#strange.add(number)
    }
  }

  /** Removes what makers and pruners that died have left behind; only the holder of the lock does. */
  async #sweep(): Promise<void> {
    if (!this.#lock) return
    for (const { name } of await this.#entries()) {
      const path = join(this.#generations, name)
      const temporary = TEMPORARY.exec(name)
      if (temporary && !isAlive(Number(temporary[1]), Number(temporary[2]))) await removeTree(path)
      const dead = DEAD.exec(name)
      if (!dead || isAlive(Number(dead[2]), Number(dead[3]))) continue
      const back = this.#path(Number(dead[1]))
      if (this.#inUse(path) !== undefined && !existsSync(back)) await rename(path, back)
      else await removeTree(path)
    }
  }

  async #entries(): Promise<Dirent[]> {
    try {
      return await readdir(this.#generations, { withFileTypes: true })
    } catch (error) {
      if (errnoOf(error) === 'ENOENT') this.#checkThere(`read the store at ${this.directory}`)
      if (errnoOf(error) === 'ENOENT') return []
      throw storeError(error, `read the store at ${this.directory}`)
    }
  }

  async #numbers(): Promise<number[]> {
    const numbers = (await this.#entries()).flatMap(({ name }) => (NUMBER.test(name) ? Number(name) : []))
    return numbers.sort((a, b) => a - b)
  }

  #path(number: number): string {
    return join(this.#generations, String(number))
  }

  #open(number: number): Promise<Generation> {
    const options = { storeDirectory: this.directory, trustPids: this.#lock !== undefined, held: this.#held }
    return Generation.open(this.#path(number), number, options)
  }

  /** A number that no generation ever had: kept on the disk before it is used, one caller after the other. */
  #reserveNumber(durable: boolean): Promise<number> {
    const reserved = this.#reserving.then(async () => {
      const path = join(this.directory, 'next')
      const text = await readFile(path, 'latin1').catch(() => '')
      let number = NUMBER.test(text.trim()) ? Number(text) : 1
      for (const { name } of await this.#entries()) {
        const taken = NUMBER.test(name) ? name : DEAD.exec(name)?.[1]
        if (taken !== undefined) number = Math.max(number, Number(taken) + 1)
      }
      const temporary = `${path}.new`
      try {
        await writeFile(temporary, `${number + 1}\n`, { mode: 0o600 })
        // A power cut leaves nothing of an ephemeral generation by which its number could be known again.
        if (durable) await sync(temporary)
        await rename(temporary, path)
      } catch (error) {
        await rm(temporary, { force: true }).catch(() => undefined)
        throw error
      }
      return number
    })
    this.#reserving = reserved.catch(() => undefined)
    return reserved
  }

  async #earlierCopies(): Promise<EarlierCopy[]> {
    return (await this.list()).flatMap(({ directory, manifest }) =>
      manifest.mappedFiles.flatMap((entry) =>
        entry.kept === 'copy' && entry.keptAs !== undefined ? { entry, path: join(directory, entry.keptAs) } : [],
      ),
    )
  }

  /** Throws STORE_GONE where the directory that was opened is not there any more. */
  #checkThere(tried: string, cause?: unknown): void {
    if (this.#inode === undefined) return
    const now = lstatSync(this.directory, { throwIfNoEntry: false })
    if (now?.ino === this.#inode && (!this.#lock || existsSync(this.#generations))) return
    throw new WarmforkError('STORE_GONE', {
      tried,
      happened: now ? `${this.directory} was removed and made again` : `${this.directory} is gone`,
      cause,
    })
  }
}

/** Takes the store's lock, or throws STORE_LOCKED with the pid of its holder. The kernel frees it when the holder ends. */
async function takeLock(directory: string): Promise<FileHandle> {
  const path = join(directory, 'lock')
  // Node opens every descriptor close-on-exec; a program that we start must not go on holding the lock.
  const handle = await open(path, constants.O_RDWR | constants.O_CREAT | constants.O_NOFOLLOW, 0o600).catch((cause) => {
    if (errnoOf(cause) !== 'ELOOP') throw cause
    const happened = `${path} is a symbolic link`
    throw new WarmforkError('STORE_UNSAFE', {
      tried: `open the store at ${directory}`,
      happened,
      remedy: 'Remove it.',
      cause,
    })
  })
  try {
    if (!tryLock(handle.fd)) {
      const holder = /^\d+/.exec(await handle.readFile('latin1'))?.[0]
      throw new WarmforkError('STORE_LOCKED', {
        tried: `open the store at ${directory}`,
        happened: `${holder === undefined ? 'another process' : `process ${holder}`} is its supervisor`,
      })
    }
    // A lock on a file that is not there any more locks nobody out.
    if (lstatSync(path, { throwIfNoEntry: false })?.ino !== (await handle.stat()).ino) {
      throw new WarmforkError('STORE_GONE', {
        tried: `open the store at ${directory}`,
        happened: 'it was removed meanwhile',
      })
    }
    await handle.truncate(0)
    await handle.write(`${process.pid} ${stat(process.pid)?.startTicks ?? 0}\n`, 0)
    return handle
  } catch (error) {
    await handle.close()
    throw error
  }
}

/** Names this process for ever, and one directory of it. */
function ownMark(): string {
  return `${process.pid}-${stat(process.pid)?.startTicks ?? 0}-${randomBytes(6).toString('hex')}`
}

/**
 * Unlinks a tree; a page file that is still mapped lives on until the last process that maps it ends, and one that other
 * generations have inherited as long as they do.
 */
async function removeTree(path: string): Promise<void> {
  const found = await walk(path).catch(() => ({ files: [] }))
  const shared = found.files.map((name) => join(path, name)).filter(hasOtherLinks)
  await changingLinks(shared, () => rm(path, { recursive: true, force: true, maxRetries: 3, retryDelay: 20 }))
}

function hasOtherLinks(path: string): boolean {
  return (lstatSync(path, { throwIfNoEntry: false })?.nlink ?? 0) > 1
}

function notFound(tried: string, directory: string, number: number): WarmforkError {
  return new WarmforkError('GENERATION_NOT_FOUND', {
    tried,
    happened: `there is no generation ${number} in ${directory}`,
  })
}

let version: string | undefined

function warmforkVersion(): string {
  version ??= (JSON.parse(readFileSync(new URL('../../package.json', import.meta.url), 'utf8')) as { version: string })
    .version
  return version
}
