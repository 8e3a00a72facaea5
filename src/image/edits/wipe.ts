/**
 * Wipe on fork: memory that a program asked the kernel to zero in a child of `fork(2)` (MADV_WIPEONFORK) or that the
 * kernel may drop at any time (MAP_DROPPABLE) holds state of random generators. A fork by restoring must zero it too,
 * or every child draws the same bytes: its pages are left out of the image.
 */
import type { ImageSet } from '../image-set.js'
import { MADV, MAP, type VmaEntry } from '../schema.js'

export interface Range {
  start: bigint
  end: bigint
}

/**
 * The ranges of a process that a fork must zero: those whose flags the image names (CRIU ≥ 4.2) and those that the
 * caller read from the process itself (`VmFlags` wf and dp in smaps: CRIU 4.1 records neither).
 */
export function wipeRanges(set: ImageSet, pid: number, seenInProcess: readonly Range[] = []): Range[] {
  return [...set.memory(pid).vmas.filter(isWiped), ...seenInProcess].map(({ start, end }) => ({ start, end }))
}

function isWiped(vma: VmaEntry): boolean {
  return (((vma.madv ?? 0n) >> BigInt(MADV.WIPEONFORK)) & 1n) === 1n || (vma.flags & MAP.DROPPABLE) !== 0
}

/** What is left of runs of pages outside the ranges. */
export function withoutRanges<R extends Range & { offset: number }>(runs: readonly R[], ranges: readonly Range[]): R[] {
  return ranges.reduce<readonly R[]>(
    (left, range) =>
      left.flatMap((run) => {
        if (range.end <= run.start || run.end <= range.start) return [run]
        const parts: R[] = []
        if (run.start < range.start) parts.push({ ...run, end: range.start })
        if (range.end < run.end)
          parts.push({ ...run, start: range.end, offset: run.offset + Number(range.end - run.start) })
        return parts
      }),
    runs,
  ) as R[]
}
