/**
 * What a generation was made in and for: kernel, CPU, CRIU, command, user. A generation is restored only where all of it
 * is the same. This file knows nothing of stores or manifests.
 */
import { createHash } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { arch, release } from 'node:os'

export interface Surroundings {
  /** As `uname -r` says it. */
  readonly kernelRelease: string
  /** As Node names it: `x64`, `arm64`. */
  readonly architecture: string
  /** For people; not compared. */
  readonly cpuModel: string
  /** SHA-256 over the sorted feature flags of /proc/cpuinfo. */
  readonly cpuFlagsHash: string
  readonly criuVersion: string
  readonly command: readonly string[]
  readonly cwd: string
  readonly uid: number
  readonly gid: number
  /** SHA-256 of each declared variable's value, by key: the values may be secrets. */
  readonly declaredEnv: Readonly<Record<string, string>>
  /** What else stands in an image, so that no fork can have another: each as a phrase ("the option `identity`"), with its value in words. */
  readonly options?: Readonly<Record<string, string>> | undefined
  /** The application's own files when they were read: compared by whoever knows what they are now, and not here. */
  readonly watched?: WatchedSource | undefined
}

export interface WatchedSource {
  readonly globs: readonly string[]
  /** A text that its maker can read. */
  readonly files: string
}

/** What only the caller can know of the surroundings. */
export interface Circumstances {
  readonly criuVersion: string
  readonly command: readonly string[]
  readonly cwd: string
  readonly uid: number
  readonly gid: number
  /** Values, not hashes. */
  readonly declaredEnv: Readonly<Record<string, string>>
  readonly options?: Readonly<Record<string, string>> | undefined
  readonly watched?: WatchedSource | undefined
}

/** The surroundings of this moment, on this machine. */
export function currentSurroundings(circumstances: Circumstances): Surroundings {
  const cpu = cpuInfo(readFileSync('/proc/cpuinfo', 'latin1'))
  const { criuVersion, command, cwd, uid, gid, options, watched } = circumstances
  const declaredEnv: Record<string, string> = {}
  for (const [key, value] of Object.entries(circumstances.declaredEnv)) declaredEnv[key] = sha256(value)
  return {
    kernelRelease: release(),
    architecture: arch(),
    cpuModel: cpu.model,
    cpuFlagsHash: cpu.flagsHash,
    criuVersion,
    command: [...command],
    cwd,
    uid,
    gid,
    declaredEnv,
    ...(options ? { options: { ...options } } : {}),
    ...(watched ? { watched: { ...watched } } : {}),
  }
}

/** Model and features of the first CPU in the text of /proc/cpuinfo (`flags` on x86, `Features` on arm64). */
export function cpuInfo(text: string): { model: string; flagsHash: string } {
  const flags = /^(?:flags|Features)\s*:\s*(.*)$/m.exec(text)?.[1] ?? ''
  const model = /^model name\s*:\s*(.*)$/m.exec(text)?.[1]?.trim() ?? 'unknown'
  return { model, flagsHash: sha256(flags.split(/\s+/).filter(Boolean).sort().join(' ')) }
}

/** Each difference that forbids a restore, as a phrase; empty where the two agree. */
export function differences(made: Surroundings, now: Surroundings): string[] {
  const found: string[] = []
  const compare = (what: string, before: string | number, after: string | number) => {
    if (before !== after) found.push(`${what} was ${before} and is ${after} now`)
  }
  compare('the kernel', made.kernelRelease, now.kernelRelease)
  compare('the architecture', made.architecture, now.architecture)
  if (made.cpuFlagsHash !== now.cpuFlagsHash) {
    found.push(`the CPU has other features than the one it was made on (${made.cpuModel} then, ${now.cpuModel} now)`)
  }
  compare('CRIU', made.criuVersion, now.criuVersion)
  compare('the command', JSON.stringify(made.command), JSON.stringify(now.command))
  compare('the working directory', made.cwd, now.cwd)
  compare('the user id', made.uid, now.uid)
  compare('the group id', made.gid, now.gid)
  for (const key of new Set([...Object.keys(made.declaredEnv), ...Object.keys(now.declaredEnv)])) {
    if (!(key in now.declaredEnv)) found.push(`the environment variable ${key} is not declared any more`)
    else if (!(key in made.declaredEnv)) found.push(`the environment variable ${key} was not declared then`)
    else if (made.declaredEnv[key] !== now.declaredEnv[key])
      found.push(`the environment variable ${key} has another value`)
  }
  if (now.options && !made.options) found.push('it was not written down with which options it was made')
  if (!now.options || !made.options) return found
  for (const key of new Set([...Object.keys(made.options), ...Object.keys(now.options)])) {
    compare(key, made.options[key] ?? 'unknown', now.options[key] ?? 'unknown')
  }
  return found
}

function sha256(text: string): string {
  return createHash('sha256').update(text).digest('hex')
}
