/** Supervisors and workers that are not root. They need root, to become somebody else. */
import { spawnSync } from 'node:child_process'
import { chmodSync, chownSync, readdirSync, readFileSync, statSync } from 'node:fs'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { CRIU_CAPABILITIES } from '../src/engines/criu/rights.js'
import { allPids, isAlive, mappings, stat } from '../src/linux/proc.js'
import type { SupervisorOptions } from '../src/options.js'
import { ask, eventually, Place, PROGRAMS } from './engines-under-test.js'
import { leftovers, NOTHING, tokensIn, untilNothingLeft, useCleanPlace } from './leftovers.js'
import { SupervisorProcess } from './supervisor-process.js'

const NOBODY = 65534
const APP: SupervisorOptions['command'] = [process.execPath, join(PROGRAMS, 'app.mjs')]
const CAPABILITIES = CRIU_CAPABILITIES.map((name) => `+${name}`).join(',')

const asNobody = ['setpriv', `--reuid=${NOBODY}`, `--regid=${NOBODY}`, '--clear-groups']
const withCapabilities = [...asNobody, `--inh-caps=-all,${CAPABILITIES}`, `--ambient-caps=-all,${CAPABILITIES}`]
/** In a clone below a home that is closed to others, nobody can run what is tried here. */
const isOpen = spawnSync(asNobody[0]!, [...asNobody.slice(1), 'cat', APP[1]!]).status === 0

const isRoot = process.getuid?.() === 0

const ids = (pid: number) =>
  /^Uid:\t(.*)$/m
    .exec(readFileSync(`/proc/${pid}/status`, 'latin1'))![1]!
    .split('\t')
    .map(Number)
const groups = (pid: number) =>
  /^Gid:\t(.*)$/m
    .exec(readFileSync(`/proc/${pid}/status`, 'latin1'))![1]!
    .split('\t')
    .map(Number)
const capabilities = (pid: number) => /^CapEff:\t(.*)$/m.exec(readFileSync(`/proc/${pid}/status`, 'latin1'))![1]
const mode = (path: string) => (statSync(path).mode & 0o7777).toString(8)

describe.skipIf(!isRoot || !isOpen)('a supervisor that is not root', () => {
  let place: Place
  let supervisor: SupervisorProcess

  beforeEach(() => {
    place = new Place('criu')
    for (const path of [place.directory, place.runtimeDirectory]) chownSync(path, NOBODY, NOBODY)
  })

  afterEach(async () => {
    const tokens = tokensIn(place.runtimeDirectory)
    await supervisor.kill()
    const left = await untilNothingLeft(() => leftovers(place, tokens, [supervisor.pid]))
    await place.leave()
    expect(left).toEqual(NOTHING)
  })

  function start(options: Partial<SupervisorOptions>, wrapper: readonly string[]): SupervisorProcess {
    const { env: _, ...known } = place.options({ command: APP, cwd: place.directory, ...options })
    supervisor = new SupervisorProcess(known, { wrapper, env: { [place.mark]: '1', HOME: place.directory } })
    return supervisor
  }

  test('and has the four capabilities forks by restoring, and its children have none of them', async () => {
    const supervisor = start({ pool: { size: 1 } }, withCapabilities)
    await supervisor.reached('running')
    const pids = [await supervisor.fork(), await supervisor.fork()]
    for (const pid of pids) {
      expect(await supervisor.ask(pid, 'ids')).toMatch(/^65534 65534\b/)
      expect(ids(pid)).toEqual(Array(4).fill(NOBODY))
      expect(capabilities(pid)).toBe('0000000000000000')
    }
    expect(await supervisor.state()).toMatchObject({ engine: 'criu', memory: 'cow', warnings: [] })
    await supervisor.stop()
  })

  test('and is killed leaves nothing', async () => {
    const supervisor = start({ pool: { size: 2 } }, withCapabilities)
    await supervisor.reached('running')
    const pid = await supervisor.fork()
    const grandchild = Number(await supervisor.ask(pid, 'start'))
    const { template, parked } = await supervisor.state()
    await supervisor.kill()
    await eventually(() => ![pid, grandchild, template, ...parked].some((one) => isAlive(one)), 'all have ended')
  })

  test('and has no rights starts its program cold for each fork, and says why', async () => {
    const supervisor = start({ engine: 'auto' }, asNobody)
    await supervisor.reached('running')
    const pid = await supervisor.fork()
    expect(await supervisor.ask(pid, 'ids')).toMatch(/^65534 65534\b/)
    const { engine, warnings } = await supervisor.state()
    expect(engine).toBe('spawn')
    expect(warnings).toEqual([expect.stringMatching(/^engine-spawn: .*CRIU_RIGHTS.*ambient/)])
    await supervisor.stop()
  })

  test('and has no rights does not start where it has to restore, and says what to do', async () => {
    const supervisor = start({ engine: 'criu' }, asNobody)
    await supervisor.exited
    expect(supervisor.failed).toMatchObject({ code: 'CRIU_RIGHTS', message: expect.stringContaining('CAP_SETPCAP') })
  })

  test('and lacks one capability of four says which', async () => {
    const three = CRIU_CAPABILITIES.slice(1)
      .map((name) => `+${name}`)
      .join(',')
    const wrapper = [...asNobody, `--inh-caps=-all,${three}`, `--ambient-caps=-all,${three}`]
    const supervisor = start({ engine: 'criu' }, wrapper)
    await supervisor.exited
    expect(supervisor.failed).toMatchObject({
      code: 'CRIU_RIGHTS',
      message: expect.stringContaining('lacks CAP_CHECKPOINT_RESTORE.'),
    })
  })

  test('cannot use a store that is root’s, and says so', async () => {
    const store = join(place.directory, 'store')
    start({}, withCapabilities)
    await supervisor.reached('running')
    await supervisor.stop()
    chownSync(store, 0, 0)
    chmodSync(store, 0o700)
    start({}, withCapabilities)
    await supervisor.exited
    expect(supervisor.failed).toMatchObject({ code: expect.stringMatching(/^STORE_(UNWRITABLE|UNSAFE)$/) })
    chownSync(store, NOBODY, NOBODY)
  })
})

describe.skipIf(!isRoot || !isOpen)('a supervisor that is root, with workers that are not', () => {
  const place = useCleanPlace()

  const start = (options: Partial<SupervisorOptions> = {}) => {
    // criu opens the working directory as they.
    chmodSync(place.current.directory, 0o755)
    return place.current.start({ command: APP, user: 'nobody', group: 'nogroup', pool: { size: 1 }, ...options })
  }

  test('forks children that are that user, share their memory and have no rights', async () => {
    const supervisor = await start()
    const children = [await supervisor.fork(), await supervisor.fork()]
    for (const child of children) {
      expect(await ask(child, 'ids')).toMatch(/^65534 65534\b/)
      expect(ids(child.pid)).toEqual(Array(4).fill(NOBODY))
      expect(groups(child.pid)).toEqual(Array(4).fill(NOBODY))
      expect(capabilities(child.pid)).toBe('0000000000000000')
      expect(mappings(child.pid)!.some(({ path }) => path.includes('warmfork-pages'))).toBe(true)
    }
    expect(supervisor.generations()[0]).toMatchObject({ memory: 'cow', warnings: [] })
  })

  test('keeps the store and the runtime directory closed to them but for what they have to reach', async () => {
    const supervisor = await start({ name: 'closed' })
    const store = (...path: string[]) => join(place.current.directory, 'store', 'closed', ...path)
    await supervisor.fork()
    expect([store(), store('generations'), store('generations', '1')].map(mode)).toEqual(['710', '710', '710'])
    expect(mode(store('generations', '1', 'memory-1.warmfork-pages'))).toBe('440')
    // Whoever is in the group can enter, but not list, and write nowhere.
    const tried = (command: string) => spawnSync(asNobody[0]!, [...asNobody.slice(1), 'sh', '-c', command]).status
    expect(tried(`ls ${store()}`)).not.toBe(0)
    expect(tried(`ls ${store('generations', '1')}`)).not.toBe(0)
    expect(tried(`echo x > ${store('generations', '1', 'x')}`)).not.toBe(0)
    const run = join(place.current.runtimeDirectory, 'closed')
    expect(tried(`ls ${join(run, readdirSync(run)[0]!)}`)).not.toBe(0)
  })

  test('ends them with all that they have started, and leaves nothing in their name', async () => {
    const supervisor = await start()
    const child = await supervisor.fork()
    const grandchild = Number(await ask(child, 'start'))
    expect(ids(grandchild)[0]).toBe(NOBODY)
    await supervisor.stop()
    expect([child.pid, grandchild].filter((pid) => isAlive(pid))).toEqual([])
    expect(allPids().filter((pid) => stat(pid)?.ppid === process.pid && stat(pid)?.comm === 'node')).toEqual([])
  })

  test('gives them descriptors of its own', async () => {
    const supervisor = await start()
    const child = await supervisor.fork()
    child.stdin.write('say one\n')
    for await (const line of child.lines()) {
      expect(line).toBe('one')
      break
    }
    child.kill('SIGTERM')
    expect(await child.exit).toEqual({ code: null, signal: 'SIGTERM' })
  })

  test('has workers whose number no user has', async () => {
    const supervisor = await start({ user: 54321, group: 54322 })
    const child = await supervisor.fork()
    expect(await ask(child, 'ids')).toMatch(/^54321 54322\b/)
  })
})
