/** What a generation holds, read from its image: for people and programs. It prints nothing and changes nothing. */
import type { Generation } from '../generations/generation.js'
import { AddressSpace } from '../image/address-space.js'
import { ImageSet } from '../image/image-set.js'
import { message, required } from '../image/message.js'
import { type PageRun, readPagemap, runsWithin } from '../image/pagemap.js'
import {
  FILE_TYPE,
  type FileEntry,
  type InetSocket,
  OPEN,
  TCP_LISTEN,
  VMA_STATUS,
  type VmaEntry,
} from '../image/schema.js'

export const MEMORY_KINDS = {
  pageFile: 'anonymous, shared in the page file',
  anonymous: 'anonymous, copied at each fork',
  stack: 'stacks, copied at each fork',
  sharedAnonymous: 'shared anonymous, copied at each fork',
  privateFile: 'private mappings of files',
  sharedFile: 'shared mappings of files',
  kernel: "the kernel's own (vdso, vvar)",
} as const
export type MemoryKind = keyof typeof MEMORY_KINDS

export interface MemoryOfKind {
  readonly kind: MemoryKind
  readonly mappings: number
  /** Address space. */
  readonly mappedBytes: number
  /** In page files: read from the page cache that all children share. */
  readonly pageFileBytes: number
  /** In the image: copied by every fork. */
  readonly copiedBytes: number
}

export interface ProcessContents {
  readonly pid: number
  readonly ppid: number
  readonly comm: string
  readonly threads: number
  readonly mappings: number
  readonly copiedBytes: number
}

export interface OpenFile {
  readonly pid: number
  readonly fd: number
  readonly path: string
  readonly access: 'read' | 'write' | 'read and write'
  readonly position: number
}

export interface OpenSocket {
  readonly pid: number
  readonly fd: number
  readonly type: string
  readonly local: string
  readonly remote: string
}

/** Everything else that is open: pipes, terminals, event queues. */
export interface OtherDescriptor {
  readonly pid: number
  readonly fd: number
  readonly type: string
}

export interface Contents {
  readonly processes: readonly ProcessContents[]
  readonly memory: readonly MemoryOfKind[]
  readonly files: readonly OpenFile[]
  readonly sockets: readonly OpenSocket[]
  readonly others: readonly OtherDescriptor[]
}

/** Throws GENERATION_CORRUPT, and what reading an image throws. */
export async function contentsOf(generation: Generation): Promise<Contents> {
  const set = ImageSet.read(generation.imageDirectory)
  const files = new Map(set.files().map((file) => [fileKey(file.type, file.id), file]))
  const living = set.processes().filter(({ dead }) => !dead)
  const memory = new MemoryCount(await pageFiles(generation, files))
  const processes = living.map((process) => {
    const space = new AddressSpace(set, process.pid)
    try {
      return {
        pid: process.pid,
        ppid: process.ppid,
        comm: set.core(process.pid).task?.comm ?? '',
        threads: process.threads.length,
        mappings: space.vmas.length,
        copiedBytes: memory.add(space),
      }
    } finally {
      space.close()
    }
  })
  memory.addShared(sharedBytes(set))
  return { processes, memory: memory.kinds, ...descriptorsOf(set, living, files) }
}

const fileKey = (type: number, id: number) => `${type}-${id}`

/** The stretches of each page file that hold data, by the id of the image's entry for it. */
async function pageFiles(generation: Generation, files: ReadonlyMap<string, FileEntry>) {
  const found = new Map<bigint, readonly Run[]>()
  for (const name of generation.pageFiles) {
    const runs = await generation.runs(name)
    for (const { id, regular } of files.values()) {
      // By the end of its path: the store may have been moved, or the file inherited from another generation.
      if (regular?.name.endsWith(`/${name}`)) found.set(BigInt(id), runs)
    }
  }
  return found
}

type Run = readonly [offset: number, length: number]

class MemoryCount {
  readonly #kinds = new Map<
    MemoryKind,
    { mappings: number; mappedBytes: number; pageFileBytes: number; copiedBytes: number }
  >()

  constructor(private readonly pageFiles: ReadonlyMap<bigint, readonly Run[]>) {}

  /** Gives how much of the process every fork copies. */
  add(space: AddressSpace): number {
    let copiedBytes = 0
    for (const vma of space.vmas) {
      const runs = vma.status & VMA_STATUS.FILE_PRIVATE ? this.pageFiles.get(vma.shmid) : undefined
      const kind = this.#kind(runs ? 'pageFile' : kindOf(vma))
      kind.mappings++
      kind.mappedBytes += Number(vma.end - vma.start)
      if (runs) kind.pageFileBytes += overlap(runs, Number(vma.pgoff), Number(vma.end - vma.start))
      const copied = bytesIn(runsWithin(space.runs, vma.start, vma.end))
      kind.copiedBytes += copied
      copiedBytes += copied
    }
    return copiedBytes
  }

  /** The content of shared memory stands in pages files of its own. */
  addShared(bytes: number): void {
    if (bytes > 0) this.#kind('sharedAnonymous').copiedBytes += bytes
  }

  get kinds(): MemoryOfKind[] {
    const order = Object.keys(MEMORY_KINDS) as MemoryKind[]
    return order.flatMap((kind) => {
      const found = this.#kinds.get(kind)
      return found ? [{ kind, ...found }] : []
    })
  }

  #kind(kind: MemoryKind) {
    const found = this.#kinds.get(kind) ?? { mappings: 0, mappedBytes: 0, pageFileBytes: 0, copiedBytes: 0 }
    this.#kinds.set(kind, found)
    return found
  }
}

function kindOf({ status }: VmaEntry): MemoryKind {
  if (status & (VMA_STATUS.VDSO | VMA_STATUS.VVAR | VMA_STATUS.VSYSCALL)) return 'kernel'
  if (status & VMA_STATUS.STACK) return 'stack'
  if (status & (VMA_STATUS.ANON_SHARED | VMA_STATUS.SYSVIPC | VMA_STATUS.MEMFD)) return 'sharedAnonymous'
  if (status & VMA_STATUS.FILE_PRIVATE) return 'privateFile'
  if (status & VMA_STATUS.FILE_SHARED) return 'sharedFile'
  return 'anonymous'
}

function overlap(runs: readonly Run[], offset: number, length: number): number {
  return runs.reduce((sum, [start, bytes]) => {
    return sum + Math.max(0, Math.min(start + bytes, offset + length) - Math.max(start, offset))
  }, 0)
}

function sharedBytes(set: ImageSet): number {
  return bytesIn(
    set.names.filter((name) => name.startsWith('pagemap-shmem-')).flatMap((name) => readPagemap(set, name).runs),
  )
}

function bytesIn(runs: readonly PageRun[]): number {
  return runs.reduce((sum, { start, end }) => sum + Number(end - start), 0)
}

/** Which table of open files a process has: threads of CLONE_FILES share one. */
const Ids = message({ filesId: required(2, 'uint32') })

const TYPE_NAMES = new Map(Object.entries(FILE_TYPE).map(([name, type]) => [type as number, name.toLowerCase()]))

function descriptorsOf(
  set: ImageSet,
  processes: readonly { pid: number }[],
  byKey: ReadonlyMap<string, FileEntry>,
): Pick<Contents, 'files' | 'sockets' | 'others'> {
  const files: OpenFile[] = []
  const sockets: OpenSocket[] = []
  const others: OtherDescriptor[] = []
  const descriptors = set.descriptors()
  for (const { pid } of processes) {
    const image = `fdinfo-${set.one(`ids-${pid}.img`, Ids).filesId}.img`
    for (const { entry } of descriptors.filter((descriptor) => descriptor.image === image)) {
      const at = { pid, fd: entry.fd }
      const file = byKey.get(fileKey(entry.type, entry.id))
      if (file?.regular?.name.startsWith(LISTENER)) {
        sockets.push({ ...at, type: 'listener', local: file.regular.name.slice(1), remote: '' })
      } else if (file?.regular) {
        const { name, flags, pos } = file.regular
        files.push({ ...at, path: name, access: accessOf(flags), position: Number(pos) })
      } else if (file?.inet) {
        sockets.push({ ...at, ...inetSocket(file.inet) })
      } else if (file?.unix) {
        const name = Buffer.from(file.unix.name).toString('utf8').replace(/^\0/, '@').replace(/\0+$/, '')
        sockets.push({
          ...at,
          type: 'unix',
          local: name,
          remote: file.unix.peer === 0 ? '' : `socket ${file.unix.peer}`,
        })
      } else {
        others.push({ ...at, type: TYPE_NAMES.get(entry.type) ?? `type ${entry.type}` })
      }
    }
  }
  return { files, sockets, others }
}

/** The invented names that stand for sockets which the supervisor hands in. */
const LISTENER = '/warmfork/listener/'

function accessOf(flags: number): OpenFile['access'] {
  const mode = flags & OPEN.ACCMODE
  return mode === OPEN.RDWR ? 'read and write' : mode === OPEN.WRONLY ? 'write' : 'read'
}

function inetSocket(socket: InetSocket): Pick<OpenSocket, 'type' | 'local' | 'remote'> {
  const protocol = socket.proto === 17 || socket.type === 2 ? 'udp' : 'tcp'
  const state =
    protocol === 'tcp' ? (socket.state === TCP_LISTEN ? ' listening' : socket.state === 1 ? ' established' : '') : ''
  const remote = socket.destinationPort === 0 ? '' : address(socket.destinationAddress, socket.destinationPort)
  return { type: `${protocol}${state}`, local: address(socket.sourceAddress, socket.sourcePort), remote }
}

/** Addresses are kept as the kernel has them, in 32-bit words of network byte order. */
function address(words: readonly number[], port: number): string {
  const bytes = new Uint8Array(Uint32Array.from(words).buffer)
  if (words.length === 1) return `${bytes.join('.')}:${port}`
  const groups = Array.from({ length: 8 }, (_, i) => ((bytes[2 * i]! << 8) | bytes[2 * i + 1]!).toString(16))
  return `[${new URL(`http://[${groups.join(':')}]`).hostname.slice(1, -1)}]:${port}`
}
