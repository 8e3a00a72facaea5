/**
 * Measures what a fork is worth, everything side by side in one run: cold start, stock restore, warmfork's fork and claim,
 * fork(2). The demo prints it as a table; the bench as JSON. Medians throughout.
 */
import { spawn } from 'node:child_process'
import { mkdtempSync, rmSync } from 'node:fs'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { setTimeout as sleep } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import type { Child } from '../child.js'
import { defaultRoot } from '../generations/directories.js'
import { Supervisor } from '../supervisor.js'
import { StockRestore } from './stock.js'
import { Yardstick } from './yardstick.js'

/** A program that writes a line `ready` when it is booted, answers lines on stdin, and ends when stdin does. */
export interface Program {
  command: [string, ...string[]]
  env?: Record<string, string>
  /** A program whose first line of output ends a cold start, where that is another than `command`. */
  cold?: [string, ...string[]]
  /**
   * How long the template is left alone between its readiness and the checkpoint, in milliseconds: compilers that are at work
   * then go on in every child. @default 0
   */
  settleMs?: number
}

export interface FiguresOptions {
  program: Program
  /** Of each figure. */
  rounds: number
  coldRounds: number
  /** How many forks the throughput is measured with, at each concurrency; 0 leaves it out. */
  throughputForks: number
  onStep?: (step: string) => void
}

/** Milliseconds and MiB; null where it could not be measured here. */
export interface Figures {
  templateRssMiB: number
  coldMs: number
  stockRestoreMs: number
  forkMs: number
  claimMs: number
  claimFirstByteMs: number
  fork2Ms: number | null
  fork2ThpMs: number | null
  childPrivateMiB: number
  childPssMiB: number
  forksPerSecond: number | null
  bestConcurrency: number | null
  checkpointMs: number
  /** From the start of the supervisor to its first child. */
  startMs: number
  memory: string
}

const MIB = 1024 * 1024
const CHILDREN_ALIVE = 8
const CONCURRENCIES = [1, 2, 3, 4]
/** So that what one measurement leaves behind (exits, refills) does not fall into the next. */
const PAUSE_MS = 40

/** The demo's own Node program of a given size. It runs from the built package, also when this file runs from source. */
export function nodeProgram(mebibytes: number, node = process.execPath): Program {
  const script = fileURLToPath(new URL('../../dist/demo/template.js', import.meta.url))
  return { command: [node, script, String(mebibytes)] }
}

export async function measureFigures(options: FiguresOptions): Promise<Figures> {
  const { program, rounds } = options
  const step = options.onStep ?? (() => {})
  const env = { ...(process.env as Record<string, string>), ...program.env }
  const root = mkdtempSync(join(scratchRoot(), 'warmfork-figures-'))
  const yardsticks: (Yardstick | undefined)[] = []
  let supervisor: Supervisor | undefined
  let stock: StockRestore | undefined
  try {
    step('cold starts')
    const cold: number[] = []
    for (let i = 0; i < options.coldRounds; i++) cold.push(await coldStart(program.cold ?? program.command, env))
    step('boot, checkpoint')
    const began = performance.now()
    supervisor = await Supervisor.start({
      command: program.command,
      env,
      name: 'figures',
      engine: 'criu',
      store: join(root, 'store'),
      ready: { output: /^ready$/m },
      warmup: () => sleep(program.settleMs ?? 0),
      pool: { size: 0 },
      template: { afterCheckpoint: 'end' },
    })
    const generation = supervisor.generations().at(-1)!
    const first = await supervisor.fork()
    await answer(first)
    const startMs = performance.now() - began
    await first.end()
    const templateRssMiB = generation.rssBytes / MIB

    step('dump for the stock restore')
    stock = await StockRestore.prepare(program.command, env, join(root, 'stock'))
    yardsticks.push(await Yardstick.start(templateRssMiB, 'small'), await Yardstick.start(templateRssMiB, 'huge'))

    step(`${rounds} rounds: stock restore, fork, fork(2)`)
    const stocks: number[] = []
    const forks: number[] = []
    const fork2 = [[], []] as [number[], number[]]
    for (let i = 0; i < rounds; i++) {
      stocks.push(await stock.measure())
      await sleep(PAUSE_MS)
      forks.push(await forkOnce(supervisor))
      await sleep(PAUSE_MS)
      for (const [k, yardstick] of yardsticks.entries()) if (yardstick) fork2[k]!.push(await yardstick.measure())
      await sleep(PAUSE_MS)
    }
    for (const yardstick of yardsticks.splice(0)) yardstick?.end()

    step(`${rounds} rounds: claim of a parked child`)
    supervisor.resizePool(1)
    const claims: number[] = []
    const firstBytes: number[] = []
    for (let i = 0; i < rounds; i++) {
      await parked(supervisor, 1)
      const before = performance.now()
      const child = await supervisor.fork()
      claims.push(performance.now() - before)
      await answer(child)
      firstBytes.push(performance.now() - before)
      await child.end({ graceMs: 0 })
      await sleep(PAUSE_MS)
    }
    supervisor.resizePool(0)

    step(`${CHILDREN_ALIVE} children alive`)
    const alive: Child[] = []
    for (let i = 0; i < CHILDREN_ALIVE; i++) {
      const child = await supervisor.fork()
      await answer(child)
      alive.push(child)
    }
    const uses = await Promise.all(alive.map((child) => child.stats()))
    for (const child of alive) await child.end({ graceMs: 0 })

    const throughput =
      options.throughputForks > 0 ? await bestThroughput(supervisor, options.throughputForks, step) : undefined
    return {
      templateRssMiB: round(templateRssMiB),
      coldMs: median(cold),
      stockRestoreMs: median(stocks),
      forkMs: median(forks),
      claimMs: median(claims),
      claimFirstByteMs: median(firstBytes),
      fork2Ms: fork2[0].length > 0 ? median(fork2[0]) : null,
      fork2ThpMs: fork2[1].length > 0 ? median(fork2[1]) : null,
      childPrivateMiB: median(uses.map(({ privateBytes }) => privateBytes / MIB)),
      childPssMiB: median(uses.map(({ pssBytes }) => pssBytes / MIB)),
      forksPerSecond: throughput ? round(throughput.forksPerSecond) : null,
      bestConcurrency: throughput?.concurrency ?? null,
      checkpointMs: round(generation.checkpointMs),
      startMs: round(startMs),
      memory: generation.memory,
    }
  } finally {
    for (const yardstick of yardsticks) yardstick?.end()
    await supervisor?.stop({ graceMs: 0 })
    stock?.remove()
    rmSync(root, { recursive: true, force: true })
  }
}

/** Where generations would lie, too: the figures depend on the file system. */
function scratchRoot(): string {
  const root = join(defaultRoot(), '..')
  return root
}

async function coldStart([file, ...args]: [string, ...string[]], env: Record<string, string>): Promise<number> {
  const before = performance.now()
  const child = spawn(file, args, { env, stdio: ['pipe', 'pipe', 'ignore'] })
  const ended = new Promise<void>((resolve) => child.once('close', () => resolve()))
  child.stdin.on('error', () => {})
  try {
    return await new Promise<number>((resolve, reject) => {
      child.once('error', reject)
      child.once('exit', (code) => reject(new Error(`${file} ended with ${code} before its first line`)))
      createInterface({ input: child.stdout }).once('line', () => resolve(performance.now() - before))
    })
  } finally {
    child.kill('SIGKILL')
    await ended
  }
}

/** From `fork()` with an empty pool to the child's first byte. */
async function forkOnce(supervisor: Supervisor): Promise<number> {
  const before = performance.now()
  const child = await supervisor.fork()
  await answer(child)
  const elapsed = performance.now() - before
  await child.end({ graceMs: 0 })
  return elapsed
}

function answer(child: Child): Promise<void> {
  return new Promise((resolve, reject) => {
    child.stdout.once('data', () => resolve())
    child.once('exit', ({ code, signal }) =>
      reject(new Error(`the child ended with ${signal ?? code} before its answer`)),
    )
    child.stdin.write('1\n')
  })
}

async function parked(supervisor: Supervisor, count: number): Promise<void> {
  for (let i = 0; supervisor.pool.parked.length < count; i++) {
    if (i > 5_000) throw new Error('the pool was not filled within 10 s')
    await sleep(2)
  }
  await sleep(PAUSE_MS)
}

async function bestThroughput(supervisor: Supervisor, forks: number, step: (text: string) => void) {
  let best = { concurrency: 0, forksPerSecond: 0 }
  for (const concurrency of CONCURRENCIES) {
    step(`${forks} forks, ${concurrency} at once`)
    let left = forks
    const work = async () => {
      while (left-- > 0) {
        const child = await supervisor.fork()
        const answered = answer(child)
        child.stdin.end()
        await answered
        await child.exit
      }
    }
    const before = performance.now()
    await Promise.all(Array.from({ length: concurrency }, work))
    const forksPerSecond = (forks * 1000) / (performance.now() - before)
    if (forksPerSecond > best.forksPerSecond) best = { concurrency, forksPerSecond }
  }
  return best
}

function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b)
  const middle = sorted.length >> 1
  return round(sorted.length % 2 === 1 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2)
}

const round = (value: number) => Math.round(value * 100) / 100
