/**
 * A criu that was started ahead of its restore: executed, linked, and waiting for one request on a socket, with the
 * pipes of the child to come already in its hands and the child's directory written. That takes 4 of 12 ms off a fork.
 * One restorer makes one restore. It knows a derived image and descriptors, but no generation and no pool.
 */
import { closeSync, openSync, read, rmSync } from 'node:fs'
import { join } from 'node:path'
import { setImmediate as nextTurn, setTimeout as sleep } from 'node:timers/promises'
import { errnoOf, WarmforkError } from '../../errors.js'
import { type DerivedImage, writeDerived } from '../../image/derive.js'
import type { InheritedTerminal } from '../../image/edits/terminal.js'
import { DecodeError, decode } from '../../image/message.js'
import {
  hasMessage,
  pipe,
  send,
  sendSignal,
  seqpacketPair,
  signalNumber,
  streamPair,
  waitChild,
} from '../../linux/libc.js'
import { ancestors, isThreadGroup, nowTicks, processTree, stat } from '../../linux/proc.js'
import { openMaster, openSlave } from '../../linux/pty.js'
import { type ExitStatus, reaper } from '../../linux/reaper.js'
import { spawnProgram } from '../../linux/spawn.js'
import type { StdioFds } from '../engine.js'
import { restoreRequest } from './args.js'
import { readLog, takenId } from './log.js'
import { PidNamespace } from './namespace.js'
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
  /** The open descriptions of the child's terminal, for which a pty is made; empty where it has none. */
  terminal: readonly InheritedTerminal[]
  /** CRIU's keys of the connections that the child gets anew, each with its other end for us. */
  channels: readonly string[]
  /** Further descriptors that the restored process takes over: listeners, the page file. */
  inherited: readonly { key: string; fd: number }[]
  unprivileged: boolean
  /** All ids of the image, where it is restored with them into a pid namespace of its own. */
  namespaceIds?: readonly number[] | undefined
  /** Called with each pipe end that the child gets, so that it can be made accessible to the child's user. */
  onPipeEnd: (fd: number) => void
  /** The same for the terminal. */
  onTerminal: (fd: number) => void
  /** The same for what is made in the directory. */
  onPath: (path: string) => void
}

export type RestoreOutcome =
  | {
      ok: true
      pid: number
      pids?: number[] | undefined
      pipes: StdioFds | undefined
      terminal: number | undefined
      channels: readonly number[]
    }
  | { ok: false; log: string; timedOut: boolean; exit: string }

/** Where criu's descriptors begin: 0 to 2 are its own, 3 is the socket. */
const FIRST_INHERITED = 4

/** How long after criu's end its answer may still be on the way from the thread that read it. */
const LAST_ANSWER_MS = 50

/** A killed process that is in an uninterruptible wait is not waited for longer. */
const GONE_TIMEOUT_MS = 2_000

/** In the derived directory: criu's stderr. */
const WORDS = 'criu.stderr'

const REMOVAL_DELAY_MS = 10

/** The same for all: the largest answer is that of an error, far below. */
const RESPONSE_BYTES = 64 * 1024

export class Restorer {
  readonly #options: RestorerOptions
  /** Of criu itself. */
  readonly pid: number
  readonly namespace: PidNamespace | undefined
  /** When the restore was asked for, in clock ticks: nothing of it is older. */
  #requestedAt = 0
  readonly #exited: Promise<ExitStatus>
  #exit: ExitStatus | undefined
  readonly #keys: { key: string; fd: number }[]
  #socket: number
  #pipes: [number, number, number] | undefined
  /** The master's descriptor. */
  #terminal: number | undefined
  #channels: number[] = []
  #ended = false

  /** Throws what making pipes, a directory or a process throws: FDS_EXHAUSTED, PIDS_EXHAUSTED, DISK_FULL, CRIU_MISSING. */
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
      const { stdio, given, terminal } = options
      // A program on a terminal has no pipes, as a rule.
      const ends = stdio.length === 0 && terminal.length > 0 ? undefined : (given ?? this.#makePipes(ours, theirs))
      const inherited = [
        ...(ends ? stdio.map(({ stream, key }) => ({ key, fd: ends[stream] })) : []),
        ...(terminal.length > 0 ? this.#makeTerminal(terminal, ours, theirs) : []),
        ...options.channels.map((key) => ({ key, fd: this.#makeChannel(ours, theirs) })),
        ...options.inherited,
      ]
      this.#keys = inherited.map(({ key }, index) => ({ key, fd: FIRST_INHERITED + index }))
      // What criu says before it has its request, and so a log: a loader's errors, for example.
      const words = openSync(join(options.directory, WORDS), 'w', 0o600)
      theirs.push(words)
      const nowhere = openSync('/dev/null', 'r+')
      theirs.push(nowhere)
      const fds = [nowhere, nowhere, words, itsSocket, ...inherited.map(({ fd }) => fd)]
      const argv = [...options.argv, 'swrk', '3']
      if (options.namespaceIds) {
        const { env, namespaceIds: ids } = options
        this.namespace = new PidNamespace({ argv, env, fds, ids, rootId: options.derived.rootPid })
      }
      this.pid = this.namespace?.criu ?? spawnProgram(argv, options.env, fds)
    } catch (error) {
      for (const fd of ours) closeSync(fd)
      this.#removeDirectory()
      throw forkError(error)
    } finally {
      for (const fd of theirs) closeSync(fd)
    }
    this.#exited = new Promise((resolve) => {
      reaper.watch(this.pid, {
        exited: (status) => {
          this.#exit = status
          resolve(status)
        },
      })
    })
  }

  /** Whether criu still waits for its request. */
  get usable(): boolean {
    return !this.#ended && this.#exit === undefined
  }

  #kill(): void {
    // Not after its status was read: the id may be another's by then.
    if (this.#exit === undefined) sendSignal(this.pid, signalNumber('SIGKILL'))
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

  #makeTerminal(descriptions: readonly InheritedTerminal[], ours: number[], theirs: number[]) {
    const master = openMaster()
    ours.push(master)
    this.#terminal = master
    return descriptions.map(({ key, flags }, index) => {
      const fd = openSlave(master, flags)
      theirs.push(fd)
      if (index === 0) this.#options.onTerminal(fd)
      return { key, fd }
    })
  }

  #makeChannel(ours: number[], theirs: number[]): number {
    const [mine, its] = streamPair()
    ours.push(mine)
    theirs.push(its)
    this.#channels.push(mine)
    return its
  }

  /** Asks for the restore. The restorer is spent afterwards, whatever comes of it. */
  async restore(timeoutMs: number, logLevel: 1 | 4 = 1): Promise<RestoreOutcome> {
    const { directory, derived, unprivileged } = this.#options
    this.#ended = true
    let timedOut = false
    const timer = setTimeout(() => {
      timedOut = true
      this.#kill()
    }, timeoutMs)
    let answered = false
    // A criu that died leaves processes that wait for it, with copies of its end of the socket: no answer and no end would come.
    void this.#exited.then(async ({ code }) => {
      // The answer may be on the way: in the socket, or read on the thread and not told yet.
      if (code === 0 || answered || hasMessage(this.#socket)) return
      await sleep(LAST_ANSWER_MS)
      await nextTurn()
      if (!answered) await this.#endRemains(this.#log())
    })
    try {
      const request = restoreRequest({
        directory,
        logFile: 'restore.log',
        logLevel,
        inherited: this.#keys,
        unprivileged,
      })
      this.#requestedAt = nowTicks()
      const late = sleep(timeoutMs + GONE_TIMEOUT_MS, undefined, { ref: false })
      const response = await Promise.race([this.#exchange(request), late])
      answered = true
      if (response?.success && response.restored?.pid === derived.rootPid) {
        const ids = this.#outsideIds()
        const pipes = this.#pipes
        const terminal = this.#terminal
        this.#pipes = undefined
        this.#terminal = undefined
        return {
          ok: true,
          pid: ids?.[0] ?? derived.rootPid,
          pids: ids,
          pipes,
          terminal,
          channels: this.#channels.splice(0),
        }
      }
      // One in an uninterruptible wait does not end: then the fork fails all the same.
      const ended = await Promise.race([this.#exited, sleep(GONE_TIMEOUT_MS, undefined, { ref: false })])
      const log = this.#log()
      await this.#endRemains(log)
      const exit = ended === undefined ? 'no end' : (ended.signal ?? `status ${ended.code}`)
      return { ok: false, log: log || (response?.errorMessage ?? ''), timedOut, exit }
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
    this.#kill()
    await this.namespace?.end()
    await this.#exited
  }

  /** What the restored processes are called outside of their namespace; the namespace is theirs from here on. */
  #outsideIds(): number[] | undefined {
    if (!this.namespace) return undefined
    const { rootPid, pids } = this.#options.derived
    const outside = this.namespace.outsideIds(rootPid)
    this.namespace.keep()
    return pids.flatMap((pid) => outside.get(pid) ?? [])
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

  #log(): string {
    const { directory } = this.#options
    return readLog(join(directory, 'restore.log')) || readLog(join(directory, WORDS))
  }

  /** With criu gone nobody else ends what a failed restore has left: criu's own helpers, and what was restored by then. */
  async #endRemains(log: string): Promise<void> {
    endGroup(this.pid)
    if (this.namespace) return this.namespace.end()
    const { pids, rootPid } = this.#options.derived
    // An id that was taken is somebody else's. With the root's, nothing of ours came to be.
    const taken = takenId(log)
    if (taken !== rootPid)
      await endRestored(
        pids.filter((pid) => pid !== taken),
        this.#requestedAt,
      )
  }

  #giveBack(): void {
    closeSync(this.#socket)
    for (const fd of [...(this.#pipes ?? []), ...this.#channels.splice(0)]) closeSync(fd)
    if (this.#terminal !== undefined) closeSync(this.#terminal)
    this.#pipes = undefined
    this.#terminal = undefined
    // criu has read it; to remove it takes 1 ms, which the fork and its first answer need not wait for.
    setTimeout(() => this.#removeDirectory(), REMOVAL_DELAY_MS)
  }

  #removeDirectory(): void {
    try {
      rmSync(this.#options.directory, { recursive: true, force: true })
    } catch {
      // No descriptor is free to look into it (EMFILE), for example. The engine removes what is left at its end.
    }
  }
}

/** Ends the helpers that a criu left which was killed: they are in its process group. */
export function endGroup(criu: number): void {
  try {
    process.kill(-criu, 'SIGKILL')
  } catch {
    // There is nobody in it any more.
  }
}

/**
 * Ends a restored tree that nobody has taken over, whole or not. `pids` are its processes, the root first; none of them has started
 * before `since` (in clock ticks). First all stand still, since a root that is being restored makes the others one by one. The
 * root is our child, and its status ours to read.
 */
export async function endRestored(pids: readonly number[], since: number): Promise<void> {
  const rootPid = pids[0]!
  // Where the root has died, the others have fallen to init, or to another that we descend from. A stranger with such an id has
  // other parents.
  const parents = new Set(ancestors(process.pid)).add(process.pid)
  const tree = new Set<number>()
  for (let before = -1; before !== tree.size; ) {
    before = tree.size
    for (const pid of pids) {
      const found = stat(pid)
      // A thread of somebody's has a `stat` too, and a signal to it ends all of its process.
      if (
        !found ||
        !isThreadGroup(pid) ||
        found.startTicks < since ||
        !(parents.has(found.ppid) || tree.has(found.ppid))
      )
        continue
      for (const one of processTree(pid)) tree.add(one.pid)
    }
    for (const pid of tree) sendSignal(pid, signalNumber('SIGSTOP'))
  }
  for (const pid of tree) sendSignal(pid, signalNumber('SIGKILL'))
  if (!tree.has(rootPid)) return
  const deadline = Date.now() + GONE_TIMEOUT_MS
  for (let seen = waitChild(rootPid).kind; seen !== 'exited' && seen !== 'none'; seen = waitChild(rootPid).kind) {
    if (Date.now() > deadline) return
    await sleep(1)
  }
}

/** What an error of the system means for a fork. */
export function forkError(error: unknown): unknown {
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
  const { syscall, path } = error as NodeJS.ErrnoException
  if (syscall?.startsWith('spawn')) {
    return new WarmforkError('CRIU_MISSING', {
      tried: 'fork',
      happened: `criu could not be started (${(error as Error).message})`,
      cause: error,
    })
  }
  if (errno === 'ENOENT') {
    return new WarmforkError('STORE_GONE', {
      tried: 'fork',
      happened: `${path ?? 'the runtime directory'} is gone`,
      remedy: 'The runtime directory was removed while in use; stop the supervisor and start it again.',
      cause: error,
    })
  }
  if (errno === 'EACCES' || errno === 'EPERM' || errno === 'EROFS') {
    return new WarmforkError('STORE_UNWRITABLE', {
      tried: 'fork',
      happened: `the runtime directory cannot be written (${errno}${path ? `, ${path}` : ''})`,
      remedy: 'Make it writable, or choose another `runtimeDirectory`.',
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
