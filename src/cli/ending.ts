/** Commands that work for a while: a signal ends them as it should, and leaves nothing half done. It knows no subcommand. */
import { exitStatusOf } from './failure.js'

/** Runs the work with a signal that is raised when this process is to end, which it does as soon as the work has cleaned up. */
export async function ending<T>(work: (signal: AbortSignal) => Promise<T>): Promise<T> {
  const abort = new AbortController()
  let by: NodeJS.Signals | undefined
  const stop = (signal: NodeJS.Signals) => {
    by ??= signal
    abort.abort()
  }
  const signals = ['SIGINT', 'SIGTERM', 'SIGHUP'] as const
  for (const signal of signals) process.on(signal, stop)
  try {
    return await work(abort.signal)
  } catch (error) {
    if (by !== undefined && abort.signal.aborted) process.exit(exitStatusOf({ code: null, signal: by }))
    throw error
  } finally {
    for (const signal of signals) process.off(signal, stop)
  }
}
