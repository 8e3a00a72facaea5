/** Ids and descriptors that run out under a supervisor. */
import { spawnSync } from 'node:child_process'
import { accessSync, constants, mkdtempSync, readFileSync, rmdirSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import type { SupervisorOptions } from '../src/options.js'
import { ask, eventually, Place, PROGRAMS } from './engines-under-test.js'
import { leftovers, NOTHING, tokensIn, untilNothingLeft, useCleanPlace } from './leftovers.js'
import { SupervisorProcess } from './supervisor-process.js'

const CAT: SupervisorOptions['command'] = ['sh', '-c', 'echo ready; exec cat']

/** Linux gives each pid namespace its own kernel.pid_max since 6.14. */
function hasOwnPidMax(): boolean {
  const script = 'echo 500 > /proc/sys/kernel/pid_max && cat /proc/sys/kernel/pid_max'
  const before = spawnSync('cat', ['/proc/sys/kernel/pid_max'], { encoding: 'utf8' }).stdout
  const inside = spawnSync('unshare', ['--pid', '--fork', '--mount-proc', 'sh', '-c', script], { encoding: 'utf8' })
  const after = spawnSync('cat', ['/proc/sys/kernel/pid_max'], { encoding: 'utf8' }).stdout
  return inside.stdout.trim() === '500' && before === after
}

/** Where cgroups can be made that limit the number of processes: its own hierarchy (v1), or the one for all (v2). */
const pidsHierarchy = ['/sys/fs/cgroup/pids', '/sys/fs/cgroup'].find((path) => {
  if (path === '/sys/fs/cgroup' && !read(join(path, 'cgroup.subtree_control')).includes('pids')) return false
  try {
    accessSync(join(path, 'cgroup.procs'), constants.W_OK)
    return true
  } catch {
    return false
  }
})

function read(path: string): string {
  try {
    return readFileSync(path, 'latin1')
  } catch {
    return ''
  }
}

const inPidNamespace = (pidMax: number) => [
  ...['unshare', '--pid', '--fork', '--kill-child', '--mount-proc'],
  ...['sh', '-c', `echo ${pidMax} > /proc/sys/kernel/pid_max; exec "$@"`, 'sh'],
]

describe('a supervisor in a process of its own', () => {
  let place: Place
  let supervisor: SupervisorProcess

  beforeEach(() => {
    place = new Place('criu')
  })

  afterEach(async () => {
    const tokens = tokensIn(place.runtimeDirectory)
    if (supervisor.process.exitCode === null) await supervisor.kill()
    const look = () => leftovers(place, tokens, [supervisor.pid])
    const left = await untilNothingLeft(look)
    await place.leave()
    expect(left).toEqual(NOTHING)
  })

  function start(options: Partial<SupervisorOptions>, wrapper: readonly string[]): SupervisorProcess {
    const { env: _, ...known } = place.options({ cwd: place.directory, ...options })
    supervisor = new SupervisorProcess(known, { wrapper, env: { [place.mark]: '1' } })
    return supervisor
  }

  test.skipIf(!hasOwnPidMax())('runs out of ids, says so, and forks again when some are free', async () => {
    // The kernel keeps those below 300 for what boots first.
    const supervisor = start({ command: CAT, pool: { size: 0 } }, inPidNamespace(400))
    await supervisor.reached('running')
    const pids: number[] = []
    let error: { code?: string; message?: string } | undefined
    while (!error && pids.length < 400) {
      await supervisor.fork().then(
        (pid) => pids.push(pid),
        (failure) => {
          error = failure
        },
      )
    }
    expect(error).toMatchObject({ code: 'PIDS_EXHAUSTED', message: expect.stringContaining('kernel.pid_max') })
    expect(pids.length).toBeGreaterThan(30)
    expect(new Set(pids).size).toBe(pids.length)
    // Those that run are none the worse for it.
    for (const pid of pids.slice(0, 20)) expect(await supervisor.ask(pid, `I am ${pid}`)).toBe(`I am ${pid}`)
    for (const pid of pids) await supervisor.end(pid)
    const again = await supervisor.fork()
    expect(await supervisor.ask(again, 'again')).toBe('again')
    await supervisor.stop()
  })

  test.skipIf(!hasOwnPidMax())('goes round all ids several times, and uses none again at once', async () => {
    const supervisor = start({ command: CAT, pool: { size: 1 } }, inPidNamespace(450))
    await supervisor.reached('running')
    const recent: number[] = []
    for (let i = 0; i < 400; i++) {
      const pid = await supervisor.fork()
      expect(recent).not.toContain(pid)
      recent.push(pid)
      // Of some 150, each fork takes one for its criu and one for itself.
      if (recent.length > 40) recent.shift()
      expect(await supervisor.ask(pid, `fork ${i}`)).toBe(`fork ${i}`)
      await supervisor.end(pid)
    }
    expect((await supervisor.state()).warnings).toEqual([])
    await supervisor.stop()
  })

  test('runs out of descriptors, says so, and forks again when some are free', async () => {
    const supervisor = start({ command: CAT, pool: { size: 0 } }, ['sh', '-c', 'ulimit -n 400; exec "$@"', 'sh'])
    await supervisor.reached('running')
    const pids: number[] = []
    const codes: string[] = []
    for (let i = 0; i < 150; i++) {
      await supervisor.fork().then(
        (pid) => pids.push(pid),
        (failure) => codes.push(failure.code),
      )
    }
    expect(pids.length).toBeGreaterThan(5)
    expect(codes.length).toBeGreaterThan(5)
    expect([...new Set(codes)]).toEqual(['FDS_EXHAUSTED'])
    expect(await supervisor.ask(pids[0]!, 'I am here')).toBe('I am here')
    for (const pid of pids) await supervisor.end(pid)
    const again = await supervisor.fork()
    expect(await supervisor.ask(again, 'again')).toBe('again')
    await supervisor.stop()
  })

  test('with a pool that runs out of descriptors: it is filled again when some are free', async () => {
    const supervisor = start({ command: CAT, pool: { size: 2 } }, ['sh', '-c', 'ulimit -n 400; exec "$@"', 'sh'])
    await supervisor.reached('running')
    const pids: number[] = []
    for (let i = 0; i < 150; i++)
      await supervisor.fork().then(
        (pid) => pids.push(pid),
        () => {},
      )
    for (const pid of pids) await supervisor.end(pid)
    for (let i = 0; i < 100 && (await supervisor.state()).parked.length < 2; i++) {
      await new Promise((resolve) => setTimeout(resolve, 100))
    }
    expect((await supervisor.state()).parked).toHaveLength(2)
    await supervisor.stop()
  })

  test('with so few descriptors that criu cannot work: the start says so', async () => {
    const supervisor = start({ command: CAT }, ['sh', '-c', 'ulimit -n 80; exec "$@"', 'sh'])
    await expect(supervisor.reached('running')).rejects.toMatchObject({
      code: 'FDS_EXHAUSTED',
      message: expect.stringContaining('ulimit -n'),
    })
    await supervisor.exited
  })

  test.skipIf(pidsHierarchy === undefined)(
    'in a cgroup that is full says so, and forks again when there is room',
    async () => {
      const group = mkdtempSync(join(pidsHierarchy!, 'warmfork-test-'))
      try {
        writeFileSync(join(group, 'pids.max'), '60')
        const enter = `echo $$ > ${join(group, 'cgroup.procs')}; exec "$@"`
        const supervisor = start({ command: CAT, pool: { size: 0 } }, ['sh', '-c', enter, 'sh'])
        await supervisor.reached('running')
        const pids: number[] = []
        const codes: string[] = []
        for (let i = 0; i < 60; i++) {
          await supervisor.fork().then(
            (pid) => pids.push(pid),
            (error) => codes.push(error.code),
          )
        }
        expect(pids.length).toBeGreaterThan(10)
        expect(codes.length).toBeGreaterThan(5)
        expect([...new Set(codes)]).toEqual(['PIDS_EXHAUSTED'])
        for (const pid of pids) await supervisor.end(pid)
        const again = await supervisor.fork()
        expect(await supervisor.ask(again, 'again')).toBe('again')
        await supervisor.stop()
      } finally {
        await supervisor.kill()
        await eventually(() => readFileSync(join(group, 'cgroup.procs'), 'latin1') === '', 'the cgroup is empty')
        rmdirSync(group)
      }
    },
  )
})

describe('many children', () => {
  const place = useCleanPlace()

  test('200 of a Node program at once each answer with their own id', async () => {
    const supervisor = await place.current.start({
      command: [process.execPath, join(PROGRAMS, 'app.mjs')],
      pool: { size: 4 },
    })
    const children = await Promise.all(Array.from({ length: 200 }, () => supervisor.fork()))
    expect(await Promise.all(children.map((child) => ask(child, 'pid')))).toEqual(
      children.map(({ pid }) => String(pid)),
    )
    expect((await supervisor.stats()).children).toHaveLength(200)
    await supervisor.stop({ graceMs: 5_000 })
    await eventually(() => supervisor.children.length === 0, 'all have ended')
  })
})
