/** The Python agent with the supervisor and real forks: what is each fork's own, what goes on in it, and the forks that it makes. */
import { existsSync } from 'node:fs'
import { connect } from 'node:net'
import { join } from 'node:path'
import { createInterface, type Interface } from 'node:readline'
import { fileURLToPath } from 'node:url'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import type { Child } from '../src/child.js'
import type { SupervisorOptions } from '../src/options.js'
import type { Supervisor } from '../src/supervisor.js'
import { Place } from './engines-under-test.js'
import { pythons } from './fixtures/agents-conformance/python.js'

const PROGRAMS = fileURLToPath(new URL('fixtures/agents-python/', import.meta.url))

/** Says a line to a child, and gives the line that it answers. */
class Speaker {
  readonly #lines: AsyncIterator<string>

  constructor(readonly child: Child) {
    this.#lines = child.lines()[Symbol.asyncIterator]()
  }

  async next(): Promise<string> {
    const { value, done } = await this.#lines.next()
    if (done) throw new Error('the program ended')
    return value
  }

  ask(line: string): Promise<string> {
    this.child.stdin.write(`${line}\n`)
    return this.next()
  }
}

interface Drawn {
  values: Record<string, string | number>
  own: number
  node: number
  byThread: number[]
  pid: number
  threads: number[]
  tasks: number[]
  hash: number
}

function commonPrefix(one: readonly number[], other: readonly number[]): number {
  const differs = one.findIndex((value, i) => value !== other[i])
  return differs < 0 ? one.length : differs
}

/** Sends a child a command by its agent, and gives what it answers. */
async function tell(child: Child, words: string): Promise<string> {
  const answer = new Promise<unknown>((resolve) => child.once('message', resolve))
  child.send(words)
  return (await answer) as string
}

/** The next child that comes to be, and the first that it says by its agent. */
async function firstWords(supervisor: Supervisor): Promise<[Child, unknown]> {
  const known = new Set(supervisor.children)
  for (;;) {
    const child = supervisor.children.find((each) => !known.has(each))
    if (child) return [child, await new Promise((resolve) => child.once('message', resolve))]
    await new Promise((resolve) => setTimeout(resolve, 0))
  }
}

const template = (interpreter: string, program: string, ...args: string[]): Partial<SupervisorOptions> => ({
  command: [interpreter, join(PROGRAMS, program), ...args],
  ready: { agent: true },
  pool: { size: 0 },
})

for (const [name, interpreter] of pythons()) {
  describe.skipIf(!existsSync(interpreter))(`forks of ${name}`, () => {
    let place: Place
    beforeAll(() => {
      place = new Place('criu')
    })
    afterAll(() => place.leave())

    it.each(['fresh', 'namespace'] as const)('draw nothing that another draws, with %s ids', async (identity) => {
      const supervisor = await place.start({ ...template(interpreter, 'draw.py'), name: identity, identity })
      const children = await Promise.all(Array.from({ length: 20 }, () => supervisor.fork()))
      const drawn = await Promise.all(
        children.map(async (child): Promise<Drawn> => {
          await child.ready
          return JSON.parse(await new Speaker(child).ask('draw'))
        }),
      )
      for (const kind of Object.keys(drawn[0]!.values)) {
        expect(new Set(drawn.map(({ values }) => values[kind])).size, kind).toBe(children.length)
      }
      // What the template drew is the same for all, and nothing after it, also in a thread that runs as soon as it can.
      const prefixes = drawn.slice(1).map(({ byThread }) => commonPrefix(drawn[0]!.byThread, byThread))
      expect(new Set(prefixes).size).toBe(1)
      for (const { byThread } of drawn) expect(byThread.length).toBeGreaterThan(prefixes[0]!)
      // What is to be the same.
      expect(new Set(drawn.map(({ own }) => own)).size).toBe(1)
      expect(new Set(drawn.map(({ node }) => node)).size).toBe(1)
      expect(new Set(drawn.map(({ hash }) => hash)).size).toBe(1)
      await supervisor.stop({ graceMs: 200 })
    })

    it('know the ids of their threads', async () => {
      const supervisor = await place.start({ ...template(interpreter, 'draw.py'), name: 'threads' })
      const child = await supervisor.fork()
      await child.ready
      const { pid, threads, tasks } = JSON.parse(await new Speaker(child).ask('draw')) as Drawn
      expect(pid).toBe(child.pid)
      expect(threads).toHaveLength(2)
      expect(threads).toContain(child.pid)
      for (const thread of threads) expect(tasks).toContain(thread)
      await supervisor.stop({ graceMs: 200 })
    })

    it('go on in the event loops that ran at the checkpoint', async () => {
      const supervisor = await place.start({ ...template(interpreter, 'loops.py'), name: 'loops' })
      let port = 0
      const children = await Promise.all([supervisor.fork(), supervisor.fork()])
      for (const child of children) {
        await child.ready
        const answer = await new Speaker(child).ask('')
        expect(answer).toContain(`${child.pid} the second `)
        port = Number(answer.split(' ').at(-1))
      }
      // One of those that listen takes the connection: each of them can be it.
      const served = new Set<string>()
      for (let i = 0; i < 200 && served.size < 3; i++) served.add(await askServer(port))
      expect(served).toEqual(new Set([...children, supervisor.template!].map(({ pid }) => `${pid} the second`)))
      await supervisor.stop({ graceMs: 200 })
    })

    it('run what was registered with os.register_at_fork, and keep their threads and locks', async () => {
      const supervisor = await place.start({ ...template(interpreter, 'hooks.py'), name: 'hooks' })
      const child = await supervisor.fork()
      await child.ready
      expect(await tell(child, 'words')).toBe('hook before,before 2,before 1,child 1,child 2,hook on fork')
      // Main thread and the four of the pool, at least.
      const [sum, alive] = (await tell(child, 'pool 1 2 3 4')).split(' ').map(Number)
      expect({ sum, alive: alive! >= 5 }).toEqual({ sum: 10, alive: true })
      await supervisor.stop({ graceMs: 200 })
    })

    it('fork themselves, and their forks too', async () => {
      const supervisor = await place.start({ ...template(interpreter, 'hooks.py'), name: 'own' })
      let child = await supervisor.fork()
      await child.ready
      await tell(child, 'words')
      for (const depth of [1, 2, 3]) {
        const born = firstWords(supervisor)
        const answer = tell(child, 'fork')
        const [copy, words] = await born
        expect(await answer).toBe(`parent ${copy.pid}`)
        expect(words).toBe(`fork ${depth}`)
        expect(await tell(child, 'words')).toBe('hook before,before 2,before 1,parent 1,parent 2,hook after')
        child = copy
        expect(await tell(child, 'words')).toContain('hook on fork')
      }
      await supervisor.stop({ graceMs: 200 })
    })

    it('keep a checkpoint, and fork from it', async () => {
      const supervisor = await place.start({ ...template(interpreter, 'hooks.py'), name: 'kept' })
      const child = await supervisor.fork()
      await child.ready
      expect(await tell(child, 'keep')).toBe('kept')
      for (const word of ['one', 'two']) {
        const born = firstWords(supervisor)
        const answer = tell(child, `keepFork ${word}`)
        const [copy, words] = await born
        expect(await answer).toBe(`parent ${copy.pid}`)
        expect(words).toBe(`fork ${word}`)
        expect(await tell(copy, 'words')).toContain('hook on fork')
      }
      expect(await tell(child, 'drop')).toBe('dropped')
      await supervisor.stop({ graceMs: 200 })
    })
  })
}

function askServer(port: number): Promise<string> {
  return new Promise((resolve, reject) => {
    const socket = connect(port, '127.0.0.1', () => socket.write('\n'))
    const lines: Interface = createInterface({ input: socket })
    lines.once('line', (line) => {
      socket.destroy()
      resolve(line)
    })
    socket.once('error', reject)
  })
}
