/** What the Python agent does about requests, in the servers of the standard library. */
import { existsSync } from 'node:fs'
import http from 'node:http'
import { setTimeout as sleep } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { afterEach, describe, expect, test } from 'vitest'
import { reforkUnderLoad, Serving, stream } from './agents-requests.js'
import { ENGINES, usePlace } from './engines-under-test.js'
import { PYTHON_AGENT, pythons } from './fixtures/agents-conformance/python.js'

const PROGRAM = fileURLToPath(new URL('fixtures/agents-python/serving.py', import.meta.url))
const [[, python]] = pythons() as [[string, string]]
/** A directory with packages from PyPI: `pip install --target`. */
const packages = process.env.WARMFORK_TEST_PYTHON_PACKAGES
const found = (name: string) => packages !== undefined && existsSync(`${packages}/${name}`)
const BROUGHT = [
  ...['werkzeug', 'waitress', 'uvicorn'].filter(found),
  ...(found('gunicorn') ? ['gunicorn sync', 'gunicorn gthread'] : []),
  ...(found('gunicorn') && found('gevent') ? ['gunicorn gevent'] : []),
]
const start = (kind: string, interpreter = python) =>
  Serving.start(
    { command: [interpreter, PROGRAM, kind], forks: kind.startsWith('gunicorn') },
    { env: { PYTHONPATH: packages ? `${PYTHON_AGENT}:${packages}` : PYTHON_AGENT } },
  )

describe('the Python agent, of requests', () => {
  let serving: Serving
  afterEach(() => serving.program.end())

  test.each(['http', 'wsgi', 'wsgi counted', 'one thread', 'blocks', ...BROUGHT])(
    'counts each request of %s once, at most ten times a second, and is silent afterwards',
    async (kind) => {
      serving = await start(kind)
      expect(serving.agent.hello.counts).toBe(true)
      const since = Date.now()
      for (let round = 0; round < 3; round++) {
        await Promise.all(Array.from({ length: 40 }, (_, i) => serving.get(`/now?ms=${i % 2}`)))
        await sleep(60)
      }
      const counts = await serving.counted()
      expect(counts.at(-1)?.total).toBe(120)
      expect(counts.at(-1)!.ms).toBeGreaterThan(60)
      expect(counts.length).toBeLessThanOrEqual((Date.now() - since) / 100 + 1)
      expect(await serving.agent.silence(200)).toEqual([])
    },
  )

  test.each(['http', 'wsgi', 'blocks', ...BROUGHT.filter((name) => name !== 'gunicorn sync')])(
    'waits in %s for what is in hand, holds back what comes, and lets it go in the source',
    async (kind) => {
      serving = await start(kind)
      const slow = serving.get('/wait?id=slow')
      await sleep(200)
      serving.checkpoint()
      await sleep(100)
      const held = [serving.get('/now?id=held'), serving.get('/now?id=held')]
      await sleep(200)
      expect(serving.words()).toEqual([])
      serving.letGo()
      expect(await serving.hear('parked')).toMatchObject({ held: 2 })
      await slow
      expect(serving.words()).toEqual(['slow', 'hook'])
      serving.resume()
      await serving.hear('running')
      await Promise.all(held)
      expect(serving.words()).toEqual(['slow', 'hook', 'held', 'held'])
      expect((await serving.counted()).at(-1)?.total).toBe(3)
    },
  )

  test.each(['http', 'wsgi', 'one thread', 'blocks', ...BROUGHT])(
    'drops in a fork of %s what was held back, which counts from 0',
    async (kind) => {
      serving = await start(kind)
      await serving.get('/now')
      // The one thread is at it.
      const slow = kind === 'one thread' || kind === 'gunicorn sync' ? undefined : serving.get('/wait')
      await sleep(200)
      serving.checkpoint()
      await sleep(50)
      const held = serving.get('/now?id=held').catch(() => 'closed')
      await sleep(150)
      serving.letGo()
      await slow
      await serving.hear('parked')
      serving.become()
      await serving.hear('running')
      if (slow) expect(await held).not.toMatch(/^\d+$/)
      await serving.get('/now?id=after')
      const words = serving.words().filter((word) => word !== 'held')
      expect(words).toEqual(['hook', 'after'])
      if (slow) expect(serving.words()).toEqual(words)
      const counts = (await serving.counted()).at(-1)
      expect(counts?.total).toBe(serving.words().length - 1)
    },
  )

  test('refuses where one never ends, and serves the others meanwhile', async () => {
    serving = await start('http')
    const slow = serving.get('/wait')
    await sleep(200)
    serving.checkpoint('refork', 1_200)
    const since = Date.now()
    await serving.get('/now')
    expect(Date.now() - since).toBeLessThan(600)
    const { error } = await serving.hear('refused')
    expect(error.code).toBe('BUSY')
    expect(error.message).toMatch(/^1 request is in hand, for 1\d{3} ms: GET \/wait$/)
    expect(error).not.toHaveProperty('hook')
    expect(serving.words()).toEqual([])
    serving.letGo()
    await slow
    serving.checkpoint()
    expect(await serving.hear('parked')).not.toHaveProperty('held')
    serving.resume()
    await serving.hear('running')
  })

  test.each([
    'http',
    'wsgi',
    'wsgi counted',
    ...BROUGHT.filter((name) => ['werkzeug', 'gunicorn gthread'].includes(name)),
  ])('waits in %s for no event stream, and does not count it', async (kind) => {
    serving = await start(kind)
    const end = await stream(serving.port, '/stream')
    serving.checkpoint('refork', 1_000)
    await serving.hear('parked')
    serving.resume()
    await serving.hear('running')
    end()
    expect(await serving.counted()).toEqual([])
  })

  test('holds nothing back and waits for nothing where the program forks from a request', async () => {
    serving = await start('http')
    const asked = serving.get('/fork')
    const { id } = await serving.hear('fork')
    serving.checkpoint('fork', 1_000)
    await serving.hear('parked')
    serving.resume()
    await serving.hear('running')
    serving.agent.send({ type: 'forkResult', id, pid: 4711, generation: 2 })
    expect(await asked).toBe('4711')
  })

  test('refuses every refork of a program that is no longer fork-safe, before hooks', async () => {
    serving = await start('http')
    serving.agent.send({ type: 'message', data: { json: 'unsafe' } })
    expect(await serving.hear('unsafe')).toEqual({ type: 'unsafe', reason: 'it holds a lease' })
    for (let i = 0; i < 2; i++) {
      serving.checkpoint()
      const { error } = await serving.hear('refused')
      expect(error).toMatchObject({ code: 'UNSAFE', message: expect.stringContaining('it holds a lease') })
    }
    expect(serving.words()).toEqual([])
    serving.checkpoint('fork')
    await serving.hear('parked')
    serving.become()
    await serving.hear('running')
    // A copy is no safer.
    serving.checkpoint()
    expect((await serving.hear('refused')).error.code).toBe('UNSAFE')
  })

  test('keeps idle connections for the source', async () => {
    serving = await start('http')
    const agent = new http.Agent({ keepAlive: true, maxSockets: 1 })
    await serving.get('/now', agent)
    serving.checkpoint()
    await serving.hear('parked')
    serving.resume()
    await serving.hear('running')
    await serving.get('/now', agent)
    agent.destroy()
    expect((await serving.counted()).at(-1)?.total).toBe(2)
  })
})

describe.skipIf(!ENGINES.includes('criu'))('a Python child that is reforked under load', () => {
  const place = usePlace('criu')
  test.each(['http', 'wsgi', ...BROUGHT])('loses nothing, and nothing of it runs in a fork: %s', async (kind) => {
    const env = packages ? { PYTHONPATH: packages } : {}
    await reforkUnderLoad(place.current, { command: [python, PROGRAM, kind], env, forks: kind.startsWith('gunicorn') })
  })
})
