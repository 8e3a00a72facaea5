/**
 * The agents of one process tree: of a template, or of a fork. They are parked together, and told together who they are. It knows
 * links and /proc, and no engine.
 */
import { randomBytes } from 'node:crypto'
import { EventEmitter } from 'node:events'
import { readlinkSync } from 'node:fs'
import { Socket } from 'node:net'
import { WarmforkError } from '../errors.js'
import type { ForkedChannel, SourceChannel } from './channel.js'
import { AgentLink, hookFailed } from './link.js'
import { type AgentRecord, type Forked, type FromAgent, payloadOf, payloadValue, textOf } from './protocol.js'

/** How long the exit of a process may come after the end of its connection. */
const EXIT_MS = 250

/** What a fork is given. Strings and bytes arrive as they are; a NUL in them is refused. */
export interface ForkInput {
  readonly args?: readonly (string | Uint8Array)[]
  /** `undefined` removes a variable. */
  readonly env?: Readonly<Record<string, string | Uint8Array | undefined>>
  readonly cwd?: string | Uint8Array
  readonly data?: unknown
}

export type AgentRequest = Extract<FromAgent, { type: 'fork' | 'keep' | 'drop' | 'message' }>

export interface AgentGroupEvents {
  ready: []
  request: [request: AgentRequest, link: AgentLink]
  /** `requests` has changed. */
  requests: []
  /** An agent was lost for what it said. */
  broken: [link: AgentLink, reason: string]
}

export class AgentGroup extends EventEmitter<AgentGroupEvents> {
  readonly #links: AgentLink[] = []
  readonly #forked: { link: AgentLink; channel: ForkedChannel }[] = []
  readonly #requests = new Map<AgentLink, { total: number; ms: number }>()
  #lost: AgentLink[] = []
  /** While they are parked, or asked to. */
  #turn: Promise<void> | undefined
  #endTurn = () => {}

  /** The agents of a fork: they wait for the line that `fork` sends. */
  static ofFork(channels: readonly ForkedChannel[]): AgentGroup {
    const group = new AgentGroup()
    for (const channel of channels) {
      const socket = new Socket({ fd: channel.fd, readable: true, writable: true })
      const { agent, runtime, version, fd, counts, parked, unsafe } = channel.source.agent
      const about = { agent, runtime, version, fd, pid: channel.hostPid, ...(counts ? { counts } : {}) }
      const link = new AgentLink(socket, { type: 'hello', protocol: 1, ...about }, unsafe)
      // It was not in its read at the checkpoint, and does not know that it is a fork: it sees the connection closed.
      if (!parked) {
        link.close()
        continue
      }
      group.add(link)
      group.#forked.push({ link, channel })
    }
    return group
  }

  /** From now on these agents, which are parked, are those of a fork: of the same processes. */
  becomeFork(): this {
    const { worker } = this
    for (const link of this.links) {
      const { pid } = link.hello
      const source = { pid, inode: 0, agent: recordOf(link, { worker: link === worker, parked: true }) }
      this.#forked.push({ link, channel: { source, hostPid: pid, pid, ppid: 0, threads: new Map(), fd: -1 } })
    }
    return this
  }

  add(link: AgentLink): void {
    this.#links.push(link)
    link.on('ready', () => this.emit('ready'))
    link.on('request', (request) => this.emit('request', request, link))
    link.on('requests', (total, ms) => {
      this.#requests.set(link, { total, ms })
      this.emit('requests')
    })
    link.on('close', (reason) => {
      if (reason !== undefined) this.emit('broken', link, reason)
    })
  }

  get links(): readonly AgentLink[] {
    return this.#links.filter((link) => !link.isClosed)
  }

  /** The one that said that it is ready, else the one that came last; of a fork the one that was it in the source. */
  get worker(): AgentLink | undefined {
    const chosen = this.#forked.find(({ channel }) => channel.source.agent.worker)?.link
    if (chosen) return chosen.isClosed ? undefined : chosen
    const { links } = this
    return links.find((link) => link.isReady) ?? links.at(-1)
  }

  /** Requests that all its processes have answered, and the sum of their times in milliseconds. */
  get requests(): { readonly total: number; readonly ms: number } {
    let total = 0
    let ms = 0
    for (const each of this.#requests.values()) {
      total += each.total
      ms += each.ms
    }
    return { total, ms }
  }

  /** Connections whose next request is held back, while all are parked. */
  get heldRequests(): number {
    return this.links.reduce((sum, link) => sum + link.heldRequests, 0)
  }

  /** Why it must never be the one that others are forked from. */
  get unsafe(): string | undefined {
    return this.#links.find((link) => link.unsafe !== undefined)?.unsafe
  }

  get isReady(): boolean {
    return this.#links.some((link) => link.isReady)
  }

  /**
   * Has all agents run their hooks and wait, until `resume`; where they are parked already, after that. Those that do not answer
   * are left out; where a hook fails, all go on.
   * @returns what the user should hear
   * @throws HOOK_FAILED, NOT_AT_REST, REFORK_REFUSED
   */
  async park(reason: 'template' | 'fork' | 'refork', timeoutMs: number): Promise<string[]> {
    // A refork and a fork that the program asks for itself can come at once.
    while (this.#turn) await this.#turn
    this.#turn = new Promise((resolve) => {
      this.#endTurn = () => {
        this.#turn = undefined
        resolve()
      }
    })
    const links = this.links
    const results = await Promise.allSettled(links.map((link) => link.park(reason, timeoutMs)))
    const warnings: string[] = []
    this.#lost = []
    let failure: unknown
    for (const [index, result] of results.entries()) {
      const link = links[index]!
      if (result.status === 'fulfilled') {
        if (result.value.length === 0) continue
        warnings.push(
          `Threads of process ${link.pid} go on while its agent waits, and run before its hooks in a fork: ${result.value.join(', ')}.`,
        )
      } else if (result.reason instanceof WarmforkError && result.reason.code === 'AGENT_LOST') {
        this.#lost.push(link)
        warnings.push(result.reason.message)
      } else failure ??= result.reason
    }
    if (failure === undefined) return warnings
    for (const [index, result] of results.entries()) {
      if (result.status === 'fulfilled') links[index]!.resumed({ message: String(failure) })
    }
    this.#endTurn()
    throw failure
  }

  /** Lets the source go on. An agent that did not answer is none any more. */
  resume(error?: unknown): void {
    for (const link of this.#lost) link.close()
    const failure =
      error === undefined
        ? undefined
        : {
            message: String((error as Error).message ?? error),
            ...(error instanceof WarmforkError ? { code: error.code } : {}),
          }
    for (const link of this.links) link.resumed(failure)
    this.#lost = []
    this.#endTurn()
  }

  /** Its connections, for the image that is taken of the parked tree. */
  channels(): SourceChannel[] {
    const { worker } = this
    return this.links.flatMap((link) => {
      const { pid, fd } = link.hello
      const inode = socketInode(pid, fd)
      if (inode === undefined) return []
      const parked = !this.#lost.includes(link)
      return [{ pid, inode, agent: recordOf(link, { worker: link === worker && parked, parked }) }]
    })
  }

  /**
   * Tells each process of a fork who it is, and gives the worker its input; before the fork runs.
   * @returns resolves when all hooks are done
   * @throws HOOK_FAILED
   */
  fork(input: ForkInput, about: { generation: number; timeoutMs: number; call?: number }): Promise<void> {
    const done = this.#forked.map(({ link }) => this.#hooksOf(link))
    for (const { link, channel } of this.#forked) {
      const { worker, checkpoint } = channel.source.agent
      link.forked({
        type: 'forked',
        id: checkpoint,
        pid: channel.pid,
        ppid: channel.ppid || process.pid,
        generation: about.generation,
        threads: Object.fromEntries(channel.threads),
        seed: randomBytes(32).toString('base64'),
        timeoutMs: about.timeoutMs,
        worker,
        ...(worker ? inputMembers(input) : {}),
        ...(worker && about.call !== undefined ? { call: about.call } : {}),
      })
    }
    return Promise.all(done).then(() => {})
  }

  #hooksOf(link: AgentLink): Promise<void> {
    const tried = `run the hooks of a fork, process ${link.pid} (${link.hello.runtime})`
    return new Promise((resolve, reject) => {
      link.once('running', (error) => (error ? reject(hookFailed(tried, error)) : resolve()))
      link.once('failed', (error) => reject(hookFailed(tried, error)))
      // Its process has ended, or the program has closed the descriptor: the one is told by its exit, the other is no failure.
      link.once('close', () => setTimeout(resolve, EXIT_MS).unref())
    })
  }

  /** Resolves when all connections have ended, and what was said on them is heard; after some time in any case. */
  ended(): Promise<void> {
    const open = this.links.map((link) => new Promise<void>((resolve) => link.once('close', () => resolve())))
    const late = new Promise<void>((resolve) => setTimeout(resolve, EXIT_MS).unref())
    return Promise.race([Promise.all(open).then(() => {}), late])
  }

  unref(): void {
    for (const link of this.#links) link.unref()
  }

  close(): void {
    for (const link of this.#links) link.close()
  }
}

function recordOf(link: AgentLink, about: { worker: boolean; parked: boolean }): AgentRecord {
  const { agent, runtime, version, fd, counts } = link.hello
  const { checkpointId: checkpoint, unsafe } = link
  return {
    agent,
    runtime,
    version,
    fd,
    ...about,
    checkpoint,
    ...(counts ? { counts } : {}),
    ...(unsafe === undefined ? {} : { unsafe }),
  }
}

/** The members of `forked` that are the worker's alone. */
function inputMembers({ args, env, cwd, data }: ForkInput): Partial<Forked> {
  const variables = Object.entries(env ?? {})
  return {
    ...(args ? { args: args.map(textOf) } : {}),
    ...(env
      ? {
          env: {
            set: Object.fromEntries(
              variables.flatMap(([key, value]) => (value === undefined ? [] : [[key, textOf(value)]])),
            ),
            unset: variables.flatMap(([key, value]) => (value === undefined ? [key] : [])),
          },
        }
      : {}),
    ...(cwd === undefined ? {} : { cwd: textOf(cwd) }),
    ...(data === undefined ? {} : { data: payloadOf(data) }),
  }
}

/** Undefined where the process has closed it, or put another file in its place. */
function socketInode(pid: number, fd: number): number | undefined {
  try {
    const inode = /^socket:\[(\d+)\]$/.exec(readlinkSync(`/proc/${pid}/fd/${fd}`))?.[1]
    return inode === undefined ? undefined : Number(inode)
  } catch {
    return undefined
  }
}

export { payloadValue }
