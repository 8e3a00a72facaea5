/** `warmfork generations`, `inspect` and `prune`: on generations that CRIU made, and on stores without a supervisor. */
import { appendFileSync, chmodSync } from 'node:fs'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { stat } from '../src/linux/proc.js'
import { type Running, Terminal } from './cli-harness.js'
import { create, isRoot, PAGE_FILE, Workshop } from './fixtures/generations.js'

describe('generations of a supervisor', () => {
  const terminal = new Terminal()
  let supervisor: Running
  const json = async (...args: string[]) =>
    JSON.parse((await terminal.call([...args, '--json', ...terminal.here])).stdout)
  beforeAll(async () => {
    supervisor = await terminal.run('shop', ['--engine', 'criu', '--declared-env', 'PATH'])
  })
  afterAll(() => terminal.leave())

  test('generations lists the one that forks come from, and who needs it', async () => {
    const { name, store, generations } = await json('generations')
    expect({ name, store }).toEqual({ name: 'shop', store: terminal.store })
    expect(generations).toMatchObject([{ number: 1, parent: null, current: true }])
    expect(generations[0].usedBy).toContain(supervisor.pid)
    expect(generations[0].rssBytes).toBeGreaterThan(10 * 1024 * 1024)
    const { stdout } = await terminal.call(['generations', ...terminal.here])
    expect(stdout).toMatch(
      /^shop {2}\S+\nGEN +AGE +PARENT +REFORKS +RSS MiB +DISK MiB +OWN MiB +MEMORY +CHECKPOINT +USED BY +STATE +WHY *\n +1 +\S+ .* current *\n$/,
    )
  })

  test('inspect tells processes, memory by kind, files, pipes and edits', async () => {
    const found = await json('inspect')
    expect(found).toMatchObject({ name: 'shop', number: 1, parent: null, declaredEnv: ['PATH'], memoryMode: 'cow' })
    expect(found.processes).toMatchObject([{ ppid: 0, comm: expect.stringMatching(/^(node|MainThread)$/) }])
    expect(found.processes[0].threads).toBeGreaterThan(1)
    const kinds = Object.fromEntries(found.memory.map((each: { kind: string }) => [each.kind, each]))
    expect(kinds.pageFile.pageFileBytes).toBeGreaterThan(5 * 1024 * 1024)
    expect(kinds.pageFile.mappedBytes).toBeGreaterThanOrEqual(kinds.pageFile.pageFileBytes)
    expect(found.mappedFiles).toContainEqual(
      expect.objectContaining({ path: process.execPath, use: 'mapped', now: 'same' }),
    )
    const pipes = found.others
      .filter((each: { type: string }) => each.type === 'pipe')
      .map((each: { fd: number }) => each.fd)
    expect(pipes).toEqual(expect.arrayContaining([0, 1, 2]))
    expect(found.edits.sharedBytes).toBeGreaterThan(5 * 1024 * 1024)
    expect(found).not.toHaveProperty('verified')
  })

  test('inspect for people has a heading for each part', async () => {
    const { code, stdout } = await terminal.call(['inspect', '1', '--verify', ...terminal.here])
    expect(code).toBe(0)
    expect(stdout).toMatch(/^generation {2}1 of shop, \S+ old\n/)
    expect(stdout).toMatch(/^checksums +all as they were made$/m)
    for (const part of ['Processes', 'Memory', 'Other descriptors', 'Edits'])
      expect(stdout).toMatch(new RegExp(`^${part}$`, 'm'))
    expect(stdout).not.toContain('\u001b')
  })

  test('prune keeps what is in use, and a dry run says so before', async () => {
    const args = ['prune', '--keep', '0', ...terminal.here]
    const foreseen = await terminal.call([...args, '--dry-run'])
    const pruned = await terminal.call(args)
    expect(pruned.stdout).toMatch(new RegExp(`^kept generation 1: in use by processes .*\\b${supervisor.pid}\\b`))
    expect(foreseen.stdout).toBe(pruned.stdout)
    expect((await json('generations')).generations).toHaveLength(1)
  })

  test('prune removes it when the supervisor has stopped', async () => {
    await terminal.call(['stop', ...terminal.here])
    const store = ['--store', terminal.store, ...terminal.here]
    expect((await terminal.call(['prune', '1', ...store])).stdout).toBe('removed generation 1\n')
    expect((await terminal.call(['generations', ...store])).stdout).toMatch(/\nno generations\n$/)
    expect((await terminal.call(['inspect', ...store])).stderr).toContain('(GENERATION_NOT_FOUND)')
  })
})

describe('a store whose supervisor does not run', () => {
  const terminal = new Terminal()
  afterAll(() => terminal.leave())
  const call = (workshop: Workshop, ...args: string[]) =>
    terminal.call([...args, '--store', workshop.root, ...terminal.here])

  test('is found without a name where it is the only one, else the names are listed', async () => {
    await using workshop = new Workshop()
    await create(await workshop.open())
    expect(JSON.parse((await call(workshop, 'generations', '--json')).stdout)).toMatchObject({
      name: 'web',
      generations: [{ number: 1, current: false }],
    })
    await create(await workshop.open({ name: 'api' }))
    const { code, stderr } = await call(workshop, 'generations')
    expect(code).toBe(2)
    expect(stderr).toContain(`the store ${workshop.root} holds those of api, web`)
    expect((await call(workshop, 'generations', '--name', 'api')).code).toBe(0)
  })

  test.each([
    [
      ['--keep', '2'],
      [1, 2],
    ],
    [
      ['--keep', '0'],
      [1, 2, 3, 4],
    ],
    [['--older-than', '7d'], []],
    [
      ['--older-than', '0'],
      [1, 2, 3, 4],
    ],
    [['--keep', '3', '--older-than', '0'], [1]],
    [
      ['3', '1'],
      [1, 3],
    ],
  ] as const)('prune %j removes what a dry run foresees', async (args, removed) => {
    await using workshop = new Workshop()
    const store = await workshop.open()
    for (let i = 0; i < 4; i++) await create(store)
    const answer = async (...more: string[]) =>
      JSON.parse((await call(workshop, 'prune', ...args, ...more, '--json')).stdout)
    expect(await answer('--dry-run')).toEqual({ name: 'web', store: workshop.root, dryRun: true, removed, kept: [] })
    expect((await store.list()).length).toBe(4)
    expect(await answer()).toEqual({ name: 'web', store: workshop.root, dryRun: false, removed, kept: [] })
    expect((await store.list()).map(({ number }) => number)).toEqual(
      [1, 2, 3, 4].filter((number) => !(removed as readonly number[]).includes(number)),
    )
  })

  test('prune names the processes that hold a lease', async () => {
    await using workshop = new Workshop()
    const store = await workshop.open()
    const generation = await create(store)
    await create(store)
    const lease = generation.lease(process.pid, stat(process.pid)!.startTicks)
    const { stdout } = await call(workshop, 'prune', '--keep', '0')
    expect(stdout).toBe(`removed generation 2\nkept generation 1: in use by process ${process.pid}\n`)
    lease.release()
    expect((await call(workshop, 'prune', '--keep', '0')).stdout).toBe('removed generation 1\n')
  })

  test('a number that is not there is an error', async () => {
    await using workshop = new Workshop()
    await create(await workshop.open())
    for (const more of [[], ['--dry-run']]) {
      const { code, stderr } = await call(workshop, 'prune', '9', ...more)
      expect(code).toBe(1)
      expect(stderr).toContain('there is no generation 9 in')
    }
  })

  test('a corrupt generation is listed with the reason', async () => {
    await using workshop = new Workshop()
    const store = await workshop.open()
    await create(store)
    const second = await create(store)
    chmodSync(join(second.directory, PAGE_FILE), 0o600)
    appendFileSync(join(second.directory, PAGE_FILE), 'x')
    const { stdout } = await call(workshop, 'generations')
    expect(stdout).toMatch(/^ +2 +GENERATION_CORRUPT: its file memory-1\.warmfork-pages has \d+ bytes and had \d+$/m)
    const { code, stderr } = await call(workshop, 'inspect', '2')
    expect(code).toBe(1)
    expect(stderr).toContain('(GENERATION_CORRUPT)')
  })

  test.runIf(isRoot)('one that others can write to is refused', async () => {
    await using workshop = new Workshop()
    await create(await workshop.open())
    chmodSync(join(workshop.root, 'web'), 0o777)
    expect((await call(workshop, 'generations', '--name', 'web')).stderr).toContain('(STORE_UNSAFE)')
  })
})
