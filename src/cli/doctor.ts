/** `warmfork doctor`: prints what the doctor found, and installs what is missing if asked to. It finds out nothing itself. */
import { Command } from 'commander'
import { Listr } from 'listr2'
import pc from 'picocolors'
import type { CheckResult, DoctorReport } from '../doctor/doctor.js'

export interface DoctorFlags {
  install?: boolean
  json?: boolean
  store?: string
  deep?: boolean
}

export function doctorCommand(): Command {
  return new Command('doctor')
    .description('say whether forks work on this machine, what each lack costs and how to mend it')
    .option('--install', 'install what is missing first: a criu that suits this kernel, in a directory of its own')
    .option('--json', 'print the report as JSON')
    .option('--store <dir>', 'look at this store')
    .option('--deep', 'also measure what takes seconds: hardware breakpoints with 100 threads')
    .action(async (flags: DoctorFlags) => {
      const report = await runDoctor(flags)
      if (!report.forksWork) process.exitCode = 1
    })
}

/** Runs the doctor and prints to stdout; progress of an installation goes to stderr. */
export async function runDoctor(flags: DoctorFlags): Promise<DoctorReport> {
  // Loaded here, so that the other subcommands start without it.
  const { doctor } = await import('../doctor/doctor.js')
  const options = {
    ...(flags.store === undefined ? {} : { store: flags.store }),
    deep: flags.deep ?? false,
  }
  const print = (result: CheckResult) => process.stdout.write(`${formatResult(result)}\n`)
  const report = flags.install
    ? await withProgress((onProgress) => doctor({ ...options, install: true, onProgress }))
    : await doctor({ ...options, ...(flags.json ? {} : { onResult: print }) })
  if (flags.json) {
    process.stdout.write(`${JSON.stringify(report, null, 2)}\n`)
    return report
  }
  if (flags.install) for (const result of report.checks) print(result)
  process.stdout.write(`${formatVerdict(report)}\n`)
  return report
}

type Colors = Pick<ReturnType<typeof pc.createColors>, 'green' | 'yellow' | 'red' | 'bold' | 'dim'>

/** Colours only for a terminal, and not where NO_COLOR is set. */
const stdoutColors = (): Colors => pc.createColors(process.stdout.isTTY === true && !process.env.NO_COLOR)

const NAME_WIDTH = 13

/** One line: mark, name, what was found, what it costs, how to mend it. */
export function formatResult(result: CheckResult, colors: Colors = stdoutColors()): string {
  const mark = { ok: colors.green('✔'), warn: colors.yellow('⚠'), fail: colors.red('✖') }[result.status]
  const cost = result.cost ? colors.dim(` – ${result.cost}`) : ''
  // What is well needs no advice, though the report has it.
  const remedy = result.remedy && result.status !== 'ok' ? ` → ${result.remedy}` : ''
  return `${mark} ${colors.bold(result.name.padEnd(NAME_WIDTH))} ${result.found}${cost}${remedy}`.replaceAll('\n', ' ')
}

export function formatVerdict(report: DoctorReport, colors: Colors = stdoutColors()): string {
  const failed = report.checks.filter(({ status }) => status === 'fail').map(({ name }) => name)
  if (report.forksWork) return colors.green('Forks work here.')
  return colors.red(`Forks cannot work here (${failed.join(', ')}); the engine \`spawn\` starts programs cold instead.`)
}

/** Shows the steps of an installation on stderr: a spinner on a terminal, plain lines else. */
async function withProgress<T>(work: (onProgress: (line: string) => void) => Promise<T>): Promise<T> {
  if (process.stderr.isTTY !== true) return work((line) => process.stderr.write(`${line}\n`))
  let result: T | undefined
  const list = new Listr(
    [
      {
        title: 'Set up and check',
        rendererOptions: { outputBar: 1 },
        task: async (_, task) => {
          result = await work((line) => {
            task.output = line
          })
        },
      },
    ],
    { rendererOptions: { clearOutput: true } },
  )
  await list.run()
  return result as T
}
