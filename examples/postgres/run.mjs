// `node examples/postgres/run.mjs [node|node-hooks|python|python-hooks]`: a worker with a pool of connections to a PostgreSQL is booted once and forked eight
// times. Each fork does twenty jobs; the template is at work all the while. `--json` prints what came of it as JSON.
import { execFileSync } from 'node:child_process'
import { existsSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { Supervisor } from 'warmfork'
import { startCluster } from './cluster.mjs'

const app = fileURLToPath(new URL('app/', import.meta.url))
const CHILDREN = 8
const JOBS = 20

if (!existsSync(`${app}node_modules/pg`)) {
  console.error('installing the dependencies of the application …')
  execFileSync('npm', ['ci', '--no-audit', '--no-fund', '--loglevel=error'], {
    cwd: app,
    stdio: ['ignore', 2, 2],
    timeout: 600_000,
  })
}

async function lineOf(child) {
  for await (const line of child.lines()) return JSON.parse(line)
  throw new Error(`child ${child.pid} ended without an answer`)
}

const cluster = await startCluster()
try {
  const programs = {
    // The one by TCP, the other by the server's Unix socket.
    node: { command: [process.execPath, `${app}worker.mjs`, '--busy'], url: cluster.url, agent: false },
    // With an agent, whose hooks stop the work before the checkpoint and drop the pool in each fork.
    'node-hooks': {
      command: [process.execPath, `${app}worker.mjs`, '--busy'],
      url: cluster.url,
      agent: true,
      env: { WARMFORK_WORKER: import.meta.resolve('warmfork/worker') },
    },
    python: { command: ['/usr/bin/python3', `${app}worker.py`, '--busy'], url: cluster.socketUrl, agent: false },
    'python-hooks': { command: ['/usr/bin/python3', `${app}worker.py`, '--busy'], url: cluster.socketUrl, agent: true },
  }
  const asked = process.argv.slice(2).filter((word) => word in programs)
  const found = {}
  for (const name of asked.length > 0 ? asked : Object.keys(programs)) {
    const { command, url, agent, env } = programs[name]
    cluster.sql('TRUNCATE jobs')
    const supervisor = await Supervisor.start({
      command,
      agent,
      env: { ...process.env, ...env, DATABASE_URL: url },
      ready: { output: 'ready' },
      pool: { size: 2 },
    })
    const template = supervisor.template.pid
    const atTheFork = cluster.sql(`SELECT max(n) FROM jobs WHERE worker = ${template}`)
    const children = await Promise.all(Array.from({ length: CHILDREN }, () => supervisor.fork()))
    const answers = await Promise.all(
      children.map((child) => {
        child.stdin.end(`jobs ${JOBS}\n`)
        return lineOf(child)
      }),
    )
    await Promise.all(children.map((child) => child.exit))
    await new Promise((resolve) => setTimeout(resolve, 200))
    const rows = cluster
      .sql('SELECT worker, n, backend FROM jobs ORDER BY worker, n')
      .split('\n')
      .map((row) => row.split('|').map(Number))
    found[name] = {
      engine: supervisor.engine,
      template: { pid: template, jobsAtTheFork: Number(atTheFork), ...summary(rows, template) },
      children: answers.map((answer) => ({ ...answer, ...summary(rows, answer.pid) })),
      warnings: supervisor.warnings.map(({ message }) => message),
    }
    await supervisor.stop()
  }
  if (process.argv.includes('--json')) console.log(JSON.stringify(found, null, 2))
  else print(found)
} finally {
  await cluster.stop()
}

/** What the database knows of a worker: its jobs, whether one is missing between the first and the last, and by which connections they came. */
function summary(rows, pid) {
  const own = rows.filter(([worker]) => worker === pid)
  const numbers = own.map(([, n]) => n)
  return {
    rows: own.length,
    gaps: numbers.slice(1).filter((n, i) => n !== numbers[i] + 1).length,
    connections: [...new Set(own.map(([, , backend]) => backend))],
  }
}

function print(found) {
  for (const [name, { template, children }] of Object.entries(found)) {
    console.log(
      `${name}: the template (${template.pid}) did ${template.rows} jobs on connections ${template.connections.join(', ')}`,
    )
    for (const { pid, done, connections } of children) {
      console.log(`  fork ${pid}: ${done} jobs on connections ${connections.join(', ')}`)
    }
  }
}
