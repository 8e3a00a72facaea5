/**
 * What reforks bring: latency of a JRuby and of a Node application, cold, as children of an unwarmed template, as children of the
 * generation that the policy `auto` settled on, and after 20,000 requests.
 *
 *     npm run -s bench -- warmth [--only jruby|node] [--requests 20000] [--curves FILE] [--json]
 *
 * `--curves` writes latency and memory of a child of each generation, for bench/plots.
 */
import { spawn } from 'node:child_process'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { Agent, get } from 'node:http'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { defaultRoot } from '../src/generations/directories.js'
import { Supervisor } from '../src/supervisor.js'

const FIRST = 50
const CURVE = 500
const CHILDREN = 3

/** A child's first requests. */
export interface Curve {
  readonly generation: number
  /** Milliseconds of each request. */
  readonly latencies: readonly number[]
  readonly privateMiB: number
}

interface Figures {
  readonly coldFirstMs: number
  readonly unwarmedMs: number
  readonly settledMs: number
  readonly longRunningMs: number
  readonly reforks: number
  /** Requests of the busiest child at each refork. */
  readonly reforkedAfter: readonly string[]
}

export async function benchWarmth(args: readonly string[]): Promise<void> {
  const { values } = parseArgs({
    args: [...args],
    options: {
      only: { type: 'string' },
      requests: { type: 'string', default: '20000' },
      curves: { type: 'string' },
      json: { type: 'boolean', default: false },
    },
  })
  const figures: Record<string, unknown> = {}
  const curves: Record<string, readonly Curve[]> = {}
  for (const runtime of ['jruby', 'node'] as const) {
    if (values.only !== undefined && values.only !== runtime) continue
    const command = await commandOf(runtime)
    process.stderr.write(`${runtime}: a process that serves ${values.requests} requests\n`)
    const alone = await longRunning(command, Number(values.requests))
    process.stderr.write(`${runtime}: reforks by themselves\n`)
    const { curves: found, ...reforked } = await reforking(command, Number(values.requests), runtime === 'jruby')
    for (const [key, value] of Object.entries({ ...alone, ...reforked } satisfies Figures))
      figures[`${runtime}_${key}`] = value
    curves[runtime] = found
  }
  if (values.curves) writeFileSync(values.curves, JSON.stringify(curves))
  process.stdout.write(values.json ? `${JSON.stringify(figures)}\n` : table(figures))
}

async function commandOf(runtime: 'jruby' | 'node'): Promise<[string, ...string[]]> {
  const path = (name: string) => fileURLToPath(new URL(`warmth/${name}`, import.meta.url))
  if (runtime === 'node') return [process.execPath, path('app.mjs')]
  const setup = new URL('../examples/jruby/setup.mjs', import.meta.url).href
  const { jruby } = (await import(setup)) as { jruby: () => string }
  return [jruby(), path('app.rb')]
}

/** One process without warmfork: its first request, and what requests take once it has served many. */
async function longRunning(command: readonly [string, ...string[]], requests: number) {
  const firsts: number[] = []
  for (let i = 0; ; i++) {
    const child = spawn(command[0], command.slice(1), { stdio: ['ignore', 'pipe', 'inherit'] })
    const client = new Client(await portOf(child.stdout))
    firsts.push((await client.ask()).ms)
    let latencies: number[] = []
    if (i === CHILDREN - 1) for (let n = 0; n < requests; n++) latencies.push((await client.ask()).ms)
    client.close()
    child.kill('SIGKILL')
    await new Promise((resolve) => child.once('exit', resolve))
    latencies = latencies.slice(-1_000)
    if (i === CHILDREN - 1) return { coldFirstMs: round(median(firsts)), longRunningMs: round(median(latencies)) }
  }
}

/**
 * The same under a supervisor with one worker and the policy `auto`, until it has settled. Where `counted`, the requests are counted here:
 * JRuby's agent counts those of Rack servers, and this is none.
 */
async function reforking(command: readonly [string, ...string[]], requests: number, counted: boolean) {
  const root = mkdtempSync(join(defaultRoot(), '..', 'warmfork-warmth-'))
  try {
    let port = 0
    await using supervisor = await Supervisor.start(
      {
        command: [...command] as [string, ...string[]],
        cwd: root,
        name: 'warmth',
        store: join(root, 'store'),
        engine: 'criu',
        ready: { output: 'serving' },
        template: { afterCheckpoint: 'end' },
        workers: 1,
        pool: { size: 0 },
        keep: 10,
        refork: 'auto',
      },
      {
        onCreate: (created) =>
          created.on('templateOutput', (_, chunk) => {
            port = Number(/serving on (\d+)/.exec(String(chunk))?.[1] ?? port)
          }),
      },
    )
    const reforkedAfter: string[] = []
    supervisor.on('refork', ({ generation }) => reforkedAfter.push(generation.reason ?? ''))
    supervisor.on('reforkFailed', (error) => process.stderr.write(`${error}\n`))
    const unwarmed = (await curvesOf(supervisor, port, CHILDREN, FIRST)).map(({ latencies }) => median(latencies))
    const client = new Client(port)
    let isReplaced = false
    supervisor.on('refork', () => {
      isReplaced = true
    })
    // Twice as many: what is settled stays so.
    for (let i = 0; i < 2 * requests; i++) {
      // A worker with a connection that is never quiet would serve on beside the next one for half a minute.
      if (isReplaced) {
        isReplaced = false
        client.close()
        await settledDown(supervisor)
        await sleep(500)
      }
      const { ms, pid } = await client.ask()
      if (counted) supervisor.workers.workers.find((one) => one.pid === pid)?.countRequests(1, ms)
    }
    client.close()
    const reforks = supervisor.generation - 1
    const settled = (await curvesOf(supervisor, port, CHILDREN, FIRST)).map(({ latencies }) => median(latencies))
    const curves: Curve[] = []
    for (let generation = 1; generation <= reforks + 1; generation++) {
      await supervisor.pin(generation)
      await settledDown(supervisor)
      curves.push(...(await curvesOf(supervisor, port, 1, CURVE)))
    }
    return { unwarmedMs: round(median(unwarmed)), settledMs: round(median(settled)), reforks, reforkedAfter, curves }
  } finally {
    rmSync(root, { recursive: true, force: true })
  }
}

/** New workers of the generation in use, one after the other, and their first requests. */
async function curvesOf(supervisor: Supervisor, port: number, children: number, requests: number): Promise<Curve[]> {
  const curves: Curve[] = []
  for (let i = 0; i < children; i++) {
    const [old] = supervisor.workers.workers
    process.kill(old!.pid, 'SIGKILL')
    await old!.exit
    while (!supervisor.workers.workers[0] || supervisor.workers.workers[0].pid === old!.pid) await sleep(10)
    const [worker] = supervisor.workers.workers
    const client = new Client(port)
    const latencies: number[] = []
    for (let n = 0; n < requests; n++) latencies.push((await client.ask()).ms)
    client.close()
    const { privateBytes } = await worker!.stats()
    curves.push({ generation: worker!.generation, latencies, privateMiB: round(privateBytes / 2 ** 20) })
    // One that dies at once is replaced later and later.
    await sleep(1_200)
  }
  return curves
}

async function settledDown(supervisor: Supervisor): Promise<void> {
  while (supervisor.workers.outdated > 0 || supervisor.workers.workers.length === 0) await sleep(20)
}

/** A client that has one connection at a time, and asks again on another where its worker is replaced. */
class Client {
  #agent = new Agent({ keepAlive: true, maxSockets: 1 })
  #next = 1

  constructor(readonly port: number) {}

  async ask(): Promise<{ ms: number; pid: number }> {
    const id = this.#next++
    for (let attempt = 1; ; attempt++) {
      const before = performance.now()
      try {
        const pid = await this.#get(id)
        return { ms: performance.now() - before, pid }
      } catch (error) {
        if (attempt === 50) throw error
        await sleep(20)
      }
    }
  }

  /** Closes its connection; a later request opens another. */
  close(): void {
    this.#agent.destroy()
  }

  #get(id: number): Promise<number> {
    return new Promise((resolve, reject) => {
      get({ host: '127.0.0.1', port: this.port, path: `/${id}`, agent: this.#agent }, (response) => {
        response.resume()
        response.on('end', () => resolve(Number(response.headers['x-pid'])))
        response.on('error', reject)
      }).on('error', reject)
    })
  }
}

function portOf(output: NodeJS.ReadableStream): Promise<number> {
  return new Promise((resolve) => {
    let text = ''
    output.on('data', (chunk) => {
      text += chunk
      const port = /serving on (\d+)/.exec(text)?.[1]
      if (port) resolve(Number(port))
    })
  })
}

function median(values: readonly number[]): number {
  return [...values].sort((a, b) => a - b)[Math.floor((values.length - 1) / 2)] ?? Number.NaN
}

const round = (value: number) => Math.round(value * 100) / 100

function table(figures: Record<string, unknown>): string {
  return `${Object.entries(figures)
    .map(([key, value]) => `${key.padEnd(24)} ${Array.isArray(value) ? value.join('; ') : value}`)
    .join('\n')}\n`
}
