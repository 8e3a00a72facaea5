// A worker with a pool of connections to PostgreSQL. It needs to know nothing of warmfork: a fork's connections are closed, the pool
// notices and makes new ones. With an agent the hooks below spare it that. For each `jobs N` on stdin it does N jobs, each a row of the table `jobs`, and prints what came of them.
import { readlinkSync } from 'node:fs'
import { createInterface } from 'node:readline'
import pg from 'pg'

function newPool() {
  const pool = new pg.Pool({
    connectionString: process.env.DATABASE_URL,
    max: 2,
    application_name: 'node',
    keepAlive: true,
  })
  // Without a listener the end of an idle connection would end the program: in a fork as at a restart of the database.
  pool.on('error', () => {})
  return pool
}

let pool = newPool()

/** Errors of a connection that has ended, as after a fork. */
const ENDED = /terminated unexpectedly|ECONNRESET|EPIPE|not queryable/

/** `process.pid` is read once, and so is the template's in a fork that has no agent. */
const pid = () => Number(readlinkSync('/proc/self'))

/**
 * A fork's first query may come before the pool has seen the end of its connections. No server has seen such a query, so it is made
 * again. One that was under way at the checkpoint is another matter: the template gets its answer, and it must not be made twice.
 */
async function query(text, values) {
  const sender = pid()
  for (let attempt = 1; ; attempt++) {
    try {
      return (await pool.query(text, values)).rows[0]
    } catch (error) {
      if (pid() !== sender) return undefined
      if (attempt > 2 || !ENDED.test(error.message)) throw error
      retries++
    }
  }
}

let done = 0
let retries = 0
async function job() {
  const n = ++done
  const row = await query(
    'INSERT INTO jobs (worker, n, backend) VALUES ($1, $2, pg_backend_pid()) RETURNING worker, n, backend, $3::text AS echo',
    [pid(), n, `${pid()}/${n}`],
  )
  if (!row) return undefined
  if (row.echo !== `${row.worker}/${n}` || row.n !== n)
    throw new Error(`job ${n} got the answer of another: ${row.echo}`)
  return row.backend
}

// Two connections are open before the checkpoint, and the template's are in use all along.
await Promise.all([job(), job()])
const inHand = new Set()
let busy
function work() {
  if (!process.argv.includes('--busy')) return
  busy = setInterval(() => {
    const one = job().catch((error) => console.error(error))
    inHand.add(one)
    one.then(() => inHand.delete(one))
  }, 20)
}
work()

// What a program with hooks does. In one that has warmfork among its dependencies: `import { worker } from 'warmfork/worker'`.
const { worker } = await import(process.env.WARMFORK_WORKER ?? 'warmfork/worker').catch(() => ({}))
worker?.beforeCheckpoint(async () => {
  clearInterval(busy)
  await Promise.all(inHand)
})
worker?.afterCheckpoint(work)
worker?.onFork(() => {
  pool = newPool()
})
console.log('ready')

for await (const line of createInterface({ input: process.stdin })) {
  clearInterval(busy)
  const results = await Promise.allSettled(Array.from({ length: Number(line.split(' ')[1]) }, job))
  const backends = new Set(results.flatMap((result) => (result.status === 'fulfilled' ? [result.value] : [])))
  const errors = results.flatMap((result) => (result.status === 'rejected' ? [String(result.reason)] : []))
  console.log(
    JSON.stringify({ pid: pid(), done: results.length - errors.length, backends: [...backends], errors, retries }),
  )
}
await pool.end()
