/**
 * Which criu to run: an explicit one, one in PATH, or the one in the private prefix, and whether its version suits this
 * kernel. It knows versions and paths; how the private one gets there is in install.ts, what criu does in the engine.
 */
import { execFileSync } from 'node:child_process'
import {
  accessSync,
  constants,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  statSync,
  writeFileSync,
} from 'node:fs'
import { homedir, release } from 'node:os'
import { delimiter, dirname, join, resolve } from 'node:path'
import { WarmforkError } from '../../errors.js'

export interface CriuVersion {
  readonly major: number
  readonly minor: number
  readonly patch: number
}

export type CriuSource = 'option' | 'path' | 'private'

export interface Criu {
  /** What to execute: `['/usr/sbin/criu']`, or the private prefix's loader with its arguments and criu. */
  readonly argv: readonly string[]
  readonly version: CriuVersion
  readonly source: CriuSource
}

export interface FindCriuOptions {
  /** A criu to use in place of any other. @default the environment's WARMFORK_CRIU */
  criu?: string
  /** Where private versions are. @default `defaultPrefix()`, then SYSTEM_PREFIX */
  prefix?: string
  /** Directories to look in. @default those of PATH, then /usr/local/sbin and /usr/sbin, which users' PATHs lack */
  path?: readonly string[]
  /** @default that of the running kernel (`uname -r`) */
  kernelRelease?: string
}

/** A prefix for all users of the machine: looked in after the user's own. Images of containers put criu here. */
export const SYSTEM_PREFIX = '/usr/local/lib/warmfork/criu'

/** The file in a private version that says how to start it. Written last, so a version without it is not complete. */
export const PRIVATE_MANIFEST = 'warmfork.json'

export interface PrivateManifest {
  readonly version: string
  /** Relative to the version's directory. */
  readonly loader: string
  readonly libraryPath: readonly string[]
  readonly criu: string
}

/** Milliseconds that `criu --version` may take; it takes 5. */
const VERSION_TIMEOUT_MS = 10_000

/** Reads what `criu --version` prints (`Version: 4.2.1`), or a bare version; `4.2` has the patch level 0. */
export function parseVersion(text: string): CriuVersion | undefined {
  const found = /(?:^|Version:\s*)v?(\d+)\.(\d+)(?:\.(\d+))?/m.exec(text)
  if (!found) return undefined
  return { major: Number(found[1]), minor: Number(found[2]), patch: Number(found[3] ?? 0) }
}

export function formatVersion(version: CriuVersion): string {
  const { major, minor, patch } = version
  return patch === 0 ? `${major}.${minor}` : `${major}.${minor}.${patch}`
}

/** Negative where `a` is older than `b`. */
export function compareVersions(a: CriuVersion, b: CriuVersion): number {
  return a.major - b.major || a.minor - b.minor || a.patch - b.patch
}

/**
 * The oldest criu that forks on a kernel. 4.1: earlier ones cannot start on Linux ≥ 6.13 and collide when several restore
 * at once. 4.2 on Linux ≥ 6.16: there 4.1.1 cannot dump a process that has a TCP socket (measured on 6.18).
 */
export function requiredVersion(kernelRelease: string): CriuVersion {
  const kernel = /^(\d+)\.(\d+)/.exec(kernelRelease)
  const [major, minor] = [Number(kernel?.[1] ?? 0), Number(kernel?.[2] ?? 0)]
  return major > 6 || (major === 6 && minor >= 16) ? { major: 4, minor: 2, patch: 0 } : { major: 4, minor: 1, patch: 0 }
}

export function isSuitable(version: CriuVersion, kernelRelease: string): boolean {
  return compareVersions(version, requiredVersion(kernelRelease)) >= 0
}

/**
 * Where `warmfork doctor --install` puts criu: for root SYSTEM_PREFIX, since workers that run as another user may not enter
 * root's home; else `${XDG_DATA_HOME:-~/.local/share}/warmfork/criu`.
 */
export function defaultPrefix(env: NodeJS.ProcessEnv = process.env, uid = process.getuid?.()): string {
  if (uid === 0) return SYSTEM_PREFIX
  // The XDG specification says to ignore a relative path.
  const data = env.XDG_DATA_HOME?.startsWith('/') ? env.XDG_DATA_HOME : join(homedir(), '.local/share')
  return join(data, 'warmfork/criu')
}

/**
 * The criu to use. The order: the explicit one (`criu`, WARMFORK_CRIU), a suitable one in PATH, the newest suitable one in
 * the private prefix.
 * @throws CRIU_MISSING where there is none, CRIU_TOO_OLD where all that were found are too old for this kernel
 */
export function findCriu(options: FindCriuOptions = {}): Criu {
  const kernelRelease = options.kernelRelease ?? release()
  const required = formatVersion(requiredVersion(kernelRelease))
  const tooOld: string[] = []
  const broken: string[] = []

  const explicit = options.criu ?? (process.env.WARMFORK_CRIU || undefined)
  if (explicit !== undefined) {
    const path = resolve(explicit)
    const version = versionOf(path)
    if (typeof version === 'string') {
      throw new WarmforkError('CRIU_MISSING', {
        tried: `use the criu ${path}`,
        happened: version,
        remedy: 'Correct the option `criu` or WARMFORK_CRIU, or leave both out and run `warmfork doctor --install`.',
      })
    }
    if (!isSuitable(version, kernelRelease)) {
      throw new WarmforkError('CRIU_TOO_OLD', {
        tried: `use the criu ${path}`,
        happened: `it is version ${formatVersion(version)}, and kernel ${kernelRelease} needs ${required} or newer`,
        remedy: 'Name a newer one, or leave it out and run `warmfork doctor --install`.',
      })
    }
    return { argv: [path], version, source: 'option' }
  }

  for (const path of criusInPath(options.path ?? searchPath())) {
    const version = versionOf(path)
    if (typeof version === 'string') broken.push(`${path} (${version})`)
    else if (!isSuitable(version, kernelRelease)) tooOld.push(`${path} (${formatVersion(version)})`)
    else return { argv: [path], version, source: 'path' }
  }

  const prefixes = options.prefix === undefined ? [defaultPrefix(), SYSTEM_PREFIX] : [options.prefix]
  for (const prefix of prefixes) {
    for (const criu of privateVersions(prefix)) {
      if (isSuitable(criu.version, kernelRelease)) return criu
      tooOld.push(`${criu.argv.at(-1)} (${formatVersion(criu.version)})`)
    }
  }

  const tried = `find a criu for kernel ${kernelRelease}`
  if (tooOld.length > 0) {
    throw new WarmforkError('CRIU_TOO_OLD', {
      tried,
      happened: `${required} or newer is needed, and there is ${tooOld.join(', ')}`,
    })
  }
  const found =
    broken.length > 0 ? `found only ${broken.join(', ')}` : `there is none in PATH nor in ${prefixes.join(' nor ')}`
  throw new WarmforkError('CRIU_MISSING', { tried, happened: found })
}

/** The complete private versions in a prefix, the newest first. Reads one small file each and runs nothing. */
export function privateVersions(prefix: string): Criu[] {
  let names: string[]
  try {
    names = readdirSync(prefix)
  } catch {
    return []
  }
  const found = names.flatMap((name) => readPrivate(join(prefix, name)) ?? [])
  return found.sort((a, b) => compareVersions(b.version, a.version))
}

/** What a private version's directory says of itself; undefined where it is not complete or not for this user to read. */
export function readPrivate(directory: string): Criu | undefined {
  try {
    const manifest = JSON.parse(readFileSync(join(directory, PRIVATE_MANIFEST), 'utf8')) as PrivateManifest
    const version = parseVersion(manifest.version)
    const loader = join(directory, manifest.loader)
    const criu = join(directory, manifest.criu)
    if (!version) return undefined
    accessSync(loader, constants.X_OK)
    accessSync(criu, constants.R_OK)
    const libraryPath = manifest.libraryPath.map((path) => join(directory, path)).join(':')
    return { argv: [loader, '--library-path', libraryPath, criu], version, source: 'private' }
  } catch {
    return undefined
  }
}

/** The directories of PATH and those where distributions put criu. */
function searchPath(): string[] {
  const path = (process.env.PATH ?? '').split(delimiter).filter((directory) => directory.startsWith('/'))
  return [...path, '/usr/local/sbin', '/usr/sbin']
}

function criusInPath(directories: readonly string[]): string[] {
  const found = [...new Set(directories)].map((directory) => join(directory, 'criu'))
  return found.filter((path) => {
    try {
      accessSync(path, constants.X_OK)
      return statSync(path).isFile()
    } catch {
      return false
    }
  })
}

interface CachedVersion {
  readonly mtimeMs: number
  readonly size: number
  readonly version: CriuVersion
}

/** The version of a criu, from the cache where the file is unchanged; a string says why it cannot be told. */
function versionOf(path: string): CriuVersion | string {
  let found: { mtimeMs: number; size: number }
  try {
    found = statSync(path)
    accessSync(path, constants.X_OK)
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === 'ENOENT' ? 'there is no such file' : 'it cannot be executed'
  }
  const cache = readCache()
  const cached = cache[path]
  if (cached && cached.mtimeMs === found.mtimeMs && cached.size === found.size) return cached.version
  let output: string
  try {
    output = execFileSync(path, ['--version'], {
      timeout: VERSION_TIMEOUT_MS,
      killSignal: 'SIGKILL',
      encoding: 'utf8',
      stdio: ['ignore', 'pipe', 'pipe'],
    })
  } catch (error) {
    return `it does not answer --version: ${(error as Error).message.trim().split('\n').at(-1)}`
  }
  const version = parseVersion(output)
  if (!version) return 'it does not print its version'
  writeCache({ ...cache, [path]: { mtimeMs: found.mtimeMs, size: found.size, version } })
  return version
}

/** Versions of criu files by path, size and time, so that a later start of warmfork does not run them again (5 ms each). */
function cacheFile(): string {
  const cache = process.env.XDG_CACHE_HOME
  return join(cache?.startsWith('/') ? cache : join(homedir(), '.cache'), 'warmfork/criu-versions.json')
}

function readCache(): Record<string, CachedVersion> {
  try {
    return JSON.parse(readFileSync(cacheFile(), 'utf8'))
  } catch {
    return {}
  }
}

/** A cache that cannot be written costs 5 ms at the next start, nothing more. */
function writeCache(cache: Record<string, CachedVersion>): void {
  try {
    const file = cacheFile()
    mkdirSync(dirname(file), { recursive: true, mode: 0o700 })
    writeFileSync(`${file}.${process.pid}`, JSON.stringify(cache))
    renameSync(`${file}.${process.pid}`, file)
  } catch {
    // Read-only homes are common in containers.
  }
}
