import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { cpSync, existsSync, readdirSync, rmSync, truncateSync, utimesSync, writeFileSync } from 'node:fs'
import { open } from 'node:fs/promises'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import type { Draft } from '../src/generations/draft.js'
import type { Generation } from '../src/generations/generation.js'
import type { Filled, Store } from '../src/generations/store.js'
import { stat } from '../src/linux/proc.js'
import { create, failure, fill, PAGE_FILE, surroundings, Workshop } from './fixtures/generations.js'

let shop: Workshop
let store: Store

beforeEach(async () => {
  shop = new Workshop()
  store = await shop.open()
})

afterEach(async () => {
  await shop[Symbol.asyncDispose]()
})

async function ephemeral(filler: (draft: Draft) => Promise<Filled> = fill): Promise<Generation> {
  return store.create({ parent: null, surroundings: surroundings(), durable: false }, filler)
}

const numbers = async (of: Store) => (await of.list()).map(({ number }) => number)
const directories = () => readdirSync(join(store.directory, 'generations')).sort()

/** A child of a generation that shares its page file. */
const inheriting = (parent: Generation) => async (draft: Draft) => {
  await draft.inheritPageFile(parent, PAGE_FILE)
  return { ...(await fillImage(draft)), pageFiles: [] }
}

async function fillImage(draft: Draft): Promise<Filled> {
  writeFileSync(join(draft.imageDirectory, 'core-1.img'), 'core')
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
}

describe('an ephemeral generation', () => {
  test('is used by its supervisor, and is not the one that another would start from', async () => {
    const durable = await create(store)
    const made = await ephemeral()
    expect([durable.ephemeral, made.ephemeral]).toEqual([false, true])
    expect(await numbers(store)).toEqual([1, 2])
    expect((await store.newest())?.number).toBe(1)
    await made.verify()
    made.checkUntouched()
  })

  test('is found broken where a file of it has another size', async () => {
    const made = await ephemeral()
    truncateSync(join(made.directory, 'image/core-1.img'), 1)
    await failure('GENERATION_CORRUPT', () => made.verify())
    await failure('GENERATION_CORRUPT', () => made.checkUntouched())
  })

  test('goes with its supervisor', async () => {
    await create(store)
    await ephemeral()
    await store.close()
    expect(directories()).toEqual(['1'])
  })

  test('is removed by the next supervisor, also where a power cut has left nothing of its files', async () => {
    await create(store)
    const made = await ephemeral()
    cpSync(made.directory, join(shop.directory, 'copy'), { recursive: true })
    await store.close()
    cpSync(join(shop.directory, 'copy'), made.directory, { recursive: true })
    truncateSync(join(made.directory, 'manifest.json'), 0)
    rmSync(join(made.directory, 'leases'), { recursive: true })
    const next = await shop.open()
    expect(directories()).toEqual(['1'])
    expect((await next.survey()).broken).toEqual([])
  })

  test('is left alone and not used as long as a process of the last supervisor needs it', async () => {
    const made = await ephemeral()
    const sleeper = spawn('sleep', ['60'], { stdio: 'ignore' })
    await once(sleeper, 'spawn')
    try {
      made.lease(sleeper.pid!, stat(sleeper.pid!)!.startTicks)
      await store.close()
      const next = await shop.open()
      expect(directories()).toEqual(['1'])
      expect(await numbers(next)).toEqual([])
      await failure('GENERATION_MISFIT', () => next.get(1))
      expect((await create(next)).number).toBe(2)
      sleeper.kill('SIGKILL')
      await once(sleeper, 'exit')
      await next.prune({})
      expect(directories()).toEqual(['2'])
    } finally {
      sleeper.kill('SIGKILL')
    }
  })

  test('takes no durable one its place when old ones are pruned, and goes once nobody needs it', async () => {
    await create(store)
    const held = await ephemeral()
    const unneeded = await ephemeral()
    unneeded.letGo()
    expect(await store.prune({ keep: 1 })).toEqual({ removed: [3], kept: [] })
    held.letGo()
    expect(await store.prune({ keep: 1 })).toEqual({ removed: [2], kept: [] })
    expect(directories()).toEqual(['1'])
  })
})

describe('a page file that a child inherited', () => {
  test('has a checksum in a durable child of an ephemeral generation', async () => {
    const parent = await ephemeral()
    const child = await create(store, inheriting(parent))
    expect(parent.manifest.files[PAGE_FILE]?.sha256).toBeUndefined()
    await child.verify()
    const handle = await open(join(child.directory, PAGE_FILE), 'r+')
    await handle.write(Buffer.of(1), 0, 1, 0)
    await handle.close()
    expect((await failure('GENERATION_CORRUPT', () => child.verify())).happened).toContain(PAGE_FILE)
  })

  test('is not read again for the forks of its parent when the child comes and goes', async () => {
    const parent = await create(store)
    const child = await ephemeral(inheriting(parent))
    child.letGo()
    await store.prune({ numbers: [child.number] })
    expect(existsSync(child.directory)).toBe(false)
    // Whoever read it would find another checksum.
    parent.manifest.files[PAGE_FILE]!.sha256 = '0'.repeat(64)
    parent.checkUntouched()
  })

  test('is found changed all the same when somebody wrote to it and set its time back', async () => {
    const path = join((await create(store)).directory, PAGE_FILE)
    const fixed = new Date('2020-01-01T00:00:00Z')
    utimesSync(path, fixed, fixed)
    const parent = await store.get(1)
    const child = await ephemeral(inheriting(parent))
    child.letGo()
    const handle = await open(path, 'r+')
    await handle.write(Buffer.of(1), 0, 1, 0)
    await handle.close()
    utimesSync(path, fixed, fixed)
    await store.prune({ numbers: [child.number] })
    await failure('GENERATION_CORRUPT', () => parent.checkUntouched())
  })
})
