/**
 * What is drawn in fifty forks of one generation, with the agent and without: for each source whether all values differ, all are
 * the same, or some repeat. The expectations are the table of docs/uniqueness.md.
 */
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import type { Place } from './engines-under-test.js'
import { ask } from './engines-under-test.js'

export const FORKS = 50

/** In one generation's forks. `some` is what is found where there are few possible values, or where luck has a part. */
export type Found = 'differs' | 'same' | 'some'

/** What a program draws in forks, by source. */
export async function drawn(
  place: Place,
  command: readonly [string, ...string[]],
  agent: boolean,
): Promise<Record<string, Found>> {
  const supervisor = await place.start({ command, agent, ready: { output: /^ready$/m }, pool: { size: 2 } })
  const values = new Map<string, string[]>()
  for (let i = 0; i < FORKS; i++) {
    const child = await supervisor.fork()
    await child.ready
    for (const [source, value] of Object.entries(JSON.parse(await ask(child, 'draw')))) {
      values.set(source, [...(values.get(source) ?? []), String(value)])
    }
    await child.end({ graceMs: 0 })
    child.close()
  }
  await supervisor.stop()
  return Object.fromEntries(
    [...values].map(([source, all]) => {
      const different = new Set(all).size
      return [source, different === all.length ? 'differs' : different === 1 ? 'same' : 'some']
    }),
  )
}

/** The table of a runtime in docs/uniqueness.md: what it says with the agent (where there is one) and without. */
export function documented(heading: string): Map<string, { with: Found | undefined; without: Found }> {
  const page = readFileSync(join(import.meta.dirname, '../docs/uniqueness.md'), 'utf8')
  const [, section] = new RegExp(`^## ${heading}\\n(.*?)(?=^## |$(?![\\s\\S]))`, 'ms').exec(page) ?? []
  if (section === undefined) throw new Error(`docs/uniqueness.md has no section ${heading}`)
  const rows = [...section.matchAll(/^\| `([^`]+)` \| (.+?) \|(?: (.+?) \|)?$/gm)]
  return new Map(
    rows.map(([, source, first, second]) => [
      source!,
      { with: second === undefined ? undefined : wordsOf(first!), without: wordsOf(second ?? first!) },
    ]),
  )
}

function wordsOf(cell: string): Found {
  if (cell.startsWith('its own')) return 'differs'
  if (cell.startsWith('**the same')) return 'same'
  if (cell.startsWith('the same')) return 'same'
  if (cell.startsWith('some repeat')) return 'some'
  throw new Error(`docs/uniqueness.md has a cell that says neither: ${cell}`)
}
