/**
 * Paths that all children of a generation share and that one of them may remove when it ends: a file that is open for
 * writing (a pid file, a log that is rotated), a working directory. A restore needs them, so they are made again, empty. What a
 * program knows only by its name cannot be seen from outside. It knows an image's paths, and no generation and no sockets.
 */
import { chownSync, closeSync, lstatSync, mkdirSync, openSync } from 'node:fs'
import { dirname } from 'node:path'
import type { ImageSet } from '../../image/image-set.js'
import { OPEN } from '../../image/schema.js'

export interface SharedPath {
  path: string
  kind: 'file' | 'directory'
  mode: number
  uid: number
  gid: number
}

/** Those of an image, as they are now; directories first. */
export function sharedPaths(set: ImageSet): SharedPath[] {
  const gone = new Set(set.remaps().map(({ fileId }) => fileId))
  const found = new Map<string, SharedPath>()
  for (const { id, regular } of set.files()) {
    if (!regular?.name.startsWith('/') || gone.has(id)) continue
    const stats = lstatSync(regular.name, { throwIfNoEntry: false })
    const kind = stats?.isDirectory() ? 'directory' : 'file'
    if (!stats || (kind === 'file' && !(stats.isFile() && regular.flags & OPEN.ACCMODE))) continue
    found.set(regular.name, { path: regular.name, kind, mode: stats.mode & 0o7777, uid: stats.uid, gid: stats.gid })
  }
  return [...found.values()].sort((a, b) => a.kind.localeCompare(b.kind) || a.path.length - b.path.length)
}

/** Makes those that are missing again. For every fork, 2 µs a path. */
export function remakePaths(paths: readonly SharedPath[]): void {
  for (const { path, kind, mode, uid, gid } of paths) {
    if (lstatSync(path, { throwIfNoEntry: false })) continue
    try {
      mkdirSync(dirname(path), { recursive: true })
      if (kind === 'directory') mkdirSync(path, { mode })
      else closeSync(openSync(path, 'wx', mode))
      const made = lstatSync(path)
      if (made.uid !== uid || made.gid !== gid) chownSync(path, uid, gid)
    } catch {
      // Then the restore fails, and criu says which path it misses.
    }
  }
}
