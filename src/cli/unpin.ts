/** `warmfork unpin`: stays with the pinned generation no more; of a supervisor that runs, or for the next start of one that does not. */
import type { Command } from 'commander'
import { subcommand } from './command.js'
import { print, printJson } from './output.js'
import { pin } from './pin.js'
import { addStoreOptions, type StoreAddressed } from './store-address.js'

export function unpinCommand(): Command {
  const command = subcommand('unpin', 'fork from the newest generation again', [['warmfork unpin', 'after a pin']])
  return addStoreOptions(command).action(async (flags: StoreAddressed) => {
    const { name } = await pin(null, flags)
    if (flags.json) printJson({ name, pinned: null })
    else print(`${name} goes with the newest generation`)
  })
}
