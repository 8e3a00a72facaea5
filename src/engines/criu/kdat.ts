/**
 * The kernel cache: what criu found out about the kernel, which it else probes anew at each start. It knows where criu
 * looks for the file and when the file is out of date, and nothing of checkpoints.
 *
 * Facts of CRIU 4.2: the file is /run/criu.kdat, or with `--unprivileged` $XDG_RUNTIME_DIR/criu.kdat. criu saves it only on
 * a tmpfs, because it must not outlive the boot: it holds no word about the kernel it was made on. It does hold the build
 * time of criu, and a criu of another build removes the file and probes again. A failed save leaves `criu.kdat.tmp` behind
 * and *removes* criu.kdat; where that temporary file exists, no save is tried.
 */
import { execFile } from 'node:child_process'
import { createHash } from 'node:crypto'
import {
  chownSync,
  closeSync,
  existsSync,
  lstatSync,
  mkdirSync,
  openSync,
  readFileSync,
  renameSync,
  rmSync,
  statfsSync,
  statSync,
  writeFileSync,
} from 'node:fs'
import { release } from 'node:os'
import { dirname, join } from 'node:path'
import { bootId } from '../../linux/proc.js'
import { type Criu, formatVersion } from './binary.js'

export interface KernelCache {
  /** `fresh`: was there; `made`: was made by this call; `none`: criu probes at each start, `reason` says why. */
  readonly state: 'fresh' | 'made' | 'none'
  readonly file?: string
  /** A sentence without the final stop. */
  readonly reason?: string
  /** What must be in the environment of criu for it to find the file. */
  readonly env: Readonly<Record<string, string>>
}

export interface KernelCacheOptions {
  /**
   * Where criu runs with `--unprivileged`: the cache is then in XDG_RUNTIME_DIR, or where that is not a tmpfs, in a directory
   * of the user's in /dev/shm. @default false
   */
  unprivileged?: boolean
  /** The user that criu runs as; `criu.argv` must then begin with what changes to it. @default this process's */
  uid?: number
  gid?: number
}

/** What a cache on a disk was made for; kept beside it, since it holds nothing of this itself. */
export interface CacheStamp {
  readonly bootId: string
  readonly kernelRelease: string
  readonly criuVersion: string
  /** Of the cache file: a criu of another build or a person may have put another there. */
  readonly sha256: string
}

const PRIVILEGED_FILE = '/run/criu.kdat'
const PRIVILEGED_STAMP = '/run/criu.kdat.warmfork.json'
const TMPFS_MAGIC = 0x01021994

/** `criu check` takes 0.1 s; a machine without the kernel's iptables modules may search for them for longer. */
const CHECK_TIMEOUT_MS = 20_000

/** Whether a cache with this stamp may be used here and now. */
export function isFreshStamp(stamp: CacheStamp | undefined, now: CacheStamp): boolean {
  return (
    stamp !== undefined &&
    stamp.bootId === now.bootId &&
    stamp.kernelRelease === now.kernelRelease &&
    stamp.criuVersion === now.criuVersion &&
    stamp.sha256 === now.sha256
  )
}

/** Whether the cache is there and up to date, without making it. */
export function lookAtKernelCache(criu: Criu, options: KernelCacheOptions = {}): KernelCache {
  const place = placeOf(options)
  if ('reason' in place) return { state: 'none', reason: place.reason, env: {} }
  const { file, env, criuSaves } = place
  if (!existsSync(file)) return { state: 'none', reason: `${file} is not there`, env }
  if (place.makeDirectory && !isOwnDirectory(dirname(file), options.uid)) {
    return { state: 'none', reason: `${dirname(file)} is not the user's own`, env: {} }
  }
  // On a tmpfs it is of this boot, and criu itself sees to its version.
  if (!criuSaves && !isFreshStamp(readStamp(), stampFor(criu, file))) {
    return { state: 'none', reason: `${file} is of another boot, kernel or criu`, env }
  }
  return { state: 'fresh', file, env }
}

/**
 * Makes the cache where it is missing or out of date; takes 0.1 s then, and well under 1 ms else. It never throws: without
 * the cache everything works, 15-30 ms slower.
 */
export async function ensureKernelCache(criu: Criu, options: KernelCacheOptions = {}): Promise<KernelCache> {
  const found = lookAtKernelCache(criu, options)
  if (found.state === 'fresh') return found
  const place = placeOf(options)
  if ('reason' in place) return found
  const { file, env, criuSaves } = place
  try {
    if (place.makeDirectory) makeOwnDirectory(dirname(file), options.uid, options.gid)
    if (criuSaves) await letCriuSave(criu, file, env, options.unprivileged ?? false)
    else await makeOnDisk(criu, file)
    return { state: 'made', file, env }
  } catch (error) {
    return {
      state: 'none',
      reason: `could not make ${file}: ${(error as Error).message.trim().replace(/\.$/, '')}`,
      env,
    }
  }
}

interface Place {
  file: string
  env: Record<string, string>
  /** On a tmpfs, criu writes it itself. */
  criuSaves: boolean
  makeDirectory: boolean
}

function placeOf(options: KernelCacheOptions): Place | { reason: string } {
  if (!options.unprivileged) {
    return { file: PRIVILEGED_FILE, env: {}, criuSaves: isTmpfs('/run'), makeDirectory: false }
  }
  const uid = options.uid ?? process.getuid!()
  // The directory in our environment is of our user: no use where criu runs as another.
  const runtime = uid === process.getuid!() ? process.env.XDG_RUNTIME_DIR : `/run/user/${uid}`
  if (runtime?.startsWith('/') && isTmpfs(runtime) && ownedBy(runtime, uid)) {
    return {
      file: join(runtime, 'criu.kdat'),
      env: { XDG_RUNTIME_DIR: runtime },
      criuSaves: true,
      makeDirectory: false,
    }
  }
  if (isTmpfs('/dev/shm')) {
    const directory = `/dev/shm/warmfork-${uid}`
    return {
      file: join(directory, 'criu.kdat'),
      env: { XDG_RUNTIME_DIR: directory },
      criuSaves: true,
      makeDirectory: true,
    }
  }
  return { reason: 'there is no tmpfs for it: neither XDG_RUNTIME_DIR nor /dev/shm is one' }
}

/** A directory in a place where anybody may write: it must be ours, and nobody else's to write. */
function makeOwnDirectory(path: string, uid = process.getuid!(), gid = process.getgid!()): void {
  try {
    mkdirSync(path, { mode: 0o700 })
    if (uid !== process.getuid!()) chownSync(path, uid, gid)
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'EEXIST') throw error
  }
  if (!isOwnDirectory(path, uid)) throw new Error(`${path} is not the user's own`)
}

function isOwnDirectory(path: string, uid = process.getuid!()): boolean {
  const found = lstatSync(path, { throwIfNoEntry: false })
  return found?.isDirectory() === true && found.uid === uid && (found.mode & 0o022) === 0
}

async function letCriuSave(
  criu: Criu,
  file: string,
  env: Record<string, string>,
  unprivileged: boolean,
): Promise<void> {
  const check = () => runCheck(criu.argv, unprivileged, env)
  let said = await check()
  if (existsSync(file)) return
  const temporary = `${file}.tmp`
  if (existsSync(temporary) && Date.now() - statSync(temporary).mtimeMs > CHECK_TIMEOUT_MS) {
    // A criu that was killed while it saved has left it, and it keeps all others from saving.
    rmSync(temporary, { force: true })
    said = await check()
  }
  if (!existsSync(file)) throw new Error(said || 'criu did not write it')
}

async function makeOnDisk(criu: Criu, file: string): Promise<void> {
  // One of another boot is worse than none: criu would believe it.
  rmSync(file, { force: true })
  const content = await probeInNamespace(criu)
  const stamp = JSON.stringify(stampOf(criu, content))
  // A criu that started without the cache would remove ours when it fails to save its own; this file keeps it from trying.
  closeSync(openSync(`${file}.tmp`, 'a', 0o600))
  writeAtomically(file, content)
  writeAtomically(PRIVILEGED_STAMP, stamp)
}

/** Runs `criu check` with a tmpfs on /run that nobody else sees, and returns the cache that it saved there. */
function probeInNamespace(criu: Criu): Promise<Buffer> {
  // What criu says goes to stderr; its status does not count, because it also reports features that are not needed here.
  const script = 'mount -t tmpfs -o size=1m tmpfs /run && { "$@" check --no-default-config >&2; cat /run/criu.kdat; }'
  const args = ['--mount', '--propagation', 'private', 'sh', '-c', script, 'sh', ...criu.argv]
  return new Promise((done, failed) => {
    const options = { timeout: CHECK_TIMEOUT_MS, killSignal: 'SIGKILL' as const, encoding: 'buffer' as const }
    execFile('unshare', args, options, (error, stdout, stderr) => {
      if (!error && stdout.length > 0) done(stdout)
      else failed(new Error(stderr.toString().trim().split('\n').at(-1) || error?.message || 'criu wrote nothing'))
    })
  })
}

/** Resolves to the first line that criu said; its status does not count, see above. */
function runCheck(argv: readonly string[], unprivileged: boolean, env: Record<string, string>): Promise<string> {
  const args = [...argv.slice(1), 'check', '--no-default-config', ...(unprivileged ? ['--unprivileged'] : [])]
  return new Promise((done) => {
    const options = { timeout: CHECK_TIMEOUT_MS, killSignal: 'SIGKILL' as const, env: { ...process.env, ...env } }
    execFile(argv[0]!, args, options, (error, stdout, stderr) => {
      done(
        `${stdout}${stderr}`
          .trim()
          .split('\n')[0]
          ?.replace(/[:\s]+$/, '') ||
          error?.message ||
          '',
      )
    })
  })
}

function stampOf(criu: Criu, content: Uint8Array): CacheStamp {
  return {
    bootId: bootId(),
    kernelRelease: release(),
    criuVersion: formatVersion(criu.version),
    sha256: createHash('sha256').update(content).digest('hex'),
  }
}

function stampFor(criu: Criu, file: string): CacheStamp {
  try {
    return stampOf(criu, readFileSync(file))
  } catch {
    return stampOf(criu, Buffer.alloc(0))
  }
}

function readStamp(): CacheStamp | undefined {
  try {
    return JSON.parse(readFileSync(PRIVILEGED_STAMP, 'utf8')) as CacheStamp
  } catch {
    return undefined
  }
}

function writeAtomically(file: string, content: string | Uint8Array): void {
  const temporary = `${file}.${process.pid}`
  writeFileSync(temporary, content, { mode: 0o600 })
  renameSync(temporary, file)
}

function isTmpfs(path: string): boolean {
  try {
    return statfsSync(path).type === TMPFS_MAGIC
  } catch {
    return false
  }
}

function ownedBy(path: string, uid: number): boolean {
  try {
    return statSync(path).uid === uid
  } catch {
    return false
  }
}
