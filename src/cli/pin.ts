/** `warmfork pin`: stays with a generation; of a supervisor that runs, or for the next start of one that does not. */
import type { Command } from 'commander'
import { connectToSupervisor } from '../control/client.js'
import { defaultRuntimeDirectory } from '../control/runtime-directory.js'
import { WarmforkError } from '../errors.js'
import { subcommand } from './command.js'
import { print, printJson } from './output.js'
import { parseNumber } from './quantities.js'
import { addressedStore, addStoreOptions, type StoreAddress, type StoreAddressed } from './store-address.js'
import { withVerdicts } from './verdict-store.js'

export function pinCommand(): Command {
  const command = subcommand('pin', 'fork from this generation only, until it is unpinned', [
    ['warmfork pin 3', 'no refork goes over to another'],
    ['warmfork pin 3 --name shop', 'of one that need not run: for its next start with --reuse'],
  ]).argument('<number>', 'the generation', parseNumber)
  return addStoreOptions(command).action(async (number: number, flags: StoreAddressed) => {
    const { name } = await pin(number, flags)
    if (flags.json) printJson({ name, pinned: number })
    else print(`${name} stays with generation ${number}`)
  })
}

/** `null`: none any more. */
export async function pin(number: number | null, flags: StoreAddressed): Promise<StoreAddress> {
  const address = await addressedStore(flags)
  if (!address.running) {
    await pinStopped(address, number)
    return address
  }
  const client = await connectToSupervisor(flags.runtimeDirectory ?? defaultRuntimeDirectory(), address.name)
  try {
    await client.request('pin', { generation: number })
    return address
  } finally {
    client.close()
  }
}

function pinStopped(address: StoreAddress, number: number | null): Promise<void> {
  const tried = number === null ? 'unpin the generation' : `pin generation ${number}`
  return withVerdicts(address, tried, async (store, verdicts) => {
    if (number !== null) {
      await store.get(number)
      const reason = verdicts.whyNot(number)
      if (reason !== undefined) {
        throw new WarmforkError('GENERATION_MISFIT', { tried, happened: `it was rejected: ${reason}` })
      }
    }
    await verdicts.pin(number ?? undefined)
  })
}
