/**
 * Starts the command: with the environment, the agents and the shim that it needs to be checkpointed and forked, and until it is ready
 * and warm. It knows how a program is started, and nothing of what becomes of it.
 */
import { join } from 'node:path'
import type { AgentDesk } from './agents/desk.js'
import type { StdioFds } from './engines/engine.js'
import { SpawnEngine } from './engines/spawn/engine.js'
import type { Guard } from './guard/guard.js'
import type { ResolvedOptions } from './options.js'
import { untilReady } from './readiness.js'
import { Template } from './template.js'
import type { Identity } from './user.js'
import { warmUp } from './warmup.js'

export interface BootSettings {
  readonly options: ResolvedOptions
  readonly identity: Identity | undefined
  /** The name of the variable by which all that is started for this supervisor is known. */
  readonly mark: string
  readonly guard: () => Guard | undefined
  readonly agents: () => AgentDesk | undefined
  /** Whether what is started is to be checkpointed. */
  readonly isForCriu: () => boolean
}

export class Boot {
  readonly #settings: BootSettings

  constructor(settings: BootSettings) {
    this.#settings = settings
  }

  /** @throws TEMPLATE_START_FAILED, FDS_EXHAUSTED, PIDS_EXHAUSTED, ENGINE_UNSUPPORTED */
  async start(stdio?: StdioFds): Promise<Template> {
    const { options, identity, guard, agents } = this.#settings
    const { command, cwd } = options
    const env = await this.#environment()
    const tty = options.template.tty
    const template = await Template.start({ command, cwd, env, declaredEnv: this.#declared(env), identity, tty }, stdio)
    guard()?.track(template.pid, template.startTicks)
    agents()?.expect(template)
    template.exited.then(() => guard()?.forget(template.pid))
    return template
  }

  /** @throws WARMUP_FAILED, TEMPLATE_EXITED, or the reason of `signal` */
  async warm(template: Template, signal?: AbortSignal): Promise<void> {
    const { options, identity, mark } = this.#settings
    const { warmup, cwd, env } = options
    if (!warmup) return
    const around = { cwd, env: { ...env, [mark]: '1' }, uid: identity?.uid, gid: identity?.gid }
    await warmUp(template, warmup, around, signal)
  }

  /** The engine that boots for each fork. */
  spawnEngine(): SpawnEngine {
    const { options, agents } = this.#settings
    const { command, ready, hookTimeoutMs } = options
    return new SpawnEngine({
      hookTimeoutMs,
      start: (stdio) => this.start(stdio),
      boot: async (signal) => {
        const template = await this.start()
        try {
          await untilReady(template, ready, command, signal)
          await this.warm(template, signal)
          await agents()?.heard(template)
          return template
        } catch (error) {
          await template.end(0)
          throw error
        }
      },
    })
  }

  /** The variables that a generation depends on, with their values. */
  async declaredEnv(): Promise<Record<string, string>> {
    return this.#declared(await this.#environment())
  }

  #declared(env: Readonly<Record<string, string>>): Record<string, string> {
    const keys = this.#settings.options.declaredEnv
    return Object.fromEntries(keys.flatMap((key) => (env[key] === undefined ? [] : [[key, env[key]]])))
  }

  async #environment(): Promise<Record<string, string>> {
    const { options, identity, mark, agents, isForCriu } = this.#settings
    // What a login would set; the supervisor's own are another user's.
    const own = identity?.name
      ? { USER: identity.name, LOGNAME: identity.name, ...(identity.home ? { HOME: identity.home } : {}) }
      : {}
    const known: Record<string, string> = { ...options.env, ...own, [mark]: '1' }
    const env = agents()?.environment(known) ?? known
    if (!isForCriu()) return env
    const { installShim, preloadEnvironment, shimPath, whyNotPreloadable } = await import('./shim/shim.js')
    const built = shimPath()
    if (built === undefined) return env
    const others = identity !== undefined && identity.uid !== process.getuid?.()
    if (!others && whyNotPreloadable(built) === undefined) return preloadEnvironment(env, built)
    // In the store: the runtime directory is often mounted noexec.
    return preloadEnvironment(env, installShim(join(options.store, options.name, 'shim')))
  }
}
