import { copyFileSync, readdirSync, readFileSync, renameSync, statSync } from 'node:fs'
import { get } from 'node:http'
import { join } from 'node:path'
import { text } from 'node:stream/consumers'
import { setTimeout as delay } from 'node:timers/promises'
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest'
import { stat, threadIds } from '../src/linux/proc.js'
import { type Child, Laboratory, type Program } from './fixtures/forks.js'
import { attributes, describeMapping, isPageFile, smaps, wrongMemory } from './fixtures/memory-comparison.js'
import { compileRandmap } from './runtimes/compile.js'
import { debianInstall, PROJECT } from './runtimes/runtime.js'

const PROGRAMS = join(PROJECT, 'test/fixtures/programs')
const CHURN = ['/usr/bin/python3', join(PROGRAMS, 'churn.py')]
/** As the memory edit has it: page files that a generation inherits at most, and one of its own. */
const MOST_PAGE_FILES = 16

const lab = new Laboratory()
afterAll(() => lab.close())
afterEach(() => lab.endAll())

let randmap: string
beforeAll(async () => {
  await debianInstall('/usr/bin/python3', 'python3')
  randmap = await compileRandmap()
}, 300_000)

interface Fork {
  child: Child
  number: number
}

/** A fork of a checkpoint of a stopped process, which has all its memory, byte for byte and mapped alike. */
async function forkOf(source: Program | Child, durable = false): Promise<Fork> {
  const { number } = await lab.checkpoint(source, 'cow', { durable })
  const image = await lab.image(number)
  const child = await lab.fork(number)
  for (const [index, process] of image.processes().entries()) {
    const copy = child.process.pids[index]!
    expect(wrongMemory(image, process, process.pid, copy), `generation ${number}`).toEqual([])
    expect(attributes(copy, describeMapping)).toEqual(attributes(process.pid, describeMapping))
  }
  return { child, number }
}

/**
 * Waits until a process's threads all wait, its first one for events: a program that is stopped at work may hold locks that
 * know their owner by its thread id.
 */
async function untilAtRest(pid: number): Promise<void> {
  const [EPOLL_WAIT, EPOLL_PWAIT] = ['232', '281']
  for (let times = 0; times < 3; ) {
    const waits = threadIds(pid).every((id) => stat(id)?.state === 'S')
    const call = readFileSync(`/proc/${pid}/syscall`, 'latin1').split(' ')[0]!
    times = waits && [EPOLL_WAIT, EPOLL_PWAIT].includes(call) ? times + 1 : 0
    await delay(10)
  }
}

/** Forks of forks: each is asked for the `next` changes, and stopped before it is the source of the next. */
async function chain(
  template: Program,
  depth: number,
  answer: RegExp,
  rest: (pid: number) => Promise<void> = async () => {},
): Promise<Fork[]> {
  await rest(template.pid)
  await template.stop()
  const forks: Fork[] = []
  let source: Program | Child = template
  for (let i = 1; i <= depth; i++) {
    const fork = await forkOf(source)
    fork.child.resume()
    expect(await fork.child.talk.ask('next'), `depth ${i}`).toMatch(answer)
    await rest(fork.child.pid)
    await fork.child.stop()
    forks.push(fork)
    source = fork.child
  }
  return forks
}

const manifestOf = async (number: number) => (await (await lab.engine()).store.get(number)).manifest

/** A fork of a generation that does what it is asked for. */
async function answerOf(number: number): Promise<string> {
  const child = await lab.fork(number)
  const answer = await child.resume().talk.ask('next')
  await lab.end(child)
  return answer
}

const request = (port: number): Promise<string> =>
  new Promise((resolve, reject) => {
    get({ port, host: '127.0.0.1', agent: false }, (response) => text(response).then(resolve, reject)).on(
      'error',
      reject,
    )
  })

describe('a chain of generations', () => {
  it.each([1, 2, 3])('has all memory, ten deep, however it is mapped anew between (seed %i)', async (seed) => {
    const template = lab.start([randmap, String(seed), '80'])
    await template.talk.untilReady()
    const forks = await chain(template, 10, /^ok /)
    // Nobody wrote into another's memory.
    for (const { child } of forks) child.goOn()
    for (const { child, number } of forks) expect(await child.talk.ask('next'), `child of ${number}`).toMatch(/^ok /)
    template.goOn()
    expect(await template.talk.ask('check')).toMatch(/^ok /)
    expect(await answerOf(forks[4]!.number)).toMatch(/^ok /)
    await lab.endAll()
    for (const { number } of forks) await lab.forget(number)
  })

  it('lives on when all its ancestors are removed', async () => {
    const template = lab.start([...CHURN, '1', '8'])
    await template.talk.untilReady()
    const forks = await chain(template, 10, /^ok$/)
    const last = forks.at(-1)!.number
    const { store } = await lab.engine()
    const before = await manifestOf(last)
    expect(Object.keys(before.files).filter((name) => name.endsWith('.warmfork-pages')).length).toBeGreaterThan(5)
    await lab.endAll()
    for (const { number } of forks.slice(0, -1)) await lab.forget(number)
    expect(readdirSync(join(store.directory, 'generations'))).toEqual([String(last)])
    await (await store.get(last)).verify()
    expect(await answerOf(last)).toBe('ok')
    const child = await lab.fork(last)
    const mapped = smaps(child.pid).filter(isPageFile)
    expect(new Set(mapped.map(({ path }) => join(path, '..')))).toEqual(new Set([(await store.get(last)).directory]))
    await lab.end(child)
    await lab.forget(last)
  })

  it('has few page files and mappings, however deep', async () => {
    const template = lab.start([...CHURN, '2', '24'])
    await template.talk.untilReady()
    const regions = (await manifestOf((await lab.checkpoint(template, 'cow', { durable: false })).number)).edits
    const { mappings } = regions as { mappings: number }
    let source: Program | Child = template
    const numbers: number[] = []
    for (let depth = 1; depth <= 24; depth++) {
      const { number } = await lab.checkpoint(source, 'cow', { durable: false })
      numbers.push(number)
      const child = (await lab.fork(number)).resume()
      expect(await child.talk.ask('next'), `depth ${depth}`).toBe('ok')
      if (source !== template) await lab.end(source)
      source = child
      const { files, edits } = await manifestOf(number)
      const names = Object.keys(files).filter((name) => name.endsWith('.warmfork-pages'))
      expect(names.length).toBeLessThanOrEqual(MOST_PAGE_FILES)
      expect((edits as { mappings: number }).mappings).toBeLessThan(mappings + 650)
      // A page file that nothing maps is not linked in.
      const linked = new Set(
        smaps(child.pid)
          .filter(isPageFile)
          .map(({ path }) => path),
      )
      expect(linked.size).toBe(names.length)
    }
    expect(await answerOf(numbers[11]!)).toBe('ok')
    await lab.endAll()
    for (const number of numbers) await lab.forget(number)
  })

  it('keeps processes of a tree apart that have other memory at the same addresses', async () => {
    const template = lab.start([...CHURN, '3', '4', 'family'])
    await template.talk.untilReady()
    const forks = await chain(template, 4, /^ok$/)
    expect(forks[3]!.child.process.pids).toHaveLength(2)
    expect(await answerOf(forks[1]!.number)).toBe('ok')
    await lab.endAll()
    for (const { number } of forks) await lab.forget(number)
  })

  it('is as right where all memory is copied', async () => {
    const template = lab.start([...CHURN, '4', '2'], { preload: false })
    await template.talk.untilReady()
    let source: Program | Child = template
    for (let depth = 1; depth <= 3; depth++) {
      const { number } = await lab.checkpoint(source, 'auto', { durable: false })
      const { memory, files } = await manifestOf(number)
      expect([memory, Object.keys(files).filter((name) => name.endsWith('.warmfork-pages'))]).toEqual(['copy', []])
      source = (await lab.fork(number)).resume()
      expect(await source.talk.ask('next')).toBe('ok')
    }
  })

  it('goes on as a Node program does, three deep, on the port that it serves', async () => {
    const template = lab.start([process.execPath, join(PROGRAMS, 'warmer.mjs')])
    const port = Number((await template.talk.untilReady())[0]!.split(' ')[1])
    const forks = await chain(template, 3, /^\d+ [0-9a-f]{64}$/, untilAtRest)
    for (const [index, { number }] of forks.entries()) {
      const [one, other] = [await lab.fork(number), await lab.fork(number)]
      one.resume()
      // The other processes of that port stand still.
      expect(await request(port)).toBe(String(index + 1))
      const answer = await one.talk.ask('next')
      expect(answer).toMatch(new RegExp(`^${index + 2} `))
      expect(await request(port)).toBe(String(index + 2))
      await one.stop()
      expect(await other.resume().talk.ask('next')).toBe(answer)
      await lab.end(one, other)
    }
    await lab.endAll()
    for (const { number } of forks) await lab.forget(number)
  })
})

describe('a source with a connection that waits to be accepted', () => {
  it('is checkpointed, and accepts it afterwards', async () => {
    const template = lab.start([process.execPath, join(PROGRAMS, 'warmer.mjs')])
    const port = Number((await template.talk.untilReady())[0]!.split(' ')[1])
    await untilAtRest(template.pid)
    await template.stop()
    const answer = request(port)
    await delay(20)
    const { number } = await lab.checkpoint(template, 'cow', { durable: false })
    template.goOn()
    expect(await answer).toBe('1')
    await lab.end(template)
    await lab.forget(number)
  })
})

describe('a fork that maps a file which was replaced since', () => {
  it('is checkpointed with the file that its generation kept, under its first name', async () => {
    const program = join(lab.fresh('program'), 'randmap')
    copyFileSync(randmap, program)
    const template = lab.start([program, '5', '60'])
    await template.talk.untilReady()
    const { number } = await lab.checkpoint(template, 'cow')
    await lab.end(template)
    const { ino } = statSync(program)
    copyFileSync('/bin/true', `${program}.new`)
    renameSync(`${program}.new`, program)
    const child = (await lab.fork(number)).resume()
    expect(await child.talk.ask('next')).toMatch(/^ok /)
    await child.stop()
    const fork = await forkOf(child, true)
    const kept = (await manifestOf(fork.number)).mappedFiles.find(({ path }) => path === program)
    expect(kept?.inode).toBe(String(ino))
    await lab.end(child, fork.child)
    await lab.forget(number)
    const { store } = await lab.engine()
    await (await store.get(fork.number)).verify()
    expect(await answerOf(fork.number)).toMatch(/^ok /)
    await lab.forget(fork.number)
  })

  it('is refused where it is older than the replacement', async () => {
    const program = join(lab.fresh('program'), 'randmap')
    copyFileSync(randmap, program)
    const template = lab.start([program, '7', '20'])
    await template.talk.untilReady()
    const { number } = await lab.checkpoint(template, 'cow', { durable: false })
    const child = await lab.fork(number)
    copyFileSync('/bin/true', `${program}.new`)
    renameSync(`${program}.new`, program)
    await expect(lab.checkpoint(child, 'cow')).rejects.toMatchObject({ code: 'CHECKPOINT_FAILED' })
    await lab.endAll()
    await lab.forget(number)
  })
})

describe('a generation that is not durable', () => {
  it('gives a durable one what it lacks', async () => {
    const template = lab.start([randmap, '6', '60'])
    await template.talk.untilReady()
    await template.stop()
    const first = await forkOf(template)
    const { ephemeral, files } = await manifestOf(first.number)
    expect([ephemeral, Object.values(files).filter(({ sha256 }) => sha256 !== undefined)]).toEqual([true, []])
    const second = await forkOf(first.child, true)
    const manifest = await manifestOf(second.number)
    expect([manifest.ephemeral, Object.values(manifest.files).filter(({ sha256 }) => sha256 === undefined)]).toEqual([
      undefined,
      [],
    ])
    expect(Object.keys(manifest.files)).toContain(`memory-${first.number}.warmfork-pages`)
    await lab.endAll()
    await lab.forget(first.number)
    await (await (await lab.engine()).store.get(second.number)).verify()
    await lab.forget(second.number)
  })

  it('lets its source go on before it is complete', async () => {
    const template = lab.start([process.execPath, join(PROGRAMS, 'warmer.mjs')])
    await template.talk.untilReady()
    await untilAtRest(template.pid)
    let freeMs = 0
    const before = performance.now()
    const { number } = await lab.checkpoint(template, 'cow', {
      durable: false,
      onSourceFree: () => {
        freeMs = performance.now() - before
      },
    })
    expect(freeMs).toBeGreaterThan(0)
    expect(freeMs).toBeLessThan(performance.now() - before)
    await lab.end(template)
    await lab.forget(number)
  })
})
