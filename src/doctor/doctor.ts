/**
 * Says what this machine has of what a fork needs, what each lack costs and how to mend it. It runs the checks in order
 * and knows what makes forks impossible; how a thing is found out is the check's own business.
 */
import { release } from 'node:os'
import { resolve } from 'node:path'
import { type Criu, type FindCriuOptions, findCriu } from '../engines/criu/binary.js'
import { installCriu } from '../engines/criu/install.js'
import { defaultRoot } from '../generations/directories.js'
import type { Check, CheckContext, CheckResult } from './check.js'
import { checkBreakpoints, checkCriu, checkKernelCache, checkTrial } from './criu.js'
import {
  checkArchitecture,
  checkCapabilities,
  checkConfinement,
  checkKernel,
  checkOpenFiles,
  checkPidMax,
  checkSeccomp,
  checkYama,
} from './kernel.js'
import { checkCompiler, checkGuard, checkInit, checkShim } from './native.js'
import { checkExec, checkLinks, checkRuntimeDirectory, checkSpace, checkStore } from './store.js'

export type { CheckResult, CheckStatus } from './check.js'

export interface DoctorOptions {
  /** The store to look at. @default that of a supervisor without the option */
  store?: string
  /** Install what is missing first: criu. @default false */
  install?: boolean
  /** Also measure what takes seconds. @default false */
  deep?: boolean
  /** Which criu to look at, and where to install one. */
  criu?: FindCriuOptions
  /** Called with each step of an installation. */
  onProgress?: (line: string) => void
  /** Called with each result as it is there. */
  onResult?: (result: CheckResult) => void
}

export interface DoctorReport {
  /** False where any check failed. The `spawn` engine works all the same. */
  readonly forksWork: boolean
  readonly checks: readonly CheckResult[]
}

const CHECKS: readonly Check[] = [
  checkKernel,
  checkArchitecture,
  checkCapabilities,
  checkSeccomp,
  checkYama,
  checkConfinement,
  checkCriu,
  checkKernelCache,
  checkTrial,
  checkBreakpoints,
  () => checkShim(),
  () => checkGuard(),
  () => checkInit(),
  checkCompiler,
  checkStore,
  checkExec,
  checkSpace,
  checkLinks,
  checkRuntimeDirectory,
  checkPidMax,
  checkOpenFiles,
]

/** Runs all checks, one after another; never throws for what they find, nor for an installation that failed: the check of criu says why. */
export async function doctor(options: DoctorOptions = {}): Promise<DoctorReport> {
  const context: CheckContext = {
    store: resolve(options.store ?? defaultRoot()),
    kernelRelease: options.criu?.kernelRelease ?? release(),
    deep: options.deep ?? false,
    criu: await getCriu(options),
  }
  const checks: CheckResult[] = []
  for (const check of CHECKS) {
    const result = await check(context)
    if (!result) continue
    checks.push(result)
    options.onResult?.(result)
  }
  return { forksWork: checks.every(({ status }) => status !== 'fail'), checks }
}

async function getCriu(options: DoctorOptions): Promise<Criu | Error> {
  try {
    return findCriu(options.criu)
  } catch (error) {
    // An explicit one that does not suit is for the user to correct: a private one would not be looked at.
    const explicit = options.criu?.criu ?? process.env.WARMFORK_CRIU
    if (!options.install || explicit) return error as Error
  }
  try {
    const { prefix, kernelRelease } = options.criu ?? {}
    return await installCriu({
      ...(prefix === undefined ? {} : { prefix }),
      ...(kernelRelease === undefined ? {} : { kernelRelease }),
      ...(options.onProgress ? { onProgress: options.onProgress } : {}),
    })
  } catch (error) {
    return error as Error
  }
}
