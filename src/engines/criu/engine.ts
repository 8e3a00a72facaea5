/**
 * The criu engine: a checkpoint is `criu dump` and prepare into a new generation; a fork is derive and `criu restore`.
 * It owns the store and what criu needs, and knows neither templates' boots nor pools.
 */
import {
  accessSync,
  chmodSync,
  closeSync,
  constants,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readlinkSync,
  rmSync,
  statfsSync,
  statSync,
} from 'node:fs'
import { join } from 'node:path'
import { planDescriptors } from '../../descriptors/policies.js'
import { surveyTree } from '../../descriptors/survey.js'
import { WarmforkError } from '../../errors.js'
import type { Draft } from '../../generations/draft.js'
import type { Generation } from '../../generations/generation.js'
import type { Json } from '../../generations/manifest.js'
import type { Filled } from '../../generations/store.js'
import { Store } from '../../generations/store.js'
import { currentSurroundings } from '../../generations/surroundings.js'
import { neededFiles } from '../../image/contents.js'
import { type DetachOptions, detach } from '../../image/detach.js'
import { inheritListeners, type Listener } from '../../image/edits/listeners.js'
import { stdioPipes } from '../../image/edits/stdio.js'
import type { InheritedTerminal } from '../../image/edits/terminal.js'
import type { Range } from '../../image/edits/wipe.js'
import { ImageSet } from '../../image/image-set.js'
import { prepare } from '../../image/prepare.js'
import { pidfdGetfd, pidfdOpen } from '../../linux/libc.js'
import { mappingsWithFlags, memoryUse, namespacePid, processTree } from '../../linux/proc.js'
import type {
  Candidate,
  CheckpointOptions,
  Circumstances,
  Engine,
  ForkSource,
  GenerationInfo,
  IdentityMode,
  OpenOptions,
  SourceChannel,
  SourceProcess,
  SourceTerminal,
} from '../engine.js'
import { type Criu, findCriu, formatVersion } from './binary.js'
import { dump } from './dump.js'
import { flattenInto, isFlat } from './flatten.js'
import { CriuForkSource } from './fork-source.js'
import { Launcher, type ProcessRegistry, type Worker } from './launcher.js'
import { encodeWiped, Lineage } from './lineage.js'
import { addressWords, bindListeners, describeSocket, type SharedSocket, type SocketSettings } from './listening.js'
import { chooseMemory } from './memory-choice.js'
import { enterNamespaceOf, PidNamespace, requireInit } from './namespace.js'
import { pageFileName } from './page-file-name.js'
import { forkError } from './restorer.js'
import { hasFileCapabilities, requireRights } from './rights.js'
import { remakePaths, type SharedPath, sharedPaths } from './shared-paths.js'
import { SharedSockets } from './shared-sockets.js'
import { SocketPath } from './socket-path.js'

export interface CriuEngineOptions {
  /** Of the supervisor: its part of the store. */
  name: string
  /** The directory of all stores. @default see `StoreOptions.root` */
  store?: string
  /** An existing directory of this supervisor alone; derived images lie in it for the time of a fork. */
  runtimeDirectory: string
  /** Environment for criu itself; it carries the token by which the guard knows our processes. */
  env: Readonly<Record<string, string>>
  /** The name of the variable with the token, which templates have too; forks of a generation of another supervisor get it in place of that one's. */
  mark?: string
  registry: ProcessRegistry
  /** The user of templates and children, where it is not ours. */
  worker?: Worker
  /** Whether children are stopped by the kernel when the supervisor is gone, until the guard ends them. */
  deathSignal: boolean
  /** Whether children get ids of their own, or keep those of the source in a pid namespace each. @default 'fresh' */
  identity?: IdentityMode
  forkTimeoutMs: number
  /** An explicit criu. @default see `findCriu` */
  criu?: string
}

/** What the engine must know again at each fork; kept in the manifest. */
interface EngineData {
  stdio: { stream: 0 | 1 | 2; key: string }[]
  listeners: (Omit<SharedSocket, 'address' | 'socket'> & { address: number[]; socket?: SocketSettings })[]
  paths: SharedPath[]
  channels: SourceChannel[]
  terminal: InheritedTerminal[]
  /** Where forks connect Unix sockets for datagrams to: addresses as the kernel has them. */
  reconnected: number[][]
  /** The variable that marks its processes as those of the supervisor that made it. */
  mark?: string
}

/** Restorers kept started ahead: one for the next fork, one while that is being replaced. */
const AHEAD = 2

/** A tmpfs on every Linux; programs may not be mapped from it in some containers, which does not matter here. */
const SHARED_MEMORY = '/dev/shm'

export class CriuEngine implements Engine {
  readonly name = 'criu'
  readonly #options: CriuEngineOptions
  readonly #criu: Criu
  readonly #launcher: Launcher
  readonly #forks: string
  readonly #sockets = new SharedSockets((path) => this.#letGoSocketPath(path))
  /** Generations whose sockets were made anew here, and go when it is not forked from any more. */
  readonly #remade = new Set<number>()
  readonly #socketPaths: SocketPath[] = []
  readonly #sources = new Set<CriuForkSource>()
  #isClosing = false
  /** Generations that were made here and are held until they are opened. */
  readonly #unopened = new Map<number, Generation>()

  private constructor(
    options: CriuEngineOptions,
    criu: Criu,
    launcher: Launcher,
    /** The generations of this supervisor. */
    readonly store: Store,
  ) {
    this.#options = options
    this.#criu = criu
    this.#launcher = launcher
    this.#forks = makeForksDirectory(options)
  }

  /** Throws CRIU_MISSING, CRIU_TOO_OLD, CRIU_RIGHTS, and what `Store.open` throws. */
  static async open(options: CriuEngineOptions): Promise<CriuEngine> {
    const criu = findCriu(options.criu === undefined ? {} : { criu: options.criu })
    // In a pid namespace of its own criu is started by a program that needs rights of ours.
    const needsOurs = options.identity === 'namespace'
    if (needsOurs) requireInit()
    requireRights(!needsOurs && criu.source !== 'private' && process.getuid?.() !== 0 && hasFileCapabilities(criu))
    const launcher = await Launcher.prepare(criu, options.env, options.registry, options.worker)
    const store = await Store.open({
      name: options.name,
      access: 'exclusive',
      ...(options.store === undefined ? {} : { root: options.store }),
      ...(options.worker === undefined ? {} : { group: options.worker.gid }),
    })
    try {
      return new CriuEngine(options, criu, launcher, store)
    } catch (error) {
      await store.close()
      throw forkError(error)
    }
  }

  async checkpoint(source: SourceProcess, options: CheckpointOptions): Promise<GenerationInfo> {
    const sockets: { listener: SharedSocket; fd: number }[] = []
    const lost: string[] = []
    const takeSockets = (pids: readonly number[], listeners: readonly Listener[]) => {
      for (const listener of listeners) {
        const fd = takeSocket(pids, listener.inode)
        const socket = describeSocket(listener, fd)
        sockets.push({ listener: { ...listener, socket }, fd })
        const { path } = listener
        if (path !== undefined && !this.#keepSocketPath(path)) lost.push(path)
      }
      return new Map(sockets.map(({ listener: { inode, socket } }) => [inode, socket]))
    }
    let kept = false
    const parent = source.generation === undefined ? undefined : await this.store.get(source.generation)
    // Its own children hold it too, but they may end meanwhile.
    parent?.hold()
    try {
      const { options: baked, watched } = parent?.manifest.surroundings ?? source
      const { command, cwd, uid, gid, declaredEnv } = source
      const criuVersion = formatVersion(this.#criu.version)
      const about = { criuVersion, command, cwd, uid, gid, declaredEnv, options: baked, watched }
      const surroundings = currentSurroundings(about)
      const meta = {
        parent: parent?.number ?? null,
        reforks: parent ? (parent.manifest.reforks ?? 0) + 1 : 0,
        reason: options.reason,
        surroundings,
        durable: options.durable ?? true,
      }
      const generation = await this.store.create(meta, async (draft) => {
        this.#launcher.admit(draft.directory)
        this.#launcher.givePath(draft.scratchDirectory)
        const lineage = parent && (await Lineage.of(parent, draft.finalDirectory))
        const filled = await this.#fill(source, options, draft, lineage, takeSockets)
        await lineage?.link(draft, filled.inherited)
        await draft.keepFiles(filled.files, parent)
        const warnings = lost.map(
          (path) =>
            `No link can be made beside ${path}: a child that removes it when it ends takes it from its siblings.`,
        )
        return { ...filled.filled, warnings: [...filled.filled.warnings, ...warnings] }
      })
      this.#sockets.add(generation.number, sockets)
      this.#unopened.set(generation.number, generation)
      kept = true
      return generation.info
    } finally {
      parent?.letGo()
      if (!kept) for (const { fd } of sockets) closeSync(fd)
    }
  }

  /** `takeSockets` is called while the source is as it was at the checkpoint. */
  async #fill(
    source: SourceProcess,
    options: CheckpointOptions,
    draft: Draft,
    lineage: Lineage | undefined,
    takeSockets: (pids: readonly number[], listeners: readonly Listener[]) => ReadonlyMap<number, SocketSettings>,
  ) {
    const pageFile = pageFileName(draft.number)
    const tree = processTree(source.pid)
    if (tree.length === 0) {
      const tried = `checkpoint process ${source.pid} (${source.command.join(' ')})`
      throw new WarmforkError('CHECKPOINT_FAILED', { tried, happened: 'it has ended' })
    }
    const pids = tree.map(({ pid }) => pid)
    // As criu sees them, which works where the source lives.
    const inside = new Map(pids.map((pid) => [pid, namespacePid(pid) ?? pid]))
    const outside = new Map([...inside].map(([pid, id]) => [id, pid]))
    const idOf = (pid: number) => inside.get(pid) ?? pid
    // A program that does not survive a criu that is killed leaves its children without a parent by which they could be found.
    for (const pid of pids) this.#launcher.track(pid)
    const memory = chooseMemory(pids, options.memory, (pid) => tree.find((one) => one.pid === pid)!.comm)
    const rssBytes = pids.reduce((sum, pid) => sum + (memoryUse(pid)?.rssBytes ?? 0), 0)
    const wipe = this.#recordsWipeOnFork
      ? new Map<number, Range[]>()
      : wipedRanges(pids, lineage?.wiped(source.forkedPids ?? [source.pid]))
    const wipedInside = new Map([...wipe].map(([pid, ranges]) => [idOf(pid), ranges]))
    const inherited = new Set([...source.stdioInodes.map(Number), ...source.channels.map(({ inode }) => inode)])
    const open = surveyTree(pids).filter(({ inode }) => inode === undefined || !inherited.has(inode))
    const plan = planDescriptors(open, options.descriptors ?? {}, `checkpoint ${source.command.join(' ')}`)
    // For CRIU, a connection to the outside needs leave; for one within the tree that says nothing.
    const unixSockets = open.flatMap(({ kind, inode }) => (kind.startsWith('unix-') && inode ? [inode] : []))
    const { frozenMs } = await dump({
      argv: [...enterNamespaceOf(source.pid), ...this.#launcher.argv],
      env: this.#launcher.env,
      unprivileged: this.#launcher.unprivileged,
      pid: idOf(source.pid),
      command: source.command,
      directory: draft.scratchDirectory,
      external: [
        ...[...source.channels.map(({ inode }) => inode), ...unixSockets].map((inode) => `unix[${inode}]`),
        ...externalTerminals(source.terminal),
      ],
      timeoutMs: options.timeoutMs,
      signal: options.signal,
      onStart: (pid) => this.#launcher.started(pid),
      onEnd: (pid) => this.#launcher.ended(pid),
    })
    options.signal?.throwIfAborted()
    const before = performance.now()
    const set = ImageSet.read(draft.scratchDirectory)
    const closed = plan.closed.map(({ pid, fd }) => ({ pid: idOf(pid), fd }))
    const detached = { inherited, disconnected: plan.disconnected, closed }
    const settings = takeSockets(pids, findListeners(set, detached))
    options.onSourceFree?.()
    const renamed = lineage?.originals(set) ?? new Map<string, string>()
    const prepared = await prepare({
      source: draft.scratchDirectory,
      image: set,
      target: draft.imageDirectory,
      pageFile: { write: join(draft.directory, pageFile), map: join(draft.finalDirectory, pageFile) },
      isShared: (id) => memory.isShared(outside.get(id) ?? id),
      inherited: lineage?.pageFiles ?? [],
      renamed,
      detach: detached,
      wipe: wipedInside,
      keepsIds: this.#options.identity === 'namespace',
    })
    options.signal?.throwIfAborted()
    const data: EngineData = {
      stdio: stdioPipes(set, source.stdioInodes),
      listeners: prepared.listeners.map((listener) => ({
        ...listener,
        address: [...listener.address],
        socket: settings.get(listener.inode)!,
      })),
      // Made again by us, in directories that are another user's: that could be led astray.
      paths: this.#launcher.hasOtherWorker ? [] : sharedPaths(set),
      channels: source.channels.map((channel) => ({ ...channel, pid: idOf(channel.pid) })),
      terminal: prepared.terminal,
      reconnected: prepared.reconnected.map((address) => [...address]),
    }
    const filled: Filled = {
      memory: memory.mode,
      warnings: [...memory.warnings, ...plan.warnings],
      pageFiles: prepared.pageFileRuns.length > 0 ? [{ name: pageFile, runs: prepared.pageFileRuns }] : [],
      rssBytes,
      processes: set
        .processes()
        .map(({ pid, threads }) => ({ pid, threads: threads.length, comm: set.core(pid).task?.comm ?? '' })),
      edits: {
        ...prepared.edits,
        copiedBytes: prepared.copiedBytes,
        descriptors: plan.descriptors.map(({ pid, fd, kind, target, policy }) => ({ pid, fd, kind, target, policy })),
      },
      engineData: {
        stdio: data.stdio,
        listeners: data.listeners.map(({ socket, ...listener }) => ({ ...listener, socket: asJson(socket!) })),
        paths: data.paths.map((path) => ({ ...path })),
        channels: data.channels.map((channel) => ({ ...channel, agent: { ...channel.agent } })),
        terminal: data.terminal.map((description) => ({ ...description })),
        reconnected: data.reconnected,
        ...(this.#options.mark === undefined ? {} : { mark: this.#options.mark }),
        wiped: encodeWiped(wipedInside).map(({ pid, ranges }) => ({ pid, ranges })),
      },
      checkpointMs: frozenMs,
      prepareMs: Math.round(performance.now() - before),
    }
    const files = neededFiles(set)
    return {
      filled,
      inherited: prepared.inherited,
      files: lineage ? lineage.filesToKeep(files, renamed) : files,
    }
  }

  /** CRIU ≥ 4.2 writes wipe-on-fork and droppable memory's flags into the image; 4.1 leaves them out. */
  get #recordsWipeOnFork(): boolean {
    const { major, minor } = this.#criu.version
    return major > 4 || (major === 4 && minor >= 2)
  }

  async open(number: number, { ahead = AHEAD, listeners = 'shared' }: OpenOptions = {}): Promise<ForkSource> {
    // What was made here a moment ago need not be read again.
    const unopened = this.#unopened.get(number)
    const generation = unopened ?? (await this.store.get(number))
    const { paths } = generation.manifest.engineData as unknown as EngineData
    this.#remakePaths(paths)
    if (!unopened) this.#checkFit(generation)
    const sockets = this.#socketsFor(generation, listeners)
    try {
      const source = new CriuForkSource({
        launcher: this.#launcher,
        generation,
        ...this.#streamsAndListeners(generation, sockets.descriptors),
        ...(sockets.ports ? { ports: sockets.ports } : {}),
        variable: this.#variableOf(generation),
        onClosed: () => {
          this.#sources.delete(source)
          sockets.letGo()
        },
        remakePaths: () => this.#remakePaths(paths),
        deathSignal: this.#options.deathSignal,
        identity: this.#options.identity ?? 'fresh',
        directory: this.#forks,
        timeoutMs: this.#options.forkTimeoutMs,
        ahead,
      })
      this.#sources.add(source)
      unopened?.letGo()
      this.#unopened.delete(number)
      return source
    } catch (error) {
      sockets.letGo()
      throw error
    }
  }

  #variableOf(generation: Generation): { from: string; to: string } | undefined {
    const { mark: from } = generation.manifest.engineData as unknown as EngineData
    const { mark: to } = this.#options
    return from === undefined || to === undefined || from === to || from.length !== to.length ? undefined : { from, to }
  }

  /**
   * What forks of a generation accept from. `letGo`: when they are not made any more.
   * @throws PORT_TAKEN, GENERATION_MISFIT
   */
  #socketsFor(generation: Generation, how: 'shared' | 'private') {
    const { number } = generation
    if (how === 'private') {
      const listeners = sharedSocketsOf(generation)
      const { descriptors, addresses, close } = bindListeners(listeners, 'private')
      return { descriptors, ports: changedPorts(listeners, addresses), letGo: close }
    }
    if (!this.#sockets.has(number)) {
      const { uid, gid } = generation.manifest.surroundings
      const made = this.#sockets.have(
        number,
        sharedSocketsOf(generation),
        this.#launcher.hasOtherWorker ? { uid, gid } : undefined,
      )
      for (const path of made) this.#keepSocketPath(path)
      this.#remade.add(number)
    }
    return { descriptors: this.#sockets.of(number), ports: undefined, letGo: () => this.#letGoSockets(number) }
  }

  /** Those of a checkpoint stay for as long as the generation does: the program may have closed its own. */
  #letGoSockets(number: number): void {
    if (this.#isClosing || !this.#remade.has(number)) return
    if ([...this.#sources].some(({ generation, ports }) => generation.number === number && !ports)) return
    this.#remade.delete(number)
    this.#sockets.release(number)
  }

  async flatten(number: number): Promise<GenerationInfo> {
    const generation = await this.store.get(number)
    if (isFlat(generation)) return generation.info
    this.#checkFit(generation)
    const made = await flattenInto(this.store, generation)
    // The other one may be removed before this one is forked from.
    if (this.#sockets.has(number)) this.#sockets.have(made.number, sharedSocketsOf(made))
    this.#unopened.set(made.number, made)
    return made.info
  }

  async list(): Promise<readonly GenerationInfo[]> {
    return (await this.store.list()).filter(({ ephemeral }) => !ephemeral).map(({ info }) => info)
  }

  async candidates(circumstances: Circumstances): Promise<readonly Candidate[]> {
    const now = currentSurroundings({ ...circumstances, criuVersion: formatVersion(this.#criu.version) })
    const { generations, broken } = await this.store.survey()
    const whole = generations
      .filter(({ ephemeral }) => !ephemeral)
      .map((generation) => ({
        number: generation.number,
        reforks: generation.info.reforks,
        reasons: generation.misfits(now),
        watched: generation.manifest.surroundings.watched,
      }))
    const others = broken.map(({ number, error }) => ({ number, reforks: 0, reasons: [error.happened] }))
    return [...whole, ...others].sort((a, b) => b.number - a.number)
  }

  async verify(number: number, how: 'quickly' | 'wholly', signal?: AbortSignal): Promise<void> {
    const open = [...this.#sources].filter(({ generation }) => generation.number === number)
    const generation = await this.store.get(number)
    try {
      await (how === 'quickly' ? generation.verifyQuickly() : generation.verify(signal))
    } catch (error) {
      signal?.throwIfAborted()
      for (const source of open) source.refuse(error as Error)
      throw error
    }
  }

  async discard(number: number): Promise<boolean> {
    for (const source of this.#sources) if (source.generation.number === number) this.#sources.delete(source)
    this.#unopened.get(number)?.letGo()
    this.#unopened.delete(number)
    const { removed } = await this.store.prune({ numbers: [number] })
    if (removed.length === 0) return false
    this.#remade.delete(number)
    this.#sockets.release(number)
    return true
  }

  /** The machine must be the one that it was made on; whose command it is, its caller knows. Throws GENERATION_MISFIT. */
  #checkFit(generation: Generation): void {
    const { declaredEnv, ...made } = generation.manifest.surroundings
    const now = currentSurroundings({ ...made, criuVersion: formatVersion(this.#criu.version), declaredEnv: {} })
    generation.checkFit({ ...now, declaredEnv })
  }

  #keepSocketPath(path: string): boolean {
    if (this.#socketPaths.some((one) => one.path === path)) return true
    const kept = SocketPath.keep(path)
    if (!kept) return false
    this.#options.registry.removeAtEnd(kept.kept, 'file')
    this.#socketPaths.push(kept)
    return true
  }

  #letGoSocketPath(path: string): void {
    for (const one of this.#socketPaths.filter((candidate) => candidate.path === path)) {
      this.#socketPaths.splice(this.#socketPaths.indexOf(one), 1)
      one.close()
    }
  }

  #remakePaths(paths: readonly SharedPath[]): void {
    for (const path of this.#socketPaths) path.remake()
    remakePaths(paths)
  }

  #streamsAndListeners(generation: Generation, sockets: ReadonlyMap<number, number>) {
    const {
      stdio,
      listeners,
      channels,
      terminal = [],
      reconnected = [],
    } = generation.manifest.engineData as unknown as EngineData
    return {
      stdio,
      channels,
      terminal,
      reconnected: reconnected.map((address) => Uint8Array.from(address)),
      listeners: listeners.map(({ socket: _, ...listener }) => ({
        ...listener,
        address: Uint8Array.from(listener.address),
        descriptor: sockets.get(listener.inode)!,
      })),
    }
  }

  settled(): Promise<void> {
    return PidNamespace.settle()
  }

  async close(): Promise<void> {
    this.#isClosing = true
    for (const source of this.#sources) await source.close()
    for (const path of this.#socketPaths.splice(0)) path.close()
    this.#sockets.close({ leavePaths: !this.#options.deathSignal })
    rmSync(this.#forks, { recursive: true, force: true })
    await this.store.close()
  }
}

/**
 * Where derived directories are made: some 40 links and files for each fork, which take 3 ms on ext4 and 0.3 ms on a tmpfs.
 * /run is none in many containers and small machines.
 */
function makeForksDirectory({ runtimeDirectory, registry, worker }: CriuEngineOptions): string {
  let directory = join(runtimeDirectory, 'forks')
  if (!isTmpfs(runtimeDirectory) && isTmpfs(SHARED_MEMORY)) {
    directory = mkdtempSync(join(SHARED_MEMORY, `warmfork-${process.pid}-`))
    registry.removeAtEnd(directory)
  } else {
    rmSync(directory, { recursive: true, force: true })
    mkdirSync(directory)
  }
  chmodSync(directory, worker ? 0o711 : 0o700)
  return directory
}

function isTmpfs(path: string): boolean {
  const TMPFS_MAGIC = 0x01021994
  try {
    accessSync(path, constants.W_OK)
    return statfsSync(path).type === TMPFS_MAGIC
  } catch {
    return false
  }
}

/** Throws GENERATION_MISFIT for a generation of which too little was written down to make its sockets anew. */
function sharedSocketsOf(generation: Generation): SharedSocket[] {
  const { listeners } = generation.manifest.engineData as unknown as EngineData
  return listeners.map(({ socket, address, ...listener }) => {
    const known = { ...listener, address: Uint8Array.from(address) }
    if (socket) return { ...known, socket }
    throw new WarmforkError('GENERATION_MISFIT', {
      tried: `open generation ${generation.number}`,
      happened: `its children share a socket (${addressWords(known)}) of which an earlier warmfork did not write down how to make it`,
    })
  })
}

/** Ports that streams listen at now, by those that the program asked for; where there is none such, those of datagrams. */
function changedPorts(
  listeners: readonly SharedSocket[],
  addresses: ReadonlyMap<number, { readonly port: number } | string>,
): Map<number, number> {
  const SOCK_STREAM = 1
  const ports = new Map<number, number>()
  for (const { inode, port, type } of listeners) {
    const now = addresses.get(inode)
    if (typeof now === 'object' && (type === SOCK_STREAM || !ports.has(port))) ports.set(port, now.port)
  }
  return ports
}

function asJson({ options, ...settings }: SocketSettings): Json {
  return { ...settings, options: options.map((option) => [...option]) } as unknown as Json
}

/** A copy of a socket of the tree. The process that owns it has it open on some descriptor. */
function takeSocket(pids: readonly number[], inode: number): number {
  for (const pid of pids) {
    for (const fd of readdirSync(`/proc/${pid}/fd`)) {
      if (readlinkSync(`/proc/${pid}/fd/${fd}`) !== `socket:[${inode}]`) continue
      const pidfd = pidfdOpen(pid)
      try {
        return pidfdGetfd(pidfd, Number(fd))
      } finally {
        closeSync(pidfd)
      }
    }
  }
  throw new WarmforkError('CHECKPOINT_FAILED', {
    tried: 'take over a listening socket of the template',
    happened: `the template has closed the socket with inode ${inode} since the checkpoint`,
    remedy: 'Take the checkpoint when the program has opened what it serves on.',
  })
}

/** In criu's words. The program can have it open as `/dev/tty` too, as shells do. */
function externalTerminals(terminal: SourceTerminal | undefined): string[] {
  if (!terminal) return []
  const any = statSync('/dev/tty', { throwIfNoEntry: false })
  return [terminal, ...(any ? [any] : [])].map(({ rdev, dev }) => `tty[${rdev.toString(16)}:${dev.toString(16)}]`)
}

/** The sockets that an image's forks will share, found without a change to it. */
function findListeners(set: ImageSet, detached: DetachOptions): Listener[] {
  const copy = set.copy()
  detach(copy, detached)
  return inheritListeners(copy)
}

/** `carried`: ranges of forks, whose memory has lost its flags. */
function wipedRanges(pids: readonly number[], carried?: ReadonlyMap<number, readonly Range[]>): Map<number, Range[]> {
  return new Map(
    pids.map((pid) => {
      const mappings = mappingsWithFlags(pid) ?? []
      const flagged = mappings.filter(({ vmFlags }) => vmFlags.includes('wf') || vmFlags.includes('dp'))
      // Something else may have been mapped there since.
      const still = (carried?.get(pid) ?? []).filter(({ start, end }) =>
        mappings.some((one) => one.start <= start && end <= one.end && one.path === ''),
      )
      return [pid, [...flagged, ...still].map(({ start, end }) => ({ start, end }))]
    }),
  )
}
