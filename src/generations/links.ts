/**
 * Changes of the number of links of files that generations share. A new or a removed link changes a file's ctime, by which
 * a generation sees that somebody touched it; here stands which of those changes were ours. It knows no generation.
 */
import { type BigIntStats, closeSync, fstatSync, openSync } from 'node:fs'
import { errnoOf } from '../errors.js'

/** Of a file: from the first ctime to the last one, every change was ours. */
interface Span {
  readonly fromNs: bigint
  toNs: bigint
}

const ours = new Map<string, Span>()

const keyOf = ({ dev, ino }: BigIntStats) => `${dev}:${ino}`

/** Makes a change to the links of files, and remembers it as ours. A file that is not there is left out. */
export async function changingLinks<T>(paths: readonly string[], change: () => Promise<T> | T): Promise<T> {
  const files = paths.flatMap((path) => {
    try {
      const fd = openSync(path, 'r')
      return [{ fd, before: fstatSync(fd, { bigint: true }) }]
    } catch (error) {
      if (errnoOf(error) === undefined) throw error
      return []
    }
  })
  try {
    return await change()
  } finally {
    for (const { fd, before } of files) {
      note(before, fstatSync(fd, { bigint: true }))
      closeSync(fd)
    }
  }
}

function note(before: BigIntStats, after: BigIntStats): void {
  const key = keyOf(before)
  const span = ours.get(key)
  if (after.nlink === 0n) ours.delete(key)
  else if (span?.toNs === before.ctimeNs) span.toNs = after.ctimeNs
  else ours.set(key, { fromNs: before.ctimeNs, toNs: after.ctimeNs })
}

/** Whether nothing but changes of ours lies between a ctime that was seen and the one that a file has now. */
export function isOurs(seenNs: bigint, now: BigIntStats): boolean {
  const span = ours.get(keyOf(now))
  return span !== undefined && span.fromNs <= seenNs && span.toNs === now.ctimeNs
}
