import { cpSync, linkSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { type ErrorCode, WarmforkError } from '../src/errors.js'
import { Store } from '../src/generations/store.js'
import { ForkImage } from '../src/image/derive.js'
import { buildImageFile, isRaw, parseImageFile } from '../src/image/image-file.js'
import { decode, encode } from '../src/image/message.js'
import { prepare } from '../src/image/prepare.js'
import { InventoryEntry } from '../src/image/schema.js'
import { Laboratory } from './fixtures/forks.js'
import { fill, surroundings } from './fixtures/generations.js'
import { compileC } from './runtimes/compile.js'
import { RUNTIME_CACHE, RUNTIMES } from './runtimes/index.js'

const lab = new Laboratory()
afterAll(() => lab.close())

/** A dump of a small program, and one of a program that has one of each, taken once. */
let small: string
let rich: string

beforeAll(async () => {
  const program = lab.start([await compileC('randmap'), '3', '12'])
  await program.talk.untilReady()
  small = await lab.dump(program)
  await RUNTIMES.find(({ name }) => name === 'CPython')!.install(RUNTIME_CACHE)
  const script = join(import.meta.dirname, 'fixtures/image/one-of-each.py')
  const other = lab.start(['/usr/bin/python3', script, lab.fresh('one')])
  await other.talk.untilReady()
  rich = await lab.dump(other)
  await lab.endAll()
}, 300_000)

const framed = (directory: string) => readdirSync(directory).filter((name) => name.endsWith('.img') && !isRaw(name))

/** The same dump with one file changed: its new bytes, or null to remove it. */
function changed(dump: string, name: string, bytes: Uint8Array | null): string {
  const source = join(lab.directory, 'changed')
  rmSync(source, { recursive: true, force: true })
  mkdirSync(source)
  for (const other of readdirSync(dump)) if (other !== name) linkSync(join(dump, other), join(source, other))
  if (bytes) writeFileSync(join(source, name), bytes)
  return source
}

type Outcome = ErrorCode | 'whole'

/**
 * Prepares an image and derives a fork from it. It must be refused with a code and before a byte of it is written, or give
 * a fork with all its files; anything else fails the test.
 */
async function outcomeOf(source: string, shared = true): Promise<Outcome> {
  const target = join(lab.directory, 'target')
  const pageFile = join(lab.directory, 'memory.warmfork-pages')
  for (const path of [target, pageFile]) rmSync(path, { recursive: true, force: true })
  mkdirSync(target)
  try {
    await prepare({ source, target, pageFile: { write: pageFile, map: pageFile }, isShared: () => shared })
  } catch (error) {
    expect(error).toBeInstanceOf(WarmforkError)
    expect(readdirSync(target)).toEqual([])
    expect(readdirSync(lab.directory)).not.toContain('memory.warmfork-pages')
    return (error as WarmforkError).code
  }
  const image = new ForkImage(target, { deathSignal: true })
  const { files, links } = image.derive(new Map(image.ids.map((id, index) => [id, 1000 + index])))
  expect(files.size).toBeGreaterThan(0)
  const there = new Set(readdirSync(target))
  for (const name of links.values()) expect(there).toContain(name)
  return 'whole'
}

const REFUSED: readonly Outcome[] = ['IMAGE_VERSION', 'IMAGE_TRUNCATED', 'IMAGE_CORRUPT', 'IMAGE_UNSUPPORTED']

describe('an image', () => {
  it('is taken as it is when nothing is wrong with it', async () => {
    for (const dump of [small, rich]) expect(await outcomeOf(changed(dump, '', null))).toBe('whole')
  })

  it.each([0, 3, 1000])('of version %i is refused', async (imgVersion) => {
    const file = parseImageFile('inventory.img', readFileSync(join(small, 'inventory.img')))
    const entry = decode(InventoryEntry, file.entries[0]!.message)
    const message = encode(InventoryEntry, { ...entry, imgVersion })
    const bytes = buildImageFile({ ...file, entries: [{ message }] })
    expect(await outcomeOf(changed(small, 'inventory.img', bytes))).toBe('IMAGE_VERSION')
  })

  it('of a process of another machine is refused', async () => {
    const name = framed(small).find((one) => one.startsWith('core-'))!
    const bytes = readFileSync(join(small, name))
    // The first field of the message: its machine, x86-64.
    expect([...bytes.subarray(12, 14)]).toEqual([8, 1])
    const other = Buffer.from(bytes)
    other[13] = 3
    expect(await outcomeOf(changed(small, name, other))).toBe('IMAGE_UNSUPPORTED')
  })

  it('without a directory is refused', async () => {
    const missing = join(lab.directory, 'nowhere')
    expect(await outcomeOf(missing)).toBe('IMAGE_TRUNCATED')
  })
})

/**
 * What CRIU writes only where there is something to write, and what it takes for empty where it is missing. Nothing else in
 * the image says that it was there.
 */
const UNNAMED =
  /^(seccomp|timens|pipes-data|fifo-data|sk-queues|filelocks|memfd|tty-info|tty-data|remap-fpath|cgroup)\b/

describe('a missing file', () => {
  it('is missed, but for those that nothing names', async () => {
    for (const dump of [small, rich]) {
      for (const name of readdirSync(dump).filter((one) => one.endsWith('.img'))) {
        const outcome = await outcomeOf(changed(dump, name, null))
        if (UNNAMED.test(name)) expect(outcome, name).toBe('whole')
        else expect(['IMAGE_TRUNCATED', 'IMAGE_CORRUPT'], name).toContain(outcome)
      }
    }
  })

  it('is missed as well when it is there and empty', async () => {
    for (const dump of [small, rich]) {
      for (const name of readdirSync(dump).filter((one) => one.endsWith('.img'))) {
        const outcome = await outcomeOf(changed(dump, name, new Uint8Array()))
        expect(['IMAGE_TRUNCATED', 'IMAGE_CORRUPT'], name).toContain(outcome)
      }
    }
  })
})

describe('a file that is cut short', () => {
  /** Where entries end, the first such place being the end of the magic numbers. */
  const borders = (name: string, bytes: Uint8Array) => {
    const { family, entries } = parseImageFile(name, bytes)
    let at = family === null ? 4 : 8
    return [at, ...entries.map(({ message, payload }) => (at += 4 + message.length + (payload?.length ?? 0)))]
  }

  it('is refused where the cut goes through an entry', async () => {
    for (const dump of [small, rich]) {
      for (const name of framed(dump)) {
        const bytes = readFileSync(join(dump, name))
        const all = borders(name, bytes)
        const ends = all.filter((_, index) => index < 4 || index > all.length - 4)
        const cuts = new Set([0, 1, 3, 4, 7, ...ends.flatMap((end) => [end - 1, end + 1, end + 3, end + 4, end + 5])])
        for (let i = 1; i < ends.length; i++) cuts.add((ends[i - 1]! + ends[i]!) >> 1)
        for (const cut of cuts) {
          if (cut < 0 || cut >= bytes.length || all.includes(cut)) continue
          const outcome = await outcomeOf(changed(dump, name, bytes.subarray(0, cut)))
          expect(['IMAGE_TRUNCATED', 'IMAGE_CORRUPT'], `${name} cut at ${cut} of ${bytes.length}`).toContain(outcome)
        }
      }
    }
  }, 300_000)

  it('is refused where the cut goes between entries that others name', async () => {
    for (const dump of [small, rich]) {
      for (const name of framed(dump).filter((one) => !UNNAMED.test(one))) {
        const bytes = readFileSync(join(dump, name))
        for (const cut of borders(name, bytes).slice(0, -1)) {
          const outcome = await outcomeOf(changed(dump, name, bytes.subarray(0, cut)))
          // Of the regular files that are open nothing says how many there were; nor of the chunks of an unlinked file.
          const cannotBeKnown = /^(fdinfo|ghost-file)-/.test(name)
          const expected = cannotBeKnown ? ['whole', ...REFUSED] : REFUSED
          expect(expected, `${name} cut at ${cut} of ${bytes.length}`).toContain(outcome)
        }
      }
    }
  }, 300_000)

  it('is refused where pages are missing or too many', async () => {
    for (const dump of [small, rich]) {
      for (const name of readdirSync(dump).filter((one) => one.startsWith('pages-'))) {
        const bytes = readFileSync(join(dump, name))
        for (const length of [0, 1, 4095, bytes.length - 4096, bytes.length - 1]) {
          const outcome = await outcomeOf(changed(dump, name, bytes.subarray(0, length)))
          expect(outcome, `${name} cut at ${length} of ${bytes.length}`).toBe('IMAGE_TRUNCATED')
        }
        expect(await outcomeOf(changed(dump, name, Buffer.concat([bytes, Buffer.alloc(4096)])))).toBe('IMAGE_TRUNCATED')
      }
    }
  }, 300_000)
})

describe('a file with a changed byte', () => {
  /** Of how many bytes one is changed, in each file. The memory of the larger program is shared in every tenth try only. */
  const subjects: [string, () => string, (size: number) => number, number][] = [
    ['of a small program', () => small, () => 3, 1],
    ['of a program that has one of each', () => rich, (size) => Math.ceil(size / 30), 10],
  ]

  it.each(subjects)(
    'is refused with a code, or gives a whole image: %s',
    async (_, dump, step, sharedEvery) => {
      let tries = 0
      const counts = new Map<Outcome, number>()
      for (const name of framed(dump())) {
        const bytes = readFileSync(join(dump(), name))
        for (let at = 0; at < bytes.length; at += at < 16 ? 1 : step(bytes.length)) {
          tries += 1
          const other = Buffer.from(bytes)
          // One bit, or all of them: the first makes neighbours of numbers, the second ends where there were none.
          other[at]! ^= tries % 2 === 0 ? 1 << ((tries >> 1) % 8) : 0xff
          const before = performance.now()
          const outcome = await outcomeOf(changed(dump(), name, other), tries % sharedEvery === 0).catch(
            (error: unknown) => {
              throw new Error(`${name}, byte ${at}: ${bytes[at]} → ${other[at]}`, { cause: error })
            },
          )
          expect(performance.now() - before, `${name}, byte ${at}`).toBeLessThan(5000)
          counts.set(outcome, (counts.get(outcome) ?? 0) + 1)
        }
      }
      // Most bytes are numbers that mean something else now (an address, a register): those nobody can tell.
      for (const outcome of counts.keys()) expect([...REFUSED, 'whole']).toContain(outcome)
      expect(counts.get('IMAGE_CORRUPT')).toBeGreaterThan(100)
    },
    600_000,
  )
})

describe('the store', () => {
  it('has nothing of a generation whose image was refused, and keeps the one before', async () => {
    const root = lab.fresh('store')
    await using store = await Store.open({ name: 'test', root, access: 'exclusive' })
    const first = await store.create({ parent: null, surroundings: surroundings() }, fill)
    const before = readdirSync(join(store.directory, 'generations'))
    const damaged = readFileSync(join(small, 'files.img'))
    damaged[40]! ^= 0xff
    const source = changed(small, 'files.img', damaged.subarray(0, -1))
    const refused = store.create({ parent: null, surroundings: surroundings() }, async (draft) => {
      cpSync(source, join(draft.directory, 'raw'), { recursive: true })
      const page = join(draft.directory, 'memory.warmfork-pages')
      await prepare({
        source: join(draft.directory, 'raw'),
        target: draft.imageDirectory,
        pageFile: { write: page, map: page },
        isShared: () => true,
      })
      return fill(draft)
    })
    await expect(refused).rejects.toMatchObject({ name: 'WarmforkError', code: 'IMAGE_TRUNCATED' })
    expect(readdirSync(join(store.directory, 'generations'))).toEqual(before)
    expect((await store.list()).map(({ number }) => number)).toEqual([first.number])
  })
})
