#!/usr/bin/env node
/**
 * The command line: finds the subcommand, and says what went wrong. Each subcommand is a file of its own, and only the one
 * that is asked for is loaded, since `warmfork fork` has to be quick.
 */
import { readFileSync } from 'node:fs'
import { Command, CommanderError } from 'commander'
import { EXIT_USAGE, report } from './failure.js'
import { print, printError } from './output.js'

/** In the order of the help. */
const SUBCOMMANDS: Readonly<Record<string, (program: Command) => Promise<Command>>> = {
  run: async () => (await import('./run.js')).runCommand(),
  fork: async () => (await import('./fork.js')).forkCommand(),
  ps: async () => (await import('./ps.js')).psCommand(),
  generations: async () => (await import('./generations.js')).generationsCommand(),
  inspect: async () => (await import('./inspect.js')).inspectCommand(),
  refork: async () => (await import('./refork.js')).reforkCommand(),
  rollback: async () => (await import('./rollback.js')).rollbackCommand(),
  pin: async () => (await import('./pin.js')).pinCommand(),
  unpin: async () => (await import('./unpin.js')).unpinCommand(),
  prune: async () => (await import('./prune.js')).pruneCommand(),
  flatten: async () => (await import('./flatten.js')).flattenCommand(),
  export: async () => (await import('./export.js')).exportCommand(),
  import: async () => (await import('./import.js')).importCommand(),
  stop: async () => (await import('./stop.js')).stopCommand(),
  doctor: async () => (await import('./doctor.js')).doctorCommand(),
  demo: async () => (await import('./demo.js')).demoCommand(),
  completion: async (program) =>
    (await import('./completion.js')).completionCommand(async () => {
      await load(program, Object.keys(SUBCOMMANDS))
      return program
    }),
}

function createProgram(): Command {
  const { version } = JSON.parse(readFileSync(new URL('../../package.json', import.meta.url), 'utf8')) as {
    version: string
  }
  return new Command('warmfork')
    .description('Boots a program once, and forks it from then on by restoring.')
    .version(version, '-V, --version', 'print the version')
    .helpOption('-h, --help', 'print this help')
    .helpCommand(false)
    .enablePositionalOptions()
    .exitOverride()
    .addHelpText(
      'after',
      `
Examples:
  warmfork run --ready-output listening -- node app.js  # boot, checkpoint, keep a child parked
  warmfork fork                                         # a warm copy of it on this terminal
  warmfork doctor                                       # whether forks work on this machine

Exit status: 0; 1 failed; 2 wrong usage; \`fork\`: that of the child, 128+n for a signal.`,
    )
}

async function load(program: Command, names: readonly string[]): Promise<void> {
  for (const name of names) {
    if (program.commands.some((command) => command.name() === name)) continue
    const command = await SUBCOMMANDS[name]!(program)
    command.copyInheritedSettings(program).option('--debug', 'print the stack of an error too')
    program.addCommand(command)
  }
  // Loaded in any order, shown in that of the table.
  const order = Object.keys(SUBCOMMANDS)
  ;(program.commands as Command[]).sort((a, b) => order.indexOf(a.name()) - order.indexOf(b.name()))
}

async function main(argv: readonly string[]): Promise<void> {
  const program = createProgram()
  const first = argv[0] ?? ''
  const known = Object.hasOwn(SUBCOMMANDS, first)
  // commander writes a usage error by itself; ours has the same form as all other errors.
  let written = ''
  program.configureOutput({
    writeOut: (text) => print(text.trimEnd()),
    writeErr: (text) => {
      written += text
    },
  })
  const end = argv.indexOf('--')
  const flags = end < 0 ? argv : argv.slice(0, end)
  try {
    await load(program, known ? [first] : ['-V', '--version'].includes(first) ? [] : Object.keys(SUBCOMMANDS))
    await program.parseAsync(argv, { from: 'user' })
  } catch (error) {
    if (error instanceof CommanderError && error.exitCode === 0) return
    if (error instanceof CommanderError && error.code === 'commander.help') {
      printError(written.trimEnd())
      process.exitCode = EXIT_USAGE
      return
    }
    const format = { command: known ? first : '', json: flags.includes('--json'), debug: flags.includes('--debug') }
    process.exitCode = report(error, format)
  }
}

await main(process.argv.slice(2))
