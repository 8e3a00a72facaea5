/** `warmfork refork`, `rollback`, `pin` and `unpin`, and what `run`, `ps` and `generations` tell of reforks. */
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { type Running, Terminal } from './cli-harness.js'
import { eventually, PROGRAMS } from './engines-under-test.js'

/** Subcommands that look into the store. */
const STORED = new Set(['generations', 'rollback', 'pin', 'unpin'])

describe('reforks on the command line', () => {
  const terminal = new Terminal()
  const call = (...args: string[]) =>
    terminal.call([...args, ...terminal.here, ...(STORED.has(args[0]!) ? ['--store', terminal.store] : [])])
  const json = async (...args: string[]) => JSON.parse((await call(...args, '--json')).stdout)
  const state = async () => (await json('ps')).supervisors[0]
  let supervisor: Running
  let stdout = ''
  let stderr = ''

  beforeAll(async () => {
    const command = [process.execPath, join(PROGRAMS, 'refork-server.mjs'), join(terminal.directory, 'log')]
    const flags = [
      '--engine',
      'criu',
      '--workers',
      '2',
      '--keep',
      '3',
      '--refork',
      '1000000',
      '--ready-output',
      'serving',
    ]
    supervisor = await terminal.run('shop', [...flags, '--after-checkpoint', 'end', '--reuse'], command)
    supervisor.stdout.on('data', (chunk) => {
      stdout += chunk
    })
    supervisor.stderr.on('data', (chunk) => {
      stderr += chunk
    })
  })
  afterAll(() => terminal.leave())

  test('refork makes the next generation of a child, and tells how long it stood still', async () => {
    const { workers } = await state()
    expect(workers).toMatchObject({ size: 2, outdated: 0 })
    const made = await json('refork', '--from', String(workers.pids[1]), '--reason', 'it is "warm"')
    expect(made).toMatchObject({
      name: 'shop',
      pid: workers.pids[1],
      standstillMs: expect.any(Number),
      inUse: true,
      generation: { number: 2, parent: 1, reforks: 1, reason: 'it is "warm"' },
    })
    expect(made.writtenBytes).toBeGreaterThan(100_000)
    expect(made.writtenBytes).toBeLessThan(made.generation.sizeBytes)
    const said = await call('refork')
    expect(said.stdout).toMatch(
      /^generation 3 of shop was taken of child \d+, which stood still for \S+, and is in use \([\d.]+ MiB written\)$/m,
    )
    expect((await call('refork', '--from', '1')).stderr).toMatch(/CHILD_GONE/)
    expect((await call('refork', '--from', 'x')).code).toBe(2)
  })

  test('generations and ps tell where they come from, what is theirs alone, and who is outdated', async () => {
    const { generations } = await json('generations')
    expect(generations.map(({ number, parent, reason }: Record<string, unknown>) => [number, parent, reason])).toEqual([
      [1, null, undefined],
      [2, 1, 'it is "warm"'],
      [3, 2, 'asked for'],
    ])
    expect(generations[2].ownBytes).toBeLessThan(generations[2].sizeBytes)
    expect(generations[2]).not.toHaveProperty('untried')
    expect((await call('generations')).stdout).toMatch(/ 2 .* it is "warm"$/m)
    const { stdout } = await call('ps')
    expect(stdout).toMatch(/2 of 2 workers; .*last refork \S+ ago \(generation 3 of child \d+: asked for\)/)
    expect(stdout).toMatch(/no refork now: /)
    expect(stdout).toMatch(/^ *\d+ +worker.* +\d+ +0 +\S+/m)
    const { children, lastRefork } = await state()
    expect(lastRefork).toMatchObject({ reason: 'asked for', generation: 3, error: null })
    const roles: string[] = children.map(({ role }: { role: string }) => role)
    expect(roles.filter((role) => role === 'worker')).toHaveLength(2)
    expect(roles).toContain('parked')
  })

  test('rollback and pin change what forks come from, and say why they cannot', async () => {
    expect((await call('rollback', '--to', '2', '--reason', 'slow')).stdout).toBe(
      'shop is at generation 2 again; generation 3 is not chosen any more\n',
    )
    expect(await state()).toMatchObject({ generation: 2 })
    expect(await json('pin', '1')).toEqual({ name: 'shop', pinned: 1 })
    expect(await state()).toMatchObject({ generation: 1, pinned: 1 })
    expect((await call('generations')).stdout).toMatch(/ 1 .* current, pinned/)
    expect((await call('pin', '3')).stderr).toMatch(/rejected: slow/)
    expect((await call('pin', '77')).stderr).toMatch(/GENERATION_NOT_FOUND/)
    expect((await call('unpin')).stdout).toBe('shop goes with the newest generation\n')
    expect(await state()).toMatchObject({ generation: 2, pinned: null })
  })

  test('signals refork, and change how many workers there are; what workers write comes out in lines', async () => {
    process.kill(supervisor.pid, 'SIGTTIN')
    await eventually(() => /^warmfork: 3 workers$/m.test(stderr), 'there is one more')
    process.kill(supervisor.pid, 'SIGTTOU')
    await eventually(() => /^warmfork: 2 workers$/m.test(stderr), 'there is one fewer')
    const { generation } = await state()
    process.kill(supervisor.pid, 'SIGUSR2')
    await eventually(() => /^warmfork: generation \d+ is in use$/m.test(stderr), 'it has reforked')
    expect((await state()).generation).toBeGreaterThan(generation)
    expect(stdout).toBe('')
  })

  test('without a supervisor, rollback and pin are for the next start', async () => {
    await call('stop')
    await supervisor.ended
    const before = (await json('generations')).generations.filter((one: { rejected?: string }) => !one.rejected)
    const newest = before.at(-1).number
    const { generation, from } = await json('rollback', '--name', 'shop')
    expect([generation, from]).toEqual([before.at(-2).number, newest])
    expect((await call('rollback', '--name', 'shop', '--to', String(newest))).stderr).toMatch(/GENERATION_NOT_FOUND/)
    expect((await call('pin', String(newest), '--name', 'shop')).stderr).toMatch(/GENERATION_MISFIT/)
    expect((await call('pin', '1', '--name', 'shop')).code).toBe(0)
    expect((await json('generations')).generations[0].pinned).toBe(true)
    expect((await call('unpin', '--name', 'shop')).code).toBe(0)
    expect((await call('pin', '1', '--name', 'nobody')).stderr).toMatch(/no store of nobody/)
    expect((await call('refork')).stderr).toMatch(/NO_SUPERVISOR/)
  })
})

describe('where forks are cold starts', () => {
  const terminal = new Terminal()
  afterAll(() => terminal.leave())
  const start = async (name: string, ...flags: string[]) => {
    const supervisor = await terminal.run(name, ['--engine', 'spawn', '--pool-size', '0', ...flags])
    const written = { stdout: '', stderr: '' }
    supervisor.stdout.on('data', (chunk) => {
      written.stdout += chunk
    })
    supervisor.stderr.on('data', (chunk) => {
      written.stderr += chunk
    })
    return { pid: supervisor.pid, written }
  }

  test('refork and SIGUSR2 say so, ps counts nothing, and workers write lines after their pids', async () => {
    const { pid, written } = await start('cold', '--workers', '2', '--no-agent')
    const called = await terminal.call(['refork', '--name', 'cold', '--json', ...terminal.here])
    expect([called.code, JSON.parse(called.stderr).code]).toEqual([1, 'ENGINE_UNSUPPORTED'])
    process.kill(pid, 'SIGUSR2')
    await eventually(() => written.stderr.includes('warmfork: SIGUSR2: ENGINE_UNSUPPORTED'), 'it says why not')
    const { stdout } = await terminal.call(['ps', '--name', 'cold', ...terminal.here])
    const workers = [...stdout.matchAll(/^ *(\d+) +worker +1 +- /gm)].map((match) => match[1])
    expect(workers).toHaveLength(2)
    process.kill(Number(workers[0]), 'SIGUSR2')
    await eventually(() => written.stdout.includes(`[${workers[0]}] got SIGUSR2\n`), 'the worker has said it')
  })

  test('SIGTTIN says that no workers are kept', async () => {
    const { pid, written } = await start('none')
    process.kill(pid, 'SIGTTIN')
    await eventually(() => written.stderr.includes('none are kept (`--workers`)'), 'it says why not')
  })
})

test('flags that make no sense are refused before anything starts', async () => {
  const terminal = new Terminal()
  for (const [flags, words] of [
    [['--refork', 'often'], /auto.*off.*50,100,1000/],
    [['--refork', 'auto', '--refork-unit', 'forks'], /--refork-unit/],
    [['--workers', 'many'], /whole number/],
  ] as const) {
    const { code, stderr } = await terminal.call(['run', ...terminal.here, ...flags, '--', 'true'])
    expect(code).not.toBe(0)
    expect(stderr).toMatch(words)
  }
  await terminal.leave()
})
