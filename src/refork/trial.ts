/**
 * Tries a generation before anybody is served by it: one fork of it has to be restored, do its hooks, pass the check that the
 * template passed, and live on. It listens at sockets of its own that nobody knows. This file knows engines and children, and
 * neither pools nor policies.
 */
import { setTimeout as sleep } from 'node:timers/promises'
import type { Child, Resumption } from '../child.js'
import type { Engine, ForkedProcess } from '../engines/engine.js'
import { WarmforkError } from '../errors.js'
import type { ExitStatus } from '../linux/reaper.js'
import type { Readiness, TrialCheck, TrialOptions } from '../options.js'
import { OUTPUT_TAIL_BYTES } from '../pipes.js'
import { untilReadyAgain } from '../readiness.js'
import { lastLines } from '../template.js'

export interface TrialSettings extends Required<Omit<TrialOptions, 'check'>> {
  readonly engine: Engine
  readonly ready: Readiness
  readonly check?: TrialCheck | undefined
  /** What forks are given that nobody gives anything. */
  readonly resumption: Resumption
  readonly signal: AbortSignal
  readonly childOf: (forked: ForkedProcess) => Child
}

/** @throws TRIAL_FAILED with the reason, or that of `signal` */
export async function tryGeneration(number: number, settings: TrialSettings): Promise<void> {
  const { engine, signal, timeoutMs } = settings
  const tried = `try generation ${number}`
  const late = new AbortController()
  const timer = setTimeout(() => {
    const happened = `its first fork was not ready after ${timeoutMs} ms (trial.timeoutMs)`
    late.abort(new WarmforkError('TRIAL_FAILED', { tried, happened }))
  }, timeoutMs)
  const onAbort = () => late.abort(signal.reason)
  signal.throwIfAborted()
  signal.addEventListener('abort', onAbort)
  let child: Child | undefined
  let output = ''
  try {
    const source = await engine.open(number, { ahead: 0, listeners: 'private' })
    try {
      child = settings.childOf(await source.fork({ signal: late.signal }))
      for (const stream of child.isTTY ? [child.terminal] : [child.stdout, child.stderr]) {
        stream.on('data', (chunk: Buffer) => {
          output = (output + chunk.toString()).slice(-OUTPUT_TAIL_BYTES)
        })
      }
      child.resume(settings.resumption)
      await Promise.race([
        pass(child, source.ports ?? new Map(), () => output, settings, late.signal),
        endOf(child, tried),
        aborted(late.signal),
      ])
    } finally {
      await child?.end({ graceMs: 0 })
      child?.close()
      await source.close()
    }
  } catch (cause) {
    if (signal.aborted) throw signal.reason
    if (cause instanceof WarmforkError && cause.code === 'TRIAL_FAILED') throw withOutput(cause, tried, output)
    const happened = `its first fork failed: ${cause instanceof Error ? cause.message : String(cause)}`
    throw new WarmforkError('TRIAL_FAILED', { tried, happened, cause, output })
  } finally {
    clearTimeout(timer)
    signal.removeEventListener('abort', onAbort)
    // What waits yet has nothing to wait for.
    late.abort()
  }
}

async function pass(
  child: Child,
  ports: ReadonlyMap<number, number>,
  output: () => string,
  { ready, check, settleMs }: TrialSettings,
  signal: AbortSignal,
): Promise<void> {
  await child.ready
  await untilReadyAgain(ready, ports, {
    pid: child.pid,
    get output() {
      return output()
    },
    signal,
  })
  await check?.(child, { ports, signal })
  // Long enough for a program that cannot bear being copied to break.
  await sleep(settleMs, undefined, { signal })
}

/** A fork whose work is done may end well; any other end is a failure. */
async function endOf(child: Child, tried: string): Promise<void> {
  const status = await child.exit
  if (status.code === 0) return
  throw new WarmforkError('TRIAL_FAILED', { tried, happened: `its first fork ended ${words(status)}` })
}

function words({ code, signal }: ExitStatus): string {
  return signal ? `by ${signal}` : `with status ${code}`
}

function withOutput(error: WarmforkError, tried: string, output: string): WarmforkError {
  const last = lastLines(output)
  if (!last) return error
  return new WarmforkError('TRIAL_FAILED', { tried, happened: `${error.happened}; it wrote last: ${last}`, output })
}

function aborted(signal: AbortSignal): Promise<never> {
  return new Promise((_, reject) => {
    if (signal.aborted) reject(signal.reason)
    signal.addEventListener('abort', () => reject(signal.reason), { once: true })
  })
}
