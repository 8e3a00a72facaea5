/**
 * Keeps the files that an image maps, so that an upgrade of a library under a live supervisor breaks no fork, and finds at
 * each fork where they are now. It knows no manifest but these entries, and not why a file is needed.
 *
 * While the original is unchanged the children map it. A reflink comes before a hard link, since a link shares what is
 * written into the original in place (`cp new old`); a copy comes last, because it costs space.
 */
import { type BigIntStats, constants, lstatSync } from 'node:fs'
import { chmod, chown, copyFile, link, lstat, rm } from 'node:fs/promises'
import { basename, join } from 'node:path'
import { errnoOf } from '../errors.js'
import { changingLinks } from './links.js'
import type { MappedFile } from './manifest.js'

export interface FileToKeep {
  /** Absolute. */
  readonly path: string
  /** `mapped` (the default): its content must not change. `open`: it is only open for reading and may grow, as a log does. */
  readonly use?: 'mapped' | 'open'
  /** That it is this copy, which another generation kept, whatever lies at its path now. */
  readonly keptBy?: EarlierCopy
}

/** A copy that another generation has kept, to link in place of copying once more. */
export interface EarlierCopy {
  readonly entry: MappedFile
  /** Absolute path of the kept copy. */
  readonly path: string
}

export interface KeepOptions {
  /** What the generation's parent kept: linked again in place of looking for a way, where the original is still the same. */
  readonly fromParent?: readonly EarlierCopy[]
  /** Total of what may be copied, where neither reflinks nor hard links work. */
  readonly maxCopyBytes: number
  readonly earlierCopies: readonly EarlierCopy[]
}

export const KEPT_DIRECTORY = 'files'

/** Keeps each of the files below `directory`; the small ones first, as the limit on copies then hits the fewest. */
export async function keepFiles(
  directory: string,
  files: readonly FileToKeep[],
  options: KeepOptions,
): Promise<MappedFile[]> {
  const entries: MappedFile[] = []
  const wanted = new Map<string, { use: 'mapped' | 'open'; stats: BigIntStats | string }>()
  const parents = new Map((options.fromParent ?? []).map((copy) => [copy.entry.path, copy]))
  for (const { path, use = 'mapped', keptBy } of files) {
    const before = wanted.get(path)
    if (before) {
      if (use === 'mapped') before.use = use
      continue
    }
    const stats = look(path)
    const copy = keptBy ?? parents.get(path)
    if (copy && (keptBy || isUnchanged(copy.entry, stats))) {
      const keptAs = `${KEPT_DIRECTORY}/${entries.length}-${basename(path)}`
      const target = join(directory, keptAs)
      const linked = () => link(copy.path, target)
      if (await attempt(copy.entry.kept === 'copy' ? () => changingLinks([copy.path], linked) : linked)) {
        entries.push({ ...copy.entry, use, keptAs })
        continue
      }
    }
    wanted.set(path, { use, stats })
  }
  const bySize = [...wanted].sort(([, a], [, b]) => Number(sizeOf(a.stats) - sizeOf(b.stats)))
  let left = options.maxCopyBytes
  for (const [path, { use, stats }] of bySize) {
    if (typeof stats === 'string') {
      entries.push({ path, use, sizeBytes: 0, mtimeNs: '0', inode: '0', device: '0', kept: null, reason: stats })
      continue
    }
    const found = {
      path,
      use,
      sizeBytes: Number(stats.size),
      mtimeNs: String(stats.mtimeNs),
      inode: String(stats.ino),
      device: String(stats.dev),
    }
    const keptAs = `${KEPT_DIRECTORY}/${entries.length}-${basename(path)}`
    const target = join(directory, keptAs)
    const kept = await keep(path, target, stats, found, left, options.earlierCopies)
    if (kept.how === null) entries.push({ ...found, kept: null, reason: kept.reason })
    else {
      left -= kept.copiedBytes
      const keptMtimeNs = String((await lstat(target, { bigint: true })).mtimeNs)
      entries.push({ ...found, kept: kept.how, keptAs, keptMtimeNs })
    }
  }
  return entries.sort((a, b) => (a.path < b.path ? -1 : 1))
}

type Kept = { how: 'link' | 'reflink' | 'copy'; copiedBytes: number } | { how: null; reason: string }

async function keep(
  path: string,
  target: string,
  stats: BigIntStats,
  found: Pick<MappedFile, 'path' | 'sizeBytes' | 'mtimeNs' | 'inode'>,
  left: number,
  earlier: readonly EarlierCopy[],
): Promise<Kept> {
  if (await attempt(() => copyFile(path, target, constants.COPYFILE_EXCL | constants.COPYFILE_FICLONE_FORCE))) {
    return settle(path, target, stats, { how: 'reflink', copiedBytes: 0 })
  }
  await rm(target, { force: true })
  if (await attempt(() => link(path, target))) return settle(path, target, stats, { how: 'link', copiedBytes: 0 })
  const copied = earlier.find(({ entry }) => isSame(entry, found))
  if (copied && (await attempt(() => link(copied.path, target)))) return { how: 'copy', copiedBytes: 0 }
  if (found.sizeBytes > left) {
    return { how: null, reason: `a copy of ${found.sizeBytes} bytes would go over the limit for kept copies` }
  }
  // No attempt: a full disk must end the making of the generation, not pass for a file that cannot be kept.
  try {
    await copyFile(path, target, constants.COPYFILE_EXCL)
  } catch (error) {
    await rm(target, { force: true })
    const errno = errnoOf(error)
    if (errno !== 'EACCES' && errno !== 'EPERM' && errno !== 'ENOENT') throw error
    return { how: null, reason: `it cannot be read: ${errno}` }
  }
  return settle(path, target, stats, { how: 'copy', copiedBytes: found.sizeBytes })
}

/** Makes sure that what was kept is what was looked at, and gives a copy its original's owner and mode (never set-user-id). */
async function settle(path: string, target: string, stats: BigIntStats, kept: Kept): Promise<Kept> {
  if (kept.how !== 'link') {
    await attempt(() => chown(target, Number(stats.uid), Number(stats.gid)))
    await chmod(target, Number(stats.mode) & 0o555)
  }
  const now = await lstat(path, { bigint: true }).catch(() => undefined)
  if (now && now.mtimeNs === stats.mtimeNs && now.size === stats.size && now.ino === stats.ino) return kept
  await rm(target, { force: true })
  return { how: null, reason: 'it changed while it was being kept' }
}

function isUnchanged(entry: MappedFile, now: BigIntStats | string): boolean {
  return (
    typeof now !== 'string' &&
    String(now.ino) === entry.inode &&
    Number(now.size) === entry.sizeBytes &&
    String(now.mtimeNs) === entry.mtimeNs
  )
}

function look(path: string): BigIntStats | string {
  try {
    const stats = lstatSync(path, { bigint: true })
    return stats.isFile() ? stats : 'it is not a regular file'
  } catch (error) {
    return `it cannot be looked at: ${errnoOf(error) ?? String(error)}`
  }
}

function sizeOf(stats: BigIntStats | string): bigint {
  return typeof stats === 'string' ? 0n : stats.size
}

async function attempt(action: () => Promise<unknown>): Promise<boolean> {
  try {
    await action()
    return true
  } catch {
    return false
  }
}

function isSame(a: Pick<MappedFile, 'path' | 'sizeBytes' | 'mtimeNs' | 'inode'>, b: typeof a): boolean {
  return a.path === b.path && a.sizeBytes === b.sizeBytes && a.mtimeNs === b.mtimeNs && a.inode === b.inode
}

/**
 * Where a file that the image maps is to be taken from now: its own path where nothing changed, else the kept one; undefined
 * where neither fits. One `lstat` for an unchanged file (1.5 µs). The device's number is not compared: it may differ after a boot.
 */
export function currentPath(directory: string, entry: MappedFile): string | undefined {
  const now = lstatSync(entry.path, { bigint: true, throwIfNoEntry: false })
  if (entry.inode === '0') return now ? entry.path : undefined
  if (now && String(now.ino) === entry.inode) {
    // Open for reading and changed in place: a fork sees what is there now, as after fork(2).
    if (entry.use === 'open') return entry.path
    if (Number(now.size) === entry.sizeBytes && String(now.mtimeNs) === entry.mtimeNs) return entry.path
  }
  if (entry.keptAs === undefined) return undefined
  const kept = join(directory, entry.keptAs)
  const stats = lstatSync(kept, { bigint: true, throwIfNoEntry: false })
  if (!stats?.isFile()) return undefined
  if (entry.use === 'open') return kept
  return Number(stats.size) === entry.sizeBytes && String(stats.mtimeNs) === entry.keptMtimeNs ? kept : undefined
}
