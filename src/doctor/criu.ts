/** Checks of criu: there, suitable, its kernel cache, and whether it works here. */
import { existsSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { formatVersion } from '../engines/criu/binary.js'
import { ensureKernelCache } from '../engines/criu/kdat.js'
import { WarmforkError } from '../errors.js'
import { threadIds } from '../linux/proc.js'
import type { CheckContext, CheckResult } from './check.js'
import { NATIVE_DIRECTORY } from './native.js'
import { tryCriu } from './trial.js'

export function checkCriu({ criu }: CheckContext): CheckResult {
  const name = 'criu'
  if (criu instanceof WarmforkError)
    return { name, status: 'fail', found: criu.happened, cost: 'no fork', remedy: criu.remedy }
  if (criu instanceof Error) return { name, status: 'fail', found: criu.message, cost: 'no fork' }
  return { name, status: 'ok', found: `${formatVersion(criu.version)}, ${criu.argv.at(-1)}` }
}

export async function checkKernelCache({ criu }: CheckContext): Promise<CheckResult | undefined> {
  if (criu instanceof Error) return undefined
  const unprivileged = process.geteuid?.() !== 0
  const cache = await ensureKernelCache(criu, { unprivileged })
  const name = 'kernel cache'
  if (cache.state === 'none') {
    return {
      name,
      status: 'warn',
      found: cache.reason ?? 'none',
      cost: 'each fork takes 15-30 ms longer: criu probes the kernel at each start',
      remedy: 'Mount a tmpfs on /run, or run `warmfork doctor` as root with CAP_SYS_ADMIN after each boot.',
    }
  }
  return { name, status: 'ok', found: `${cache.file}${cache.state === 'made' ? ', made now' : ''}` }
}

export async function checkTrial({ criu }: CheckContext): Promise<CheckResult | undefined> {
  if (criu instanceof Error) return undefined
  const name = 'trial'
  const start = performance.now()
  try {
    const [result] = await tryCriu(criu)
    const total = Math.round(performance.now() - start)
    return {
      name,
      status: 'ok',
      found: `a process was dumped in ${Math.round(result!.dumpMs)} ms and restored in ${Math.round(result!.restoreMs)} ms (${total} ms in all)`,
    }
  } catch (error) {
    const message = (error as Error).message
    const rights = /not permitted|permission denied|EPERM|EACCES|capabilit/i.test(message)
    return {
      name,
      status: 'fail',
      found: message,
      cost: 'no fork: criu does not work here',
      remedy: rights
        ? 'See the lines above on capabilities, seccomp and confinement.'
        : 'See the lines above; else look the message up in the issues of CRIU.',
    }
  }
}

/** As many threads as a JVM has: hardware breakpoints cost something for each. */
const THREADS = 100

/** 12 of 42 ms on the virtual machine where this was written; seconds elsewhere (criu#2905). Less than this is noise. */
const NOTABLE_MS = 5

/**
 * criu stops each thread at the end of its restore by a hardware breakpoint. Some hypervisors take milliseconds for each;
 * CRIU_FAULT=130, which a supervisor sets, makes criu step through the system calls instead.
 */
export async function checkBreakpoints({ criu, deep }: CheckContext): Promise<CheckResult | undefined> {
  if (criu instanceof Error || !deep) return undefined
  const name = 'breakpoints'
  const shim = join(NATIVE_DIRECTORY, 'libwarmfork-shim.so')
  try {
    const [plain, without] = await tryCriu(criu, {
      command: [
        process.execPath,
        '-e',
        `for (let i = 0; i < ${THREADS}; i++) fs.stat('/', () => {}); setInterval(() => {}, 1e6)`,
      ],
      env: {
        UV_THREADPOOL_SIZE: String(THREADS),
        UV_USE_IO_URING: '0',
        ...(existsSync(shim) ? { LD_PRELOAD: shim } : {}),
      },
      ready: async (pid) => {
        for (let i = 0; i < 500 && threadIds(pid).length < THREADS; i++) await sleep(20)
        await sleep(200)
      },
      echo: false,
      restores: 5,
      criuEnvs: [{}, { CRIU_FAULT: '130' }],
    })
    const [a, b] = [Math.round(plain!.restoreMs), Math.round(without!.restoreMs)]
    const found = `${THREADS} threads are restored in ${a} ms, without hardware breakpoints in ${b} ms`
    // A supervisor restores without them, so this says what that gains; it would be the other way round only on a CPU not yet seen.
    return b - a < NOTABLE_MS
      ? { name, status: 'ok', found }
      : { name, status: 'warn', found, cost: `${b - a} ms for each fork of a program with so many threads` }
  } catch (error) {
    return { name, status: 'warn', found: `not measured: ${(error as Error).message}` }
  }
}
