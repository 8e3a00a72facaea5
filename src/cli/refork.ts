/** `warmfork refork`: has a running supervisor make a generation of a warmed child. */
import type { Command } from 'commander'
import { connectToSupervisor } from '../control/client.js'
import { defaultRuntimeDirectory } from '../control/runtime-directory.js'
import { Store } from '../generations/store.js'
import { type Addressed, JSON_OPTION, NAME_OPTION, RUNTIME_OPTION, subcommand } from './command.js'
import { print, printJson } from './output.js'
import { ownBytes } from './own-size.js'
import { formatDuration, formatMiB, parseNumber } from './quantities.js'

interface ReforkFlags extends Addressed {
  readonly from?: number
  readonly reason?: string
}

export function reforkCommand(): Command {
  return subcommand('refork', 'checkpoint a warmed child into the next generation, and go over to it', [
    ['warmfork refork', 'of the child with the most requests'],
    ["warmfork refork --name shop --from 4711 --reason 'its cache is full'", 'of this one'],
  ])
    .option(...NAME_OPTION)
    .option('--from <pid>', 'the child to be taken', parseNumber)
    .option('--reason <text>', 'why, for `warmfork generations`')
    .option(...RUNTIME_OPTION)
    .option(...JSON_OPTION)
    .action(async ({ name, runtimeDirectory = defaultRuntimeDirectory(), from, reason, json }: ReforkFlags) => {
      const client = await connectToSupervisor(runtimeDirectory, name)
      try {
        const made = await client.request('refork', {
          ...(from === undefined ? {} : { from }),
          ...(reason === undefined ? {} : { reason }),
        })
        const { generation, inUse, pid, standstillMs } = made
        const supervisor = client.hello
        await using store = await Store.open({ root: supervisor.store, name: supervisor.name, access: 'read' })
        const writtenBytes = ownBytes(await store.get(generation.number))
        if (json) {
          printJson({ name: supervisor.name, ...made, writtenBytes })
          return
        }
        print(
          `generation ${generation.number} of ${supervisor.name} was taken of child ${pid}, which stood still for ` +
            `${formatDuration(standstillMs)}, and is ${inUse ? 'in use' : 'kept: another is pinned'} ` +
            `(${formatMiB(writtenBytes)} MiB written)`,
        )
      } finally {
        client.close()
      }
    })
}
