/** The table of docs/limits.md: what was found for each runtime, as Markdown between two markers. */
import { readFileSync, writeFileSync } from 'node:fs'

export interface Row {
  runtime: string
  version: string
  /** `works`, or what went wrong, in a few words. */
  result: string
  memory: string
  /** From the spawn to `ready`. */
  coldMs?: number
  /** Median, from the call of `fork()` with an empty pool until the child's first answer. */
  forkMs?: number
  /** Median, after the first answer. */
  privateMiB?: number
  /** Of the template at its checkpoint. */
  templateMiB?: number
}

const START = '<!-- matrix:start -->'
const END = '<!-- matrix:end -->'

const cell = (text: string) => text.replaceAll('|', '\\|').replaceAll(/\s+/g, ' ')
const number = (value: number | undefined, digits: number) => (value === undefined ? '' : value.toFixed(digits))

export function markdown(rows: readonly Row[]): string {
  const head = '| runtime | version | result | memory | template MiB | cold ms | fork ms | own MiB of a child |'
  const line = '|---|---|---|---|---:|---:|---:|---:|'
  const body = rows.map(
    (row) =>
      `| ${cell(row.runtime)} | ${cell(row.version)} | ${cell(row.result)} | ${cell(row.memory)} | ${number(row.templateMiB, 0)} | ` +
      `${number(row.coldMs, 0)} | ${number(row.forkMs, 0)} | ${number(row.privateMiB, 1)} |`,
  )
  return [head, line, ...body].join('\n')
}

/** Puts the table between the markers. Throws where they are missing. */
export function writeTable(path: string, rows: readonly Row[]): void {
  const text = readFileSync(path, 'utf8')
  const start = text.indexOf(START)
  const end = text.indexOf(END)
  if (start < 0 || end < start) throw new Error(`${path} lacks the lines ${START} and ${END}`)
  writeFileSync(path, `${text.slice(0, start + START.length)}\n${markdown(rows)}\n${text.slice(end)}`)
}
