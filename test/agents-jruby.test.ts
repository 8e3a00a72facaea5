/** The Ruby agent in JRuby with real forks. */
import { beforeAll, describe, expect, test } from 'vitest'
import type { Child } from '../src/child.js'
import type { SupervisorOptions } from '../src/options.js'
import { type Drawn, differs, inForks, RUBY_APP, type State, tell } from './agents-ruby.js'
import { ENGINES, eventually, usePlace } from './engines-under-test.js'
import { RUNTIME_CACHE, RUNTIMES } from './runtimes/index.js'

const jruby = RUNTIMES.find(({ name }) => name === 'JRuby')!
const missing = process.env.WARMFORK_TEST_MATRIX ? await jruby.available() : 'with `npm run test:matrix`'

describe.skipIf(missing !== undefined || !ENGINES.includes('criu'))('the agent of a JRuby program', () => {
  beforeAll(() => jruby.install(RUNTIME_CACHE), 1_800_000)
  const place = usePlace('criu')
  const app = (options: Partial<SupervisorOptions> = {}) => {
    const [program] = jruby.command(RUNTIME_CACHE)
    return place.current.start({
      command: [program, RUBY_APP, 'one'],
      ready: { agent: true },
      pool: { size: 0 },
      ...options,
    })
  }

  test('gives each of twenty forks an identity and randomness of its own, and its threads stand still until it has', async () => {
    const supervisor = await app({ env: { BUSY: '1' } })
    const children: Child[] = []
    const states: State[] = []
    const drawn: Drawn[] = []
    for (let i = 0; i < 20; i++) {
      const child = await supervisor.fork({ data: i, args: [`${i}`] })
      children.push(child)
      states.push(await tell<State>(child, 'state'))
      drawn.push(await tell<Drawn>(child, 'draw'))
      await child.end({ graceMs: 0 })
    }
    expect(states.map(({ pid, dollar, kernel }) => [pid, dollar, kernel])).toEqual(
      children.map(({ pid }) => [pid, pid, pid]),
    )
    expect(states.map(({ payload, args }) => [payload, args])).toEqual(children.map((_, i) => [i, [`${i}`]]))
    expect(states.map(({ wrapped }) => wrapped)).toEqual(children.map(() => [['child', []]]))
    expect(differs(drawn)).toEqual([])
    expect(drawn.map(({ handle }) => handle)).toEqual(children.map(({ pid }) => pid))
    expect(states[0]!.seen).toBeGreaterThan(0)
    expect(new Set(states.map(({ seen }) => seen)).size).toBe(1)
    expect(supervisor.warnings.filter(({ kind }) => kind === 'agent')).toEqual([])
  })

  test('can do what JRuby cannot: Process.fork, whose children are waited for', async () => {
    const supervisor = await app()
    const child = await supervisor.fork()
    const said = inForks(supervisor)
    const { pid, ...rest } = await tell<{ pid: number }>(child, 'process', { status: 7 })
    expect(rest).toEqual({ found: pid, status: 7, success: false })
    expect((await tell<{ signal: number }>(child, 'detach')).signal).toBe(9)
    const pids = await tell<number[]>(child, 'fork', { count: 3 })
    const atExit = () => said.filter((word) => word === 'atExit').length
    await eventually(() => atExit() === 4, 'all but the one that was killed have run their exit handlers')
    const states = said.flatMap((word) => (typeof word === 'object' ? [word] : []))
    expect(states.map(({ state }) => state.pid).sort()).toEqual([...pids].sort())
    expect(differs(states.map(({ draw }) => draw))).toEqual([])
    expect(said).not.toContain('ensure')
  })
})
