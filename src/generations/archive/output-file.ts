/**
 * A file that is there as a whole or not at all: written beside its place under another name, synced, and then renamed. What
 * makers of such files that were killed have left is removed by the next one. It knows nothing of what is written.
 */
import { randomBytes } from 'node:crypto'
import { existsSync, lstatSync, readdirSync, rmSync } from 'node:fs'
import { type FileHandle, link, open, rename, rm } from 'node:fs/promises'
import { basename, dirname, join, resolve } from 'node:path'
import { errnoOf, WarmforkError } from '../../errors.js'
import { isAlive, stat } from '../../linux/proc.js'
import { sync } from '../directories.js'

export interface OutputFileOptions {
  /** What the file is made for, as a phrase. */
  readonly tried: string
  /** Whether a file that is there already is replaced. */
  readonly force: boolean
}

/** Calls `write` with a function that appends. Throws BAD_OPTION where the file is there, DISK_FULL, and what `write` throws. */
export async function writeOutputFile<T>(
  path: string,
  { tried, force }: OutputFileOptions,
  write: (append: (bytes: Buffer) => Promise<void>) => Promise<T>,
): Promise<T> {
  const target = resolve(path)
  refuse(target, { tried, force })
  const temporary = temporaryBeside(target)
  let handle: FileHandle | undefined
  try {
    // It holds the memory of a program.
    handle = await open(temporary, 'wx', 0o600)
    const result = await write(async (bytes) => {
      for (let at = 0; at < bytes.length; ) at += (await handle!.write(bytes, at, bytes.length - at)).bytesWritten
    })
    await handle.sync()
    await handle.close()
    handle = undefined
    if (force) await rename(temporary, target)
    else await moveToFree(temporary, target, { tried, force })
    await sync(dirname(target))
    return result
  } catch (error) {
    throw outputError(error, tried, target)
  } finally {
    await handle?.close()
    await rm(temporary, { force: true })
  }
}

function refuse(target: string, { tried, force }: OutputFileOptions): void {
  const stats = lstatSync(target, { throwIfNoEntry: false })
  if (!stats || (force && stats.isFile())) return
  const happened = force ? `${target} is there and is no regular file` : `${target} is there already`
  const remedy = force ? 'Name another file.' : 'Name another file, or replace it with `--force` (`force: true`).'
  throw new WarmforkError('BAD_OPTION', { tried, happened, remedy })
}

/** Somebody may have made the file meanwhile: a link fails then, where a rename would replace it. */
async function moveToFree(temporary: string, target: string, options: OutputFileOptions): Promise<void> {
  try {
    await link(temporary, target)
  } catch (error) {
    refuse(target, options)
    // A file system without links.
    if (!['EPERM', 'ENOTSUP', 'EOPNOTSUPP', 'ENOSYS'].includes(errnoOf(error) ?? '')) throw error
    await rename(temporary, target)
  }
}

/** Removes those of dead processes on the way. */
function temporaryBeside(target: string): string {
  const directory = dirname(target)
  const prefix = `.${basename(target)}.`
  for (const name of existsSync(directory) ? readdirSync(directory) : []) {
    const left = name.startsWith(prefix) && /^(\d+)-(\d+)-[0-9a-f]{12}\.part$/.exec(name.slice(prefix.length))
    if (left && !isAlive(Number(left[1]), Number(left[2]))) rmSync(join(directory, name), { force: true })
  }
  const startTicks = stat(process.pid)?.startTicks ?? 0
  return join(directory, `${prefix}${process.pid}-${startTicks}-${randomBytes(6).toString('hex')}.part`)
}

function outputError(error: unknown, tried: string, target: string): unknown {
  const errno = errnoOf(error)
  if (error instanceof WarmforkError || errno === undefined) return error
  if (errno === 'ENOSPC' || errno === 'EDQUOT') {
    const remedy = 'Free space there, or name a file elsewhere.'
    return new WarmforkError('DISK_FULL', { tried, happened: `there is no room for ${target}`, remedy, cause: error })
  }
  const happened = `${target} cannot be written: ${errno}`
  return new WarmforkError('BAD_OPTION', { tried, happened, remedy: 'Name a file that can be written.', cause: error })
}
