/** How the tests of the Ruby agents speak to test/fixtures/agents-ruby/app.rb, on MRI and on JRuby. */
import { join } from 'node:path'
import type { Child } from '../src/child.js'
import type { Supervisor } from '../src/supervisor.js'

export const RUBY_APP = join(import.meta.dirname, 'fixtures/agents-ruby/app.rb')

export interface State {
  pid: number
  /** `$$`, and what /proc says. */
  dollar: number
  kernel: number
  ppid: number
  fork: boolean
  payload: unknown
  /** What a wrapper of `Process._fork` has seen: the child with the hooks that had run, the parent with the child's pid. */
  wrapped: [string, number][]
  args: string[]
  /** What the busy threads had counted when the hook ran. */
  seen: number | null
  connected: boolean
}
/** By source. */
export type Drawn = Record<string, unknown>

let sequence = 0

/** Has the program do something. Rejects with what it raised. */
export function tell<T = unknown>(child: Child, command: string, more: object = {}): Promise<T> {
  const id = ++sequence
  return new Promise((resolve, reject) => {
    const onMessage = (data: unknown) => {
      const answer = data as { id?: number; result: T; error?: object }
      if (answer.id !== id) return
      child.off('message', onMessage)
      if (answer.error) reject(answer.error)
      else resolve(answer.result)
    }
    child.on('message', onMessage)
    child.exit.then(() => reject(new Error(`the program ended before it has answered to ${command}`)))
    child.send({ id, command, ...more })
  })
}

/** What forks from now on say by themselves: the state that they find in their blocks, `atExit` and `ensure`. */
export function inForks(supervisor: Supervisor): (string | { payload: unknown; state: State; draw: Drawn })[] {
  const said: (string | { payload: unknown; state: State; draw: Drawn })[] = []
  supervisor.on('child', (child) => child.on('message', (data) => said.push(data as never)))
  return said
}

/** The sources of which two forks have drawn the same. */
export function differs(drawn: readonly Drawn[]): string[] {
  return Object.keys(drawn[0]!).filter((source) => new Set(drawn.map((each) => each[source])).size < drawn.length)
}
