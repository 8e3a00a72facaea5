import { spawnSync } from 'node:child_process'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { describe, expect, test } from 'vitest'
import type { Child } from '../src/child.js'
import { allPids, descendants, environment, isAlive, processTree, stat, threadIds } from '../src/linux/proc.js'
import type { SupervisorOptions } from '../src/options.js'
import { ask, eventually } from './engines-under-test.js'
import { useCleanPlace } from './leftovers.js'
import { SupervisorProcess } from './supervisor-process.js'

const TREES = fileURLToPath(new URL('fixtures/trees/', import.meta.url))
const MASTER: SupervisorOptions['command'] = ['/usr/bin/python3', '-I', join(TREES, 'master.py')]
const CLUSTER: SupervisorOptions['command'] = [process.execPath, join(TREES, 'cluster.mjs')]

const hasPython = spawnSync('/usr/bin/python3', ['--version']).status === 0
const isRoot = process.getuid?.() === 0

/** The processes by name, with what they are to each other. */
function shapeOf(root: number) {
  const tree = processTree(root)
  const name = (pid: number) => tree.find((one) => one.pid === pid)?.comm ?? 'nobody'
  return tree
    .map(({ pid, comm, ppid, pgid, sid, state }) => ({
      comm,
      parent: pid === root ? undefined : name(ppid),
      group: name(pgid),
      session: name(sid),
      state: state === 'T' || state === 'Z' ? state : 'lives',
      threads: state === 'Z' ? 1 : threadIds(pid).length,
    }))
    .sort((a, b) => (a.comm < b.comm ? -1 : 1))
}

const named = (root: number, comm: string) => processTree(root).find((one) => one.comm === comm)!.pid

/** As from a terminal or a shell: to the whole group. */
const signalGroup = (child: Child, signal: NodeJS.Signals) => process.kill(-child.pid, signal)

describe.skipIf(!isRoot || !hasPython).each(['fresh', 'namespace'] as const)(
  'a tree of processes, identity %s',
  (identity) => {
    const place = useCleanPlace()
    const start = (command: SupervisorOptions['command'], options: Partial<SupervisorOptions> = {}) =>
      place.current.start({ command, identity, pool: { size: 0 }, ...options })

    test('has its parents, groups, sessions, threads, zombies and stopped processes in each of five forks made at once', async () => {
      const supervisor = await start(MASTER)
      const shape = shapeOf(supervisor.template!.pid)
      expect(shape).toHaveLength(11)
      expect(shape.find(({ comm }) => comm === 'zombie')).toMatchObject({ parent: 'master', state: 'Z' })
      expect(shape.find(({ comm }) => comm === 'stopped')).toMatchObject({ group: 'master', state: 'T' })
      expect(shape.find(({ comm }) => comm === 'orphan')).toMatchObject({ parent: 'master', session: 'orphan' })
      expect(shape.find(({ comm }) => comm === 'stray')).toMatchObject({ parent: 'master', session: 'nobody' })
      // Whose session's leader is gone is given to init, as by criu in general; the others are as they were.
      const restored = shape.filter(({ comm }) => comm !== 'stray')
      const forks = await Promise.all(Array.from({ length: 5 }, () => supervisor.fork()))
      const all = forks.flatMap((child) => processTree(child.pid).map(({ pid }) => pid))
      expect(new Set(all).size).toBe(50)
      const strays = allPids().filter((pid) => {
        const ours = stat(pid)?.comm === 'stray' && environment(pid)?.includes(`${place.current.mark}=1`)
        return ours && stat(pid)?.ppid !== supervisor.template!.pid
      })
      expect(strays.map((pid) => stat(pid)?.state)).toEqual(forks.map(() => 'S'))
      // Signals inside reach the group, and nobody else's.
      for (const child of forks) expect(await ask(child, 'signal')).toBe('master worker1 worker2 worker3')
      for (const child of forks) expect(shapeOf(child.pid)).toEqual(restored)
      for (const child of forks) expect(await ask(child, 'reap')).toBe('7')
      expect(shapeOf(forks[0]!.pid)).toEqual(restored.filter(({ comm }) => comm !== 'zombie'))
      const stats = await forks[0]!.stats()
      expect(stats.pssBytes).toBeGreaterThan(0)
      // What ends a tree ends all of it, also those with a group or a session of their own.
      await forks[0]!.end({ graceMs: 100 })
      expect(all.slice(0, 10).filter((pid) => isAlive(pid))).toEqual([])
      expect(all.slice(10).filter((pid) => stat(pid) && !isAlive(pid))).toEqual([])
      await supervisor.stop({ graceMs: 100 })
      expect(all.filter((pid) => isAlive(pid))).toEqual([])
    })

    test('takes in what is orphaned after the fork, as before', async () => {
      const supervisor = await start(MASTER)
      const child = await supervisor.fork()
      const inner = named(child.pid, 'inner')
      process.kill(named(child.pid, 'session'), 'SIGKILL')
      // The master is a subreaper.
      await eventually(() => stat(inner)?.ppid === child.pid, 'it is given to the master')
      await child.end({ graceMs: 0 })
      expect(isAlive(inner)).toBe(false)
    })

    test('hears of a signal to its group from outside; a signal to the child is for the root alone', async () => {
      const supervisor = await start(MASTER)
      const [one, other] = [await supervisor.fork(), await supervisor.fork()]
      const group = ['worker1', 'worker2', 'worker3'].map((comm) => named(one.pid, comm))
      const apart = ['session', 'group', 'inner'].map((comm) => named(one.pid, comm))
      const stopped = named(one.pid, 'stopped')
      signalGroup(one, 'SIGTERM')
      expect(await one.exit).toEqual({ code: null, signal: 'SIGTERM' })
      await eventually(() => group.every((pid) => !isAlive(pid)), 'the workers are ended')
      expect(apart.filter((pid) => !isAlive(pid))).toEqual([])
      // It hears of it when it is continued.
      expect(stat(stopped)?.state).toBe('T')
      process.kill(stopped, 'SIGCONT')
      await eventually(() => !isAlive(stopped), 'the stopped one is ended')

      const workers = ['worker1', 'worker2', 'worker3'].map((comm) => named(other.pid, comm))
      other.kill('SIGTERM')
      expect(await other.exit).toEqual({ code: null, signal: 'SIGTERM' })
      expect(workers.filter((pid) => !isAlive(pid))).toEqual([])
    })

    test.runIf(identity === 'namespace')(
      'has the pids that its root remembers, so that signals go where they are to',
      async () => {
        const supervisor = await start(MASTER)
        const [one, other] = [await supervisor.fork(), await supervisor.fork()]
        expect(await ask(one, 'remembered')).toBe('worker1')
        expect(await ask(other, 'remembered')).toBe('worker1')
      },
    )

    test.runIf(identity === 'namespace')('of a shell on a terminal has its job control', async () => {
      const supervisor = await place.current.start({
        command: ['bash', '--norc', '-i'],
        env: { PS1: '$ ' },
        template: { tty: true },
        ready: { delayMs: 300 },
        identity,
        pool: { size: 0 },
      })
      const child = await supervisor.fork()
      let screen = ''
      child.terminal!.on('data', (chunk) => {
        screen += chunk
      })
      const type = async (keys: string, seen: string) => {
        screen = ''
        child.terminal!.write(keys)
        await eventually(() => screen.includes(seen), `${JSON.stringify(seen)} is shown`)
      }
      const [ctrlC, ctrlZ] = ['\x03', '\x1a']
      const sleeping = (state: string) => () =>
        descendants(child.pid).some((pid) => stat(pid)?.comm === 'sleep' && stat(pid)?.state === state)
      await type('sleep 1000\r', 'sleep')
      await eventually(sleeping('S'), 'it sleeps')
      await type(ctrlC, '^C')
      await type('echo status $?\r', 'status 130')
      await type('sleep 1000\r', 'sleep')
      await eventually(sleeping('S'), 'it sleeps')
      await type(ctrlZ, 'Stopped')
      await eventually(sleeping('T'), 'it is stopped')
      await type('fg\r', 'sleep 1000')
      await eventually(sleeping('S'), 'it sleeps again')
      await type(ctrlC, '$ ')
      child.terminal!.write('exit 5\r')
      expect(await child.exit).toEqual({ code: 5, signal: null })
    })

    test('whose root has ended is over for its supervisor; the rest lives until the stop, and no longer', async () => {
      const supervisor = await start(MASTER)
      const child = await supervisor.fork()
      const rest = descendants(child.pid).filter((pid) => isAlive(pid))
      expect(rest).toHaveLength(8)
      child.stdin.write('exit 3\n')
      expect(await child.exit).toEqual({ code: 3, signal: null })
      expect(supervisor.children).toEqual([])
      await expect(child.stats()).rejects.toMatchObject({ code: 'CHILD_GONE' })
      expect((await supervisor.stats()).children).toEqual([])
      expect(rest.filter((pid) => !isAlive(pid))).toEqual([])
      await supervisor.stop({ graceMs: 100 })
      expect(rest.filter((pid) => isAlive(pid))).toEqual([])
    })

    test('goes with a supervisor that is killed with SIGKILL, parked or running', async () => {
      const { env: _, ...options } = place.current.options({ command: MASTER, identity, pool: { size: 2 } })
      const supervisor = new SupervisorProcess(options, { env: { [place.current.mark]: '1' } })
      await supervisor.reached('running')
      const pid = await supervisor.fork()
      expect(processTree(pid)).toHaveLength(10)
      await supervisor.kill()
      await place.current.swept()
    })

    test('of a shell and its pipeline passes on what goes through it, in each fork alone', async () => {
      const script = 'echo ready; cat | sed -u s/^/one-/ | sed -u s/^/two-/; echo over'
      const supervisor = await start(['sh', '-c', script])
      const forks = await Promise.all([supervisor.fork(), supervisor.fork(), supervisor.fork()])
      const answers = await Promise.all(forks.map((child, i) => ask(child, String(i))))
      expect(answers).toEqual(['two-one-0', 'two-one-1', 'two-one-2'])
      for (const child of forks) child.stdin.end()
      for (const child of forks) {
        const lines: string[] = []
        for await (const line of child.lines()) lines.push(line)
        expect(lines).toEqual(['over'])
        expect(await child.exit).toEqual({ code: 0, signal: null })
      }
    })

    test('of a Node cluster serves, and its primary speaks to its workers', async () => {
      const supervisor = await start(CLUSTER, { template: { afterCheckpoint: 'end' }, ready: { output: /ready \d+/ } })
      const [one, other] = [await supervisor.fork(), await supervisor.fork()]
      const pids = await Promise.all(
        [one, other].map(async (child) => (await ask(child, 'workers')).split(' ').map(Number)),
      )
      for (const list of pids) expect(list).toHaveLength(2)
      if (identity === 'fresh') {
        expect([one, other].map((child) => descendants(child.pid).sort())).toEqual(pids.map((list) => [...list].sort()))
      } else expect(pids[0]).toEqual(pids[1])
    })
  },
)
