/**
 * Whether an image is whole: what one of its files names stands in another. CRIU takes an image file that is missing for
 * an empty one, so a restore would go on without it. What nothing names cannot be missed here (data that waited in
 * pipes and sockets, a descriptor cut off the end of a list): for that the store keeps checksums.
 */
import { statSync } from 'node:fs'
import { join } from 'node:path'
import { ghostFile } from './edits/ghosts.js'
import { corrupt, truncated, unsupported } from './failure.js'
import type { ImageSet, Process } from './image-set.js'
import { pagesFile, readPagemap } from './pagemap.js'
import { FILE_TYPE, FsEntry, IdsEntry, MemfdInode, REMAP_GHOST, SocketPacket, VMA_STATUS, X86_64 } from './schema.js'

/** Kinds of files that stand in an image only because a descriptor names them: they cannot be mapped, nor be a directory. */
const ONLY_OPEN: ReadonlySet<number> = new Set([
  FILE_TYPE.PIPE,
  FILE_TYPE.EVENTFD,
  FILE_TYPE.EVENTPOLL,
  FILE_TYPE.SIGNALFD,
  FILE_TYPE.TIMERFD,
  FILE_TYPE.INOTIFY,
])

const sharedPagemap = (shmid: number | bigint) => `pagemap-shmem-${shmid}.img`

/** Throws IMAGE_TRUNCATED, IMAGE_CORRUPT; IMAGE_UNSUPPORTED where it is of another machine. */
export function checkWhole(set: ImageSet): void {
  const processes = set.processes()
  checkTree(set, processes)
  const files = new Map(set.files().map((file) => [file.id, file]))
  const expectFile = (id: number, by: string) => {
    if (!files.has(id)) throw corrupt(by, `it names file ${id}, which files.img does not have`)
  }
  for (const { pid, dead } of processes) {
    if (dead) continue
    set.one(`ids-${pid}.img`, IdsEntry)
    const { cwdId, rootId } = set.one(`fs-${pid}.img`, FsEntry)
    for (const id of [cwdId, rootId]) expectFile(id, `fs-${pid}.img`)
    const { exeFileId, vmas } = set.memory(pid)
    expectFile(exeFileId, `mm-${pid}.img`)
    for (const { status, shmid } of vmas) {
      if (status & (VMA_STATUS.FILE_PRIVATE | VMA_STATUS.FILE_SHARED)) expectFile(Number(shmid), `mm-${pid}.img`)
      if (status & VMA_STATUS.ANON_SHARED && !(status & VMA_STATUS.SYSVIPC)) set.file(sharedPagemap(shmid))
    }
    set.file(`pagemap-${pid}.img`)
  }
  for (const { size, shmid } of set.has('memfd.img') ? set.all('memfd.img', MemfdInode) : []) {
    if (size > 0n) set.file(sharedPagemap(shmid))
  }
  for (const name of set.names.filter((name) => name.startsWith('pagemap-'))) checkPages(set, name)
  const open = new Set<number>()
  for (const { image, entry } of set.descriptors()) {
    expectFile(entry.id, image)
    open.add(entry.id)
  }
  for (const { passed } of set.has('sk-queues.img') ? set.all('sk-queues.img', SocketPacket) : []) {
    for (const id of passed.flatMap(({ rights }) => rights)) open.add(id)
  }
  for (const { id, type } of files.values()) {
    if (ONLY_OPEN.has(type) && !open.has(id)) throw truncated('fdinfo', `no descriptor names file ${id}`)
  }
  for (const { fileId, remapId, type } of set.remaps()) {
    expectFile(fileId, 'remap-fpath.img')
    if (type === REMAP_GHOST) checkGhost(set, ghostFile(remapId), files.get(fileId)?.regular?.size)
  }
}

function checkPages(set: ImageSet, pagemap: string): void {
  const { pagesId, runs } = readPagemap(set, pagemap)
  const pages = pagesFile(pagesId)
  const named = runs.reduce((sum, { start, end }) => sum + Number(end - start), 0)
  const size = statSync(join(set.directory, pages), { throwIfNoEntry: false })?.size
  if (size === undefined) throw truncated(pages, 'the image holds no such file')
  if (size < named) throw truncated(pages, `it has ${size} bytes, and its pagemap names ${named}`)
  if (size > named) throw truncated(pagemap, `it names ${named} bytes, and its pages file has ${size}`)
}

/** Content in one piece is as long as the file was. (Of chunks nothing says how many there were.) */
function checkGhost(set: ImageSet, name: string, size: bigint | undefined): void {
  const [head, ...chunks] = set.file(name).entries
  const length = head?.payload?.length ?? 0
  if (chunks.length === 0 && size !== undefined && BigInt(length) < size) {
    throw truncated(name, `it holds ${length} bytes of a file that had ${size}`)
  }
}

function checkTree(set: ImageSet, processes: readonly Process[]): void {
  const name = 'pstree.img'
  if (processes.length === 0) throw truncated(name, 'it names no process')
  const seen = new Set<number>()
  for (const [index, { pid, ppid, threads }] of processes.entries()) {
    if (index === 0 ? ppid !== 0 : !seen.has(ppid)) throw corrupt(name, `process ${pid} has no parent in it`)
    if (threads[0] !== pid) throw corrupt(name, `process ${pid} does not begin with its own thread`)
    for (const id of threads) {
      if (id === 0 || seen.has(id)) throw corrupt(name, `the id ${id} stands in it twice`)
      seen.add(id)
      if (set.core(id).machine !== X86_64) throw unsupported(`read core-${id}.img`, 'it is not of an x86-64 process')
    }
  }
  for (const file of set.names) {
    const id = /^core-(\d+)\.img$/.exec(file)?.[1]
    if (id !== undefined && !seen.has(Number(id))) throw truncated(name, `it does not name ${id}, and there is ${file}`)
  }
}
