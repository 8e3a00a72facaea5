/**
 * Reforks in a row under load: `npx tsx bench/refork-soak.ts [count, default 200]`. Four clients ask two workers without a pause; each
 * request is counted by the server, in a file. At the end: requests that were served twice or got no answer, and what disk, memory,
 * descriptors and mounts became.
 */
import { execFileSync } from 'node:child_process'
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs'
import { Agent, get } from 'node:http'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { Supervisor } from '../src/index.js'

const count = Number(process.argv[2] ?? 200)
const program = fileURLToPath(new URL('../test/fixtures/programs/refork-server.mjs', import.meta.url))
const directory = mkdtempSync(join(tmpdir(), 'warmfork-refork-soak-'))
const log = join(directory, 'log')

let port = 0
const supervisor = await Supervisor.start(
  {
    command: [process.execPath, program, log],
    name: 'soak',
    store: join(directory, 'store'),
    runtimeDirectory: join(directory, 'run'),
    ready: { output: 'serving' },
    template: { afterCheckpoint: 'end' },
    workers: { count: 2, replaceAtOnce: 1 },
    pool: { size: 1 },
    keep: 1,
  },
  {
    onCreate: (created) =>
      created.on('templateOutput', (_, chunk) => {
        port = Number(/serving on (\d+)/.exec(String(chunk))?.[1] ?? port)
      }),
  },
)
supervisor.on('warning', ({ kind, message }) => console.error(`${kind}: ${message}`))

const request = (path: string, agent: Agent) =>
  new Promise<void>((resolve, reject) => {
    get({ host: '127.0.0.1', port, path, agent }, (response) => {
      response.resume()
      response.on('end', resolve)
      response.on('error', reject)
    }).on('error', reject)
  })

let isOver = false
let asked = 0
let unanswered = 0
const clients = Array.from({ length: 4 }, () => new Agent({ keepAlive: true, maxSockets: 1 }))
const load = clients.map(async (agent) => {
  while (!isOver) {
    await request(`/grow?id=r${asked++}`, agent).catch(() => unanswered++)
    await sleep(5)
  }
})

const state = () => ({
  generation: supervisor.generation,
  diskMiB: Number(execFileSync('du', ['-sk', join(directory, 'store')], { encoding: 'utf8' }).split('\t')[0]) / 1024,
  generations: readdirSync(join(directory, 'store', 'soak', 'generations')).length,
  rssMiB: Math.round(process.memoryUsage().rss / 2 ** 20),
  descriptors: readdirSync('/proc/self/fd').length,
  mounts: readFileSync('/proc/self/mountinfo', 'utf8').split('\n').length,
  children: supervisor.children.length,
})

const standstills: number[] = []
supervisor.on('refork', ({ standstillMs }) => standstills.push(standstillMs))
let failed = 0
const startedAt = performance.now()
for (let i = 0; i < count; i++) {
  await supervisor.refork().catch(() => failed++)
  for (const until = Date.now() + 30_000; supervisor.workers.outdated > 0 && Date.now() < until; ) await sleep(10)
  if (i % Math.ceil(count / 10) === 0) console.log(JSON.stringify(state()))
}
const seconds = (performance.now() - startedAt) / 1000
isOver = true
await Promise.all(load)
for (const agent of clients) agent.destroy()
await sleep(1_000)
const last = state()
await supervisor.stop()

const served = readFileSync(log, 'utf8')
  .split('\n')
  .flatMap((line) => /^request \d+ (r\d+)$/.exec(line)?.[1] ?? [])
const median = standstills.sort((a, b) => a - b)[Math.floor(standstills.length / 2)]
console.log(
  JSON.stringify({
    reforks: count,
    failed,
    seconds: Math.round(seconds),
    standstillMs: median,
    asked,
    servedTwice: served.length - new Set(served).size,
    unanswered,
    ...last,
  }),
)
rmSync(directory, { recursive: true })
