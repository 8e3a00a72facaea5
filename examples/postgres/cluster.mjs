// A PostgreSQL server of its own in a temporary directory, which is gone when it is stopped. Debian's package is installed where it is
// missing and the right to is there; a server of the machine's is left alone. This file knows nothing of warmfork.
import { execFileSync, spawn } from 'node:child_process'
import { once } from 'node:events'
import { chownSync, existsSync, mkdtempSync, readdirSync, rmSync } from 'node:fs'
import { createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

const START_TIMEOUT_MS = 60_000

/** Servers refuse to run as root; Debian's package brings a user for them. */
const asRoot = process.getuid?.() === 0

function apt(...args) {
  const env = { ...process.env, DEBIAN_FRONTEND: 'noninteractive' }
  execFileSync('apt-get', ['-qq', '-o', 'DPkg::Lock::Timeout=300', ...args], {
    stdio: ['ignore', 'ignore', 2],
    timeout: 900_000,
    env,
  })
}

/** The directory of the newest server's programs. */
function binaries() {
  const root = '/usr/lib/postgresql'
  const versions = existsSync(root) ? readdirSync(root).map(Number).filter(Number.isFinite) : []
  const found = versions.sort((a, b) => b - a).map((version) => join(root, String(version), 'bin'))
  return found.find((directory) => existsSync(join(directory, 'initdb')))
}

/** Installs what is missing: the server, and psycopg2 for Debian's Python. */
export function setUp() {
  const missing = [
    ...(binaries() ? [] : ['postgresql']),
    ...(existsSync('/usr/lib/python3/dist-packages/psycopg2') ? [] : ['python3', 'python3-psycopg2']),
  ]
  if (missing.length === 0) return
  if (!asRoot || !existsSync('/usr/bin/apt-get'))
    throw new Error(`missing: ${missing.join(', ')}. Install them as root.`)
  apt('update')
  if (missing.includes('postgresql')) {
    // Without the server that the package would start by itself: ours is another.
    apt('install', '-y', '--no-install-recommends', 'postgresql-common')
    const settings = '/etc/postgresql-common/createcluster.conf'
    execFileSync('sed', ['-i', 's/^#\\?create_main_cluster.*/create_main_cluster = false/', settings])
  }
  apt('install', '-y', '--no-install-recommends', ...missing)
}

function ids() {
  if (!asRoot) return {}
  const id = (flag) => Number(execFileSync('id', [flag, 'postgres'], { encoding: 'utf8' }))
  return { uid: id('-u'), gid: id('-g') }
}

async function freePort() {
  const server = createServer().listen(0, '127.0.0.1')
  await once(server, 'listening')
  const { port } = server.address()
  server.close()
  await once(server, 'close')
  return port
}

/** Starts one. `url` reaches it by TCP, `socketUrl` by its Unix socket. */
export async function startCluster() {
  setUp()
  const bin = binaries()
  const identity = ids()
  const directory = mkdtempSync(join(tmpdir(), 'warmfork-postgres-'))
  if (asRoot) chownSync(directory, identity.uid, identity.gid)
  const data = join(directory, 'data')
  const port = await freePort()
  const options = { stdio: ['ignore', 'ignore', 'inherit'], cwd: directory, timeout: START_TIMEOUT_MS, ...identity }
  execFileSync(
    join(bin, 'initdb'),
    ['-D', data, '-A', 'trust', '-U', 'postgres', '--no-sync', '--no-instructions'],
    options,
  )
  const settings = {
    listen_addresses: '127.0.0.1',
    port,
    unix_socket_directories: directory,
    fsync: 'off',
    shared_buffers: '16MB',
    log_min_messages: 'fatal',
  }
  const server = spawn(
    join(bin, 'postgres'),
    ['-D', data, ...Object.entries(settings).flatMap(([name, value]) => ['-c', `${name}=${value}`])],
    { stdio: ['ignore', 'ignore', 'inherit'], cwd: directory, ...identity },
  )
  const stop = async () => {
    if (server.exitCode === null && server.signalCode === null) {
      // Ends sessions that are open yet.
      server.kill('SIGINT')
      await once(server, 'exit')
    }
    rmSync(directory, { recursive: true, force: true })
  }
  const sql = (text) =>
    execFileSync(join(bin, 'psql'), ['-h', directory, '-p', String(port), '-U', 'postgres', '-At', '-c', text], {
      encoding: 'utf8',
      timeout: START_TIMEOUT_MS,
      stdio: ['ignore', 'pipe', 'pipe'],
    }).trimEnd()
  try {
    const deadline = Date.now() + START_TIMEOUT_MS
    for (;;) {
      try {
        sql(
          'CREATE TABLE jobs (worker int, n int, backend int, at timestamptz DEFAULT clock_timestamp(), PRIMARY KEY (worker, n))',
        )
        break
      } catch (error) {
        if (server.exitCode !== null || Date.now() > deadline) throw error
        await new Promise((resolve) => setTimeout(resolve, 50))
      }
    }
  } catch (error) {
    await stop()
    throw error
  }
  return {
    url: `postgresql://postgres@127.0.0.1:${port}/postgres`,
    socketUrl: `postgresql:///postgres?host=${encodeURIComponent(directory)}&port=${port}&user=postgres`,
    sql,
    stop,
  }
}
