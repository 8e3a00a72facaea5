import { readdirSync, readFileSync, readlinkSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import type { Child } from '../src/child.js'
import { findCriu } from '../src/engines/criu/binary.js'
import type { WarmforkError } from '../src/errors.js'
import { descendants, isAlive, stat } from '../src/linux/proc.js'
import type { SupervisorOptions } from '../src/options.js'
import { Supervisor } from '../src/supervisor.js'
import { ask, eventually, PROGRAMS } from './engines-under-test.js'
import { openDescriptors, useCleanPlace } from './leftovers.js'

/** With children of its own, so that a restore has several steps. */
const FAMILY: SupervisorOptions['command'] = [process.execPath, join(PROGRAMS, 'family.mjs'), '1']
const BIG_FAMILY: SupervisorOptions['command'] = [process.execPath, join(PROGRAMS, 'family.mjs'), '200']

const wait = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms))

function text(path: string): string {
  try {
    return readFileSync(path, 'latin1')
  } catch {
    return ''
  }
}

/** Of this process; what they have started is not looked at, since the moments that are to be met are short. */
function children(): number[] {
  const threads = readdirSync('/proc/self/task')
  return threads.flatMap((thread) => text(`/proc/self/task/${thread}/children`).split(' ').filter(Boolean).map(Number))
}

function mine(pattern: RegExp): number[] {
  return children().filter((pid) => pattern.test(text(`/proc/${pid}/cmdline`).replaceAll('\0', ' ').trim()))
}

/**
 * Those criu that restore: they open their log with the request. What they restore has it open too for a while, but leads no group,
 * or a session as well.
 */
function restoring(): number[] {
  return children().filter((pid) => {
    const found = stat(pid)
    if (found?.pgid !== pid || found.sid === pid) return false
    try {
      return readdirSync(`/proc/${pid}/fd`).some((fd) => readlinkSync(`/proc/${pid}/fd/${fd}`).endsWith('restore.log'))
    } catch {
      return false
    }
  })
}

/** One that waits for its request: once it restores, it has another command line. */
const CRIU = /criu swrk 3$/

async function first(look: () => number[]): Promise<number> {
  for (const deadline = Date.now() + 20_000; ; ) {
    const [pid] = look()
    if (pid !== undefined) return pid
    if (Date.now() > deadline) throw new Error('there is no such process')
    await new Promise(setImmediate)
  }
}

function kill(pid: number, signal: NodeJS.Signals = 'SIGKILL'): void {
  try {
    process.kill(pid, signal)
  } catch {
    // It was faster.
  }
}

describe('processes that are killed under a supervisor', () => {
  const place = useCleanPlace()

  const settled = (fork: Promise<Child>) =>
    fork.then(
      (child) => ({ child, error: undefined }),
      (error: WarmforkError) => ({ child: undefined, error }),
    )

  async function expectForks(supervisor: Supervisor): Promise<void> {
    const child = await supervisor.fork()
    expect(await ask(child, 'pid')).toBe(String(child.pid))
  }

  test('criu, at any moment of a dump: the start fails and says so', async () => {
    let failed = 0
    for (const ms of [0, 0, 2, 5, 10, 20, 35, 50]) {
      const started = place.current.start({ command: BIG_FAMILY }).catch((error) => error)
      const criu = await first(() => mine(/criu dump/))
      await wait(ms)
      kill(criu)
      const result = await started
      // On a fast machine the dump can have been over.
      if (result instanceof Supervisor) await result.stop()
      else expect(result).toMatchObject({ code: expect.stringMatching(/^(CHECKPOINT_FAILED|TEMPLATE_EXITED)$/) })
      if (!(result instanceof Supervisor)) failed++
    }
    expect(failed).toBeGreaterThan(3)
  })

  test('criu, at any moment of a restore: the fork is made all the same', async () => {
    const supervisor = await place.current.start({ command: FAMILY, pool: { size: 0 } })
    let killed = 0
    for (const ms of [0, 0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 15]) {
      const fork = settled(supervisor.fork())
      let over = false
      void fork.then(() => {
        over = true
      })
      // On a busy machine it can be over before it was looked for.
      let found: number[] = []
      while (!over && found.length === 0) {
        found = restoring()
        await new Promise(setImmediate)
      }
      await wait(ms)
      for (const criu of found) kill(criu)
      killed += found.length
      const { child, error } = await fork
      expect(error).toBeUndefined()
      expect(await ask(child!, 'pid')).toBe(String(child!.pid))
      await child!.end({ graceMs: 0 })
    }
    expect((await supervisor.stats()).forks).toMatchObject({ failed: 0 })
    expect(killed).toBeGreaterThan(3)
  })

  test('each criu, again and again: the fork fails and says so, and a later one works', async () => {
    const supervisor = await place.current.start({ command: FAMILY, pool: { size: 0 } })
    let killing = true
    const killer = (async () => {
      while (killing) {
        for (const pid of [...restoring(), ...mine(CRIU)]) kill(pid)
        await new Promise(setImmediate)
      }
    })()
    const { error } = await settled(supervisor.fork())
    killing = false
    await killer
    expect(error).toMatchObject({ code: 'RESTORE_FAILED', message: expect.stringContaining('SIGKILL') })
    await expectForks(supervisor)
  })

  test('criu that was started ahead: the fork takes another', async () => {
    const supervisor = await place.current.start({ command: FAMILY, pool: { size: 0 } })
    await eventually(() => mine(CRIU).length === 2, 'two are started ahead')
    for (const pid of mine(CRIU)) kill(pid)
    await expectForks(supervisor)
    expect((await supervisor.stats()).forks).toMatchObject({ direct: 1, failed: 0 })
  })

  test('criu that is stopped by somebody: the fork gives up after its time, and nothing of it is left', async () => {
    const supervisor = await place.current.start({ command: FAMILY, pool: { size: 0 }, forkTimeoutMs: 700 })
    const fork = settled(supervisor.fork())
    kill(await first(restoring), 'SIGSTOP')
    const { error } = await fork
    expect(error).toMatchObject({ code: 'TIMEOUT', message: expect.stringContaining('forkTimeoutMs') })
    await expectForks(supervisor)
  })

  test('criu that is removed while it is in use: forks say so, and work again once it is back', async () => {
    const criu = join(place.current.directory, 'criu')
    const here = findCriu()
      .argv.map((part) => `'${part}'`)
      .join(' ')
    const install = () => writeFileSync(criu, `#!/bin/sh\nexec ${here} "$@"\n`, { mode: 0o755 })
    install()
    process.env.WARMFORK_CRIU = criu
    try {
      const supervisor = await place.current.start({ command: FAMILY, pool: { size: 0 } })
      rmSync(criu)
      const codes: (string | undefined)[] = []
      for (let i = 0; i < 4; i++) codes.push((await settled(supervisor.fork())).error?.code)
      expect(codes.at(-1)).toBe('CRIU_MISSING')
      install()
      await expectForks(supervisor)
    } finally {
      delete process.env.WARMFORK_CRIU
    }
  })

  test('the guard: another takes its place, and the stop leaves nothing', async () => {
    const supervisor = await place.current.start({ command: FAMILY })
    const guard = await first(() => mine(/warmfork-guard/))
    kill(guard)
    const next = await first(() => mine(/warmfork-guard/).filter((pid) => pid !== guard))
    expect(isAlive(next)).toBe(true)
    await expectForks(supervisor)
    expect(supervisor.warnings.filter(({ kind }) => kind === 'no-guard')).toEqual([])
  })

  test('the guard, more often than anything explains: it is said that nothing stands by any more', async () => {
    const supervisor = await place.current.start({ command: FAMILY })
    const killed = new Set<number>()
    for (let i = 0; i < 6; i++) {
      const guard = await first(() => mine(/warmfork-guard/).filter((pid) => !killed.has(pid)))
      killed.add(guard)
      kill(guard)
    }
    await eventually(() => supervisor.warnings.some(({ kind }) => kind === 'no-guard'), 'it warns')
    await expectForks(supervisor)
  })

  test('a child: its exit says so, its own children end at the stop, and its siblings go on', async () => {
    const supervisor = await place.current.start({ command: FAMILY })
    const [one, other] = [await supervisor.fork(), await supervisor.fork()]
    const relatives = (await ask(one, 'start')).split(' ').map(Number)
    kill(one.pid)
    expect(await one.exit).toEqual({ code: null, signal: 'SIGKILL' })
    expect(relatives.map((pid) => isAlive(pid))).toEqual([true, true, true])
    expect(await ask(other, 'pid')).toBe(String(other.pid))
    await supervisor.stop()
    // Whoever has cleared its environment and leads a session of its own is known by its parents only, and they are gone.
    expect(relatives.map((pid) => isAlive(pid))).toEqual([false, false, true])
    kill(relatives[2]!)
    await eventually(() => !isAlive(relatives[2]!), 'it is gone')
  })

  test('a child whose pipes its own child holds for a while costs no descriptor in the end', async () => {
    const supervisor = await place.current.start({
      command: ['sh', '-c', 'echo ready; read go; sleep 0.4 & echo done'],
    })
    const pipes = () => openDescriptors().filter((target) => target.startsWith('pipe:')).length
    await wait(200)
    const before = pipes()
    for (let i = 0; i < 5; i++) {
      const child = await supervisor.fork()
      // Of every other one a line is read, of the others nothing.
      if (i % 2) expect(await ask(child, 'go')).toBe('done')
      else child.stdin.end('go\n')
      await child.exit
    }
    await wait(200)
    expect(pipes()).toBeGreaterThanOrEqual(before + 8)
    await eventually(() => pipes() <= before, 'the pipes are closed')
  })

  test('a parked one of a tree that somebody continues or ends in part: it is not given to anybody', async () => {
    const supervisor = await place.current.start({ command: FAMILY, pool: { size: 1 } })
    for (const signal of ['SIGCONT', 'SIGKILL'] as const) {
      await eventually(() => supervisor.pool.parked.length === 1, 'one is parked')
      const [parked] = supervisor.pool.parked
      const inner = descendants(parked!.pid)[0]!
      // Right after a restore its signals to stop may be under way.
      await wait(500)
      expect(stat(inner)?.state).toBe('T')
      kill(inner, signal)
      await eventually(() => /^[SZ]$/.test(stat(inner)?.state ?? ''), 'it has run')
      const child = await supervisor.fork()
      expect(child.pid).not.toBe(parked!.pid)
      await eventually(() => !isAlive(parked!.pid), 'the parked one is ended')
    }
  })

  test('a parked child that somebody continued for a moment writes nothing to the user of a later fork', async () => {
    const supervisor = await place.current.start({
      command: ['sh', '-c', 'echo ready; sleep 0.6; while :; do echo stray; sleep 0.001; done'],
      ready: { delayMs: 100 },
      pool: { size: 1 },
    })
    const stray = supervisor.pool.parked[0]!.pid
    await wait(500)
    kill(stray, 'SIGCONT')
    // In one turn of the event loop: its supervisor does not see that it ran.
    Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 20)
    kill(stray, 'SIGSTOP')
    Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 20)
    const child = await supervisor.fork()
    expect(child.pid).not.toBe(stray)
    await eventually(() => !isAlive(stray), 'the stray one is ended')
  })
})
