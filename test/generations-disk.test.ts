/** Small file systems of our own, full or read-only. They need root, to be mounted. */
import { execFileSync } from 'node:child_process'
import { closeSync, mkdirSync, openSync, readdirSync, rmSync, truncateSync, writeFileSync, writeSync } from 'node:fs'
import { basename, join } from 'node:path'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { WarmforkError } from '../src/errors.js'
import type { Draft } from '../src/generations/draft.js'
import type { Store } from '../src/generations/store.js'
import { stat } from '../src/linux/proc.js'
import { create, failure, fill, isRoot, Workshop } from './fixtures/generations.js'

const TYPES = ['tmpfs', 'ext4'] as const

describe.skipIf(!isRoot).each(TYPES)('on a small %s', (type) => {
  let shop: Workshop
  let mount: string
  let store: Store

  beforeEach(async () => {
    shop = new Workshop()
    mount = join(shop.directory, 'mount')
    mkdirSync(mount)
    if (type === 'tmpfs') shop.mount(mount, '-t', 'tmpfs', '-o', 'size=8m,mode=0755', 'none')
    else {
      const image = join(shop.directory, 'image')
      writeFileSync(image, '')
      truncateSync(image, 12 << 20)
      execFileSync('mkfs.ext4', ['-q', '-m', '0', image], { timeout: 30_000 })
      shop.mount(mount, '-o', 'loop', image)
    }
    store = await shop.open({ root: join(mount, 'store') })
  })

  afterEach(async () => {
    await shop[Symbol.asyncDispose]()
  })

  const names = () => readdirSync(join(store.directory, 'generations')).sort()
  const remount = (how: string) => execFileSync('mount', ['-o', `remount,${how}`, mount], { timeout: 10_000 })

  /** Writes until nothing more goes in. */
  function fillUp(path: string): void {
    const fd = openSync(path, 'w')
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

  async function expectDiskFull(filler: (draft: Draft) => ReturnType<typeof fill>): Promise<void> {
    const first = await create(store)
    const error = await failure('DISK_FULL', () => create(store, filler))
    expect(error.remedy).toContain('warmfork prune')
    expect(names()).toEqual(['1'])
    first.checkUntouched()
    await first.verify()
    rmSync(join(mount, 'ballast'), { force: true })
    await (await create(store)).verify()
  }

  test('a disk that fills up while the generation is filled leaves the older one whole and nothing of the new one', async () => {
    await expectDiskFull(async (draft) => {
      writeFileSync(join(draft.imageDirectory, 'pages-1.img'), Buffer.alloc(20 << 20))
      return fill(draft)
    })
  })

  test('a disk that fills up while the generation is sealed leaves the older one whole and nothing of the new one', async () => {
    await expectDiskFull(async (draft) => {
      const filled = await fill(draft)
      fillUp(join(mount, 'ballast'))
      return filled
    })
  })

  test('a disk that is full before anything is made is named', async () => {
    await create(store)
    fillUp(join(mount, 'ballast'))
    await failure('DISK_FULL', () => create(store))
    expect(names()).toEqual(['1'])
  })

  test('a full disk that another program reported is named', async () => {
    await expectDiskFull(async () => {
      throw new WarmforkError('CHECKPOINT_FAILED', {
        tried: 'checkpoint process 7',
        happened: 'criu ended with status 1',
        output: 'Error (criu/image.c:1): Unable to write: No space left on device',
      })
    })
  })

  test('a full disk hinders neither forks nor a prune', async () => {
    const made = await create(store)
    fillUp(join(mount, 'ballast'))
    made.checkUntouched()
    const lease = made.lease(process.pid, stat(process.pid)!.startTicks)
    lease.release()
    expect(await store.prune({ keep: 0 })).toEqual({ removed: [1], kept: [] })
  })

  test('a store that became read-only still serves, and says so when one is made or pruned', async () => {
    const made = await create(store)
    await store.close()
    remount('ro')
    try {
      const error = await failure('STORE_UNWRITABLE', () => shop.open({ root: join(mount, 'store') }))
      expect(error.happened).toContain('read-only')
      const reading = await shop.open({ root: join(mount, 'store'), access: 'read' })
      const [found] = await reading.list()
      await found!.verify()
      expect(found!.lease(process.pid, 1).recorded).toBe(false)
      made.checkUntouched()
      await failure('STORE_UNWRITABLE', () => reading.prune({ keep: 0 }))
    } finally {
      remount('rw')
    }
  })
})

describe.skipIf(!isRoot)('on an ext4 that turns itself read-only after an error', () => {
  test('the making of a generation fails by name, and the older one still serves', async () => {
    const shop = new Workshop()
    try {
      const mount = join(shop.directory, 'mount')
      const image = join(shop.directory, 'image')
      mkdirSync(mount)
      writeFileSync(image, '')
      truncateSync(image, 12 << 20)
      execFileSync('mkfs.ext4', ['-q', image], { timeout: 30_000 })
      shop.mount(mount, '-o', 'loop,errors=remount-ro', image)
      const store = await shop.open({ root: join(mount, 'store') })
      const made = await create(store)
      const device = execFileSync('findmnt', ['-no', 'SOURCE', mount], { encoding: 'utf8', timeout: 10_000 }).trim()
      writeFileSync(`/sys/fs/ext4/${basename(device)}/trigger_fs_error`, 'by a test')
      await failure('STORE_UNWRITABLE', () => create(store))
      made.checkUntouched()
      await made.verify()
      expect(made.lease(process.pid, stat(process.pid)!.startTicks).recorded).toBe(false)
    } finally {
      await shop[Symbol.asyncDispose]()
    }
  })
})
