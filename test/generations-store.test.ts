import { type ChildProcess, spawn, spawnSync } from 'node:child_process'
import {
  chmodSync,
  chownSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { checkExec, defaultRoot } from '../src/generations/directories.js'
import { Store } from '../src/generations/store.js'
import { create, failure, fill, isRoot, PAGE_FILE, RUNS, surroundings, Workshop } from './fixtures/generations.js'

let shop: Workshop

beforeEach(() => {
  shop = new Workshop()
})

afterEach(async () => {
  await shop[Symbol.asyncDispose]()
})

const modeOf = (path: string) => statSync(path).mode & 0o7777
const generationsOf = (store: Store) => readdirSync(join(store.directory, 'generations')).sort()

/** A process that holds the store, killed with -9 when the action is over. */
async function withHolder(what: string, action: (holder: ChildProcess) => Promise<void>): Promise<void> {
  const script = fileURLToPath(new URL('./fixtures/generations-holder.ts', import.meta.url))
  const holder = spawn(process.execPath, ['--import', 'tsx', script, shop.root, what], {
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  const ended = new Promise((resolve) => holder.once('exit', resolve))
  try {
    await new Promise<void>((resolve, reject) => {
      holder.stdout!.once('data', () => resolve())
      holder.once('exit', (code) => reject(new Error(`the holder ended with ${code}`)))
    })
    await action(holder)
  } finally {
    holder.kill('SIGKILL')
    await ended
  }
}

describe('making a generation', () => {
  test('gives one that is whole, fits, and is found again', async () => {
    const store = await shop.open()
    const made = await create(store)
    expect(made.number).toBe(1)
    await made.verify()
    made.checkUntouched()
    made.checkFit(surroundings())
    const [found] = await store.list()
    expect(found?.manifest).toEqual(made.manifest)
    expect(found?.info).toMatchObject({
      number: 1,
      memory: 'cow',
      warnings: ['a warning'],
      checkpointMs: 12,
      rssBytes: 1 << 20,
    })
    expect(await found?.runs(PAGE_FILE)).toEqual(RUNS)
    expect((await store.newest())?.number).toBe(1)
  })

  test('counts what is allocated, not the holes of the page file', async () => {
    const { sizes } = (await create(await shop.open())).manifest
    expect(sizes.apparentBytes).toBeGreaterThan(1 << 30)
    expect(sizes.allocatedBytes).toBeLessThan(1 << 20)
  })

  test('tells the filler where the generation will lie', async () => {
    const store = await shop.open()
    let told = ''
    const made = await create(store, async (draft) => {
      told = draft.finalDirectory
      expect(draft.number).toBe(1)
      expect(draft.directory).not.toBe(told)
      return fill(draft)
    })
    expect(made.directory).toBe(told)
  })

  test('removes the scratch directory', async () => {
    const made = await create(await shop.open(), async (draft) => {
      writeFileSync(join(draft.scratchDirectory, 'pages-1.img'), 'raw')
      return fill(draft)
    })
    expect(readdirSync(made.directory).sort()).toEqual([
      'files',
      'image',
      'leases',
      'manifest.json',
      PAGE_FILE,
      `${PAGE_FILE}.runs`,
    ])
  })

  test('stores no value of a declared variable', async () => {
    const made = await create(await shop.open())
    expect(readFileSync(join(made.directory, 'manifest.json'), 'utf8')).toContain('DATABASE_URL')
    expect(readFileSync(join(made.directory, 'manifest.json'), 'utf8')).not.toContain('secret')
  })

  test('makes every file read-only and every directory closed to others', async () => {
    const store = await shop.open()
    const made = await create(store)
    for (const name of ['manifest.json', PAGE_FILE, 'image/core-1.img'])
      expect(modeOf(join(made.directory, name))).toBe(0o400)
    for (const path of [store.directory, made.directory, made.imageDirectory]) expect(modeOf(path)).toBe(0o700)
  })

  test.skipIf(!isRoot)('lets the group of the workers enter and read by name, but not list', async () => {
    const store = await shop.open({ group: 65534 })
    const made = await create(store)
    for (const path of [store.directory, join(made.directory, '..'), made.directory, made.imageDirectory]) {
      expect(modeOf(path)).toBe(0o710)
      expect(statSync(path).gid).toBe(65534)
    }
    expect(modeOf(join(made.directory, PAGE_FILE))).toBe(0o440)
    expect(statSync(join(made.directory, PAGE_FILE)).gid).toBe(65534)
    expect(modeOf(join(made.directory, 'leases'))).toBe(0o700)
  })

  test.skipIf(!isRoot)('takes back what a worker’s criu wrote', async () => {
    const made = await create(await shop.open(), async (draft) => {
      const filled = await fill(draft)
      chownSync(draft.imageDirectory, 65534, 65534)
      chownSync(join(draft.imageDirectory, 'core-1.img'), 65534, 65534)
      return filled
    })
    expect(statSync(made.imageDirectory).uid).toBe(0)
    expect(statSync(join(made.imageDirectory, 'core-1.img')).uid).toBe(0)
  })

  test('leaves nothing of one whose filler fails, and throws what the filler threw', async () => {
    const store = await shop.open()
    await create(store)
    const reason = new Error('no')
    await expect(
      create(store, async (draft) => {
        await fill(draft)
        throw reason
      }),
    ).rejects.toBe(reason)
    expect(generationsOf(store)).toEqual(['1'])
  })

  test('refuses anything but files and directories in it', async () => {
    const store = await shop.open()
    await failure('IMAGE_UNSUPPORTED', () =>
      create(store, async (draft) => {
        symlinkSync('/etc/passwd', join(draft.imageDirectory, 'parent'))
        return fill(draft)
      }),
    )
    expect(generationsOf(store)).toEqual([])
  })

  test('works for several at once', async () => {
    const store = await shop.open()
    const made = await Promise.all([create(store), create(store), create(store)])
    expect(made.map(({ number }) => number)).toEqual([1, 2, 3])
    for (const generation of await store.list()) await generation.verify()
  })

  test('never uses a number twice, even when the newest is pruned and the counter is lost', async () => {
    const store = await shop.open()
    await create(store)
    await create(store)
    await store.prune({ numbers: [2] })
    expect((await create(store)).number).toBe(3)
    rmSync(join(store.directory, 'next'))
    expect((await create(store)).number).toBe(4)
    writeFileSync(join(store.directory, 'next'), 'x')
    expect((await create(store)).number).toBe(5)
  })

  test('is not hindered by a prune meanwhile', async () => {
    const store = await shop.open()
    await create(store)
    const made = await create(store, async (draft) => {
      await store.prune({ keep: 0 })
      return fill(draft)
    })
    expect(generationsOf(store)).toEqual(['2'])
    await made.verify()
  })

  test('is refused by a store that is open for reading or closed', async () => {
    const store = await shop.open()
    await failure('BAD_OPTION', async () => create(await shop.open({ access: 'read' })))
    await store.close()
    await failure('STOPPED', () => create(store))
  })

  test('says that the store is gone where it was removed, before or in the middle', async () => {
    const store = await shop.open()
    await failure('STORE_GONE', () =>
      create(store, async (draft) => {
        rmSync(store.directory, { recursive: true })
        return fill(draft)
      }),
    )
    await failure('STORE_GONE', () => create(store))
    await failure('STORE_GONE', () => store.get(1))
    mkdirSync(join(store.directory, 'generations'), { recursive: true })
    expect((await failure('STORE_GONE', () => create(store))).happened).toContain('made again')
  })

  test('links a page file of the parent in, whose removal then harms nothing', async () => {
    const store = await shop.open()
    const parent = await create(store)
    const child = await store.create({ parent: 1, surroundings: surroundings() }, async (draft) => {
      await draft.inheritPageFile(parent, PAGE_FILE)
      writeFileSync(join(draft.imageDirectory, 'core-1.img'), 'warmer')
      return {
        memory: 'cow',
        pageFiles: [],
        warnings: [],
        rssBytes: 0,
        processes: [],
        edits: null,
        engineData: null,
        checkpointMs: 0,
        prepareMs: 0,
      }
    })
    parent.checkUntouched()
    expect(statSync(join(child.directory, PAGE_FILE)).ino).toBe(statSync(join(parent.directory, PAGE_FILE)).ino)
    await store.prune({ numbers: [1] })
    child.checkUntouched()
    await child.verify()
    expect(child.manifest.parent).toBe(1)
    expect(await child.runs(PAGE_FILE)).toEqual(RUNS)
  })

  test('goes on serving a parent whose refork failed after it had linked the page file', async () => {
    const store = await shop.open()
    const parent = await create(store)
    await expect(
      create(store, async (draft) => {
        await draft.inheritPageFile(parent, PAGE_FILE)
        throw new Error('no')
      }),
    ).rejects.toThrow('no')
    parent.checkUntouched()
  })
})

describe('opening a store', () => {
  test.each(['', '.', '..', 'a/b', '../x', '-x', '.hidden', 'a b', 'é', 'a\n', 'x'.repeat(65)])(
    'refuses the name %j',
    async (name) => {
      await failure('BAD_OPTION', () => shop.open({ name }))
      expect(existsSync(shop.root)).toBe(false)
    },
  )

  test('makes its directories with mode 0700 whatever the umask', async () => {
    const before = process.umask(0)
    try {
      const store = await shop.open()
      expect(modeOf(shop.root)).toBe(0o700)
      expect(modeOf(store.directory)).toBe(0o700)
    } finally {
      process.umask(before)
    }
  })

  test('finds nothing in a store that is not there, and makes nothing, when it only reads', async () => {
    const store = await shop.open({ access: 'read' })
    expect(await store.list()).toEqual([])
    expect(await store.newest()).toBeUndefined()
    expect(await store.prune({ keep: 0 })).toEqual({ removed: [], kept: [] })
    await failure('GENERATION_NOT_FOUND', () => store.get(1))
    expect(existsSync(shop.root)).toBe(false)
  })

  test('names the stores below a root', async () => {
    await shop.open({ name: 'jobs' })
    await shop.open({ name: 'api' })
    expect(await Store.names(shop.root)).toEqual(['api', 'jobs'])
  })

  test('takes the default root from the environment', () => {
    expect(defaultRoot({ WARMFORK_STORE: '/x/y' })).toBe('/x/y')
    if (isRoot) expect(defaultRoot({ XDG_STATE_HOME: '/s' })).toBe('/var/lib/warmfork')
    else expect(defaultRoot({ XDG_STATE_HOME: '/s' })).toBe('/s/warmfork')
  })

  test.each(['root', 'name', 'generations'])(
    'refuses a world-writable directory in the place of its %s',
    async (which) => {
      const store = await shop.open()
      await store.close()
      const path = { root: shop.root, name: store.directory, generations: join(store.directory, 'generations') }[which]!
      for (const mode of [0o777, 0o770]) {
        chmodSync(path, mode)
        const error = await failure('STORE_UNSAFE', () => shop.open())
        expect(error.happened).toContain(`mode 0${mode.toString(8)}`)
        expect(error.remedy).toContain(`chmod 0700 ${path}`)
      }
      chmodSync(path, 0o700)
      await shop.open()
    },
  )

  test.skipIf(!isRoot)('refuses a directory of somebody else, naming the owner', async () => {
    const store = await shop.open()
    await store.close()
    chownSync(store.directory, 65534, 65534)
    const error = await failure('STORE_UNSAFE', () => shop.open())
    expect(error.happened).toContain('user 65534')
    expect(error.remedy).toContain(`chown 0 ${store.directory}`)
    await failure('STORE_UNSAFE', () => shop.open({ access: 'read' }))
  })

  test.skipIf(!isRoot)('says that it has no right where the store is closed to this user', async () => {
    await (await shop.open()).close()
    chmodSync(shop.directory, 0o711)
    // In a process of its own: the user of this one is that of all its threads.
    const script = fileURLToPath(new URL('./fixtures/generations-outsider.ts', import.meta.url))
    const outsider = spawnSync(process.execPath, ['--import', 'tsx', script, shop.root], {
      encoding: 'utf8',
      timeout: 20_000,
    })
    expect(outsider.stdout.trim().split('\n')).toEqual(['read STORE_UNWRITABLE', 'exclusive STORE_UNWRITABLE'])
  })

  test.each(['root', 'name', 'generations'])('refuses a symbolic link in the place of its %s', async (which) => {
    const store = await shop.open()
    await store.close()
    const path = { root: shop.root, name: store.directory, generations: join(store.directory, 'generations') }[which]!
    renameSync(path, join(shop.directory, 'elsewhere'))
    symlinkSync(join(shop.directory, 'elsewhere'), path)
    expect((await failure('STORE_UNSAFE', () => shop.open())).happened).toContain('symbolic link')
  })

  test('refuses a symbolic link in the place of the lock', async () => {
    const store = await shop.open()
    await store.close()
    rmSync(join(store.directory, 'lock'))
    writeFileSync(join(shop.directory, 'victim'), 'content')
    symlinkSync(join(shop.directory, 'victim'), join(store.directory, 'lock'))
    await failure('STORE_UNSAFE', () => shop.open())
    expect(readFileSync(join(shop.directory, 'victim'), 'utf8')).toBe('content')
  })

  test('refuses a file in the place of its directory', async () => {
    writeFileSync(shop.root, '')
    await failure('STORE_UNSAFE', () => shop.open())
  })

  test.skipIf(!isRoot)('refuses a file system that forbids executable mappings', async () => {
    const directory = join(shop.directory, 'a b')
    mkdirSync(directory)
    shop.mount(directory, '-t', 'tmpfs', '-o', 'noexec,mode=0700', 'none')
    const error = await failure('STORE_NOEXEC', () => shop.open({ root: directory }))
    expect(error.happened).toContain(directory)
    expect(() => checkExec(shop.directory)).not.toThrow()
  })
})

describe('the lock', () => {
  test('refuses a second supervisor in the same process, naming the first', async () => {
    await shop.open()
    expect((await failure('STORE_LOCKED', () => shop.open())).happened).toContain(`process ${process.pid} `)
  })

  test('leaves other names alone', async () => {
    await shop.open()
    await shop.open({ name: 'jobs' })
  })

  test('is free again once it is closed', async () => {
    const store = await shop.open()
    await store.close()
    await store.close()
    await shop.open()
  })

  test('waits on close for a generation in the making', async () => {
    const store = await shop.open()
    const made = create(store)
    await store.close()
    expect(existsSync((await made).directory)).toBe(true)
  })

  test('refuses a second supervisor while another process lives, and not once it was killed', async () => {
    await withHolder('hold', async (holder) => {
      expect((await failure('STORE_LOCKED', () => shop.open())).happened).toContain(`process ${holder.pid} `)
      await (await shop.open({ access: 'read' })).list()
    })
    await shop.open()
  })

  test('is not inherited by programs that the supervisor starts', async () => {
    const store = await shop.open()
    const sleeper = spawn('sleep', ['30'], { stdio: 'ignore' })
    try {
      await new Promise((resolve) => sleeper.once('spawn', resolve))
      await store.close()
      await shop.open()
    } finally {
      sleeper.kill('SIGKILL')
      await new Promise((resolve) => sleeper.once('exit', resolve))
    }
  })
})

describe('after a crash', () => {
  test('the next supervisor sweeps what one that was killed in the middle of a generation left', async () => {
    let store = await shop.open()
    await create(store)
    await store.close()
    await withHolder('create', async () => {
      const names = readdirSync(join(store.directory, 'generations'))
      expect(names.some((name) => name.startsWith('.tmp-'))).toBe(true)
      await (await shop.open({ access: 'read' })).prune({ keep: 5 })
      expect(readdirSync(join(store.directory, 'generations')).length).toBe(2)
    })
    store = await shop.open()
    expect(generationsOf(store)).toEqual(['1'])
    // The number that the dead one had reserved is not used again.
    expect((await create(store)).number).toBe(3)
  })

  test('the next supervisor ends a prune that was killed in the middle', async () => {
    const store = await shop.open()
    const made = await create(store)
    await store.close()
    renameSync(made.directory, join(store.directory, 'generations', '.dead-1-999999999-1-00'))
    expect(generationsOf(await shop.open())).toEqual([])
  })
})
