/** `warmfork ps`: what runs. */
import type { Command } from 'commander'
import { type ControlClient, connectToSupervisor, runningSupervisors } from '../control/client.js'
import type { ChildStatus, LastReforkStatus, Status } from '../control/protocol.js'
import { defaultRuntimeDirectory } from '../control/runtime-directory.js'
import { type Addressed, JSON_OPTION, RUNTIME_OPTION, subcommand } from './command.js'
import { print, printJson } from './output.js'
import { formatDuration, formatMiB } from './quantities.js'
import { type Column, colours, table, visible } from './table.js'

export function psCommand(): Command {
  return subcommand('ps', 'list the running supervisors with their template and children', [
    ['warmfork ps', 'all supervisors'],
    ["warmfork ps --json | jq '.supervisors[].children[].pid'", 'the pids of all children'],
  ])
    .option('-n, --name <name>', 'this supervisor only')
    .option(...RUNTIME_OPTION)
    .option(...JSON_OPTION)
    .action(async (options: Addressed) => {
      const supervisors = await statuses(options)
      if (options.json) printJson({ supervisors })
      else print(supervisors.map(formatStatus).join('\n\n'))
    })
}

async function statuses({ name, runtimeDirectory = defaultRuntimeDirectory() }: Addressed): Promise<Status[]> {
  let clients: ControlClient[] = []
  try {
    if (name === undefined) clients = await runningSupervisors(runtimeDirectory)
    // With none, this says so.
    if (clients.length === 0) clients = [await connectToSupervisor(runtimeDirectory, name)]
    return await Promise.all(clients.map((client) => client.request('status', {})))
  } finally {
    for (const client of clients) client.close()
  }
}

const COLUMNS: readonly Column[] = [
  { title: 'PID', align: 'right' },
  { title: 'STATE' },
  { title: 'GEN', align: 'right' },
  { title: 'REQUESTS', align: 'right' },
  { title: 'AGE', align: 'right' },
  { title: 'PRIVATE MiB', align: 'right' },
  { title: 'SHARED MiB', align: 'right' },
  { title: 'PSS MiB', align: 'right' },
  { title: 'CPU %', align: 'right' },
  { title: 'CPU s', align: 'right' },
]

export function formatStatus(status: Status): string {
  const { template, pool, forks } = status
  const parked = status.children.filter(({ state }) => state === 'parked').length
  const running = status.children.length - parked
  const starting = pool.starting > 0 ? `, ${pool.starting} being made` : ''
  const failed = forks.failed > 0 ? `, ${forks.failed} failed` : ''
  const head = [
    `${colours.bold(status.name)}  pid ${status.pid}, ${status.state} for ${formatDuration(status.uptimeMs)}, engine ${status.engine}`,
    `  ${status.command.map(visible).join(' ')}`,
    `  generation ${status.generation}; ${parked} of ${pool.size} parked${starting}, ${running} running; ` +
      `${forks.fromPool + forks.direct} forks${failed}`,
    ...reforkLines(status),
  ]
  const rows: string[][] = []
  if (template?.running) {
    const { memory } = template
    const sizes = memory ? [memory.privateBytes, memory.sharedBytes, memory.pssBytes].map(formatMiB) : ['', '', '']
    rows.push([String(template.pid), 'template', '', '', '', ...sizes, '', ''])
  }
  for (const child of status.children) {
    rows.push([
      String(child.pid),
      stateOf(child),
      String(child.generation),
      child.isCounted ? String(child.requests) : '-',
      formatDuration(child.elapsedMs),
      ...[child.privateBytes, child.sharedBytes, child.pssBytes].map(formatMiB),
      child.cpuPercent.toFixed(0),
      child.cpuSeconds.toFixed(2),
    ])
  }
  return [...head, ...(rows.length > 0 ? [table(COLUMNS, rows)] : [])].join('\n')
}

function stateOf({ state, role, outdated }: ChildStatus): string {
  const what = role === 'worker' ? role : state
  return outdated ? `${what}, outdated` : what
}

function reforkLines({ workers, pinned, lastRefork, reforkDecision }: Status): string[] {
  const phrases = [
    ...(workers.size > 0 ? [`${workers.pids.length} of ${workers.size} workers`] : []),
    ...(workers.outdated > 0 ? [`${workers.outdated} of them outdated`] : []),
    ...(pinned === null ? [] : [`generation ${pinned} is pinned`]),
    ...(lastRefork ? [reforkWords(lastRefork)] : []),
    ...(reforkDecision && reforkDecision.from === undefined ? [`no refork now: ${reforkDecision.why}`] : []),
  ]
  return phrases.length > 0 ? [`  ${phrases.join('; ')}`] : []
}

/** When, of which child, and why; or why it failed. */
function reforkWords({ at, reason, pid, generation, error }: LastReforkStatus): string {
  const ago = formatDuration(Math.max(0, Date.now() - Date.parse(at)))
  const of = pid === null ? '' : ` of child ${pid}`
  if (error !== null) return visible(`a refork${of} failed ${ago} ago (${reason}): ${error}`)
  return visible(`last refork ${ago} ago (generation ${generation}${of}: ${reason})`)
}
