/** What an image holds, for the store (which files it maps) and for people (`warmfork inspect`). Reads; changes nothing. */
import { mappedFiles } from './address-space.js'
import type { ImageSet } from './image-set.js'
import { FILE_TYPE, type FileTypeName, OPEN, VMA_STATUS } from './schema.js'

export interface NamedFile {
  path: string
  /** `mapped`: its content must not change; `open`: it is open for reading only. */
  use: 'mapped' | 'open'
}

/** What the kernel makes up when it is read. Files of /sys even have a size that is not theirs: a copy of one would never end. */
const MADE_UP = /^\/(proc|sys)\//

/** The regular files that an image needs unchanged: mapped ones (libraries, the program itself) and those open for reading. */
export function neededFiles(set: ImageSet): NamedFile[] {
  const names = new Map<string, NamedFile['use']>()
  const byId = new Map(set.files().flatMap(({ id, regular }) => (regular ? [[id, regular] as const] : [])))
  const mapped = mappedFiles(set)
  /** What others see change, or change themselves, is taken as it is then. */
  const shared = new Set<number>()
  for (const { pid, dead } of set.processes()) {
    if (dead) continue
    for (const { status, shmid } of set.memory(pid).vmas) if (status & VMA_STATUS.FILE_SHARED) shared.add(Number(shmid))
  }
  for (const [id, { name, flags }] of byId) {
    if (!name.startsWith('/') || MADE_UP.test(name)) continue
    if (mapped.has(id)) names.set(name, 'mapped')
    else if ((flags & OPEN.ACCMODE) === 0 && !names.has(name) && !shared.has(id)) names.set(name, 'open')
  }
  return [...names].map(([path, use]) => ({ path, use }))
}

export interface ImageContents {
  processes: {
    pid: number
    ppid: number
    comm: string
    threads: number
    mappings: number
    mappedBytes: Record<MemoryKind, number>
  }[]
  /** How many open files there are of each kind. */
  files: Partial<Record<FileTypeName, number>>
  /** Paths of the regular files that are open or mapped. */
  paths: string[]
}

export type MemoryKind = 'pageFile' | 'privateAnonymous' | 'sharedAnonymous' | 'privateFile' | 'sharedFile' | 'other'

/** `pageFilePath` tells the page file's mappings from those of other files. */
export function contentsOf(set: ImageSet, pageFilePath?: string): ImageContents {
  const files = set.files()
  const pageFileIds = new Set(
    files.filter(({ regular }) => regular && regular.name === pageFilePath).map(({ id }) => BigInt(id)),
  )
  const typeNames = new Map(Object.entries(FILE_TYPE).map(([name, type]) => [type as number, name as FileTypeName]))
  const counts: ImageContents['files'] = {}
  for (const { type } of files) {
    const name = typeNames.get(type)
    if (name) counts[name] = (counts[name] ?? 0) + 1
  }
  return {
    processes: set.processes().map(({ pid, ppid, threads, dead }) => {
      const vmas = dead ? [] : set.memory(pid).vmas
      const mappedBytes: Record<MemoryKind, number> = {
        pageFile: 0,
        privateAnonymous: 0,
        sharedAnonymous: 0,
        privateFile: 0,
        sharedFile: 0,
        other: 0,
      }
      for (const vma of vmas) {
        mappedBytes[
          pageFileIds.has(vma.shmid) && vma.status & VMA_STATUS.FILE_PRIVATE ? 'pageFile' : kindOf(vma.status)
        ] += Number(vma.end - vma.start)
      }
      return {
        pid,
        ppid,
        comm: set.core(pid).task?.comm ?? '',
        threads: threads.length,
        mappings: vmas.length,
        mappedBytes,
      }
    }),
    files: counts,
    paths: files.flatMap(({ regular }) => (regular ? [regular.name] : [])).sort(),
  }
}

function kindOf(status: number): MemoryKind {
  if (status & VMA_STATUS.ANON_PRIVATE) return 'privateAnonymous'
  if (status & VMA_STATUS.ANON_SHARED) return 'sharedAnonymous'
  if (status & VMA_STATUS.FILE_PRIVATE) return 'privateFile'
  if (status & VMA_STATUS.FILE_SHARED) return 'sharedFile'
  return 'other'
}
