/** Reforks of a Node program that serves HTTP meanwhile: nothing that it is asked is lost, and nothing is served twice. */
import http from 'node:http'
import http2 from 'node:http2'
import { connect, type Socket } from 'node:net'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { describe, expect, test } from 'vitest'
import type { Child } from '../src/child.js'
import type { Refork } from '../src/refork/refork.js'
import { ENGINES, eventually, usePlace } from './engines-under-test.js'

const HOST = '127.0.0.1'
const PROGRAM = join(import.meta.dirname, 'fixtures/agents-node/serving.mjs')

interface State {
  seen: string[]
  errors: string[]
  /** As it counts itself. */
  requests: number
  port: number
  pid: number
}

let sequence = 0

/** What the program says of itself. */
function stateOf(child: Child): Promise<State> {
  const id = ++sequence
  return new Promise((resolve) => {
    const onMessage = (data: unknown) => {
      if ((data as { id: number }).id !== id) return
      child.off('message', onMessage)
      resolve(data as State)
    }
    child.on('message', onMessage)
    child.send({ id, command: 'state' })
  })
}

/** Rejects where there is no answer. */
function request(port: number, path: string, options: http.RequestOptions = {}, body?: Buffer): Promise<string> {
  return new Promise((resolve, reject) => {
    const request = http.request({ host: HOST, port, path, ...options }, (response) => {
      let text = ''
      response.setEncoding('utf8').on('data', (chunk) => {
        text += chunk
      })
      response.on('end', () => resolve(text))
      response.on('error', reject)
    })
    request.on('error', reject)
    request.end(body)
  })
}

/** Clients that ask one thing after the other, each on a connection of its own. */
class Load {
  readonly sent: string[] = []
  readonly failed: unknown[] = []
  readonly #agent = new http.Agent({ keepAlive: true })
  readonly #clients: Promise<void>[]
  #isOver = false

  constructor(port: number, clients: number) {
    this.#clients = Array.from({ length: clients }, async (_, client) => {
      for (let i = 0; !this.#isOver; i++) {
        const id = `${client}.${i}`
        this.sent.push(id)
        try {
          const text = await request(port, `/now?id=${id}&ms=${i % 3}`, { agent: this.#agent })
          if (text !== id) this.failed.push(`${id} was answered by ${text}`)
        } catch (error) {
          this.failed.push(error)
        }
      }
    })
  }

  async end(): Promise<void> {
    this.#isOver = true
    await Promise.all(this.#clients)
    this.#agent.destroy()
  }
}

/** A connection, to write by hand. */
async function socketTo(port: number): Promise<Socket & { text: string }> {
  const socket = Object.assign(connect(port, HOST), { text: '' })
  socket.on('error', () => {})
  socket.setEncoding('utf8').on('data', (chunk) => {
    socket.text += chunk
  })
  await new Promise((resolve) => socket.once('connect', resolve))
  return socket
}

const head = (path: string, more = '') => `GET ${path} HTTP/1.1\r\nHost: server\r\n${more}\r\n`

const NONE = { lost: [], twice: [], unheardOf: [] }

function difference(seen: readonly string[], sent: readonly string[]) {
  const once = new Set(seen)
  const known = new Set(sent)
  return {
    lost: sent.filter((id) => !once.has(id)),
    twice: seen.filter((id, at) => seen.length !== once.size && seen.indexOf(id) !== at),
    unheardOf: [...once].filter((id) => !known.has(id)),
  }
}

describe.skipIf(!ENGINES.includes('criu'))('a refork of a Node program that serves', () => {
  const place = usePlace('criu')
  const start = async (kind: string, options = {}) => {
    const supervisor = await place.current.start({
      command: [process.execPath, PROGRAM, kind],
      ready: { agent: true },
      pool: { size: 0 },
      // It would accept connections too.
      template: { afterCheckpoint: 'end' },
      ...options,
    })
    const child = await supervisor.fork()
    await child.ready
    return { supervisor, child, port: (await stateOf(child)).port }
  }

  test.each(['http', 'thread'])('loses nothing and serves nothing twice under constant load (%s)', async (kind) => {
    const { supervisor, child, port } = await start(kind)
    const reforks: Refork[] = []
    supervisor.on('refork', (refork) => reforks.push(refork))
    const load = new Load(port, 50)
    await sleep(300)
    const first = await supervisor.refork({ from: child })
    await sleep(100)
    await load.end()
    expect(load.failed).toEqual([])
    const source = await stateOf(child)
    expect(difference(source.seen, load.sent)).toEqual(NONE)
    expect({ errors: source.errors, requests: source.requests }).toEqual({ errors: [], requests: load.sent.length })
    await eventually(() => child.requests === load.sent.length, 'the supervisor has heard of each request')
    expect(reforks[0]!.restMs).toBeLessThan(1_000)

    // The copy has seen what was served before it was made, and nothing of what was held then.
    const fork = await supervisor.fork()
    await fork.ready
    const atFirst = await stateOf(fork)
    const before = atFirst.seen.length
    expect(difference(atFirst.seen, source.seen.slice(0, before))).toEqual(NONE)
    expect({ errors: atFirst.errors, requests: atFirst.requests }).toEqual({ errors: [], requests: 0 })
    expect(fork).toMatchObject({ generation: first.number, requests: 0 })
    expect(before).toBeGreaterThan(0)
    await child.end()
    const ids = Array.from({ length: 20 }, (_, i) => `later${i}`)
    await Promise.all(ids.map((id) => request(port, `/now?id=${id}`)))
    const later = await stateOf(fork)
    expect(difference(later.seen.slice(before), ids)).toEqual(NONE)
    expect({ errors: later.errors, requests: later.requests }).toEqual({ errors: [], requests: 20 })
    await eventually(() => fork.requests === 20, 'the supervisor has heard of those too')
  })

  test('goes on in the source with all that it has, and in no fork', async () => {
    const { supervisor, child, port } = await start('http')
    const stream = await socketTo(port)
    stream.write(head('/events?id=stream'))
    const upgraded = await socketTo(port)
    upgraded.write(head('/', 'Connection: Upgrade\r\nUpgrade: echo\r\n'))
    const half = await socketTo(port)
    half.write('GET /now?id=half HTTP/1.1\r\nHos')
    await eventually(() => stream.text.includes('first') && upgraded.text.includes('101'), 'both are open')
    const body = Buffer.alloc(5 << 20, 'x')
    const post = (id: string) => request(port, `/length?id=${id}`, { method: 'POST', agent: false }, body)
    const slow = request(port, '/now?id=slow&ms=300')
    await sleep(50)
    const reforked = supervisor.refork({ from: child })
    await sleep(50)
    const posts = [post('a'), post('b')]
    const upgrade = await socketTo(port)
    upgrade.write(head('/', 'Connection: Upgrade\r\nUpgrade: echo\r\n'))
    const pipelined = await socketTo(port)
    pipelined.write(head('/now?id=c') + head('/now?id=d'))
    expect(await slow).toBe('slow')
    await reforked
    expect(await Promise.all(posts)).toEqual([`a:${body.length}`, `b:${body.length}`])
    half.write('t: server\r\n\r\n')
    for (const socket of [upgraded, upgrade]) socket.write('hello')
    await eventually(
      () =>
        [upgraded, upgrade].every(({ text }) => text.endsWith('hello')) &&
        half.text.endsWith('half') &&
        /\r\n\r\nc.*\r\n\r\nd$/s.test(pipelined.text),
      'all are served',
    )
    expect(stream.destroyed).toBe(false)
    const { seen, errors } = await stateOf(child)
    expect(errors).toEqual([])
    expect([...seen].sort()).toEqual(['a', 'b', 'c', 'd', 'half', 'slow', 'stream', 'upgrade', 'upgrade'])

    const fork = await supervisor.fork()
    await fork.ready
    expect(await stateOf(fork)).toMatchObject({ seen: ['stream', 'upgrade', 'slow'], errors: [], requests: 0 })
    for (const socket of [stream, upgraded, half, upgrade, pipelined]) socket.destroy()
  })

  test('takes no notice in a fork of sessions and handshakes of TLS that its source has', async () => {
    const { supervisor, child, port } = await start('secure')
    const session = http2.connect(`https://${HOST}:${port}`, { rejectUnauthorized: false })
    const get = (path: string) =>
      new Promise<string>((resolve, reject) => {
        const stream = session.request({ ':path': path })
        let text = ''
        stream.setEncoding('utf8').on('data', (chunk) => {
          text += chunk
        })
        stream.on('error', reject).on('end', () => resolve(text))
      })
    expect(await get('/now?id=first')).toBe('first')
    const handshake = await socketTo(port)
    const slow = get('/now?id=slow&ms=300')
    await sleep(50)
    const reforked = supervisor.refork({ from: child })
    await sleep(50)
    const held = [get('/now?id=a'), get('/now?id=b')]
    await reforked
    expect(await Promise.all([slow, ...held])).toEqual(['slow', 'a', 'b'])
    expect(await stateOf(child)).toMatchObject({ seen: ['first', 'slow', 'a', 'b'], errors: [], requests: 4 })
    const fork = await supervisor.fork()
    await fork.ready
    await sleep(100)
    expect(await stateOf(fork)).toMatchObject({ seen: ['first', 'slow'], errors: [], requests: 0 })
    handshake.destroy()
    session.destroy()
  })

  test('is refused where a request does not end, and the child serves on', async () => {
    const { supervisor, child, port } = await start('http', { hookTimeoutMs: 800 })
    const never = await socketTo(port)
    never.write(head('/never?id=never'))
    await sleep(50)
    const refused = supervisor.refork({ from: child })
    await expect(refused).rejects.toThrow(/1 request is in hand, for \d+ ms: GET \/never/)
    expect(await request(port, '/now?id=after')).toBe('after')
    never.destroy()
    await sleep(50)
    expect(await supervisor.refork({ from: child })).toMatchObject({ reforks: 1 })
  })

  test('is refused for good where the program has said that it is not fork-safe, and by its own forks', async () => {
    const { supervisor, child, port } = await start('http')
    expect(await request(port, '/unsafe?id=1')).toBe('1')
    await eventually(() => child.refuses !== undefined, 'the supervisor has heard it')
    await expect(supervisor.refork({ from: child })).rejects.toMatchObject({ code: 'REFORK_REFUSED' })
    let copy: Child | undefined
    supervisor.on('child', (child) => {
      copy = child
    })
    expect(await request(port, '/fork?id=2')).toBe('forked')
    await copy!.ready
    await expect(supervisor.refork({ from: copy! })).rejects.toThrow('it has a lock')
  })
})
