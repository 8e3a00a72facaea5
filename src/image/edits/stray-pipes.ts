/**
 * Pipes whose other end is outside of the image. A fork has its end, and nobody has the other: it reads the end and writes to
 * nobody (EPIPE). What waited in such a pipe is the source's to read, and is not read again by each fork.
 */
import type { ImageSet } from '../image-set.js'
import { PipeData } from '../schema.js'

/** `ids`: of the pipes, their inodes. Returns how many had something in them. */
export function dropPipeData(set: ImageSet, ids: ReadonlySet<number>): number {
  if (ids.size === 0 || !set.has('pipes-data.img')) return 0
  const data = set.all('pipes-data.img', PipeData)
  const dropped = data.filter(({ pipeId, bytes }) => ids.has(pipeId) && bytes > 0).length
  if (dropped > 0) set.retain('pipes-data.img', (index) => !ids.has(data[index]!.pipeId))
  return dropped
}
