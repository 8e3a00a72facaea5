/** Stock CRIU, for comparison: the unedited dump of the same program, restored by the same criu's own command. */
import { type ChildProcess, spawn } from 'node:child_process'
import { closeSync, existsSync, fstatSync, mkdirSync, read, rmSync, writeSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { type Criu, findCriu } from '../engines/criu/binary.js'
import { dump } from '../engines/criu/dump.js'
import { isIdCollision, readLog, summarize } from '../engines/criu/log.js'
import { pipe, sendSignal } from '../linux/libc.js'
import { isAlive, processTree } from '../linux/proc.js'
import { preloadEnvironment } from '../shim/shim.js'

const TIMEOUT_MS = 120_000
const ATTEMPTS = 40
const RETRY_MS = 100

export class StockRestore {
  readonly #criu: Criu
  readonly #keys: string[]

  private constructor(
    readonly directory: string,
    readonly pid: number,
    criu: Criu,
    keys: string[],
    /** How long the dump took, with criu's start. */
    readonly dumpMs: number,
  ) {
    this.#criu = criu
    this.#keys = keys
  }

  /** Boots the program, dumps it and ends it: its ids must be free for a stock restore. */
  static async prepare(
    command: readonly string[],
    env: Readonly<Record<string, string>>,
    directory: string,
    ready = /^ready$/m,
  ): Promise<StockRestore> {
    const criu = findCriu()
    rmSync(directory, { recursive: true, force: true })
    mkdirSync(directory, { recursive: true, mode: 0o700 })
    const [stdin, stdout, stderr] = [pipe(), pipe(), pipe()]
    const [file, ...args] = command
    const child = spawn(file!, args, {
      stdio: [stdin.read, stdout.write, stderr.write],
      detached: true,
      env: preloadEnvironment(env),
    })
    try {
      await once(child)
      for (let text = ''; !ready.test(text); ) text += await nextChunk(stdout.read)
      const inodes = [stdin.read, stdout.write, stderr.write].map((fd) => fstatSync(fd, { bigint: true }).ino)
      const none = () => {}
      const began = performance.now()
      await dump({
        argv: criu.argv,
        env,
        pid: child.pid!,
        command,
        directory,
        unprivileged: false,
        external: [],
        timeoutMs: TIMEOUT_MS,
        onStart: none,
        onEnd: none,
      })
      const dumpMs = performance.now() - began
      return new StockRestore(
        directory,
        child.pid!,
        criu,
        inodes.map((inode) => `pipe:[${inode}]`),
        dumpMs,
      )
    } finally {
      await endTree(child.pid!)
      for (const { read, write } of [stdin, stdout, stderr]) {
        closeSync(read)
        closeSync(write)
      }
    }
  }

  /**
   * Milliseconds from the start of `criu restore` to the copy's first byte. Its ids are those of the dump, which others may
   * have been given since: then it is tried again.
   */
  async measure(): Promise<number> {
    for (let attempt = 1; ; attempt++) {
      try {
        return await this.#measure()
      } catch (error) {
        if (attempt === ATTEMPTS || !isIdCollision((error as Error).message)) throw error
        await sleep(RETRY_MS)
      }
    }
  }

  async #measure(): Promise<number> {
    const [stdin, stdout, stderr] = [pipe(), pipe(), pipe()]
    const inherited = this.#keys.flatMap((key, index) => ['--inherit-fd', `fd[${index + 3}]:${key}`])
    const [file, ...before] = this.#criu.argv
    const args = ['restore', '--images-dir', this.directory, '--log-file', 'restore.log', '-v1', '--no-default-config']
    const flags = ['--restore-detached', '--manage-cgroups=ignore', '--tcp-close', '--file-locks', ...inherited]
    const started = performance.now()
    const criu = spawn(file!, [...before, ...args, ...flags], {
      stdio: ['ignore', 'ignore', 'ignore', stdin.read, stdout.write, stderr.write],
      timeout: TIMEOUT_MS,
    })
    const failure = exitOf(criu, this.directory)
    failure.catch(() => {})
    try {
      // As early as can be: the copy finds the line waiting.
      writeSync(stdin.write, '1\n')
      await nextChunk(stdout.read, failure)
      return performance.now() - started
    } finally {
      await endTree(this.pid)
      for (const { read, write } of [stdin, stdout, stderr]) {
        closeSync(read)
        closeSync(write)
      }
    }
  }

  remove(): void {
    rmSync(this.directory, { recursive: true, force: true })
  }
}

function once(child: ChildProcess): Promise<void> {
  return new Promise((resolve, reject) => {
    child.once('spawn', resolve)
    child.once('error', reject)
  })
}

/** Rejects when criu fails; says nothing when it succeeds. */
function exitOf(criu: ChildProcess, directory: string): Promise<never> {
  return new Promise((_, reject) => {
    criu.once('error', reject)
    criu.once('exit', (code, signal) => {
      if (code !== 0)
        reject(new Error(summarize(readLog(join(directory, 'restore.log')), `criu ended with ${signal ?? code}`)))
    })
  })
}

function nextChunk(fd: number, failure?: Promise<never>): Promise<string> {
  const buffer = Buffer.allocUnsafe(4096)
  const chunk = new Promise<string>((resolve, reject) => {
    read(fd, buffer, 0, buffer.length, null, (error, length) =>
      error ? reject(error) : resolve(buffer.toString('utf8', 0, length)),
    )
  })
  return failure ? Promise.race([chunk, failure]) : chunk
}

async function endTree(pid: number): Promise<void> {
  const tree = processTree(pid)
  for (const one of tree) sendSignal(one.pid, 9)
  for (const { pid: one, startTicks } of tree) {
    for (let i = 0; isAlive(one, startTicks) && i < 500; i++) await sleep(2)
  }
  // A zombie keeps its id until its parent, here the system's init, has read its status: some take a second. Asked for with
  // one small call, so that no garbage of this wait is collected in the next measurement.
  for (let i = 0; existsSync(`/proc/${pid}`) && i < 500; i++) await sleep(10)
}
