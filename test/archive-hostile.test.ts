/** Archives that are damaged, or made to do harm: each is refused, and nothing is left of it. */

import { execFileSync } from 'node:child_process'
import { createHash, generateKeyPairSync } from 'node:crypto'
import { statfsSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import { gzipSync } from 'node:zlib'
import fc from 'fast-check'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { BlockWriter, COMPRESSIONS, type Compression } from '../src/generations/archive/blocks.js'
import { CONTENTS_NAME } from '../src/generations/archive/contents.js'
import { BLOCK_BYTES, END, header } from '../src/generations/archive/tar.js'
import { encodeRuns } from '../src/generations/checksum.js'
import { canonical } from '../src/generations/manifest.js'
import type { Store } from '../src/generations/store.js'
import {
  changedHeader,
  createWhole,
  type Entry,
  entriesOf,
  exported,
  forged,
  imported,
  importedFrom,
  type Loose,
  packed,
  unpacked,
  writeLibrary,
} from './fixtures/archives.js'
import { failure, PAGE_FILE, Workshop } from './fixtures/generations.js'

const shop = new Workshop()
let other: Store
/** By compression; signed, so that a signature is among the members. */
const archives = new Map<Compression, Buffer>()
const plain = () => archives.get('none')!

beforeAll(async () => {
  const store = await shop.open()
  other = await shop.open({ name: 'other' })
  const generation = await createWhole(store, { files: [writeLibrary(shop.directory)] })
  const { privateKey } = generateKeyPairSync('ed25519')
  for (const compress of COMPRESSIONS) {
    archives.set(compress, (await exported(generation, { compress, sign: privateKey })).bytes)
  }
})

afterAll(() => shop[Symbol.asyncDispose]())

const sha256 = (bytes: Uint8Array) => createHash('sha256').update(bytes).digest('hex')

async function refusal(bytes: Buffer): Promise<string> {
  const { happened } = await failure('ARCHIVE_INVALID', () => imported(other, bytes))
  expect(entriesOf(other)).toEqual([])
  return happened
}

describe('an archive that is cut short', () => {
  test('at any border of a member is refused', async () => {
    let at = 0
    const borders = [0]
    for (const { content } of unpacked(plain())) {
      borders.push(at + BLOCK_BYTES, at + BLOCK_BYTES + content.length)
      at += BLOCK_BYTES + Math.ceil(content.length / BLOCK_BYTES) * BLOCK_BYTES
      borders.push(at)
    }
    expect(at).toBe(plain().length - END.length)
    for (const border of [...borders, plain().length - BLOCK_BYTES, plain().length - 1]) {
      expect(await refusal(plain().subarray(0, border))).toMatch(/cut short|it is empty|does not begin with the list/)
    }
  })

  test.each(COMPRESSIONS)('anywhere is refused (%s)', async (compress) => {
    const bytes = archives.get(compress)!
    await fc.assert(
      fc.asyncProperty(fc.nat(bytes.length - 1), async (length) => {
        expect(await refusal(bytes.subarray(0, length))).toMatch(/cut short|it is empty|does not begin|another program/)
      }),
      { numRuns: 15 },
    )
  })

  test.each(COMPRESSIONS)('or goes on after its end is refused (%s)', async (compress) => {
    for (const more of [Buffer.from([0]), Buffer.alloc(BLOCK_BYTES), archives.get(compress)!]) {
      expect(await refusal(Buffer.concat([archives.get(compress)!, more]))).toMatch(/cut short|damaged|follows after/)
    }
  })
})

describe('one bit that differs', () => {
  test.each(COMPRESSIONS)('anywhere is seen (%s)', async (compress) => {
    await fc.assert(
      fc.asyncProperty(fc.nat(archives.get(compress)!.length - 1), fc.nat(7), async (at, bit) => {
        const bytes = Buffer.from(archives.get(compress)!)
        bytes[at]! ^= 1 << bit
        await refusal(bytes)
      }),
      { numRuns: 40 },
    )
  })

  test('in each member, its header or the zeros after it is seen', async () => {
    let at = 0
    for (const { content } of unpacked(plain())) {
      const padded = Math.ceil(content.length / BLOCK_BYTES) * BLOCK_BYTES
      // Name, mode, time, kind; then content and what follows.
      for (const place of [
        0,
        101,
        140,
        156,
        300,
        BLOCK_BYTES,
        BLOCK_BYTES + content.length - 1,
        BLOCK_BYTES + padded - 1,
      ]) {
        const bytes = Buffer.from(plain())
        bytes[at + place]! ^= 4
        await refusal(bytes)
      }
      at += BLOCK_BYTES + padded
    }
  })
})

describe('a member', () => {
  const withHeader = (change: (block: Buffer) => void) => {
    const entries = unpacked(plain())
    const third = entries[2]!
    third.header = changedHeader(third.name, third.content.length, change)
    return packed(entries)
  }
  const kind = (type: string, target = '') =>
    withHeader((block) => {
      block.write(type, 156, 'latin1')
      block.write(target, 157, 'latin1')
    })
  const named = (name: string) => withHeader((block) => block.fill(0, 0, 100).write(name, 0, 'latin1'))
  const image = () => unpacked(plain())[2]!.name

  test.each<[string, () => Buffer, string | RegExp]>([
    ['that is a symbolic link', () => kind('2', '/etc/passwd'), 'is a symbolic link'],
    ['that is a hard link', () => kind('1', '/etc/passwd'), 'is a hard link'],
    ['that is a character device', () => kind('3'), 'is a device'],
    ['that is a block device', () => kind('4'), 'is a device'],
    ['that is a directory', () => kind('5'), 'is a directory'],
    ['that is a FIFO', () => kind('6'), 'is a FIFO'],
    ['with an extended header', () => kind('x'), 'is not as it was written'],
    ['with a long name of GNU tar', () => kind('L'), 'is not as it was written'],
    ['above the directory', () => named('../../etc/cron.d/x'), 'leads out of it'],
    ['of another directory', () => named('/etc/cron.d/x'), 'leads out of it'],
    ['that has a prefix', () => withHeader((block) => block.write('/etc', 345)), 'leads out of it'],
    ['that is set-user-id', () => withHeader((block) => block.write('0004755', 100)), 'is not as it was written'],
    ['that is not in the list', () => named('image/more.img'), 'is not in its list'],
    ['that its list has later', () => packed(unpacked(plain()).filter((_, i) => i !== 2)), 'is missing'],
    ['that is the last and is missing', () => packed(unpacked(plain()).slice(0, -1)), 'it ends before its member'],
    [
      'that stands there twice',
      () => packed(unpacked(plain()).flatMap((one, i) => (i === 2 ? [one, one] : one))),
      'is in it twice',
    ],
    ['with another size', () => withHeader((block) => block.write('00000000001\0', 124)), 'has 1 bytes, and'],
    [
      'with a size beyond all numbers',
      () => withHeader((block) => block.fill(0xff, 124, 136)),
      /has 18446744073709552000 bytes/,
    ],
    [
      'after the last',
      () => packed([...unpacked(plain()), { name: image(), content: Buffer.alloc(3) }]),
      'is in it twice',
    ],
  ])('%s is refused', async (_, make, words) => {
    expect(await refusal(make())).toMatch(words)
  })

  test('with another content is refused', async () => {
    const entries = unpacked(plain())
    const pages = entries.at(-1)!
    pages.content = Buffer.from(pages.content)
    pages.content[5000]! ^= 1
    expect(await refusal(packed(entries))).toBe(`its member ${PAGE_FILE} has another content than its list says`)
  })
})

describe('a list', () => {
  /** Without the signature, which would not be one of it. */
  const unsigned = () => packed(unpacked(plain()).filter(({ name }) => !name.endsWith('.sig')))
  const forge = (change: (contents: Loose, entries: Entry[]) => void) => forged(unsigned(), change)
  const member = (contents: Loose, name: string) => contents.members.find((one: Loose) => one.name === name)

  test('as it is is accepted', async () => {
    const made = await imported(
      other,
      forge(() => {}),
    )
    await other.prune({ numbers: [made.number] })
  })

  test.each([
    '../x.img',
    'image/../x.img',
    '/etc/x.img',
    'image/.img',
    'image/a/b.img',
    'image/x',
    'manifest.json',
    'leases/1',
    'files/0-x',
    'ephemeral',
    'memory-/x.warmfork-pages',
    '',
  ])('that names a member %j is refused', async (name) => {
    const bytes = forge((contents, entries) => {
      contents.members[0].name = name
      entries[0]!.name = name
    })
    expect(await refusal(bytes)).toMatch(/which no generation has/)
  })

  test.each<[string, (contents: Loose) => void, string | RegExp]>([
    ['a member twice', ({ members }) => members.unshift(members[0]), 'twice'],
    ['a page file without its stretches', ({ members }) => members.splice(-2, 1), 'where its data lie'],
    ['stretches without a page file', ({ members }) => members.splice(-1, 1), 'where its data lie'],
    ['stretches of gigabytes', ({ members }) => Object.assign(members.at(-2), { bytes: 1 << 30 }), 'more than any'],
    ['an image with holes', ({ members }) => Object.assign(members[0], { apparentBytes: 9 }), 'where its data lie'],
    ['no members', (contents) => Object.assign(contents, { members: [] }), 'does not say what it should'],
    ['something unknown', (contents) => Object.assign(contents, { script: 'x' }), 'does not say what it should'],
    [
      'a checksum that is none',
      ({ members }) => Object.assign(members[0], { sha256: 'x' }),
      'does not say what it should',
    ],
    [
      'a file below the working directory',
      ({ files }) => Object.assign(files[0], { path: 'x' }),
      'does not say what it should',
    ],
    ['a negative size', ({ members }) => Object.assign(members[0], { bytes: -1 }), 'does not say what it should'],
    ['half a byte', ({ members }) => Object.assign(members[0], { bytes: 0.5 }), 'does not say what it should'],
    [
      'a number beyond the exact ones',
      ({ members }) => Object.assign(members[0], { bytes: 2 ** 53 }),
      'does not say what it should',
    ],
    [
      'numbers whose sum is beyond them',
      ({ members }) =>
        members.splice(0, 2, ...members.slice(0, 2).map((one: Loose) => ({ ...one, bytes: 2 ** 53 - 1 }))),
      'more bytes than there are numbers for',
    ],
    ['another format', (contents) => Object.assign(contents, { format: 'other' }), 'is not one of'],
    ['an older version', (contents) => Object.assign(contents, { formatVersion: 0 }), 'does not say what it should'],
  ])('with %s is refused', async (_, change, words) => {
    expect(await refusal(forge(change))).toMatch(words)
  })

  const withList = (text: string) =>
    packed([{ name: CONTENTS_NAME, content: Buffer.from(text) }, ...unpacked(unsigned()).slice(1)])
  const list = () => unpacked(unsigned())[0]!.content.toString()

  test.each<[string, () => string]>([
    ['that is no JSON', () => 'x'],
    ['that is null', () => 'null\n'],
    ['with a blank more', () => ` ${list()}`],
    ['with a key twice', () => list().replace('"format":', '"format": "x",\n  "format":')],
    ['with an endless number', () => list().replace(/"rssBytes": \d+/, '"rssBytes": 1e999')],
    ['that is nested without end', () => `${'['.repeat(100_000)}${']'.repeat(100_000)}`],
    [
      'with an engine’s data nested without end',
      () => list().replace(/"engineData": \{/, `"engineData": ${'['.repeat(9000)}${']'.repeat(9000)}, "x": {`),
    ],
  ])('%s is refused', async (_, text) => {
    expect(await refusal(withList(text()))).toMatch(/^its list/)
  })

  test('larger than any is refused before it is read', async () => {
    const head = header(CONTENTS_NAME, 17 << 20)
    expect(await refusal(Buffer.concat([head, plain()]))).toMatch(/has 17825792 bytes, and 16777216 at most/)
  })

  test('of more than the disk holds is refused before anything is written', async () => {
    const { bavail, bsize } = statfsSync(shop.directory)
    const bytes = forge((contents) => Object.assign(member(contents, PAGE_FILE), { bytes: bavail * bsize + 4096 }))
    await failure('DISK_FULL', () => imported(other, bytes))
    expect(entriesOf(other)).toEqual([])
  })

  const GIB = 2 ** 30
  test.each<[string, [number | bigint, number | bigint][], string]>([
    [
      'overlap',
      [
        [0, 8192],
        [4096, 4096],
      ],
      'overlap or are not in order',
    ],
    [
      'are not in order',
      [
        [GIB, 4096],
        [0, 8192],
      ],
      'overlap or are not in order',
    ],
    [
      'reach beyond the file',
      [
        [0, 8192],
        [GIB, 8192],
      ],
      'reach beyond',
    ],
    [
      'reach beyond all numbers',
      [
        [0, 8192],
        [2n ** 64n - 1n, 4096],
      ],
      'reach beyond',
    ],
    [
      'are longer than all numbers',
      [
        [0, 2n ** 63n],
        [GIB, 4096],
      ],
      'reach beyond',
    ],
    [
      'are empty',
      [
        [0, 8192],
        [8192, 0],
        [GIB, 4096],
      ],
      'hold an empty one',
    ],
    ['hold less than the file', [[0, 8192]], 'hold 8192 bytes and it has 12288'],
  ])('whose stretches %s is refused', async (_, runs, words) => {
    const content = Buffer.alloc(runs.length * 16)
    for (const [i, value] of runs.flat().entries()) content.writeBigUInt64LE(BigInt(value), i * 8)
    const bytes = forge((contents, entries) => {
      const name = `${PAGE_FILE}.runs`
      Object.assign(member(contents, name), { bytes: content.length, sha256: sha256(content) })
      entries.find((entry) => entry.name === name)!.content = content
    })
    expect(await refusal(bytes)).toContain(words)
  })

  test('whose stretches are not whole pairs is refused', async () => {
    const bytes = forge((contents, entries) => {
      const content = encodeRuns([[0, 8192]]).subarray(0, 15)
      const name = `${PAGE_FILE}.runs`
      Object.assign(member(contents, name), { bytes: 15, sha256: sha256(content) })
      entries.find((entry) => entry.name === name)!.content = content
    })
    expect(await refusal(bytes)).toContain('are not whole pairs')
  })

  test('of an image that maps a page file of elsewhere is refused', async () => {
    const bytes = forge((contents) => {
      contents.generation.directory = '/somewhere/else'
    })
    expect(await refusal(bytes)).toMatch(/its image maps the page file .*, which is not in it/)
  })
})

describe('what is no archive', () => {
  test.each<[string, () => Buffer]>([
    ['nothing', () => Buffer.alloc(0)],
    ['a byte', () => Buffer.from('x')],
    ['text', () => Buffer.from('text '.repeat(1000))],
    ['zeros', () => Buffer.alloc(20_000)],
    ['a tar of another program', () => execFileSync('tar', ['-cf', '-', '-C', shop.directory, 'library.so'])],
    ['a gzip file of another program', () => gzipSync(plain())],
    ['a zstd file of another program', () => execFileSync('zstd', ['-cq'], { input: plain() })],
    ['a gzip bomb', () => gzipSync(Buffer.alloc(64 << 20))],
  ])('%s is refused', async (_, make) => {
    expect(await refusal(make())).toMatch(/^it (is empty|is cut short|does not begin|was compressed by another)/)
  })

  test('a stream that breaks is said to be broken', async () => {
    async function* breaking() {
      yield plain().subarray(0, 3000)
      throw new Error('the network is gone')
    }
    await expect(importedFrom(other, breaking())).rejects.toThrow('the network is gone')
    expect(entriesOf(other)).toEqual([])
  })
})

describe.each(['gzip', 'zstd'] as const)('a bomb (%s)', (compress) => {
  /** A member of a gibibyte of zeros, of which its list says something else. */
  async function* bomb(declaredBytes: number): AsyncGenerator<Buffer> {
    const pieces: Buffer[] = []
    const writer = new BlockWriter(compress, async (bytes) => void pieces.push(bytes))
    const entries = unpacked(packed(unpacked(plain()).filter(({ name }) => !name.endsWith('.sig'))))
    const contents = JSON.parse(entries[0]!.content.toString())
    Object.assign(contents.members[0], { bytes: declaredBytes })
    const text = Buffer.from(canonical(contents))
    try {
      for (const part of [header(CONTENTS_NAME, text.length), text, Buffer.alloc(-text.length & (BLOCK_BYTES - 1))]) {
        await writer.write(part)
      }
      await writer.write(header(contents.members[0].name, declaredBytes))
      const zeros = Buffer.alloc(1 << 20)
      for (let mib = 0; mib < 1024; mib++) {
        await writer.write(zeros)
        yield* pieces.splice(0)
      }
      await writer.end()
      yield* pieces.splice(0)
    } finally {
      await writer.close()
    }
  }

  test.each<[string, number]>([
    ['more than was declared', 1000],
    // Which is written to the disk until its checksum is found to be another: enough to see it once.
    ...(compress === 'gzip' ? [['as was declared', 2 ** 30] as [string, number]] : []),
  ])('of 1 GiB, %s, takes little memory', async (_, declaredBytes) => {
    const bytes: Buffer[] = []
    for await (const piece of bomb(declaredBytes)) bytes.push(piece)
    const before = process.memoryUsage().rss
    let most = before
    let done = false
    const watch = (async () => {
      while (!done) {
        most = Math.max(most, process.memoryUsage().rss)
        await sleep(5)
      }
    })()
    try {
      expect(await refusal(Buffer.concat(bytes))).toMatch(/another content|what follows its member|damaged|missing/)
    } finally {
      done = true
      await watch
    }
    expect(most - before).toBeLessThan(100 << 20)
  })
})
