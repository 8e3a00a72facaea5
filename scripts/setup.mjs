/**
 * Brings a clone to where `npm run demo` and `npm test` work: dependencies, the compiled package, its native parts, a criu
 * that suits the kernel. Plain JavaScript without dependencies, since it runs before there are any. Each step looks first
 * whether its work is done, so that a second run takes some hundred milliseconds.
 *
 *     node scripts/setup.mjs [--quiet] [--dev]
 *
 * --quiet says nothing of steps that have nothing to do; --dev also brings what the tests need from Debian.
 */
import { spawn } from 'node:child_process'
import { createHash } from 'node:crypto'
import {
  accessSync,
  chmodSync,
  constants,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath, pathToFileURL } from 'node:url'

const root = dirname(dirname(fileURLToPath(import.meta.url)))
const flags = new Set(process.argv.slice(2))
const quiet = flags.has('--quiet')
const at = (...parts) => join(root, ...parts)

/** What of Debian is needed, and what for. Only what is missing is installed; nothing else is touched. */
const BUILD_PACKAGES = [
  { name: 'gcc', file: 'gcc', why: 'compiles the native parts: preload shim, guard' },
  { name: 'libc6-dev', file: '/usr/include/stdio.h', why: 'headers for them and for the test programs in C' },
]
const TEST_PACKAGES = [
  {
    name: 'libjemalloc2',
    file: '/usr/lib/x86_64-linux-gnu/libjemalloc.so.2',
    why: 'an allocator that counts on zeros',
  },
  { name: 'musl-tools', file: 'musl-gcc', why: 'test programs on the other C library' },
  { name: 'python3', file: '/usr/bin/python3', why: 'a template in CPython' },
  { name: 'ruby', file: 'ruby', why: 'a template in MRI' },
  { name: 'default-jdk-headless', file: 'javac', why: 'JRuby, and how a JVM starts programs' },
  { name: 'procps', file: 'ps', why: 'tests look at processes as users do' },
  { name: 'util-linux', file: 'setpriv', why: 'supervisors and workers as other users, private mounts' },
]

const INSTALL_TIMEOUT_MS = 900_000
const BUILD_TIMEOUT_MS = 300_000

/** What earlier runs did. In node_modules, so that a new installation of the dependencies looks at everything again. */
const STAMPS = at('node_modules/.warmfork-setup.json')

function readStamps() {
  try {
    return JSON.parse(readFileSync(STAMPS, 'utf8'))
  } catch {
    return {}
  }
}

function stamp(name, value) {
  writeFileSync(`${STAMPS}.${process.pid}`, JSON.stringify({ ...readStamps(), [name]: value }))
  renameSync(`${STAMPS}.${process.pid}`, STAMPS)
}

function say(line) {
  process.stderr.write(`set-up: ${line}\n`)
}

/** A failure whose message is all that the user needs. */
class SetupError extends Error {
  constructor(happened, remedy, output = '') {
    super(`${happened}\n${output ? `${output.trimEnd()}\n` : ''}→ ${remedy}`)
  }
}

/** Runs a program quietly; its output is shown where it fails. It never asks: it has no stdin. */
function run(command, args, { timeoutMs, remedy, env = {} }) {
  return new Promise((done, failed) => {
    const child = spawn(command, args, {
      cwd: root,
      stdio: ['ignore', 'pipe', 'pipe'],
      env: { ...process.env, ...env },
      timeout: timeoutMs,
      killSignal: 'SIGKILL',
    })
    let output = ''
    for (const stream of [child.stdout, child.stderr]) {
      stream.on('data', (data) => {
        output = `${output}${data}`.slice(-8192)
      })
    }
    child.once('error', (error) => failed(new SetupError(`${command} cannot be run: ${error.message}`, remedy)))
    child.once('close', (status, signal) => {
      if (status === 0) return done()
      const why = signal ? `was ended by ${signal} (it may take ${timeoutMs / 1000} s)` : `ended with status ${status}`
      failed(new SetupError(`\`${[command, ...args].join(' ')}\` ${why}`, remedy, output))
    })
  })
}

function findInPath(name) {
  const directories = (process.env.PATH ?? '').split(':').filter(Boolean)
  return directories
    .map((directory) => join(directory, name))
    .find((path) => {
      try {
        accessSync(path, constants.X_OK)
        return true
      } catch {
        return false
      }
    })
}

const isThere = ({ file }) => (file.startsWith('/') ? existsSync(file) : findInPath(file) !== undefined)

function entriesByName(directory) {
  return readdirSync(directory, { withFileTypes: true }).sort((a, b) => (a.name < b.name ? -1 : 1))
}

/** One hash over the names and contents of files; directories are entered, files in them chosen by their ending. */
function hashOf(paths, endings) {
  const hash = createHash('sha256')
  const add = (path) => {
    if (!existsSync(path)) return
    if (statSync(path).isDirectory()) {
      for (const entry of entriesByName(path)) {
        if (entry.isDirectory() || endings.some((ending) => entry.name.endsWith(ending))) add(join(path, entry.name))
      }
      return
    }
    hash.update(path).update('\0').update(readFileSync(path)).update('\0')
  }
  for (const path of paths) add(path)
  return hash.digest('hex')
}

async function dependencies() {
  const lock = hashOf([at('package-lock.json')], [])
  if (readStamps().dependencies === lock) return false
  // Brought by hand: npm writes this file when it has ended.
  const hidden = at('node_modules/.package-lock.json')
  const byHand = existsSync(hidden) && statSync(hidden).mtimeMs >= statSync(at('package-lock.json')).mtimeMs
  if (!byHand) {
    say('installing the dependencies (npm ci)')
    await run('npm', ['ci', '--no-audit', '--no-fund', '--include=dev'], {
      timeoutMs: INSTALL_TIMEOUT_MS,
      remedy: 'See that the npm registry can be reached, then try again.',
    })
  }
  stamp('dependencies', lock)
  return !byHand
}

/** Installs packages of Debian that are missing; without the right to, `required` ones are an error and others a warning. */
async function debianPackages(packages, required) {
  const missing = packages.filter((one) => !isThere(one))
  if (missing.length === 0) return false
  const names = missing.map(({ name }) => name)
  const command = `apt-get install -y --no-install-recommends ${names.join(' ')}`
  if (process.getuid() !== 0 || !findInPath('apt-get')) {
    const needed = missing.map(({ name, why }) => `${name} (${why})`).join(', ')
    if (required) throw new SetupError(`missing: ${needed}`, `As root, run: ${command}`)
    say(`missing for some tests: ${needed}. As root, run: ${command}`)
    return false
  }
  say(`installing ${names.join(', ')} from the distribution`)
  const options = {
    timeoutMs: INSTALL_TIMEOUT_MS,
    remedy: `See that the distribution's mirror can be reached, then run: ${command}`,
    env: { DEBIAN_FRONTEND: 'noninteractive' },
  }
  const wait = ['-o', 'DPkg::Lock::Timeout=300']
  const update = () => run('apt-get', [...wait, '-q', 'update'], options)
  const install = () => run('apt-get', [...wait, '-q', '-y', '--no-install-recommends', 'install', ...names], options)
  // One source of many that is out of date makes an update fail, though all that is needed may be there.
  let failed
  const tryUpdate = () =>
    update().catch((error) => {
      failed = error
    })
  if (!hasLists()) await tryUpdate()
  try {
    await install()
  } catch (error) {
    if (failed) throw failed
    // Old lists name versions that the mirror has no more.
    await tryUpdate()
    await install().catch(() => {
      throw failed ?? error
    })
  }
  return true
}

function hasLists() {
  try {
    return readdirSync('/var/lib/apt/lists').some((name) => /_Packages(\.\w+)?$/.test(name))
  } catch {
    return false
  }
}

async function nativeParts() {
  const directory = at('native/prebuilt/linux-x64')
  const sources = hashOf([at('src'), at('scripts/build-native.mjs')], ['.c', '.h'])
  const before = readStamps().native
  if (before?.sources === sources && before.built.every((name) => existsSync(join(directory, name)))) return false
  if (process.platform === 'linux' && process.arch === 'x64') await debianPackages(BUILD_PACKAGES, true)
  say('building the native parts')
  await run(process.execPath, [at('scripts/build-native.mjs')], {
    timeoutMs: BUILD_TIMEOUT_MS,
    remedy: "Read the compiler's words above.",
  })
  stamp('native', { sources, built: existsSync(directory) ? readdirSync(directory) : [] })
  return true
}

async function build() {
  const sources = hashOf([at('src'), at('tsconfig.json'), at('tsconfig.build.json'), at('package.json')], ['.ts'])
  if (existsSync(at('dist/cli/main.js')) && readStamps().dist === sources) return false
  say('compiling')
  // Beside and renamed, so that nobody sees half of it, and nothing stays of sources that are gone.
  const fresh = at(`.cache/dist.${process.pid}.new`)
  const old = at(`.cache/dist.${process.pid}.old`)
  try {
    await run(
      process.execPath,
      [at('node_modules/typescript/bin/tsc'), '-p', 'tsconfig.build.json', '--outDir', fresh],
      {
        timeoutMs: BUILD_TIMEOUT_MS,
        remedy: 'Correct what the compiler names, or run `npm ci` if it misses a package.',
      },
    )
    if (existsSync(join(fresh, 'cli/main.js'))) chmodSync(join(fresh, 'cli/main.js'), 0o755)
    if (existsSync(at('dist'))) renameSync(at('dist'), old)
    renameSync(fresh, at('dist'))
  } finally {
    rmSync(fresh, { recursive: true, force: true })
    rmSync(old, { recursive: true, force: true })
  }
  stamp('dist', sources)
  return true
}

const compiled = (path) => import(pathToFileURL(at('dist', path)).href)

/** criu and its kernel cache; the trial of a fork is made once for each boot and criu. */
async function criu() {
  const bootId = readFileSync('/proc/sys/kernel/random/boot_id', 'latin1').trim()
  const { findCriu } = await compiled('engines/criu/binary.js')
  const { lookAtKernelCache } = await compiled('engines/criu/kdat.js')
  try {
    const found = findCriu()
    const tried = `${bootId} ${process.getuid()} ${found.argv.join(' ')}`
    // Where the cache cannot be made, the trial has said so; looking again would not help.
    const cache = lookAtKernelCache(found, { unprivileged: process.getuid() !== 0 })
    if (readStamps().trial === tried && (cache.state === 'fresh' || readStamps().noCache === bootId)) return false
  } catch {
    // Missing or too old: the doctor installs one.
  }
  const { doctor } = await compiled('doctor/doctor.js')
  say('looking at what forks need on this machine')
  const report = await doctor({ install: true, onProgress: say })
  const failed = report.checks.filter(({ status }) => status === 'fail')
  const lines = failed.map(({ name, found, remedy }) => `✖ ${name}: ${found}${remedy ? ` → ${remedy}` : ''}`)
  if (!report.forksWork) {
    throw new SetupError(
      'forks cannot work on this machine',
      'Mend what the lines above say, then try again.',
      lines.join('\n'),
    )
  }
  for (const { name, found, cost, remedy } of report.checks.filter(({ status }) => status === 'warn')) {
    say(`⚠ ${name}: ${found}${cost ? ` – ${cost}` : ''}${remedy ? ` → ${remedy}` : ''}`)
  }
  stamp('trial', `${bootId} ${process.getuid()} ${findCriu().argv.join(' ')}`)
  const cacheFailed = report.checks.some(({ name, status }) => name === 'kernel cache' && status !== 'ok')
  stamp('noCache', cacheFailed ? bootId : '')
  return true
}

/** Two set-ups at once (a demo beside the tests) take turns. A directory is the lock that plain Node can take; one whose owner is gone is broken. */
let releaseLock = () => {}
async function lock() {
  const path = at('.cache/setup-lock')
  mkdirSync(at('.cache'), { recursive: true })
  const owner = join(path, 'pid')
  for (let waited = 0; ; waited++) {
    try {
      mkdirSync(path)
      writeFileSync(owner, String(process.pid))
      releaseLock = () => rmSync(path, { recursive: true, force: true })
      return
    } catch (error) {
      if (error.code !== 'EEXIST') throw error
    }
    if (waited === 0) say('waiting for another set-up')
    let alive = true
    try {
      process.kill(Number(readFileSync(owner, 'utf8')), 0)
    } catch (error) {
      // Just made, its pid not yet written: give it a second.
      alive = error.code === 'EPERM' || (error.code === 'ENOENT' && waited % 10 !== 9)
    }
    if (!alive) rmSync(path, { recursive: true, force: true })
    else await new Promise((done) => setTimeout(done, 100))
  }
}

const STEPS = [
  ['dependencies', dependencies],
  ['native parts', nativeParts],
  ['compilation', build],
  ['criu', criu],
  ...(flags.has('--dev')
    ? [['packages for the tests', () => debianPackages([...BUILD_PACKAGES, ...TEST_PACKAGES], false)]]
    : []),
]

async function main() {
  const [major] = process.versions.node.split('.').map(Number)
  if (major < 20) {
    say(`Node ${process.versions.node} is too old.\n→ Install Node 20 or newer.`)
    process.exit(1)
  }
  const start = Date.now()
  await lock()
  let worked = false
  try {
    for (const [name, step] of STEPS) {
      try {
        worked = (await step()) || worked
      } catch (error) {
        process.stderr.write(
          `set-up failed at the step "${name}": ${error instanceof SetupError ? error.message : error.stack}\n`,
        )
        process.exitCode = 1
        return
      }
    }
  } finally {
    releaseLock()
  }
  if (worked) say(`done in ${((Date.now() - start) / 1000).toFixed(1)} s`)
  else if (!quiet) say('nothing to do')
}

for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) {
  process.once(signal, () => {
    releaseLock()
    process.exit(1)
  })
}
await main()
