/**
 * The files of one image, as one value that edits change: everything but raw files (pages), which stay on disk and are
 * only named. Reading checks every file; nothing is written here.
 */
import { existsSync, readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { WarmforkError } from '../errors.js'
import { corrupt, truncated } from './failure.js'
import { buildImageFile, decodeIn, type ImageFile, isRaw, parseImageFile } from './image-file.js'
import { type Decoded, encode, type Fields, type Message } from './message.js'
import {
  CoreEntry,
  FdinfoEntry,
  FileEntry,
  InventoryEntry,
  MmEntry,
  PstreeEntry,
  RemapEntry,
  TASK_DEAD,
  TASK_STOPPED,
} from './schema.js'
import { checkWhole } from './whole.js'

/** Versions of CRIU's image format (inventory) that are known: 1 since CRIU 1.0, 2 since 1.6. */
const KNOWN_VERSIONS = [1, 2]

/** Decoded address spaces, by the files that they stand in; an edited file is another one. */
const memories = new WeakMap<ImageFile, Decoded<typeof MmEntry.fields>>()

export class ImageSet {
  readonly #files = new Map<string, ImageFile>()
  readonly #changed = new Set<string>()

  private constructor(
    /** Where the raw files lie. */
    readonly directory: string,
    /** Names of the files that have no framing. */
    readonly rawNames: readonly string[],
  ) {}

  /** Throws IMAGE_VERSION, IMAGE_TRUNCATED or IMAGE_CORRUPT. */
  static read(directory: string): ImageSet {
    if (!existsSync(directory)) throw truncated('inventory.img', `there is no directory ${directory}`)
    const names = readdirSync(directory)
      .filter((name) => name.endsWith('.img'))
      .sort()
    const set = new ImageSet(directory, names.filter(isRaw))
    for (const name of names) {
      if (!isRaw(name)) set.#files.set(name, parseImageFile(name, readFileSync(join(directory, name))))
    }
    if (!set.has('inventory.img')) throw truncated('inventory.img', 'the directory holds no such file')
    const version = set.one('inventory.img', InventoryEntry).imgVersion
    if (!KNOWN_VERSIONS.includes(version)) {
      throw new WarmforkError('IMAGE_VERSION', {
        tried: `read ${directory}`,
        happened: `its image version is ${version}`,
      })
    }
    checkWhole(set)
    return set
  }

  /** One that can be edited without changing this one. */
  copy(): ImageSet {
    const set = new ImageSet(this.directory, this.rawNames)
    for (const [name, file] of this.#files) set.#files.set(name, file)
    for (const name of this.#changed) set.#changed.add(name)
    return set
  }

  get names(): string[] {
    return [...this.#files.keys()]
  }

  /** Names of the files that an edit has changed or added. */
  get changed(): string[] {
    return [...this.#changed]
  }

  has(name: string): boolean {
    return this.#files.has(name)
  }

  file(name: string): ImageFile {
    const file = this.#files.get(name)
    if (!file) throw truncated(name, 'the image holds no such file')
    return file
  }

  bytes(name: string): Uint8Array {
    return buildImageFile(this.file(name))
  }

  all<F extends Fields>(name: string, schema: Message<F>): Decoded<F>[] {
    return this.file(name).entries.map(({ message }) => decodeIn(name, schema, message))
  }

  /** The only entry of a file. */
  one<F extends Fields>(name: string, schema: Message<F>): Decoded<F> {
    const { entries } = this.file(name)
    if (entries.length !== 1) throw corrupt(name, `it has ${entries.length} entries where one is expected`)
    return decodeIn(name, schema, entries[0]!.message)
  }

  /** Puts new entries into a file that exists; payloads are dropped. */
  put<F extends Fields>(name: string, schema: Message<F>, values: readonly Decoded<F>[]): void {
    this.putMessages(
      name,
      values.map((value) => encode(schema, value)),
    )
  }

  /** The same, of messages that are encoded already. */
  putMessages(name: string, messages: readonly Uint8Array[]): void {
    const { family, magic } = this.file(name)
    this.#files.set(name, { family, magic, entries: messages.map((message) => ({ message })) })
    this.#changed.add(name)
  }

  /** Leaves only some of a file's entries, each with its payload. */
  retain(name: string, isKept: (index: number) => boolean): void {
    const { family, magic, entries } = this.file(name)
    this.#files.set(name, { family, magic, entries: entries.filter((_, index) => isKept(index)) })
    this.#changed.add(name)
  }

  /** The processes of the image, the root first. */
  processes(): Process[] {
    return this.all('pstree.img', PstreeEntry).map((entry) => {
      const state = this.core(entry.pid).task?.taskState
      const dead = state === TASK_DEAD
      // CRIU leaves the ids of a zombie's threads unset: what stands there is what lay in its memory.
      return { ...entry, threads: dead ? [entry.pid] : entry.threads, dead, stopped: state === TASK_STOPPED }
    })
  }

  core(threadId: number): Decoded<typeof CoreEntry.fields> {
    return this.one(`core-${threadId}.img`, CoreEntry)
  }

  putCore(threadId: number, core: Decoded<typeof CoreEntry.fields>): void {
    this.put(`core-${threadId}.img`, CoreEntry, [core])
  }

  /** Not to be changed, but put anew: it is decoded once (1 ms for 300 mappings, and ten edits ask for it). */
  memory(pid: number): Decoded<typeof MmEntry.fields> {
    const name = `mm-${pid}.img`
    const file = this.file(name)
    const known = memories.get(file)
    if (known) return known
    const memory = this.one(name, MmEntry)
    memories.set(file, memory)
    return memory
  }

  files(): Decoded<typeof FileEntry.fields>[] {
    return this.has('files.img') ? this.all('files.img', FileEntry) : []
  }

  /** The files that another one stands in for, since their paths do not name them any more. */
  remaps(): Decoded<typeof RemapEntry.fields>[] {
    return this.has('remap-fpath.img') ? this.all('remap-fpath.img', RemapEntry) : []
  }

  /** Every open descriptor, with the file of the image that lists it. */
  descriptors(): { image: string; entry: Decoded<typeof FdinfoEntry.fields> }[] {
    return this.names
      .filter((name) => /^fdinfo-\d+\.img$/.test(name))
      .flatMap((image) => this.all(image, FdinfoEntry).map((entry) => ({ image, entry })))
  }
}

export interface Process {
  pid: number
  ppid: number
  pgid: number
  sid: number
  threads: number[]
  /** A zombie: it has an exit status and no memory. */
  dead: boolean
  /** It stood still (SIGSTOP) when the image was taken. */
  stopped: boolean
}
