/** What the Node agent does about HTTP requests: against a socket of the test, with clients that speak to a real server. */
import { existsSync } from 'node:fs'
import http from 'node:http'
import http2 from 'node:http2'
import https from 'node:https'
import { connect, type Socket } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { afterEach, describe, expect, test } from 'vitest'
import type { FromAgent } from '../src/agents/protocol.js'
import { type AgentSide, Conformer, type ProgramEvent } from './agents-conformance.js'
import { NODES } from './runtimes/nodes.js'

const path = (relative: string) => fileURLToPath(new URL(relative, import.meta.url))
const AGENT = path('../dist/agents/node/agent.cjs')

const HOST = '127.0.0.1'

type Said<T extends FromAgent['type']> = Extract<FromAgent, { type: T }>

/** A program that serves, with its agent. */
class Serving {
  readonly counts: Said<'requests'>[] = []
  readonly #sockets: Socket[] = []
  #id = 0

  private constructor(
    readonly program: Conformer,
    readonly agent: AgentSide,
    readonly port: number,
  ) {}

  static async start(kind = 'http', node = process.execPath, env = {}): Promise<Serving> {
    const command = [node, path('fixtures/agents-node/serving.mjs'), kind] as const
    const spec = { name: 'Node', runtime: 'node', missing: () => undefined, command }
    const program = await Conformer.start({ ...spec, env: { NODE_OPTIONS: `--require ${AGENT}`, ...env } })
    const agent = await program.connection()
    agent.send({ type: 'welcome', protocol: 1 })
    const { port } = (await program.expect('started')) as ProgramEvent & { port: number }
    const serving = new Serving(program, agent, port)
    await serving.hear('ready')
    return serving
  }

  async end(): Promise<void> {
    for (const socket of this.#sockets) socket.destroy()
    await this.program.end()
  }

  /** The next message that is not about requests. */
  async hear<T extends FromAgent['type']>(type: T): Promise<Said<T>> {
    for (;;) {
      const message = await this.agent.next()
      if (message?.type === 'requests' && type !== 'requests') this.counts.push(message)
      else if (message?.type === type) return message as Said<T>
      else throw new Error(`expected \`${type}\`, got ${JSON.stringify(message)}; stderr: ${this.program.stderr}`)
    }
  }

  /** All that it counts until nothing comes any more. */
  async counted(): Promise<Said<'requests'>[]> {
    this.counts.push(...((await this.agent.silence(300)) as Said<'requests'>[]))
    return this.counts
  }

  /** Asks for a checkpoint. @returns its id */
  checkpoint(reason: 'refork' | 'fork' | 'template' = 'refork', timeoutMs = 10_000): number {
    this.agent.send({ type: 'checkpoint', id: ++this.#id, reason, timeoutMs })
    return this.#id
  }

  resume(): void {
    this.agent.send({ type: 'resumed', id: this.#id })
  }

  become(): void {
    this.agent.send(this.program.forked({ id: this.#id }))
  }

  ask(command: string) {
    return this.program.ask(command, command.split(' ')[0]!) as Promise<
      ProgramEvent & { seen: string[]; errors: string[]; requests: number }
    >
  }

  /** Resolves with the answer's text, rejects where there is none. */
  get(path: string, agent: http.Agent | false = false, options: http.RequestOptions = {}): Promise<string> {
    return new Promise((resolve, reject) => {
      const request = http.get({ port: this.port, host: HOST, path, agent, ...options }, (response) => {
        let text = ''
        response.on('data', (chunk) => {
          text += chunk
        })
        response.on('end', () => resolve(text))
        response.on('error', reject)
      })
      request.on('error', reject)
    })
  }

  /** A connection, to write by hand. */
  async socket(): Promise<Socket & { text: string }> {
    const socket = Object.assign(connect(this.port, HOST), { text: '' })
    this.#sockets.push(socket)
    socket.on('error', () => {})
    socket.setEncoding('utf8').on('data', (chunk) => {
      socket.text += chunk
    })
    await new Promise((resolve) => socket.once('connect', resolve))
    return socket
  }
}

const head = (path: string, more = '') => `GET ${path} HTTP/1.1\r\nHost: server\r\n${more}\r\n`
const bodies = (text: string) => [...text.matchAll(/\r\n\r\n([^\r\n]*?)(?=HTTP\/1\.1|$)/g)].map(([, body]) => body)

describe.skipIf(!existsSync(AGENT))('the Node agent, of requests', () => {
  let serving: Serving
  afterEach(() => serving.end())

  test('says in its hello that it counts', async () => {
    serving = await Serving.start()
    expect(serving.agent.hello.counts).toBe(true)
  })

  test.each(NODES)(
    'counts each request of %s once, at most ten times a second, and is silent afterwards',
    async (_, node) => {
      serving = await Serving.start('http', node)
      const agent = new http.Agent({ keepAlive: true, maxSockets: 20 })
      const since = Date.now()
      for (let round = 0; round < 3; round++) {
        await Promise.all(Array.from({ length: 100 }, (_, i) => serving.get(`/now?id=${i}&ms=${i % 2}`, agent)))
        await sleep(60)
      }
      const counts = await serving.counted()
      agent.destroy()
      expect(counts.at(-1)).toMatchObject({ total: 300 })
      expect(counts.length).toBeLessThanOrEqual((Date.now() - since) / 100 + 1)
      expect(counts.map(({ total }) => total)).toEqual(counts.map(({ total }) => total).sort((a, b) => a - b))
      expect(await serving.agent.silence()).toEqual([])
      expect((await serving.ask('state')).requests).toBe(300)
    },
  )

  test('sums how long they took', async () => {
    serving = await Serving.start()
    await Promise.all([100, 150, 50].map((ms) => serving.get(`/now?ms=${ms}`)))
    const { total, ms } = (await serving.counted()).at(-1)!
    expect(total).toBe(3)
    expect(ms).toBeGreaterThanOrEqual(297)
    expect(ms).toBeLessThan(1_000)
  })

  test('does not count what its client did not wait for, event streams and upgraded connections', async () => {
    serving = await Serving.start()
    const left = await serving.socket()
    left.write(head('/never?id=left'))
    const stream = await serving.socket()
    stream.write(head('/events?id=stream'))
    const upgraded = await serving.socket()
    upgraded.write(head('/', 'Connection: Upgrade\r\nUpgrade: echo\r\n'))
    await expect.poll(() => upgraded.text + stream.text).toMatch(/101.*text\/event-stream/s)
    for (const socket of [left, stream, upgraded]) socket.destroy()
    await serving.get('/now?id=1')
    expect((await serving.counted()).at(-1)).toMatchObject({ total: 1 })
  })

  test('does not keep the process running', async () => {
    serving = await Serving.start()
    await serving.get('/now?id=1')
    await serving.ask('close')
    expect(await serving.program.exit()).toEqual({ code: 0, signal: null })
  })

  test('parks at once for a refork when nothing is in hand', async () => {
    serving = await Serving.start()
    await serving.get('/now?id=1')
    const since = Date.now()
    const id = serving.checkpoint()
    expect(await serving.hear('parked')).toEqual({ type: 'parked', id })
    expect(Date.now() - since).toBeLessThan(150)
  })

  test('waits for the request in hand, before it runs the hooks', async () => {
    serving = await Serving.start('http', process.execPath, { HOOKS: '1' })
    const answered = serving.get('/now?id=slow&ms=300')
    await sleep(50)
    const since = Date.now()
    serving.checkpoint()
    expect(await answered).toBe('slow')
    await serving.program.expect('before')
    await serving.hear('parked')
    expect(Date.now() - since).toBeGreaterThan(200)
    serving.resume()
    await serving.program.expect('after')
    await serving.hear('running')
  })

  test('refuses where one never ends, names it, and serves what it has held', async () => {
    serving = await Serving.start()
    const never = await serving.socket()
    never.write(head('/never?id=never&secret=x'))
    await sleep(20)
    const id = serving.checkpoint('refork', 800)
    await sleep(20)
    const since = Date.now()
    expect(await serving.get('/now?id=held')).toBe('held')
    // It is held for a quarter of the time.
    expect(Date.now() - since).toBeLessThan(500)
    const { error, ...rest } = await serving.hear('refused')
    expect(rest).toEqual({ type: 'refused', id })
    expect(error.code).toBe('BUSY')
    expect(error.message).toMatch(/^1 request is in hand, for \d+ ms: GET \/never$/)
    expect(await serving.get('/now?id=after')).toBe('after')
    expect((await serving.ask('state')).seen).toEqual(['never', 'held', 'after'])
  })

  test.each(NODES)('gives %s what was held after the hooks, in order, each once', async (_, node) => {
    serving = await Serving.start('http', node, { HOOKS: '1' })
    const slow = await serving.socket()
    slow.write(head('/now?id=slow&ms=300'))
    await sleep(50)
    serving.checkpoint()
    await sleep(20)
    // Behind the one in hand, and on a connection of its own.
    slow.write(head('/now?id=a') + head('/now?id=b'))
    const other = await serving.socket()
    other.write(head('/now?id=c') + head('/now?id=d&ms=20'))
    other.write(head('/now?id=e'))
    await serving.program.expect('before')
    expect((await serving.hear('parked')).held).toBe(2)
    serving.resume()
    expect((await serving.program.expect('after')).seen).toEqual(['slow'])
    await serving.hear('running')
    await expect
      .poll(() => [bodies(slow.text), bodies(other.text)])
      .toEqual([
        ['slow', 'a', 'b'],
        ['c', 'd', 'e'],
      ])
    expect(await serving.ask('state')).toMatchObject({
      seen: ['slow', 'a', 'b', 'c', 'd', 'e'],
      errors: [],
      requests: 6,
    })
  })

  test.each(NODES)('never lets a fork of %s see what was held, and closes its connections', async (_, node) => {
    serving = await Serving.start('http', node, { HOOKS: '1' })
    const kept = await serving.socket()
    kept.write(head('/now?id=kept'))
    const half = await serving.socket()
    half.write('GET /now?id=half HTT')
    const stream = await serving.socket()
    stream.write(head('/events?id=stream'))
    const slow = await serving.socket()
    slow.write(head('/now?id=slow&ms=200'))
    await sleep(50)
    serving.checkpoint()
    await sleep(20)
    const held = await serving.socket()
    held.write(head('/now?id=a') + head('/now?id=b'))
    const post = await serving.socket()
    post.write('POST /length?id=c HTTP/1.1\r\nHost: server\r\nContent-Length: 100000\r\n\r\nbegun')
    const upgrade = await serving.socket()
    upgrade.write(head('/', 'Connection: Upgrade\r\nUpgrade: echo\r\n'))
    await serving.program.expect('before')
    expect((await serving.hear('parked')).held).toBe(3)
    serving.become()
    const sockets = [kept, half, stream, slow, held, post, upgrade]
    await serving.program.expect('fork')
    await serving.hear('running')
    await expect.poll(() => sockets.map(({ destroyed }) => destroyed)).toEqual(sockets.map(() => true))
    const before = ['kept', 'stream', 'slow']
    expect(await serving.ask('state')).toMatchObject({ seen: before, errors: [], requests: 0 })
    serving.counts.length = 0
    expect(await serving.get('/now?id=first')).toBe('first')
    expect((await serving.counted()).map(({ total }) => total)).toEqual([1])
    expect(await serving.ask('state')).toMatchObject({ seen: [...before, 'first'], errors: [], requests: 1 })
  })

  test('waits neither for event streams nor for upgraded connections, which go on in the source', async () => {
    serving = await Serving.start()
    const stream = await serving.socket()
    stream.write(head('/events?id=stream'))
    const upgraded = await serving.socket()
    upgraded.write(head('/', 'Connection: Upgrade\r\nUpgrade: echo\r\n'))
    await expect.poll(() => upgraded.text).toContain('101')
    await expect.poll(() => stream.text).toContain('data: first')
    const since = Date.now()
    serving.checkpoint()
    expect((await serving.hear('parked')).held).toBe(undefined)
    expect(Date.now() - since).toBeLessThan(150)
    serving.resume()
    await serving.hear('running')
    upgraded.write('hello')
    await expect.poll(() => upgraded.text).toContain('hello')
  })

  test('holds back large bodies, and those that ask before they send', async () => {
    serving = await Serving.start()
    const slow = serving.get('/now?id=slow&ms=250')
    await sleep(50)
    serving.checkpoint()
    await sleep(20)
    const large = Buffer.alloc(5 << 20, 'x')
    const post = (id: string, headers = {}) =>
      new Promise<string>((resolve, reject) => {
        const options = {
          port: serving.port,
          host: HOST,
          method: 'POST',
          path: `/length?id=${id}`,
          agent: false as const,
        }
        const request = http.request(
          { ...options, headers: { 'Content-Length': large.length, ...headers } },
          (response) => {
            response.setEncoding('utf8').on('data', resolve)
          },
        )
        request.on('error', reject)
        if ('Expect' in headers) {
          request.flushHeaders()
          request.once('continue', () => request.end(large))
        } else request.end(large)
      })
    const posts = [post('a'), post('b', { Expect: '100-continue' })]
    await slow
    expect((await serving.hear('parked')).held).toBe(2)
    await sleep(100)
    serving.resume()
    expect(await Promise.all(posts)).toEqual([`a:${large.length}`, `b:${large.length}`])
  })

  test('holds back what asks to be upgraded', async () => {
    serving = await Serving.start()
    const slow = serving.get('/now?id=slow&ms=200')
    await sleep(50)
    serving.checkpoint()
    await sleep(20)
    const upgrade = await serving.socket()
    upgrade.write(head('/', 'Connection: Upgrade\r\nUpgrade: echo\r\n'))
    const gone = await serving.socket()
    gone.write(head('/', 'Connection: Upgrade\r\nUpgrade: echo\r\n'))
    await sleep(20)
    gone.resetAndDestroy()
    await slow
    await serving.hear('parked')
    expect(upgrade.text).toBe('')
    serving.resume()
    await serving.hear('running')
    await expect.poll(() => upgrade.text).toContain('101')
    upgrade.write('hello')
    await expect.poll(() => upgrade.text).toContain('hello')
    expect(await serving.ask('state')).toMatchObject({ seen: ['slow', 'upgrade'], errors: [] })
  })

  test('does not serve what its client has left while it was held', async () => {
    serving = await Serving.start()
    const slow = serving.get('/now?id=slow&ms=250')
    await sleep(50)
    serving.checkpoint()
    await sleep(20)
    const left = await serving.socket()
    left.write(head('/now?id=left'))
    await sleep(50)
    left.destroy()
    const stays = serving.get('/now?id=stays')
    await slow
    await serving.hear('parked')
    serving.resume()
    expect(await stays).toBe('stays')
    expect(await serving.ask('state')).toMatchObject({ seen: ['slow', 'stays'], errors: [] })
  })

  test.each(NODES)(
    'does not wait in %s for what is behind another one on a connection that was closed',
    async (_, node) => {
      serving = await Serving.start('http', node)
      const left = await serving.socket()
      left.write(head('/never?id=a') + head('/never?id=b') + head('/now?id=c'))
      await sleep(100)
      left.destroy()
      await sleep(50)
      serving.checkpoint('refork', 1_000)
      await serving.hear('parked')
      serving.resume()
      expect((await serving.ask('state')).requests).toBe(0)
    },
  )

  test('neither waits nor holds back for a fork that a request asks for', async () => {
    serving = await Serving.start()
    const answered = serving.get('/fork?id=1')
    const { id } = await serving.hear('fork')
    serving.checkpoint('fork', 1_000)
    expect((await serving.hear('parked')).held).toBe(undefined)
    serving.resume()
    await serving.hear('running')
    serving.agent.send({ type: 'forkResult', id, pid: 5001, generation: 2 })
    expect(await answered).toBe('forked')
  })

  test('does not wait for a request that waits for a fork itself', async () => {
    serving = await Serving.start()
    const answered = serving.get('/fork?id=1')
    const { id } = await serving.hear('fork')
    serving.checkpoint('refork', 5_000)
    const since = Date.now()
    expect((await serving.hear('refused')).error).toMatchObject({
      code: 'BUSY',
      message: expect.stringContaining('fork'),
    })
    expect(Date.now() - since).toBeLessThan(500)
    serving.agent.send({ type: 'forkResult', id, error: { code: 'CHECKPOINT_FAILED', message: 'no' } })
    expect(await answered).toBe('CHECKPOINT_FAILED')
  })

  test('serves what it has held where a hook throws', async () => {
    serving = await Serving.start('http', process.execPath, { HOOKS: 'throw' })
    serving.checkpoint()
    await serving.program.expect('before')
    const held = serving.get('/now?id=held')
    expect((await serving.program.expect('after')).seen).toEqual([])
    expect((await serving.hear('refused')).error.message).toBe('not now')
    expect(await held).toBe('held')
  })

  test.each(['https', 'secure'])('counts, holds and drops the requests of HTTP/1 over TLS (%s)', async (kind) => {
    serving = await Serving.start(kind)
    const get = (path: string, agent: http.Agent | false = false) => secureGet(serving.port, path, agent)
    const slow = get('/now?id=slow&ms=200')
    await sleep(60)
    serving.checkpoint()
    const held = get('/now?id=held')
    expect(await slow).toBe('slow')
    expect((await serving.hear('parked')).held).toBe(1)
    serving.resume()
    expect(await held).toBe('held')
    await serving.hear('running')
    expect((await serving.counted()).at(-1)).toMatchObject({ total: 2 })
    const again = get('/now?id=again&ms=200')
    // Its handshake is not done.
    const half = await serving.socket()
    await sleep(60)
    serving.checkpoint()
    const dropped = get('/now?id=dropped').catch(({ code }) => code)
    await again
    expect((await serving.hear('parked')).held).toBe(1)
    serving.become()
    await serving.hear('running')
    expect(await dropped).toBe('ECONNRESET')
    await expect.poll(() => half.destroyed).toBe(true)
    expect(await serving.ask('state')).toMatchObject({ seen: ['slow', 'held', 'again'], errors: [], requests: 0 })
  })

  const overHttp2: [kind: string, name: string, node: string][] = [
    ['http2', ...NODES[0]!],
    ['secure', ...NODES[0]!],
    ...NODES.map(([name, node]): [string, string, string] => ['streams', name, node]),
  ]
  test.each(overHttp2)('counts, holds and drops the requests of HTTP/2 (%s, %s)', async (kind, _, node) => {
    serving = await Serving.start(kind, node)
    const scheme = kind === 'secure' ? 'https' : 'http'
    const session = http2.connect(`${scheme}://${HOST}:${serving.port}`, { rejectUnauthorized: false })
    session.on('error', () => {})
    const get = (path: string) => streamGet(session, path)
    await Promise.all(Array.from({ length: 20 }, (_, i) => get(`/now?id=${i}`)))
    const slow = get('/now?id=slow&ms=200')
    await sleep(60)
    serving.checkpoint()
    await sleep(20)
    const held = [get('/now?id=a'), get('/now?id=b')]
    const left = session.request({ ':path': '/now?id=left' })
    left.on('error', () => {})
    await sleep(20)
    left.close(http2.constants.NGHTTP2_INTERNAL_ERROR)
    expect(await slow).toBe('slow')
    expect((await serving.hear('parked')).held).toBe(1)
    serving.resume()
    expect(await Promise.all(held)).toEqual(['a', 'b'])
    await serving.hear('running')
    expect((await serving.counted()).at(-1)).toMatchObject({ total: 23 })
    const again = get('/now?id=again&ms=200')
    await sleep(60)
    serving.checkpoint()
    await sleep(20)
    const dropped = get('/now?id=dropped').catch(() => 'dropped')
    await again
    await serving.hear('parked')
    serving.become()
    await serving.hear('running')
    expect(await dropped).toBe('dropped')
    const { seen, errors, requests } = await serving.ask('state')
    expect({ seen: seen.slice(20), errors, requests }).toEqual({
      seen: ['slow', 'a', 'b', 'again'],
      errors: [],
      requests: 0,
    })
    session.destroy()
  })

  test.each(NODES)('counts, holds and drops the requests of a Worker of %s', async (_, node) => {
    serving = await Serving.start('thread', node)
    await Promise.all(Array.from({ length: 20 }, (_, i) => serving.get(`/now?id=${i}`)))
    expect((await serving.counted()).at(-1)).toMatchObject({ total: 20 })
    const slow = serving.get('/now?id=slow&ms=300')
    await sleep(60)
    serving.checkpoint()
    await sleep(30)
    const held = serving.get('/now?id=held')
    expect(await slow).toBe('slow')
    expect(await serving.hear('parked')).toMatchObject({ held: 1 })
    serving.resume()
    expect(await held).toBe('held')
    await serving.hear('running')
    const again = serving.get('/now?id=again&ms=300')
    await sleep(60)
    serving.checkpoint()
    await sleep(30)
    const dropped = serving.get('/now?id=dropped').catch(({ code }) => code)
    await again
    expect(await serving.hear('parked')).toMatchObject({ held: 1 })
    serving.become()
    await serving.hear('running')
    expect(await dropped).toBe('ECONNRESET')
    const { seen, errors, requests } = await serving.ask('state')
    expect({ seen: seen.slice(20), errors, requests }).toEqual({
      seen: ['slow', 'held', 'again'],
      errors: [],
      requests: 0,
    })
    serving.counts.length = 0
    await serving.get('/now?id=first')
    await expect.poll(async () => (await serving.ask('state')).requests).toBe(1)
    await serving.ask('terminate')
    expect((await serving.counted()).at(-1)).toMatchObject({ total: 1 })
  })

  test('names the Worker whose request never ends', async () => {
    serving = await Serving.start('thread')
    const never = await serving.socket()
    never.write(head('/never?id=never'))
    await sleep(50)
    serving.checkpoint('refork', 600)
    const { error } = await serving.hear('refused')
    expect(error).toMatchObject({ code: 'BUSY', message: expect.stringMatching(/^1 request .* in Worker 1$/) })
    expect(await serving.get('/now?id=after')).toBe('after')
  })

  test('refuses reforks for good once the program has said so, in forks too, and nothing else', async () => {
    serving = await Serving.start()
    await serving.ask('unsafe it has a lock')
    expect(await serving.hear('unsafe')).toEqual({ type: 'unsafe', reason: 'it has a lock' })
    await serving.ask('unsafe another')
    serving.checkpoint()
    expect((await serving.hear('refused')).error).toEqual({ code: 'UNSAFE', message: 'it has a lock' })
    serving.checkpoint('fork')
    await serving.hear('parked')
    serving.become()
    await serving.hear('running')
    serving.checkpoint()
    expect((await serving.hear('refused')).error).toEqual({ code: 'UNSAFE', message: 'it has a lock' })
    expect(await serving.get('/now?id=1')).toBe('1')
  })

  test('refuses a refork that has begun where a request in hand says so', async () => {
    serving = await Serving.start()
    const slow = serving.get('/now?id=slow&ms=300')
    await sleep(50)
    serving.checkpoint()
    await sleep(20)
    const held = serving.get('/now?id=held')
    await serving.ask('unsafe')
    const { reason } = await serving.hear('unsafe')
    expect((await serving.hear('refused')).error).toEqual({ code: 'UNSAFE', message: reason })
    expect(await Promise.all([slow, held])).toEqual(['slow', 'held'])
  })
})

function secureGet(port: number, path: string, agent: http.Agent | false): Promise<string> {
  return new Promise((resolve, reject) => {
    const request = https.get({ port, host: HOST, path, agent, rejectUnauthorized: false }, (response) => {
      let text = ''
      response.setEncoding('utf8').on('data', (chunk) => {
        text += chunk
      })
      response.on('end', () => resolve(text))
    })
    request.on('error', reject)
  })
}

function streamGet(session: http2.ClientHttp2Session, path: string): Promise<string> {
  return new Promise((resolve, reject) => {
    const stream = session.request({ ':path': path })
    let text = ''
    let hasAnswer = false
    stream.setEncoding('utf8')
    stream.on('response', () => {
      hasAnswer = true
    })
    stream.on('data', (chunk) => {
      text += chunk
    })
    stream.on('error', reject)
    stream.on('close', () => (hasAnswer ? resolve(text) : reject(new Error('no answer'))))
  })
}
