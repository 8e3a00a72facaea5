import { mkdirSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { isAlive, stat } from '../src/linux/proc.js'
import type { Supervisor } from '../src/supervisor.js'
import { ask, ENGINES, eventually, usePlace } from './engines-under-test.js'

const parked = (supervisor: Supervisor) => supervisor.pool.parked.map((child) => child.pid)
const kinds = (supervisor: Supervisor) => supervisor.warnings.map(({ kind }) => kind)

describe.each(ENGINES)('the pool with the %s engine', (engine) => {
  const place = usePlace(engine)
  const command: [string, ...string[]] = ['sh', '-c', 'echo ready; exec cat']

  test('is full when the supervisor has started, with children that are stopped', async () => {
    const supervisor = await place.current.start({ command, pool: { size: 3 } })
    expect(supervisor.pool).toMatchObject({ size: 3, starting: 0 })
    expect(parked(supervisor).map((pid) => stat(pid)?.state)).toEqual(['T', 'T', 'T'])
    expect(supervisor.pool.parked.map((child) => child.state)).toEqual(['parked', 'parked', 'parked'])
    expect(supervisor.children).toEqual([])
  })

  test('gives the oldest, and is filled again', async () => {
    const supervisor = await place.current.start({ command, pool: { size: 2 } })
    const [oldest, other] = parked(supervisor)
    const child = await supervisor.fork()
    expect(child.pid).toBe(oldest)
    expect(child.state).toBe('running')
    await child.ready
    await eventually(() => parked(supervisor).length === 2, 'two are parked')
    expect(parked(supervisor)[0]).toBe(other)
  })

  test('replaces a parked child that is killed', async () => {
    const supervisor = await place.current.start({ command, pool: { size: 2 } })
    const [killed] = parked(supervisor)
    process.kill(killed!, 'SIGKILL')
    await eventually(() => parked(supervisor).length === 2 && !parked(supervisor).includes(killed!), 'it is replaced')
    expect(await ask(await supervisor.fork(), 'hello')).toBe('hello')
  })

  test('gives the next one where the oldest dies as it is claimed', async () => {
    const supervisor = await place.current.start({ command, pool: { size: 3 } })
    for (const pid of parked(supervisor).slice(0, 2)) process.kill(pid, 'SIGKILL')
    const alive = parked(supervisor)[2]
    const child = await supervisor.fork()
    expect(child.pid).toBe(alive)
    expect(await ask(child, 'hello')).toBe('hello')
  })

  test('forks directly where all parked children die as one is claimed', async () => {
    const supervisor = await place.current.start({ command, pool: { size: 2 } })
    for (const pid of parked(supervisor)) process.kill(pid, 'SIGKILL')
    expect(await ask(await supervisor.fork(), 'hello')).toBe('hello')
    expect((await supervisor.stats()).forks).toEqual({ fromPool: 0, direct: 1, failed: 0 })
  })

  test('ends and replaces a parked child that a stranger continues', async () => {
    const supervisor = await place.current.start({ command, pool: { size: 1 } })
    const [stray] = parked(supervisor)
    process.kill(stray!, 'SIGCONT')
    await eventually(() => !isAlive(stray!), 'the stray one is ended')
    await eventually(() => parked(supervisor).length === 1, 'another is parked')
    expect(kinds(supervisor)).toContain('stray-resume')
    expect(await ask(await supervisor.fork(), 'hello')).toBe('hello')
  })

  test('replaces what was parked for too long', async () => {
    const supervisor = await place.current.start({ command, pool: { size: 2, maxParkedMs: 400 } })
    const before = parked(supervisor)
    await eventually(() => !parked(supervisor).some((pid) => before.includes(pid)), 'both are replaced')
    await eventually(() => before.every((pid) => !isAlive(pid)), 'the old ones are ended')
    await eventually(() => parked(supervisor).length === 2, 'two are parked')
  })

  test('serves more claims at once than are parked', async () => {
    const supervisor = await place.current.start({ command, pool: { size: 2 } })
    const children = await Promise.all(Array.from({ length: 6 }, () => supervisor.fork()))
    expect(new Set(children.map((child) => child.pid)).size).toBe(6)
    expect((await supervisor.stats()).forks).toEqual({ fromPool: 2, direct: 4, failed: 0 })
  })

  test('is empty where its size is 0', async () => {
    const supervisor = await place.current.start({ command, pool: { size: 0 } })
    expect(supervisor.pool).toEqual({ size: 0, parked: [], starting: 0 })
  })

  test('waits longer and longer between refills that fail, and fills again once they succeed', async () => {
    const program = join(place.current.directory, 'program')
    const write = () => writeFileSync(program, '#!/bin/sh\necho ready; exec cat\n', { mode: 0o755 })
    write()
    const supervisor = await place.current.start({ command: [program], pool: { size: 1 } })
    const store = join(place.current.directory, 'store')
    if (engine === 'spawn') rmSync(program)
    else rmSync(store, { recursive: true })
    await supervisor.fork()
    await eventually(
      () => kinds(supervisor).filter((kind) => kind === 'refill-failed').length >= 3,
      'three refills fail',
    )
    const waits = supervisor.warnings.flatMap(({ message }) => /waits (\d+) ms/.exec(message)?.[1] ?? [])
    expect(waits.slice(0, 3)).toEqual(['100', '150', '225'])
    await expect(supervisor.fork()).rejects.toMatchObject({
      code: engine === 'spawn' ? 'TEMPLATE_START_FAILED' : 'STORE_GONE',
    })
    if (engine === 'spawn') {
      write()
      await eventually(() => parked(supervisor).length === 1, 'the pool is full again')
    } else mkdirSync(store)
  })
})
