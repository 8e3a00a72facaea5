import { randomUUID } from 'node:crypto'
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest'
import { allPids, environment } from '../src/linux/proc.js'
import { PROJECT, RUNTIME_CACHE, RUNTIMES } from './runtimes/index.js'
import { run } from './runtimes/runtime.js'

const examples = join(PROJECT, 'examples')
let store: string
let mark: string

beforeAll(() => {
  // They import the package by its name, and so what was built of it.
  if (!existsSync(join(PROJECT, 'dist/index.js'))) throw new Error('dist is missing: run `npm run build` first')
})

beforeEach(() => {
  store = mkdtempSync(join(tmpdir(), 'warmfork-examples-'))
  mark = `WARMFORK_EXAMPLE_MARK=${randomUUID()}`
})

afterEach(() => {
  rmSync(store, { recursive: true, force: true })
  expect(allPids().filter((pid) => environment(pid)?.includes(mark))).toEqual([])
})

/** Runs an example to its end, with a store of its own, and gives what it printed. */
function example(file: string, ...args: string[]): Promise<string> {
  const [key, value] = mark.split('=') as [string, string]
  const command = file.endsWith('.ts') ? ['--import', 'tsx', file] : [file]
  return run(process.execPath, [...command, ...args], {
    cwd: PROJECT,
    env: { WARMFORK_STORE: store, [key]: value },
    timeoutMs: 900_000,
  })
}

describe('the Node application', () => {
  interface Figures {
    engine: string
    coldMs: number
    templateMiB: number
    children: {
      pid: number
      status: number
      answer: string
      firstAnswerMs: number
      privateMiB: number
      exit: { code: number | null; signal: string | null }
    }[]
  }

  it('answers from three forks, faster than a cold start and with a fraction of its memory', async () => {
    const figures = JSON.parse(await example(join(examples, 'node-app/run.mjs'), '--json')) as Figures
    expect(figures.engine).toBe('criu')
    expect(figures.children.map(({ status }) => status)).toEqual([200, 200, 200])
    expect(figures.children.map(({ answer }) => answer)).toEqual([
      expect.stringMatching(/^[1-9]\d* found$/),
      'handmade green copper apron',
      expect.stringMatching(/^[1-9]\d* found$/),
    ])
    expect(new Set(figures.children.map(({ pid }) => pid)).size).toBe(3)
    for (const { firstAnswerMs, privateMiB, exit } of figures.children) {
      expect(exit).toEqual({ code: 0, signal: null })
      expect(firstAnswerMs).toBeLessThan(figures.coldMs / 3)
      expect(privateMiB).toBeLessThan(figures.templateMiB / 4)
    }
  }, 900_000)

  it('prints a table for people', async () => {
    const lines = (await example(join(examples, 'node-app/run.mjs'))).trim().split('\n')
    expect(lines[0]).toMatch(/^process +answers in +own memory +answer$/)
    expect(lines.slice(1).map((line) => line.split(/\s/)[0])).toEqual(['cold', 'fork', 'fork', 'fork'])
  }, 900_000)

  it('has a lock without download addresses', () => {
    const lock = readFileSync(join(examples, 'node-app/app/package-lock.json'), 'utf8')
    expect(lock).not.toMatch(/"resolved"|https?:\/\/registry/)
    expect(Object.keys((JSON.parse(lock) as { packages: object }).packages).length).toBeGreaterThan(20)
  })
})

const jruby = RUNTIMES.find(({ name }) => name === 'JRuby')!
const noJruby = await jruby.available()

describe.skipIf(noJruby !== undefined)('JRuby', () => {
  beforeAll(() => jruby.install(RUNTIME_CACHE), 1_800_000)

  it('says hello from each fork, much faster than from cold', async () => {
    const figures = JSON.parse(await example(join(examples, 'jruby/run.mjs'), '--json')) as {
      engine: string
      coldMs: number
      forks: { pid: number; said: string; helloMs: number; exit: object }[]
    }
    expect(figures.engine).toBe('criu')
    expect(figures.forks).toHaveLength(5)
    for (const { said, exit } of figures.forks) {
      expect(said).toBe('hello')
      expect(exit).toEqual({ code: 0, signal: null })
    }
    // Some 100 times on a quiet machine; the tests' own neighbours may take much of that.
    expect(Math.min(...figures.forks.map(({ helloMs }) => helloMs))).toBeLessThan(figures.coldMs / 10)
  }, 600_000)
})

describe('embedding', () => {
  const said = 'Good morning, hello!\nGood day, hello!\nGood evening, hello!\n{ code: 0, signal: null }\n'

  it.each([['embed.mjs'], ['embed.ts']])(
    'works in the six lines of %s',
    async (file) => {
      expect(await example(join(examples, 'embed', file))).toBe(said)
    },
    120_000,
  )

  it('type-checks', async () => {
    await run(process.execPath, [
      join(PROJECT, 'node_modules/typescript/bin/tsc'),
      '-p',
      join(examples, 'embed/tsconfig.json'),
    ])
  }, 120_000)
})

it('has each example tried here, or in postgres.test.ts', () => {
  expect(readdirSync(examples).sort()).toEqual(['embed', 'jruby', 'node-app', 'postgres'])
})
