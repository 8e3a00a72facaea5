/** `warmfork inspect`: what a generation holds. It reads files only; the supervisor need not run. */
import type { Command } from 'commander'
import { descriptorKind, isDescriptorKind } from '../descriptors/kinds.js'
import { WarmforkError } from '../errors.js'
import type { Generation } from '../generations/generation.js'
import type { Json, MappedFile } from '../generations/manifest.js'
import { Store } from '../generations/store.js'
import { subcommand } from './command.js'
import { type Contents, contentsOf, MEMORY_KINDS } from './generation-contents.js'
import { print, printJson } from './output.js'
import { formatDuration, formatMiB, parseNumber } from './quantities.js'
import { addressedStore, addStoreOptions, type StoreAddressed } from './store-address.js'
import { colours, fields, table } from './table.js'

interface InspectFlags extends StoreAddressed {
  readonly verify?: boolean
}

export function inspectCommand(): Command {
  const command = subcommand('inspect', 'show what a generation holds: processes, memory, files, sockets, edits', [
    ['warmfork inspect', 'the newest generation'],
    ['warmfork inspect 3 --verify', 'generation 3, its checksums compared'],
  ])
    .argument('[number]', 'the generation; by default the newest', parseNumber)
    .option('--verify', 'read everything and compare it with the checksums')
  return addStoreOptions(command).action(async (number: number | undefined, flags: InspectFlags) => {
    const { root, name, running } = await addressedStore(flags)
    if (running?.engine === 'spawn') {
      throw new WarmforkError('ENGINE_UNSUPPORTED', {
        tried: `inspect a generation of ${name}`,
        happened: 'its engine, spawn, starts each child anew and has no images',
      })
    }
    await using store = await Store.open({ root, name, access: 'read' })
    const generation = number === undefined ? await newest(store) : await store.get(number)
    const inspected = await inspect(generation)
    // After the rest was read, so that one that does not decode says that first.
    if (flags.verify) await generation.verify()
    const all = { ...inspected, ...(flags.verify ? { verified: true } : {}) }
    if (flags.json) printJson(all)
    else print(format(all))
  })
}

async function newest(store: Store): Promise<Generation> {
  const generation = await store.newest()
  if (generation) return generation
  throw new WarmforkError('GENERATION_NOT_FOUND', {
    tried: 'inspect the newest generation',
    happened: `there is none in ${store.directory}`,
    remedy: 'Start a supervisor with `warmfork run`.',
  })
}

interface Inspected extends Contents {
  readonly name: string
  readonly number: number
  readonly directory: string
  readonly parent: number | null
  readonly createdAt: string
  readonly warmforkVersion: string
  readonly command: readonly string[]
  readonly cwd: string
  readonly uid: number
  readonly gid: number
  /** Names only: values are kept as checksums. */
  readonly declaredEnv: readonly string[]
  readonly kernelRelease: string
  readonly cpuModel: string
  readonly criuVersion: string
  readonly memoryMode: 'cow' | 'copy'
  readonly rssBytes: number
  readonly sizes: { readonly apparentBytes: number; readonly allocatedBytes: number }
  readonly times: { readonly checkpointMs: number; readonly prepareMs: number; readonly syncMs: number }
  readonly usedBy: readonly number[]
  readonly mappedFiles: readonly MappedFileState[]
  readonly edits: Json
  /** What the source had open, each with what a fork has instead. */
  readonly descriptors: readonly DescriptorState[]
  readonly warnings: readonly string[]
  readonly verified?: boolean
}

interface DescriptorState {
  readonly pid: number
  /** -1 for what a process has mapped and not open. */
  readonly fd: number
  readonly kind: string
  readonly target: string
  readonly policy: string
}

interface MappedFileState {
  readonly path: string
  readonly use: 'mapped' | 'open'
  readonly sizeBytes: number
  readonly kept: MappedFile['kept']
  /** `same`: still the file that was mapped; `kept`: it changed, and the kept one takes its place; `lost`: no fork is possible. */
  readonly now: 'same' | 'kept' | 'lost'
  /** Why it was not kept. */
  readonly reason?: string
}

async function inspect(generation: Generation): Promise<Inspected> {
  const { manifest, directory, number } = generation
  const { surroundings } = manifest
  return {
    name: manifest.name,
    number,
    directory,
    parent: manifest.parent,
    createdAt: manifest.createdAt,
    warmforkVersion: manifest.warmforkVersion,
    command: surroundings.command,
    cwd: surroundings.cwd,
    uid: surroundings.uid,
    gid: surroundings.gid,
    declaredEnv: Object.keys(surroundings.declaredEnv),
    kernelRelease: surroundings.kernelRelease,
    cpuModel: surroundings.cpuModel,
    criuVersion: surroundings.criuVersion,
    memoryMode: manifest.memory,
    rssBytes: manifest.rssBytes,
    sizes: manifest.sizes,
    times: manifest.times,
    usedBy: generation.leases().map(({ pid }) => pid),
    ...(await contentsOf(generation)),
    mappedFiles: manifest.mappedFiles.map((entry) => stateOf(generation, entry)),
    ...editsOf(manifest.edits),
    warnings: manifest.warnings,
  }
}

/** The report on descriptors stands beside the other edits. */
function editsOf(all: Json): { edits: Json; descriptors: readonly DescriptorState[] } {
  if (typeof all !== 'object' || all === null || Array.isArray(all)) return { edits: all, descriptors: [] }
  const { descriptors = [], ...edits } = all
  return { edits, descriptors: descriptors as unknown as DescriptorState[] }
}

function stateOf(generation: Generation, entry: MappedFile): MappedFileState {
  const { path, use, sizeBytes, kept, reason } = entry
  const current = generation.currentPath(path)
  const now = current === undefined ? 'lost' : current === path ? 'same' : 'kept'
  return { path, use, sizeBytes, kept, now, ...(reason === undefined ? {} : { reason }) }
}

function format(found: Inspected): string {
  const { sizes, times } = found
  const age = formatDuration(Math.max(0, Date.now() - Date.parse(found.createdAt)))
  const head = fields([
    [
      'generation',
      `${found.number} of ${found.name}, ${age} old${found.parent === null ? '' : `, from ${found.parent}`}`,
    ],
    ['directory', found.directory],
    ['command', found.command.join(' ')],
    ['in', `${found.cwd}, user ${found.uid}, group ${found.gid}`],
    ['made with', `CRIU ${found.criuVersion}, Linux ${found.kernelRelease}, warmfork ${found.warmforkVersion}`],
    ['processor', found.cpuModel],
    [
      'memory',
      `${found.memoryMode === 'cow' ? 'shared copy-on-write' : 'copied'}; ${formatMiB(found.rssBytes)} MiB at the checkpoint`,
    ],
    ['on disk', `${formatMiB(sizes.allocatedBytes)} MiB (${formatMiB(sizes.apparentBytes)} MiB with holes)`],
    [
      'took',
      `${formatDuration(times.checkpointMs)} standing still, ${formatDuration(times.prepareMs)} to prepare, ${formatDuration(times.syncMs)} to sync`,
    ],
    ['used by', found.usedBy.length === 0 ? 'no process' : `processes ${found.usedBy.join(', ')}`],
    ...(found.declaredEnv.length > 0 ? [['declared', found.declaredEnv.join(', ')] as const] : []),
    ...(found.verified ? [['checksums', 'all as they were made'] as const] : []),
  ])
  const sections: [title: string, text: string][] = [
    ['Processes', processTable(found)],
    ['Memory', memoryTable(found)],
    ['Mapped and open files that must not change', mappedFileTable(found)],
    ['Open files', fileTable(found)],
    ['Sockets', socketTable(found)],
    ['Other descriptors', otherTable(found)],
    ['What a fork has instead', descriptorTable(found)],
    ['Edits', editLines(found.edits)],
    ['Warnings', found.warnings.join('\n')],
  ]
  const shown = sections.filter(([, text]) => text !== '').map(([title, text]) => `${colours.bold(title)}\n${text}`)
  return [head, ...shown].join('\n\n')
}

function processTable({ processes }: Contents): string {
  return table(
    [
      { title: 'PID', align: 'right' },
      { title: 'PARENT', align: 'right' },
      { title: 'NAME' },
      { title: 'THREADS', align: 'right' },
      { title: 'MAPPINGS', align: 'right' },
      { title: 'COPIED MiB', align: 'right' },
    ],
    processes.map(({ pid, ppid, comm, threads, mappings, copiedBytes }) => [
      String(pid),
      String(ppid),
      comm,
      String(threads),
      String(mappings),
      formatMiB(copiedBytes),
    ]),
  )
}

function memoryTable({ memory }: Contents): string {
  return table(
    [
      { title: 'KIND' },
      { title: 'MAPPINGS', align: 'right' },
      { title: 'MAPPED MiB', align: 'right' },
      { title: 'PAGE FILE MiB', align: 'right' },
      { title: 'COPIED MiB', align: 'right' },
    ],
    memory.map(({ kind, mappings, mappedBytes, pageFileBytes, copiedBytes }) => [
      MEMORY_KINDS[kind],
      String(mappings),
      formatMiB(mappedBytes),
      formatMiB(pageFileBytes),
      formatMiB(copiedBytes),
    ]),
  )
}

function mappedFileTable({ mappedFiles }: Inspected): string {
  if (mappedFiles.length === 0) return ''
  return table(
    [{ title: 'PATH' }, { title: 'USE' }, { title: 'MiB', align: 'right' }, { title: 'KEPT' }, { title: 'NOW' }],
    mappedFiles.map(({ path, use, sizeBytes, kept, now, reason }) => [
      path,
      use,
      formatMiB(sizeBytes),
      kept ?? `no: ${reason ?? 'unknown'}`,
      now,
    ]),
  )
}

function fileTable({ files }: Contents): string {
  if (files.length === 0) return ''
  return table(
    [{ title: 'PID', align: 'right' }, { title: 'FD', align: 'right' }, { title: 'ACCESS' }, { title: 'PATH' }],
    files.map(({ pid, fd, access, path }) => [String(pid), String(fd), access, path]),
  )
}

function socketTable({ sockets }: Contents): string {
  if (sockets.length === 0) return ''
  return table(
    [
      { title: 'PID', align: 'right' },
      { title: 'FD', align: 'right' },
      { title: 'TYPE' },
      { title: 'LOCAL' },
      { title: 'REMOTE' },
    ],
    sockets.map(({ pid, fd, type, local, remote }) => [String(pid), String(fd), type, local, remote]),
  )
}

function otherTable({ others }: Contents): string {
  if (others.length === 0) return ''
  return table(
    [{ title: 'PID', align: 'right' }, { title: 'FD', align: 'right' }, { title: 'TYPE' }],
    others.map(({ pid, fd, type }) => [String(pid), String(fd), type]),
  )
}

/** One line for all descriptors that lead to the same. */
function descriptorTable({ descriptors }: Inspected): string {
  if (descriptors.length === 0) return ''
  const groups = new Map<string, DescriptorState[]>()
  for (const one of descriptors) {
    const key = JSON.stringify([one.kind, one.policy, one.target])
    groups.set(key, [...(groups.get(key) ?? []), one])
  }
  return table(
    [{ title: 'KIND' }, { title: 'POLICY' }, { title: 'PID:FD' }, { title: 'TARGET' }],
    [...groups.values()].map((group) => {
      const { kind, policy, target } = group[0]!
      const where = group.slice(0, 3).map(({ pid, fd }) => (fd < 0 ? `${pid}:mapped` : `${pid}:${fd}`))
      const more = group.length > 3 ? ` and ${group.length - 3} more` : ''
      const words = isDescriptorKind(kind) ? descriptorKind(kind).words : kind
      return [words.replace(/^an? /, ''), policy, `${where.join(' ')}${more}`, target]
    }),
  )
}

/** The edits are the engine's to describe; a line for each that was made. */
function editLines(edits: Json): string {
  if (typeof edits !== 'object' || edits === null || Array.isArray(edits)) return ''
  const lines = Object.entries(edits).flatMap(([name, value]): [string, string][] => {
    if (value === 0 || value === false || value === null || (Array.isArray(value) && value.length === 0)) return []
    const text = name.endsWith('Bytes') && typeof value === 'number' ? `${formatMiB(value)} MiB` : flat(value)
    return [[words(name.replace(/Bytes$/, '')), text]]
  })
  return lines.length > 0 ? fields(lines) : ''
}

/** `sizeChecksDropped` as people say it. */
const words = (name: string) => name.replace(/[A-Z]/g, (letter) => ` ${letter.toLowerCase()}`)

function flat(value: unknown): string {
  if (Array.isArray(value)) return value.map(flat).join(', ')
  if (typeof value !== 'object' || value === null) return String(value)
  return Object.entries(value)
    .map(([key, each]) => `${words(key)} ${flat(each)}`)
    .join(' ')
}
