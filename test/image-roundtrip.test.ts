import { spawnSync } from 'node:child_process'
import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { findCriu } from '../src/engines/criu/binary.js'
import { buildImageFile, type ImageFile, isRaw, parseImageFile } from '../src/image/image-file.js'
import { bytesOf, decode, encode, type Fields, type Message, OPAQUE, textOf } from '../src/image/message.js'
import * as schema from '../src/image/schema.js'
import { processTree } from '../src/linux/proc.js'
import { Laboratory, type Program } from './fixtures/forks.js'
import { compileC } from './runtimes/compile.js'
import { RUNTIME_CACHE, RUNTIMES, type Runtime } from './runtimes/index.js'

type AnyMessage = Message<Fields>

/** Which message each entry of a file is, by the file's name; undefined where schema.ts has none. */
function schemaOf(name: string, index: number, file: ImageFile): AnyMessage | undefined {
  const kinds: [RegExp, AnyMessage][] = [
    [/^inventory\./, schema.InventoryEntry],
    [/^pstree\./, schema.PstreeEntry],
    [/^core-/, schema.CoreEntry],
    [/^mm-/, schema.MmEntry],
    [/^pagemap-/, index === 0 ? schema.PagemapHead : schema.PagemapEntry],
    [/^files\./, schema.FileEntry],
    [/^fdinfo-/, schema.FdinfoEntry],
    [/^ids-/, schema.IdsEntry],
    [/^fs-/, schema.FsEntry],
    [/^tty-info\./, schema.TtyInfoEntry],
    [/^remap-fpath\./, schema.RemapEntry],
    [/^(pipes|fifo)-data\./, schema.PipeData],
    [/^sk-queues\./, schema.SocketPacket],
    [/^tcp-stream-/, schema.TcpStream],
    [/^ghost-file-/, index === 0 ? schema.GhostFile : schema.GhostChunk],
  ]
  expect(file.entries[index]).toBeDefined()
  return kinds.find(([pattern]) => pattern.test(name))?.[1]
}

/** Decodes into values of their own, and spoils what they were decoded from: nothing of the old bytes can come back. */
function rebuilt(of: AnyMessage, bytes: Uint8Array): Uint8Array {
  const original = Uint8Array.from(bytes)
  const fields = structuredClone(decode(of, original))
  original.fill(0xee)
  return encode(of, fields)
}

function rebuiltFile(name: string, bytes: Uint8Array, how: (index: number, file: ImageFile) => AnyMessage): Uint8Array {
  const file = parseImageFile(name, bytes)
  return buildImageFile({
    ...file,
    entries: file.entries.map((entry, index) => ({ ...entry, message: rebuilt(how(index, file), entry.message) })),
  })
}

const lab = new Laboratory()
afterAll(() => lab.close())

/** Images of one dump, by name. */
function imagesOf(directory: string): Map<string, Buffer> {
  const names = readdirSync(directory).filter((name) => name.endsWith('.img'))
  return new Map(names.map((name) => [name, readFileSync(join(directory, name))]))
}

/** Every framed file of a dump is the same after decoding and encoding: once with the schemas, once with none. */
function expectRoundTrip(directory: string): void {
  const images = imagesOf(directory)
  for (const [name, bytes] of images) {
    if (isRaw(name)) continue
    expect(
      Buffer.compare(
        rebuiltFile(name, bytes, (i, file) => schemaOf(name, i, file) ?? OPAQUE),
        bytes,
      ),
      name,
    ).toBe(0)
    expect(
      Buffer.compare(
        rebuiltFile(name, bytes, () => OPAQUE),
        bytes,
      ),
      `${name}, opaque`,
    ).toBe(0)
  }
}

function runtime(name: RegExp): Runtime {
  return RUNTIMES.find((one) => name.test(one.name))!
}

describe('images of real dumps', () => {
  it.each([
    ['Node', /^Node \d+$/],
    ['a JVM', /^JDK 17, Serial$/],
    ['CPython', /^CPython$/],
    ['a shell with a child', /^bash/],
  ])(
    'are built anew byte for byte: %s',
    async (_, name) => {
      const one = runtime(name)
      await one.install(RUNTIME_CACHE)
      const program = lab.start(one.command(RUNTIME_CACHE))
      await program.talk.untilReady()
      const directory = await lab.dump(program)
      await lab.end(program)
      expectRoundTrip(directory)
    },
    600_000,
  )

  it('are built anew byte for byte: 64 threads', async () => {
    const program = lab.start([await compileC('threads64')])
    await program.talk.untilReady()
    const directory = await lab.dump(program)
    await lab.end(program)
    expect([...imagesOf(directory).keys()].filter((name) => name.startsWith('core-'))).toHaveLength(65)
    expectRoundTrip(directory)
  }, 300_000)
})

describe('an image with one of each', () => {
  let program: Program
  let directory: string
  let images: Map<string, Buffer>

  beforeAll(async () => {
    await runtime(/^CPython$/).install(RUNTIME_CACHE)
    const script = join(import.meta.dirname, 'fixtures/image/one-of-each.py')
    program = lab.start(['/usr/bin/python3', script, lab.fresh('one'), '--all'])
    await program.talk.untilReady()
    directory = lab.fresh('dump')
    // By hand: the engine closes connections in the image, and keeps unlinked files whole.
    const [criu, ...before] = findCriu().argv
    const files = ['--ghost-fiemap', '--ghost-limit', '64M', '--file-locks']
    const options = [...files, '--tcp-established', '--network-lock', 'skip', '--leave-running']
    const args = ['dump', '-t', String(program.pid), '-D', directory, '-o', 'dump.log', '--manage-cgroups=ignore']
    const { status } = spawnSync(criu!, [...before, ...args, ...options])
    expect(status, readFileSync(join(directory, 'dump.log'), 'utf8')).toBe(0)
    images = imagesOf(directory)
  }, 120_000)

  afterAll(async () => {
    if (program) await lab.end(program)
  })

  it('has them all', () => {
    const kinds = new Set([...images.keys()].map((name) => name.replace(/(-[0-9a-f]+)?\.img$/, '')))
    const data = ['fifo-data', 'pipes-data', 'sk-queues', 'tcp-stream', 'tty-data', 'ghost-file', 'pagemap-shmem']
    for (const kind of [...data, 'tty-info', 'memfd', 'remap-fpath', 'filelocks']) expect([...kinds]).toContain(kind)
    const types = new Set(
      parseImageFile('files.img', images.get('files.img')!).entries.map(
        ({ message }) => decode(schema.FileEntry, message).type,
      ),
    )
    const { EXT, FANOTIFY, NS, PACKETSK, TUNF, BPFMAP, ...asked } = schema.FILE_TYPE
    for (const [name, type] of Object.entries(asked)) expect(types.has(type), name).toBe(true)
    expect([EXT, FANOTIFY, NS, PACKETSK, TUNF, BPFMAP].some((type) => types.has(type))).toBe(false)
  })

  it('is built anew byte for byte', () => expectRoundTrip(directory))

  it.each([
    ['pipes-data.img', 'in the pipe'],
    ['fifo-data.img', 'in the fifo'],
    ['sk-queues.img', 'and another packet'],
    ['tcp-stream', 'unread by the server'],
    ['ghost-file', 'unlinkedunlinked'],
  ])('keeps the data of %s beside the message', (start, words) => {
    const [name, bytes] = [...images].find(([name, bytes]) => name.startsWith(start) && bytes.includes(words))!
    const { entries } = parseImageFile(name, bytes)
    expect(entries.some(({ payload }) => payload && Buffer.from(payload).includes(words))).toBe(true)
    expect(entries.some(({ message }) => Buffer.from(message).includes(words))).toBe(false)
  })

  it('has an unlinked file with holes in chunks', () => {
    const chunked = [...images].flatMap(([name, bytes]) => {
      if (!name.startsWith('ghost-file-')) return []
      const { entries } = parseImageFile(name, bytes)
      return decode(schema.GhostFile, entries[0]!.message).chunks ? [entries] : []
    })
    expect(chunked.length).toBeGreaterThan(0)
    const far = chunked.flat().find(({ payload }) => payload && Buffer.from(payload).includes('far behind'))!
    expect(decode(schema.GhostChunk, far.message).offset).toBe(3n << 20n)
    expect(far.payload).toHaveLength(Number(decode(schema.GhostChunk, far.message).length))
  })

  it('changes those bytes that hold a changed field, and no others', () => {
    const bytes = images.get('pstree.img')!
    const file = parseImageFile('pstree.img', bytes)
    const entry = decode(schema.PstreeEntry, file.entries[0]!.message)
    // Another id that takes as many bytes.
    const sid = entry.sid ^ 1
    const message = encode(schema.PstreeEntry, { ...entry, sid })
    const edited = buildImageFile({ ...file, entries: [{ message }, ...file.entries.slice(1)] })
    expect(edited).toHaveLength(bytes.length)
    const upTo = encode(schema.PstreeEntry, { ...entry, sid: 0, threads: [] }).length - 1
    // Two magic numbers and a length stand before the message.
    expect([...bytes.keys()].filter((at) => bytes[at] !== edited[at])).toEqual([12 + upTo])
    expect(decode(schema.PstreeEntry, parseImageFile('pstree.img', edited).entries[0]!.message)).toEqual({
      ...entry,
      sid,
    })
  })

  it('keeps fields that no table knows, where they stood', () => {
    const only = encode(schema.PstreeEntry, { pid: 300, ppid: 0, pgid: 300, sid: 300, threads: [300, 301] })
    const strange = Buffer.concat([
      Buffer.from([0x3a, 2, 1, 2]),
      only,
      Buffer.from([0x40, 5, 0x49, 1, 2, 3, 4, 5, 6, 7, 8, 0x55, 9, 8, 7, 6]),
    ])
    const again = encode(schema.PstreeEntry, decode(schema.PstreeEntry, strange))
    expect(Buffer.from(again).toString('hex')).toBe(
      Buffer.concat([only, strange.subarray(0, 4), strange.subarray(4 + only.length)]).toString('hex'),
    )
  })

  it('is of the tree that it was taken of', () => {
    const { entries } = parseImageFile('pstree.img', images.get('pstree.img')!)
    const pids = entries.map(({ message }) => decode(schema.PstreeEntry, message).pid)
    expect(pids.sort()).toEqual(
      processTree(program.pid)
        .map(({ pid }) => pid)
        .sort(),
    )
  })
})

describe('text of an image', () => {
  it.each([
    ['ASCII', [0x2f, 0x61]],
    ['UTF-8', [0xc3, 0xa9, 0xf0, 0x9f, 0x98, 0x80]],
    ['no UTF-8', [0x2f, 0xff, 0x61, 0xc3, 0x28]],
    ['UTF-8 cut short', [0x61, 0xf0, 0x9f, 0x98]],
    ['a surrogate in UTF-8', [0xed, 0xb2, 0x80, 0x61]],
    ['an overlong form', [0xc0, 0xaf]],
    ['a byte order mark', [0xef, 0xbb, 0xbf, 0x61]],
  ])('gives the same bytes again: %s', (_, bytes) => {
    expect([...bytesOf(textOf(Uint8Array.from(bytes)))]).toEqual(bytes)
  })
})
