import { existsSync, readdirSync } from 'node:fs'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { Store } from '../src/generations/store.js'
import { isAlive, processTree, stat } from '../src/linux/proc.js'
import type { SupervisorOptions } from '../src/options.js'
import { eventually, Place, PROGRAMS } from './engines-under-test.js'
import { type Leftovers, leftovers, NOTHING, processesOf, tokensIn, untilNothingLeft } from './leftovers.js'
import { SupervisorProcess } from './supervisor-process.js'

type Command = SupervisorOptions['command']

/** Enough memory that a dump and the prepare of it can be met. */
const FAMILY: Command = [process.execPath, join(PROGRAMS, 'family.mjs'), '150']
const SMALL_FAMILY: Command = [process.execPath, join(PROGRAMS, 'family.mjs'), '1']

describe('a supervisor that is killed with SIGKILL', () => {
  let place: Place
  let supervisors: SupervisorProcess[]
  /** Of all supervisors that were seen in the runtime directory. */
  let tokens: Set<string>

  beforeEach(() => {
    place = new Place('criu')
    supervisors = []
    tokens = new Set()
  })

  afterEach(async () => {
    for (const supervisor of supervisors) if (supervisor.process.exitCode === null) await supervisor.kill()
    const left = await untilNothingLeft(look)
    await place.leave()
    expect(left).toEqual(NOTHING)
  })

  function look(): Leftovers {
    return leftovers(
      place,
      [...tokens],
      supervisors.map(({ pid }) => pid),
    )
  }

  function start(options: Partial<SupervisorOptions> = {}): SupervisorProcess {
    const { env: _, ...known } = place.options({ name: 'kill', command: FAMILY, cwd: place.directory, ...options })
    const supervisor = new SupervisorProcess(known, { env: { [place.mark]: '1' } })
    supervisors.push(supervisor)
    return supervisor
  }

  const noteTokens = () => {
    for (const token of tokensIn(place.runtimeDirectory)) tokens.add(token)
  }

  /** kill -9, after which everything that it made must end by itself. */
  async function killed(supervisor: SupervisorProcess): Promise<void> {
    noteTokens()
    await supervisor.kill()
    for (const name of drafts()) abandoned.add(name)
    // Drafts are swept by the next supervisor, and the abandoned one's are looked at below.
    expect({ ...(await untilNothingLeft(() => ({ ...look(), drafts: [] }))), drafts: [] }).toEqual(NOTHING)
  }

  /** The next supervisor starts at once, has swept the store, and forks. Older generations are whole. */
  async function expectNextWorks(): Promise<void> {
    const next = start({ command: SMALL_FAMILY })
    await next.reached('running')
    noteTokens()
    expect(look().drafts).toEqual([])
    const pid = await next.fork()
    expect(Number(await next.ask(pid, 'pid'))).toBe(pid)
    await next.stop()
    const store = await Store.open({ root: join(place.directory, 'store'), name: 'kill', access: 'read' })
    const { generations, broken } = await store.survey()
    expect(broken).toEqual([])
    for (const generation of generations) await generation.verify()
    await store.close()
  }

  const generationsOf = () => join(place.directory, 'store', 'kill', 'generations')
  /** Drafts of supervisors that were killed before: the store sweeps them when it is opened next. */
  const abandoned = new Set<string>()
  const drafts = () =>
    (existsSync(generationsOf()) ? readdirSync(generationsOf()) : []).filter((name) => name.startsWith('.tmp-'))
  const inDraft = (...path: string[]) => {
    const names = drafts().filter((name) => !abandoned.has(name))
    return names.some((name) => existsSync(join(generationsOf(), name, ...path)))
  }

  /** Waits without a pause: the moments that are looked for last milliseconds. One that was missed is over with the start. */
  async function at(condition: () => boolean, supervisor: SupervisorProcess): Promise<void> {
    for (const deadline = Date.now() + 30_000; !condition() && !supervisor.phases.includes('running'); ) {
      if (Date.now() > deadline || supervisor.failed) throw new Error(`it did not come to that: ${supervisor.stderr}`)
      await new Promise(setImmediate)
    }
  }

  /** Whether some criu has begun: it opens its log with the request. */
  function isRestoring(supervisor: SupervisorProcess): boolean {
    return forkDirectories(supervisor.pid).some((fork) => existsSync(join(fork, 'restore.log')))
  }

  /** On a tmpfs, wherever there is one. */
  function forkDirectories(pid: number): string[] {
    const runs = tokensIn(place.runtimeDirectory).map((token) =>
      join(place.runtimeDirectory, 'kill', `run-${token}`, 'forks'),
    )
    const shared = list('/dev/shm')
      .filter((name) => name.startsWith(`warmfork-${pid}-`))
      .map((name) => join('/dev/shm', name))
    return [...runs, ...shared].flatMap((path) => list(path).map((name) => join(path, name)))
  }

  function list(path: string): string[] {
    try {
      return readdirSync(path)
    } catch {
      return []
    }
  }

  const wait = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms))

  test('while the template boots leaves nothing', async () => {
    const supervisor = start({ ready: { output: 'never' } })
    await supervisor.reached('boot')
    await wait(200)
    await killed(supervisor)
    await expectNextWorks()
  })

  test('while criu dumps leaves nothing, at any moment', async () => {
    for (const ms of [0, 10, 25, 50, 80, 120]) {
      const supervisor = start()
      await at(() => inDraft('scratch', 'dump.log'), supervisor)
      await wait(ms)
      await killed(supervisor)
    }
    await expectNextWorks()
  })

  test('while the image is prepared leaves nothing, at any moment', async () => {
    for (const ms of [0, 10, 30, 60, 100, 200]) {
      const supervisor = start()
      await at(() => inDraft('image', 'inventory.img'), supervisor)
      await wait(ms)
      await killed(supervisor)
    }
    await expectNextWorks()
  })

  test('while the first children are restored leaves nothing, at any moment', async () => {
    for (const ms of [0, 1, 2, 4, 6, 8, 11, 15]) {
      const supervisor = start({ command: SMALL_FAMILY, pool: { size: 3 } })
      await at(() => isRestoring(supervisor), supervisor)
      await wait(ms)
      await killed(supervisor)
    }
    await expectNextWorks()
  })

  test('after its guard was killed leaves nothing: there is another', async () => {
    const supervisor = start({ command: SMALL_FAMILY, pool: { size: 2 } })
    await supervisor.reached('running')
    const child = await supervisor.fork()
    await supervisor.ask(child, 'start')
    const guards = () => childrenOf(supervisor.pid).filter((pid) => stat(pid)?.comm === 'warmfork-guard')
    const [first] = guards()
    process.kill(first!, 'SIGKILL')
    // One look for all that is asked: between two, the dead one may have been reaped before there is another.
    const isReplaced = (seen: number[]) => seen.length === 1 && seen[0] !== first
    await eventually(() => isReplaced(guards()), 'another is there')
    await killed(supervisor)
  })

  const childrenOf = (pid: number) => processTree(pid).flatMap((one) => (one.ppid === pid ? [one.pid] : []))

  test('with a full pool and busy children leaves nothing', async () => {
    const supervisor = start({ command: SMALL_FAMILY, pool: { size: 3 } })
    await supervisor.reached('running')
    const [one, other] = [await supervisor.fork(), await supervisor.fork()]
    const relatives = [one, other].map((pid) => supervisor.ask(pid, 'start'))
    const pids = (await Promise.all(relatives)).flatMap((line) => line.split(' ').map(Number))
    expect(pids.filter((pid) => isAlive(pid))).toHaveLength(6)
    await killed(supervisor)
    expect(pids.filter((pid) => isAlive(pid))).toEqual([])
    await expectNextWorks()
  })

  test('while it stops leaves nothing', async () => {
    const deaf = "trap '' TERM; echo ready; while :; do sleep 0.05; done"
    const supervisor = start({
      command: ['/bin/sh', '-c', deaf],
      template: { stopTimeoutMs: 20_000 },
      pool: { size: 2 },
    })
    await supervisor.reached('running')
    await supervisor.fork()
    supervisor.call('stop', 20_000).catch(() => {})
    await wait(300)
    await killed(supervisor)
  })

  // What a supervisor does at other signals is its embedder's matter; where that does nothing, Node ends.
  test.each(['SIGTERM', 'SIGINT', 'SIGHUP'] as const)('by %s instead leaves nothing either', async (signal) => {
    const supervisor = start({ command: SMALL_FAMILY, pool: { size: 2 } })
    await supervisor.reached('running')
    await supervisor.fork()
    noteTokens()
    supervisor.process.kill(signal)
    await supervisor.exited
    expect(await untilNothingLeft(look)).toEqual(NOTHING)
  })

  test('in the middle of many forks leaves nothing', async () => {
    for (const ms of [20, 45, 70, 110]) {
      const supervisor = start({ command: SMALL_FAMILY, pool: { size: 2 } })
      await supervisor.reached('running')
      for (let i = 0; i < 20; i++) supervisor.fork().catch(() => {})
      await wait(ms)
      await killed(supervisor)
    }
  })

  test('leaves its running children, and only them, where orphans are to be left', async () => {
    const supervisor = start({ command: SMALL_FAMILY, pool: { size: 2 }, orphans: 'leave' })
    await supervisor.reached('running')
    const child = await supervisor.fork()
    const relatives = (await supervisor.ask(child, 'start')).split(' ').map(Number)
    const { template, parked } = await supervisor.state()
    // Of the template's; in the child they have ids of its own.
    const before = (await supervisor.ask(child, 'relatives')).split(' ').map(Number)
    noteTokens()
    await supervisor.kill()
    await eventually(() => ![template, ...parked].some((pid) => isAlive(pid)), 'template and parked children end')
    await wait(500)
    const left = processesOf(place.directory, [place.mark, ...tokens])
    try {
      expect(isAlive(child)).toBe(true)
      expect(relatives.filter((pid) => isAlive(pid))).toEqual(relatives)
      expect(before.filter((pid) => isAlive(pid))).toEqual(before)
      expect(left.sort()).toEqual([child, ...before, ...relatives].sort())
    } finally {
      for (const pid of [child, ...left]) if (isAlive(pid)) process.kill(pid, 'SIGKILL')
    }
    await expectNextWorks()
  })
})
