/**
 * How the tests of the Python and Ruby agents look at requests: programs that serve as test/fixtures/agents-…/serving.* say, first with a
 * socket of the test in the supervisor's place, then with a supervisor and real reforks.
 */
import { existsSync, readFileSync, writeFileSync } from 'node:fs'
import http from 'node:http'
import { createServer } from 'node:net'
import { join } from 'node:path'
import { expect } from 'vitest'
import type { FromAgent } from '../src/agents/protocol.js'
import type { Supervisor } from '../src/supervisor.js'
import { type AgentSide, Conformer, type RuntimeSpec } from './agents-conformance.js'
import type { Place } from './engines-under-test.js'
import { eventually } from './engines-under-test.js'

type Said<T extends FromAgent['type']> = Extract<FromAgent, { type: T }>

/** What starts a program that serves in one way. */
export interface ServingSpec {
  readonly command: readonly [string, ...string[]]
  readonly env?: Readonly<Record<string, string>>
  /** Whether a child of it serves, with an agent of its own. */
  readonly forks?: boolean
}

export async function freePort(): Promise<number> {
  const server = createServer()
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  const { port } = server.address() as { port: number }
  await new Promise((resolve) => server.close(resolve))
  return port
}

/** Resolves with the answer's text, rejects where there is none. */
export function get(port: number, path: string, agent: http.Agent | false = false): Promise<string> {
  return new Promise((resolve, reject) => {
    const request = http.get({ port, host: '127.0.0.1', path, agent, timeout: 20_000 }, (response) => {
      let text = ''
      response.on('data', (chunk) => {
        text += chunk
      })
      response.on('end', () => resolve(text))
      response.on('error', reject)
    })
    request.on('timeout', () => request.destroy(new Error(`no answer to ${path}`)))
    request.on('error', reject)
  })
}

/** An event stream: resolves when its head is there, and what is given ends it. */
export function stream(port: number, path: string): Promise<() => void> {
  return new Promise((resolve, reject) => {
    const request = http.get({ port, host: '127.0.0.1', path, agent: false }, (response) => {
      response.on('error', () => {})
      response.once('data', () => resolve(() => request.destroy()))
    })
    request.on('error', reject)
  })
}

/** The lines of a program's notes: pid, and word. */
export function notes(file: string): [pid: number, word: string][] {
  if (!existsSync(file)) return []
  const lines = readFileSync(file, 'utf8').split('\n').filter(Boolean)
  return lines.map((line) => {
    const [pid, word] = line.split(' ')
    return [Number(pid), word!]
  })
}

/** A program that serves, and the test in the place of its supervisor. */
export class Serving {
  readonly counts: Said<'requests'>[] = []
  #id = 0

  private constructor(
    readonly program: Conformer,
    readonly agent: AgentSide,
    readonly port: number,
    readonly notes: string,
    readonly go: string,
  ) {}

  static async start(spec: ServingSpec, runtime: Pick<RuntimeSpec, 'env'>): Promise<Serving> {
    const port = await freePort()
    // In the program's directory, which is removed with it.
    const env = { PORT: `${port}`, NOTES: 'notes', GO: 'go', ...runtime.env, ...spec.env }
    const program = await Conformer.start({
      name: '',
      runtime: '',
      missing: () => undefined,
      command: spec.command,
      env,
    })
    let agent = await program.connection()
    agent.send({ type: 'welcome', protocol: 1 })
    if (spec.forks) {
      agent = await program.connection()
      agent.send({ type: 'welcome', protocol: 1 })
    }
    await program.expect('started')
    const serving = new Serving(program, agent, port, join(program.directory, 'notes'), join(program.directory, 'go'))
    await serving.hear('ready')
    return serving
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

  checkpoint(reason: 'refork' | 'fork' | 'template' = 'refork', timeoutMs = 10_000): void {
    this.agent.send({ type: 'checkpoint', id: ++this.#id, reason, timeoutMs })
  }

  resume(): void {
    this.agent.send({ type: 'resumed', id: this.#id })
  }

  become(): void {
    this.agent.send(this.program.forked({ id: this.#id }))
  }

  get(path: string, agent: http.Agent | false = false): Promise<string> {
    return get(this.port, path, agent)
  }

  words(): string[] {
    return notes(this.notes).map(([, word]) => word)
  }

  /** Lets the requests to `/wait` end. */
  letGo(): void {
    writeFileSync(this.go, '')
  }
}

/** Requests on eight connections, until it is stopped. */
export class Load {
  readonly answered: string[] = []
  readonly failed: string[] = []
  #isOver = false
  readonly #clients: Promise<void>[]

  constructor(port: number, connections = 8) {
    const agents = Array.from({ length: connections }, () => new http.Agent({ keepAlive: true, maxSockets: 1 }))
    this.#clients = agents.map(async (agent, client) => {
      for (let i = 0; !this.#isOver; i++) {
        const id = `${client}.${i}`
        await get(port, `/now?ms=3&id=${id}`, agent).then(
          () => this.answered.push(id),
          (error) => this.failed.push(`${id}: ${error}`),
        )
      }
      agent.destroy()
    })
  }

  async stop(): Promise<void> {
    this.#isOver = true
    await Promise.all(this.#clients)
  }
}

/**
 * A child that is reforked under load, three times: nothing is lost in it, and nothing of it runs in a fork. It has served
 * requests that no agent has lost count of.
 */
export async function reforkUnderLoad(place: Place, spec: ServingSpec): Promise<void> {
  const port = await freePort()
  const file = join(place.directory, 'notes')
  const supervisor: Supervisor = await place.start({
    command: spec.command,
    env: { PORT: `${port}`, NOTES: file, GO: join(place.directory, 'go'), ...spec.env },
    ready: { agent: true },
    pool: { size: 0 },
  })
  const source = await supervisor.fork()
  await source.ready
  const load = new Load(port)
  const copies = []
  for (let i = 0; i < 3; i++) {
    const before = load.answered.length
    await eventually(() => load.answered.length > before + 40, 'it serves')
    await supervisor.refork({ from: source })
    // It takes new connections too: their listener is the source's.
    copies.push(await supervisor.fork())
  }
  await Promise.all(copies.map((copy) => copy.ready))
  const before = load.answered.length
  await eventually(() => load.answered.length > before + 40, 'it serves')
  await load.stop()
  expect(load.failed).toEqual([])
  const seen = notes(file).filter(([, word]) => word !== 'hook')
  expect(seen.map(([, word]) => word).sort()).toEqual([...load.answered].sort())
  // The template listens too, and is not asked for what it has counted.
  for (const child of spec.forks ? [] : [source, ...copies]) {
    const own = seen.filter(([pid]) => pid === child.pid).length
    await eventually(() => child.requests >= own, `all ${own} are counted, not ${child.requests}`)
    expect(child.requests).toBe(own)
  }
  await supervisor.stop({ graceMs: 200 })
}
