/**
 * What a refork costs: of a server of 500 MiB that answers requests, ten times in a row. And starts without a boot, export and import of what
 * came of it.
 *
 *     npm run -s bench -- refork [--rss 500] [--rounds 21] [--json]
 */
import { spawn } from 'node:child_process'
import { mkdtempSync, rmSync } from 'node:fs'
import { Agent, get } from 'node:http'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { ownBytes } from '../src/cli/own-size.js'
import { defaultRoot } from '../src/generations/directories.js'
import { Store } from '../src/generations/store.js'
import type { SupervisorOptions } from '../src/options.js'
import type { Refork } from '../src/refork/refork.js'
import { Supervisor } from '../src/supervisor.js'
import { measureArchive } from './archive-figures.js'

const APP = fileURLToPath(new URL('refork-app.mjs', import.meta.url))
const NAME = 'refork'
const GENERATIONS = 10
const REQUESTS = 100
const MIB = 2 ** 20

export async function benchRefork(args: readonly string[]): Promise<void> {
  const { values } = parseArgs({
    args: [...args],
    options: {
      rss: { type: 'string', default: '500' },
      rounds: { type: 'string', default: '21' },
      json: { type: 'boolean', default: false },
    },
  })
  const root = mkdtempSync(join(defaultRoot(), '..', 'warmfork-refork-'))
  try {
    const figures = await measure(values.rss, Number(values.rounds), root)
    process.stdout.write(values.json ? `${JSON.stringify(figures)}\n` : table(figures))
  } finally {
    rmSync(root, { recursive: true, force: true })
  }
}

async function measure(rss: string, rounds: number, root: string) {
  const store = join(root, 'store')
  const port = await freePort()
  const options: SupervisorOptions = {
    command: [process.execPath, APP, rss, String(port)],
    cwd: root,
    name: NAME,
    store,
    engine: 'criu',
    ready: { output: 'serving' },
    template: { afterCheckpoint: 'end' },
    pool: { size: 0 },
    reuse: true,
    // Generation 1 stays, to be compared with.
    keep: GENERATIONS,
  }
  const coldMs = await cold(rss)
  const reforks: Refork[] = []
  const switches: number[] = []
  const written: number[] = []
  const flattened: number[] = []
  const gaps: number[] = []
  let forks: { first: number; last: number }
  {
    await using supervisor = await Supervisor.start(options)
    supervisor.on('refork', (refork) => reforks.push(refork))
    for (let i = 1; i < GENERATIONS; i++) {
      const child = await supervisor.fork()
      const client = new Client(port)
      await client.ask(REQUESTS)
      const gap = client.longestGap()
      const before = performance.now()
      const generation = await supervisor.refork({ from: child })
      gaps.push(await gap())
      client.close()
      await child.end({ graceMs: 0 })
      const next = await supervisor.fork()
      const probe = new Client(port)
      await probe.ask(1)
      switches.push(performance.now() - before)
      probe.close()
      await next.end({ graceMs: 0 })
      const sizes = await sizesOf(store, generation.number)
      written.push(sizes.newBytes)
      flattened.push(sizes.flattenedBytes)
    }
    await supervisor.pin(1)
    forks = await compared(supervisor, port, rounds)
    await supervisor.unpin()
  }
  const restarts: number[] = []
  for (let i = 0; i < 5; i++) {
    const before = performance.now()
    await using supervisor = await Supervisor.start(options)
    await supervisor.fork()
    const client = new Client(port)
    await client.ask(1)
    restarts.push(performance.now() - before)
    client.close()
    if (supervisor.template)
      throw new Error(supervisor.warnings.map(({ message }) => message).join(', ') || 'it was booted')
  }
  const archives = await measureArchive({ name: NAME, store, generation: GENERATIONS, directory: root })
  const steady = written.slice(1)
  return {
    reforkCheckpointMs: round(median(reforks.map(({ standstillMs }) => standstillMs))),
    longestGapMs: round(median(gaps)),
    restMs: round(median(reforks.map(({ restMs }) => restMs))),
    switchMs: round(median(switches)),
    generationMiB: round(median(steady) / MIB),
    firstGenerationMiB: round(written[0]! / MIB),
    flattenMiB: round(flattened.reduce((sum, bytes) => sum + bytes, 0) / MIB),
    forkMsGeneration1: round(forks.first),
    [`forkMsGeneration${GENERATIONS}`]: round(forks.last),
    restartMs: round(median(restarts)),
    coldMs: round(coldMs),
    exportMiBPerSecond: archives.zstd.exportMiBPerSecond,
    importMiBPerSecond: archives.zstd.importMiBPerSecond,
    importMsPerGiB: archives.zstd.importMsPerGiB,
    archives,
  }
}

/** Forks of the first and of the last generation in turns, each until it has answered. */
async function compared(supervisor: Supervisor, port: number, rounds: number) {
  const first: number[] = []
  const last: number[] = []
  const fork = async () => {
    const before = performance.now()
    const child = await supervisor.fork()
    const client = new Client(port)
    await client.ask(1)
    const ms = performance.now() - before
    client.close()
    await child.end({ graceMs: 0 })
    await sleep(60)
    return ms
  }
  for (let i = -3; i < rounds; i++) {
    for (const [number, into] of [
      [1, first],
      [GENERATIONS, last],
    ] as const) {
      await supervisor.pin(number)
      await sleep(60)
      const ms = await fork()
      if (i >= 0) into.push(ms)
    }
  }
  return { first: median(first), last: median(last) }
}

/** A client with one connection, which closes with it. */
class Client {
  readonly #agent = new Agent({ keepAlive: true, maxSockets: 1 })
  #next = 1

  constructor(readonly port: number) {}

  async ask(times: number): Promise<void> {
    for (let i = 0; i < times; i++) await this.#one()
  }

  /** Asks on until the function that it gives is called, which tells the longest time without an answer. */
  longestGap(): () => Promise<number> {
    let isOver = false
    let longest = 0
    const asking = (async () => {
      while (!isOver) {
        const before = performance.now()
        await this.#one()
        longest = Math.max(longest, performance.now() - before)
        await sleep(2)
      }
    })()
    return async () => {
      isOver = true
      await asking
      return longest
    }
  }

  close(): void {
    this.#agent.destroy()
  }

  #one(): Promise<void> {
    return new Promise((resolve, reject) => {
      get({ host: '127.0.0.1', port: this.port, path: `/${this.#next++}`, agent: this.#agent }, (response) => {
        response.resume()
        response.on('end', resolve)
        response.on('error', reject)
      }).on('error', reject)
    })
  }
}

/** What a generation added to the disk: files that no other one has; and of that, what was only moved from older page files. */
async function sizesOf(root: string, number: number): Promise<{ newBytes: number; flattenedBytes: number }> {
  await using store = await Store.open({ root, name: NAME, access: 'read' })
  const generation = await store.get(number)
  const { flattenedBytes = 0 } = generation.manifest.edits as { flattenedBytes?: number }
  return { newBytes: ownBytes(generation) - flattenedBytes, flattenedBytes }
}

async function cold(rss: string): Promise<number> {
  const times: number[] = []
  for (let i = 0; i < 3; i++) {
    const before = performance.now()
    const child = spawn(process.execPath, [APP, rss], { stdio: ['ignore', 'pipe', 'inherit'] })
    const line = await new Promise<string>((resolve) => child.stdout.once('data', (chunk) => resolve(String(chunk))))
    const client = new Client(Number(/serving on (\d+)/.exec(line)![1]))
    await client.ask(1)
    times.push(performance.now() - before)
    client.close()
    child.kill('SIGKILL')
    await new Promise((resolve) => child.once('exit', resolve))
  }
  return median(times)
}

async function freePort(): Promise<number> {
  const { createServer } = await import('node:net')
  const server = createServer()
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  const { port } = server.address() as { port: number }
  await new Promise((resolve) => server.close(resolve))
  return port
}

function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b)
  return sorted[Math.floor((sorted.length - 1) / 2)] ?? Number.NaN
}

const round = (value: number) => Math.round(value * 10) / 10

function table({ archives: _, ...figures }: Record<string, unknown>): string {
  return `${Object.entries(figures)
    .map(([key, value]) => `${key.padEnd(24)} ${value}`)
    .join('\n')}\n`
}
