import { existsSync, readdirSync } from 'node:fs'
import { join } from 'node:path'
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest'
import { Child, Laboratory, type Program } from './fixtures/forks.js'
import { attributes, describeMapping, isPageFile, smaps, wrongMemory } from './fixtures/memory-comparison.js'
import { cached, debianInstall, PROJECT, RUNTIME_CACHE, run } from './runtimes/runtime.js'

const lab = new Laboratory()
afterAll(() => lab.close())
afterEach(() => lab.endAll())

let randmap: string
beforeAll(async () => {
  await debianInstall('gcc', 'gcc')
  await debianInstall('/usr/include/stdio.h', 'libc6-dev')
  const source = join(PROJECT, 'test/fixtures/c/randmap.c')
  await cached(RUNTIME_CACHE, 'randmap-fixed', source, async (into) => {
    await run('gcc', ['-O2', '-no-pie', '-o', join(into, 'randmap'), source])
  })
  randmap = join(RUNTIME_CACHE, 'randmap-fixed/randmap')
}, 300_000)

/** A fork of a checkpoint of a stopped process, which has all its memory, byte for byte and mapped alike. */
async function forkOf(source: Program | Child): Promise<{ child: Child; number: number }> {
  const { number } = await lab.checkpoint(source, 'cow', { durable: false })
  const image = await lab.image(number)
  const child = await lab.fork(number)
  for (const [index, process] of image.processes().entries()) {
    const copy = child.process.pids[index]!
    expect(wrongMemory(image, process, process.pid, copy), `generation ${number}`).toEqual([])
    expect(attributes(copy, describeMapping)).toEqual(attributes(process.pid, describeMapping))
  }
  return { child, number }
}

describe('a chain of generations', () => {
  it.each([1, 2, 3])('has all memory, ten deep, however it is changed between (seed %i)', async (seed) => {
    const template = lab.start([randmap, String(seed), '80'])
    await template.talk.untilReady()
    await template.stop()
    const numbers: number[] = []
    const children: Child[] = []
    let source: Program | Child = template
    for (let depth = 1; depth <= 10; depth++) {
      const { child, number } = await forkOf(source)
      numbers.push(number)
      child.resume()
      expect(await child.talk.ask('next'), `depth ${depth}`).toMatch(/^ok /)
      await child.stop()
      children.push(child)
      source = child
    }
    // Nobody wrote into another's memory.
    for (const [index, child] of children.entries()) {
      child.goOn()
      expect(await child.talk.ask('next'), `child ${index + 1}`).toMatch(/^ok /)
    }
    template.goOn()
    expect(await template.talk.ask('check')).toMatch(/^ok /)
    // Old generations still give what they gave.
    const old = await lab.fork(numbers[4]!)
    old.resume()
    expect(await old.talk.ask('next')).toMatch(/^ok /)
    await lab.endAll()
    const { store } = await lab.engine()
    for (const number of numbers.slice(0, -1)) await lab.forget(number)
    expect(readdirSync(join(store.directory, 'generations'))).toEqual([String(numbers.at(-1))])
    const last = await lab.fork(numbers.at(-1)!)
    last.resume()
    expect(await last.talk.ask('next')).toMatch(/^ok /)
    await lab.end(last)
    await lab.forget(numbers.at(-1)!)
  })
})
