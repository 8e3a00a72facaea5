/**
 * `warmfork fork`: a child on this terminal. Only what it needs is loaded, and this process writes nothing as long as the
 * child runs: the standard streams are the child's.
 */
import type { Command } from 'commander'
import { connectToSupervisor } from '../control/client.js'
import { PASSED_SIGNALS } from '../control/protocol.js'
import { defaultRuntimeDirectory } from '../control/runtime-directory.js'
import { type Addressed, JSON_OPTION, NAME_OPTION, RUNTIME_OPTION, subcommand } from './command.js'
import { exitStatusOf } from './failure.js'

export function forkCommand(): Command {
  return subcommand('fork', "fork a child on this terminal's stdin, stdout and stderr; its exit status is ours", [
    ['warmfork fork', 'the only supervisor that runs'],
    ['echo hello | warmfork fork --name shop', 'its stdin is that of this command'],
  ])
    .option(...NAME_OPTION)
    .option(...RUNTIME_OPTION)
    .option(JSON_OPTION[0], "print errors as JSON on stderr; stdout is the child's")
    .action(async (options: Addressed) => {
      const status = await fork(options)
      // Nothing is left to wait for, and the exit handlers of this process cost milliseconds.
      process.exit(status)
    })
}

async function fork({ name, runtimeDirectory = defaultRuntimeDirectory() }: Addressed): Promise<number> {
  const client = await connectToSupervisor(runtimeDirectory, name)
  const request = client.nextId
  // The child leads a session of its own, so that what the terminal sends arrives here only.
  for (const signal of PASSED_SIGNALS) {
    process.on(signal, () => {
      client.request('signal', { request, signal }).catch(() => {})
    })
  }
  try {
    return exitStatusOf(await client.request('fork', {}))
  } finally {
    client.close()
  }
}
