/** The Ruby agent in MRI with real forks. */
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import type { Child } from '../src/child.js'
import type { SupervisorOptions } from '../src/options.js'
import { type Drawn, differs, inForks, RUBY_APP, type State, tell } from './agents-ruby.js'
import { ENGINES, eventually, usePlace } from './engines-under-test.js'

describe.skipIf(!ENGINES.includes('criu'))('the agent of a Ruby program', () => {
  const place = usePlace('criu')
  const app = (options: Partial<SupervisorOptions> = {}) =>
    place.current.start({ command: ['ruby', RUBY_APP, 'one'], ready: { agent: true }, pool: { size: 0 }, ...options })
  const forked = async (options: Partial<SupervisorOptions> = {}) => {
    const supervisor = await app(options)
    const child = await supervisor.fork()
    await child.ready
    return { supervisor, child }
  }

  test('gives each of twenty forks of the supervisor an identity and randomness of its own', async () => {
    const supervisor = await app()
    const children = await Promise.all(
      Array.from({ length: 20 }, (_, i) => supervisor.fork({ data: i, args: [`${i}`] })),
    )
    const states = await Promise.all(children.map((child) => tell<State>(child, 'state')))
    expect(states.map(({ pid, dollar, kernel }) => [pid, dollar, kernel])).toEqual(
      children.map(({ pid }) => [pid, pid, pid]),
    )
    expect(states.map(({ payload, args }) => [payload, args])).toEqual(children.map((_, i) => [i, [`${i}`]]))
    // Around `Process._fork`, before the hooks.
    expect(states.map(({ wrapped }) => wrapped)).toEqual(children.map(() => [['child', []]]))
    expect(differs(await Promise.all(children.map((child) => tell<Drawn>(child, 'draw'))))).toEqual([])
  })

  test('forks itself twenty times at once, and each runs its block and ends', async () => {
    const { supervisor, child } = await forked()
    const said = inForks(supervisor)
    const pids = await tell<number[]>(child, 'fork', { count: 20 })
    await eventually(() => said.filter((word) => word === 'atExit').length === 20, 'all have ended their blocks')
    const states = said.flatMap((word) => (typeof word === 'object' ? [word] : []))
    expect(states.map(({ payload }) => payload).sort((a, b) => Number(a) - Number(b))).toEqual(pids.map((_, i) => i))
    expect(states.map(({ state }) => state.pid).sort()).toEqual([...pids].sort())
    expect(differs(states.map(({ draw }) => draw))).toEqual([])
    expect(await tell(child, 'wait', { pid: pids[0] })).toEqual({ pid: pids[0], code: 0, signal: null })
    const { wrapped, payload, fork } = await tell<State>(child, 'state')
    expect(
      wrapped
        .slice(1)
        .map(([, pid]) => pid)
        .sort(),
    ).toEqual([...pids].sort())
    expect({ payload, fork }).toEqual({ payload: null, fork: true })
  })

  test('forks a checkpoint that stays, and gives it back', async () => {
    const { supervisor, child } = await forked()
    const said = inForks(supervisor)
    const pids = await tell<number[]>(child, 'keep', { count: 3 })
    await eventually(() => said.filter((word) => word === 'atExit').length === 3, 'all have ended their blocks')
    const states = said.flatMap((word) => (typeof word === 'object' ? [word] : []))
    expect(states.map(({ state }) => state.pid).sort()).toEqual([...pids].sort())
  })

  test('ends a block on the main thread with its status and exit handlers, and without what encloses the call', async () => {
    const { supervisor, child } = await forked()
    const said = inForks(supervisor)
    const copy = new Promise<Child>((resolve) => supervisor.once('child', resolve))
    await tell(child, 'exec')
    expect(await (await copy).exit).toEqual({ code: 1, signal: null })
    expect(said).toEqual(['atExit'])
  })

  test('runs no other thread of Ruby before the hooks', async () => {
    const supervisor = await app({ env: { BUSY: '3' } })
    const children = await Promise.all([1, 2, 3].map(() => supervisor.fork()))
    const seen = await Promise.all(children.map(async (child) => (await tell<State>(child, 'state')).seen))
    // They count on from one number, each for another while until they are asked.
    expect(seen[0]).toBeGreaterThan(0)
    expect(new Set(seen).size).toBe(1)
  })

  test('tells threads by their new ids, and in forks of forks too', async () => {
    const supervisor = await app()
    let child = await supervisor.fork()
    for (let depth = 0; depth < 3; depth++) {
      const { ids, tasks } = await tell<{ ids: number[]; tasks: number[] }>(child, 'threads')
      expect(tasks).toEqual(expect.arrayContaining(ids))
      const next = new Promise<Child>((resolve) => supervisor.once('child', resolve))
      await tell(child, 'stay')
      child = await next
    }
  })

  test('hears signals, in a fork of a fork too', async () => {
    const { supervisor, child } = await forked()
    const copy = new Promise<Child>((resolve) => supervisor.once('child', resolve))
    await tell(child, 'stay')
    for (const one of [await copy, child]) {
      await one.end({ graceMs: 10_000 })
      expect(await one.exit).toEqual({ code: 3, signal: null })
    }
  })

  test('leaves real forks as they are, whose agents have connections of their own', async () => {
    const { child } = await forked()
    const { said, pid, status, rand } = await tell<{ said: string; pid: number; status: number; rand: number }>(
      child,
      'real',
    )
    expect(said).toMatch(new RegExp(`^\\[${pid}, ${pid}, false, 0\\.\\d+\\]$`))
    expect(said).not.toContain(`${rand}`)
    expect(status).toBe(0)
    expect((await tell<State>(child, 'state')).connected).toBe(true)
  })

  test.each([
    ['throws', 'throw', /`beforeIt` failed: not now/],
    ['exits', 'exit', /`beforeIt` failed: exit/],
    ['forks', 'fork', /`beforeIt` failed: a hook cannot ask for a fork/],
  ])('lets it go on where a hook before a checkpoint %s', async (_, act, message) => {
    const { child } = await forked()
    await tell(child, 'act', { hook: 'before', act })
    const error = { code: 'HOOK_FAILED', message: expect.stringMatching(message) }
    await expect(tell(child, 'fork', { count: 1 })).rejects.toMatchObject(error)
    await tell(child, 'act', { hook: 'before', act: null })
    expect(await tell(child, 'fork', { count: 1 })).toHaveLength(1)
  })

  test('bears a hook that forks for real', async () => {
    const proof = join(place.current.directory, 'proof')
    const { child } = await forked({ env: { PROOF: proof } })
    await tell(child, 'act', { hook: 'before', act: 'process' })
    await tell(child, 'act', { hook: 'fork', act: 'process' })
    expect(await tell(child, 'fork', { count: 1 })).toHaveLength(1)
    expect(Number(readFileSync(proof, 'latin1'))).not.toBe(child.pid)
  })

  test.each([
    ['throws', 'throw', 70],
    ['exits', 'exit', 5],
  ])('ends a fork where its hook %s, and the source lives on', async (_, act, code) => {
    const { supervisor, child } = await forked()
    await tell(child, 'act', { hook: 'fork', act })
    const copy = new Promise<Child>((resolve) => supervisor.once('child', resolve))
    await tell(child, 'fork', { count: 1 })
    expect((await (await copy).exit).code).toBe(code)
    expect((await tell<State>(child, 'state')).pid).toBe(child.pid)
  })
})
