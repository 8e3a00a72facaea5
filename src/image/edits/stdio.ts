/**
 * Standard streams: the pipes on a template's descriptors 0, 1 and 2 are given anew to each fork. The image needs no
 * change; CRIU takes a descriptor of its own in place of a pipe that is named by its key (`--inherit-fd`), and opens it
 * again with the flags that the image has for it.
 */
import type { ImageSet } from '../image-set.js'

export interface InheritedPipe {
  /** Which of the three streams: 0, 1 or 2. */
  stream: 0 | 1 | 2
  /** CRIU's key for `--inherit-fd`. */
  key: string
}

/** Which standard streams the image's processes still have open; a stream that the template closed is absent. */
export function stdioPipes(set: ImageSet, inodes: readonly [bigint, bigint, bigint]): InheritedPipe[] {
  const open = new Set(set.files().flatMap(({ pipe }) => (pipe ? [pipe.pipeId] : [])))
  const streams = inodes.map((inode, stream) => ({ stream: stream as 0 | 1 | 2, pipeId: Number(inode) }))
  return streams
    .filter(({ pipeId }) => open.has(pipeId))
    .map(({ stream, pipeId }) => ({ stream, key: `pipe:[${pipeId}]` }))
}

/** Pipes with an end outside of the image that are none of the three: a child would read and write nothing there. */
export function strayPipes(set: ImageSet, inodes: readonly [bigint, bigint, bigint]): number[] {
  const ends = new Map<number, Set<number>>()
  for (const { pipe } of set.files()) {
    if (pipe) ends.set(pipe.pipeId, (ends.get(pipe.pipeId) ?? new Set()).add(pipe.flags & 1))
  }
  return [...ends].filter(([id, sides]) => sides.size === 1 && !inodes.includes(BigInt(id))).map(([id]) => id)
}
