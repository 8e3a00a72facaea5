import {
  chmodSync,
  closeSync,
  mkdirSync,
  openSync,
  readFileSync,
  readSync,
  renameSync,
  rmSync,
  statSync,
  truncateSync,
  utimesSync,
  writeFileSync,
  writeSync,
} from 'node:fs'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import type { Generation } from '../src/generations/generation.js'
import { canonical, decodeManifest, encodeManifest, type Manifest } from '../src/generations/manifest.js'
import type { Store } from '../src/generations/store.js'
import { cpuInfo } from '../src/generations/surroundings.js'
import { create, failure, fill, PAGE_FILE, RUNS, surroundings, Workshop } from './fixtures/generations.js'

let shop: Workshop
let store: Store
let made: Generation

beforeEach(async () => {
  shop = new Workshop()
  store = await shop.open()
  made = await create(store)
})

afterEach(async () => {
  await shop[Symbol.asyncDispose]()
})

const FILES = ['image/core-1.img', 'image/pages-1.img', PAGE_FILE, `${PAGE_FILE}.runs`]

/** Flips one bit, in place. */
function flip(path: string, at: number): void {
  chmodSync(path, 0o600)
  const fd = openSync(path, 'r+')
  try {
    const byte = Buffer.alloc(1)
    readSync(fd, byte, 0, 1, at)
    byte[0]! ^= 1
    writeSync(fd, byte, 0, 1, at)
  } finally {
    closeSync(fd)
  }
}

/** Writes a manifest with a checksum that is right. */
function forge(changes: Record<string, unknown>): void {
  const path = join(made.directory, 'manifest.json')
  chmodSync(path, 0o600)
  writeFileSync(path, encodeManifest({ ...made.manifest, ...changes } as Manifest))
}

describe('a file of a generation', () => {
  test.each(FILES)('that has one bit changed is found by verify: %s', async (name) => {
    const path = join(made.directory, name)
    const { size } = statSync(path)
    for (const at of [0, Math.floor(size / 2), size - 1]) {
      flip(path, at)
      expect((await failure('GENERATION_CORRUPT', () => made.verify())).happened).toContain(name.replace('.runs', ''))
      flip(path, at)
      await made.verify()
    }
  })

  test('that has any one byte changed is found by verify', async () => {
    const path = join(made.directory, 'image/core-1.img')
    for (let at = 0; at < statSync(path).size; at++) {
      flip(path, at)
      await failure('GENERATION_CORRUPT', () => made.verify())
      flip(path, at)
    }
  })

  test('that has data in a hole is found by verify', async () => {
    const path = join(made.directory, PAGE_FILE)
    for (const at of [RUNS[0]![1], RUNS[1]![0] - 1, 1 << 29]) {
      flip(path, at)
      expect((await failure('GENERATION_CORRUPT', () => made.verify())).happened).toContain(PAGE_FILE)
      flip(path, at)
    }
    await made.verify()
  })

  test.each([...FILES, 'manifest.json'])('that is cut short is found when it is opened: %s', async (name) => {
    const path = join(made.directory, name)
    chmodSync(path, 0o600)
    truncateSync(path, statSync(path).size - 1)
    await failure('GENERATION_CORRUPT', () => store.get(1))
    await failure('GENERATION_CORRUPT', () => made.verify())
  })

  test.each([...FILES, 'manifest.json'])('that is missing is found when it is opened: %s', async (name) => {
    rmSync(join(made.directory, name))
    await failure('GENERATION_CORRUPT', () => store.get(1))
    await failure('GENERATION_CORRUPT', () => made.verify())
  })

  test.each(['image/core-2.img', 'x', 'files/y', 'ephemeral'])(
    'that does not belong there is found by verify: %s',
    async (name) => {
      writeFileSync(join(made.directory, name), '')
      expect((await failure('GENERATION_CORRUPT', () => made.verify())).happened).toContain(name)
    },
  )

  test.each(FILES)('that is a directory now is found when it is opened: %s', async (name) => {
    rmSync(join(made.directory, name))
    mkdirSync(join(made.directory, name))
    await failure('GENERATION_CORRUPT', () => store.get(1))
  })

  test('that is broken makes the list leave its generation out, with the reason, and the newest whole one is used', async () => {
    const second = await create(store)
    rmSync(join(second.directory, PAGE_FILE))
    const { generations, broken } = await store.survey()
    expect(generations.map(({ number }) => number)).toEqual([1])
    expect(broken).toEqual([
      { number: 2, directory: second.directory, error: expect.objectContaining({ code: 'GENERATION_CORRUPT' }) },
    ])
    expect((await store.newest())?.number).toBe(1)
  })
})

describe('the look before each fork', () => {
  test.each(FILES)('finds a changed byte: %s', async (name) => {
    flip(join(made.directory, name), 0)
    expect((await failure('GENERATION_CORRUPT', () => made.checkUntouched())).happened).toContain(name)
  })

  test('finds a change whose time of modification was set back', async () => {
    const path = join(made.directory, 'image/core-1.img')
    const fixed = new Date('2020-01-01T00:00:00Z')
    utimesSync(path, fixed, fixed)
    const opened = await store.get(1)
    flip(path, 0)
    utimesSync(path, fixed, fixed)
    await failure('GENERATION_CORRUPT', () => opened.checkUntouched())
  })

  test('finds a file that was replaced by one of the same content', async () => {
    const path = join(made.directory, 'image/core-1.img')
    writeFileSync(`${path}.new`, readFileSync(path))
    renameSync(`${path}.new`, path)
    await failure('GENERATION_CORRUPT', () => made.checkUntouched())
  })

  test('finds a missing file, a missing generation and a missing store, and says which', async () => {
    const second = await create(store)
    rmSync(join(made.directory, 'image/core-1.img'))
    await failure('GENERATION_CORRUPT', () => made.checkUntouched())
    rmSync(made.directory, { recursive: true })
    await failure('GENERATION_NOT_FOUND', () => made.checkUntouched())
    await failure('GENERATION_NOT_FOUND', () => made.lease(process.pid, 1))
    rmSync(store.directory, { recursive: true })
    await failure('STORE_GONE', () => second.checkUntouched())
    await failure('STORE_GONE', () => second.lease(process.pid, 1))
  })

  test('does not mind a change of mode', () => {
    chmodSync(join(made.directory, 'image/core-1.img'), 0o440)
    chmodSync(join(made.directory, PAGE_FILE), 0o440)
    made.checkUntouched()
    made.checkUntouched()
  })

  test('costs less than a millisecond', async () => {
    const big = await create(store, async (draft) => {
      for (let i = 0; i < 60; i++) writeFileSync(join(draft.imageDirectory, `x-${i}.img`), 'x')
      return fill(draft)
    })
    big.checkUntouched()
    const times = Array.from({ length: 50 }, () => {
      const before = performance.now()
      big.checkUntouched()
      return performance.now() - before
    }).sort((a, b) => a - b)
    expect(times[25]).toBeLessThan(1)
  })
})

describe('the manifest', () => {
  test('is read as it was written', () => {
    expect(decodeManifest(encodeManifest(made.manifest), 1)).toEqual(made.manifest)
  })

  test('is found corrupt whichever bit of it changed', () => {
    const text = readFileSync(join(made.directory, 'manifest.json'))
    for (let at = 0; at < text.length; at++) {
      const changed = Buffer.from(text)
      changed[at]! ^= 1 << (at % 7)
      expect(() => decodeManifest(changed.toString('utf8'), 1), `byte ${at}`).toThrow('GENERATION_CORRUPT')
    }
  })

  test('is found corrupt wherever it is cut, and with anything behind it', () => {
    const text = encodeManifest(made.manifest)
    for (let length = 0; length < text.length; length++) {
      expect(() => decodeManifest(text.slice(0, length), 1), `${length} bytes`).toThrow('GENERATION_CORRUPT')
    }
    expect(() => decodeManifest(`${text} `, 1)).toThrow('GENERATION_CORRUPT')
  })

  test.each(['null', '[]', '1', '""', '{}', ''])('is refused as %j', (text) => {
    expect(() => decodeManifest(text, 1)).toThrow('GENERATION_CORRUPT')
  })

  test('of a newer format is refused as one that does not fit, and is not pruned as corrupt', async () => {
    forge({ formatVersion: 2, somethingNew: true })
    expect((await failure('GENERATION_MISFIT', () => store.get(1))).happened).toContain('version 2')
    expect(await store.prune({ keep: 1 })).toEqual({ removed: [], kept: [] })
    expect((await store.survey()).broken[0]?.error.code).toBe('GENERATION_MISFIT')
  })

  test('of another generation is refused', async () => {
    forge({ number: 7 })
    expect((await failure('GENERATION_CORRUPT', () => store.get(1))).happened).toContain('generation 7')
  })

  test.each([
    { memory: 'shared' },
    { surprise: 1 },
    { files: { '../../etc/passwd': { bytes: 1, sha256: '0'.repeat(64) } } },
    { rssBytes: -1 },
    { createdAt: 'yesterday' },
  ])('that lacks what is needed is refused: %j', async (changes) => {
    forge(changes)
    await failure('GENERATION_CORRUPT', () => store.get(1))
  })

  test('has its keys in order', () => {
    expect(canonical({ b: [{ d: 1, c: undefined }], a: null })).toBe(canonical({ a: null, b: [{ d: 1 }] }))
  })
})

describe('a generation made in other surroundings', () => {
  test.each([
    ['criuVersion', { criuVersion: '4.3' }, 'CRIU was 4.2.1 and is 4.3 now'],
    [
      'command',
      { command: ['node', 'app.js', '--x'] },
      'the command was ["node","app.js"] and is ["node","app.js","--x"] now',
    ],
    ['cwd', { cwd: '/' }, 'the working directory was /srv/app and is / now'],
    ['uid', { uid: 5 }, 'the user id was 0 and is 5 now'],
    ['gid', { gid: 5 }, 'the group id was 0 and is 5 now'],
    ['value', { declaredEnv: { DATABASE_URL: 'x' } }, 'the environment variable DATABASE_URL has another value'],
    ['missing key', { declaredEnv: {} }, 'the environment variable DATABASE_URL is not declared any more'],
    [
      'new key',
      { declaredEnv: { DATABASE_URL: 'postgres://secret', A: '' } },
      'the environment variable A was not declared then',
    ],
  ])('is refused with the reason: %s', async (_, changes, reason) => {
    expect((await failure('GENERATION_MISFIT', () => made.checkFit(surroundings(changes)))).happened).toBe(reason)
  })

  test.each([
    ['kernel', { kernelRelease: '5.0' }, 'the kernel was'],
    ['architecture', { architecture: 'arm64' }, 'the architecture was'],
    ['CPU', { cpuFlagsHash: '0'.repeat(64) }, 'the CPU has other features'],
  ])('is refused with the reason: %s', async (_, changes, reason) => {
    const error = await failure('GENERATION_MISFIT', () => made.checkFit({ ...surroundings(), ...changes }))
    expect(error.happened).toContain(reason)
  })

  test('is refused with all reasons at once', async () => {
    const error = await failure('GENERATION_MISFIT', () => made.checkFit(surroundings({ cwd: '/', criuVersion: '5' })))
    expect(error.happened).toMatch(/CRIU.*; the working directory/)
  })

  test('has the same CPU features whatever their order', () => {
    expect(cpuInfo('model name\t: A\nflags\t\t: b a\n').flagsHash).toBe(
      cpuInfo('model name\t: B\nflags\t: a  b\n').flagsHash,
    )
    expect(cpuInfo('flags : a').flagsHash).not.toBe(cpuInfo('flags : b').flagsHash)
    expect(cpuInfo('model name\t: A\n').model).toBe('A')
  })
})
