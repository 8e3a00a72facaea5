/** Takes a checkpoint of a running tree with `criu dump`, into a directory. The tree goes on whatever comes of it. */
import { closeSync, openSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { errnoOf, WarmforkError } from '../../errors.js'
import { parseImageFile } from '../../image/image-file.js'
import { decode } from '../../image/message.js'
import { sendSignal, signalNumber } from '../../linux/libc.js'
import { type ExitStatus, reaper } from '../../linux/reaper.js'
import { spawnProgram } from '../../linux/spawn.js'
import { dumpArguments } from './args.js'
import { explain, readLog } from './log.js'
import { endGroup } from './restorer.js'
import { DumpStatistics } from './rpc.js'

export interface DumpCall {
  argv: readonly string[]
  env: Readonly<Record<string, string>>
  pid: number
  /** What is dumped, for messages. */
  command: readonly string[]
  directory: string
  unprivileged: boolean
  timeoutMs: number
  /** What belongs to the outside, in criu's words. */
  external: readonly string[]
  signal?: AbortSignal | undefined
  /** Called with criu's process id, so that somebody ends it should we die. */
  onStart(pid: number): void
  onEnd(pid: number): void
}

/** In the image's directory: criu's stderr. */
const WORDS = 'dump.stderr'

/** How long the tree stood still. Throws CHECKPOINT_FAILED with criu's reasons, DISK_FULL, TIMEOUT. */
export async function dump(call: DumpCall): Promise<{ frozenMs: number }> {
  const tried = `checkpoint process ${call.pid} (${call.command.join(' ')})`
  const args = dumpArguments({ ...call, logFile: 'dump.log' })
  const started = performance.now()
  const words = join(call.directory, WORDS)
  let pid: number
  try {
    pid = startCriu([...call.argv, ...args], call.env, words)
  } catch (cause) {
    const happened = `criu cannot be started: ${cause instanceof Error ? cause.message : cause}`
    throw new WarmforkError('CHECKPOINT_FAILED', { tried, happened, cause })
  }
  call.onStart(pid)
  let isRunning = true
  let ended: 'timeout' | 'abort' | undefined
  const end = (why: 'timeout' | 'abort') => () => {
    ended ??= why
    if (isRunning) sendSignal(pid, signalNumber('SIGKILL'))
  }
  const timer = setTimeout(end('timeout'), call.timeoutMs)
  const onAbort = end('abort')
  call.signal?.addEventListener('abort', onAbort, { once: true })
  try {
    const { code, signal } = await new Promise<ExitStatus>((exited) => reaper.watch(pid, { exited }))
    isRunning = false
    if (code === 0) return { frozenMs: frozenMs(call.directory) ?? performance.now() - started }
    call.signal?.throwIfAborted()
    if (ended === 'timeout') {
      throw new WarmforkError('TIMEOUT', {
        tried,
        happened: `criu was not done after ${call.timeoutMs} ms (checkpointTimeoutMs)`,
      })
    }
    const log = readLog(join(call.directory, 'dump.log')) || readLog(words)
    const details = { tried, happened: explain(log, signal ?? `status ${code}`), output: log.slice(-64 * 1024) }
    throw new WarmforkError(
      /No space left on device|Disk quota exceeded/.test(log) ? 'DISK_FULL' : 'CHECKPOINT_FAILED',
      details,
    )
  } finally {
    clearTimeout(timer)
    // Helpers of a criu that was killed go on without it.
    endGroup(pid)
    call.signal?.removeEventListener('abort', onAbort)
    call.onEnd(pid)
  }
}

/** Not by Node's own spawn, which forks: the source stands still meanwhile, 5 ms for a supervisor of 100 MiB. */
function startCriu(argv: readonly string[], env: Readonly<Record<string, string>>, words: string): number {
  const fds: number[] = []
  try {
    fds.push(openSync('/dev/null', 'r+'), openSync(words, 'w', 0o600))
    return spawnProgram(argv, env, [fds[0]!, fds[0]!, fds[1]!])
  } finally {
    for (const fd of fds) closeSync(fd)
  }
}

function frozenMs(directory: string): number | undefined {
  try {
    const { entries } = parseImageFile('stats-dump', readFileSync(join(directory, 'stats-dump')))
    const { dump: statistics } = decode(DumpStatistics, entries[0]!.message)
    return statistics ? statistics.frozenTime / 1000 : undefined
  } catch (error) {
    if (errnoOf(error) === undefined && !(error instanceof Error)) throw error
    return undefined
  }
}
