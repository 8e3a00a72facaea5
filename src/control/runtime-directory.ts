/**
 * Where control sockets are: `<runtimeDirectory>/<name>/control.sock`. It makes and checks those directories; what is said
 * over the sockets it does not know. Light, since every `warmfork fork` loads it.
 */
import { lstatSync, mkdirSync, readdirSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { isAbsolute, join } from 'node:path'
import { errnoOf, WarmforkError } from '../errors.js'

/** See `SupervisorOptions.runtimeDirectory`. */
export function defaultRuntimeDirectory(): string {
  if (process.getuid?.() === 0) return '/run/warmfork'
  const runtime = process.env.XDG_RUNTIME_DIR
  return runtime && isAbsolute(runtime)
    ? join(runtime, 'warmfork')
    : join(tmpdir(), `warmfork-${process.getuid?.() ?? 0}`)
}

/** `sun_path` of a Unix socket's address holds 108 bytes, one of them for the end. */
const MAX_PATH_BYTES = 107

/** The path of a supervisor's control socket. Throws BAD_OPTION where it would be too long for a socket. */
export function socketPath(runtimeDirectory: string, name: string): string {
  const path = join(runtimeDirectory, name, 'control.sock')
  const bytes = Buffer.byteLength(path)
  if (bytes <= MAX_PATH_BYTES) return path
  throw new WarmforkError('BAD_OPTION', {
    tried: `use the control socket ${path}`,
    happened: `its path has ${bytes} bytes, and a socket's has at most ${MAX_PATH_BYTES}`,
    remedy: 'Choose a shorter `--runtime-directory` or `--name`.',
  })
}

/** Makes the directory of one supervisor, and says whether it is safe. Throws STORE_UNSAFE, STORE_UNWRITABLE. */
export function makeRuntimeDirectory(runtimeDirectory: string, name: string): string {
  const directory = join(runtimeDirectory, name)
  try {
    mkdirSync(runtimeDirectory, { recursive: true, mode: 0o700 })
    mkdirSync(directory, { recursive: true, mode: 0o700 })
  } catch (cause) {
    throw new WarmforkError('STORE_UNWRITABLE', {
      tried: `make the runtime directory ${directory}`,
      happened: errnoOf(cause) ?? String(cause),
      remedy: 'Make it writable, or choose another `--runtime-directory`.',
      cause,
    })
  }
  checkOwner(runtimeDirectory)
  checkOwner(directory)
  return directory
}

/**
 * Whoever may write to the directory may put a socket of his own there, and would be handed the standard streams of whoever
 * connects. So it must be ours or root's. Root uses anybody's where it is told to. Throws STORE_UNSAFE.
 */
export function checkOwner(directory: string): void {
  const uid = process.geteuid?.()
  const stats = lstatSync(directory)
  const mode = (stats.mode & 0o7777).toString(8).padStart(4, '0')
  if (uid === undefined || uid === 0 || ((stats.uid === uid || stats.uid === 0) && !(stats.mode & 0o022))) return
  throw new WarmforkError('STORE_UNSAFE', {
    tried: `use the runtime directory ${directory}`,
    happened: `it belongs to user ${stats.uid} and has mode ${mode}`,
    remedy: 'Make it yours, with mode 0700, or choose another `--runtime-directory`.',
  })
}

/** The names below a runtime directory that have a socket, of a living supervisor or not, in order. */
export function namesWithSocket(runtimeDirectory: string): string[] {
  try {
    return readdirSync(runtimeDirectory, { withFileTypes: true })
      .filter((entry) => entry.isDirectory())
      .map(({ name }) => name)
      .filter((name) => lstatSync(join(runtimeDirectory, name, 'control.sock'), { throwIfNoEntry: false })?.isSocket())
      .sort()
  } catch (error) {
    if (errnoOf(error) === 'ENOENT') return []
    throw error
  }
}
