/**
 * Forks of one generation: restorers started ahead, ids, leases, and the process that each restore gives. It knows one
 * generation and its prepared image; how many children are wanted, and when, is the pool's matter.
 */
import { closeSync, openSync } from 'node:fs'
import { join } from 'node:path'
import PQueue from 'p-queue'
import { errnoOf, WarmforkError } from '../../errors.js'
import type { Generation } from '../../generations/generation.js'
import type { Lease } from '../../generations/lease.js'
import { ForkImage } from '../../image/derive.js'
import type { Listener } from '../../image/edits/listeners.js'
import type { InheritedTerminal } from '../../image/edits/terminal.js'
import { ids } from '../../linux/ids.js'
import { idInUse, sendSignal, signalNumber, takesDatagrams } from '../../linux/libc.js'
import { isAlive, runTrace, stat } from '../../linux/proc.js'
import { type ExitStatus, reaper } from '../../linux/reaper.js'
import { Terminal } from '../../terminal.js'
import type {
  ForkedChannel,
  ForkedProcess,
  ForkOptions,
  ForkSource,
  IdentityMode,
  SourceChannel,
  StdioFds,
} from '../engine.js'
import type { Launcher } from './launcher.js'
import { explain, isIdCollision, isOutOfProcesses, summarize } from './log.js'
import type { PidNamespace } from './namespace.js'
import { Relay } from './relay.js'
import { endRestored, forkError, type RestoreOutcome, Restorer } from './restorer.js'

export interface SourceOptions {
  launcher: Launcher
  generation: Generation
  stdio: readonly { stream: 0 | 1 | 2; key: string }[]
  /** With the descriptor that children take each from. */
  listeners: readonly (Listener & { descriptor: number })[]
  channels: readonly SourceChannel[]
  /** Where Unix sockets for datagrams are connected anew, as the kernel has the address. */
  reconnected: readonly Uint8Array[]
  terminal: readonly InheritedTerminal[]
  /** Makes what an earlier child has removed again. */
  remakePaths: () => void
  deathSignal: boolean
  identity: IdentityMode
  /** Where derived directories are made. */
  directory: string
  timeoutMs: number
  /** How many restorers are kept started ahead. */
  ahead: number
  /** The variable by which the guard knows processes: that of the image, and ours. */
  variable?: { from: string; to: string } | undefined
  /** See `ForkSource.ports`. */
  ports?: ReadonlyMap<number, number>
  /** Called once it is closed. */
  onClosed?: () => void
}

/** Ids are chosen before the restore; somebody may take one meanwhile. */
const ID_ATTEMPTS = 8

/**
 * How many restores are made at once. Each waits for its answer on one of libuv's threads (4 by default), of which one is left
 * for everything else; and where hundreds are asked for at once, each would run into its time-out. 200 forks of a Node program
 * on two cores take 1.0 s with 2 at once as with all of them.
 */
const AT_ONCE = Math.max(1, Number(process.env.UV_THREADPOOL_SIZE ?? 4) - 1)

const REFILL_DELAY_MS = 5

/** After this time each process of a restored tree has taken its SIGSTOP, which is on the way when criu is done. */
const STOPPED_MS = 250

/** Of all sources: two of one generation can be open at once, when it comes into use again before the first is closed. */
let sequence = 0

export class CriuForkSource implements ForkSource {
  readonly #options: SourceOptions
  readonly #ahead: { restorer: Restorer; fresh: number[]; image: ForkImage }[] = []
  readonly #lease: Lease
  #refused: Error | undefined
  #image: ForkImage
  #replaced: ReadonlyMap<string, string>
  /** Addresses of `reconnected` at which nobody listens now. */
  #unreachable: ReadonlySet<string>
  /** Read by descriptor where the workers' user may not enter the store. */
  readonly #pageFiles: { key: string; fd: number }[]
  readonly #queue = new PQueue({ concurrency: AT_ONCE })
  #closed = false
  #refill: NodeJS.Timeout | undefined

  constructor(options: SourceOptions) {
    this.#options = options
    const { generation } = options
    this.#replaced = generation.replacedFiles()
    this.#unreachable = unreachable(options.reconnected)
    this.#image = this.#load()
    this.#pageFiles = options.launcher.unprivileged
      ? generation.pageFiles.map((name) => {
          const path = join(generation.directory, name)
          return { key: path.slice(1), fd: openSync(path, 'r') }
        })
      : []
    this.#lease = generation.lease(process.pid, stat(process.pid)!.startTicks)
    this.#refillSoon()
  }

  get generation() {
    return this.#options.generation.info
  }

  get channels() {
    return this.#options.channels
  }

  /** From now on each fork fails with this. */
  refuse(error: Error): void {
    this.#refused = error
  }

  get ports() {
    return this.#options.ports
  }

  async fork({ stdio, signal }: ForkOptions = {}): Promise<ForkedProcess> {
    if (!stdio) return this.#queue.add(() => this.#fork(undefined, signal))
    const relay = relayed(stdio)
    try {
      const forked = await this.#queue.add(() => this.#fork(relay, signal))
      relay.begin()
      return forked
    } catch (error) {
      relay.cancel()
      throw error
    }
  }

  async #fork(relay: Relay | undefined, signal: AbortSignal | undefined): Promise<ForkedProcess> {
    const tried = `fork from generation ${this.#options.generation.number}`
    for (let attempt = 1; ; attempt++) {
      signal?.throwIfAborted()
      if (this.#closed) throw new WarmforkError('STOPPED', { tried, happened: 'the generation is not in use any more' })
      if (this.#refused) throw this.#refused
      this.#options.remakePaths()
      this.#checkFiles()
      const taken = this.#take(relay?.fds)
      const outcome = await this.#restore(taken, this.#options.timeoutMs)
      this.#refillSoon()
      if (outcome.ok) return this.#adopt(outcome, taken, relay)
      if (isIdCollision(outcome.log) && attempt < ID_ATTEMPTS) continue
      if (isOutOfProcesses(outcome.log)) {
        throw new WarmforkError('PIDS_EXHAUSTED', { tried, happened: summarize(outcome.log, ''), output: outcome.log })
      }
      if (outcome.timedOut) {
        const happened = `criu was not done after ${this.#options.timeoutMs} ms (forkTimeoutMs)`
        throw new WarmforkError('TIMEOUT', { tried, happened, output: outcome.log })
      }
      // The reason may have passed: a second try, which writes a full log, is the last one.
      const again = this.#start(relay?.fds)
      const second = await this.#restore(again, this.#options.timeoutMs * 2, 4)
      if (second.ok) return this.#adopt(second, again, relay)
      if (isIdCollision(second.log) && attempt < ID_ATTEMPTS) continue
      throw failure(tried, second.log || outcome.log, second.exit)
    }
  }

  /** Whatever comes of it, nobody else knows of half a child: the guard is told what may appear. */
  async #restore({ restorer, fresh, pids }: Started, timeoutMs: number, logLevel?: 4): Promise<RestoreOutcome> {
    const { launcher } = this.#options
    launcher.expect(pids)
    let ok = false
    try {
      const outcome = await restorer.restore(timeoutMs, logLevel)
      ok = outcome.ok
      return outcome
    } finally {
      launcher.ended(restorer.pid)
      const namespace = restorer.namespace ? [restorer.namespace.init] : []
      if (!ok) for (const pid of [...pids, ...namespace]) launcher.forget(pid)
      ids.release(fresh)
    }
  }

  async close(): Promise<void> {
    if (this.#closed) return
    this.#closed = true
    clearTimeout(this.#refill)
    await Promise.all(this.#ahead.splice(0).map((one) => this.#discard(one)))
    for (const { fd } of this.#pageFiles) closeSync(fd)
    this.#lease.release()
    this.#options.onClosed?.()
  }

  #load(): ForkImage {
    const { generation, deathSignal } = this.#options
    return new ForkImage(generation.imageDirectory, {
      deathSignal,
      keepsIds: this.#keepsIds,
      replaced: this.#replaced,
      variable: this.#options.variable,
      ...(this.#unreachable.size > 0 ? { isUnreachable: (address) => this.#unreachable.has(nameOf(address)) } : {}),
    })
  }

  get #keepsIds(): boolean {
    return this.#options.identity === 'namespace'
  }

  /** Nobody touched the generation; and mapped files that were upgraded since are taken from where they were kept. */
  #checkFiles(): void {
    const { generation } = this.#options
    generation.checkUntouched()
    const replaced = generation.replacedFiles()
    const silent = unreachable(this.#options.reconnected)
    if (
      sameMembers(silent, this.#unreachable) &&
      replaced.size === this.#replaced.size &&
      [...replaced].every(([path, kept]) => this.#replaced.get(path) === kept)
    )
      return
    this.#replaced = replaced
    this.#unreachable = silent
    this.#image = this.#load()
    for (const one of this.#ahead.splice(0)) void this.#discard(one)
  }

  #take(stdio: StdioFds | undefined): Started {
    while (!stdio && this.#ahead.length > 0) {
      const one = this.#ahead.shift()!
      // It may have waited for hours, and somebody may have been given one of its ids.
      if (one.restorer.usable && !one.fresh.some(idInUse)) return { ...one, pids: this.#pidsOf(one.image, one.fresh) }
      void this.#discard(one)
    }
    return this.#start(stdio)
  }

  #start(given: StdioFds | undefined): Started {
    const image = this.#image
    // One that nobody else has names a fork that keeps its ids.
    const fresh = ids.take(this.#keepsIds ? 1 : image.ids.length)
    try {
      const { launcher, generation, stdio, terminal, channels, listeners, directory } = this.#options
      const derived = image.derive(this.#freshIds(image, fresh), fresh[0])
      sequence += 1
      const restorer = new Restorer({
        argv: launcher.argv,
        env: launcher.env,
        unprivileged: launcher.unprivileged,
        namespaceIds: this.#keepsIds ? image.ids : undefined,
        derived,
        preparedDirectory: generation.imageDirectory,
        directory: join(directory, `fork-${generation.number}-${sequence}`),
        stdio,
        given,
        terminal,
        channels: channels.map(({ inode }) => `socket:[${inode}]`),
        inherited: [...listeners.map(({ key, descriptor }) => ({ key, fd: descriptor })), ...this.#pageFiles],
        onPipeEnd: launcher.give,
        onTerminal: launcher.giveTerminal,
        onPath: launcher.givePath,
      })
      launcher.started(restorer.pid)
      // Whatever comes to be in there ends with its first process.
      if (restorer.namespace) launcher.track(restorer.namespace.init)
      return { restorer, fresh, image, pids: this.#pidsOf(image, fresh) }
    } catch (error) {
      ids.release(fresh)
      throw error
    }
  }

  #freshIds(image: ForkImage, fresh: readonly number[]): Map<number, number> {
    return new Map(image.ids.map((id, index) => [id, this.#keepsIds ? id : fresh[index]!]))
  }

  /** What the processes will be called outside; of those in a namespace that is not known before. */
  #pidsOf(image: ForkImage, fresh: readonly number[]): number[] {
    if (this.#keepsIds) return []
    const renamed = this.#freshIds(image, fresh)
    return image.pids.map((pid) => renamed.get(pid)!)
  }

  #channelsOf(
    image: ForkImage,
    fresh: readonly number[],
    pids: readonly number[],
    fds: readonly number[],
  ): ForkedChannel[] {
    const renamed = this.#freshIds(image, fresh)
    const processes = new Map(image.processes.map((process) => [process.pid, process]))
    return this.#options.channels.map((source, index) => {
      const { pid } = source
      const { ppid, threads } = processes.get(pid)!
      return {
        source,
        hostPid: pids[image.pids.indexOf(pid)]!,
        pid: renamed.get(pid)!,
        // The root's parent is this process: it is restored as our child, and does not see us from inside a namespace.
        ppid: renamed.get(ppid) ?? (this.#keepsIds ? 0 : process.pid),
        threads: new Map(threads.map((thread) => [thread, renamed.get(thread)!])),
        fd: fds[index]!,
      }
    })
  }

  /** After the fork that made room, so that neither it nor its first answer waits for this: it holds the event loop for 2 ms. */
  #refillSoon(): void {
    if (this.#closed || this.#refill) return
    this.#refill = setTimeout(() => {
      this.#refill = undefined
      if (this.#closed || this.#ahead.length >= this.#options.ahead) return
      try {
        this.#ahead.push(this.#start(undefined))
      } catch (error) {
        // The next fork starts its own, and tells its caller what is wrong.
        if (!(error instanceof WarmforkError) && errnoOf(error) === undefined) throw error
        return
      }
      this.#refillSoon()
    }, REFILL_DELAY_MS).unref()
  }

  async #discard({ restorer, fresh }: { restorer: Restorer; fresh: number[] }): Promise<void> {
    await restorer.discard()
    ids.release(fresh)
    this.#options.launcher.ended(restorer.pid)
    if (restorer.namespace) this.#options.launcher.forget(restorer.namespace.init)
  }

  async #adopt(
    { pid, pids: outside, pipes, terminal: master, channels: fds }: RestoreOutcome & { ok: true },
    { restorer, pids: chosen, image, fresh }: Started,
    relay: Relay | undefined,
  ): Promise<ForkedProcess> {
    const { generation, launcher } = this.#options
    const pids = outside ?? chosen
    const { namespace } = restorer
    if (namespace) void namespace.ended.then(() => launcher.forget(namespace.init))
    const startTicks = stat(pid)?.startTicks ?? 0
    for (const one of pids) launcher.track(one)
    let lease: Lease
    try {
      lease = generation.lease(pid, startTicks)
    } catch (error) {
      await (namespace ? namespace.end() : endRestored(pids, startTicks))
      for (const one of pids) launcher.forget(one)
      for (const fd of [...(pipes ?? []), ...(master === undefined ? [] : [master]), ...fds]) closeSync(fd)
      throw forkError(error)
    }
    const channels = this.#channelsOf(image, fresh, pids, fds)
    const terminal = master === undefined ? undefined : new Terminal(master)
    // Where the root stood still too, somebody has stopped the tree for the checkpoint.
    const isStopped = (index: number) => !image.processes[0]?.stopped && image.processes[index]?.stopped
    const stopped = pids.filter((_, index) => isStopped(index))
    return new RestoredProcess(pid, pids, stopped, pipes, terminal, channels, generation.number, namespace, () => {
      // What it has started may outlive it; by its group the guard finds that at the end.
      for (const one of pids) if (!idInUse(one)) launcher.forget(one)
      lease.release()
      return relay?.finish()
    })
  }
}

const nameOf = (address: Uint8Array) => Buffer.from(address).toString('latin1')

/** A connection to nobody would make the restore fail; without it the program gets an error when it sends, and connects again. */
function unreachable(addresses: readonly Uint8Array[]): Set<string> {
  return new Set(addresses.filter((address) => !takesDatagrams(address)).map(nameOf))
}

function sameMembers(one: ReadonlySet<string>, other: ReadonlySet<string>): boolean {
  return one.size === other.size && [...one].every((member) => other.has(member))
}

function relayed(stdio: StdioFds): Relay {
  try {
    return new Relay(stdio)
  } catch (error) {
    throw forkError(error)
  }
}

/** A criu that waits for its request, and the ids that its processes will have. */
interface Started {
  restorer: Restorer
  fresh: number[]
  image: ForkImage
  pids: number[]
}

/** What two failed restores come to. */
function failure(tried: string, log: string, exit: string): WarmforkError {
  const details = { tried, happened: explain(log, exit), output: log.slice(-64 * 1024) }
  if (/No space left on device|Disk quota exceeded/.test(log)) return new WarmforkError('DISK_FULL', details)
  // The second: the limit is so low that criu finds no place for descriptors of its own.
  if (/Too many open files|service_fd_base/.test(log)) return new WarmforkError('FDS_EXHAUSTED', details)
  return new WarmforkError('RESTORE_FAILED', details)
}

class RestoredProcess implements ForkedProcess {
  readonly exited: Promise<ExitStatus>
  onStrayResume?: () => void
  /**
   * What told that its processes stood still. The kernel tells of a root that is continued, unless it is stopped again
   * before we look, and of no other process of the tree.
   */
  #stoodAt: string | undefined
  #running = false
  #gone = false
  /** Of the tree all but the root, with their start times: criu gives what was an orphan to init. */
  readonly #started: ReadonlyMap<number, number>

  constructor(
    readonly pid: number,
    readonly pids: readonly number[],
    /** Those of them that stood still when the image was taken: they go on to. */
    readonly stopped: readonly number[],
    readonly pipes: StdioFds | undefined,
    readonly terminal: Terminal | undefined,
    readonly channels: readonly ForkedChannel[],
    readonly generation: number,
    readonly namespace: PidNamespace | undefined,
    /** What it gives is waited for before the exit is told. */
    onExit: () => Promise<void> | undefined,
  ) {
    this.#started = new Map(pids.slice(1).map((one) => [one, stat(one)?.startTicks ?? 0]))
    const settled = setTimeout(() => {
      if (!this.#running) this.#stoodAt = this.#traces()
    }, STOPPED_MS).unref()
    this.exited = new Promise((resolve) => {
      reaper.watch(pid, {
        exited: (status) => {
          this.#gone = true
          clearTimeout(settled)
          // Whatever goes wrong with what it leaves, its end is told.
          const told = () => resolve(status)
          void Promise.resolve().then(onExit).then(told, told)
        },
        continued: () => {
          if (this.#running) return
          this.#running = true
          this.onStrayResume?.()
        },
      })
    })
  }

  get running(): boolean {
    return this.#running
  }

  get namespaceInit(): number | undefined {
    return this.namespace?.init
  }

  endRest(): void {
    this.namespace?.kill()
    if (this.namespace) return
    for (const [pid, startTicks] of this.#started)
      if (isAlive(pid, startTicks)) sendSignal(pid, signalNumber('SIGKILL'))
  }

  resume(): void {
    if (this.#gone) {
      throw new WarmforkError('CHILD_GONE', { tried: `continue child ${this.pid}`, happened: 'it has ended' })
    }
    if (!this.#running && this.#stoodAt !== undefined && this.#traces() !== this.#stoodAt) {
      throw new WarmforkError('CHILD_GONE', {
        tried: `continue child ${this.pid}`,
        happened: 'somebody else has continued or ended one of its processes before',
      })
    }
    this.#running = true
    // Children before parents: a shell that waits must not find its child stopped.
    for (const pid of [...this.pids].reverse()) {
      if (!this.stopped.includes(pid)) sendSignal(pid, signalNumber('SIGCONT'))
    }
  }

  /** What changes when one of its processes runs. */
  #traces(): string {
    return this.pids.map(runTrace).join(' ')
  }

  kill(signal: NodeJS.Signals): boolean {
    return !this.#gone && sendSignal(this.pid, signalNumber(signal))
  }
}
