import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, it } from 'vitest'
import { AddressSpace } from '../src/image/address-space.js'
import { planMemory } from '../src/image/edits/memory.js'
import { readPagemap } from '../src/image/pagemap.js'
import { FILE_TYPE, MAP, VMA_STATUS } from '../src/image/schema.js'
import { PROGRAM_ID, regular, type TinyImage, tinyImage, vma } from './fixtures/tiny-image.js'

const PAGE = 4096n
const A = 0x7f00_0000_0000n
const SEEN = '/store/1/memory-1.warmfork-pages'
const OLD_PATH = '/store/2/memory-1.warmfork-pages'
const NEW_PATH = '/store/2/memory-2.warmfork-pages'
const OLD_ID = 77
const GIB = 2 ** 30

let directory: string
beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'warmfork-inherited-'))
})
afterEach(() => {
  rmSync(directory, { recursive: true })
})

/** A mapping of the page file as a fork has it, at an offset in pages. */
function mapped(start: bigint, pages: number, offset: number, more: Parameters<typeof vma>[2] = {}) {
  return vma(start, pages, {
    shmid: BigInt(OLD_ID),
    pgoff: BigInt(offset) * PAGE,
    flags: MAP.PRIVATE,
    status: VMA_STATUS.REGULAR | VMA_STATUS.FILE_PRIVATE,
    fdflags: 0,
    ...more,
  })
}

function plan(image: TinyImage, options: { runs?: [number, number][]; sizeBytes?: number; shared?: boolean } = {}) {
  const set = tinyImage(directory, { files: [regular(OLD_ID, SEEN)], ...image })
  const spaces = set.processes().map(({ pid }) => new AddressSpace(set, pid))
  const { runs = [[0, 1000 * 4096]], sizeBytes = 4 * GIB, shared = true } = options
  const made = planMemory(set, {
    pageFilePath: NEW_PATH,
    inherited: [{ name: 'memory-1.warmfork-pages', seenPath: SEEN, path: OLD_PATH, runs, sizeBytes }],
    processes: spaces.map((memory) => ({ memory, isShared: shared, runs: memory.runs, keepOut: [], leaveAlone: [] })),
    isUnchanged: () => true,
  })
  for (const space of spaces) space.close()
  const names = new Map(set.files().map(({ id, regular }) => [BigInt(id), regular?.name]))
  const vmasOf = (pid: number) =>
    set.memory(pid).vmas.map(({ start, end, pgoff, shmid }) => ({
      pages: [Number((start - A) / PAGE), Number((end - A) / PAGE)],
      file: names.get(shmid),
      offset: Number(pgoff / PAGE),
    }))
  const kept = readPagemap(set, 'pagemap-50.img').runs.map(({ start, end }) => [
    Number((start - A) / PAGE),
    Number((end - A) / PAGE),
  ])
  return { set, made, vmasOf, kept, names: [...names.values()] }
}

describe('memory that a fork shares with its generation', () => {
  it('is mapped where it was, by a name in the new generation', () => {
    const { made, vmasOf, names } = plan({ processes: [{ pid: 50, vmas: [mapped(A, 8, 16)] }] })
    expect(vmasOf(50)).toEqual([{ pages: [0, 8], file: OLD_PATH, offset: 16 }])
    expect([made.copies, made.pageFileSize, made.inherited]).toEqual([[], 0, ['memory-1.warmfork-pages']])
    expect(names).not.toContain(SEEN)
  })

  it('is not inherited where nothing maps it any more', () => {
    const { made, names } = plan({ processes: [{ pid: 50, vmas: [vma(A, 2)], pages: [[A, 2, 1]] }] })
    expect(made.inherited).toEqual([])
    expect(names).toEqual(['/bin/tiny', NEW_PATH])
  })

  it('moves where a run or a page was written, and no more than that', () => {
    const pages: [bigint, number, number][] = [
      [A + 10n * PAGE, 1, 1],
      [A + 100n * PAGE, 30, 2],
    ]
    const { made, vmasOf, kept } = plan({ processes: [{ pid: 50, vmas: [mapped(A, 300, 0)], pages }] })
    expect(vmasOf(50)).toMatchObject([
      { pages: [0, 10], file: OLD_PATH, offset: 0 },
      { pages: [10, 11], file: NEW_PATH },
      { pages: [11, 100], file: OLD_PATH, offset: 11 },
      { pages: [100, 130], file: NEW_PATH },
      { pages: [130, 300], file: OLD_PATH, offset: 130 },
    ])
    expect(kept).toEqual([])
    expect(made.copies.map(({ source, length }) => [source.kind, source.offset, length])).toEqual([
      ['pages', 0, 4096],
      ['pages', 4096, 30 * 4096],
    ])
    expect(made.written).toEqual({ firstBytes: 31 * 4096, againBytes: 0 })
  })

  it('moves with what lies between two runs, but for holes', () => {
    const pages: [bigint, number, number][] = [
      [A, 20, 1],
      [A + 28n * PAGE, 20, 2],
    ]
    // Of the 8 pages between, 3 hold data.
    const runs: [number, number][] = [
      [22 * 4096, 3 * 4096],
      [48 * 4096, 352 * 4096],
    ]
    const { made, vmasOf } = plan({ processes: [{ pid: 50, vmas: [mapped(A, 400, 0)], pages }] }, { runs })
    expect(vmasOf(50)).toMatchObject([
      { pages: [0, 48], file: NEW_PATH },
      { pages: [48, 400], file: OLD_PATH, offset: 48 },
    ])
    const base = made.copies.find(({ source }) => source.kind === 'pages')!.target
    expect(made.copies).toContainEqual({
      source: { kind: 'file', path: SEEN, offset: 22 * 4096 },
      target: base + 22 * 4096,
      length: 3 * 4096,
    })
  })

  it('is one mapping again with memory beside it that was discarded and written', () => {
    const vmas = [mapped(A, 10, 0), vma(A + 10n * PAGE, 4), mapped(A + 14n * PAGE, 10, 14)]
    const pages: [bigint, number, number][] = [[A, 24, 1]]
    const { vmasOf } = plan({ processes: [{ pid: 50, vmas, pages }] })
    expect(vmasOf(50)).toMatchObject([{ pages: [0, 24], file: NEW_PATH }])
  })

  it('stays apart from memory of another protection', () => {
    const vmas = [mapped(A, 10, 0), mapped(A + 10n * PAGE, 10, 10, { prot: 1 })]
    const { vmasOf, set } = plan({ processes: [{ pid: 50, vmas, pages: [[A, 20, 1]] }] })
    expect(vmasOf(50)).toHaveLength(2)
    expect(set.memory(50).vmas.map(({ prot }) => prot)).toEqual([3, 1])
  })

  it('moves as a whole where it has grown to the end of its file', () => {
    const sizeBytes = 1000 * 4096
    const runs: [number, number][] = [[900 * 4096, 50 * 4096]]
    const { made, vmasOf } = plan({ processes: [{ pid: 50, vmas: [mapped(A, 100, 900)] }] }, { runs, sizeBytes })
    expect(vmasOf(50)).toMatchObject([{ pages: [0, 100], file: NEW_PATH }])
    expect(made.copies).toMatchObject([{ source: { kind: 'file', offset: 900 * 4096 }, length: 50 * 4096 }])
    expect(made.inherited).toEqual([])
    expect(made.pageFileSize).toBeGreaterThan(GIB)
  })

  it('stays mapped with its pages copied where it is locked', () => {
    const locked = mapped(A, 40, 0, { flags: MAP.PRIVATE | MAP.LOCKED })
    const { vmasOf, kept } = plan({ processes: [{ pid: 50, vmas: [locked], pages: [[A, 40, 1]] }] })
    expect(vmasOf(50)).toEqual([{ pages: [0, 40], file: OLD_PATH, offset: 0 }])
    expect(kept).toEqual([[0, 40]])
  })

  it('stays mapped with its pages copied where a process is to share no more', () => {
    const { vmasOf, kept } = plan(
      { processes: [{ pid: 50, vmas: [mapped(A, 40, 0)], pages: [[A, 40, 1]] }] },
      { shared: false },
    )
    expect(vmasOf(50)).toEqual([{ pages: [0, 40], file: OLD_PATH, offset: 0 }])
    expect(kept).toEqual([[0, 40]])
  })

  it('has an entry for each process, so that criu takes no mapping of a child for its parent’s', () => {
    const { set } = plan({
      processes: [
        { pid: 50, vmas: [mapped(A, 8, 0)] },
        { pid: 51, ppid: 50, vmas: [mapped(A, 8, 100)] },
      ],
    })
    const ids = [50, 51].map((pid) => set.memory(pid).vmas[0]!.shmid)
    expect(new Set(ids).size).toBe(2)
  })

  it('keeps the entry of a page file that a program has open, under its new name', () => {
    const fds = [{ id: OLD_ID, flags: 0, type: FILE_TYPE.REG, fd: 5 }]
    const { set } = plan({ processes: [{ pid: 50, vmas: [mapped(A, 8, 0)], fds }] })
    expect(set.files().find(({ id }) => id === OLD_ID)?.regular?.name).toBe(OLD_PATH)
    expect(set.files().map(({ id }) => id)).toContain(PROGRAM_ID)
  })
})
