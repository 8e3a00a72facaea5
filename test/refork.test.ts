/** Reforks from end to end: real children, real connections, and what is served by whom is counted. */
import { existsSync, readFileSync } from 'node:fs'
import { Agent, request } from 'node:http'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { stripVTControlCharacters } from 'node:util'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import type { Child } from '../src/child.js'
import { isAlive } from '../src/linux/proc.js'
import type { SupervisorOptions } from '../src/options.js'
import type { Supervisor } from '../src/supervisor.js'
import { ask, eventually, PROGRAMS } from './engines-under-test.js'
import { useCleanPlace } from './leftovers.js'

const place = useCleanPlace()

describe('a refork of a child', () => {
  test('begins later forks where the child is, and the child goes on', async () => {
    const supervisor = await place.current.start()
    const child = await supervisor.fork()
    for (let i = 0; i < 3; i++) await ask(child, 'count')
    const generation = await supervisor.refork({ reason: 'it has counted' })
    expect(generation).toMatchObject({ number: 2, parent: 1, reforks: 1, reason: 'it has counted' })
    expect(supervisor.generation).toBe(2)
    const next = await supervisor.fork()
    expect(next.generation).toBe(2)
    expect([await ask(next, 'count'), await ask(child, 'count')]).toEqual(['4', '4'])
    expect(await ask(next, 'pid')).toBe(String(next.pid))
  })

  test('takes the one with the most requests, or the one that is given', async () => {
    const supervisor = await place.current.start()
    const children = [await supervisor.fork(), await supervisor.fork(), await supervisor.fork()] as const
    await ask(children[1], 'count')
    children[0].countRequests(2)
    children[1].countRequests(30, 600)
    expect([children[1].requests, children[1].requestMs]).toEqual([30, 600])
    await supervisor.refork()
    expect(await ask(await supervisor.fork(), 'count')).toBe('2')
    await supervisor.refork({ from: children[0] })
    expect(await ask(await supervisor.fork(), 'count')).toBe('1')
  })

  test('has nothing to take where none runs, and refuses one that does not', async () => {
    const supervisor = await place.current.start()
    await expect(supervisor.refork()).rejects.toMatchObject({ code: 'REFORK_REFUSED' })
    const child = await supervisor.fork()
    await child.end({ graceMs: 0 })
    await expect(supervisor.refork({ from: child })).rejects.toMatchObject({ code: 'REFORK_REFUSED' })
    expect(() => child.countRequests(-1)).toThrow(expect.objectContaining({ code: 'BAD_OPTION' }))
    expect(supervisor.generation).toBe(1)
  })

  test('asked for twice at once is made once; of two children one after the other', async () => {
    const supervisor = await place.current.start()
    const [one, other] = [await supervisor.fork(), await supervisor.fork()]
    const [first, second] = await Promise.all([supervisor.refork({ from: one }), supervisor.refork()])
    expect(second).toBe(first)
    const numbers = await Promise.all([supervisor.refork({ from: one }), supervisor.refork({ from: other })])
    expect(numbers.map(({ number, parent }) => [number, parent])).toEqual([
      [3, 1],
      [4, 1],
    ])
    expect(supervisor.generation).toBe(4)
  })

  test('goes on generation by generation, and what nobody needs is removed', async () => {
    const supervisor = await place.current.start({ keep: 1, pool: { size: 1 } })
    let child = await supervisor.fork()
    for (let number = 2; number <= 5; number++) {
      await ask(child, 'count')
      expect((await supervisor.refork({ from: child })).reforks).toBe(number - 1)
      await child.end({ graceMs: 0 })
      child = await supervisor.fork()
    }
    expect(await ask(child, 'count')).toBe('5')
    const there = (number: number) => existsSync(join(supervisor.store, supervisor.name, 'generations', String(number)))
    await eventually(() => !there(3), 'generation 3 is removed')
    expect([1, 2, 3, 4, 5].filter(there)).toEqual([4, 5])
  })

  test('serves on with the generation before where the supervisor pins it', async () => {
    const supervisor = await place.current.start()
    const child = await supervisor.fork()
    await supervisor.refork()
    await supervisor.pin(1)
    expect([supervisor.generation, supervisor.pinned]).toEqual([1, 1])
    expect((await supervisor.fork()).generation).toBe(1)
    await supervisor.refork({ from: child })
    expect(supervisor.generation).toBe(1)
    await supervisor.unpin()
    expect([supervisor.generation, supervisor.pinned]).toEqual([3, undefined])
    await expect(supervisor.pin(99)).rejects.toMatchObject({ code: 'GENERATION_NOT_FOUND' })
  })

  test('is taken back by a rollback, for good', async () => {
    const supervisor = await place.current.start()
    await supervisor.fork()
    await supervisor.refork()
    const told: unknown[] = []
    supervisor.on('rollback', (...about) => told.push(about))
    expect((await supervisor.rollback({ reason: 'it is slow' })).number).toBe(1)
    expect(told).toEqual([[1, 2, 'it is slow']])
    expect((await supervisor.fork()).generation).toBe(1)
    expect(supervisor.whyRejected(2)).toBe('it is slow')
    await expect(supervisor.rollback({ to: 2 })).rejects.toMatchObject({ code: expect.stringMatching(/GENERATION_/) })
    await expect(supervisor.pin(2)).rejects.toMatchObject({ code: expect.stringMatching(/GENERATION_/) })
    await expect(supervisor.rollback()).rejects.toMatchObject({ code: 'GENERATION_NOT_FOUND' })
  })

  test('is refused where forks are cold starts', async () => {
    const supervisor = await place.current.start({ engine: 'spawn' })
    await supervisor.fork()
    await expect(supervisor.refork()).rejects.toMatchObject({ code: 'ENGINE_UNSUPPORTED' })
  })

  test('of a child on a terminal gives forks terminals of their own', async () => {
    const supervisor = await place.current.start({ template: { tty: true }, pool: { size: 0 } })
    const child = await supervisor.fork()
    const typed = async (to: Child, line: string, wanted: string) => {
      let shown = ''
      to.terminal.on('data', (chunk: Buffer) => {
        shown += chunk
      })
      to.terminal.write(`${line}\n`)
      await eventually(() => stripVTControlCharacters(shown).includes(wanted), `${JSON.stringify(wanted)} is shown`)
      to.terminal.removeAllListeners('data')
    }
    await typed(child, 'count', '\n1\r')
    await supervisor.refork()
    const next = await supervisor.fork()
    await typed(next, 'count', '\n2\r')
    await typed(child, 'count', '\n2\r')
    await typed(next, 'pid', String(next.pid))
  })
})

describe('a refork of a server', () => {
  let log = ''
  let port = 0
  const agents: Agent[] = []

  beforeEach(() => {
    log = join(place.current.directory, 'log')
  })
  afterEach(() => {
    for (const agent of agents.splice(0)) agent.destroy()
  })

  /** A client with connections of its own. */
  const client = () => {
    const agent = new Agent({ keepAlive: true, maxSockets: 1 })
    agents.push(agent)
    return (path: string) =>
      new Promise<{ pid: number; served: number; note: string; status: number }>((resolve, reject) => {
        const sent = request({ host: '127.0.0.1', port, path, agent }, (response) => {
          let body = ''
          response.on('data', (chunk) => {
            body += chunk
          })
          response.on('error', reject)
          response.on('end', () => resolve({ ...JSON.parse(body), status: response.statusCode }))
        })
        sent.on('error', reject)
        sent.end()
      })
  }

  const serve = async (options: Partial<SupervisorOptions> = {}): Promise<Supervisor> =>
    place.current.start(
      {
        command: [process.execPath, join(PROGRAMS, 'refork-server.mjs'), log],
        ready: { output: 'serving' },
        // The template would take connections too.
        template: { afterCheckpoint: 'end', restTimeoutMs: 400 },
        hookTimeoutMs: 1_000,
        pool: { size: 0 },
        ...options,
      },
      {
        onCreate: (supervisor) =>
          supervisor.on('templateOutput', (_, chunk) => {
            port = Number(/serving on (\d+)/.exec(String(chunk))?.[1] ?? port)
          }),
      },
    )

  const lines = (what: string) =>
    readFileSync(log, 'utf8')
      .split('\n')
      .filter((line) => line.startsWith(`${what} `))

  test('counts its requests, and answers on the connections that it has', async () => {
    const supervisor = await serve()
    const child = await supervisor.fork()
    const get = client()
    for (let i = 0; i < 20; i++) expect((await get('/')).pid).toBe(child.pid)
    await eventually(() => child.requests === 20, 'the requests are counted')
    expect(child.requestMs).toBeGreaterThan(0)
    const slow = client()('/slow?ms=300&id=slow')
    await eventually(() => lines('request').some((line) => line.endsWith(' slow')), 'a request has begun')
    const generation = supervisor.refork()
    const meanwhile = Promise.all(Array.from({ length: 5 }, (_, i) => client()(`/?id=held${i}`)))
    expect(await slow).toMatchObject({ pid: child.pid, status: 200 })
    expect((await meanwhile).map(({ pid }) => pid)).toEqual(Array(5).fill(child.pid))
    expect((await generation).number).toBe(2)
    expect((await get('/')).pid).toBe(child.pid)
    await child.end()
    const next = await supervisor.fork()
    expect(next.requests).toBe(0)
    expect(await client()('/')).toMatchObject({ pid: next.pid, served: expect.toSatisfy((n: number) => n > 20) })
    // What was in hand or held back at the checkpoint was served once, and by no copy.
    const ids = lines('request').map((line) => line.split(' ')[2])
    for (const id of ['slow', 'held0', 'held4']) expect(ids.filter((one) => one === id)).toEqual([id])
  })

  test('is tried on a socket of its own, by the check that the template passed', async () => {
    const probe = await serve()
    const taken = port
    await probe.stop()
    const supervisor = await serve({
      command: [process.execPath, join(PROGRAMS, 'refork-server.mjs'), log, String(taken)],
      ready: { http: `http://127.0.0.1:${taken}/?id=check` },
    })
    port = taken
    const child = await supervisor.fork()
    const get = client()
    let isOver = false
    const load = (async () => {
      for (let i = 0; !isOver; i++) expect((await get(`/?id=load${i}`)).pid).toBe(child.pid)
    })()
    await supervisor.refork()
    isOver = true
    await load
    const checks = lines('request').filter((line) => line.endsWith(' check'))
    const last = checks.at(-1)!.split(' ')[1]
    // The last check came to a process that has served nothing else.
    expect(last).not.toBe(String(child.pid))
    expect(lines('request').filter((line) => line.split(' ')[1] === last)).toEqual([checks.at(-1)])
  })

  test.each([
    ['crashes', 'crash', /SIGABRT/],
    ['exits', 'exit', /status 3/],
    ['hangs in its hook', 'hang', /hook/i],
    ['fails in its hook', 'throw', /this fork is not to be/],
  ])('is discarded with the reason where a fork %s, and the old generation serves on', async (_, what, reason) => {
    const supervisor = await serve()
    const child = await supervisor.fork()
    const get = client()
    await get(`/state?fork=${what}`)
    const failures: Error[] = []
    supervisor.on('reforkFailed', (error) => failures.push(error))
    await expect(supervisor.refork()).rejects.toMatchObject({
      code: 'TRIAL_FAILED',
      happened: expect.stringMatching(reason),
    })
    expect(failures.length).toBe(1)
    expect(supervisor.generation).toBe(1)
    expect(existsSync(join(supervisor.store, supervisor.name, 'generations', '2'))).toBe(false)
    expect((await get('/')).pid).toBe(child.pid)
    // It can be had once its cause is gone.
    await get('/state?fork=&note=well')
    expect((await supervisor.refork()).number).toBe(3)
    await child.end()
    await supervisor.fork()
    expect((await client()('/')).note).toBe('well')
  })

  test('is discarded where a check of the embedder finds it to answer wrongly', async () => {
    const supervisor = await serve({
      trial: {
        timeoutMs: 2_000,
        check: async (_, { ports }) => {
          const answer = await fetch(`http://127.0.0.1:${ports.get(port)}/`)
          if (!answer.ok) throw new Error(`it answers ${answer.status}`)
        },
      },
    })
    const child = await supervisor.fork()
    const get = client()
    await get('/state?status=500')
    await expect(supervisor.refork()).rejects.toMatchObject({
      code: 'TRIAL_FAILED',
      message: expect.stringContaining('it answers 500'),
    })
    await get('/state?status=200')
    expect((await supervisor.refork({ from: child })).number).toBe(3)
  })

  test.each([true, false])('waits for rest no longer than it may, and the child goes on (agent: %s)', async (agent) => {
    const supervisor = await serve({ agent })
    const child = await supervisor.fork()
    const never = client()('/never').then(
      () => 'answered',
      () => 'closed',
    )
    await eventually(() => lines('request').length > 0, 'it has begun')
    await expect(supervisor.refork()).rejects.toMatchObject({ code: 'NOT_AT_REST' })
    expect((await client()('/?id=after')).status).toBe(200)
    expect(isAlive(child.pid)).toBe(true)
    await child.end({ graceMs: 0 })
    expect(await never).toBe('closed')
  })

  test('works without an agent too, between requests', async () => {
    const supervisor = await serve({ agent: false, template: { afterCheckpoint: 'end', restTimeoutMs: 5_000 } })
    const child = await supervisor.fork()
    const get = client()
    await get('/state?note=warm')
    let isOver = false
    let asked = 0
    const load = (async () => {
      for (; !isOver; asked++) {
        await get(`/?id=load${asked}`)
        await sleep(8)
      }
    })()
    expect((await supervisor.refork()).number).toBe(2)
    isOver = true
    await load
    await child.end()
    await supervisor.fork()
    expect((await client()('/')).note).toBe('warm')
    const ids = lines('request').flatMap((line) => line.split(' ')[2]!.match(/^load\d+$/) ?? [])
    expect(ids.length).toBe(asked)
    expect(new Set(ids).size).toBe(asked)
  })

  test('is refused for good by a program that says so, and by its copies', async () => {
    const supervisor = await serve()
    const child = await supervisor.fork()
    await client()('/unsafe')
    await eventually(() => child.refuses !== undefined, 'it is heard')
    expect(child.refuses).toBe('it has begun something')
    await expect(supervisor.refork()).rejects.toMatchObject({ code: 'REFORK_REFUSED' })
    await expect(supervisor.refork({ from: child })).rejects.toMatchObject({ code: 'REFORK_REFUSED' })
  })

  test('has all workers replaced, a few at a time, each when it has answered', async () => {
    const supervisor = await serve({ workers: { count: 3, replaceAtOnce: 1 }, pool: { size: 1 } })
    const before = supervisor.workers.workers
    expect(before.length).toBe(3)
    let fewest = 3
    const watch = setInterval(() => {
      fewest = Math.min(fewest, before.filter(({ pid }) => isAlive(pid)).length + newer().length)
    }, 2)
    const newer = () => supervisor.workers.workers.filter(({ generation }) => generation === 2)
    const slow = Array.from({ length: 6 }, (_, i) => client()(`/slow?ms=700&id=slow${i}`))
    await eventually(() => lines('request').length === 6, 'requests are in hand')
    const rolledOut = new Promise((resolve) => supervisor.once('rolledOut', resolve))
    const idle = before.find(({ pid }) => !lines('request').some((line) => line.split(' ')[1] === String(pid)))
    await supervisor.refork(idle ? { from: idle } : {})
    expect((await Promise.all(slow)).every(({ status }) => status === 200)).toBe(true)
    expect(await rolledOut).toBe(3)
    clearInterval(watch)
    expect(fewest).toBe(3)
    expect(supervisor.workers).toMatchObject({ size: 3, outdated: 0 })
    expect(newer().length).toBe(3)
    await eventually(() => before.every(({ pid }) => !isAlive(pid)), 'the old ones are gone')
    // One that dies is replaced, and one too many ends.
    process.kill(newer()[0]!.pid, 'SIGKILL')
    await eventually(() => supervisor.workers.workers.length === 3, 'it is replaced')
    supervisor.resizeWorkers(1)
    await eventually(() => supervisor.children.length === 1, 'two have ended')
  })

  test('is rolled back by itself where its first children crash, and is never chosen again', async () => {
    const supervisor = await serve({ workers: 1, canary: { children: 3, crashes: 0 }, trial: { settleMs: 50 } })
    await client()('/state?fork=crash:400')
    const rolledBack = new Promise((resolve) => supervisor.once('rollback', (...about) => resolve(about)))
    await supervisor.refork()
    expect(supervisor.generation).toBe(2)
    expect(await rolledBack).toEqual([1, 2, expect.stringMatching(/1 of its first \d children crashed/)])
    await eventually(() => supervisor.workers.outdated === 0 && supervisor.workers.workers.length === 1, 'it serves')
    expect(supervisor.workers.workers[0]!.generation).toBe(1)
    expect(supervisor.whyRejected(2)).toMatch(/crashed/)
    expect((await client()('/')).status).toBe(200)
  })

  test('is made by itself at its thresholds, with the reason, and not while a generation is pinned', async () => {
    const supervisor = await serve({ workers: 1, refork: { after: [20, 30], jitter: 0, repeatLast: false } })
    const decisions: string[] = []
    supervisor.on('reforkDecision', ({ from, why }) => decisions.push(`${from} ${why}`))
    const busy = async (generation: number, requests: number) => {
      const get = client()
      const worker = () => supervisor.workers.workers.find((one) => one.generation === generation)
      await eventually(() => worker() !== undefined && supervisor.workers.outdated === 0, 'it serves')
      // One that is being replaced may answer a few yet.
      for (let served = 0; served < requests; ) {
        const { pid } = await get('/').catch(() => ({ pid: 0 }))
        if (pid === worker()!.pid) served++
      }
      return worker()!
    }
    const first = await busy(1, 20)
    await eventually(() => supervisor.generation === 2, 'the first refork is made')
    expect(supervisor.generations().at(-1)!.reason).toBe(
      `child ${first.pid} has answered 20 requests, where 20 are its threshold`,
    )
    expect(decisions).toContain(`${first.pid} ${supervisor.generations().at(-1)!.reason}`)
    await supervisor.pin(2)
    await busy(2, 31)
    await sleep(600)
    expect(supervisor.generation).toBe(2)
    await supervisor.unpin()
    await eventually(() => supervisor.generation === 3, 'the second refork is made')
    await busy(3, 31)
    await eventually(() => /as many as there are thresholds/.test(decisions.at(-1)!), 'there are no more')
    expect((await supervisor.stats()).reforkDecision!.from).toBeUndefined()
  })

  test('ends with the supervisor in its middle, and with its child', async () => {
    const supervisor = await serve()
    const child = await supervisor.fork()
    const dying = supervisor.refork()
    await sleep(15)
    process.kill(child.pid, 'SIGKILL')
    await expect(dying).rejects.toMatchObject({ code: expect.stringMatching(/CHILD_GONE|CHECKPOINT_FAILED/) })
    await supervisor.fork()
    const both = Promise.allSettled([supervisor.refork(), supervisor.refork({ from: supervisor.children[0]! })])
    await sleep(40)
    await supervisor.stop()
    for (const one of await both) expect(one).toMatchObject({ status: 'rejected', reason: { code: 'STOPPED' } })
    await expect(supervisor.refork()).rejects.toMatchObject({ code: 'STOPPED' })
  })
})
