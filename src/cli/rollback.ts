/** `warmfork rollback`: goes back to an earlier generation, of a supervisor that runs, or for the next start of one that does not. */
import type { Command } from 'commander'
import { connectToSupervisor } from '../control/client.js'
import { defaultRuntimeDirectory } from '../control/runtime-directory.js'
import { WarmforkError } from '../errors.js'
import { ancestors } from '../succession.js'
import { subcommand } from './command.js'
import { print, printJson } from './output.js'
import { parseNumber } from './quantities.js'
import { addressedStore, addStoreOptions, type StoreAddress, type StoreAddressed } from './store-address.js'
import { withVerdicts } from './verdict-store.js'

interface RollbackFlags extends StoreAddressed {
  readonly to?: number
  readonly reason?: string
}

export function rollbackCommand(): Command {
  const command = subcommand('rollback', 'go back to an earlier generation; the one in use is never chosen again', [
    ['warmfork rollback', 'to the one before'],
    ["warmfork rollback --name shop --to 3 --reason 'answers too slowly'", 'to this one'],
  ])
    .option('--to <number>', 'the generation to go to', parseNumber)
    .option('--reason <text>', 'why, for `warmfork generations`')
  return addStoreOptions(command).action(async (flags: RollbackFlags) => {
    const address = await addressedStore(flags)
    const { generation, from } = await (address.running ? ofRunning(address, flags) : ofStopped(address, flags))
    if (flags.json) printJson({ name: address.name, generation, from })
    else print(`${address.name} is at generation ${generation} again; generation ${from} is not chosen any more`)
  })
}

async function ofRunning({ name }: StoreAddress, { runtimeDirectory, to, reason }: RollbackFlags) {
  const client = await connectToSupervisor(runtimeDirectory ?? defaultRuntimeDirectory(), name)
  try {
    const options = { ...(to === undefined ? {} : { to }), ...(reason === undefined ? {} : { reason }) }
    return await client.request('rollback', options)
  } finally {
    client.close()
  }
}

/** Rejects the newest, and all between, so that a start with `reuse` begins with the one that is wanted. */
function ofStopped(address: StoreAddress, { to, reason = 'asked for' }: RollbackFlags) {
  const tried = to === undefined ? 'roll back' : `roll back to generation ${to}`
  return withVerdicts(address, tried, async (store, verdicts) => {
    const usable = (await store.list()).filter(
      ({ ephemeral, number }) => !ephemeral && verdicts.whyNot(number) === undefined,
    )
    const { pinned } = verdicts
    const from = usable.find(({ number }) => number === pinned) ?? usable.at(-1)
    const infos = usable.map(({ info }) => info)
    const before = new Set(from ? ancestors(from.number, infos) : [])
    const wanted = usable.findLast(({ number }) => (to === undefined ? before.has(number) : number === to))
    if (!wanted || !from || wanted.number >= from.number) {
      const happened =
        to === undefined
          ? 'there is no earlier generation that the next start would come from and that can be used'
          : 'it is not there, rejected, or not before the one that the next start begins with'
      throw new WarmforkError('GENERATION_NOT_FOUND', { tried, happened })
    }
    for (const { number } of usable) if (number > wanted.number) await verdicts.reject(number, reason)
    return { generation: wanted.number, from: from.number }
  })
}
