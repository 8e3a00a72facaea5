import { closeSync, lstatSync, openSync, readdirSync, readSync, utimesSync, writeSync } from 'node:fs'
import { join } from 'node:path'
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest'
import type { Generation } from '../src/generations/generation.js'
import { Store } from '../src/generations/store.js'
import { Terminal } from './cli-harness.js'
import { type Child, Laboratory, type Program } from './fixtures/forks.js'
import { attributes, describeMapping, isPageFile, smaps, wrongMemory } from './fixtures/memory-comparison.js'
import { compileRandmap } from './runtimes/compile.js'
import { debianInstall, PROJECT, run } from './runtimes/runtime.js'

const CHURN = ['/usr/bin/python3', join(PROJECT, 'test/fixtures/programs/churn.py')]

const lab = new Laboratory()
afterAll(() => lab.close())
afterEach(() => lab.endAll())

let randmap: string
beforeAll(async () => {
  await debianInstall('/usr/bin/python3', 'python3')
  randmap = await compileRandmap()
}, 300_000)

const store = async () => (await lab.engine()).store
const generationOf = async (number: number): Promise<Generation> => (await store()).get(number)

/** Checkpoints of forks of checkpoints, each asked for the `next` changes before; gives the numbers. The last fork is ended. */
async function chain(template: Program | Child, depth: number, answer: RegExp, durable = false): Promise<number[]> {
  const numbers: number[] = []
  let source = template
  for (let i = 1; i <= depth; i++) {
    const { number } = await lab.checkpoint(source, 'cow', { durable })
    numbers.push(number)
    await lab.end(source)
    if (i === depth) break
    const child = (await lab.fork(number)).resume()
    expect(await child.talk.ask('next'), `depth ${i}`).toMatch(answer)
    source = child
  }
  return numbers
}

/** What a fork of a generation answers. */
async function answerOf(number: number, question = 'check'): Promise<string> {
  const child = (await lab.fork(number)).resume()
  const answer = await child.talk.ask(question)
  await lab.end(child)
  return answer
}

/** What the files of the store take on the disk, hard links counted once. */
async function diskBytes(): Promise<number> {
  const seen = new Set<number>()
  let bytes = 0
  const visit = (directory: string): void => {
    for (const entry of readdirSync(directory, { withFileTypes: true })) {
      const path = join(directory, entry.name)
      if (entry.isDirectory()) visit(path)
      else {
        const { ino, blocks } = lstatSync(path)
        if (!seen.has(ino)) bytes += blocks * 512
        seen.add(ino)
      }
    }
  }
  visit(join((await store()).directory, 'generations'))
  return bytes
}

/** Changes a byte in the middle of what a page file holds; size and times stay. */
async function damage(generation: Generation, path: string): Promise<void> {
  const runs = await generation.runs(generation.pageFiles[0]!)
  const [offset, length] = runs[Math.floor(runs.length / 2)]!
  const { atime, mtime } = lstatSync(path)
  const fd = openSync(path, 'r+')
  const byte = Buffer.alloc(1)
  readSync(fd, byte, 0, 1, offset + (length >> 1))
  byte[0]! ^= 0xff
  writeSync(fd, byte, 0, 1, offset + (length >> 1))
  closeSync(fd)
  utimesSync(path, atime, mtime)
}

/** What a generation has in its files, in bytes: the stretches of page files, and the rest whole. */
async function dataBytes(generation: Generation): Promise<number> {
  let bytes = 0
  for (const [name, stored] of Object.entries(generation.manifest.files)) {
    if (stored.runs === undefined) bytes += stored.bytes
    else bytes += (await generation.runs(name)).reduce((sum, [, length]) => sum + length, 0)
  }
  return bytes
}

/** Writes a generation's files out and has the kernel drop what it has cached of them: a restore reads the disk. */
async function dropCached({ directory, manifest }: Generation): Promise<void> {
  const paths = Object.keys(manifest.files).map((name) => join(directory, name))
  const script = 'import os,sys\nfor p in sys.argv[1:]:\n f=os.open(p,0); os.fsync(f); os.posix_fadvise(f,0,0,4)'
  await run('/usr/bin/python3', ['-c', script, ...paths])
}

/** Flattens a generation, and compares a fork of each, byte for byte and mapping for mapping. */
async function flattened(number: number): Promise<number> {
  const { number: flat } = await (await lab.engine()).flatten(number)
  const image = await lab.image(number)
  const [one, other] = [await lab.fork(number), await lab.fork(flat)]
  for (const [index, process] of image.processes().entries()) {
    const [first, second] = [one, other].map((child) => child.process.pids[index]!) as [number, number]
    expect(wrongMemory(image, process, first, second), `process ${process.pid}`).toEqual([])
    expect(attributes(second, describeMapping)).toEqual(attributes(first, describeMapping))
  }
  await lab.end(one, other)
  const { pageFiles, directory } = await generationOf(flat)
  expect(pageFiles).toEqual([`memory-${flat}.warmfork-pages`])
  const child = await lab.fork(flat)
  expect(
    new Set(
      smaps(child.pid)
        .filter(isPageFile)
        .map(({ path }) => path),
    ),
  ).toEqual(new Set([join(directory, pageFiles[0]!)]))
  await lab.end(child)
  return flat
}

describe('a flattened generation', () => {
  it.each([11, 12])('has all memory of the other one in one file (seed %i)', async (seed) => {
    const template = lab.start([randmap, String(seed), '80'])
    await template.talk.untilReady()
    const numbers = await chain(template, 5, /^ok /, true)
    const last = numbers.at(-1)!
    expect((await generationOf(last)).pageFiles.length).toBeGreaterThan(1)
    const flat = await flattened(last)
    const { manifest } = await generationOf(flat)
    const before = (await generationOf(last)).manifest
    expect(manifest).toMatchObject({ parent: last, reforks: 4, memory: 'cow', reason: `flattened: generation ${last}` })
    expect([manifest.engineData, manifest.processes, manifest.mappedFiles.map(({ path }) => path)]).toEqual([
      before.engineData,
      before.processes,
      before.mappedFiles.map(({ path }) => path),
    ])
    await (await generationOf(flat)).verify()
    // It needs none of the others.
    for (const number of numbers) await lab.forget(number)
    expect(await answerOf(flat, 'next')).toMatch(/^ok /)
    await lab.forget(flat)
  })

  it('is what later generations build on', async () => {
    const template = lab.start([...CHURN, '13', '8', 'family'])
    await template.talk.untilReady()
    const numbers = await chain(template, 4, /^ok$/)
    const flat = await flattened(numbers.at(-1)!)
    for (const number of numbers) await lab.forget(number)
    const child = (await lab.fork(flat)).resume()
    expect(await child.talk.ask('next')).toBe('ok')
    const more = await chain(child, 3, /^ok$/)
    expect(await answerOf(more.at(-1)!)).toBe('ok')
    for (const number of [flat, ...more]) await lab.forget(number)
  })

  it('is itself where it was flat already', async () => {
    const template = lab.start([...CHURN, '14', '2'])
    await template.talk.untilReady()
    const [number] = await chain(template, 1, /^ok$/)
    const engine = await lab.engine()
    expect((await engine.flatten(number!)).number).toBe(number)
    expect(await engine.discard(number!)).toBe(true)
  })

  it('is not made of one that was damaged', async () => {
    const template = lab.start([...CHURN, '15', '2'])
    await template.talk.untilReady()
    const numbers = await chain(template, 2, /^ok$/, true)
    const last = await generationOf(numbers[1]!)
    const path = join(last.directory, last.pageFiles[0]!)
    await damage(last, path)
    const engine = await lab.engine()
    await expect(engine.flatten(last.number)).rejects.toMatchObject({ code: 'GENERATION_CORRUPT' })
    expect(readdirSync(join(engine.store.directory, 'generations')).sort()).toEqual(numbers.map(String).sort())
    for (const number of numbers) {
      await lab.closeSource(number)
      expect(await engine.discard(number)).toBe(true)
    }
  })
})

describe('generation 50', () => {
  it('is whole without the 49 before it, and the next one builds on it', async () => {
    const template = lab.start([randmap, '21', '60'])
    await template.talk.untilReady()
    const { store } = await lab.engine()
    let source: Program | Child = template
    const numbers: number[] = []
    for (let depth = 1; depth <= 50; depth++) {
      const { number } = await lab.checkpoint(source, 'cow', { durable: depth === 50 })
      numbers.push(number)
      await lab.end(source)
      if (depth === 50) break
      source = (await lab.fork(number)).resume()
      expect(await source.talk.ask('next'), `depth ${depth}`).toMatch(/^ok /)
      // As a supervisor does; the five newest stay.
      if (depth > 5) await lab.forget(numbers[depth - 6]!)
    }
    const last = numbers[49]!
    // Kept open: what it has of its ancestors' memory must be the same when they are gone.
    const before = await lab.fork(last)
    for (const number of numbers.slice(44, 49)) await lab.forget(number)
    expect(readdirSync(join(store.directory, 'generations'))).toEqual([String(last)])
    const generation = await store.get(last)
    await generation.verify()
    await dropCached(generation)
    const after = await lab.fork(last)
    const image = await lab.image(last)
    for (const process of image.processes()) {
      expect(wrongMemory(image, process, before.process.pids[0]!, after.process.pids[0]!)).toEqual([])
    }
    // What is on the disk is what it needs: blocks of 4 KiB, and a directory's own.
    const files = Object.keys(generation.manifest.files).length
    const needed = await dataBytes(generation)
    expect(await diskBytes()).toBeLessThan(needed + (files + 60) * 4096 + keptBytes(generation))
    // And that is not fifty times what the program has.
    const { rssBytes, mappedFiles } = generation.manifest
    expect(mappedFiles.length).toBeGreaterThan(0)
    expect(needed).toBeLessThan(3 * rssBytes)
    expect(await after.resume().talk.ask('next')).toMatch(/^ok /)
    await after.stop()
    const [next] = await chain(after, 1, /^ok /)
    expect(await answerOf(next!, 'next')).toMatch(/^ok /)
    await lab.end(before)
    for (const number of [last, next!]) await lab.forget(number)
  }, 60_000)
})

/** What it has kept of the machine's files, as copies or as links to them. */
function keptBytes({ directory, manifest }: Generation): number {
  return manifest.mappedFiles.reduce(
    (sum, { keptAs }) => sum + (keptAs === undefined ? 0 : lstatSync(join(directory, keptAs)).blocks * 512),
    0,
  )
}

describe('a page file of an ancestor', () => {
  it('goes when all that it held was overwritten', async () => {
    const script = [
      'import mmap, sys',
      'region = mmap.mmap(-1, 4 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)',
      'count = 0',
      'def fill(first, pages):',
      '    global count',
      '    count += 1',
      '    region[first * 4096 : (first + pages) * 4096] = bytes([count]) * (pages * 4096)',
      'fill(0, 1024)',
      "print('ready', flush=True)",
      'for line in sys.stdin:',
      '    first, pages = map(int, line.split())',
      '    fill(first, pages)',
      "    print('ok', flush=True)",
    ].join('\n')
    const template = lab.start(['/usr/bin/python3', '-c', script])
    await template.talk.untilReady()
    const { number: first } = await lab.checkpoint(template, 'cow', { durable: false })
    await lab.end(template)
    const one = (await lab.fork(first)).resume()
    // Its middle alone: generation 2 has that, and the rest of the region from generation 1.
    await one.talk.ask('256 512')
    const { number: second } = await lab.checkpoint(one, 'cow', { durable: false })
    await lab.end(one)
    const two = (await lab.fork(second)).resume()
    await two.talk.ask('200 700')
    const { number: third } = await lab.checkpoint(two, 'cow', { durable: false })
    await lab.end(two)
    const region = (await generationOf(third)).pageFiles
    expect(region).toContain(`memory-${first}.warmfork-pages`)
    expect(region).toContain(`memory-${third}.warmfork-pages`)
    // Nothing of the region is left in it; of what python itself wrote meanwhile, something may be.
    const fork = await lab.fork(third)
    const ofSecond = smaps(fork.pid).filter(({ path }) => path.endsWith(`/memory-${second}.warmfork-pages`))
    expect(ofSecond.every(({ start, end }) => end - start < 512n * 4096n)).toBe(true)
    expect(region.includes(`memory-${second}.warmfork-pages`)).toBe(ofSecond.length > 0)
    await lab.end(fork)
    for (const number of [first, second, third]) await lab.forget(number)
  })
})

describe('a chain with flattenings at random between', () => {
  it.each([31, 32, 33, 34])('has all memory (seed %i)', async (seed) => {
    const template = lab.start([randmap, String(seed), '50'])
    await template.talk.untilReady()
    let random = seed
    const draw = (below: number) => {
      random = (Math.imul(random, 1103515245) + 12345) >>> 0
      return (random >>> 8) % below
    }
    const numbers: number[] = []
    let source: Program | Child = template
    for (let depth = 1; depth <= 7; depth++) {
      let { number } = await lab.checkpoint(source, 'cow', { durable: false })
      numbers.push(number)
      await lab.end(source)
      if (draw(3) === 0) {
        number = (await (await lab.engine()).flatten(number)).number
        if (number !== numbers.at(-1)) numbers.push(number)
      }
      source = (await lab.fork(number)).resume()
      expect(await source.talk.ask('next'), `depth ${depth}`).toMatch(/^ok /)
      // Some of those behind go meanwhile.
      if (draw(2) === 0 && numbers.length > 1) await lab.forget(numbers.shift()!)
    }
    await lab.endAll()
    for (const number of numbers) await lab.forget(number)
  })
})

describe('warmfork flatten', () => {
  const terminal = new Terminal()
  afterAll(() => terminal.leave())

  it('makes a flat generation in a store whose supervisor does not run', async () => {
    const template = lab.start([randmap, '41', '60'])
    await template.talk.untilReady()
    const numbers = await chain(template, 3, /^ok /, true)
    const last = numbers.at(-1)!
    const { store } = await lab.engine()
    const flags = ['--name', 'test', '--store', join(lab.directory, 'store'), ...terminal.here]
    const call = (number: number, ...more: string[]) => terminal.call(['flatten', String(number), ...flags, ...more])
    const refused = await call(last)
    expect([refused.code, refused.stderr]).toEqual([1, expect.stringContaining('STORE_LOCKED')])
    await (await lab.engine()).close()

    const { stdout, stderr } = await call(last, '--json')
    expect(stderr).toBe('')
    const { number, writtenBytes } = JSON.parse(stdout)
    expect(writtenBytes).toBeGreaterThan(0)
    await using now = await Store.open({ name: 'test', root: join(lab.directory, 'store'), access: 'read' })
    expect(now.directory).toBe(store.directory)
    const flat = await now.get(number)
    await flat.verify()
    expect([flat.pageFiles, flat.manifest.parent]).toEqual([[`memory-${number}.warmfork-pages`], last])
    expect((await call(number)).stdout).toBe(`generation ${number} of test is flat already\n`)
    expect((await call(number + 1)).stderr).toContain('GENERATION_NOT_FOUND')
  })
})
