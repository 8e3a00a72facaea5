/** `warmfork prune`: removes generations that nobody needs. What is needed the store decides. */
import type { Command } from 'commander'
import { WarmforkError } from '../errors.js'
import { type Pruned, type PruneOptions, Store } from '../generations/store.js'
import { subcommand } from './command.js'
import { print, printJson } from './output.js'
import { parseCount, parseDuration, parseNumber } from './quantities.js'
import { addressedStore, addStoreOptions, type StoreAddressed } from './store-address.js'

interface PruneFlags extends StoreAddressed {
  readonly keep?: number
  readonly olderThan?: number
  readonly dryRun?: boolean
}

export function pruneCommand(): Command {
  const command = subcommand('prune', 'remove generations that no process needs', [
    ['warmfork prune --keep 3', 'all but the newest three'],
    ['warmfork prune --keep 1 --older-than 7d', 'those older than a week, never the newest'],
    ['warmfork prune 4 5 --dry-run', 'what would become of these two'],
  ])
    .argument('[number...]', 'exactly these generations', (text: string, before: number[] = []) => [
      ...before,
      parseNumber(text),
    ])
    .option('--keep <n>', 'the newest n stay', parseCount)
    .option('--older-than <time>', 'only those that are older', parseDuration)
    .option('--dry-run', 'remove nothing, say what would be removed')
  return addStoreOptions(command).action(async (numbers: number[], flags: PruneFlags) => {
    const options = pruneOptions(numbers, flags)
    const { root, name } = await addressedStore(flags)
    await using store = await Store.open({ root, name, access: 'read' })
    const pruned = flags.dryRun ? await foresee(store, options) : await store.prune(options)
    const [inUse] = pruned.kept
    if (numbers.length > 0 && inUse && !flags.dryRun) {
      throw new WarmforkError('GENERATION_IN_USE', {
        tried: `remove generation ${pruned.kept.map(({ number }) => number).join(', ')}`,
        happened: inUse.reason,
      })
    }
    if (flags.json) printJson({ name, store: root, dryRun: flags.dryRun === true, ...pruned })
    else print(format(pruned, flags.dryRun === true))
  })
}

function pruneOptions(numbers: readonly number[], { keep, olderThan }: PruneFlags): PruneOptions {
  const rules = keep !== undefined || olderThan !== undefined
  if (numbers.length > 0 === rules) {
    throw new WarmforkError('BAD_OPTION', {
      tried: 'prune generations',
      happened: rules ? 'numbers and rules were given together' : 'it was not said which',
      remedy: 'Give numbers, or `--keep` and `--older-than`.',
    })
  }
  if (!rules) return { numbers }
  return {
    ...(keep === undefined ? {} : { keep }),
    ...(olderThan === undefined ? {} : { olderThanMs: olderThan }),
  }
}

/** What `store.prune` would do now, by the same rules. */
async function foresee(store: Store, { numbers, keep = 0, olderThanMs }: PruneOptions): Promise<Pruned> {
  const { generations, broken } = await store.survey()
  const found = new Map(generations.map((generation) => [generation.number, generation]))
  const isOld = (createdAt: Date) => olderThanMs === undefined || Date.now() - createdAt.getTime() > olderThanMs
  const chosen = numbers ?? [
    ...generations
      .slice(0, Math.max(0, generations.length - keep))
      .flatMap((each) => (isOld(each.createdAt) ? each.number : [])),
    ...broken.flatMap(({ number, error }) => (error.code === 'GENERATION_CORRUPT' ? number : [])),
  ]
  const pruned: Pruned = { removed: [], kept: [] }
  for (const number of [...new Set(chosen)].sort((a, b) => a - b)) {
    if (!broken.some((each) => each.number === number) && !found.has(number)) await store.get(number)
    const pids = (found.get(number)?.leases() ?? []).map(({ pid }) => pid)
    if (pids.length === 0) pruned.removed.push(number)
    else
      pruned.kept.push({
        number,
        reason: `in use by ${pids.length === 1 ? 'process' : 'processes'} ${pids.sort((a, b) => a - b).join(', ')}`,
      })
  }
  return pruned
}

function format({ removed, kept }: Pruned, dryRun: boolean): string {
  const lines = [
    ...removed.map((number) => `${dryRun ? 'would remove' : 'removed'} generation ${number}`),
    ...kept.map(({ number, reason }) => `kept generation ${number}: ${reason}`),
  ]
  return lines.length > 0 ? lines.join('\n') : 'nothing to remove'
}
