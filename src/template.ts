/**
 * A program that was started cold, with pipes of our making and as the leader of a session of its own: the template, and each fork
 * of the spawn engine. It knows how to start, to be watched and to be ended; not what comes of it.
 */
import { type ChildProcess, spawn } from 'node:child_process'
import { EventEmitter } from 'node:events'
import { closeSync, fstatSync, statSync } from 'node:fs'
import type { Readable, Writable } from 'node:stream'
import { setTimeout as sleep } from 'node:timers/promises'
import type { AgentGroup } from './agents/group.js'
import { type Endable, endTrees } from './ending.js'
import type { SourceProcess, SourceTerminal, StdioFds } from './engines/engine.js'
import { errnoOf, WarmforkError } from './errors.js'
import { inheritedCapabilities } from './linux/capabilities.js'
import { memoryUse, stat } from './linux/proc.js'
import type { ExitStatus } from './linux/reaper.js'
import type { TemplateView } from './options.js'
import { closeAll, makePipes, OutputReader, type OutputStream, pipeInodes } from './pipes.js'
import type { Terminal, TerminalSize } from './terminal.js'
import type { Identity } from './user.js'

const ON_LINUX_AS_ROOT = process.platform === 'linux' && process.getuid?.() === 0

export interface TemplateCommand {
  readonly command: readonly [string, ...string[]]
  readonly cwd: string
  /** The whole environment, with what warmfork adds to it. */
  readonly env: Readonly<Record<string, string>>
  readonly declaredEnv: Readonly<Record<string, string>>
  readonly identity: Identity | undefined
  /** Starts it on a pty of this size, which is its controlling terminal. */
  readonly tty?: TerminalSize | undefined
}

export interface TemplateEvents {
  output: [stream: OutputStream, chunk: Buffer]
  exit: [status: ExitStatus]
}

/** How long to wait for the last output of a program that has ended, for the error that tells of it. */
const LAST_OUTPUT_MS = 250

export class Template extends EventEmitter<TemplateEvents> implements Endable {
  readonly pid: number
  /** With the pid it names the process for ever; 0 where there is no /proc. */
  readonly startTicks: number
  readonly startedAt = Date.now()
  /** Never rejects. */
  readonly exited: Promise<ExitStatus>
  /** Our ends of its pipes; undefined where it has the caller's descriptors, or streams. */
  readonly pipes: StdioFds | undefined
  readonly streams: { readonly stdin: Writable; readonly stdout: Readable; readonly stderr: Readable } | undefined

  /** Our end of its pty, where it was started on one. */
  terminal: Terminal | undefined

  /** What its processes' agents say, where it was started to have some. */
  agents: AgentGroup | undefined

  readonly #command: TemplateCommand
  readonly #output: OutputReader | undefined
  readonly #inodes: [bigint, bigint, bigint]
  readonly #slave: SourceTerminal | undefined
  #status: ExitStatus | undefined
  /** Whether the pipes are still this object's to close. */
  #ownsPipes = true

  private constructor(
    command: TemplateCommand,
    child: ChildProcess,
    pipes: StdioFds | undefined,
    pty: Pty | undefined,
  ) {
    super()
    this.#command = command
    this.pid = child.pid!
    this.startTicks = stat(this.pid)?.startTicks ?? 0
    this.pipes = pipes
    this.terminal = pty?.terminal
    this.#slave = pty && { rdev: pty.rdev, dev: pty.dev }
    this.#inodes = pipes ? pipeInodes(pipes) : [0n, 0n, 0n]
    if (child.stdin && child.stdout && child.stderr) {
      child.stdin.on('error', () => {})
      this.streams = { stdin: child.stdin, stdout: child.stdout, stderr: child.stderr }
      this.#output = OutputReader.ofStreams(child.stdout, child.stderr)
    } else if (pipes) {
      this.#output = OutputReader.ofPipes(pipes[1], pipes[2])
    } else if (pty) {
      this.#output = OutputReader.ofTerminal(pty.terminal)
      pty.terminal.unref()
    }
    this.#output?.on('chunk', (stream, chunk) => this.emit('output', stream, chunk))
    this.exited = new Promise((resolve) => {
      child.once('exit', (code, signal) => {
        this.#status = { code, signal }
        resolve(this.#status)
        this.emit('exit', this.#status)
        if (this.#ownsPipes) this.terminal?.programEnded()
        this.#closePipes()
      })
    })
    // The supervisor keeps the event loop alive as long as it is wanted, not each process that it has started.
    child.unref()
  }

  /**
   * Starts the command.
   * @param stdio descriptors for its 0, 1 and 2, in place of pipes
   * @throws TEMPLATE_START_FAILED, FDS_EXHAUSTED, PIDS_EXHAUSTED
   */
  static async start(command: TemplateCommand, stdio?: StdioFds): Promise<Template> {
    const owner = process.getuid?.() === 0 ? command.identity : undefined
    const pty = command.tty ? await openPty(command.tty, owner) : undefined
    const pipes = stdio || pty ? undefined : await makePipes(owner)
    const theirs = stdio ?? (pty ? ([pty.slave, pty.slave, pty.slave] as const) : pipes?.theirs)
    const [file, ...args] = argvAs(command)
    let child: ChildProcess
    try {
      child = spawn(file, args, {
        cwd: command.cwd,
        env: command.tty ? onTerminal(command.env) : { ...command.env },
        // Its own session: CRIU dumps whole sessions, and a Ctrl-C at the terminal is the supervisor's alone. (setsid makes one.)
        detached: pty === undefined,
        stdio: theirs ? [...theirs] : 'pipe',
        ...identityOptions(command),
      })
      await new Promise<void>((resolve, reject) => {
        child.once('spawn', resolve)
        child.once('error', reject)
      })
    } catch (error) {
      if (pipes) closeAll([...pipes.ours, ...pipes.theirs])
      if (pty) closeSync(pty.slave)
      pty?.terminal.close()
      throw startError(command, error)
    }
    // A kill that fails is told by its result.
    child.on('error', () => {})
    if (pipes) closeAll(pipes.theirs)
    if (pty) closeSync(pty.slave)
    return new Template(command, child, pipes?.ours, pty)
  }

  /** How it ended; undefined while it runs. */
  get status(): ExitStatus | undefined {
    return this.#status
  }

  get isTTY(): boolean {
    return this.terminal !== undefined
  }

  /** The last 64 KiB of its output. */
  get output(): string {
    return this.#output?.tail ?? ''
  }

  get lastOutputAt(): number {
    return this.#output?.lastOutputAt ?? this.startedAt
  }

  view(signal: AbortSignal): TemplateView {
    const template = this
    return {
      pid: this.pid,
      signal,
      get output() {
        return template.output
      },
    }
  }

  /** What an engine needs to know to take a checkpoint of it. */
  source(): SourceProcess {
    const { command, cwd, declaredEnv, identity } = this.#command
    return {
      pid: this.pid,
      command,
      cwd,
      declaredEnv,
      stdioInodes: this.#inodes,
      terminal: this.#slave,
      uid: identity?.uid ?? process.getuid?.() ?? 0,
      gid: identity?.gid ?? process.getgid?.() ?? 0,
      channels: this.agents?.channels() ?? [],
    }
  }

  get rssBytes(): number {
    return memoryUse(this.pid)?.rssBytes ?? 0
  }

  kill(signal: NodeJS.Signals): boolean {
    if (this.#status) return false
    try {
      return process.kill(this.pid, signal)
    } catch {
      return false
    }
  }

  /** SIGTERM, and SIGKILL after the grace time, for it and what it has started. */
  async end(graceMs: number): Promise<ExitStatus> {
    await endTrees([this], graceMs)
    return this.exited
  }

  /** Stops reading its output, and hands its pipes, or its terminal, to the caller. */
  handOver(): void {
    this.#output?.stop()
    this.terminal = this.terminal?.handOver()
    this.#ownsPipes = false
  }

  /**
   * Runs a step with it, for at most a time, and ends the step where the program ends.
   * @param tried the phrase for the error, "boot the template"
   * @throws TEMPLATE_EXITED, or what `late` gives when the time is over, or the reason of `signal`
   */
  async during<T>(
    step: (signal: AbortSignal) => Promise<T>,
    options: { tried: string; timeoutMs: number; late: () => Error; signal?: AbortSignal | undefined },
  ): Promise<T> {
    const controller = new AbortController()
    const { signal } = options
    const onAbort = () => controller.abort(signal!.reason)
    signal?.throwIfAborted()
    signal?.addEventListener('abort', onAbort)
    const timer = setTimeout(() => controller.abort(options.late()), options.timeoutMs)
    const interrupted = new Promise<never>((_, reject) => {
      controller.signal.addEventListener('abort', () => reject(controller.signal.reason))
      this.exited.then(async () => {
        if (controller.signal.aborted) return
        await Promise.race([this.#output?.ended, sleep(LAST_OUTPUT_MS)])
        controller.abort(this.exitError(options.tried))
      })
    })
    interrupted.catch(() => {})
    try {
      return await Promise.race([step(controller.signal), interrupted])
    } finally {
      clearTimeout(timer)
      signal?.removeEventListener('abort', onAbort)
      // What the step has left under way ends with it.
      controller.abort(new Error('the step is over'))
    }
  }

  /** TEMPLATE_EXITED, for one that has ended. */
  exitError(tried: string, cause?: unknown): WarmforkError {
    const { code, signal } = this.#status!
    const last = lastLines(this.output)
    const how = signal ? `by ${signal}` : `with status ${code}`
    return new WarmforkError('TEMPLATE_EXITED', {
      tried,
      happened: `${quoted(this.#command.command)} ended ${how}${last ? `, and wrote last: ${last}` : ' without a word'}`,
      output: this.output,
      ...(code === 0
        ? {
            remedy:
              'A template has to stay: where the program goes into the background, have it stay in the foreground.',
          }
        : {}),
      ...(cause === undefined ? {} : { cause }),
    })
  }

  #closePipes(): void {
    if (!this.#ownsPipes || !this.pipes) return
    this.#ownsPipes = false
    closeAll(this.pipes)
  }
}

/** Programs draw for the terminal that TERM names; a service has none. And the size is the terminal's to tell. */
function onTerminal({ COLUMNS: _columns, LINES: _lines, ...env }: Readonly<Record<string, string>>) {
  return { TERM: 'xterm-256color', ...env }
}

interface Pty extends SourceTerminal {
  readonly terminal: Terminal
  readonly slave: number
}

/** @throws ENGINE_UNSUPPORTED, FDS_EXHAUSTED, TEMPLATE_START_FAILED */
async function openPty(size: TerminalSize, owner: { uid: number } | undefined): Promise<Pty> {
  const tried = 'make a terminal'
  if (process.platform !== 'linux') {
    throw new WarmforkError('ENGINE_UNSUPPORTED', {
      tried,
      happened: `terminals are not supported on ${process.platform}`,
      remedy: 'Leave `template.tty` out, or run on Linux.',
    })
  }
  // Loaded here, since they do not load anywhere else than on Linux.
  const [{ openMaster, openSlave, giveSlave, setWindowSize }, { Terminal }] = await Promise.all([
    import('./linux/pty.js'),
    import('./terminal.js'),
  ])
  let terminal: Terminal | undefined
  try {
    const master = openMaster()
    terminal = new Terminal(master)
    setWindowSize(master, size)
    const slave = openSlave(master)
    if (owner) giveSlave(slave, owner.uid)
    const { rdev, dev } = fstatSync(slave)
    return { terminal, slave, rdev, dev }
  } catch (cause) {
    terminal?.close()
    const code = errnoOf(cause)
    const happened = `the system gave ${code ?? String(cause)}`
    if (code === 'EMFILE' || code === 'ENFILE') throw new WarmforkError('FDS_EXHAUSTED', { tried, happened, cause })
    const remedy = code === 'ENOSPC' ? 'Close terminals, or raise kernel.pty.max.' : 'See whether /dev/ptmx is there.'
    throw new WarmforkError('TEMPLATE_START_FAILED', { tried, happened, remedy, cause })
  }
}

/** The last three lines, on one line. */
export function lastLines(output: string): string {
  return output.trimEnd().split('\n').slice(-3).join(' | ').slice(-400)
}

/** A command as it can be read in a message. */
export function quoted(command: readonly string[]): string {
  return command.map((part) => (/^[\w./:=@%+,-]+$/.test(part) ? part : JSON.stringify(part))).join(' ')
}

/**
 * libuv drops all supplementary groups when it changes the user; setpriv (util-linux) keeps those that the user has. And a
 * supervisor that is not root has criu's capabilities as ambient ones, which are not for the program.
 */
function argvAs(template: TemplateCommand): [string, ...string[]] {
  const argv = argvAsUser(template)
  // Of util-linux, as setpriv: leads a session of its own, whose terminal is its stdin.
  return template.tty ? ['setsid', '--ctty', ...argv] : argv
}

function argvAsUser({ command, identity }: TemplateCommand): [string, ...string[]] {
  if (!needsSetpriv(identity)) {
    const ambient = process.platform === 'linux' && process.getuid?.() !== 0 && inheritedCapabilities() !== 0n
    return ambient ? ['setpriv', '--inh-caps=-all', '--ambient-caps=-all', '--', ...command] : [...command]
  }
  const { uid, gid, groups } = identity
  return ['setpriv', `--reuid=${uid}`, `--regid=${gid}`, `--groups=${[gid, ...groups].join(',')}`, '--', ...command]
}

function needsSetpriv(identity: Identity | undefined): identity is Identity {
  return ON_LINUX_AS_ROOT && identity !== undefined && identity.groups.length > 0
}

function identityOptions({ identity }: TemplateCommand): { uid?: number; gid?: number } {
  if (process.getuid?.() !== 0 || identity === undefined) return {}
  return identity.groups.length > 0 && ON_LINUX_AS_ROOT ? {} : { uid: identity.uid, gid: identity.gid }
}

function startError({ command, cwd, tty }: TemplateCommand, error: unknown): WarmforkError {
  const tried = `start ${quoted(command)}`
  const code = errnoOf(error)
  if (code === 'EMFILE' || code === 'ENFILE') {
    return new WarmforkError('FDS_EXHAUSTED', { tried, happened: `the system gave ${code}`, cause: error })
  }
  if (code === 'EAGAIN') {
    return new WarmforkError('PIDS_EXHAUSTED', { tried, happened: 'the system gave EAGAIN', cause: error })
  }
  const isDirectory = statSync(cwd, { throwIfNoEntry: false })?.isDirectory() ?? false
  const happened = !isDirectory
    ? `the working directory ${cwd} is no directory`
    : code === 'ENOENT'
      ? `there is no program \`${tty ? 'setsid' : command[0]}\``
      : code === 'EACCES'
        ? `\`${command[0]}\` may not be executed`
        : (error as Error).message
  return new WarmforkError('TEMPLATE_START_FAILED', { tried, happened, cause: error })
}
