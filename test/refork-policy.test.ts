/** Decisions of the policies, shown whole lives of children: numbers in, decisions out. */
import { describe, expect, test } from 'vitest'
import type { ObservedChild, ReforkDecision, ReforkObservation } from '../src/refork/observation.js'
import { ReforkPolicy, type ReforkSetting } from '../src/refork/policy.js'

const child = (pid: number, requests: number, more: Partial<ObservedChild> = {}): ObservedChild => ({
  pid,
  generation: 1,
  requests,
  requestMs: requests * 5,
  aliveMs: 1_000,
  cpuMs: requests * 5,
  privateBytes: undefined,
  refuses: undefined,
  ...more,
})
const seen = (children: readonly ObservedChild[], more: Partial<ReforkObservation> = {}): ReforkObservation => ({
  nowMs: 0,
  generation: 1,
  generationAgeMs: 0,
  forks: 0,
  reforks: 0,
  children,
  ...more,
})
const policy = (setting: ReforkSetting) => new ReforkPolicy(setting, () => 0.5)

describe('thresholds', () => {
  test.each([
    [0, 49, undefined],
    [0, 50, 7],
    [1, 99, undefined],
    [1, 100, 7],
    [2, 999, undefined],
    [2, 1_000, 7],
    [9, 1_000, 7],
  ])('after %i reforks, with %i requests: %s', async (reforks, requests, from) => {
    const decision = await policy({}).observe(seen([child(6, 3), child(7, requests)], { reforks }))
    expect(decision.from).toBe(from)
    expect(decision.why).toContain(String(requests))
  })

  test('end with the list where the last is not repeated, and with `maxGenerations`', async () => {
    const busy = [child(7, 1_000_000)]
    expect((await policy({ after: [50], repeatLast: false }).observe(seen(busy, { reforks: 0 }))).from).toBe(7)
    expect((await policy({ after: [50], repeatLast: false }).observe(seen(busy, { reforks: 1 }))).from).toBeUndefined()
    expect((await policy({ maxGenerations: 3 }).observe(seen(busy, { reforks: 3 }))).why).toMatch(/maxGenerations/)
  })

  test('count forks, or the age of the generation', async () => {
    const children = [child(6, 0), child(7, 2)]
    const forks = policy({ after: [10], unit: 'forks' })
    expect((await forks.observe(seen(children, { forks: 9 }))).from).toBeUndefined()
    expect((await forks.observe(seen(children, { forks: 10 }))).from).toBe(7)
    const seconds = policy({ after: [30], unit: 'seconds' })
    expect((await seconds.observe(seen(children, { generationAgeMs: 29_999 }))).from).toBeUndefined()
    expect((await seconds.observe(seen(children, { generationAgeMs: 30_000 }))).from).toBe(7)
  })

  test('look at children of the generation in use that do not refuse, the oldest of equals first', async () => {
    const children = [
      child(5, 900, { generation: 0 }),
      child(6, 800, { refuses: 'it holds a lock' }),
      child(7, 700),
      child(8, 700),
    ]
    expect((await policy({}).observe(seen(children))).from).toBe(7)
    const refusing = await policy({}).observe(seen(children.slice(0, 2)))
    expect(refusing).toEqual({ from: undefined, why: 'all children of generation 1 refuse: it holds a lock' })
    expect((await policy({}).observe(seen([]))).why).toBe('no child of generation 1 runs')
  })

  test('differ from child to child, by no more than the jitter, and stay the same for one', async () => {
    const at = async (setting: ReforkPolicy, pid: number) => {
      for (let requests = 1; ; requests++)
        if ((await setting.observe(seen([child(pid, requests)]))).from !== undefined) return requests
    }
    const jittered = new ReforkPolicy({ after: [1_000], jitter: 0.2 })
    const thresholds: number[] = []
    for (let pid = 1; pid <= 40; pid++) thresholds.push(await at(jittered, pid))
    expect(Math.min(...thresholds)).toBeGreaterThanOrEqual(800)
    expect(Math.max(...thresholds)).toBeLessThanOrEqual(1_200)
    expect(new Set(thresholds).size).toBeGreaterThan(20)
    const again = await at(jittered, 40)
    expect(again).toBe(thresholds.at(-1))
  })

  test('wait after a failure, longer and longer, and no more after a success', async () => {
    const failing = policy({ after: [1], backoffMs: 100 })
    const from = async (nowMs: number) => (await failing.observe(seen([child(7, 5)], { nowMs }))).from
    expect(await from(0)).toBe(7)
    failing.outcome('failed', 0)
    expect([await from(99), await from(100)]).toEqual([undefined, 7])
    failing.outcome('failed', 100)
    expect([await from(299), await from(300)]).toEqual([undefined, 7])
    for (let i = 0; i < 60; i++) failing.outcome('failed', 0)
    expect([await from(599_999), await from(600_000)]).toEqual([undefined, 7])
    failing.outcome('succeeded', 600_000)
    failing.outcome('failed', 600_000)
    expect(await from(600_100)).toBe(7)
  })
})

test('a function that gives no verdict makes no refork', async () => {
  const silent = (() => {}) as unknown as ReforkSetting
  const decision = await policy(silent).observe(seen([child(7, 1_000)]))
  expect(decision).toEqual({ from: undefined, why: 'the function `refork` gave no verdict' })
  expect((await policy((() => null) as never).observe(seen([child(7, 1)]))).from).toBeUndefined()
})

test('what is given as undefined has its default', async () => {
  const given = { after: undefined, jitter: undefined, backoffMs: undefined } as never
  expect((await policy(given).observe(seen([child(7, 44)]))).from).toBeUndefined()
  expect((await policy(given).observe(seen([child(7, 56)]))).from).toBe(7)
})

test('a function decides by itself: yes, no, a pid, or a decision', async () => {
  const children = [child(6, 3), child(7, 20)]
  const decide = (setting: ReforkSetting) => policy(setting).observe(seen(children))
  expect((await decide(() => true)).from).toBe(7)
  expect((await decide(() => false)).from).toBeUndefined()
  expect((await decide(async () => 6)).from).toBe(6)
  expect(await decide(() => ({ from: 6, why: 'it is Tuesday' }))).toEqual({ from: 6, why: 'it is Tuesday' })
  expect((await decide(({ children }) => children.length > 2)).from).toBeUndefined()
  expect((await decide(false)).from).toBeUndefined()
})

describe('auto', () => {
  /**
   * A life: `cost(n)` is what the n-th request of a program costs that has the warmth of n requests. Children of a generation begin where
   * its source was. Each look 40 requests come to each child.
   */
  async function live(
    cost: (warmth: number) => number,
    {
      requests = 60_000,
      children = 2,
      noise = 0.1,
      private: drift = (_requests: number): number => 0,
      tellsLatency = true,
    } = {},
  ) {
    let random = 1
    const next = () => {
      random = (random * 48_271) % 2_147_483_647
      return random / 2_147_483_647
    }
    const auto = policy('auto')
    const decisions: (ReforkDecision & { at: number })[] = []
    let generation = 1
    let pid = 100
    let base = 0
    const fork = () => ({ pid: pid++, generation, base, requests: 0, ms: 0 })
    let alive = Array.from({ length: children }, fork)
    let total = 0
    for (let nowMs = 0; total < requests; nowMs += 250) {
      for (const one of alive) {
        // The busiest gets more.
        const count = one === alive[0] ? 40 : 25
        for (let i = 0; i < count; i++) one.ms += cost(one.base + one.requests++) * (1 - noise + 2 * noise * next())
      }
      total += 40
      const observed = alive.map((one) => ({
        pid: one.pid,
        generation: one.generation,
        requests: one.requests,
        requestMs: tellsLatency ? one.ms : undefined,
        aliveMs: nowMs,
        cpuMs: Math.floor(one.ms / 10) * 10,
        privateBytes: drift(one.requests),
        refuses: undefined,
      }))
      const decision = await auto.observe(seen(observed, { nowMs, generation, reforks: generation - 1 }))
      if (decision.from === undefined) continue
      decisions.push({ ...decision, at: total })
      const source = alive.find((one) => one.pid === decision.from)!
      base = source.base + source.requests
      generation++
      alive = alive.map(fork)
      auto.outcome('succeeded', nowMs)
    }
    return { decisions, freshCost: cost(base) }
  }

  /** Falls from 40 ms to 4 in thousands of requests, as HotSpot's does. */
  const jit = (n: number) => 4 + 21 * Math.exp(-n / 60) + 15 * Math.exp(-n / 4_000)
  const v8 = (n: number) => 2 + 6 * Math.exp(-n / 80)

  test.each([
    ['a JIT compiler that warms up for thousands of requests', jit, 4],
    ['one that is warm after hundreds', v8, 2],
  ])('settles with %s', async (_, cost, ideal) => {
    const { decisions, freshCost } = await live(cost)
    expect(decisions.length).toBeGreaterThan(0)
    expect(decisions.length).toBeLessThanOrEqual(5)
    expect(freshCost / ideal).toBeLessThan(1.5)
    // The first one is soon, the later ones are ever more seldom.
    expect(decisions[0]!.at).toBeLessThan(1_000)
    expect(decisions[0]!.why).toMatch(/a request costs a fresh child \d/)
  })

  test('settles without anybody who tells how long requests take', async () => {
    const { decisions, freshCost } = await live(jit, { tellsLatency: false })
    expect(decisions.length).toBeLessThanOrEqual(5)
    expect(freshCost / 4).toBeLessThan(1.5)
  })

  test.each([
    ['is as fast from the beginning', () => 5],
    ['becomes slower', (n: number) => 5 + n / 10_000],
  ])('lets a program be that %s', async (_, cost) => {
    expect((await live(cost, { noise: 0.3 })).decisions).toEqual([])
  })

  test('lets a program be that answers nothing, or too fast to be measured', async () => {
    const auto = policy('auto')
    for (let nowMs = 0; nowMs < 100_000; nowMs += 1_000) {
      expect((await auto.observe(seen([child(7, 0)], { nowMs }))).from).toBeUndefined()
    }
    expect((await live(() => 0.000_001)).decisions).toEqual([])
  })

  test('reforks for memory once, and no more where that did not help', async () => {
    const mebi = 2 ** 20
    const private_ = (requests: number) => Math.min(200, requests / 10) * mebi
    const { decisions } = await live(() => 5, { private: private_ })
    expect(decisions.length).toBe(1)
    expect(decisions[0]!.why).toMatch(/MiB of their own/)
  })

  test('sees a short warm-up at a high rate, by the first requests', async () => {
    const auto = policy('auto')
    let ms = 0
    let requests = 0
    let first: ObservedChild['first']
    const decisions: ReforkDecision[] = []
    for (let nowMs = 0; nowMs < 5_000; nowMs += 250) {
      for (let i = 0; i < 3_000; i++) {
        ms += v8(requests++)
        if (requests === 50) first = { requests, requestMs: ms, cpuMs: Math.floor(ms / 10) * 10 }
      }
      const one = child(7, requests, { requestMs: ms, cpuMs: Math.floor(ms / 10) * 10, first })
      decisions.push(await auto.observe(seen([one], { nowMs })))
    }
    expect(decisions.some(({ from }) => from === 7)).toBe(true)
  })

  test('decides again for what failed or was put off', async () => {
    const auto = policy('auto')
    const tried: number[] = []
    let ms = 0
    let requests = 0
    for (let nowMs = 0; nowMs < 60_000; nowMs += 250) {
      for (let i = 0; i < 25; i++) ms += v8(requests++)
      const one = child(7, requests, { requestMs: ms, cpuMs: Math.floor(ms / 10) * 10 })
      if ((await auto.observe(seen([one], { nowMs }))).from === undefined) continue
      tried.push(nowMs)
      auto.outcome('failed', nowMs)
    }
    expect(tried.length).toBe(3)
    expect([tried[1]! - tried[0]!, tried[2]! - tried[1]!]).toEqual([10_000, 20_000])
  })

  test('bears ids that are given again, and children that come and go', async () => {
    const auto = policy('auto')
    let pids = [1, 2, 3]
    for (let step = 0; step < 400; step++) {
      if (step % 7 === 0) pids = [pids[1]!, pids[2]!, (pids[0]! % 5) + 1]
      const children = pids.map((pid) => child(pid, (step * 13 + pid * 7) % 900))
      const decision = await auto.observe(seen(children, { nowMs: step * 250 }))
      expect(typeof decision.why).toBe('string')
    }
  })
})
