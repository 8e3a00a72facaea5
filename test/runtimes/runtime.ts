/**
 * What a runtime is to the tests: how it is had and how the probe program is started in it. This file knows the cache and
 * the ways to install, but no runtime by name, and nothing of warmfork but its locks.
 */
import { execFile } from 'node:child_process'
import { createHash } from 'node:crypto'
import {
  accessSync,
  closeSync,
  constants,
  existsSync,
  mkdirSync,
  openSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from 'node:fs'
import { dirname, join, resolve } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import type { MemoryMode } from '../../src/engines/engine.js'
import { tryLock } from '../../src/linux/libc.js'

export interface Runtime {
  readonly name: string
  /** Whether it is tried without a download on a machine with Node, a C compiler and Debian's Python. */
  readonly local?: true
  /** Why it cannot be had here, as a sentence; undefined where it is there or `install` can bring it. */
  available(): Promise<string | undefined>
  /** Brings the runtime and builds the probe in the cache; a second call finds both and does nothing. */
  install(cacheDirectory: string): Promise<void>
  /** How the probe is started. */
  command(cacheDirectory: string): [string, ...string[]]
  /** The version, as it says itself. */
  version(cacheDirectory: string): Promise<string>
  /** How its children should get their memory, with the shim in place; undefined where either is right. */
  readonly memory?: MemoryMode
  /** Whether it remembers its pid from the start, and so tells the template's in a child: Node's `process.pid` and a shell's `$$`. */
  readonly remembersPid?: true
}

export const PROJECT = resolve(dirname(fileURLToPath(import.meta.url)), '../..')
export const PROBES = join(PROJECT, 'test/fixtures/probes')
/** Where the tests keep what they download and build, from one run to the next. */
export const RUNTIME_CACHE = join(PROJECT, '.cache/runtimes')

const execFileAsync = promisify(execFile)

/** Runs a program to its end and gives what it wrote; its stderr is in the error where it fails. */
export async function run(
  command: string,
  args: readonly string[],
  options: { cwd?: string; timeoutMs?: number; env?: NodeJS.ProcessEnv } = {},
): Promise<string> {
  const { stdout, stderr } = await execFileAsync(command, [...args], {
    cwd: options.cwd ?? PROJECT,
    timeout: options.timeoutMs ?? 120_000,
    killSignal: 'SIGKILL',
    maxBuffer: 64 * 1024 * 1024,
    env: { ...process.env, ...options.env },
  })
  return stdout || stderr
}

export function inPath(program: string): string | undefined {
  for (const directory of (process.env.PATH ?? '').split(':')) {
    const path = join(directory, program)
    try {
      accessSync(path, constants.X_OK)
      return path
    } catch {}
  }
  return undefined
}

/**
 * Makes a directory of the cache once. The recipe is all that its content depends on; with another one it is made anew. Of
 * several processes that want it at once one makes it and the others wait, since the lock ends with its holder.
 */
export async function cached(
  cacheDirectory: string,
  name: string,
  recipe: string,
  make: (directory: string) => Promise<void>,
): Promise<void> {
  const directory = join(cacheDirectory, name)
  const stamp = join(cacheDirectory, `${name}.recipe`)
  const digest = createHash('sha256').update(recipe).digest('hex')
  const done = () => existsSync(directory) && existsSync(stamp) && readFileSync(stamp, 'utf8') === digest
  if (done()) return
  mkdirSync(cacheDirectory, { recursive: true })
  const lock = openSync(join(cacheDirectory, `${name}.lock`), 'w')
  try {
    const until = Date.now() + 15 * 60_000
    while (!tryLock(lock)) {
      if (Date.now() > until) throw new Error(`another process has been making ${name} for 15 minutes`)
      await delay(100)
    }
    if (done()) return
    rmSync(stamp, { force: true })
    rmSync(directory, { recursive: true, force: true })
    mkdirSync(directory)
    await make(directory)
    writeFileSync(stamp, digest)
  } finally {
    closeSync(lock)
  }
}

/** Packages of npm, each `name@version`, in a directory of their own. */
export async function npmInstall(directory: string, packages: readonly string[]): Promise<void> {
  writeFileSync(join(directory, 'package.json'), '{ "private": true }\n')
  // The prefix is given besides the directory: npm takes an argument that is also the name of a folder for that folder.
  await run(
    'npm',
    ['install', '--prefix', directory, '--no-audit', '--no-fund', '--no-progress', '--loglevel=error', ...packages],
    {
      cwd: directory,
      timeoutMs: 600_000,
    },
  )
}

/** Why a program of Debian's cannot be had: it is neither in the path nor could we install it. */
export async function debianAvailable(program: string, packageName: string): Promise<string | undefined> {
  if (inPath(program) || existsSync(program)) return undefined
  if (process.getuid?.() === 0 && inPath('apt-get')) return undefined
  return `${program} is missing: install Debian's package ${packageName}`
}

/** Installs packages of Debian's on the machine, where the file or program that they bring is missing. */
export async function debianInstall(program: string, packageName: string): Promise<void> {
  if (inPath(program) || existsSync(program)) return
  const reason = await debianAvailable(program, packageName)
  if (reason) throw new Error(reason)
  const env = { DEBIAN_FRONTEND: 'noninteractive' }
  await run('apt-get', ['update', '-qq'], { timeoutMs: 300_000, env })
  await run(
    'apt-get',
    ['install', '-qq', '-y', '--no-install-recommends', '-o', 'DPkg::Lock::Timeout=300', packageName],
    { timeoutMs: 900_000, env },
  )
}
