/** Programs with a pool of connections to a database, a real PostgreSQL that the example starts. */
import { randomUUID } from 'node:crypto'
import { existsSync, mkdtempSync, readdirSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { allPids, environment } from '../src/linux/proc.js'
import { PROJECT, run } from './runtimes/runtime.js'

interface Worker {
  pid: number
  rows: number
  /** Jobs that are missing between a worker's first and last. */
  gaps: number
  /** Process ids of the server's that its jobs came to. */
  connections: number[]
}

interface Found {
  engine: string
  template: Worker & { jobsAtTheFork: number }
  children: (Worker & { done: number; errors: string[]; retries: number })[]
}

const CHILDREN = 8
const JOBS = 20
/** Debian's packages and the dependencies of the application may have to be brought first. */
const SET_UP_MS = 300_000

let store: string
let mark: string
let found: Record<'node' | 'node-hooks' | 'python' | 'python-hooks', Found>

beforeAll(async () => {
  if (!existsSync(join(PROJECT, 'dist/index.js'))) throw new Error('dist is missing: run `npm run build` first')
  store = mkdtempSync(join(tmpdir(), 'warmfork-postgres-store-'))
  mark = `WARMFORK_EXAMPLE_MARK_${randomUUID()}`
  const output = await run(process.execPath, [join(PROJECT, 'examples/postgres/run.mjs'), '--json'], {
    timeoutMs: SET_UP_MS,
    env: { WARMFORK_STORE: store, [mark]: '1' },
  })
  found = JSON.parse(output)
}, SET_UP_MS)

afterAll(() => {
  rmSync(store, { recursive: true, force: true })
  expect(allPids().filter((pid) => environment(pid)?.includes(`${mark}=1`))).toEqual([])
  expect(readdirSync(tmpdir()).filter((name) => /^warmfork-postgres-(?!store-)/.test(name))).toEqual([])
})

describe.each([
  ['node', 'TCP', 2],
  ['node-hooks', 'TCP', 2],
  ['python', "the server's Unix socket", 1],
  ['python-hooks', "the server's Unix socket", 1],
] as const)('a %s program that is connected by %s', (name, _, connections) => {
  it('goes on with its own connections, without a job lost', () => {
    const { engine, template } = found[name]
    expect(engine).toBe('criu')
    expect(template.rows).toBeGreaterThan(template.jobsAtTheFork)
    expect(template.gaps).toBe(0)
    expect(template.connections.length).toBe(connections)
  })

  it('has eight forks, each on connections of its own, which do all their jobs once', () => {
    const { template, children } = found[name]
    expect(children.length).toBe(CHILDREN)
    expect(children.map(({ done, errors, gaps }) => ({ done, errors, gaps }))).toEqual(
      children.map(() => ({ done: JOBS, errors: [], gaps: 0 })),
    )
    // What a fork did before it was asked for jobs goes on where the template was.
    for (const { rows } of children) expect(rows).toBeGreaterThanOrEqual(JOBS)
    const all = [template, ...children].flatMap(({ connections }) => connections)
    expect(new Set(all).size).toBe(all.length)
  })
})

it('where hooks stop the work and drop the pool, no query meets a connection that has ended', () => {
  const retries = (name: keyof typeof found) => found[name].children.map(({ retries }) => retries)
  expect([...retries('python-hooks'), ...retries('node-hooks')].filter((times) => times > 0)).toEqual([])
})
