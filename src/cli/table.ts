/** Tables for people. It knows no subcommand. */
import Table from 'cli-table3'
import pc from 'picocolors'
import { hasColours } from './output.js'

export const colours = pc.createColors(hasColours(1))

const NO_BORDERS = Object.fromEntries(
  ['top', 'top-mid', 'top-left', 'top-right', 'bottom', 'bottom-mid', 'bottom-left', 'bottom-right', 'left', 'left-mid']
    .concat(['mid', 'mid-mid', 'right', 'right-mid'])
    .map((place) => [place, '']),
)

/** Numbers stand right-aligned: they are compared by their length. */
export interface Column {
  readonly title: string
  readonly align?: 'left' | 'right'
}

/** Columns two blanks apart, without borders, so that lines can be cut and sorted by other programs. */
export function table(columns: readonly Column[], rows: readonly (readonly string[])[]): string {
  const made = new Table({
    head: columns.map(({ title }) => colours.bold(title)),
    colAligns: columns.map(({ align }) => align ?? 'left'),
    chars: { ...NO_BORDERS, middle: '  ' },
    style: { head: [], border: [], 'padding-left': 0, 'padding-right': 0 },
  })
  for (const row of rows) made.push(row.map(visible))
  return made
    .toString()
    .split('\n')
    .map((line) => line.trimEnd())
    .join('\n')
}

/** Names come from programs: a newline or an escape sequence in one must not reach the terminal. */
export function visible(text: string): string {
  // biome-ignore lint/suspicious/noControlCharactersInRegex: these are what is looked for.
  return text.replace(/[\u0000-\u001f\u007f-\u009f]/g, (char) => JSON.stringify(char).slice(1, -1))
}

/** Lines of `name  value`, the names as wide as the widest. */
export function fields(pairs: readonly (readonly [name: string, value: string])[]): string {
  const width = Math.max(...pairs.map(([name]) => name.length))
  return pairs.map(([name, value]) => `${colours.dim(name.padEnd(width))}  ${visible(value)}`).join('\n')
}
