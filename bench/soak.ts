/**
 * Very many forks in a row, each of which must answer once, with its own id and what it was asked; and nothing may pile up.
 *
 *     npx tsx bench/soak.ts [FORKS] [--threads N] [--concurrency N] [--pool N]
 *
 * 40,000 forks by default: more than the 32,768 ids of a machine with the usual `kernel.pid_max`, so that they wrap. It prints
 * progress to stderr and one JSON object to stdout, and ends with status 1 where something was wrong.
 */
import { execFileSync } from 'node:child_process'
import { mkdirSync, mkdtempSync, readdirSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { Supervisor } from '../src/index.js'
import { descendants, pidMax, stat } from '../src/linux/proc.js'

const SOURCE = fileURLToPath(new URL('soak.c', import.meta.url))
/** What is started ahead and what the garbage collector has not seen yet settle in this time. */
const SETTLE_MS = 2_000
/** By then code is compiled and caches are filled: what grows after it grows for ever. */
const WARM_SHARE = 0.1
const LOOKS = 40

interface Look {
  forks: number
  descriptors: number
  processes: number
  rssMiB: number
  directories: number
  leases: number
}

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    threads: { type: 'string', default: '0' },
    concurrency: { type: 'string', default: '2' },
    pool: { type: 'string', default: '2' },
  },
})
const wanted = Number(positionals[0] ?? 40_000)
const threads = Number(values.threads)

/** A TypeScript loader has a process of its own. */
const others = new Set(descendants(process.pid))
const ours = () => descendants(process.pid).filter((pid) => !others.has(pid) && stat(pid)?.comm !== 'esbuild')

const directory = mkdtempSync(join(tmpdir(), 'warmfork-soak-'))
const program = join(directory, 'soak')
execFileSync('cc', ['-O2', '-pthread', '-o', program, SOURCE], { timeout: 60_000, stdio: 'inherit' })
const runtimeDirectory = join(directory, 'run')
mkdirSync(runtimeDirectory, { mode: 0o700 })

const supervisor = await Supervisor.start({
  command: [program, String(threads)],
  ready: { output: 'ready' },
  engine: 'criu',
  name: 'soak',
  store: join(directory, 'store'),
  runtimeDirectory,
  pool: { size: Number(values.pool) },
})

const failures: string[] = []
/** At which fork an id was used last. */
const lastUse = new Map<number, number>()
let shortestReuse = Number.POSITIVE_INFINITY
let started = 0
let done = 0
const looks: Look[] = []

/** One fork, from its claim to its end. */
async function one(number: number): Promise<void> {
  const child = await supervisor.fork()
  const last = lastUse.get(child.pid)
  if (last !== undefined) shortestReuse = Math.min(shortestReuse, number - last)
  lastUse.set(child.pid, number)
  child.stdin.end(`question-${number}\n`)
  const lines: string[] = []
  for await (const line of child.lines()) lines.push(line)
  const status = await child.exit
  const expected = `question-${number} ${child.pid} ${threads}`
  if (lines.length !== 1 || lines[0] !== expected)
    failures.push(`fork ${number}: ${JSON.stringify(lines)}, not ${expected}`)
  if (status.code !== 0) failures.push(`fork ${number}: ended with ${JSON.stringify(status)}`)
}

async function worker(): Promise<void> {
  while (started < wanted && failures.length < 20) {
    const number = started++
    try {
      await one(number)
    } catch (error) {
      failures.push(`fork ${number}: ${String(error)}`)
    }
    if (++done % Math.ceil(wanted / LOOKS) === 0) {
      const now = look()
      looks.push(now)
      process.stderr.write(`${JSON.stringify(now)}\n`)
    }
  }
}

function look(): Look {
  const list = (path: string): string[] => {
    try {
      return readdirSync(path)
    } catch {
      return []
    }
  }
  const derived = list('/dev/shm').filter((name) => name.startsWith(`warmfork-${process.pid}-`))
  return {
    forks: done,
    descriptors: list('/proc/self/fd').length,
    processes: ours().length,
    rssMiB: Math.round(process.memoryUsage.rss() / 2 ** 20),
    directories: derived.reduce((sum, name) => sum + list(join('/dev/shm', name)).length, 0),
    leases: list(join(directory, 'store', 'soak', 'generations', '1', 'leases')).length,
  }
}

const startedAt = performance.now()
await Promise.all(Array.from({ length: Number(values.concurrency) }, worker))
const seconds = (performance.now() - startedAt) / 1000
await new Promise((resolve) => setTimeout(resolve, SETTLE_MS))
const atEnd = look()
const { forks } = await supervisor.stats()
const warnings = supervisor.warnings.map(({ kind, message }) => `${kind}: ${message}`)
await supervisor.stop()
const left = [...ours().map((pid) => `${stat(pid)?.comm} ${stat(pid)?.state}`), ...readdirSync(runtimeDirectory)]
rmSync(directory, { recursive: true })

const warm = looks.filter((each) => each.forks >= wanted * WARM_SHARE)
const most = (key: keyof Look, from: readonly Look[]) => Math.max(...from.map((each) => each[key]))
const half = Math.ceil(warm.length / 2)
/** Compares halves, not ends: what swings with the garbage collector evens out. */
const grown = (key: keyof Look) => most(key, warm.slice(half)) - most(key, warm.slice(0, half))
const growth = {
  descriptors: grown('descriptors'),
  processes: grown('processes'),
  rssMiB: grown('rssMiB'),
  leases: grown('leases'),
}
const leaks = [
  // A fork that is under way has some of each.
  ...(growth.descriptors > 15 ? [`descriptors grew by ${growth.descriptors}`] : []),
  ...(growth.processes > 10 ? [`processes grew by ${growth.processes}`] : []),
  ...(growth.leases > 10 ? [`leases grew by ${growth.leases}`] : []),
  ...(growth.rssMiB > 30 ? [`the supervisor grew by ${growth.rssMiB} MiB`] : []),
  ...(left.length > 0 ? [`left behind: ${left.join(', ')}`] : []),
]
const result = {
  forks: done,
  threads,
  failures,
  warnings,
  leaks,
  seconds: Math.round(seconds),
  forksPerSecond: Math.round(done / seconds),
  pidMax: pidMax(),
  distinctIds: lastUse.size,
  /** Forks between two uses of one id; null where none was used twice. */
  shortestReuse: Number.isFinite(shortestReuse) ? shortestReuse : null,
  fromPool: forks.fromPool,
  direct: forks.direct,
  failed: forks.failed,
  growth,
  atEnd,
}
process.stdout.write(`${JSON.stringify(result)}\n`)
process.exitCode = failures.length > 0 || leaks.length > 0 ? 1 : 0
