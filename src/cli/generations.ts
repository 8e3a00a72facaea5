/** `warmfork generations`: what the store holds, and what a running supervisor has made without one (engine spawn). */
import type { Command } from 'commander'
import type { GenerationStatus } from '../control/protocol.js'
import type { Generation } from '../generations/generation.js'
import { Store } from '../generations/store.js'
import { Verdicts } from '../generations/verdicts.js'
import { subcommand } from './command.js'
import { print, printJson } from './output.js'
import { ownBytes } from './own-size.js'
import { formatDuration, formatMiB } from './quantities.js'
import { addressedStore, addStoreOptions, type StoreAddress, type StoreAddressed } from './store-address.js'
import { type Column, colours, table } from './table.js'

export function generationsCommand(): Command {
  const command = subcommand('generations', 'list the generations of a supervisor', [
    ['warmfork generations', 'of the only supervisor'],
    ['warmfork generations --name shop --json', 'of one that need not run'],
  ])
  return addStoreOptions(command).action(async (flags: StoreAddressed) => {
    const listed = await list(await addressedStore(flags))
    if (flags.json) printJson(listed)
    else print(format(listed))
  })
}

interface Row extends Omit<GenerationStatus, 'warnings'> {
  /** On disk, without what it shares with others by hard links. */
  readonly ownBytes: number
  /** Whether forks come from it until it is unpinned. */
  readonly pinned: boolean
  /** Why it is never chosen again. */
  readonly rejected?: string
  /** Made by a refork, and not tried: its supervisor ended before. */
  readonly untried?: boolean
  /** Whether the running supervisor forks from it. */
  readonly current: boolean
  /** The processes that need it. */
  readonly usedBy: readonly number[]
  /** Why it cannot be used. */
  readonly broken?: string
}

interface Listed {
  readonly name: string
  readonly store: string
  readonly generations: readonly Row[]
}

async function list({ root, name, running }: StoreAddress): Promise<Listed> {
  const current = (number: number) => running?.generation === number
  if (running?.engine === 'spawn') {
    const generations = running.generations.map(({ warnings: _, ...known }) => ({
      ...known,
      ownBytes: 0,
      pinned: false,
      current: current(known.number),
      usedBy: running.children.filter(({ generation }) => generation === known.number).map(({ pid }) => pid),
    }))
    return { name, store: root, generations }
  }
  await using store = await Store.open({ root, name, access: 'read' })
  const { generations, broken } = await store.survey()
  const verdicts = Verdicts.read(store.directory)
  const rows: Row[] = [
    ...generations.map((generation) => rowOf(generation, current(generation.number), verdicts)),
    ...broken.map(({ number, error }) => ({
      ...UNKNOWN,
      number,
      current: current(number),
      broken: `${error.code}: ${error.happened}`,
    })),
  ]
  return { name, store: root, generations: rows.sort((a, b) => a.number - b.number) }
}

const UNKNOWN = {
  createdAt: '',
  rssBytes: 0,
  sizeBytes: 0,
  memory: 'copy',
  checkpointMs: 0,
  parent: null,
  reforks: 0,
  ownBytes: 0,
  pinned: false,
  usedBy: [],
} as const

function rowOf(generation: Generation, current: boolean, verdicts: Verdicts): Row {
  const { warnings: _, createdAt, ...known } = generation.info
  const { number, reforks } = known
  const rejected = verdicts.whyNot(number)
  const isTried = reforks === 0 || generation.ephemeral || verdicts.isApproved(number)
  return {
    ...known,
    createdAt: createdAt.toISOString(),
    ownBytes: ownBytes(generation),
    current,
    pinned: verdicts.pinned === number,
    ...(rejected === undefined ? {} : { rejected }),
    ...(isTried || rejected !== undefined ? {} : { untried: true }),
    usedBy: generation.leases().map(({ pid }) => pid),
  }
}

function stateOf({ current, pinned, rejected, untried }: Row): string {
  const words = [...(current ? ['current'] : []), ...(pinned ? ['pinned'] : []), ...(untried ? ['not tried'] : [])]
  return rejected === undefined ? words.join(', ') : [...words, `rejected: ${rejected}`].join(', ')
}

const COLUMNS: readonly Column[] = [
  { title: 'GEN', align: 'right' },
  { title: 'AGE', align: 'right' },
  { title: 'PARENT', align: 'right' },
  { title: 'REFORKS', align: 'right' },
  { title: 'RSS MiB', align: 'right' },
  { title: 'DISK MiB', align: 'right' },
  { title: 'OWN MiB', align: 'right' },
  { title: 'MEMORY' },
  { title: 'CHECKPOINT', align: 'right' },
  { title: 'USED BY', align: 'right' },
  { title: 'STATE' },
  { title: 'WHY' },
]

function format({ name, store, generations }: Listed): string {
  const head = `${colours.bold(name)}  ${store}`
  if (generations.length === 0) return `${head}\nno generations`
  const rows = generations.map((row) =>
    row.broken === undefined
      ? [
          String(row.number),
          formatDuration(Math.max(0, Date.now() - Date.parse(row.createdAt))),
          row.parent === null ? '' : String(row.parent),
          String(row.reforks),
          formatMiB(row.rssBytes),
          formatMiB(row.sizeBytes),
          formatMiB(row.ownBytes),
          row.memory,
          formatDuration(row.checkpointMs),
          row.usedBy.length === 0 ? '' : String(row.usedBy.length),
          stateOf(row),
          row.reason ?? '',
        ]
      : [String(row.number), '', '', '', '', '', '', '', '', '', row.broken, ''],
  )
  return `${head}\n${table(COLUMNS, rows)}`
}
