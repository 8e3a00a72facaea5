/**
 * Whether an image is whole: what one of its files names stands in another. CRIU takes an image file that is missing for
 * an empty one, so a restore would go on without it. What nothing names cannot be missed here (data that waited in
 * pipes and sockets, a descriptor cut off the end of a list): for that the store keeps checksums.
 */
import { existsSync } from 'node:fs'
import { join } from 'node:path'
import { ghostFile } from './edits/ghosts.js'
import { corrupt, truncated } from './failure.js'
import type { ImageSet, Process } from './image-set.js'
import { pagesFile, readPagemap } from './pagemap.js'
import { FsEntry, IdsEntry, REMAP_GHOST, VMA_STATUS } from './schema.js'

/** Throws IMAGE_TRUNCATED, IMAGE_CORRUPT. */
export function checkWhole(set: ImageSet): void {
  const processes = set.processes()
  checkTree(set, processes)
  const files = new Set(set.files().map(({ id }) => id))
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
    }
    set.file(`pagemap-${pid}.img`)
  }
  for (const name of set.names.filter((name) => name.startsWith('pagemap-'))) {
    const pages = pagesFile(readPagemap(set, name).pagesId)
    if (!existsSync(join(set.directory, pages))) throw truncated(pages, 'the image holds no such file')
  }
  for (const { image, entry } of set.descriptors()) expectFile(entry.id, image)
  for (const { fileId, remapId, type } of set.remaps()) {
    expectFile(fileId, 'remap-fpath.img')
    if (type === REMAP_GHOST) set.file(ghostFile(remapId))
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
      set.core(id)
    }
  }
  for (const file of set.names) {
    const id = /^core-(\d+)\.img$/.exec(file)?.[1]
    if (id !== undefined && !seen.has(Number(id))) throw truncated(name, `it does not name ${id}, and there is ${file}`)
  }
}
