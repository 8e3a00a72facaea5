/**
 * Which processes of a tree may share their memory copy-on-write. Code that frees memory with MADV_DONTNEED and counts on
 * zeros afterwards would read the page file's bytes; the preloaded shim answers that. Where it is absent, a process is
 * copied, but for Go's static programs, whose runtime clears what it reuses.
 */
import { carriesShim, isGoProgram, seesProc, whyWithoutShim } from '../../shim/shim.js'
import type { MemoryMode } from '../engine.js'

export interface MemoryChoice {
  mode: MemoryMode
  isShared: (pid: number) => boolean
  warnings: string[]
}

export function chooseMemory(
  pids: readonly number[],
  wanted: MemoryMode | 'auto',
  nameOf: (pid: number) => string,
): MemoryChoice {
  if (wanted === 'copy') return { mode: 'copy', isShared: () => false, warnings: [] }
  const without = pids.filter((pid) => !(carriesShim(pid) && seesProc(pid)) && !isGoProgram(pid))
  const described = without.map(
    (pid) =>
      `process ${pid} (${nameOf(pid)}) cannot share its memory safely. ${whyWithoutShim(pid) ?? 'Its root directory has no /proc, which the preloaded shim needs.'}`,
  )
  if (wanted === 'cow') {
    const warnings = described.map(
      (what) =>
        `${what} Its memory is shared as asked; if its allocator counts on zeros after MADV_DONTNEED (jemalloc, PartitionAlloc), it reads old data.`,
    )
    return { mode: 'cow', isShared: () => true, warnings }
  }
  const copied = new Set(without)
  const warnings = described.map(
    (what) => `${what} Its memory is copied at each fork; \`memory: 'cow'\` shares it all the same.`,
  )
  return { mode: copied.has(pids[0]!) ? 'copy' : 'cow', isShared: (pid) => !copied.has(pid), warnings }
}
