/** What a refork can meet: children that hang, full disks, supervisors that are killed in its middle, and many of its kind in a row. */
import { execFileSync } from 'node:child_process'
import { existsSync, mkdirSync, readdirSync, readFileSync } from 'node:fs'
import { Agent, get } from 'node:http'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { afterEach, describe, expect, test } from 'vitest'
import { Store } from '../src/generations/store.js'
import type { SupervisorOptions } from '../src/options.js'
import type { Supervisor } from '../src/supervisor.js'
import { APP, ask, eventually, PROGRAMS } from './engines-under-test.js'
import { leftovers, NOTHING, openDescriptors, tokensIn, untilNothingLeft, useCleanPlace } from './leftovers.js'
import { SupervisorProcess } from './supervisor-process.js'

const place = useCleanPlace()

interface Served {
  readonly supervisor: Supervisor
  readonly request: (path: string, agent?: Agent) => Promise<number>
  readonly log: string
}

async function serve(options: Partial<SupervisorOptions> = {}): Promise<Served> {
  const log = join(place.current.directory, 'log')
  let port = 0
  const supervisor = await place.current.start(
    {
      command: [process.execPath, join(PROGRAMS, 'refork-server.mjs'), log],
      ready: { output: 'serving' },
      template: { afterCheckpoint: 'end', restTimeoutMs: 3_000 },
      pool: { size: 0 },
      ...options,
    },
    {
      onCreate: (created) =>
        created.on('templateOutput', (_, chunk) => {
          port = Number(/serving on (\d+)/.exec(String(chunk))?.[1] ?? port)
        }),
    },
  )
  /** Gives the pid of the process that has answered. */
  const request = (path: string, agent: Agent | false = false) =>
    new Promise<number>((resolve, reject) => {
      get({ host: '127.0.0.1', port, path, agent }, (response) => {
        let body = ''
        response.on('data', (chunk) => {
          body += chunk
        })
        response.on('error', reject)
        response.on('end', () => resolve(JSON.parse(body).pid))
      }).on('error', reject)
    })
  return { supervisor, request: (path, agent) => request(path, agent ?? false), log }
}

test('of a child that holds its event loop up fails in time, and the child goes on', async () => {
  const { supervisor, request } = await serve({ hookTimeoutMs: 300 })
  const child = await supervisor.fork()
  const hanging = request('/hang?ms=4500')
  await sleep(100)
  const startedAt = performance.now()
  await expect(supervisor.refork()).rejects.toMatchObject({ code: 'AGENT_LOST' })
  // The grace time of an agent is two seconds.
  expect(performance.now() - startedAt).toBeLessThan(4_000)
  expect(await hanging).toBe(child.pid)
  expect(await request('/')).toBe(child.pid)
})

describe.skipIf(process.getuid?.() !== 0)('on a disk that is full', () => {
  const mounted: string[] = []
  afterEach(async () => {
    await place.current.stopAll()
    for (const path of mounted.splice(0)) execFileSync('umount', ['--lazy', path], { timeout: 10_000 })
  })

  test('fails and says so; the generation before serves on, and there is nothing of the new one', async () => {
    const store = join(place.current.directory, 'store')
    mkdirSync(store, { mode: 0o700 })
    execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=300m,mode=0700', 'none', store], { timeout: 10_000 })
    mounted.push(store)
    const { supervisor, request } = await serve({ name: 'disk' })
    const child = await supervisor.fork()
    for (let i = 0; i < 8; i++) await request('/grow')
    const used = Number(execFileSync('df', ['--output=used', '-k', store], { encoding: 'utf8' }).split('\n')[1])
    const resize = (kib: number) => execFileSync('mount', ['-o', `remount,size=${kib}k`, store], { timeout: 10_000 })
    resize(used + 6 * 1024)
    await expect(supervisor.refork()).rejects.toMatchObject({ code: 'DISK_FULL' })
    expect(readdirSync(join(store, 'disk', 'generations'))).toEqual(['1'])
    expect(await request('/')).toBe(child.pid)
    expect((await supervisor.fork()).generation).toBe(1)
    resize(300 * 1024)
    expect((await supervisor.refork({ from: child })).parent).toBe(1)
  })
})

test('again and again under load loses no request, and leaves disk, memory, descriptors and mounts as they are', async () => {
  const { supervisor, request, log } = await serve({
    workers: { count: 2, replaceAtOnce: 1 },
    keep: 1,
    pool: { size: 1 },
  })
  const agents = Array.from({ length: 4 }, () => new Agent({ keepAlive: true, maxSockets: 1 }))
  let isOver = false
  let asked = 0
  const lost: unknown[] = []
  const load = agents.map(async (agent) => {
    while (!isOver) {
      const id = asked++
      // A connection is closed with its worker: a request that was not begun may be asked for again, as any client does.
      await request(`/grow?id=r${id}`, agent).catch((error) => lost.push([id, error.code]))
      await sleep(5)
    }
  })
  const store = join(supervisor.store, supervisor.name)
  const kib = () => Number(execFileSync('du', ['-sk', store], { encoding: 'utf8' }).split('\t')[0])
  const mounts = () => readFileSync('/proc/self/mountinfo', 'utf8').split('\n').length
  const round = async () => {
    const { number } = await supervisor.refork()
    await eventually(() => supervisor.workers.outdated === 0, `workers are of generation ${number}`)
  }
  for (let i = 0; i < 3; i++) await round()
  // Pool and restorers ahead are filled again.
  await sleep(600)
  const before = {
    kib: kib(),
    mounts: mounts(),
    descriptors: openDescriptors().length,
    children: supervisor.children.length,
  }
  for (let i = 0; i < 9; i++) await round()
  await eventually(() => readdirSync(join(store, 'generations')).length <= 3, 'old generations are gone')
  isOver = true
  await Promise.all(load)
  for (const agent of agents) agent.destroy()
  await sleep(600)
  expect(supervisor.generation).toBe(13)
  expect(supervisor.children.length).toBe(before.children)
  expect(mounts()).toBe(before.mounts)
  expect(openDescriptors().length).toBeLessThanOrEqual(before.descriptors + 2)
  expect(kib()).toBeLessThan(before.kib * 2)
  const served = readFileSync(log, 'utf8')
    .split('\n')
    .flatMap((line) => /^request \d+ (r\d+)$/.exec(line)?.[1] ?? [])
  // None was served twice; of those that got no answer, each was cut off by the end of a worker that had its connection.
  expect(new Set(served).size).toBe(served.length)
  expect(served.length).toBeGreaterThanOrEqual(asked - lost.length)
  expect(lost.length).toBeLessThanOrEqual(asked / 20)
}, 120_000)

test('in a supervisor that is killed leaves a store that can be used, and nothing else', async () => {
  const supervisors: SupervisorProcess[] = []
  const tokens = new Set<string>()
  const note = () => {
    for (const token of tokensIn(place.current.runtimeDirectory)) tokens.add(token)
  }
  const start = async () => {
    const { env: _, ...options } = place.current.options({ name: 'kill', command: APP, cwd: place.current.directory })
    const supervisor = new SupervisorProcess(options, { env: { [place.current.mark]: '1' } })
    supervisors.push(supervisor)
    await supervisor.reached('running')
    note()
    return supervisor
  }
  const look = () =>
    leftovers(
      place.current,
      [...tokens],
      supervisors.map(({ pid }) => pid),
    )
  for (const ms of [5, 40, 70, 100, 140, 200, 300]) {
    const supervisor = await start()
    const child = await supervisor.fork()
    expect(await supervisor.ask(child, 'count')).toBe('1')
    const refork = supervisor.call('refork').catch(() => undefined)
    await sleep(ms)
    await supervisor.kill()
    await refork
    expect({ ...(await untilNothingLeft(() => ({ ...look(), drafts: [] }))), drafts: [] }).toEqual(NOTHING)
  }
  const next = await start()
  expect(look().drafts).toEqual([])
  await next.fork()
  expect(await next.call('refork')).toBeGreaterThan(1)
  await next.stop()
  await using store = await Store.open({ root: join(place.current.directory, 'store'), name: 'kill', access: 'read' })
  const { generations, broken } = await store.survey()
  expect(broken).toEqual([])
  for (const generation of generations) await generation.verify()
}, 120_000)

test('goes on beside forks that the program asks for itself, and other forks', async () => {
  const { supervisor, request } = await serve()
  const child = await supervisor.fork()
  const results = await Promise.all([
    supervisor.refork(),
    ...Array.from({ length: 6 }, () => supervisor.fork()),
    supervisor.rollback().catch((error) => error.code),
    supervisor.pin(1).catch((error) => error.code),
  ])
  expect(results[0]).toMatchObject({ number: 2 })
  expect(supervisor.children.length).toBe(7)
  expect(supervisor.generation).toBe(1)
  expect(existsSync(join(supervisor.store, supervisor.name, 'generations', '1'))).toBe(true)
  expect(supervisor.children.map(({ pid }) => pid)).toContain(await request('/'))
  expect(child.state).toBe('running')
  const app = await place.current.start({ name: 'app' })
  const one = await app.fork()
  const [, answer] = await Promise.all([app.refork(), ask(one, 'count')])
  expect(answer).toBe('1')
})
