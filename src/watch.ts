/**
 * The application's own files, as they were when a program read them: a generation whose files have changed since must not be
 * served from. It knows files and their contents, and nothing of who asks for them or what follows from a change.
 */
import { createHash } from 'node:crypto'
import { type BigIntStats, statSync } from 'node:fs'
import { readFile } from 'node:fs/promises'
import { isAbsolute, relative, resolve } from 'node:path'
import PQueue from 'p-queue'
import { escapePath, glob } from 'tinyglobby'
import { errnoOf, WarmforkError } from './errors.js'
import { fileChecksum } from './generations/checksum.js'

/** What is watched where nobody says: what programs are written in and configured with, not what others have written or they write. */
export const DEFAULT_GLOBS: readonly string[] = [
  '**/*.{js,mjs,cjs,jsx,ts,mts,cts,tsx,json,node,wasm}',
  '**/*.{py,pth,rb,ru,rake,gemspec,erb,lock,so}',
  '**/*.{java,class,jar,war,kt,groovy,clj,scala,php,lua,pl,pm,sh}',
  '**/*.{yml,yaml,toml,ini,properties,xml,html,ejs,hbs,pug,sql,graphql}',
  '!**/{node_modules,vendor,venv,__pycache__,tmp,log,logs,coverage}/**',
]

/** More than these are a mistake: a directory with data, or with what others have written. */
export interface WatchLimits {
  /** @default 20_000 */
  readonly files?: number
  /** @default 1 GiB */
  readonly bytes?: number
  /** For finding them. @default 30_000 */
  readonly timeoutMs?: number
  /** How long before a look a file must have been left alone for that look to tell of it later. @default 2_500 */
  readonly settledMs?: number
}

export interface WatchedFile {
  readonly bytes: number
  readonly sha256: string
  /**
   * Inode and times by which a look tells that it was not touched; absent where it was changed so shortly before it was read that a
   * second change could have the same times.
   */
  readonly seen?: string
}

/** By paths relative to the directory, or absolute ones for files that lie elsewhere. */
export type WatchedFiles = ReadonlyMap<string, WatchedFile>

export interface WatchOptions {
  readonly cwd: string
  /** Relative to `cwd`; `!` before one leaves files out. */
  readonly globs: readonly string[]
  /** Files beside those of the globs, relative to `cwd` or absolute; those that are not there are left out. */
  readonly files?: readonly string[]
  /** Directories that are left out whatever the globs say, absolute. */
  readonly except?: readonly string[]
  /** What was known of some of them before: files that were not touched since are not read again. */
  readonly known?: WatchedFiles
  readonly limits?: WatchLimits
  readonly signal?: AbortSignal
}

/** Clocks of file systems tick up to 10 ms apart (CONFIG_HZ=100); of some, each one or two seconds. */
const SETTLED_MS = 2_500
/** From here on it is read in pieces. */
const LARGE_BYTES = 1 << 20
/** Of libuv's four threads, some are left for others. */
const READS_AT_ONCE = 3

/**
 * Reads the files that are watched.
 * @throws BAD_OPTION where they are more than the limits say, or cannot be read
 */
export async function watchedFiles(options: WatchOptions): Promise<WatchedFiles> {
  const { cwd, known = new Map(), limits = {}, signal } = options
  const { files: mostFiles = 20_000, bytes: mostBytes = 1 << 30 } = limits
  const paths = await pathsOf(options)
  if (paths.length > mostFiles) throw tooMuch(cwd, `there are ${paths.length} of them, and the limit is ${mostFiles}`)
  const found = new Map<string, WatchedFile>()
  const unread: { path: string; stats: BigIntStats }[] = []
  let total = 0
  for (const path of paths) {
    const stats = look(resolve(cwd, path))
    // Removed since it was found, or a link that leads nowhere.
    if (!stats) continue
    total += Number(stats.size)
    if (total > mostBytes) throw tooMuch(cwd, `they have more than ${mostBytes} bytes, which is the limit`)
    const before = known.get(path)
    if (before?.seen !== undefined && before.seen === traceOf(stats)) found.set(path, before)
    else unread.push({ path, stats })
  }
  const queue = new PQueue({ concurrency: READS_AT_ONCE })
  await Promise.all(
    unread.map(({ path, stats }) =>
      queue.add(async () => {
        signal?.throwIfAborted()
        const read = await readWatched(resolve(cwd, path), stats, limits.settledMs ?? SETTLED_MS)
        if (read) found.set(path, read)
      }),
    ),
  )
  return new Map([...found].sort(([a], [b]) => (a < b ? -1 : 1)))
}

async function pathsOf({ cwd, globs, files = [], except = [], limits, signal }: WatchOptions): Promise<string[]> {
  const late = AbortSignal.timeout(limits?.timeoutMs ?? 30_000)
  const found = new Set<string>()
  for (const file of files) {
    const path = relative(cwd, resolve(cwd, file))
    const name = isBelow(path) ? path : resolve(cwd, file)
    if (look(resolve(cwd, file))) found.add(name)
  }
  if (globs.length === 0) return [...found].sort()
  try {
    const matched = await glob([...globs], {
      cwd,
      dot: false,
      ignore: except
        .map((path) => relative(cwd, path))
        .flatMap((path) => (isBelow(path) ? `${escapePath(path)}/**` : [])),
      onlyFiles: true,
      expandDirectories: false,
      signal: signal ? AbortSignal.any([signal, late]) : late,
    })
    for (const path of matched) found.add(path)
  } catch (cause) {
    signal?.throwIfAborted()
    if (late.aborted) throw tooMuch(cwd, 'they were not all found in time', cause)
    throw unreadable(cwd, cause)
  }
  return [...found].sort()
}

const isBelow = (path: string) => path !== '' && path !== '..' && !path.startsWith('../') && !isAbsolute(path)

async function readWatched(path: string, stats: BigIntStats, settledMs: number): Promise<WatchedFile | undefined> {
  const readAt = BigInt(Date.now()) * 1_000_000n
  try {
    const { bytes, sha256 } = stats.size > LARGE_BYTES ? await fileChecksum(path) : digest(await readFile(path))
    const later = look(path)
    const settled =
      later !== undefined &&
      traceOf(later) === traceOf(stats) &&
      stats.ctimeNs + BigInt(settledMs) * 1_000_000n < readAt
    return { bytes, sha256, ...(settled ? { seen: traceOf(stats) } : {}) }
  } catch (cause) {
    if (errnoOf(cause) === 'ENOENT') return undefined
    throw unreadable(path, cause)
  }
}

function digest(content: Buffer): { bytes: number; sha256: string } {
  return { bytes: content.length, sha256: createHash('sha256').update(content).digest('hex') }
}

function look(path: string): BigIntStats | undefined {
  try {
    const stats = statSync(path, { bigint: true, throwIfNoEntry: false })
    return stats?.isFile() ? stats : undefined
  } catch {
    return undefined
  }
}

/** A content cannot change without the time of the inode's last change, which nobody can set. */
function traceOf({ ino, size, mtimeNs, ctimeNs }: BigIntStats): string {
  return [ino, size, mtimeNs, ctimeNs].map((number) => number.toString(36)).join('.')
}

/** How a file differs between two looks. */
export interface WatchedChange {
  readonly path: string
  readonly how: 'added' | 'changed' | 'removed'
}

export function changes(before: WatchedFiles, now: WatchedFiles): WatchedChange[] {
  const found: WatchedChange[] = []
  for (const [path, { sha256 }] of now) {
    const earlier = before.get(path)
    if (!earlier) found.push({ path, how: 'added' })
    else if (earlier.sha256 !== sha256) found.push({ path, how: 'changed' })
  }
  for (const path of before.keys()) if (!now.has(path)) found.push({ path, how: 'removed' })
  return found
}

/** Most that are named; the others are counted. */
const MOST_NAMED = 5

/** Changes as phrases, the first few of them; empty where there is none. */
export function changeWords(found: readonly WatchedChange[]): string[] {
  const told = found.slice(0, MOST_NAMED).map(({ path, how }) => `${path} was ${how}`)
  return found.length > MOST_NAMED ? [...told, `and ${found.length - MOST_NAMED} more`] : told
}

/** Of no content. */
const UNKNOWN = '0'.repeat(64)

/**
 * Files of which a program may have read any of two contents, since they changed while it was booted: no content that they have later is
 * the one that is known to have been read.
 */
export function withUnknown(files: WatchedFiles, changed: readonly WatchedChange[]): WatchedFiles {
  const unknown = changed.map(({ path }) => [path, { bytes: 0, sha256: UNKNOWN }] as const)
  return new Map([...files, ...unknown].sort(([a], [b]) => (a < b ? -1 : 1)))
}

/** As one text, to be kept: a line for each file. */
export function encodeWatched(files: WatchedFiles): string {
  return [...files]
    .map(([path, { bytes, sha256, seen = '' }]) => `${bytes} ${sha256} ${seen} ${JSON.stringify(path)}\n`)
    .join('')
}

const LINE = /^(\d{1,15}) ([0-9a-f]{64}) ([0-9a-z.]*) (".*")$/

/** Throws a SyntaxError where it is not what `encodeWatched` gives. */
export function decodeWatched(text: string): WatchedFiles {
  const files = new Map<string, WatchedFile>()
  for (const line of text.split('\n').slice(0, -1)) {
    const [, bytes, sha256, seen, path] = LINE.exec(line) ?? []
    if (path === undefined) throw new SyntaxError('a line of watched files is damaged')
    files.set(JSON.parse(path) as string, { bytes: Number(bytes), sha256: sha256!, ...(seen ? { seen } : {}) })
  }
  if (encodeWatched(files) !== text) throw new SyntaxError('the list of watched files is damaged')
  return files
}

function tooMuch(cwd: string, happened: string, cause?: unknown): WarmforkError {
  return new WarmforkError('BAD_OPTION', {
    tried: `look at the files in ${cwd} that \`reuse.watch\` names`,
    happened,
    remedy: "Name the application's own files in `reuse.watch`, and leave data out (`!data/**`).",
    cause,
  })
}

function unreadable(path: string, cause: unknown): WarmforkError {
  return new WarmforkError('BAD_OPTION', {
    tried: `look at the files that \`reuse.watch\` names, at ${path}`,
    happened: cause instanceof Error ? cause.message : String(cause),
    remedy: 'Make them readable for the supervisor, or leave them out.',
    cause,
  })
}
