/** What a command says when it fails, and its exit status. It knows the errors, and no subcommand. */
import { constants } from 'node:os'
import { CommanderError } from 'commander'
import { WarmforkError } from '../errors.js'
import { hasColours, printError } from './output.js'

export const EXIT_FAILED = 1
export const EXIT_USAGE = 2

/** The exit status that a shell gives for a program that ended so. */
export function exitStatusOf({ code, signal }: { code: number | null; signal: NodeJS.Signals | null }): number {
  if (signal === null) return code ?? EXIT_FAILED
  // Real-time signals are named by their number.
  return 128 + (constants.signals[signal] ?? Number(/^SIG(\d+)$/.exec(signal)?.[1] ?? 0))
}

export interface FailureFormat {
  /** The subcommand, or empty. */
  readonly command: string
  readonly json: boolean
  /** With the stacks, causes too. */
  readonly debug: boolean
}

/** Says what went wrong on stderr; gives the exit status. */
export function report(error: unknown, format: FailureFormat): number {
  const known = asWarmforkError(error, format.command)
  if (format.json) printError(JSON.stringify(known?.toJSON() ?? { message: messageOf(error) }))
  else printError(known ? threeLines(known) : unexpected(error))
  if (format.debug) printError(stacks(error))
  return known?.code === 'BAD_OPTION' ? EXIT_USAGE : EXIT_FAILED
}

function asWarmforkError(error: unknown, command: string): WarmforkError | undefined {
  if (error instanceof WarmforkError) return error
  if (!(error instanceof CommanderError)) return undefined
  // "error: unknown option '--nmae'\n(Did you mean --name?)", or for a bad value "… is invalid. What to write."
  const [first = '', hint] = error.message.replace(/^error: /, '').split('\n')
  const invalid = /^(.* is invalid)\. (.+)$/.exec(first)
  return new WarmforkError('BAD_OPTION', {
    tried: 'read the command line',
    happened: invalid?.[1] ?? first.replace(/\.$/, ''),
    remedy: invalid?.[2] ?? hint?.slice(1, -1) ?? `See \`warmfork ${command === '' ? '' : `${command} `}--help\`.`,
  })
}

/** How much of a failed program's output is shown; all of it is in the JSON. */
const OUTPUT_LINES = 20

/** What was tried, what happened, what to do. And the last output of the program that failed, where there is any. */
function threeLines(error: WarmforkError): string {
  const red = hasColours(2) ? (text: string) => `\u001b[31m${text}\u001b[39m` : (text: string) => text
  const indented = (text: string) => text.trimEnd().replaceAll('\n', '\n  ')
  const lines = [
    `${red('warmfork:')} could not ${indented(error.tried)} (${error.code})`,
    `  ${indented(error.happened)}`,
    `  ${indented(error.remedy)}`,
  ]
  const output = error.output?.trimEnd()
  if (output)
    lines.push(
      ...output
        .split('\n')
        .slice(-OUTPUT_LINES)
        .map((line) => `  | ${line}`),
    )
  return lines.join('\n')
}

function unexpected(error: unknown): string {
  return [
    'warmfork: something failed that it has no words for',
    `  ${messageOf(error)}`,
    '  Run it again with `--debug` to see where.',
  ].join('\n')
}

const messageOf = (error: unknown) => (error instanceof Error ? error.message : String(error))

function stacks(error: unknown): string {
  const found: string[] = []
  for (let at: unknown = error; at !== undefined; at = at instanceof Error ? at.cause : undefined) {
    found.push(at instanceof Error ? (at.stack ?? at.message) : String(at))
  }
  return found.join('\ncaused by: ')
}
