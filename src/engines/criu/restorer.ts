/**
 * A criu that was started ahead of its restore: executed, linked, and waiting for one request on a socket, with the
 * pipes of the child to come already in its hands and the child's directory written. That takes 4 of 12 ms off a fork.
 * One restorer makes one restore. It knows a derived image and descriptors, but no generation and no pool.
 */
import { type ChildProcess, spawn } from 'node:child_process'
import { closeSync, read, rmSync } from 'node:fs'
import { join } from 'node:path'
import { errnoOf, WarmforkError } from '../../errors.js'
import { type DerivedImage, writeDerived } from '../../image/derive.js'
import { DecodeError, decode } from '../../image/message.js'
import { pipe, send, sendSignal, seqpacketPair, waitChild } from '../../linux/libc.js'
import { processTree, stat } from '../../linux/proc.js'
import type { StdioFds } from '../engine.js'
import { restoreRequest } from './args.js'
import { readLog } from './log.js'
import { Response } from './rpc.js'

export interface RestorerOptions {
  /** How criu is executed, with what comes before its arguments (a loader, setpriv). */
  argv: readonly string[]
  env: Readonly<Record<string, string>>
  derived: DerivedImage
  /** The prepared image that the derived one links to. */
  preparedDirectory: string
  /** Made by this restorer and removed by it. */
  directory: string
  /** CRIU's keys of the child's streams that are open in the image. */
  stdio: readonly { stream: 0 | 1 | 2; key: string }[]
  /** The caller's descriptors in place of new pipes. */
  given: StdioFds | undefined
  /** Further descriptors that the restored process takes over: listeners, the page file. */
  inherited: readonly { key: string; fd: number }[]
  unprivileged: boolean
  /** Called with each pipe end that the child gets, so that it can be made accessible to the child's user. */
  onPipeEnd: (fd: number) => void
  /** The same for what is made in the directory. */
  onPath: (path: string) => void
}

export type RestoreOutcome =
  | { ok: true; pid: number; pipes: StdioFds | undefined }
  | { ok: false; log: string; timedOut: boolean; exit: string }

/** Where criu's descriptors begin: 0 to 2 are its own, 3 is the socket. */
const FIRST_INHERITED = 4

/** The same for all: the largest answer is that of an error, far below. */
const RESPONSE_BYTES = 64 * 1024

export class Restorer {
  readonly #options: RestorerOptions
  readonly #process: ChildProcess
  readonly #exited: Promise<string>
  readonly #keys: { key: string; fd: number }[]
  #socket: number
  #pipes: [number, number, number] | undefined
  #ended = false
  #stderr = ''

  /** Throws what making pipes, a directory or a process throws: FDS_EXHAUSTED, DISK_FULL, CRIU_MISSING. */
  constructor(options: RestorerOptions) {
    this.#options = options
    const theirs: number[] = []
    const ours: number[] = []
    try {
      writeDerived(options.derived, options.preparedDirectory, options.directory, options.onPath)
      const [mySocket, itsSocket] = seqpacketPair()
      ours.push(mySocket)
      theirs.push(itsSocket)
      this.#socket = mySocket
      const ends = options.given ?? this.#makePipes(ours, theirs)
      const inherited = [...options.stdio.map(({ stream, key }) => ({ key, fd: ends[stream] })), ...options.inherited]
      this.#keys = inherited.map(({ key }, index) => ({ key, fd: FIRST_INHERITED + index }))
      const [file, ...args] = options.argv
      this.#process = spawn(file!, [...args, 'swrk', '3'], {
        cwd: '/',
        env: options.env,
        stdio: ['ignore', 'ignore', 'pipe', itsSocket, ...inherited.map(({ fd }) => fd)],
      })
    } catch (error) {
      for (const fd of ours) closeSync(fd)
      this.#removeDirectory()
      throw translated(error)
    } finally {
      for (const fd of theirs) closeSync(fd)
    }
    this.#process.stderr?.on('data', (chunk: Buffer) => {
      this.#stderr = (this.#stderr + chunk.toString('utf8')).slice(-RESPONSE_BYTES)
    })
    this.#exited = new Promise((resolve) => {
      this.#process.once('error', (error) => resolve(error.message))
      this.#process.once('exit', (code, signal) => resolve(signal ?? `status ${code}`))
    })
    // A supervisor that has nothing else to do may end.
    this.#process.unref()
    ;(this.#process.stderr as { unref?(): void } | null)?.unref?.()
  }

  /** Of criu itself; undefined where it could not be started. */
  get pid(): number | undefined {
    return this.#process.pid
  }

  /** Whether criu still waits for its request. */
  get usable(): boolean {
    return (
      !this.#ended &&
      this.#process.exitCode === null &&
      this.#process.signalCode === null &&
      this.#process.pid !== undefined
    )
  }

  #makePipes(ours: number[], theirs: number[]): StdioFds {
    const stdin = pipe()
    ours.push(stdin.write)
    theirs.push(stdin.read)
    const stdout = pipe()
    ours.push(stdout.read)
    theirs.push(stdout.write)
    const stderr = pipe()
    ours.push(stderr.read)
    theirs.push(stderr.write)
    this.#pipes = [stdin.write, stdout.read, stderr.read]
    for (const fd of [stdin.read, stdout.write, stderr.write]) this.#options.onPipeEnd(fd)
    return [stdin.read, stdout.write, stderr.write]
  }

  /** Asks for the restore. The restorer is spent afterwards, whatever comes of it. */
  async restore(timeoutMs: number, logLevel: 1 | 4 = 1): Promise<RestoreOutcome> {
    const { directory, derived, unprivileged } = this.#options
    this.#ended = true
    let timedOut = false
    const timer = setTimeout(() => {
      timedOut = true
      this.#process.kill('SIGKILL')
    }, timeoutMs)
    this.#process.ref()
    try {
      const request = restoreRequest({
        directory,
        logFile: 'restore.log',
        logLevel,
        inherited: this.#keys,
        unprivileged,
      })
      const response = await this.#exchange(request)
      if (response?.success && response.restored?.pid === derived.rootPid) {
        const pipes = this.#pipes
        this.#pipes = undefined
        return { ok: true, pid: derived.rootPid, pipes }
      }
      const exit = await this.#exited
      const log = readLog(join(directory, 'restore.log'))
      this.#endRemains()
      return { ok: false, log: log || this.#stderr || (response?.errorMessage ?? ''), timedOut, exit }
    } finally {
      clearTimeout(timer)
      this.#giveBack()
    }
  }

  /** Gives up a restorer that was not used. */
  async discard(): Promise<void> {
    if (this.#ended) return
    this.#ended = true
    this.#giveBack()
    this.#process.kill('SIGKILL')
    await this.#exited
  }

  async #exchange(request: Uint8Array): Promise<Response | undefined> {
    try {
      send(this.#socket, request)
    } catch {
      // criu is gone: its exit says more.
      return undefined
    }
    const buffer = Buffer.allocUnsafe(RESPONSE_BYTES)
    // A message socket cannot be polled by Node, but read on a thread; criu's end closes it in any case.
    const length = await new Promise<number>((resolve) => {
      read(this.#socket, buffer, 0, buffer.length, null, (error, bytes) => resolve(error ? 0 : bytes))
    })
    if (length === 0) return undefined
    try {
      return decode(Response, buffer.subarray(0, length))
    } catch (error) {
      if (error instanceof DecodeError) return undefined
      throw error
    }
  }

  /** Ends what a failed restore has left: with criu gone nobody else does. Its root is our child, so its status is ours to read. */
  #endRemains(): void {
    const { rootPid } = this.#options.derived
    if (stat(rootPid)?.ppid === process.pid) {
      for (const { pid } of processTree(rootPid)) sendSignal(pid, 9)
      waitChild(rootPid)
    }
  }

  #giveBack(): void {
    closeSync(this.#socket)
    for (const fd of this.#pipes ?? []) closeSync(fd)
    this.#pipes = undefined
    this.#removeDirectory()
  }

  #removeDirectory(): void {
    rmSync(this.#options.directory, { recursive: true, force: true })
  }
}

function translated(error: unknown): unknown {
  const errno = errnoOf(error)
  if (errno === 'EMFILE' || errno === 'ENFILE') {
    return new WarmforkError('FDS_EXHAUSTED', {
      tried: 'fork',
      happened: `no descriptor is left for a pipe or a process (${errno})`,
      cause: error,
    })
  }
  if (errno === 'EAGAIN') {
    return new WarmforkError('PIDS_EXHAUSTED', {
      tried: 'fork',
      happened: 'no process can be started (EAGAIN)',
      cause: error,
    })
  }
  if (errno === 'ENOSPC' || errno === 'EDQUOT') {
    return new WarmforkError('DISK_FULL', {
      tried: 'fork',
      happened: 'the file system of the runtime directory is full',
      cause: error,
    })
  }
  return error
}
