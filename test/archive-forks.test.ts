/** Forks of imported generations, by the real CRIU; and exports and imports that are killed in the middle. */
import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { closeSync, createReadStream, openSync, readdirSync, readFileSync, readSync, rmSync, statSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest'
import { exportGeneration, importGeneration } from '../src/archive.js'
import { findCriu, formatVersion } from '../src/engines/criu/binary.js'
import { Archive } from '../src/generations/archive/archive.js'
import { importInto } from '../src/generations/archive/read-archive.js'
import { walk } from '../src/generations/draft.js'
import { Store } from '../src/generations/store.js'
import { CLI } from './cli-harness.js'
import { PROGRAMS } from './engines-under-test.js'
import { type Child, Laboratory } from './fixtures/forks.js'

const MIB = 40
const QUOTED = ['a b', "it's", '"quoted"', '$HOME', '', '--flag=x y', 'ünïcode\n']
const criuVersion = formatVersion(findCriu().version)

/** Where the template runs, and its generation 1 was made. */
const origin = new Laboratory()
const originStore = join(origin.directory, 'store')
const file = join(origin.directory, 'an archive.tar')
let sum: string

beforeAll(async () => {
  const program = origin.start([process.execPath, join(PROGRAMS, 'family.mjs'), String(MIB)])
  await program.talk.untilReady()
  await origin.checkpoint(program, 'cow')
  sum = await program.talk.ask('sum')
  await origin.end(program)
})

afterAll(() => origin.close())

/** Where archives are imported. */
let target: Laboratory
const targetStore = () => join(target.directory, 'store')

beforeEach(() => {
  target = new Laboratory()
})

afterEach(() => target.close())

const exportFile = (options: Partial<Parameters<typeof exportGeneration>[0]> = {}) =>
  exportGeneration({ name: 'test', store: originStore, file, force: true, ...options })
const importFile = () => importGeneration({ file, store: targetStore(), name: 'test' })

async function expectFork(number: number): Promise<Child> {
  const child = await target.fork(number)
  child.resume()
  expect(await child.talk.ask('sum')).toBe(sum)
  return child
}

function start(...args: string[]): { process: ChildProcess; ended: Promise<void> } {
  const [node, ...before] = CLI
  const child = spawn(node, [...before, ...args], { stdio: 'ignore', timeout: 60_000, killSignal: 'SIGKILL' })
  return { process: child, ended: once(child, 'exit').then(() => undefined) }
}

/** Bytes of what is being written in a directory, under names of drafts. */
function draftBytes(directory: string): number {
  try {
    return readdirSync(directory)
      .filter((name) => name.startsWith('.'))
      .flatMap((name) => {
        const path = join(directory, name)
        const stats = statSync(path)
        return stats.isDirectory()
          ? readdirSync(path).map((inner) => statSync(join(path, inner)).blocks * 512)
          : stats.size
      })
      .reduce((total, bytes) => total + bytes, 0)
  } catch {
    // It ends or begins at this very moment.
    return 0
  }
}

describe('an imported generation', () => {
  test.each(['none', 'gzip', 'zstd'] as const)('forks (%s), from files that are not compressed', async (compress) => {
    const { digest } = await exportFile({ compress })
    const { number } = await importGeneration({ file, store: targetStore(), name: 'test', digest })
    const child = await expectFork(number)
    const generation = await (await target.engine()).store.get(number)
    const maps = readFileSync(`/proc/${child.pid}/maps`, 'utf8')
    const pages = [...new Set([...maps.matchAll(/\S+warmfork-pages\S*/g)].map(([path]) => path))]
    expect(pages).toEqual(generation.pageFiles.map((name) => join(generation.directory, name)))
    expect(maps).not.toContain(origin.directory)
    expect(maps).not.toMatch(/\.(gz|zst|tar)\b/)
    for (const name of (await walk(generation.directory)).files) {
      if (name.startsWith('files/')) continue
      expect(firstBytes(join(generation.directory, name)), name).not.toMatch(/^(1f8b|28b52ffd|502a4d18)/)
    }
    // Nothing is read of the archive any more.
    rmSync(file)
    await expectFork(number)
  })

  test('has the arguments of its command as they were', async () => {
    const program = target.start([process.execPath, join(PROGRAMS, 'app.mjs'), ...QUOTED])
    await program.talk.untilReady()
    const { number } = await target.checkpoint(program, 'cow')
    const path = join(target.directory, `it's "an archive" $HOME.tar`)
    await exportGeneration({ name: 'test', store: targetStore(), generation: number, file: path })
    await target.end(program)
    const elsewhere = new Laboratory()
    try {
      await importGeneration({ file: path, store: join(elsewhere.directory, 'store'), name: 'test' })
      const child = (await elsewhere.fork(1)).resume()
      expect(JSON.parse(await child.talk.ask('args'))).toEqual(QUOTED)
    } finally {
      await elsewhere.close()
    }
  })

  test('has listeners of its own where its forks share them', async () => {
    const program = target.start([process.execPath, join(PROGRAMS, 'tcp-server.mjs')])
    const port = Number(/^port (\d+)$/.exec(await program.talk.line())![1])
    const { number } = await target.checkpoint(program, 'cow')
    const elsewhere = new Laboratory()
    try {
      const path = join(elsewhere.directory, 'server.tar')
      await exportGeneration({ name: 'test', store: targetStore(), generation: number, file: path })
      // The port is free then.
      await target.close()
      await importGeneration({ file: path, store: join(elsewhere.directory, 'store'), name: 'test' })
      const child = (await elsewhere.fork(1)).resume()
      const response = await fetch(`http://127.0.0.1:${port}/`)
      expect(await response.text()).toBe(String(child.pid))
    } finally {
      await elsewhere.close()
      target = new Laboratory()
    }
  })

  test('is a baseline: a fork of it that has warmed up is checkpointed and exported in its turn', async () => {
    await exportFile()
    await importFile()
    const child = await expectFork(1)
    await child.talk.ask('start')
    await child.stop()
    const { number } = await target.checkpoint(child, 'cow')
    await target.end(child)
    const store = (await target.engine()).store
    expect((await store.get(number)).pageFiles.length).toBeGreaterThan(1)
    const custom = join(target.directory, 'custom.tar')
    await exportGeneration({ name: 'test', store: targetStore(), generation: number, file: custom })
    // The baseline may go.
    await target.forget(1)
    const elsewhere = new Laboratory()
    try {
      await importGeneration({ file: custom, store: join(elsewhere.directory, 'store'), name: 'test' })
      const warm = (await elsewhere.fork(1)).resume()
      expect(await warm.talk.ask('sum')).toBe(sum)
      expect((await warm.talk.ask('relatives')).split(' ')).toHaveLength(3)
    } finally {
      await elsewhere.close()
    }
  })

  test('comes through pipes of the command line', async () => {
    const line = '"$@" export -o - --store "$FROM" --name test | "$@" import - --store "$TO" --json'
    const env = { ...process.env, FROM: originStore, TO: targetStore() }
    const shell = spawn('sh', ['-c', line, 'sh', ...CLI], { env, stdio: ['ignore', 'pipe', 'pipe'], timeout: 60_000 })
    let [out, errors] = ['', '']
    shell.stdout.on('data', (text) => {
      out += text
    })
    shell.stderr.on('data', (text) => {
      errors += text
    })
    await once(shell, 'close')
    expect(errors).toMatch(/^exported generation 1 of test: .*\ndigest sha256:[0-9a-f]{64}\n$/)
    const { number, digest, from } = JSON.parse(out)
    expect(errors).toContain(digest)
    expect(from).toMatchObject({ name: 'test', number: 1 })
    await expectFork(number)
  })
})

function firstBytes(path: string): string {
  const fd = openSync(path, 'r')
  try {
    const bytes = Buffer.alloc(4)
    return bytes.subarray(0, readSync(fd, bytes, 0, 4, 0)).toString('hex')
  } finally {
    closeSync(fd)
  }
}

describe('what is killed', () => {
  test('an export over an older one leaves the older one, whichever of them is compressed', {
    timeout: 120_000,
  }, async () => {
    const sizes = { none: 0, gzip: 0, zstd: 0 }
    for (const compress of ['none', 'zstd', 'gzip'] as const) {
      sizes[compress] = (await exportFile({ compress })).archiveBytes
    }
    let killed = 0
    const left = () => readdirSync(origin.directory).filter((name) => name.endsWith('.part'))
    for (const compress of ['none', 'zstd', 'none', 'gzip'] as const) {
      const before = firstBytes(file)
      for (const share of [0, 0.2, 0.7]) {
        const { process: child, ended } = start(
          ...['export', '-o', file, '--force', '--compress', compress, '--store', originStore, '--name', 'test'],
        )
        const enough = share * sizes[compress]
        let has = 0
        while (child.exitCode === null && (left().length === 0 || has < enough)) {
          await sleep(1)
          has = draftBytes(origin.directory)
        }
        child.kill('SIGKILL')
        await ended
        // What was there, or, where it was quicker than the kill, the new one. Never a part.
        if (firstBytes(file) === before) killed++
        const { number } = await importFile()
        await expectFork(number)
        await target.endAll()
        await target.close()
        target = new Laboratory()
      }
      await exportFile({ compress })
      expect(left()).toEqual([])
      expect(firstBytes(file)).not.toBe(before)
    }
    expect(killed).toBeGreaterThan(3)
  })

  test('an import leaves nothing that could be forked, and a sweep removes the rest', { timeout: 60_000 }, async () => {
    await exportFile({ compress: 'none' })
    const generations = join(targetStore(), 'test', 'generations')
    for (const share of [0, 0.3, 0.9]) {
      const { process: child, ended } = start('import', file, '--store', targetStore(), '--name', 'test')
      const drafts = () => {
        try {
          return readdirSync(generations).length
        } catch {
          return 0
        }
      }
      while (child.exitCode === null && (drafts() === 0 || draftBytes(generations) < share * (MIB << 20)))
        await sleep(1)
      child.kill('SIGKILL')
      await ended
      expect(child.signalCode).toBe('SIGKILL')
      await using seen = await Store.open({ root: targetStore(), name: 'test', access: 'read' })
      expect(await seen.survey()).toEqual({ generations: [], broken: [] })
      await using swept = await Store.open({ root: targetStore(), name: 'test', access: 'exclusive' })
      expect(readdirSync(join(swept.directory, 'generations'))).toEqual([])
    }
    const { number } = await importFile()
    await expectFork(number)
  })
})

test('an import that is slow holds up no fork of another generation', async () => {
  const other = join(target.directory, 'other.tar')
  await exportFile({ file: other, compress: 'zstd' })
  const { size } = statSync(other)
  const engine = await origin.engine()
  let release!: () => void
  const released = new Promise<void>((resolve) => {
    release = resolve
  })
  async function* slowly(): AsyncGenerator<Buffer> {
    let sent = 0
    for await (const piece of createReadStream(other, { highWaterMark: Math.ceil(size / 20) })) {
      yield piece
      sent += piece.length
      if (sent > size / 2) await released
    }
  }
  const archive = await Archive.open(slowly())
  let done = false
  const importing = importInto(engine.store, archive, { criuVersion }).finally(() => {
    done = true
  })
  try {
    for (let i = 0; i < 6; i++) {
      const child = (await origin.fork(1)).resume()
      expect(await child.talk.ask('sum')).toBe(sum)
      await origin.end(child)
    }
    expect(done).toBe(false)
  } finally {
    release()
  }
  const made = await importing
  await archive.close()
  const child = (await origin.fork(made.number)).resume()
  expect(await child.talk.ask('sum')).toBe(sum)
  await origin.end(child)
  made.letGo()
})
