/** `warmfork stop`: ends a running supervisor, and waits for it. */
import { setTimeout as sleep } from 'node:timers/promises'
import type { Command } from 'commander'
import { connectToSupervisor } from '../control/client.js'
import { defaultRuntimeDirectory } from '../control/runtime-directory.js'
import { WarmforkError } from '../errors.js'
import { isAlive, stat } from '../linux/proc.js'
import { type Addressed, JSON_OPTION, NAME_OPTION, RUNTIME_OPTION, subcommand } from './command.js'
import { print, printJson } from './output.js'
import { formatDuration, parseDuration } from './quantities.js'

interface StopFlags extends Addressed {
  readonly grace?: number
  readonly timeout: number
}

export function stopCommand(): Command {
  return subcommand('stop', 'end a running supervisor, its children and its template', [
    ['warmfork stop', 'SIGTERM, then SIGKILL after the stop time-out of `run`'],
    ['warmfork stop --name shop --grace 0', 'at once'],
  ])
    .option(...NAME_OPTION)
    .option('--grace <time>', 'how long children have from SIGTERM to SIGKILL', parseDuration)
    .option('--timeout <time>', 'give up waiting after that', parseDuration, 60_000)
    .option(...RUNTIME_OPTION)
    .option(...JSON_OPTION)
    .action(async (options: StopFlags) => {
      const { name, pid } = await stop(options)
      if (options.json) printJson({ name, pid, stopped: true })
      else print(`stopped ${name} (pid ${pid})`)
    })
}

const LOOK_AGAIN_MS = 10

async function stop({ name, runtimeDirectory = defaultRuntimeDirectory(), grace, timeout }: StopFlags) {
  const client = await connectToSupervisor(runtimeDirectory, name)
  const { hello } = client
  const startTicks = stat(hello.pid)?.startTicks
  const late = new AbortController()
  try {
    await Promise.race([
      (async () => {
        await client.request('stop', grace === undefined ? {} : { graceMs: grace })
        await client.closed
        // The socket is closed a moment before the process has ended; who waits for us may start another at once.
        while (startTicks !== undefined && isAlive(hello.pid, startTicks)) await sleep(LOOK_AGAIN_MS)
      })(),
      sleep(timeout, undefined, { signal: late.signal }).then(() => {
        throw new WarmforkError('TIMEOUT', {
          tried: `stop the supervisor ${hello.name}`,
          happened: `it (pid ${hello.pid}) still runs after ${formatDuration(timeout)}`,
          remedy: 'Give children less time with `--grace`, or wait longer with `--timeout`.',
        })
      }),
    ])
    return hello
  } finally {
    late.abort()
    client.close()
  }
}
