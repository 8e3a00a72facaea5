/**
 * What takes and restores a checkpoint. An engine knows processes and images, but no pools, no policies and no CLI.
 * Two engines exist: `criu` (the real one) and `spawn` (a cold start behind the same interface, where CRIU cannot run).
 */
import type { Readable, Writable } from 'node:stream'
import type { ForkedChannel, SourceChannel } from '../agents/channel.js'
import type { AgentGroup } from '../agents/group.js'
import type { DescriptorPolicies } from '../descriptors/policies.js'
import type { WatchedSource } from '../generations/surroundings.js'
import type { ExitStatus } from '../linux/reaper.js'
import type { Terminal } from '../terminal.js'

export type { ForkedChannel, SourceChannel } from '../agents/channel.js'

export type EngineName = 'criu' | 'spawn'

/** How a generation gives its children their memory: shared copy-on-write, or copied at each fork. */
export type MemoryMode = 'cow' | 'copy'

/** Whether a fork gets ids of its own, or keeps those of the source in a pid namespace of its own. */
export type IdentityMode = 'fresh' | 'namespace'

/** A running program that a checkpoint can be taken of: a template, or (refork) a warmed child. */
export interface SourceProcess {
  readonly pid: number
  readonly command: readonly string[]
  /** The one that it was forked from; undefined where it was booted. */
  readonly generation?: number
  /** Its processes as they were forked (`ForkedProcess.pids`), where it is a fork. @default its root alone */
  readonly forkedPids?: readonly number[]
  readonly cwd: string
  /** Environment keys whose values a later supervisor must share to use the generation; never the whole environment. */
  readonly declaredEnv: Readonly<Record<string, string>>
  /** Inodes of the pipes on its descriptors 0, 1 and 2: what the stdio edit gives anew to each child. */
  readonly stdioInodes: readonly [bigint, bigint, bigint]
  /** The pty that it was booted on, whose master is ours: each fork gets one of its own. */
  readonly terminal?: SourceTerminal | undefined
  readonly uid: number
  readonly gid: number
  /** Connections of agents in the source to the supervisor: each fork gets a new one in place of each. */
  readonly channels: readonly SourceChannel[]
  /** Options that stand in its image, by their names and in words. That of a fork has those of its generation. */
  readonly options?: Readonly<Record<string, string>> | undefined
  /** The application's own files when it was booted. Likewise. */
  readonly watched?: WatchedSource | undefined
}

/** What a supervisor that starts would boot, and how. */
export interface Circumstances {
  readonly command: readonly string[]
  readonly cwd: string
  readonly uid: number
  readonly gid: number
  /** Values, not hashes. */
  readonly declaredEnv: Readonly<Record<string, string>>
  readonly options: Readonly<Record<string, string>>
}

/** A generation that outlived the supervisor that made it. */
export interface Candidate {
  readonly number: number
  readonly reforks: number
  /** Why it cannot be used here and now, each as a phrase; empty where it can, as far as a look tells. */
  readonly reasons: readonly string[]
  readonly watched?: WatchedSource | undefined
}

/** The slave side of a pty, as `fstat` names it. */
export interface SourceTerminal {
  readonly rdev: number
  readonly dev: number
}

export interface CheckpointOptions {
  /** What forks have in place of the source's descriptors, where it is not the default. */
  descriptors?: DescriptorPolicies
  /** Whether the source goes on after the checkpoint (Idea 1) or is left for the caller to end. It goes on in either case until then. */
  memory: MemoryMode | 'auto'
  signal?: AbortSignal
  timeoutMs: number
  /**
   * Whether the generation is to outlive this supervisor, and a power cut. One that does not is neither synced nor checksummed.
   * @default true
   */
  durable?: boolean
  /** Why it is made, for people; kept with the generation. */
  reason?: string
  /** Called as soon as the source may go on: all that must be read of it at rest was read. The generation is not complete then. */
  onSourceFree?: () => void
}

/** What a supervisor needs to know of a generation; the rest is in its manifest. */
export interface GenerationInfo {
  readonly number: number
  readonly createdAt: Date
  /** The generation whose child it was taken of; null for one of a template. */
  readonly parent: number | null
  /** How many checkpoints of forks lie between it and the template. */
  readonly reforks: number
  /** Why it was made, where somebody said so. */
  readonly reason?: string
  /** Of the source, at the checkpoint. */
  readonly rssBytes: number
  /** Of the generation's directory; 0 for the spawn engine. */
  readonly sizeBytes: number
  readonly memory: MemoryMode
  /** Why memory is copied, or other things the user should hear once. */
  readonly warnings: readonly string[]
  /** How long the source stood still. */
  readonly checkpointMs: number
}

/** Descriptors of the caller that become a child's 0, 1 and 2; they stay the caller's to close. */
export type StdioFds = readonly [stdin: number, stdout: number, stderr: number]

export interface ForkOptions {
  /** Descriptors that the child gets in place of new pipes. */
  stdio?: StdioFds
  signal?: AbortSignal
}

/** A process that a fork gave: restored and stopped before its first instruction, until `resume`. */
export interface ForkedProcess {
  readonly pid: number
  /** All processes of the tree, the root first. */
  readonly pids: readonly number[]
  /** Our ends of its pipes: to write its stdin, to read its stdout and stderr. Undefined where the caller gave descriptors. The taker closes them. */
  readonly pipes: StdioFds | undefined
  /** The same as streams, from an engine that has no pipes of its own making (spawn on macOS). */
  readonly streams?: { readonly stdin: Writable; readonly stdout: Readable; readonly stderr: Readable } | undefined
  /** Our end of its pty; undefined where the source had none. The taker closes it. */
  readonly terminal?: Terminal | undefined
  readonly generation: number
  /** The first process of its pid namespace, where it has one: all that lives in there ends with it. */
  readonly namespaceInit?: number | undefined
  /** One for each channel of the source, in that order. */
  readonly channels: readonly ForkedChannel[]
  /** Its agents, from an engine whose forks keep the connections that they were booted with (spawn). */
  readonly agents?: AgentGroup | undefined
  readonly exited: Promise<ExitStatus>
  /** Starts a parked process (SIGCONT to each of its tree). Throws CHILD_GONE where it has ended. */
  resume(): void
  /** True once it runs: resumed by us or, while parked, by somebody else. */
  readonly running: boolean
  /** Called when somebody else continues it while it is parked. */
  onStrayResume?: () => void
  /** Sends a signal to the root; false where it is gone. */
  kill(signal: NodeJS.Signals): boolean
  /** Kills what is left of it that its parents and sessions do not tell of: all in its pid namespace, and what was restored with it. */
  endRest?(): void
}

/** Where forks of one generation come from. */
export interface ForkSource {
  readonly generation: GenerationInfo
  readonly channels: readonly SourceChannel[]
  /** TCP ports that forks listen at in place of those of the source, where their listeners are private. */
  readonly ports?: ReadonlyMap<number, number> | undefined
  /** One fork: restored, stopped. */
  fork(options?: ForkOptions): Promise<ForkedProcess>
  /** Gives back what was started ahead; children live on. */
  close(): Promise<void>
}

export interface OpenOptions {
  /** How many restores are begun ahead of the forks that need them. @default 2 */
  ahead?: number
  /**
   * `shared`: forks accept what comes to the sockets that the program listens at. `private`: they listen at sockets of the same
   * kinds that nobody knows, as long as the fork source is open: a generation is tried so. @default 'shared'
   */
  listeners?: 'shared' | 'private'
}

export interface Engine {
  readonly name: EngineName
  checkpoint(source: SourceProcess, options: CheckpointOptions): Promise<GenerationInfo>
  /** Throws GENERATION_NOT_FOUND, GENERATION_CORRUPT, GENERATION_MISFIT. */
  open(generation: number, options?: OpenOptions): Promise<ForkSource>
  /**
   * Makes a generation with the same content, whose memory stands in one file of its own; one that is so already is given back
   * itself. Absent: generations hold no memory. Throws GENERATION_NOT_FOUND, GENERATION_CORRUPT, GENERATION_MISFIT, DISK_FULL.
   */
  flatten?(generation: number): Promise<GenerationInfo>
  /** Removes a generation, unless somebody uses it: then false. */
  discard(generation: number): Promise<boolean>
  /** The generations that outlive their supervisor and can be used, the oldest first. */
  list(): Promise<readonly GenerationInfo[]>
  /** Those that a supervisor in these circumstances finds, the newest first. Absent: the engine keeps none. */
  candidates?(circumstances: Circumstances): Promise<readonly Candidate[]>
  /**
   * Reads a generation and compares its checksums; `quickly`: leaves out large files that by their times and inodes nobody has touched.
   * Throws GENERATION_CORRUPT, and so does each later fork from it.
   */
  verify?(generation: number, how: 'quickly' | 'wholly', signal?: AbortSignal): Promise<void>
  close(): Promise<void>
  /** After all processes were ended: resolves when the statuses of those that nobody else waits for are read. */
  settled?(): Promise<void>
}
