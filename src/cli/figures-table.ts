/** The figures as a table for somebody who sees warmfork for the first time. */
import type { Figures } from '../demo/figures.js'
import { table } from './table.js'

export function figuresTable(figures: Figures): string {
  const rows: [string, number | null, string][] = [
    ['start it anew', figures.coldMs, 'boots, loads, warms up: every time'],
    ['stock criu restore', figures.stockRestoreMs, 'copies the whole memory; one copy at a time, under its old pid'],
    ['warmfork, a fork', figures.forkMs, 'restores a mapping of the memory in place of a copy; own pid, own pipes'],
    [
      'warmfork, from the pool',
      figures.claimFirstByteMs,
      'a fork that was made ahead and stood still; one signal starts it',
    ],
    ['fork(2) of a C program', figures.fork2Ms, 'the kernel copies page tables; runtimes with threads come out broken'],
    ['fork(2), huge pages', figures.fork2ThpMs, 'the same with 2 MiB pages, which heaps of runtimes mostly lack'],
  ]
  const cells = rows.map(([what, value, why]) =>
    value === null
      ? [what, '-', '-', `${why} (not measured: the native parts were built without it)`]
      : [what, `${milliseconds(value)} ms`, `${times(value / figures.forkMs)} x`, why],
  )
  const columns = [
    { title: 'a warm copy by' },
    { title: 'first byte', align: 'right' as const },
    { title: 'of a fork', align: 'right' as const },
    { title: 'what happens' },
  ]
  const lines = [
    table(columns, cells),
    '',
    `Memory: the template has ${Math.round(figures.templateRssMiB)} MiB. With 8 children alive, each has ${figures.childPrivateMiB.toFixed(1)} MiB to itself`,
    `and shares the rest (its part of everything: ${figures.childPssMiB.toFixed(1)} MiB).`,
    `Boot, checkpoint and first fork together took ${(figures.startMs / 1000).toFixed(1)} s, once; the program stood still for ${Math.round(figures.checkpointMs)} ms of that.`,
  ]
  if (figures.forksPerSecond !== null) {
    lines.push(
      `Forks that answer and exit: ${Math.round(figures.forksPerSecond)} a second, ${figures.bestConcurrency} at once.`,
    )
  }
  return lines.join('\n')
}

function milliseconds(value: number): string {
  return value >= 100 ? Math.round(value).toLocaleString('en') : value.toFixed(1)
}

function times(ratio: number): string {
  return ratio >= 10 ? String(Math.round(ratio)) : ratio.toFixed(ratio < 1 ? 2 : 1)
}
