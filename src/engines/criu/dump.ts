/** Takes a checkpoint of a running tree with `criu dump`, into a directory. The tree goes on whatever comes of it. */
import { spawn } from 'node:child_process'
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { errnoOf, WarmforkError } from '../../errors.js'
import { parseImageFile } from '../../image/image-file.js'
import { decode } from '../../image/message.js'
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

/** How long to wait, once criu has ended, for the end of its stderr. */
const LAST_WORDS_MS = 500

/** How long the tree stood still. Throws CHECKPOINT_FAILED with criu's reasons, DISK_FULL, TIMEOUT. */
export async function dump(call: DumpCall): Promise<{ frozenMs: number }> {
  const tried = `checkpoint process ${call.pid} (${call.command.join(' ')})`
  const args = dumpArguments({ ...call, logFile: 'dump.log' })
  const [file, ...before] = call.argv
  const started = performance.now()
  const child = spawn(file!, [...before, ...args], {
    cwd: '/',
    env: call.env,
    stdio: ['ignore', 'ignore', 'pipe'],
    detached: true,
  })
  if (child.pid !== undefined) call.onStart(child.pid)
  let stderr = ''
  child.stderr.on('data', (chunk: Buffer) => {
    stderr = (stderr + chunk.toString('utf8')).slice(-64 * 1024)
  })
  let ended: 'timeout' | 'abort' | undefined
  const end = (why: 'timeout' | 'abort') => () => {
    ended ??= why
    child.kill('SIGKILL')
  }
  const timer = setTimeout(end('timeout'), call.timeoutMs)
  const onAbort = end('abort')
  call.signal?.addEventListener('abort', onAbort, { once: true })
  try {
    const exit = await new Promise<string | 0>((resolve) => {
      const done = (code: number | null, signal: NodeJS.Signals | null) =>
        resolve(signal ?? (code === 0 ? 0 : `status ${code}`))
      child.once('error', (error) => resolve(error.message))
      child.once('close', done)
      // A criu that was killed leaves helpers behind that have its stderr open and never end.
      child.once('exit', (code, signal) => setTimeout(done, LAST_WORDS_MS, code, signal).unref())
    })
    if (exit === 0) return { frozenMs: frozenMs(call.directory) ?? performance.now() - started }
    call.signal?.throwIfAborted()
    if (ended === 'timeout') {
      throw new WarmforkError('TIMEOUT', {
        tried,
        happened: `criu was not done after ${call.timeoutMs} ms (checkpointTimeoutMs)`,
      })
    }
    const log = readLog(join(call.directory, 'dump.log')) || stderr
    const details = { tried, happened: explain(log, exit), output: log.slice(-64 * 1024) }
    throw new WarmforkError(
      /No space left on device|Disk quota exceeded/.test(log) ? 'DISK_FULL' : 'CHECKPOINT_FAILED',
      details,
    )
  } finally {
    clearTimeout(timer)
    child.stderr.destroy()
    if (child.pid !== undefined) endGroup(child.pid)
    call.signal?.removeEventListener('abort', onAbort)
    if (child.pid !== undefined) call.onEnd(child.pid)
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
