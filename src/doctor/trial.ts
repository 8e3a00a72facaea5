/**
 * The proof that counts: a small process is dumped and restored here and now, and must answer over new pipes. It knows
 * criu's command line and processes, but no generations: nothing of the image is edited.
 */
import { type ChildProcess, spawn } from 'node:child_process'
import { closeSync, mkdtempSync, read, readFileSync, readlinkSync, rmSync, writeSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Criu } from '../engines/criu/binary.js'
import { ensureKernelCache } from '../engines/criu/kdat.js'
import { meaningfulLines, readLog } from '../engines/criu/log.js'
import { pipe, sendSignal } from '../linux/libc.js'
import { isAlive } from '../linux/proc.js'
import { reaper } from '../linux/reaper.js'

/** Milliseconds for a dump, for a restore and for the answer; each takes some 20. */
const STEP_TIMEOUT_MS = 20_000

export interface TrialResult {
  readonly dumpMs: number
  /** Median, until criu has ended and the process is there, stopped. */
  readonly restoreMs: number
}

export interface TrialOptions {
  /** The program to dump; it must read and write nothing, or echo its stdin. @default ['cat'] */
  command?: readonly string[]
  /** What must be in its environment. */
  env?: Readonly<Record<string, string>>
  /** Called when the process runs, resolves when it may be dumped. */
  ready?: (pid: number) => Promise<void>
  /** Whether the restored process must echo a line. @default true */
  echo?: boolean
  /** How often it is restored. @default 1 */
  restores?: number
  /** Environments of criu for restores to be compared; each gets `restores`, in turns. @default [{}] */
  criuEnvs?: readonly Readonly<Record<string, string>>[]
}

export class TrialError extends Error {
  override readonly name = 'TrialError'
}

/** Dumps and restores one process; ends it and removes all files. Throws TrialError with what criu said. One result for each of `criuEnvs`. */
export async function tryCriu(criu: Criu, options: TrialOptions = {}): Promise<TrialResult[]> {
  const directory = mkdtempSync(join(tmpdir(), 'warmfork-trial-'))
  const pipes = [pipe(), pipe()] as const
  const [stdin, stdout] = pipes
  let source: ChildProcess | undefined
  try {
    const [command, ...args] = options.command ?? ['cat']
    source = spawn(command!, args, {
      // A session of its own, as criu asks of what it dumps; a directory that is still there at the restore.
      detached: true,
      cwd: '/',
      env: { PATH: process.env.PATH ?? '', ...options.env },
      stdio: [stdin.read, stdout.write, stdout.write],
    })
    const ended = new Promise<void>((done) => source!.once('exit', () => done()))
    await new Promise<void>((done, failed) => source!.once('spawn', done).once('error', failed))
    const pid = source.pid!
    await (options.ready ?? waitForExec)(pid)

    const unprivileged = process.geteuid?.() === 0 ? [] : ['--unprivileged']
    const { env } = await ensureKernelCache(criu, { unprivileged: unprivileged.length > 0 })
    const keys = [readlinkSync(`/proc/self/fd/${stdin.read}`), readlinkSync(`/proc/self/fd/${stdout.write}`)]
    const common = ['--images-dir', directory, '--no-default-config', '-v1', ...unprivileged]

    const dumpStart = performance.now()
    await runCriu(
      criu,
      ['dump', '--tree', String(pid), '--log-file', 'dump.log', ...common],
      directory,
      'dump.log',
      env,
    )
    const dumpMs = performance.now() - dumpStart
    // criu has ended it; its id must be free for the restore.
    await atMost(ended)

    const variants = options.criuEnvs ?? [{}]
    const times: number[][] = variants.map(() => [])
    for (let i = 0; i < (options.restores ?? 1); i++) {
      for (const [variant, extra] of variants.entries()) {
        times[variant]!.push(
          await restoreOnce(criu, directory, keys, common, { ...env, ...extra }, options.echo ?? true),
        )
      }
    }
    return times.map((all) => ({ dumpMs, restoreMs: all.sort((a, b) => a - b)[Math.floor(all.length / 2)]! }))
  } finally {
    if (source?.exitCode === null && source.signalCode === null) source.kill('SIGKILL')
    for (const { read, write } of pipes) {
      closeSync(read)
      closeSync(write)
    }
    rmSync(directory, { recursive: true, force: true })
  }
}

/** One restore with new pipes; the process is ended and reaped. Resolves to what it took, in milliseconds. */
async function restoreOnce(
  criu: Criu,
  directory: string,
  keys: readonly string[],
  common: readonly string[],
  env: Record<string, string>,
  echo: boolean,
): Promise<number> {
  const stdin = pipe()
  const stdout = pipe()
  const open = new Set([stdin.read, stdin.write, stdout.read, stdout.write])
  const close = (fd: number) => {
    if (open.delete(fd)) closeSync(fd)
  }
  const pidFile = join(directory, 'pid')
  let restored: number | undefined
  try {
    const start = performance.now()
    // A sibling of criu is our own child: we can reap it, wherever the system's init does not.
    const how = ['--restore-detached', '--restore-sibling', '--leave-stopped', '--pidfile', pidFile]
    const fds = ['--inherit-fd', `fd[3]:${keys[0]}`, '--inherit-fd', `fd[4]:${keys[1]}`]
    try {
      const args = ['restore', '--log-file', 'restore.log', ...how, ...fds, ...common]
      await runCriu(criu, args, directory, 'restore.log', env, [stdin.read, stdout.write])
    } finally {
      restored = readPid(pidFile)
      rmSync(pidFile, { force: true })
    }
    const took = performance.now() - start
    // The ends of the restored process are its alone now: where it ends, we read an end of file.
    close(stdin.read)
    close(stdout.write)
    if (restored === undefined) throw new TrialError('criu did not say which process it restored')
    sendSignal(restored, 18 /* SIGCONT */)
    if (echo) await expectEcho(stdin.write, stdout.read)
    return took
  } finally {
    if (restored !== undefined) await endAndReap(restored)
    for (const fd of open) close(fd)
  }
}

function runCriu(
  criu: Criu,
  args: readonly string[],
  directory: string,
  log: string,
  env: Record<string, string>,
  fds: readonly number[] = [],
): Promise<void> {
  return new Promise((done, failed) => {
    const child = spawn(criu.argv[0]!, [...criu.argv.slice(1), ...args], {
      stdio: ['ignore', 'pipe', 'pipe', ...fds],
      env: { ...process.env, ...env },
      timeout: STEP_TIMEOUT_MS,
      killSignal: 'SIGKILL',
    })
    let said = ''
    for (const stream of [child.stdout!, child.stderr!]) {
      stream.on('data', (data) => {
        said = `${said}${data}`.slice(-4096)
      })
    }
    child.once('error', (error) => failed(new TrialError(`${criu.argv[0]}: ${error.message}`)))
    // criu has closed its ends by then: what it restores gets the descriptors of the image, not criu's own.
    child.once('close', (code, signal) => {
      if (code === 0) return done()
      const ending = signal === 'SIGKILL' ? `no end within ${STEP_TIMEOUT_MS} ms` : `exit status ${code ?? signal}`
      const line = said
        .trim()
        .split('\n')[0]
        ?.replace(/[:\s]+$/, '')
      failed(new TrialError(`criu ${args[0]}: ${meaningfulLines(readLog(join(directory, log)))[0] || line || ending}`))
    })
  })
}

function readPid(file: string): number | undefined {
  try {
    return Number(readFileSync(file, 'latin1').trim()) || undefined
  } catch {
    return undefined
  }
}

/** Until the child has executed its program: before, it is a copy of ourselves. */
async function waitForExec(pid: number): Promise<void> {
  const own = readlinkSync('/proc/self/exe')
  for (let i = 0; i < 200; i++) {
    try {
      if (readlinkSync(`/proc/${pid}/exe`) !== own) return
    } catch {
      // Gone: the dump will say so.
    }
    await sleep(5)
  }
}

/** Writes a line and waits for any answer. A read that is still waiting then ends with the process, whose pipe has no other writer. */
function expectEcho(to: number, from: number): Promise<void> {
  return new Promise((done, failed) => {
    const timer = setTimeout(() => failed(new TrialError('the restored process does not answer')), STEP_TIMEOUT_MS)
    read(from, Buffer.alloc(64), 0, 64, null, (error, bytes) => {
      clearTimeout(timer)
      if (error) failed(error)
      else if (bytes === 0) failed(new TrialError('the restored process has ended'))
      else done()
    })
    writeSync(to, 'warmfork\n')
  })
}

/** Ends a restored process and reads its status, so that its id is free when this resolves. */
async function endAndReap(pid: number): Promise<void> {
  const reaped = new Promise<void>((done) => reaper.watch(pid, { exited: () => done() }))
  sendSignal(pid, 9 /* SIGKILL */)
  await atMost(reaped)
  if (isAlive(pid)) reaper.unwatch(pid)
}

/** Waits for something, but no longer than one step may take. The timer keeps us alive: a listener for SIGCHLD does not. */
function atMost(event: Promise<void>): Promise<void> {
  return new Promise((done) => {
    const timer = setTimeout(done, STEP_TIMEOUT_MS)
    event.then(() => {
      clearTimeout(timer)
      done()
    })
  })
}
