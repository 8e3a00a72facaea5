/**
 * The engine for machines that cannot run CRIU: each fork is a cold start of the same command behind the same interface. A parked
 * child is booted, warm and stopped by SIGSTOP. It shares no memory, it takes as long as a boot, and a program that binds a port
 * finds it taken by the template. How a program is booted it is told; it knows nothing of readiness, pools or options.
 */

import { setTimeout as sleep } from 'node:timers/promises'
import { sessionMembers, signalIfSame } from '../../ending.js'
import { WarmforkError } from '../../errors.js'
import { isAlive, memoryUse, type ProcStat, stat } from '../../linux/proc.js'
import type { ExitStatus } from '../../linux/reaper.js'
import { takeFromPipe } from '../../output-pipe.js'
import type { Template } from '../../template.js'
import type {
  CheckpointOptions,
  Engine,
  ForkedProcess,
  ForkOptions,
  ForkSource,
  GenerationInfo,
  SourceProcess,
  StdioFds,
} from '../engine.js'

const ON_LINUX = process.platform === 'linux'
/** How long stopping all processes of a tree may take. */
const STOP_TIMEOUT_MS = 5_000

export interface SpawnEngineOptions {
  /** Boots the command until it is ready and warm. */
  boot(signal?: AbortSignal): Promise<Template>
  hookTimeoutMs: number
  /** Starts the command on the caller's descriptors, and waits for nothing. */
  start(stdio: StdioFds): Promise<Template>
}

export class SpawnEngine implements Engine {
  readonly name = 'spawn'
  readonly #options: SpawnEngineOptions
  readonly #generations = new Map<number, GenerationInfo>()

  constructor(options: SpawnEngineOptions) {
    this.#options = options
  }

  /**
   * Notes that there is a generation; nothing is written.
   * @throws ENGINE_UNSUPPORTED where memory is to be shared
   */
  async checkpoint(source: SourceProcess, options: CheckpointOptions): Promise<GenerationInfo> {
    if (options.memory === 'cow') throw unsupported('share memory copy-on-write')
    const generation: GenerationInfo = {
      number: this.#generations.size + 1,
      createdAt: new Date(),
      parent: null,
      reforks: 0,
      rssBytes: memoryUse(source.pid)?.rssBytes ?? 0,
      sizeBytes: 0,
      memory: 'copy',
      warnings: [],
      checkpointMs: 0,
    }
    this.#generations.set(generation.number, generation)
    return generation
  }

  async open(number: number): Promise<ForkSource> {
    const generation = this.#generations.get(number)
    if (!generation) {
      throw new WarmforkError('GENERATION_NOT_FOUND', {
        tried: `open generation ${number}`,
        happened: 'the spawn engine keeps no generation longer than its supervisor runs',
      })
    }
    return {
      generation,
      channels: [],
      fork: (options) => this.#fork(number, options),
      close: async () => {},
    }
  }

  async discard(number: number): Promise<boolean> {
    return this.#generations.delete(number)
  }

  async list(): Promise<readonly GenerationInfo[]> {
    return [...this.#generations.values()]
  }

  async close(): Promise<void> {}

  async #fork(generation: number, options: ForkOptions = {}): Promise<ForkedProcess> {
    if (options.stdio) return new Started(await this.#options.start(options.stdio), generation)
    const template = await this.#options.boot(options.signal)
    try {
      return await Parked.of(template, generation, this.#options.hookTimeoutMs)
    } catch (error) {
      await template.end(0)
      throw error
    }
  }
}

function unsupported(tried: string): WarmforkError {
  return new WarmforkError('ENGINE_UNSUPPORTED', { tried, happened: 'the spawn engine starts each fork cold' })
}

/** A fork on the caller's descriptors: it runs from its start, as it is claimed at once. */
class Started implements ForkedProcess {
  readonly pipes = undefined
  readonly channels = []
  readonly running = true
  readonly #template: Template

  constructor(
    template: Template,
    readonly generation: number,
  ) {
    this.#template = template
  }

  get pid(): number {
    return this.#template.pid
  }

  get pids(): readonly number[] {
    return [this.pid]
  }

  get exited(): Promise<ExitStatus> {
    return this.#template.exited
  }

  resume(): void {}

  kill(signal: NodeJS.Signals): boolean {
    return this.#template.kill(signal)
  }
}

class Parked implements ForkedProcess {
  readonly channels = []
  onStrayResume?: () => void
  readonly #template: Template
  readonly #members: readonly ProcStat[]
  #running = false

  private constructor(
    template: Template,
    members: readonly ProcStat[],
    readonly generation: number,
  ) {
    this.#template = template
    this.#members = members
    strayWatch.add(this)
    template.exited.then(() => strayWatch.remove(this))
  }

  /** Stops a booted program; what it wrote so far is dropped, as it would be in the image of a template. */
  static async of(template: Template, generation: number, hookTimeoutMs: number): Promise<Parked> {
    // The hooks before a checkpoint are run in each, since each is a copy of its own.
    await template.agents?.park('template', hookTimeoutMs)
    const members = await stopTree(template)
    template.handOver()
    if (template.pipes) for (const fd of template.pipes.slice(1)) takeFromPipe(fd)
    return new Parked(template, members, generation)
  }

  get agents() {
    return this.#template.agents?.worker ? this.#template.agents.becomeFork() : undefined
  }

  get pid(): number {
    return this.#template.pid
  }

  get pids(): readonly number[] {
    return ON_LINUX ? this.#members.map((member) => member.pid) : [this.pid]
  }

  get pipes(): StdioFds | undefined {
    return this.#template.pipes
  }

  get terminal() {
    return this.#template.terminal
  }

  get streams() {
    return this.#template.streams
  }

  get exited(): Promise<ExitStatus> {
    return this.#template.exited
  }

  get running(): boolean {
    return this.#running
  }

  resume(): void {
    if (this.#running) return
    if (this.#template.status || (ON_LINUX && !isAlive(this.pid, this.#template.startTicks))) {
      throw new WarmforkError('CHILD_GONE', { tried: `continue child ${this.pid}`, happened: 'it has ended' })
    }
    this.#running = true
    strayWatch.remove(this)
    // The root last: it should find its own children awake.
    for (const member of this.#members) if (member.pid !== this.pid) signalIfSame(member, 'SIGCONT')
    this.kill('SIGCONT')
  }

  kill(signal: NodeJS.Signals): boolean {
    return this.#template.kill(signal)
  }

  /** Looks whether somebody has continued it. */
  lookForStray(): void {
    const state = stat(this.pid)?.state
    if (this.#running || state === undefined || 'TtZX'.includes(state)) return
    this.#running = true
    strayWatch.remove(this)
    this.onStrayResume?.()
  }
}

/** Stops a process with all that it has started, which must not be able to start more meanwhile. */
async function stopTree(template: Template): Promise<ProcStat[]> {
  if (!ON_LINUX) {
    process.kill(-template.pid, 'SIGSTOP')
    return []
  }
  const deadline = Date.now() + STOP_TIMEOUT_MS
  for (;;) {
    const members = sessionMembers(new Set([template.pid]))
    const awake = members.filter((member) => member.state !== 'T')
    if (template.status || members.length === 0) {
      throw new WarmforkError('CHILD_GONE', { tried: `park child ${template.pid}`, happened: 'it has ended' })
    }
    if (awake.length === 0) {
      return [
        ...members.filter((each) => each.pid === template.pid),
        ...members.filter((each) => each.pid !== template.pid),
      ]
    }
    if (Date.now() > deadline) {
      throw new WarmforkError('TIMEOUT', {
        tried: `park child ${template.pid}`,
        happened: `process ${awake[0]!.pid} (${awake[0]!.comm}) did not stop within ${STOP_TIMEOUT_MS} ms`,
      })
    }
    // Parents first: one that waits for its child to exec (vfork) stops only after that, and would wait for ever for a child that was
    // stopped before.
    const stillAwake = new Set(awake.map((member) => member.pid))
    for (const member of awake) if (!stillAwake.has(member.ppid)) signalIfSame(member, 'SIGSTOP')
    await sleep(1)
  }
}

/**
 * Notices that somebody continues a parked child. The kernel tells a parent by SIGCHLD, but libuv, whose child it is, does not ask
 * for it; so this looks at the state of each parked child when the signal comes. (Not on macOS, which has no /proc.)
 */
class StrayWatch {
  readonly #parked = new Set<Parked>()
  #due = false
  readonly #onSignal = () => {
    if (this.#due) return
    this.#due = true
    setImmediate(() => {
      this.#due = false
      for (const parked of [...this.#parked]) parked.lookForStray()
    })
  }

  add(parked: Parked): void {
    if (!ON_LINUX) return
    if (this.#parked.size === 0) process.on('SIGCHLD', this.#onSignal)
    this.#parked.add(parked)
  }

  remove(parked: Parked): void {
    if (this.#parked.delete(parked) && this.#parked.size === 0) process.off('SIGCHLD', this.#onSignal)
  }
}

const strayWatch = new StrayWatch()
