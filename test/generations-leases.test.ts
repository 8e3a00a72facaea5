import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync, readdirSync, readFileSync, renameSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { WarmforkError } from '../src/errors.js'
import type { Generation } from '../src/generations/generation.js'
import type { Store } from '../src/generations/store.js'
import { isAlive, stat } from '../src/linux/proc.js'
import { create, failure, fill, surroundings, Workshop } from './fixtures/generations.js'

let shop: Workshop
let store: Store

beforeEach(async () => {
  shop = new Workshop()
  store = await shop.open()
})

afterEach(async () => {
  await shop[Symbol.asyncDispose]()
})

const self = () => ({ pid: process.pid, startTicks: stat(process.pid)!.startTicks })
const leaseSelf = (generation: Generation) => generation.lease(self().pid, self().startTicks)
const leaseFiles = (generation: Generation) => readdirSync(join(generation.directory, 'leases'))
const numbers = async (of: Store = store) => (await of.list()).map(({ number }) => number)

/** A process that lives until the action is over. */
async function withSleeper<T>(
  action: (pid: number, startTicks: number, kill: () => Promise<void>) => Promise<T>,
): Promise<T> {
  const sleeper = spawn('sleep', ['60'], { stdio: 'ignore' })
  await once(sleeper, 'spawn')
  const kill = async () => {
    if (sleeper.exitCode !== null || sleeper.signalCode !== null) return
    sleeper.kill('SIGKILL')
    await once(sleeper, 'exit')
  }
  try {
    return await action(sleeper.pid!, stat(sleeper.pid!)!.startTicks, kill)
  } finally {
    await kill()
  }
}

describe('a lease', () => {
  test('is seen until it is given back', async () => {
    const made = await create(store)
    const lease = leaseSelf(made)
    expect(lease.recorded).toBe(true)
    expect(made.leases()).toEqual([self()])
    expect((await (await shop.open({ access: 'read' })).get(1)).leases()).toEqual([self()])
    lease.release()
    lease.release()
    expect(made.leases()).toEqual([])
    expect(leaseFiles(made)).toEqual([])
  })

  test('ends with its process', async () => {
    const made = await create(store)
    await withSleeper(async (pid, startTicks, kill) => {
      made.lease(pid, startTicks)
      expect(made.leases()).toEqual([{ pid, startTicks }])
      await kill()
      expect(made.leases()).toEqual([])
    })
  })

  test('that was taken twice for a process holds until it was given back twice', async () => {
    const made = await create(store)
    const [first, second] = [leaseSelf(made), leaseSelf(await store.get(1))]
    first.release()
    first.release()
    expect(made.leases()).toEqual([self()])
    second.release()
    expect(made.leases()).toEqual([])
  })

  test('is held by the maker of a generation until it lets go or closes the store', async () => {
    const made = await store.create({ parent: null, surroundings: surroundings() }, fill)
    expect(made.leases()).toEqual([self()])
    made.letGo()
    expect(made.leases()).toEqual([])
    made.hold()
    made.hold()
    expect(made.leases()).toEqual([self()])
    await store.close()
    expect(made.leases()).toEqual([])
  })

  test('of a process whose id was given to another does not count', async () => {
    const made = await create(store)
    made.lease(process.pid, self().startTicks - 1)
    expect(made.leases()).toEqual([])
  })

  test('of an earlier boot does not count', async () => {
    const made = await create(store)
    leaseSelf(made)
    const [name] = leaseFiles(made)
    const other = name!.replace(/-[0-9a-f]{8}-/, '-00000000-')
    renameSync(join(made.directory, 'leases', name!), join(made.directory, 'leases', other))
    expect(made.leases()).toEqual([])
  })

  test('from another pid namespace counts for everybody but the supervisor, who knows that it is alone', async () => {
    const made = await create(store)
    writeFileSync(join(made.directory, 'leases', leaseNameElsewhere(made)), '')
    expect(made.leases()).toEqual([])
    expect((await (await shop.open({ access: 'read' })).get(1)).leases()).toEqual([{ pid: 5, startTicks: 6 }])
  })

  test('leaves the generation whole', async () => {
    const made = await create(store)
    leaseSelf(made)
    made.checkUntouched()
    await made.verify()
  })

  // 50 to 100 µs on a quiet machine.
  test('costs less than a millisecond to take and to give back', async () => {
    const made = await create(store)
    const times: number[] = []
    for (let i = 0; i < 200; i++) {
      const before = performance.now()
      made.lease(1_000_000 + i, 1).release()
      times.push(performance.now() - before)
    }
    expect(times.sort((a, b) => a - b)[100]).toBeLessThan(1)
  })
})

/** A lease of process 5 in a pid namespace that is not ours. */
function leaseNameElsewhere(made: Generation): string {
  const lease = leaseSelf(made)
  const [name] = leaseFiles(made)
  lease.release()
  return name!.replace(/^\d+-\d+-([0-9a-f]+)-\d+$/, '5-6-$1-1')
}

describe('prune', () => {
  test('keeps the newest ones', async () => {
    for (let i = 0; i < 4; i++) await create(store)
    expect(await store.prune({ keep: 2 })).toEqual({ removed: [1, 2], kept: [] })
    expect(await numbers()).toEqual([3, 4])
    expect(readdirSync(join(store.directory, 'generations')).sort()).toEqual(['3', '4'])
  })

  test('removes those that are older, but never the newest that are to stay', async () => {
    await create(store)
    await create(store)
    expect(await store.prune({ olderThanMs: 60_000 })).toEqual({ removed: [], kept: [] })
    await new Promise((resolve) => setTimeout(resolve, 10))
    expect(await store.prune({ olderThanMs: 5, keep: 1 })).toEqual({ removed: [1], kept: [] })
    expect(await store.prune({ olderThanMs: 5 })).toEqual({ removed: [2], kept: [] })
  })

  test('removes the numbers that it is given, and refuses one that is not there before it removes any', async () => {
    for (let i = 0; i < 3; i++) await create(store)
    await failure('GENERATION_NOT_FOUND', () => store.prune({ numbers: [1, 9] }))
    expect(await store.prune({ numbers: [3, 1, 3] })).toEqual({ removed: [1, 3], kept: [] })
    expect(await numbers()).toEqual([2])
  })

  test('removes nothing when it is told nothing', async () => {
    await create(store)
    expect(await store.prune({})).toEqual({ removed: [], kept: [] })
  })

  test.each([{ keep: -1 }, { keep: Number.NaN }, { olderThanMs: -5 }])('refuses %j', async (options) => {
    await failure('BAD_OPTION', () => store.prune(options))
  })

  test('keeps what a living process needs, and says which', async () => {
    await create(store)
    const second = await create(store)
    await withSleeper(async (pid, startTicks, kill) => {
      second.lease(pid, startTicks)
      leaseSelf(second)
      const pids = [pid, process.pid].sort((a, b) => a - b).join(', ')
      expect(await store.prune({ keep: 0 })).toEqual({
        removed: [1],
        kept: [{ number: 2, reason: `in use by processes ${pids}` }],
      })
      await kill()
      expect((await store.prune({ numbers: [2] })).kept[0]?.reason).toBe(`in use by process ${process.pid}`)
      expect(leaseFiles(second)).toHaveLength(1)
      second.checkUntouched()
    })
  })

  test('removes what only dead processes needed', async () => {
    const made = await create(store)
    await withSleeper(async (pid, startTicks, kill) => {
      made.lease(pid, startTicks)
      await kill()
      expect(await store.prune({ keep: 0 })).toEqual({ removed: [1], kept: [] })
    })
  })

  test('removes corrupt generations', async () => {
    const first = await create(store)
    await create(store)
    writeFileSync(join(first.directory, 'manifest.json'), '{', { flag: 'w' })
    expect(await store.prune({ keep: 5 })).toEqual({ removed: [1], kept: [] })
  })

  test('can be done by another process while a supervisor runs, and respects its leases', async () => {
    await create(store)
    leaseSelf(await create(store))
    const other = await shop.open({ access: 'read' })
    expect((await other.prune({ keep: 0 })).removed).toEqual([1])
    expect(await numbers()).toEqual([2])
  })

  test('leaves a page file that is mapped to those who map it', async () => {
    const made = await create(store)
    const path = join(made.directory, 'memory-1.warmfork-pages')
    const reader = spawn('sh', ['-c', 'exec 3<"$0"; echo open; read _; head -c 4 <&3', path], {
      stdio: ['pipe', 'pipe', 'inherit'],
    })
    const ended = once(reader, 'exit')
    try {
      await once(reader.stdout, 'data')
      await store.prune({ keep: 0 })
      expect(existsSync(path)).toBe(false)
      reader.stdin.end('\n')
      expect([...((await once(reader.stdout, 'data'))[0] as Buffer)]).toEqual([7, 7, 7, 7])
    } finally {
      reader.kill('SIGKILL')
      await ended
    }
  })

  test('never removes a generation on which a lease was granted, however the two fall together', async () => {
    let granted = 0
    let refused = 0
    for (let round = 0; round < 40; round++) {
      const made = await create(store)
      let settled = false
      const pruned = store.prune({ numbers: [made.number] }).finally(() => {
        settled = true
      })
      for (let turn = 0; turn < round % 12 && !settled; turn++) await new Promise((resolve) => setImmediate(resolve))
      try {
        const lease = leaseSelf(made)
        granted++
        expect((await pruned).kept.map(({ number }) => number)).toEqual([made.number])
        await made.verify()
        lease.release()
        await store.prune({ numbers: [made.number] })
      } catch (error) {
        if (!(error instanceof WarmforkError) || error.code !== 'GENERATION_NOT_FOUND') throw error
        refused++
        expect((await pruned).removed).toEqual([made.number])
      }
    }
    expect(granted).toBeGreaterThan(0)
    expect(refused).toBeGreaterThan(0)
  }, 20_000)

  test('loses no race against a lease in another process', async () => {
    const script = fileURLToPath(new URL('./fixtures/generations-pruner.ts', import.meta.url))
    await create(store)
    const pruner = spawn(process.execPath, ['--import', 'tsx', script, shop.root], {
      stdio: ['pipe', 'pipe', 'inherit'],
    })
    const ended = once(pruner, 'exit')
    try {
      await once(pruner.stdout, 'data')
      let granted = 0
      for (let round = 0; round < 80; round++) {
        const made = await create(store)
        for (let turn = 0; turn < round % 5; turn++) await new Promise((resolve) => setImmediate(resolve))
        try {
          const lease = leaseSelf(made)
          granted++
          await new Promise((resolve) => setTimeout(resolve, 3))
          expect(readFileSync(join(made.directory, 'image/core-1.img'), 'utf8')).toBe('core')
          made.checkUntouched()
          lease.release()
        } catch (error) {
          if (!(error instanceof WarmforkError) || error.code !== 'GENERATION_NOT_FOUND') throw error
        }
      }
      expect(granted).toBeGreaterThan(0)
      expect(isAlive(pruner.pid!)).toBe(true)
    } finally {
      pruner.kill('SIGKILL')
      await ended
    }
  }, 30_000)
})
