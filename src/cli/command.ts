/** What subcommands have in common: options by the same name, examples in the same place. Light: it loads commander only. */
import { Command } from 'commander'

/** A subcommand with `--json` and examples below its help, each with what it does. */
export function subcommand(
  name: string,
  summary: string,
  examples: readonly (readonly [line: string, does: string])[],
): Command {
  const lines = examples.map(([line, does]) => `  # ${does}\n  ${line}`)
  return new Command(name)
    .summary(summary)
    .description(`${summary[0]!.toUpperCase()}${summary.slice(1)}.`)
    .addHelpText('after', `\nExamples:\n${lines.join('\n')}`)
}

export const JSON_OPTION = ['--json', 'print one JSON document, and errors as JSON on stderr'] as const
export const NAME_OPTION = ['-n, --name <name>', 'the supervisor; by default the only one that runs'] as const
export const STORE_OPTION = ['--store <directory>', 'the directory of the generations'] as const
export const RUNTIME_OPTION = ['--runtime-directory <directory>', 'the directory of the control sockets'] as const

/** What the shared options give. */
export interface Addressed {
  readonly json?: boolean
  readonly name?: string
  readonly runtimeDirectory?: string
}
