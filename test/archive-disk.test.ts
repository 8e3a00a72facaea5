/** Disks that run full under an export or an import: small tmpfs, which need root to be mounted. */
import { closeSync, mkdirSync, openSync, readdirSync, readFileSync, rmSync, writeFileSync, writeSync } from 'node:fs'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { exportGeneration } from '../src/archive.js'
import type { Generation } from '../src/generations/generation.js'
import type { Store } from '../src/generations/store.js'
import { createWhole, entriesOf, exported, imported, importedFrom } from './fixtures/archives.js'
import { failure, isRoot, Workshop } from './fixtures/generations.js'

const MIB = 1 << 20
const DATA_MIB = 8

describe.skipIf(!isRoot)('a disk that is full', () => {
  let shop: Workshop
  let store: Store
  let generation: Generation
  let small: string

  beforeEach(async () => {
    shop = new Workshop()
    store = await shop.open()
    generation = await createWhole(store, { dataBytes: DATA_MIB * MIB })
    small = join(shop.directory, 'small')
    mkdirSync(small, { mode: 0o700 })
  })

  afterEach(async () => {
    await shop[Symbol.asyncDispose]()
  })

  const mount = (mib: number) => shop.mount(small, '-t', 'tmpfs', '-o', `size=${mib}m,mode=0700`, 'none')

  /** Writes until nothing more goes in. */
  function fillUp(): void {
    const fd = openSync(join(small, 'ballast'), 'a')
    try {
      for (;;) writeSync(fd, Buffer.alloc(4096))
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'ENOSPC') throw error
    } finally {
      closeSync(fd)
    }
  }

  test('under an export leaves nothing, and an older archive as it was', async () => {
    mount(DATA_MIB / 2)
    const file = join(small, 'archive.tar')
    writeFileSync(file, 'older')
    const options = { name: 'web', store: shop.root, file, compress: 'none', force: true } as const
    const error = await failure('DISK_FULL', () => exportGeneration(options))
    expect(error.happened).toBe(`there is no room for ${file}`)
    expect(readdirSync(small)).toEqual(['archive.tar'])
    expect(readFileSync(file, 'utf8')).toBe('older')
  })

  test('before an import is seen before anything is written', async () => {
    mount(DATA_MIB / 2)
    const other = await shop.open({ root: join(small, 'store'), name: 'other' })
    const error = await failure('DISK_FULL', async () => imported(other, (await exported(generation)).bytes))
    expect(error.happened).toMatch(/^it needs \d+ MiB in .*, and \d+ are free$/)
    expect(entriesOf(other)).toEqual([])
  })

  test('in the middle of an import leaves nothing, and the import works when there is room', async () => {
    mount(2 * DATA_MIB)
    const other = await shop.open({ root: join(small, 'store'), name: 'other' })
    const { bytes } = await exported(generation)
    async function* filling() {
      yield bytes.subarray(0, MIB)
      fillUp()
      yield bytes.subarray(MIB)
    }
    await failure('DISK_FULL', () => importedFrom(other, filling()))
    expect(entriesOf(other)).toEqual([])
    rmSync(join(small, 'ballast'))
    await (await imported(other, bytes)).verify()
  })
})
