import fc from 'fast-check'
import { afterAll, beforeAll, expect, it } from 'vitest'
import { Laboratory } from './fixtures/forks.js'
import { attributes, describeMapping, wrongMemory } from './fixtures/memory-comparison.js'
import { compileRandmap } from './runtimes/compile.js'

/** How many programs. A quarter of a second each, of which the checkpoint takes 0.1. */
const RUNS = Number(process.env.WARMFORK_PROPERTY_RUNS ?? 200)
/** Another one finds other programs; the one that failed is in the message. */
const SEED = Number(process.env.WARMFORK_PROPERTY_SEED ?? 1)

const lab = new Laboratory()
afterAll(() => lab.close())

let program: string
beforeAll(async () => {
  program = await compileRandmap()
}, 300_000)

/** Boots a random program, forks it, and sees that both have all they should, before and after both go on. */
async function tryOne({ seed, steps, again }: { seed: number; steps: number; again: boolean }, copied: boolean) {
  const template = lab.start([program, String(seed), String(steps)])
  await template.talk.untilReady()
  await template.stop()
  const { number } = await lab.checkpoint(template, copied ? 'copy' : 'cow')
  const image = await lab.image(number)
  const [process] = image.processes()
  const child = await lab.fork(number)
  expect(wrongMemory(image, process!, template.pid, child.pid)).toEqual([])
  expect(attributes(child.pid, describeMapping)).toEqual(attributes(template.pid, describeMapping))
  template.goOn()
  child.resume()
  expect(await child.talk.ask('next')).toMatch(/^ok /)
  // What the child wrote is its own: the template has what it had, and so has the next child.
  expect(await template.talk.ask('check')).toMatch(/^ok wiped=0 dropped=0 /)
  if (again) {
    const sibling = await lab.fork(number)
    sibling.resume()
    expect(await sibling.talk.ask('next')).toMatch(/^ok /)
    await lab.end(sibling)
  }
  expect(await template.talk.ask('next')).toMatch(/^ok /)
  expect(await child.talk.ask('next')).toMatch(/^ok /)
  await lab.end(child, template)
  await lab.forget(number)
}

it(`gives forks of ${RUNS} random programs all memory of their templates`, async () => {
  let run = 0
  const programs = fc.record({ seed: fc.nat(1_000_000), steps: fc.integer({ min: 1, max: 120 }), again: fc.boolean() })
  await fc.assert(
    fc.asyncProperty(programs, async (one) => {
      run += 1
      await tryOne(one, run % 5 === 0).catch(async (error: unknown) => {
        await lab.endAll()
        throw error
      })
    }),
    { numRuns: RUNS, seed: SEED },
  )
  expect(run).toBe(RUNS)
}, 900_000)
