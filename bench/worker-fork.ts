/**
 * What it costs a program to fork itself, beside `child_process.fork` and stock CRIU, all in one run.
 *
 *     npm run -s bench -- worker-fork [--rss 100] [--rounds 11] [--json]
 */
import { fork as forkProcess } from 'node:child_process'
import { mkdtempSync, rmSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import type { Child } from '../src/child.js'
import { StockRestore } from '../src/demo/stock.js'
import { defaultRoot } from '../src/generations/directories.js'
import { Supervisor } from '../src/supervisor.js'

const APP = fileURLToPath(new URL('worker-app.mjs', import.meta.url))
/** So that what one measurement leaves behind does not fall into the next. */
const PAUSE_MS = 60
const WARM_UP = 5

type Line = { line: string; pauseMs?: number }

export async function benchWorkerFork(args: readonly string[]): Promise<void> {
  const { values } = parseArgs({
    args: [...args],
    options: {
      rss: { type: 'string', default: '100' },
      rounds: { type: 'string', default: '11' },
      json: { type: 'boolean', default: false },
    },
  })
  const rounds = Number(values.rounds)
  const command: [string, ...string[]] = [process.execPath, APP, values.rss]
  const root = mkdtempSync(join(defaultRoot(), '..', 'warmfork-worker-fork-'))
  try {
    const figures = {
      ...(await ofForks(command, join(root, 'forks'), rounds)),
      ...(await ofFirstForks(command, join(root, 'first'), 5)),
      agentOverheadMs: await agentOverhead(command, root, rounds),
      stockMs: await stock(command, join(root, 'stock'), rounds),
      childProcessForkMs: await childProcessFork(values.rss, rounds),
    }
    process.stdout.write(values.json ? `${JSON.stringify(figures)}\n` : table(figures))
  } finally {
    rmSync(root, { recursive: true, force: true })
  }
}

const start = (command: readonly [string, ...string[]], store: string, agent = true) =>
  Supervisor.start({
    command,
    store,
    engine: 'criu',
    name: `worker-fork-${agent}`,
    agent,
    ready: { output: 'ready' },
    pool: { size: 0 },
  })

/** The forks of a process that is a fork itself. */
async function ofForks(command: readonly [string, ...string[]], store: string, rounds: number) {
  await using supervisor = await start(command, store)
  const child = await supervisor.fork()
  await child.ready
  const lines = linesOf(child)
  const forks: number[] = []
  const pauses: number[] = []
  const again: number[] = []
  // A supervisor runs for long: its own first calls, not compiled yet, say little.
  for (let i = -WARM_UP; i < rounds; i++) {
    const { ms, pauseMs } = await forkOnce(child, lines, 'fork')
    if (i < 0) continue
    forks.push(ms)
    pauses.push(pauseMs!)
    await sleep(PAUSE_MS)
  }
  child.stdin.write('keep\n')
  await lines.next()
  for (let i = 0; i < rounds; i++) {
    again.push((await forkOnce(child, lines, 'again')).ms)
    await sleep(PAUSE_MS)
  }
  child.stdin.write('drop\n')
  return { forkMs: median(forks), parentPauseMs: median(pauses), nextForkMs: median(again) }
}

/** The first fork of a process that was booted: all of its memory is written. */
async function ofFirstForks(command: readonly [string, ...string[]], store: string, rounds: number) {
  const forks: number[] = []
  const pauses: number[] = []
  for (let i = 0; i < rounds; i++) {
    // Its template is checkpointed once more than is asked for here; the engine looks at it as at a process that was never forked.
    await using supervisor = await start(command, `${store}-${i}`)
    const { pid } = supervisor.template!
    const heard: Line[] = []
    let text = ''
    let wake = () => {}
    supervisor.on('templateOutput', (_, chunk) => {
      text += chunk
      for (let end = text.indexOf('\n'); end >= 0; end = text.indexOf('\n')) {
        heard.push(JSON.parse(text.slice(0, end)))
        text = text.slice(end + 1)
      }
      wake()
    })
    const before = performance.now()
    // Its stdin is the supervisor's: the program is told by a signal.
    process.kill(pid, 'SIGUSR2')
    let ms = 0
    while (!(ms > 0 && heard.some(({ line }) => line === 'source'))) {
      if (ms === 0 && heard.some(({ line }) => line === 'fork')) ms = performance.now() - before
      else await new Promise<void>((resolve) => (wake = resolve))
    }
    forks.push(ms)
    pauses.push(heard.find(({ line }) => line === 'source')!.pauseMs!)
  }
  return { firstForkMs: median(forks), firstParentPauseMs: median(pauses) }
}

async function forkOnce(child: Child, lines: AsyncIterator<Line>, command: string) {
  const before = performance.now()
  child.stdin.write(`${command}\n`)
  let ms = 0
  let pauseMs: number | undefined
  for (let both = 0; both < 2; both++) {
    const { value } = await lines.next()
    if (value.line === 'fork') ms = performance.now() - before
    else pauseMs = value.pauseMs
  }
  return { ms, pauseMs }
}

async function* linesOf(child: Child): AsyncGenerator<Line, never> {
  for await (const line of child.lines()) yield JSON.parse(line)
  throw new Error('the program has ended')
}

/** From a supervisor's fork to its first answer, with and without the agent, in turns. */
async function agentOverhead(command: readonly [string, ...string[]], root: string, rounds: number): Promise<number> {
  await using withAgent = await start(command, join(root, 'with'))
  await using without = await start(command, join(root, 'without'), false)
  const times = { with: [] as number[], without: [] as number[] }
  for (let i = 0; i < rounds * 2; i++) {
    times.with.push(await firstAnswer(withAgent))
    await sleep(PAUSE_MS)
    times.without.push(await firstAnswer(without))
    await sleep(PAUSE_MS)
  }
  return round(median(times.with) - median(times.without))
}

async function firstAnswer(supervisor: Supervisor): Promise<number> {
  const before = performance.now()
  const child = await supervisor.fork()
  const answered = new Promise((resolve) => child.stdout.once('data', resolve))
  child.stdin.write('1\n')
  await answered
  const ms = performance.now() - before
  await child.end({ graceMs: 0 })
  return ms
}

/** A dump and a restore by stock criu; the copy cannot live beside its source, since it has its ids. */
async function stock(command: readonly string[], directory: string, rounds: number): Promise<number> {
  const restore = await StockRestore.prepare(command, process.env as Record<string, string>, directory, /"ready"/)
  try {
    const times: number[] = []
    for (let i = 0; i < rounds; i++) times.push(await restore.measure())
    return round(restore.dumpMs + median(times))
  } finally {
    restore.remove()
  }
}

async function childProcessFork(rss: string, rounds: number): Promise<number> {
  const times: number[] = []
  for (let i = 0; i < rounds; i++) {
    const before = performance.now()
    const child = forkProcess(APP, [rss], { stdio: ['pipe', 'ignore', 'inherit', 'ipc'] })
    const exited = new Promise((resolve) => child.once('exit', resolve))
    try {
      await new Promise<void>((resolve, reject) => {
        child.once('message', () => resolve())
        child.once('exit', () => reject(new Error('the program ended before it was ready')))
      })
      times.push(performance.now() - before)
    } finally {
      child.kill('SIGKILL')
      await exited
    }
  }
  return median(times)
}

function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b)
  const middle = sorted.length >> 1
  return round(sorted.length % 2 === 1 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2)
}

const round = (value: number) => Math.round(value * 100) / 100

function table(figures: Readonly<Record<string, number>>): string {
  return Object.entries(figures)
    .map(([name, ms]) => `${name.padEnd(20)} ${ms.toFixed(1).padStart(8)} ms\n`)
    .join('')
}
