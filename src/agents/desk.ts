/**
 * What a supervisor has to do with agents: the socket where they connect, the files that programs load, and the secrets that agents
 * hand over. It knows processes, and no engine and no pool.
 */
import type { ExitStatus } from '../linux/reaper.js'
import type { SourceChannel } from './channel.js'
import type { AgentGroup } from './group.js'
import { type AgentFiles, agentEnvironment, installAgents } from './injection.js'
import type { AgentReception } from './reception.js'

export interface AgentDeskOptions {
  /** Whether programs get agents at all. */
  readonly enabled: boolean
  readonly env: Readonly<Record<string, string>>
  /** Names of variables that the template does not get. */
  readonly secrets: readonly string[]
  /** An existing directory of the supervisor alone. */
  readonly directory: string
  /** Where copies of the agents are made that workers of another user can read; undefined where they can read ours. */
  readonly copyTo: string | undefined
  readonly hookTimeoutMs: number
  readonly removeAtEnd: (path: string) => void
  readonly warn: (message: string) => void
}

/** A program that is being booted. */
export interface Booted {
  readonly pid: number
  agents: AgentGroup | undefined
  readonly exited: Promise<ExitStatus>
}

export class AgentDesk {
  readonly #options: AgentDeskOptions
  readonly #reception: AgentReception | undefined
  readonly #files: AgentFiles | undefined
  /** Withheld from the template, for each fork. */
  readonly secrets: Readonly<Record<string, string>>

  private constructor(options: AgentDeskOptions, reception: AgentReception | undefined, files: AgentFiles | undefined) {
    this.#options = options
    this.#reception = reception
    this.#files = files
    const { env, secrets } = options
    this.secrets = Object.fromEntries(secrets.flatMap((name) => (env[name] === undefined ? [] : [[name, env[name]]])))
  }

  /** @throws STORE_UNWRITABLE */
  static async open(options: AgentDeskOptions): Promise<AgentDesk> {
    const { enabled, directory, copyTo, removeAtEnd, warn } = options
    if (!enabled || process.platform !== 'linux') return new AgentDesk(options, undefined, undefined)
    // Loaded here, since it does not load anywhere else than on Linux.
    const { AgentReception } = await import('./reception.js')
    const reception = await AgentReception.open({ directory, removeAtEnd, warn })
    return new AgentDesk(options, reception, copyTo === undefined ? undefined : installAgents(copyTo))
  }

  /** The environment of a program: without its secrets, and with what brings its agents in. */
  environment(env: Readonly<Record<string, string>>): Record<string, string> {
    const known = Object.fromEntries(Object.entries(env).filter(([name]) => this.secrets[name] === undefined))
    return this.#reception ? agentEnvironment(known, this.#reception.path, this.#files) : known
  }

  /** Hands what the processes of a program say from now on to that program. */
  expect(program: Booted): void {
    program.agents = this.#reception?.expect(program.pid)
    if (program.agents) this.watch(program.agents)
    void program.exited.then(() => {
      this.#reception?.forget(program.pid)
      program.agents?.close()
    })
  }

  /** Waits for the agents of a program that have connected and not spoken yet. */
  async heard(program: Booted): Promise<void> {
    await this.#reception?.heard(program.pid, this.#options.hookTimeoutMs)
  }

  /** Tells the user of agents that are lost for what they said. */
  watch(agents: AgentGroup): void {
    agents.on('broken', ({ pid }, reason) => {
      this.#options.warn(
        `the connection of the agent of process ${pid} was closed: ${reason}; it goes on as one without`,
      )
    })
  }

  /**
   * Why forks cannot be given anything, as a phrase; undefined where they can.
   * @param channels of the image that they come from
   * @param live agents of a template whose forks have their own, where there is no image
   */
  whyNone(channels: readonly SourceChannel[], live?: AgentGroup): string | undefined {
    if (!this.#options.enabled) return 'agents are switched off (`agent: false`)'
    if (live?.worker || channels.some(({ agent }) => agent.worker && agent.parked)) return undefined
    return channels.length > 0 ? 'its agent gave no answer at the checkpoint' : 'its program runs no agent'
  }

  async close(): Promise<void> {
    await this.#reception?.close()
  }
}
