/** Checks of the file system that generations lie on. They try each thing on a real file, in a directory that they remove. */
import { execFileSync } from 'node:child_process'
import {
  chmodSync,
  constants,
  copyFileSync,
  existsSync,
  linkSync,
  lstatSync,
  mkdtempSync,
  readFileSync,
  realpathSync,
  rmSync,
  statfsSync,
  writeFileSync,
} from 'node:fs'
import { dirname, join, resolve } from 'node:path'
import { defaultRuntimeDirectory } from '../control/runtime-directory.js'
import { errnoOf } from '../errors.js'
import type { CheckContext, CheckResult } from './check.js'

const MIB = 1024 * 1024

export interface Mount {
  readonly point: string
  readonly type: string
  readonly options: readonly string[]
}

/** The mount that a path is on, from the text of /proc/self/mountinfo: the longest mount point that leads to it, the last of equal ones. */
export function mountFor(path: string, mountinfo: string): Mount | undefined {
  let best: Mount | undefined
  for (const line of mountinfo.split('\n')) {
    const fields = line.split(' ')
    const dash = fields.indexOf('-')
    if (dash < 6) continue
    // Spaces and the like are written as octal escapes.
    const point = fields[4]!.replace(/\\([0-7]{3})/g, (_, octal: string) =>
      String.fromCharCode(Number.parseInt(octal, 8)),
    )
    const leadsTo = point === '/' || path === point || path.startsWith(`${point}/`)
    if (!leadsTo || (best && best.point.length > point.length)) continue
    best = { point, type: fields[dash + 1]!, options: fields[5]!.split(',') }
  }
  return best
}

/** The store, or where it does not exist yet, the directory above it that does. */
function existingPart(store: string): string {
  let path = resolve(store)
  while (!existsSync(path) && path !== '/') path = dirname(path)
  return realpathSync(path)
}

function mountOf(path: string): Mount | undefined {
  try {
    return mountFor(path, readFileSync('/proc/self/mountinfo', 'latin1'))
  } catch {
    return undefined
  }
}

/** Runs a trial in a new directory on the store's file system; undefined where none can be made there. */
function inTrialDirectory<T>(store: string, trial: (directory: string) => T): T | undefined {
  let directory: string
  try {
    directory = mkdtempSync(join(existingPart(store), '.warmfork-doctor-'))
  } catch {
    return undefined
  }
  try {
    return trial(directory)
  } finally {
    rmSync(directory, { recursive: true, force: true })
  }
}

const NETWORK_FILE_SYSTEMS = new Set([
  'nfs',
  'nfs4',
  'cifs',
  'smb3',
  'ceph',
  '9p',
  'virtiofs',
  'fuse.sshfs',
  'glusterfs',
])

export function checkStore({ store }: CheckContext): CheckResult {
  const name = 'store'
  const path = existingPart(store)
  const mount = mountOf(path)
  const type = mount?.type ?? 'unknown file system'
  const found = `${store} (${type}${path === resolve(store) ? '' : ', not made yet'})`
  const uid = process.geteuid?.() ?? -1
  if (existsSync(store)) {
    const stats = lstatSync(path)
    const mode = (stats.mode & 0o777).toString(8).padStart(4, '0')
    if (!stats.isDirectory())
      return { name, status: 'fail', found: `${store} is not a directory`, remedy: 'Choose another store (--store).' }
    if ((stats.uid !== uid && stats.uid !== 0) || stats.mode & 0o022) {
      return {
        name,
        status: 'fail',
        found: `${found}, of user ${stats.uid}, mode ${mode}`,
        cost: 'no fork: whoever writes there writes into the memory of the children',
        remedy: `chown ${uid} ${store} && chmod 0700 ${store}, if its content is to be trusted; else remove it.`,
      }
    }
  }
  if (inTrialDirectory(store, () => true) === undefined) {
    const why = mount?.options.includes('ro') ? 'mounted read-only' : 'not writable for this user'
    return {
      name,
      status: 'fail',
      found: `${found}, ${why}`,
      cost: 'no fork: there is no place for generations',
      remedy: 'Make it writable, or choose another store (--store).',
    }
  }
  if (NETWORK_FILE_SYSTEMS.has(type)) {
    return {
      name,
      status: 'warn',
      found,
      cost: 'the memory of children is read over the network',
      remedy: 'Choose a store on a local disk (--store).',
    }
  }
  return { name, status: 'ok', found }
}

/** Children map executable memory from the store, which `noexec` forbids, as it forbids to start a program from there. */
export function checkExec({ store }: CheckContext): CheckResult | undefined {
  const name = 'store exec'
  const result = inTrialDirectory(store, (directory) => {
    const program = join(directory, 'program')
    writeFileSync(program, '#!/bin/sh\n', { mode: 0o700 })
    chmodSync(program, 0o700)
    try {
      execFileSync(program, { timeout: 5_000, killSignal: 'SIGKILL', stdio: 'ignore' })
      return true
    } catch (error) {
      // Anything else than a refusal is no word about the mount.
      return errnoOf(error) !== 'EACCES'
    }
  })
  if (result === undefined) return undefined
  if (result) return { name, status: 'ok', found: 'allowed' }
  const point = mountOf(existingPart(store))?.point ?? store
  return {
    name,
    status: 'fail',
    found: `${point} is mounted noexec`,
    cost: 'no fork of programs that compile at run time (Node, JVM): their code could not be mapped',
    remedy: `Choose a store elsewhere (--store), or mount -o remount,exec ${point}.`,
  }
}

export function judgeSpace(availableBytes: number): CheckResult {
  const base = { name: 'store space', found: `${Math.round(availableBytes / MIB).toLocaleString('en-US')} MiB free` }
  const cost = 'a generation takes as much as its template has memory'
  const remedy = 'Free space, or choose another store (--store).'
  if (availableBytes < 64 * MIB) return { ...base, status: 'fail', cost: `no fork: ${cost}`, remedy }
  if (availableBytes < 1024 * MIB) return { ...base, status: 'warn', cost, remedy }
  return { ...base, status: 'ok' }
}

export function checkSpace({ store }: CheckContext): CheckResult {
  const stats = statfsSync(existingPart(store))
  return judgeSpace(stats.bavail * stats.bsize)
}

export interface CopyMeans {
  readonly reflinks: boolean
  readonly hardLinks: boolean
  /** Whether a file of the system can be linked into the store. */
  readonly systemLinks: boolean
}

export function judgeCopyMeans(means: CopyMeans): CheckResult {
  const { reflinks, hardLinks, systemLinks } = means
  const name = 'store links'
  const found = `reflinks ${reflinks ? 'work' : 'do not'}, hard links ${hardLinks ? 'work' : 'do not'}`
  if (reflinks) return { name, status: 'ok', found }
  if (!hardLinks) {
    return {
      name,
      status: 'warn',
      found,
      cost: 'each generation copies the page file of the one before, and the files that it maps',
      remedy: 'Choose a store on ext4, XFS or Btrfs (--store).',
    }
  }
  if (systemLinks) return { name, status: 'ok', found }
  return {
    name,
    status: 'ok',
    found,
    cost: 'programs and libraries cannot be linked from where they are: a generation copies those that it maps',
  }
}

export function checkLinks({ store }: CheckContext): CheckResult | undefined {
  const tries = (action: () => void) => {
    try {
      action()
      return true
    } catch {
      return false
    }
  }
  const means = inTrialDirectory(store, (directory) => {
    const file = join(directory, 'file')
    writeFileSync(file, Buffer.alloc(4096, 1))
    return {
      // FICLONE or nothing: an ordinary copy would hide that there are no reflinks.
      reflinks: tries(() => copyFileSync(file, join(directory, 'clone'), constants.COPYFILE_FICLONE_FORCE)),
      hardLinks: tries(() => linkSync(file, join(directory, 'link'))),
      systemLinks: tries(() => linkSync(realpathSync('/bin/sh'), join(directory, 'system'))),
    }
  })
  return means && judgeCopyMeans(means)
}

/** The runtime directory holds sockets, and for the time of a fork the few small files that are its own. */
export function checkRuntimeDirectory(): CheckResult {
  const directory = defaultRuntimeDirectory()
  const type = mountOf(existingPart(directory))?.type ?? 'unknown file system'
  const base = { name: 'runtime files', found: `${directory} (${type})` }
  if (inTrialDirectory(directory, () => true)) return { ...base, status: 'ok' }
  return {
    ...base,
    status: 'fail',
    cost: 'no fork: there is no place for sockets and for what is written for each fork',
    remedy: `Make ${directory} for this user, or set XDG_RUNTIME_DIR.`,
  }
}
