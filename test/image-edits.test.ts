import {
  closeSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  readSync,
  rmSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeEach, describe, expect, it } from 'vitest'
import { AddressSpace } from '../src/image/address-space.js'
import { contentsOf, neededFiles } from '../src/image/contents.js'
import { ForkImage } from '../src/image/derive.js'
import { setDeathSignal } from '../src/image/edits/death-signal.js'
import { dropFifoData, dropLocks, dropSizeChecks } from '../src/image/edits/file-checks.js'
import { renumberGhosts } from '../src/image/edits/ghosts.js'
import {
  filesWithIds,
  findIdPlaces,
  idsOf,
  renamedFile,
  renamedTree,
  renameIdsInside,
} from '../src/image/edits/identity.js'
import { inheritListeners } from '../src/image/edits/listeners.js'
import { planMemory } from '../src/image/edits/memory.js'
import { replaceFiles } from '../src/image/edits/replaced-files.js'
import { stdioPipes, strayPipes } from '../src/image/edits/stdio.js'
import { inheritTerminal } from '../src/image/edits/terminal.js'
import { wipeRanges, withoutRanges } from '../src/image/edits/wipe.js'
import { buildImageFile, parseImageFile } from '../src/image/image-file.js'
import { ImageSet } from '../src/image/image-set.js'
import { decode, encode } from '../src/image/message.js'
import { readPagemap } from '../src/image/pagemap.js'
import { prepare } from '../src/image/prepare.js'
import {
  FdinfoEntry,
  FILE_TYPE,
  MADV,
  MAP,
  OPEN,
  PAGEMAP,
  PagemapEntry,
  PipeData,
  RemapEntry,
  TtyInfoEntry,
  VMA_STATUS,
} from '../src/image/schema.js'
import {
  framed,
  owner,
  PROGRAM_ID,
  pipe,
  regular,
  type TinyImage,
  tinyImage,
  vma,
  word,
} from './fixtures/tiny-image.js'

const root = mkdtempSync(join(tmpdir(), 'warmfork-edits-'))
afterAll(() => rmSync(root, { recursive: true }))

let directory: string
let count = 0
beforeEach(() => {
  directory = join(root, String(++count))
  mkdirSync(directory)
})

const image = (tiny: TinyImage) => tinyImage(directory, tiny)
const PAGE = 4096n
const A = 0x7f0000000000n

describe('wipe on fork', () => {
  const run = (start: bigint, end: bigint, offset: number) => ({ start, end, offset })

  it.each([
    ['before', [[0n, 10n]], [[10n, 20n, 100]]],
    ['behind', [[20n, 30n]], [[10n, 20n, 100]]],
    ['over all of it', [[0n, 30n]], []],
    ['over exactly all of it', [[10n, 20n]], []],
    ['over its beginning', [[5n, 12n]], [[12n, 20n, 102]]],
    ['over its end', [[18n, 25n]], [[10n, 18n, 100]]],
    [
      'in its middle',
      [[12n, 15n]],
      [
        [10n, 12n, 100],
        [15n, 20n, 105],
      ],
    ],
    [
      'in two places',
      [
        [15n, 16n],
        [11n, 12n],
      ],
      [
        [10n, 11n, 100],
        [12n, 15n, 102],
        [16n, 20n, 106],
      ],
    ],
  ] as [string, [bigint, bigint][], [bigint, bigint, number][]][])(
    'leaves of a run what lies outside a range %s',
    (_, ranges, left) => {
      const found = withoutRanges(
        [run(10n, 20n, 100)],
        ranges.map(([start, end]) => ({ start, end })),
      )
      expect(found).toEqual(left.map(([start, end, offset]) => run(start, end, offset)))
    },
  )

  const wiped = { madv: 1n << BigInt(MADV.WIPEONFORK) }

  it('finds ranges by their advice, by their kind, and by what was seen in the process', () => {
    const set = image({
      processes: [
        {
          pid: 50,
          vmas: [
            vma(A, 1),
            vma(A + PAGE, 1, wiped),
            vma(A + 2n * PAGE, 1, { flags: MAP.DROPPABLE | MAP.ANONYMOUS }),
            vma(A + 3n * PAGE, 1, { madv: 1n << 10n }),
          ],
        },
      ],
    })
    const seen = { start: A + 9n * PAGE, end: A + 10n * PAGE }
    expect(wipeRanges(set, 50, [seen])).toEqual([
      { start: A + PAGE, end: A + 2n * PAGE },
      { start: A + 2n * PAGE, end: A + 3n * PAGE },
      seen,
    ])
  })

  // A range at the border of a run makes the run shorter, and the number of runs stays.
  it.each([
    ['cow', 'first', 0],
    ['cow', 'last', 3],
    ['copy', 'first', 0],
    ['copy', 'middle', 1],
    ['copy', 'last', 3],
  ] as const)('keeps none of its pages in memory mode %s, where it is the %s of a run', async (mode, _, wipedPage) => {
    const at = A + BigInt(wipedPage) * PAGE
    const vmas = [0, 1, 2, 3].map((i) => vma(A + BigInt(i) * PAGE, 1, i === wipedPage ? wiped : {}))
    image({ processes: [{ pid: 50, vmas, pages: [[A, 4, 0x61]] }] })
    const target = join(directory, 'target')
    mkdirSync(target)
    const pageFile = join(directory, 'page-file')
    const { pageFileRuns } = await prepare({
      source: directory,
      target,
      pageFile: { write: pageFile, map: pageFile },
      isShared: () => mode === 'cow',
    })
    const prepared = new AddressSpace(ImageSet.read(target), 50)
    expect(prepared.read(at, 4096)!.every((byte) => byte === 0)).toBe(true)
    for (const i of [0, 1, 2, 3]) if (i !== wipedPage) expect(prepared.read(A + BigInt(i) * PAGE, 1)![0]).toBe(0x61 + i)
    prepared.close()
    const secret = Buffer.alloc(16, 0x61 + wipedPage)
    for (const name of readdirSync(target)) expect(readFileSync(join(target, name)).includes(secret), name).toBe(false)
    expect(pageFileRuns.length > 0).toBe(mode === 'cow')
    for (const [offset, length] of pageFileRuns) {
      const bytes = Buffer.alloc(length)
      const fd = openSync(pageFile, 'r')
      readSync(fd, bytes, 0, length, offset)
      closeSync(fd)
      expect(bytes.includes(secret)).toBe(false)
    }
  })
})

describe('identity', () => {
  const ids = new Map([
    [50, 1050],
    [51, 1051],
    [60, 1060],
    [70, 1070],
    [71, 1071],
  ])

  it('gives every process, thread, group and session of the tree a new id', () => {
    const set = image({
      processes: [
        { pid: 50, threads: [{ id: 50 }, { id: 51 }] },
        // Of a group and a session whose leaders have ended.
        { pid: 60, ppid: 50, pgid: 70, sid: 71 },
      ],
    })
    expect(idsOf(set).sort()).toEqual([50, 51, 60, 70, 71])
    expect(renamedTree(set, ids)).toMatchObject([
      { pid: 1050, ppid: 0, pgid: 1050, sid: 1050, threads: [1050, 1051] },
      { pid: 1060, ppid: 1050, pgid: 1070, sid: 1071, threads: [1060] },
    ])
  })

  it('does not count what CRIU leaves unset: the ids of threads of a zombie, and of groups outside', () => {
    const set = image({
      processes: [{ pid: 50 }, { pid: 60, ppid: 50, pgid: 0, sid: 50, dead: true, threads: [{ id: 60 }] }],
    })
    const tree = set.file('pstree.img').entries.map(({ message }) => Buffer.from(message))
    // The thread's id of the zombie, as what lay in the memory of the CRIU that wrote it.
    tree[1]!.set([0x28, 61], tree[1]!.length - 2)
    set.putMessages('pstree.img', tree)
    expect(idsOf(set)).toEqual([50, 60])
    expect(renamedTree(set, ids)[1]).toMatchObject({ pid: 1060, pgid: 0, threads: [1060] })
  })

  it('renames files that carry an id, and no others', () => {
    for (const kind of ['core', 'mm', 'pagemap', 'fs', 'ids'])
      expect(renamedFile(`${kind}-50.img`, ids)).toBe(`${kind}-1050.img`)
    for (const name of [
      'core-52.img',
      'fdinfo-50.img',
      'pages-50.img',
      'pagemap-shmem-50.img',
      'timens-50.img',
      'tcp-stream-50.img',
    ])
      expect(renamedFile(name, ids)).toBe(name)
  })

  it('renames the owners of open files of every kind, and processes behind descriptors', () => {
    const one = { id: 0, owner: owner(50) }
    const kinds = {
      packet: one,
      netlink: one,
      eventfd: one,
      eventpoll: one,
      signalfd: one,
      timerfd: one,
      inotify: one,
      fanotify: one,
      external: one,
      tty: { ...one, infoId: 0, flags: 0 },
      memfd: one,
      bpfMap: one,
    }
    const inet = {
      ino: 0,
      family: 2,
      type: 1,
      proto: 6,
      state: 7,
      sourcePort: 0,
      destinationPort: 0,
      flags: 0,
      backlog: 0,
      sourceAddress: [],
      destinationAddress: [],
    }
    const unix = { ino: 0, type: 1, state: 1, flags: 0, uflags: 0, backlog: 0, peer: 0, name: new Uint8Array() }
    const files = [
      ...Object.entries(kinds).map(([kind, value], i) => ({
        type: FILE_TYPE.MEMFD,
        id: i + 1,
        [kind]: { ...value, id: i + 1 },
      })),
      regular(101, '/a', { owner: owner(51) }),
      { type: FILE_TYPE.INETSK, id: 102, inet: { ...inet, id: 102, owner: owner(50) } },
      { type: FILE_TYPE.UNIXSK, id: 103, unix: { ...unix, id: 103, owner: owner(50) } },
      { type: FILE_TYPE.PIPE, id: 104, pipe: { id: 104, pipeId: 1, flags: 0, owner: owner(50) } },
      { type: FILE_TYPE.PIDFD, id: 105, pidfd: { id: 105, ino: 0, flags: 0, pid: 51, owner: owner(0) } },
      // Of nobody in the tree.
      regular(106, '/b', { owner: owner(7) }),
    ]
    const fds = files.map(({ id, type }) => ({ id, type }))
    const set = image({ processes: [{ pid: 50, threads: [{ id: 50 }, { id: 51 }], fds }], files })
    expect(filesWithIds(set)).toEqual(['files.img'])
    renameIdsInside(set, ['files.img'], ids)
    const owners = set.files().map((file) => {
      const found = Object.values(file).find((value) => typeof value === 'object') as { owner: { pid: number } }
      return [file.id, found.owner.pid]
    })
    expect(owners).toEqual([
      ...Object.keys(kinds).map((_, i) => [i + 1, 1050]),
      ...[
        [101, 1051],
        [102, 1050],
        [103, 1050],
        [104, 1050],
        [105, 0],
        [106, 7],
        [PROGRAM_ID, 0],
      ],
    ])
    expect(set.files().find(({ id }) => id === 105)?.pidfd?.pid).toBe(1051)
  })

  it('renames the session and the group of a terminal, and the thread that a timer signals', () => {
    const timers = { posix: [{ id: 0 }, { id: 1, notifyThreadId: 51 }] }
    const tty = { id: 1, type: 5, sid: 50, pgrp: 70, rdev: 0x8803 }
    const set = image({
      processes: [
        { pid: 50, threads: [{ id: 50 }, { id: 51 }], timers },
        { pid: 60, ppid: 50, pgid: 70, sid: 50 },
      ],
      more: { 'tty-info.img': framed(TtyInfoEntry, [tty]) },
    })
    expect(filesWithIds(set)).toEqual(['tty-info.img', 'core-50.img'])
    renameIdsInside(set, filesWithIds(set), ids)
    expect(set.one('tty-info.img', TtyInfoEntry)).toEqual({ ...tty, sid: 1050, pgrp: 1070 })
    expect(set.core(50).task?.timers?.posix).toEqual([{ id: 0 }, { id: 1, notifyThreadId: 1051 }])
  })

  it('gives each open description of an external terminal a key of its own, and a foreground group that is there', () => {
    const EXTERNAL = 5
    const PTY = 1
    const info = (id: number, type: number, pgrp: number) => ({ id, type, sid: 50, pgrp, rdev: 0x8803, dev: 24 })
    const file = (id: number, flags: number) => ({
      type: FILE_TYPE.TTY,
      id,
      tty: { id, infoId: 2000 + id, flags, owner: owner(0) },
    })
    const set = image({
      processes: [{ pid: 50 }],
      files: [file(1, OPEN.RDWR | 0o100000), file(2, OPEN.RDWR | OPEN.NONBLOCK), file(3, OPEN.RDWR)],
      more: {
        'tty-info.img': framed(TtyInfoEntry, [info(2001, EXTERNAL, 50), info(2002, EXTERNAL, 77), info(2003, PTY, 77)]),
      },
    })
    expect(inheritTerminal(set)).toEqual([
      { key: 'tty[1:0]', flags: OPEN.RDWR },
      { key: 'tty[2:0]', flags: OPEN.RDWR | OPEN.NONBLOCK },
    ])
    expect(set.all('tty-info.img', TtyInfoEntry)).toEqual([
      { ...info(2001, EXTERNAL, 50), rdev: 1, dev: 0 },
      { ...info(2002, EXTERNAL, 50), rdev: 2, dev: 0 },
      info(2003, PTY, 77),
    ])
  })

  describe('finds where a thread remembers its id', () => {
    const places = (thread: { clearTidAddr?: bigint; fsBase?: bigint }, words: [bigint, Uint8Array][], threads = 1) => {
      const all = [{ id: 50, ...thread }, ...(threads > 1 ? [{ id: 51 }] : [])]
      const set = image({ processes: [{ pid: 50, threads: all, vmas: [vma(A, 4)], pages: [[A, 4, 0]], words }] })
      const space = new AddressSpace(set, 50)
      try {
        return findIdPlaces(set, set.processes()[0]!, space)
      } finally {
        space.close()
      }
    }

    it('glibc: where the kernel clears it at the end', () => {
      expect(places({ clearTidAddr: A + 720n }, [[A + 720n, word(50, 4)]])).toEqual([
        { threadId: 50, address: A + 720n, width: 4, runtime: 'glibc' },
      ])
    })

    it('glibc from 2.43 on: behind the thread pointer, since the kernel clears another place', () => {
      const words: [bigint, Uint8Array][] = [
        [A + 0x10n, word(A, 8)],
        [A + 0x2d0n, word(50, 4)],
        [A + 0x628n, word(2, 4)],
      ]
      expect(places({ clearTidAddr: A + 0x628n, fsBase: A }, words)).toEqual([
        { threadId: 50, address: A + 0x2d0n, width: 4, runtime: 'glibc' },
      ])
    })

    it('musl: behind the thread pointer', () => {
      expect(places({ clearTidAddr: A + 8n, fsBase: A + PAGE }, [[A + PAGE + 0x30n, word(50, 4)]])).toEqual([
        { threadId: 50, address: A + PAGE + 0x30n, width: 4, runtime: 'musl' },
      ])
    })

    it.each([72n, 64n, 120n])('Go: through g and m, whichever offset it has there (%i)', (offset) => {
      const [g, m] = [A + PAGE, A + 2n * PAGE]
      const words: [bigint, Uint8Array][] = [
        [A + 120n, word(g, 8)],
        [g + 48n, word(m, 8)],
        [m + offset, word(50, 8)],
      ]
      expect(places({ fsBase: A + 128n }, words)).toEqual([
        { threadId: 50, address: m + offset, width: 8, runtime: 'go' },
      ])
    })

    it('both, in a Go program with threads of the C library', () => {
      const [g, m] = [A + PAGE, A + 2n * PAGE]
      const words: [bigint, Uint8Array][] = [
        [A + 120n, word(g, 8)],
        [g + 48n, word(m, 8)],
        [m + 72n, word(50, 8)],
        [A + 848n, word(50, 4)],
      ]
      const found = places({ fsBase: A + 128n, clearTidAddr: A + 848n }, words)
      expect(found.map(({ runtime }) => runtime)).toEqual(['glibc', 'go'])
    })

    it('nowhere, in a program of one thread that told nobody', () => {
      expect(places({}, [])).toEqual([])
    })

    it.each([
      ['of several threads', { fsBase: A + 128n }, 2],
      ['whose kernel knows a place that holds another id', { clearTidAddr: A + 720n }, 1],
      ['whose kernel knows a place where nothing is mapped', { clearTidAddr: A - 720n }, 1],
    ])('and refuses a program %s', (_, thread, threads) => {
      expect(() => places(thread, [[A + 720n, word(49, 4)]], threads)).toThrow(
        expect.objectContaining({ code: 'IMAGE_UNSUPPORTED' }),
      )
    })
  })
})

describe('standard streams', () => {
  const files = [pipe(1, 700), pipe(2, 701, 1), pipe(3, 702, 1), pipe(4, 800, 0), pipe(5, 800, 1), pipe(6, 900, 1)]
  const fds = files.map(({ id, type }) => ({ id, type }))

  it('are named by their pipes, and left out where the template closed them', () => {
    const set = image({ processes: [{ pid: 50, fds }], files })
    expect(stdioPipes(set, [700n, 701n, 702n])).toEqual([
      { stream: 0, key: 'pipe:[700]' },
      { stream: 1, key: 'pipe:[701]' },
      { stream: 2, key: 'pipe:[702]' },
    ])
    expect(stdioPipes(set, [700n, 555n, 702n]).map(({ stream }) => stream)).toEqual([0, 2])
  })

  it('are told from pipes that lead outside', () => {
    const set = image({ processes: [{ pid: 50, fds }], files })
    expect(strayPipes(set, [700n, 701n, 702n])).toEqual([900])
  })
})

describe('files that others use too', () => {
  it('lose their checks, but for those that processes have as memory', () => {
    const size = { size: 10n, mode: 0o100644 }
    const mapped = vma(A, 1, { status: VMA_STATUS.REGULAR | VMA_STATUS.FILE_PRIVATE, shmid: 4n, flags: MAP.PRIVATE })
    const set = image({
      processes: [{ pid: 50, vmas: [mapped] }],
      files: [
        regular(1, '/read', { ...size, flags: 0 }),
        regular(2, '/write', { ...size, flags: OPEN.WRONLY }),
        regular(3, '/both', { ...size, flags: OPEN.RDWR }),
        regular(4, '/lib/a.so', size),
      ],
    })
    expect(dropSizeChecks(set)).toEqual(['/read', '/write', '/both'])
    const checks = set.files().map(({ regular }) => [regular?.size, regular?.mode])
    expect(checks).toEqual([...Array(3).fill([undefined, undefined]), [10n, 0o100644], [undefined, undefined]])
  })

  it('lose their locks', () => {
    const set = image({
      processes: [{ pid: 50 }],
      more: { 'filelocks.img': framed(FdinfoEntry, [{ id: 1, flags: 2, type: 3, fd: 4 }]) },
    })
    expect(dropLocks(set)).toBe(1)
    expect(set.file('filelocks.img').entries).toEqual([])
  })

  it('lose what waited in FIFOs, but for unlinked ones', () => {
    const fifo = (id: number, pipeId: number, fileId: number) => ({
      type: FILE_TYPE.FIFO,
      id,
      fifo: { id, pipeId, fileId },
    })
    const entries = [700, 800].map((pipeId) => ({
      message: encode(PipeData, { pipeId, bytes: 4 }),
      payload: Buffer.from(`d${pipeId}`),
    }))
    const set = image({
      processes: [{ pid: 50 }],
      files: [fifo(1, 700, 11), regular(11, '/fifo'), fifo(2, 800, 12), regular(12, '/unlinked')],
      more: {
        'fifo-data.img': buildImageFile({ family: 0x54564319, magic: 0x59333054, entries }),
        'remap-fpath.img': framed(RemapEntry, [{ fileId: 12, remapId: 1, type: 1 }]),
        'ghost-file-1.img': framed(FdinfoEntry, [{ id: 1, flags: 2, type: 3, fd: 4 }]),
      },
    })
    dropFifoData(set)
    expect(set.file('fifo-data.img').entries.map(({ payload }) => payload && Buffer.from(payload).toString())).toEqual([
      'd800',
    ])
  })
})

const SIGSTOP = 19

it('sets the death signal of the root, and of nobody else', () => {
  const set = image({
    processes: [
      { pid: 50, threads: [{ id: 50 }, { id: 51 }] },
      { pid: 60, ppid: 50 },
    ],
  })
  setDeathSignal(set)
  expect([50, 51, 60].map((id) => set.core(id).thread?.deathSignal)).toEqual([SIGSTOP, undefined, undefined])
})

describe('listeners', () => {
  const socket = (id: number, more: object) => ({
    type: FILE_TYPE.INETSK,
    id,
    inet: {
      id,
      ino: 4000 + id,
      family: 2,
      type: 1,
      proto: 6,
      state: 10,
      sourcePort: 8080,
      destinationPort: 0,
      flags: 0o4000,
      backlog: 511,
      sourceAddress: [0x0100007f],
      destinationAddress: [0],
      owner: owner(50),
      ...more,
    },
  })
  const files = [
    socket(1, {}),
    socket(2, { family: 10, v6only: true, sourceAddress: [0, 0, 0, 0x01000000] }),
    socket(3, { state: 1, destinationPort: 99 }),
    socket(4, { type: 2, proto: 17, state: 7 }),
    socket(5, { type: 2, proto: 17, state: 7, destinationPort: 53 }),
    socket(6, { type: 2, proto: 17, state: 7, sourcePort: 0 }),
  ]
  const fds = files.map(({ id, type }) => ({ id, type }))
  let set: ImageSet
  let listeners: ReturnType<typeof inheritListeners>
  beforeEach(() => {
    set = image({
      processes: [
        { pid: 50, fds },
        { pid: 60, ppid: 50, fds: [{ id: 1, type: FILE_TYPE.INETSK }] },
      ],
      files,
    })
    listeners = inheritListeners(set)
  })

  it('are the sockets that belong to their port: TCP that listens, UDP without a peer', () => {
    expect(listeners.map(({ inode }) => inode)).toEqual([4001, 4002, 4004])
    expect(listeners[0]).toEqual({
      key: 'warmfork/listener/1',
      inode: 4001,
      family: 2,
      type: 1,
      port: 8080,
      address: Uint8Array.of(127, 0, 0, 1),
      backlog: 511,
      v6only: false,
    })
    expect(listeners[1]).toMatchObject({ family: 10, v6only: true, address: Uint8Array.of(...Array(15).fill(0), 1) })
  })

  it('become files of invented names, in every process that has them', () => {
    const types = new Map(set.files().map(({ id, type, regular }) => [id, [type, regular?.name]]))
    expect(types.get(1)).toEqual([FILE_TYPE.REG, '/warmfork/listener/1'])
    expect(types.get(3)).toEqual([FILE_TYPE.INETSK, undefined])
    expect(set.files()[0]!.regular).toMatchObject({ flags: OPEN.RDWR | OPEN.NONBLOCK, owner: { pid: 50 } })
    expect(set.descriptors().map(({ image, entry }) => [image, entry.id, entry.type])).toEqual([
      ...[1, 2].map((id) => ['fdinfo-1.img', id, FILE_TYPE.REG]),
      ['fdinfo-1.img', 3, FILE_TYPE.INETSK],
      ['fdinfo-1.img', 4, FILE_TYPE.REG],
      ...[5, 6].map((id) => ['fdinfo-1.img', id, FILE_TYPE.INETSK]),
      ['fdinfo-2.img', 1, FILE_TYPE.REG],
    ])
  })
})

describe('Unix listeners', () => {
  const socket = (id: number, more: object) => ({
    type: FILE_TYPE.UNIXSK,
    id,
    unix: {
      id,
      ino: 5000 + id,
      type: 1,
      state: 10,
      flags: 0o4000,
      uflags: 0,
      backlog: 128,
      peer: 0,
      owner: owner(50),
      name: Buffer.from('/run/app.sock\0'),
      ...more,
    },
  })
  const edited = (...more: object[]) => {
    const files = more.map((one, i) => socket(i + 1, one))
    const set = image({ processes: [{ pid: 50, fds: files.map(({ id, type }) => ({ id, type })) }], files })
    return { set, listeners: inheritListeners(set) }
  }

  it('are handed in by an invented name, as those of TCP', () => {
    const { set, listeners } = edited({})
    expect(listeners).toMatchObject([
      { key: 'warmfork/listener/1', inode: 5001, family: 1, type: 1, port: 0, backlog: 128, path: '/run/app.sock' },
    ])
    expect(set.files()[0]).toMatchObject({ type: FILE_TYPE.REG, regular: { name: '/warmfork/listener/1' } })
    expect(set.descriptors()[0]!.entry.type).toBe(FILE_TYPE.REG)
  })

  it('have a path that is absolute, and none where there is none', () => {
    const { listeners } = edited(
      { name: Buffer.from('app.sock\0'), nameDirectory: '/srv/run' },
      { name: Buffer.from('\0abstract') },
      { deleted: true },
    )
    expect(listeners.map(({ path }) => path)).toEqual(['/srv/run/app.sock', undefined, undefined])
    expect(Buffer.from(listeners[1]!.address).toString()).toBe('\0abstract')
  })

  it('are not connections, nor datagram sockets without a name or with a peer', () => {
    const datagram = { type: 2, state: 7 }
    const { listeners } = edited(
      { state: 1, peer: 7 },
      { ...datagram, name: Buffer.alloc(0) },
      { ...datagram, peer: 7 },
      datagram,
    )
    expect(listeners.map(({ inode }) => inode)).toEqual([5004])
  })
})

it('takes replaced files from where they were kept', () => {
  const set = image({
    processes: [{ pid: 50 }],
    files: [regular(1, '/lib/a.so'), regular(2, '/lib/b.so'), regular(3, '/lib/a.so')],
  })
  replaceFiles(set, new Map([['/lib/a.so', '/kept/a.so']]))
  expect(set.files().map(({ regular }) => regular?.name)).toEqual([
    '/kept/a.so',
    '/lib/b.so',
    '/kept/a.so',
    '/bin/tiny',
  ])
})

it('numbers unlinked files by the root, so that two forks make different ones', () => {
  const ghost = framed(FdinfoEntry, [{ id: 1, flags: 2, type: 3, fd: 4 }])
  const remaps = [
    { fileId: 1, remapId: 1, type: 1 },
    { fileId: 2, remapId: 0x1f, type: 1 },
    { fileId: 3, remapId: 1, type: 1 },
    { fileId: 4, remapId: 1, type: 0 },
  ]
  const set = image({
    processes: [{ pid: 50 }],
    files: [1, 2, 3, 4].map((id) => regular(id, `/gone-${id}`)),
    more: { 'remap-fpath.img': framed(RemapEntry, remaps), 'ghost-file-1.img': ghost, 'ghost-file-1f.img': ghost },
  })
  const numbers = (rootPid: number) => {
    const copy = set.copy()
    const names = renumberGhosts(copy, rootPid)
    return { names, ids: copy.all('remap-fpath.img', RemapEntry).map(({ remapId }) => remapId) }
  }
  const first = numbers(4_194_303)
  const [shared, other] = [4_194_303 * 1024, 4_194_303 * 1024 + 1]
  expect(first.ids).toEqual([shared, other, shared, 1])
  expect([...first.names]).toEqual([
    ['ghost-file-1.img', `ghost-file-${shared.toString(16)}.img`],
    ['ghost-file-1f.img', `ghost-file-${other.toString(16)}.img`],
  ])
  expect(numbers(4_194_302).ids.filter((id) => first.ids.includes(id))).toEqual([1])
  expect(set.all('remap-fpath.img', RemapEntry)[0]?.remapId).toBe(1)
})

describe('memory', () => {
  const GAP = 1 << 30
  const plan = (
    tiny: TinyImage,
    options: {
      keepOut?: bigint[]
      leaveAlone?: { start: bigint; end: bigint }[]
      unchanged?: boolean
      shared?: boolean
    } = {},
  ) => {
    const set = image(tiny)
    const spaces = set.processes().map(({ pid }) => new AddressSpace(set, pid))
    const { keepOut = [], leaveAlone = [], unchanged = true, shared = true } = options
    const made = planMemory(set, {
      pageFilePath: '/store/page-file',
      processes: spaces.map((memory) => ({ memory, isShared: shared, runs: memory.runs, keepOut, leaveAlone })),
      isUnchanged: () => unchanged,
    })
    for (const space of spaces) space.close()
    return { set, plan: made, vmas: set.memory(50).vmas }
  }
  const pageFileId = BigInt(PROGRAM_ID + 1)
  const isConverted = ({ shmid }: { shmid: bigint }) => shmid === pageFileId

  it('maps the page file where private anonymous memory was', () => {
    const { set, plan: made, vmas } = plan({ processes: [{ pid: 50, vmas: [vma(A, 4)], pages: [[A, 4, 1]] }] })
    expect(vmas).toMatchObject([
      { start: A, end: A + 4n * PAGE, pgoff: 0n, shmid: pageFileId, prot: 3, flags: MAP.PRIVATE, fdflags: 0 },
    ])
    expect(vmas[0]!.status).toBe(VMA_STATUS.REGULAR | VMA_STATUS.FILE_PRIVATE)
    expect(set.files().at(-1)).toMatchObject({
      id: Number(pageFileId),
      regular: { name: '/store/page-file', flags: 0 },
    })
    expect(readPagemap(set, 'pagemap-50.img').runs).toEqual([])
    expect(made.copies).toEqual([{ source: { kind: 'pages', pid: 50, offset: 0 }, target: 0, length: 4 * 4096 }])
  })

  it('gives no slot to what has no pages, and none at all where nothing has', () => {
    const { plan: made, vmas } = plan({ processes: [{ pid: 50, vmas: [vma(A, 4)] }] })
    expect([made.pageFileSize, made.mappings, vmas.filter(isConverted)]).toEqual([0, 0, []])
  })

  it('sets slots apart, each at the place inside 2 MiB that its address has', () => {
    const starts = [A + 5n * PAGE, A + (1n << 24n) + 511n * PAGE, A + (1n << 25n)]
    const { vmas, plan: made } = plan({
      processes: [{ pid: 50, vmas: starts.map((start) => vma(start, 3)), pages: starts.map((start) => [start, 1, 1]) }],
    })
    const MIB2 = 2n << 20n
    for (const [i, { pgoff, start }] of vmas.entries()) {
      expect(pgoff % MIB2).toBe(start % MIB2)
      if (i > 0) expect(pgoff).toBeGreaterThanOrEqual(vmas[i - 1]!.pgoff + 3n * PAGE + BigInt(GAP))
    }
    expect(made.pageFileSize).toBeGreaterThanOrEqual(Number(vmas[2]!.pgoff) + 3 * 4096 + GAP)
  })

  it('sets very many slots closer, within what a file may have', () => {
    const starts = Array.from({ length: 20_000 }, (_, i) => A + BigInt(i) * (4n << 20n))
    const { plan: made } = plan({
      processes: [{ pid: 50, vmas: starts.map((start) => vma(start, 1)), pages: starts.map((start) => [start, 1, 1]) }],
    })
    expect(made.mappings).toBe(20_000)
    expect(made.pageFileSize).toBeLessThan(16 * 2 ** 40)
  })

  it('divides a run that lies over the border of two mappings', () => {
    const locked = { flags: MAP.PRIVATE | MAP.ANONYMOUS | MAP.LOCKED }
    const { plan: made, set } = plan({
      processes: [
        { pid: 50, vmas: [vma(A, 2), vma(A + 2n * PAGE, 2, locked), vma(A + 4n * PAGE, 2)], pages: [[A + PAGE, 4, 1]] },
      ],
    })
    expect(made.copies.map(({ source, length }) => [source.offset, length])).toEqual([
      [0, 4096],
      [3 * 4096, 4096],
    ])
    expect(made.kept.get(50)).toEqual([{ sourceOffset: 4096, length: 8192 }])
    expect(readPagemap(set, 'pagemap-50.img').runs).toMatchObject([
      { start: A + 2n * PAGE, end: A + 4n * PAGE, offset: 0 },
    ])
  })

  it('keeps single pages in the image too, over what the page file has', () => {
    const { plan: made, set } = plan(
      { processes: [{ pid: 50, vmas: [vma(A, 8)], pages: [[A, 8, 1]] }] },
      { keepOut: [A + PAGE, A + 2n * PAGE, A + 6n * PAGE] },
    )
    expect(made.copies).toHaveLength(1)
    expect(made.kept.get(50)).toEqual([
      { sourceOffset: 4096, length: 8192 },
      { sourceOffset: 6 * 4096, length: 4096 },
    ])
    expect(readPagemap(set, 'pagemap-50.img').runs.map(({ start, end }) => [start - A, end - A])).toEqual([
      [PAGE, 3n * PAGE],
      [6n * PAGE, 7n * PAGE],
    ])
  })

  it('converts of a huge, sparse mapping what holds pages', () => {
    const huge = Number((1n << 40n) / PAGE)
    const far = A + (1n << 39n)
    const { vmas, plan: made } = plan({
      // The first two stretches are near each other, so they become one.
      processes: [
        {
          pid: 50,
          vmas: [vma(A, huge)],
          pages: [
            [A + PAGE, 1, 1],
            [A + 100n * PAGE, 2, 2],
            [far, 1, 4],
          ],
        },
      ],
    })
    expect(vmas.map((one) => [one.start - A, one.end - A, isConverted(one)])).toEqual([
      [0n, PAGE, false],
      [PAGE, 102n * PAGE, true],
      [102n * PAGE, 1n << 39n, false],
      [1n << 39n, (1n << 39n) + PAGE, true],
      [(1n << 39n) + PAGE, 1n << 40n, false],
    ])
    expect(made.pageFileSize).toBeLessThan(4 * GAP)
  })

  const { REGULAR, ANON_PRIVATE, ANON_SHARED, STACK, FILE_PRIVATE, FILE_SHARED, MEMFD, SHSTK, GUARD } = VMA_STATUS
  const PRIVATE_ANONYMOUS = MAP.PRIVATE | MAP.ANONYMOUS
  it.each([
    ['locked', { flags: PRIVATE_ANONYMOUS | MAP.LOCKED }],
    ['of huge pages', { flags: PRIVATE_ANONYMOUS | MAP.HUGETLB }],
    ['growing downwards', { flags: PRIVATE_ANONYMOUS | MAP.GROWSDOWN }],
    ['droppable', { flags: MAP.ANONYMOUS | MAP.DROPPABLE }],
    ['wiped on fork', { madv: 1n << BigInt(MADV.WIPEONFORK) }],
    ['a stack', { status: REGULAR | ANON_PRIVATE | STACK }],
    ['a shadow stack', { status: REGULAR | ANON_PRIVATE | SHSTK }],
    ['shared', { status: REGULAR | ANON_SHARED, flags: MAP.SHARED | MAP.ANONYMOUS, shmid: 7n }],
    ['a shared file', { status: REGULAR | FILE_SHARED, flags: MAP.SHARED, shmid: BigInt(PROGRAM_ID) }],
    ['a file in memory', { status: REGULAR | FILE_PRIVATE | MEMFD, flags: MAP.PRIVATE, shmid: BigInt(PROGRAM_ID) }],
  ])('leaves alone what is %s', (_, how) => {
    const shared = buildImageFile({
      family: 0x54564319,
      magic: 1,
      entries: [{ message: Uint8Array.of(8, 77) }],
    })
    writeFileSync(join(directory, 'pages-77.img'), '')
    const { vmas, plan: made } = plan({
      processes: [{ pid: 50, vmas: [vma(A, 32, how)], pages: [[A, 32, 1]] }],
      more: { 'pagemap-shmem-7.img': shared },
    })
    expect(vmas.filter(isConverted)).toEqual([])
    expect(made.copies).toEqual([])
    // Its pages stay as they are.
    expect(made.kept.has(50)).toBe(false)
  })

  it.each([[true], [false]])(
    "gives each fork a JVM's performance data of its own, memory shared or not (%s)",
    (shared) => {
      const file = { status: REGULAR | FILE_SHARED, flags: MAP.SHARED, shmid: 5n, pgoff: PAGE }
      const { vmas, plan: made } = plan(
        {
          processes: [{ pid: 50, vmas: [vma(A, 8, file), vma(A + 8n * PAGE, 1)], pages: [[A + 8n * PAGE, 1, 1]] }],
          files: [regular(5, '/tmp/hsperfdata_root/50')],
        },
        { shared },
      )
      expect(vmas.map(isConverted)).toEqual([true, shared])
      expect([vmas[0]!.flags, vmas[0]!.status]).toEqual([MAP.PRIVATE, REGULAR | FILE_PRIVATE])
      expect(made.copies[0]).toMatchObject({
        source: { path: '/tmp/hsperfdata_root/50', offset: 4096 },
        length: 8 * 4096,
      })
    },
  )

  it('gives two processes that map the same addresses a file entry each', () => {
    const one = { vmas: [vma(A, 1)], pages: [[A, 1, 1]] as [bigint, number, number][] }
    const { set } = plan({
      processes: [
        { pid: 50, ...one },
        { pid: 60, ppid: 50, sid: 50, ...one },
      ],
    })
    const ids = [50, 60].map((pid) => set.memory(pid).vmas[0]!.shmid)
    expect(ids[0]).not.toBe(ids[1])
    const paths = new Map(set.files().map(({ id, regular }) => [BigInt(id), regular?.name]))
    expect(ids.map((id) => paths.get(id))).toEqual(['/store/page-file', '/store/page-file'])
  })

  it('has guard pages where they were, inside of what maps the page file', () => {
    const guard = vma(A + 2n * PAGE, 1, { status: GUARD, prot: 0, flags: 0 })
    const { vmas } = plan({ processes: [{ pid: 50, vmas: [vma(A, 4), guard], pages: [[A, 2, 1]] }] })
    expect(vmas.map(isConverted)).toEqual([true, false])
    expect(vmas[1]).toEqual(guard)
  })

  it('leaves alone a mapping that touches a range which it was told of', () => {
    const range = { start: A + 3n * PAGE, end: A + 4n * PAGE }
    const { vmas } = plan(
      { processes: [{ pid: 50, vmas: [vma(A, 4), vma(A + 4n * PAGE, 4)], pages: [[A, 8, 1]] }] },
      { leaveAlone: [range] },
    )
    expect(vmas.map(isConverted)).toEqual([false, true])
  })

  describe('of files', () => {
    const mapped = (pages: number) =>
      vma(A, pages, { status: REGULAR | FILE_PRIVATE, flags: MAP.PRIVATE, shmid: 5n, pgoff: 3n * PAGE })
    const dirty = (from: number, pages: number): [bigint, number, number] => [A + BigInt(from) * PAGE, pages, 1]
    const files = [regular(5, '/lib/big.so', { size: 1_000_000n })]

    it('that were written to becomes the file with the written pages over it', () => {
      const { vmas, plan: made } = plan({
        processes: [{ pid: 50, vmas: [mapped(200)], pages: [dirty(10, 10), dirty(25, 7), dirty(150, 20)] }],
        files,
      })
      // 10 to 31 with a small hole, 150 to 169: two stretches.
      expect(vmas.map((one) => [(one.start - A) / PAGE, (one.end - A) / PAGE, isConverted(one)])).toEqual([
        [0n, 10n, false],
        [10n, 32n, true],
        [32n, 150n, false],
        [150n, 170n, true],
        [170n, 200n, false],
      ])
      // The parts that stay map what they mapped.
      for (const one of vmas.filter((part) => !isConverted(part))) {
        expect([one.shmid, one.pgoff - 3n * PAGE]).toEqual([5n, one.start - A])
      }
      const file = made.copies.filter(({ source }) => source.kind === 'file')
      expect(file.map(({ source, length }) => [source.offset, length])).toEqual([
        [13 * 4096, 22 * 4096],
        [153 * 4096, 20 * 4096],
      ])
      const target = (page: number) => Number(vmas[1]!.pgoff) + (page - 10) * 4096
      expect(made.copies.filter(({ source }) => source.kind === 'pages').slice(0, 2)).toEqual([
        { source: { kind: 'pages', pid: 50, offset: 0 }, target: target(10), length: 10 * 4096 },
        { source: { kind: 'pages', pid: 50, offset: 10 * 4096 }, target: target(25), length: 7 * 4096 },
      ])
      // Written pages come after what they lie over.
      expect(made.copies.findIndex(({ source }) => source.kind === 'pages')).toBe(2)
    })

    it('stays in the image where few pages were written', () => {
      const { vmas } = plan({ processes: [{ pid: 50, vmas: [mapped(200)], pages: [dirty(10, 15)] }], files })
      expect(vmas.filter(isConverted)).toEqual([])
    })

    it('stays in the image where the file is another one by now', () => {
      const tiny = { processes: [{ pid: 50, vmas: [mapped(200)], pages: [dirty(10, 100)] }], files }
      expect(plan(tiny, { unchanged: false }).vmas.filter(isConverted)).toEqual([])
    })

    it('stays in the image where the path does not lead to the file any more', () => {
      const remap = framed(RemapEntry, [{ fileId: 5, remapId: 6, type: 0 }])
      const tiny = {
        processes: [{ pid: 50, vmas: [mapped(200)], pages: [dirty(10, 100)] }],
        files: [...files, regular(6, '/lib/link_remap.6')],
        more: { 'remap-fpath.img': remap },
      }
      expect(plan(tiny).vmas.filter(isConverted)).toEqual([])
    })
  })
})

describe('deriving', () => {
  const pages = (count: number): TinyImage => ({
    processes: [
      {
        pid: 50,
        threads: [{ id: 50, clearTidAddr: A + PAGE + 720n }],
        vmas: [vma(A, count)],
        pages: [[A, count, 1]],
        words: [[A + PAGE + 720n, word(50, 4)]],
      },
    ],
  })
  const derive = (tiny: TinyImage) => {
    image(tiny)
    const fork = new ForkImage(directory, { deathSignal: true })
    return fork.derive(new Map(fork.ids.map((id) => [id, id + 1000])))
  }

  it('writes a few files and links the others, under the new ids', () => {
    const { files, links, rootPid, pids } = derive(pages(4))
    expect([rootPid, pids]).toEqual([1050, [1050]])
    expect([...files.keys()].sort()).toEqual(['core-1050.img', 'pages-1.img', 'pstree.img'])
    expect(Object.fromEntries(links)).toEqual({
      'fdinfo-1.img': 'fdinfo-1.img',
      'files.img': 'files.img',
      'fs-1050.img': 'fs-50.img',
      'ids-1050.img': 'ids-50.img',
      'inventory.img': 'inventory.img',
      'mm-1050.img': 'mm-50.img',
      'pagemap-1050.img': 'pagemap-50.img',
    })
    expect(Buffer.from(files.get('pages-1.img')!).readInt32LE(4096 + 720)).toBe(1050)
  })

  it.each([[false], [true]])(
    'takes large memory from a parent image, but for pages with ids (as CRIU 4.1: %s)',
    (version41) => {
      const many = 300
      const { files, links } = derive({ ...pages(many), version41 })
      expect(links.get('parent/pages-1.img')).toBe('pages-1.img')
      expect(links.get('parent/pagemap-1050.img')).toBe('pagemap-50.img')
      const bytes = Buffer.from(files.get('pages-1.img')!)
      expect(bytes).toHaveLength(4096)
      expect([bytes[0], bytes.readInt32LE(720)]).toEqual([2, 1050])
      const [, ...rest] = parseImageFile('pagemap', files.get('pagemap-1050.img')!).entries
      const entries = rest.map(({ message }) => decode(PagemapEntry, message))
      expect(
        entries.map(({ vaddr, compatPages, pages, flags }) => [
          vaddr - A,
          version41 ? compatPages : Number(pages),
          flags,
        ]),
      ).toEqual([
        [0n, 1, PAGEMAP.PARENT],
        [PAGE, 1, PAGEMAP.PRESENT],
        [2n * PAGE, many - 2, PAGEMAP.PARENT],
      ])
    },
  )

  it('gives two forks files of their own', () => {
    image(pages(4))
    const fork = new ForkImage(directory, { deathSignal: false })
    const first = fork.derive(new Map([[50, 111]]))
    const second = fork.derive(new Map([[50, 222]]))
    const remembered = [first, second].map(({ files }) =>
      Buffer.from(files.get('pages-1.img')!).readInt32LE(4096 + 720),
    )
    expect(remembered).toEqual([111, 222])
  })
})

describe('what an image holds', () => {
  it('are the files that it needs unchanged, mapped ones and open ones', () => {
    const mapped = vma(A, 1, { status: VMA_STATUS.REGULAR | VMA_STATUS.FILE_PRIVATE, shmid: 1n, flags: MAP.PRIVATE })
    const files = [
      regular(1, '/lib/a.so'),
      regular(2, '/etc/read'),
      regular(3, '/var/log', { flags: OPEN.WRONLY }),
      regular(4, 'relative'),
    ]
    const set = image({ processes: [{ pid: 50, vmas: [mapped] }], files })
    expect(neededFiles(set)).toEqual([
      { path: '/lib/a.so', use: 'mapped' },
      { path: '/etc/read', use: 'open' },
      { path: '/bin/tiny', use: 'mapped' },
    ])
    expect(contentsOf(set)).toMatchObject({
      processes: [{ pid: 50, comm: 'tiny', threads: 1, mappings: 1, mappedBytes: { privateFile: 4096 } }],
      files: { REG: 5 },
    })
  })
})
