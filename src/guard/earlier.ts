/**
 * The guard of the supervisor that had a store before: where that supervisor was killed, its guard may still be ending what it
 * made, and ports are not free until then. It knows a store's directory and guards, and nothing of generations.
 */
import { readFileSync, rmSync, writeFileSync } from 'node:fs'
import { basename, join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { WarmforkError } from '../errors.js'
import { storeError } from '../generations/directories.js'
import { allPids, isAlive } from '../linux/proc.js'

const FILE = 'supervisor'
const POLL_MS = 5
/** A guard gives up by itself after some 13 s. */
const TIMEOUT_MS = 20_000

/**
 * Waits until the guard of an earlier supervisor has done its work. To be called by who holds the store's lock.
 * @throws TIMEOUT, and the reason of `signal`
 */
export async function untilEarlierIsGone(storeDirectory: string, signal: AbortSignal): Promise<void> {
  const token = read(storeDirectory)
  if (token === undefined) return
  const guards = allPids().filter((pid) => isGuardOf(pid, token))
  const deadline = Date.now() + TIMEOUT_MS
  while (guards.some((pid) => isAlive(pid) && isGuardOf(pid, token))) {
    signal.throwIfAborted()
    if (Date.now() > deadline) {
      throw new WarmforkError('TIMEOUT', {
        tried: 'wait for the end of what an earlier supervisor of this name has made',
        happened: `its guard (pid ${guards.join(', ')}) was still at work after ${TIMEOUT_MS} ms`,
        remedy: 'See which of its processes cannot be ended.',
      })
    }
    await sleep(POLL_MS)
  }
}

/** Writes down whose the store is now. @throws DISK_FULL, STORE_UNWRITABLE */
export function noteSupervisor(storeDirectory: string, token: string): void {
  try {
    writeFileSync(join(storeDirectory, FILE), `${token}\n`, { mode: 0o600 })
  } catch (error) {
    throw storeError(error, `write into the store at ${storeDirectory}`)
  }
}

/** Everything that it made has ended. Another may have the store by now. */
export function forgetSupervisor(storeDirectory: string, token: string): void {
  if (read(storeDirectory) === token) rmSync(join(storeDirectory, FILE), { force: true })
}

function read(storeDirectory: string): string | undefined {
  try {
    return /^[A-Za-z0-9_]{1,200}$/m.exec(readFileSync(join(storeDirectory, FILE), 'latin1'))?.[0]
  } catch {
    return undefined
  }
}

function isGuardOf(pid: number, token: string): boolean {
  try {
    const [program = '', given] = readFileSync(`/proc/${pid}/cmdline`, 'latin1').split('\0')
    return given === token && basename(program) === 'warmfork-guard'
  } catch {
    return false
  }
}
