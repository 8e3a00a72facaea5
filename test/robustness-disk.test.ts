/** Disks that run full under a supervisor: small tmpfs, which need root to be mounted. */
import { execFileSync } from 'node:child_process'
import {
  closeSync,
  mkdirSync,
  openSync,
  readdirSync,
  rmSync,
  statSync,
  truncateSync,
  writeFileSync,
  writeSync,
} from 'node:fs'
import { join } from 'node:path'
import { afterEach, describe, expect, test } from 'vitest'
import { Store } from '../src/generations/store.js'
import type { Supervisor } from '../src/supervisor.js'
import { ask, eventually, PROGRAMS } from './engines-under-test.js'
import { Laboratory } from './fixtures/forks.js'
import { useCleanPlace } from './leftovers.js'

const MEMORY_MIB = 60

/** Fills so many MiB and then does as its stdin says. */
const command = (mib: number) => [process.execPath, join(PROGRAMS, 'family.mjs'), String(mib)] as const

function mountSmall(path: string, mib: number): void {
  mkdirSync(path, { recursive: true, mode: 0o700 })
  execFileSync('mount', ['-t', 'tmpfs', '-o', `size=${mib}m,mode=0700`, 'none', path], { timeout: 10_000 })
}

/** An ext4: on tmpfs even a child's look at a hole of the page file takes room, and without any it gets SIGBUS. */
function mountDisk(path: string, image: string): void {
  writeFileSync(image, '')
  truncateSync(image, 800 << 20)
  execFileSync('mkfs.ext4', ['-q', '-m', '0', image], { timeout: 30_000 })
  mkdirSync(path, { mode: 0o700 })
  execFileSync('mount', ['-o', 'loop', image, path], { timeout: 10_000 })
}

function unmount(path: string): void {
  execFileSync('umount', ['--lazy', path], { timeout: 10_000 })
}

function resize(path: string, mib: number): void {
  execFileSync('mount', ['-o', `remount,size=${mib}m`, path], { timeout: 10_000 })
}

/** Writes until nothing more goes in. */
function fillUp(directory: string): void {
  const fd = openSync(join(directory, 'ballast'), 'a')
  try {
    for (const size of [1 << 20, 4096, 1]) {
      try {
        for (;;) writeSync(fd, Buffer.alloc(size))
      } catch (error) {
        if ((error as NodeJS.ErrnoException).code !== 'ENOSPC') throw error
      }
    }
  } finally {
    closeSync(fd)
  }
}

function makeRoom(directory: string): void {
  rmSync(join(directory, 'ballast'))
}

describe.skipIf(process.getuid?.() !== 0)('a disk that is full', () => {
  const place = useCleanPlace()
  const store = () => join(place.current.directory, 'store')
  const mounted: string[] = []

  // Before the place looks at what is left; hooks run in reverse order.
  afterEach(async () => {
    await place.current.stopAll()
    for (const path of mounted.splice(0)) unmount(path)
  })

  function mount(path: string, mib: number): void {
    mountSmall(path, mib)
    mounted.push(path)
  }

  function mountExt4(path: string): void {
    mountDisk(path, join(place.current.directory, 'image'))
    mounted.push(path)
  }

  // A dump takes the template's memory once, the page file once more.
  test.each([
    ['dumps', 0.3],
    ['begins to prepare', 1.1],
    ['has nearly prepared', 1.9],
  ])('while the supervisor %s: the start fails and leaves the older generation as it was', async (_, share) => {
    mount(store(), 600)
    const options = { name: 'disk', command: command(MEMORY_MIB) }
    const first = await place.current.start(options)
    await first.stop()
    const memoryBytes = statSync(join(store(), 'disk', 'generations', '1', 'memory-1.warmfork-pages')).blocks * 512
    resize(store(), Math.ceil(usedMib() + (share * memoryBytes) / 2 ** 20))
    const error = await place.current.start(options).catch((error) => error)
    expect(error).toMatchObject({ code: 'DISK_FULL', remedy: expect.stringContaining('warmfork prune') })
    expect(readdirSync(join(store(), 'disk', 'generations'))).toEqual(['1'])
    await expectWhole('disk')
    resize(store(), 600)
    const second = await place.current.start(options)
    expect(await ask(await second.fork(), 'sum')).toMatch(/^\d+$/)
  })

  async function expectWhole(name: string): Promise<void> {
    await using found = await Store.open({ root: store(), name, access: 'read' })
    await (await found.get(1)).verify()
  }

  const usedMib = () =>
    Math.ceil(Number(execFileSync('df', ['--output=used', '-k', store()], { encoding: 'utf8' }).split('\n')[1]) / 1024)

  test('where the store is: forks go on', async () => {
    mountExt4(store())
    const supervisor = await place.current.start({ command: command(1), pool: { size: 1 } })
    fillUp(store())
    for (let i = 0; i < 4; i++) {
      const child = await supervisor.fork()
      expect(await ask(child, 'pid')).toBe(String(child.pid))
    }
    expect(supervisor.warnings.filter(({ kind }) => kind === 'refill-failed')).toEqual([])
  })

  test('where the runtime directory is: forks fail and say so until there is room', async () => {
    const runtime = join(place.current.directory, 'small-run')
    mount(runtime, 4)
    const supervisor = await place.current.start({
      runtimeDirectory: runtime,
      command: command(1),
      pool: { size: 0 },
    })
    const running = await supervisor.fork()
    // What was started ahead has its directory already, and gives the room for the next.
    const codes: string[] = []
    for (let i = 0; i < 5; i++) {
      fillUp(runtime)
      codes.push(
        await supervisor.fork().then(
          () => 'forked',
          (error) => error.code,
        ),
      )
    }
    expect(codes.slice(2)).toEqual(['DISK_FULL', 'DISK_FULL', 'DISK_FULL'])
    expect(codes.slice(0, 2).filter((code) => code !== 'forked' && code !== 'DISK_FULL')).toEqual([])
    expect(await ask(running, 'pid')).toBe(String(running.pid))
    makeRoom(runtime)
    const child = await supervisor.fork()
    expect(await ask(child, 'pid')).toBe(String(child.pid))
    await supervisor.stop()
    expect(readdirSync(runtime)).toEqual([])
  })

  test('where the runtime directory is, with a pool: it is filled again once there is room', async () => {
    const runtime = join(place.current.directory, 'small-run')
    mount(runtime, 4)
    const supervisor: Supervisor = await place.current.start({
      runtimeDirectory: runtime,
      command: command(1),
      pool: { size: 1 },
    })
    const failed = () => supervisor.warnings.some(({ code }) => code === 'DISK_FULL')
    for (const deadline = Date.now() + 20_000; !failed() && Date.now() < deadline; ) {
      fillUp(runtime)
      await supervisor.fork().catch(() => {})
      await new Promise((resolve) => setTimeout(resolve, 50))
    }
    expect(failed()).toBe(true)
    makeRoom(runtime)
    await eventually(() => supervisor.pool.parked.length === 1, 'the pool is full again')
    expect(await ask(await supervisor.fork(), 'relatives')).toMatch(/\d+ \d+ \d+/)
    await supervisor.stop()
  })
})

describe.skipIf(process.getuid?.() !== 0)('a disk that is full when a second generation is made', () => {
  test('leaves the first one serving, and the program running', async () => {
    const laboratory = new Laboratory()
    const path = join(laboratory.directory, 'store')
    mountDisk(path, join(laboratory.directory, 'image'))
    try {
      const program = laboratory.start(command(MEMORY_MIB))
      await program.talk.untilReady()
      const { number } = await laboratory.checkpoint(program, 'cow')
      fillUp(path)
      await expect(laboratory.checkpoint(program, 'cow')).rejects.toMatchObject({ code: 'DISK_FULL' })
      const child = await laboratory.fork(number)
      child.process.resume()
      expect(await child.talk.ask('sum')).toBe(await program.talk.ask('sum'))
      makeRoom(path)
      expect((await laboratory.checkpoint(program, 'cow')).number).toBeGreaterThan(number)
    } finally {
      await laboratory.endAll()
      unmount(path)
      await laboratory.close()
    }
  })
})
