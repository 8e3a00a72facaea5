/** What a supervisor does when its store or its runtime directory is changed under it, or is bad before it starts. */
import { execFileSync } from 'node:child_process'
import {
  chmodSync,
  chownSync,
  closeSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
  writeSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import type { Supervisor } from '../src/supervisor.js'
import { ask, eventually, PROGRAMS } from './engines-under-test.js'
import { useCleanPlace } from './leftovers.js'

const command = [process.execPath, join(PROGRAMS, 'app.mjs')] as const
const NAME = 'store'
const PAGES = 'memory-1.warmfork-pages'

describe('a store that is changed under a supervisor', () => {
  const place = useCleanPlace()
  const store = (...path: string[]) => join(place.current.directory, 'store', ...path)
  const generation = (...path: string[]) => store(NAME, 'generations', '1', ...path)

  /** With a child that runs, and nothing parked that could be claimed without a look at the store. */
  async function started(): Promise<{ supervisor: Supervisor; goesOn: () => Promise<void> }> {
    const supervisor = await place.current.start({ name: NAME, command, pool: { size: 0 } })
    const child = await supervisor.fork()
    let count = 0
    const goesOn = async () => expect(await ask(child, 'count')).toBe(String(++count))
    await goesOn()
    return { supervisor, goesOn }
  }

  const code = (supervisor: Supervisor) =>
    supervisor.fork().then(
      () => 'forked',
      (error) => error.code ?? String(error),
    )

  test('removed: forks say so, and the child that runs goes on', async () => {
    const { supervisor, goesOn } = await started()
    rmSync(store(), { recursive: true })
    expect([await code(supervisor), await code(supervisor)]).toEqual(['STORE_GONE', 'STORE_GONE'])
    await goesOn()
    await supervisor.stop()
    expect(existsSync(store())).toBe(false)
  })

  test('moved away and back: forks work again', async () => {
    const { supervisor, goesOn } = await started()
    renameSync(store(), store('..', 'elsewhere'))
    expect(await code(supervisor)).toBe('STORE_GONE')
    await goesOn()
    renameSync(store('..', 'elsewhere'), store())
    expect(await code(supervisor)).toBe('forked')
  })

  test('without its generation: forks say so', async () => {
    const { supervisor, goesOn } = await started()
    rmSync(generation(), { recursive: true })
    expect(await code(supervisor)).toBe('GENERATION_NOT_FOUND')
    await goesOn()
  })

  test.each([PAGES, 'image/core-PID.img', 'image/pstree.img', 'image/pages-1.img', 'manifest.json'])(
    'with a truncated %s: forks say so, or do not need it',
    async (name) => {
      const { supervisor, goesOn } = await started()
      const path = generation(name.replace('PID', String(supervisor.template!.pid)))
      // A page file that is cut off under a child takes its memory away: all that the kernel can do is SIGBUS.
      if (name === PAGES) {
        for (const child of supervisor.children) await child.end({ graceMs: 0 })
      }
      truncateSync(path, Math.floor(statSync(path).size / 2))
      expect(await code(supervisor)).toBe(name === 'manifest.json' ? 'forked' : 'GENERATION_CORRUPT')
      if (name !== PAGES) await goesOn()
    },
  )

  test('read-only by its modes: forks go on', async () => {
    const { supervisor, goesOn } = await started()
    for (const path of [store(), store(NAME), store(NAME, 'generations'), generation()]) chmodSync(path, 0o500)
    expect(await code(supervisor)).toBe('forked')
    await goesOn()
    await supervisor.stop()
  })

  test('with one byte changed in any file that a fork reads: forks say so', async () => {
    const supervisor = await place.current.start({ name: NAME, command, pool: { size: 0 } })
    const files = [PAGES, ...readdirSync(generation('image')).map((name) => `image/${name}`)]
    expect(files.length).toBeGreaterThan(10)
    const codes: Record<string, string> = {}
    for (const name of files) {
      const path = generation(name)
      // Whoever does so can hide it from a look at the time of change.
      const times = store('times')
      const keepTimes = (from: string, to: string) => execFileSync('touch', ['-r', from, to])
      keepTimes(path, times)
      flip(path, Math.floor(statSync(path).size / 2))
      keepTimes(times, path)
      codes[name] = await code(supervisor)
      flip(path, Math.floor(statSync(path).size / 2))
      keepTimes(times, path)
    }
    expect(Object.entries(codes).filter(([, code]) => code !== 'GENERATION_CORRUPT')).toEqual([])
    expect(await code(supervisor)).toBe('forked')
  })

  test('with a pool: what is parked is claimed still, and then forks say what is wrong', async () => {
    const supervisor = await place.current.start({ name: NAME, command, pool: { size: 2 } })
    flip(generation(PAGES), Math.floor(statSync(generation(PAGES)).size / 2))
    for (let i = 0; i < 2; i++) await ask(await supervisor.fork(), 'count')
    expect(await code(supervisor)).toBe('GENERATION_CORRUPT')
    await eventually(() => supervisor.warnings.some(({ code }) => code === 'GENERATION_CORRUPT'), 'the pool says so')
  })

  test('world-writable: the supervisor that runs goes on, and the next is refused', async () => {
    const { supervisor, goesOn } = await started()
    chmodSync(store(NAME), 0o777)
    await goesOn()
    await supervisor.stop()
    const next = place.current.start({ name: NAME, command })
    await expect(next).rejects.toMatchObject({ code: 'STORE_UNSAFE', message: expect.stringContaining('chmod 0700') })
    chmodSync(store(NAME), 0o700)
    const again = await place.current.start({ name: NAME, command })
    expect(await code(again)).toBe('forked')
  })
})

describe('a store that is bad before a start', () => {
  const place = useCleanPlace()
  const store = (...path: string[]) => join(place.current.directory, 'store', ...path)
  const start = () => place.current.start({ name: NAME, command, pool: { size: 0 } }).catch((error) => error)
  const nobody = 65534

  test.each([
    ['is a symbolic link', () => symlinkSync('/tmp', store()), 'STORE_UNSAFE'],
    ['is a file', () => writeFileSync(store(), ''), 'STORE_UNSAFE'],
    ['can be written by anybody', () => made(0o777), 'STORE_UNSAFE'],
    ['can be written by a group', () => made(0o770), 'STORE_UNSAFE'],
  ] as const)('that %s is refused', async (_, prepare, expected) => {
    prepare()
    expect(await start()).toMatchObject({ code: expected, remedy: expect.stringMatching(/\w/) })
  })

  test.skipIf(process.getuid?.() !== 0)('that belongs to somebody else is refused', async () => {
    made(0o700)
    chownSync(store(), nobody, nobody)
    expect(await start()).toMatchObject({ code: 'STORE_UNSAFE', message: expect.stringContaining(String(nobody)) })
  })

  test('whose older generation is broken: a new one is made beside it', async () => {
    const first = await place.current.start({ name: NAME, command, pool: { size: 0 } })
    await first.stop()
    truncateSync(store(NAME, 'generations', '1', PAGES), 4096)
    rmSync(store(NAME, 'generations', '1', 'manifest.json'))
    const second = await place.current.start({ name: NAME, command, pool: { size: 0 } })
    expect(second.generation).toBe(2)
    expect(await ask(await second.fork(), 'count')).toBe('1')
  })

  test('whose `next` says nonsense: numbers go on behind the highest', async () => {
    const first = await place.current.start({ name: NAME, command, pool: { size: 0 } })
    await first.stop()
    writeFileSync(store(NAME, 'next'), 'nonsense\n')
    const second = await place.current.start({ name: NAME, command, pool: { size: 0 } })
    expect(second.generation).toBe(2)
  })

  test('of a supervisor that runs is locked, and the error names it', async () => {
    const first = await place.current.start({ name: NAME, command, pool: { size: 0 } })
    expect(await start()).toMatchObject({ code: 'STORE_LOCKED', message: expect.stringContaining(String(process.pid)) })
    expect(await ask(await first.fork(), 'count')).toBe('1')
  })

  function made(mode: number): void {
    mkdirSync(store())
    chmodSync(store(), mode)
  }
})

describe('a runtime directory that is changed under a supervisor', () => {
  const place = useCleanPlace()

  // On a tmpfs derived images lie in it; else in /dev/shm.
  test.each(['/dev/shm', tmpdir()])(
    'in %s, removed: forks go on or say so, and the stop is in good order',
    async (parent) => {
      const runtimeDirectory = mkdtempSync(join(parent, 'warmfork-test-run-'))
      const supervisor = await place.current.start({ command, runtimeDirectory, pool: { size: 0 } })
      const child = await supervisor.fork()
      rmSync(runtimeDirectory, { recursive: true })
      const codes: string[] = []
      for (let i = 0; i < 4; i++) {
        codes.push(
          await supervisor.fork().then(
            () => 'forked',
            (error) => error.code,
          ),
        )
      }
      expect(['STORE_GONE', 'forked']).toContain(codes.at(-1))
      if (parent === '/dev/shm') expect(codes.at(-1)).toBe('STORE_GONE')
      expect(await ask(child, 'count')).toBe('1')
      await supervisor.stop()
      expect(existsSync(runtimeDirectory)).toBe(false)
    },
  )
})

function flip(path: string, at: number): void {
  const mode = statSync(path).mode
  chmodSync(path, 0o600)
  const fd = openSync(path, 'r+')
  const byte = Buffer.alloc(1)
  readSync(fd, byte, 0, 1, at)
  byte[0]! ^= 1
  writeSync(fd, byte, 0, 1, at)
  closeSync(fd)
  chmodSync(path, mode)
}
