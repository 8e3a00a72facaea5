/** What is asked of a REPL in forks of it, each on its own terminal. It knows no engine. */
import { setTimeout as sleep } from 'node:timers/promises'
import { expect } from 'vitest'
import { stat } from '../src/linux/proc.js'
import type { Supervisor } from '../src/supervisor.js'
import { eventually } from './engines-under-test.js'
import { BACKSPACE, CTRL_C, CTRL_D, CTRL_Z, Screen, UP } from './screen.js'

/** A REPL, and how things are said there. */
export interface Repl {
  readonly command: readonly [string, ...string[]]
  readonly prompt: RegExp
  /** How many columns the terminal has. */
  readonly columns: string
  readonly loop: string
  /** What is shown where a loop is interrupted. */
  readonly interrupted: RegExp
  /** The variable of the environment WHO. */
  readonly who: string
}

/** Of the CPU time by which a loop is known. */
const LOOP_TICKS = 20

/** Two forks of a REPL whose terminal has 90 columns do all that one does at a REPL, and neither sees anything of the other. */
export async function converse(supervisor: Supervisor, repl: Repl): Promise<void> {
  const one = await supervisor.fork({ env: { WHO: 'the first' } })
  const other = await supervisor.fork({ tty: { columns: 50, rows: 20 }, env: { WHO: 'the second' } })
  const [left, right] = [new Screen(one.terminal, repl.prompt), new Screen(other.terminal, repl.prompt)]
  const is = (value: string | number) => new RegExp(`^(=> )?['"]?${value}['"]?\r$`)
  await Promise.all([left.line('6 * 7', is(42)), right.line('7 * 8', is(56))])
  await Promise.all([left.line(repl.who, is('the first')), right.line(repl.who, is('the second'))])
  // The line is edited, and the history knows it.
  await left.line(`11 * 12${BACKSPACE}1`, is(121))
  await left.line(`${UP}0`, is(1210))

  await Promise.all([left.line(repl.columns, is(90)), right.line(repl.columns, is(50))])
  one.terminal.resize(77, 20)
  // SIGWINCH comes beside what is typed.
  await sleep(100)
  await left.line(repl.columns, is(77))

  left.terminal.write(`${repl.loop}\r`)
  const cpu = stat(one.pid)!.cpuTicks
  await eventually(() => stat(one.pid)!.cpuTicks > cpu + LOOP_TICKS, 'it loops')
  // It leads its session: nobody could continue it.
  await left.type(CTRL_Z, /\^Z/)
  expect(stat(one.pid)?.state).not.toBe('T')
  await left.type(CTRL_C, repl.interrupted)
  await left.line('42 * 42', is(1764))
  left.terminal.write(CTRL_D)
  expect(await one.exit).toEqual({ code: 0, signal: null })
  await right.line('7 * 9', is(63))
  expect(left.text).not.toMatch(/\b(56|second|63)\b/)
  expect(right.text).not.toMatch(/\b(42|first|121|77|1764)\b/)
}
