/** Which store a command means: that of a running supervisor, or of one that ran. It reads no generation. */
import type { Command } from 'commander'
import { connectToSupervisor, runningSupervisors } from '../control/client.js'
import type { Hello, Status } from '../control/protocol.js'
import { defaultRuntimeDirectory } from '../control/runtime-directory.js'
import { WarmforkError } from '../errors.js'
import { defaultRoot } from '../generations/directories.js'
import { Store } from '../generations/store.js'
import { type Addressed, JSON_OPTION, RUNTIME_OPTION, STORE_OPTION } from './command.js'

export interface StoreAddressed extends Addressed {
  readonly store?: string
}

/** The flags that say which store is meant. */
export function addStoreOptions(command: Command): Command {
  return command
    .option(
      '-n, --name <name>',
      'whose generations; by default the only supervisor that runs, or the only one there was',
    )
    .option(...STORE_OPTION)
    .option(...RUNTIME_OPTION)
    .option(...JSON_OPTION)
}

export interface StoreAddress {
  readonly root: string
  readonly name: string
  /** Of the supervisor of that name, where it runs. */
  readonly running: Status | undefined
}

/**
 * @throws NO_SUPERVISOR where several run and none is named, GENERATION_NOT_FOUND where there is nothing at all, BAD_OPTION where there
 * are the generations of several
 */
export async function addressedStore(flags: StoreAddressed): Promise<StoreAddress> {
  const { name, store, runtimeDirectory = defaultRuntimeDirectory() } = flags
  const supervisor = await runningOne(runtimeDirectory, name)
  if (supervisor && (store === undefined || store === supervisor.hello.store)) {
    return { root: supervisor.hello.store, name: supervisor.hello.name, running: supervisor.status }
  }
  const root = store ?? defaultRoot()
  if (name !== undefined) return { root, name, running: undefined }
  const names = await Store.names(root)
  if (names.length === 1) return { root, name: names[0]!, running: undefined }
  const tried = 'choose the generations of one supervisor'
  if (names.length === 0) {
    throw new WarmforkError('GENERATION_NOT_FOUND', {
      tried,
      happened: `no supervisor runs, and the store ${root} holds none`,
      remedy: 'Start one with `warmfork run`, or name the right place with `--store`.',
    })
  }
  const happened = `the store ${root} holds those of ${names.join(', ')}`
  throw new WarmforkError('BAD_OPTION', { tried, happened, remedy: 'Name one with `--name`.' })
}

async function runningOne(
  runtimeDirectory: string,
  name: string | undefined,
): Promise<{ hello: Hello; status: Status } | undefined> {
  const clients = await runningSupervisors(runtimeDirectory)
  try {
    const found = name === undefined ? clients : clients.filter(({ hello }) => hello.name === name)
    // Says which there are.
    if (found.length > 1) (await connectToSupervisor(runtimeDirectory)).close()
    const client = found[0]
    return client && { hello: client.hello, status: await client.request('status', {}) }
  } finally {
    for (const client of clients) client.close()
  }
}
