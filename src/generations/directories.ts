/**
 * The store's directories on disk: where they are by default, how they are made, whether they are safe, and what an
 * error of the file system means there. It knows nothing of what lies in them.
 */
import { chmodSync, chownSync, closeSync, lstatSync, mkdirSync, openSync, readFileSync, type Stats } from 'node:fs'
import { open } from 'node:fs/promises'
import { homedir } from 'node:os'
import { dirname, isAbsolute, join, resolve } from 'node:path'
import { errnoOf, WarmforkError } from '../errors.js'

/** Where stores are by default: `WARMFORK_STORE`, else `/var/lib/warmfork` for root, else below `XDG_STATE_HOME`. */
export function defaultRoot(environment: NodeJS.ProcessEnv = process.env): string {
  if (environment.WARMFORK_STORE) return resolve(environment.WARMFORK_STORE)
  if (process.geteuid?.() === 0) return '/var/lib/warmfork'
  const state = environment.XDG_STATE_HOME
  return join(state && isAbsolute(state) ? state : join(homedir(), '.local', 'state'), 'warmfork')
}

/** Checks a supervisor's name, which is a directory's name too. Throws BAD_OPTION. */
export function checkName(name: string): void {
  if (/^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$/.test(name)) return
  throw new WarmforkError('BAD_OPTION', {
    tried: 'open the store',
    happened: `expected \`name\` to be 1 to 64 letters, digits, dots, hyphens or underscores that begin with a letter or digit, got ${JSON.stringify(name)}`,
  })
}

/**
 * Makes a directory where it is missing and checks it where it is there: no link, owned by us or root, not writable by
 * anybody else. With `group` others may enter but not list it (`mode` says who). Throws STORE_UNSAFE, STORE_UNWRITABLE.
 */
export function ensureDirectory(path: string, mode: number, group?: number): Stats {
  const tried = `open the store at ${path}`
  try {
    if (!lstatSync(path, { throwIfNoEntry: false })) {
      // What leads to the store is no secret; only the store's own directories are closed.
      mkdirSync(dirname(path), { recursive: true, mode: 0o755 })
      try {
        mkdirSync(path, { mode: 0o700 })
      } catch (error) {
        if (errnoOf(error) !== 'EEXIST') throw error
      }
    }
    const stats = checkSafe(path)
    const ours = stats.uid === process.geteuid?.()
    if (ours && group !== undefined && stats.gid !== group) chownSync(path, stats.uid, group)
    if (ours && (stats.mode & mode) !== mode) chmodSync(path, (stats.mode & 0o777) | mode)
    return stats
  } catch (error) {
    throw storeError(error, tried)
  }
}

/** Throws STORE_UNSAFE where the directory could be changed by anybody but us and root. */
export function checkSafe(path: string): Stats {
  const stats = lstatSync(path)
  const euid = process.geteuid?.() ?? stats.uid
  const unsafe = (happened: string, remedy: string) =>
    new WarmforkError('STORE_UNSAFE', { tried: `open the store at ${path}`, happened, remedy })
  if (stats.isSymbolicLink()) {
    throw unsafe('it is a symbolic link', 'Name the directory that the link leads to, or put a directory in its place.')
  }
  if (!stats.isDirectory()) throw unsafe('it is not a directory', 'Remove it, or choose another `store`.')
  const mode = (stats.mode & 0o7777).toString(8).padStart(4, '0')
  if (stats.uid !== euid && stats.uid !== 0) {
    throw unsafe(
      `it belongs to user ${stats.uid} (mode ${mode}) and this process runs as user ${euid}`,
      `Run \`chown ${euid} ${path}\` if its content is to be trusted; else remove it.`,
    )
  }
  if (stats.mode & 0o022) {
    throw unsafe(
      `others can write to it (mode ${mode}, owner ${stats.uid})`,
      `Run \`chmod 0700 ${path}\` if its content is to be trusted; else remove it.`,
    )
  }
  return stats
}

/**
 * Throws STORE_NOEXEC where the file system forbids executable mappings: compiled code lies in the memory that children
 * map from the store. Docker's /dev/shm is such a one.
 */
export function checkExec(directory: string): void {
  const mount = mountOf(directory)
  if (!mount?.options.includes('noexec')) return
  throw new WarmforkError('STORE_NOEXEC', {
    tried: `use the store at ${directory}`,
    happened: `the file system on ${mount.point} is mounted with \`noexec\`, and children map executable memory from it`,
    remedy: `Put the store elsewhere, or run \`mount -o remount,exec ${mount.point}\`.`,
  })
}

/** The mount that a directory is on, by the mount id of an open descriptor, which bind and stacked mounts cannot mislead. */
function mountOf(directory: string): { point: string; options: string[] } | undefined {
  const fd = openSync(directory, 'r')
  try {
    const id = /^mnt_id:\s*(\d+)$/m.exec(readFileSync(`/proc/self/fdinfo/${fd}`, 'latin1'))?.[1]
    for (const line of readFileSync('/proc/self/mountinfo', 'utf8').split('\n')) {
      const fields = line.split(' ')
      if (id === undefined || fields[0] !== id) continue
      return { point: unescapeMount(fields[4] ?? ''), options: (fields[5] ?? '').split(',') }
    }
    return undefined
  } finally {
    closeSync(fd)
  }
}

/** mountinfo writes blanks and backslashes in octal. */
function unescapeMount(text: string): string {
  return text.replace(/\\([0-7]{3})/g, (_, octal: string) => String.fromCharCode(Number.parseInt(octal, 8)))
}

/** Brings a file or a directory to the disk. */
export async function sync(path: string): Promise<void> {
  const handle = await open(path, 'r')
  try {
    await handle.sync()
  } finally {
    await handle.close()
  }
}

/** What an error of the file system means for the store; one of ours is left as it is, except that a full disk is named. */
export function storeError(error: unknown, tried: string): unknown {
  if (isDiskFull(error)) {
    if (error instanceof WarmforkError && error.code === 'DISK_FULL') return error
    return new WarmforkError('DISK_FULL', { tried, happened: 'the file system of the store is full', cause: error })
  }
  if (error instanceof WarmforkError) return error
  const errno = errnoOf(error)
  const reason = {
    EROFS: 'its file system is read-only',
    EACCES: 'this process has no right to it',
    EPERM: 'this process has no right to do that there',
    EIO: 'its file system cannot be read or written (EIO)',
    ENOTDIR: 'something on its path is not a directory',
  }[errno ?? '']
  if (reason === undefined) return error
  const path = (error as NodeJS.ErrnoException).path
  const happened = path === undefined ? reason : `${reason} (${path})`
  return new WarmforkError('STORE_UNWRITABLE', { tried, happened, cause: error })
}

/** Also where criu or another program said so in its output. */
function isDiskFull(error: unknown): boolean {
  for (let at: unknown = error; at instanceof Error; at = at.cause) {
    const errno = errnoOf(at)
    if (errno === 'ENOSPC' || errno === 'EDQUOT') return true
    if (at instanceof WarmforkError && /No space left on device|Disk quota exceeded/.test(at.output ?? at.happened))
      return true
  }
  return false
}
