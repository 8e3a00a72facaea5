import { readdirSync } from 'node:fs'
import { describe, expect, test } from 'vitest'
import type { Child } from '../src/child.js'
import type { SupervisorOptions } from '../src/options.js'
import { ENGINES, eventually, usePlace } from './engines-under-test.js'

/** What a program shows, with a look whether something came. */
class Screen {
  text = ''

  constructor(readonly child: Child) {
    child.terminal.on('data', (chunk) => {
      this.text += chunk
    })
  }

  type(keys: string): void {
    this.child.terminal.write(keys)
  }

  /** Types, and gives what is shown from then on until it matches. */
  async until(pattern: RegExp, keys = ''): Promise<string> {
    const from = this.text.length
    this.type(keys)
    await eventually(() => pattern.test(this.text.slice(from)), `${pattern} is shown after ${JSON.stringify(keys)}`)
    return this.text.slice(from)
  }
}

const CTRL_C = '\x03'
const CTRL_D = '\x04'
const UP = '\x1b[A'
const BACKSPACE = '\x7f'

describe.skipIf(!ENGINES.includes('criu'))('a terminal of its own', () => {
  const place = usePlace('criu')
  const start = (options: Partial<SupervisorOptions>) =>
    place.current.start({ template: { tty: { columns: 90, rows: 30 } }, ...options })

  test.each([
    ['Node', [process.execPath, '-i'], '>', 'process.stdout.columns', 'while (true);', /Interrupted|SIGINT|> $/],
    [
      'Python',
      ['python3', '-q'],
      '>>>',
      'import shutil; shutil.get_terminal_size().columns',
      'while True: pass\r',
      /KeyboardInterrupt/,
    ],
  ] as [string, [string, ...string[]], string, string, string, RegExp][])(
    'is what each fork of the REPL of %s has',
    async (_, command, prompt, columns, loop, interrupted) => {
      const supervisor = await start({ command, ready: { output: prompt } })
      const [one, other] = [new Screen(await supervisor.fork()), new Screen(await supervisor.fork())]
      // Each evaluates its own lines.
      await one.until(/\b42\b/, '6 * 7\r')
      await other.until(/\b56\b/, '7 * 8\r')
      expect(one.text).not.toContain('56')
      expect(other.text).not.toContain('42')
      // Editing, and the history.
      await one.until(/\b121\b/, `11 * 12${BACKSPACE}1\r`)
      await one.until(/\b121\b/, `${UP}\r`)
      // The size, from the start and after a change.
      await one.until(/\b90\b/, `${columns}\r`)
      one.child.terminal.resize(77, 20)
      // The signal that tells of it comes beside what is typed.
      await new Promise((resolve) => setTimeout(resolve, 200))
      await one.until(/\b77\b/, `${columns}\r`)
      // An endless loop is interrupted, and the REPL goes on.
      one.type(`${loop}\r`)
      await new Promise((resolve) => setTimeout(resolve, 300))
      await one.until(interrupted, CTRL_C)
      await one.until(/\b1764\b/, '\r42 * 42\r')
      one.type(CTRL_D)
      expect(await one.child.exit).toEqual({ code: 0, signal: null })
      await other.until(/\b63\b/, '7 * 9\r')
    },
  )

  test('has the size that is asked for, and gives everything back', async () => {
    const supervisor = await start({ command: ['sh', '-c', 'echo ready; while read line; do stty size; done'] })
    const before = readdirSync('/proc/self/fd').length
    for (let i = 0; i < 30; i++) {
      const child = await supervisor.fork({ tty: { columns: 40 + i, rows: 10 } })
      const screen = new Screen(child)
      await screen.until(new RegExp(`10 ${40 + i}\\b`), '\r')
      await child.end({ graceMs: 0 })
      child.close()
    }
    await eventually(() => readdirSync('/proc/self/fd').length <= before + 4, 'all descriptors are given back')
  })

  test('has job control in a namespace of its own', async () => {
    const supervisor = await start({
      command: ['bash', '--norc', '--noprofile', '-i'],
      env: { PS1: 'prompt> ' },
      identity: 'namespace',
      ready: { output: 'prompt>' },
    })
    const screen = new Screen(await supervisor.fork())
    screen.type('sleep 100\r')
    await new Promise((resolve) => setTimeout(resolve, 300))
    await screen.until(/prompt> /, CTRL_C)
    screen.type('sleep 101\r')
    await new Promise((resolve) => setTimeout(resolve, 300))
    await screen.until(/Stopped/, '\x1a')
    await screen.until(/sleep 101/, 'jobs\r')
    await screen.until(/still here/, 'kill %1; echo still "here"\r')
  })

  test('is hung up by close', async () => {
    const supervisor = await start({ command: ['sh', '-c', 'echo ready; cat'] })
    const child = await supervisor.fork()
    child.terminal.close()
    expect((await child.exit).signal).toBe('SIGHUP')
  })

  test('has no pipes beside it', async () => {
    const supervisor = await start({ command: ['sh', '-c', 'echo ready; cat'] })
    const child = await supervisor.fork()
    expect(child.isTTY).toBe(true)
    expect(() => child.stdout).toThrow(/BAD_OPTION.*terminal/s)
    await expect(supervisor.fork({ stdio: 'inherit' })).rejects.toMatchObject({ code: 'BAD_OPTION' })
  })

  test('is not shared with a fork that its program asks for', async () => {
    const app = `import('${new URL('../dist/agents/node/worker.js', import.meta.url)}').then(({ worker }) => {
      worker.on('message', () => worker.fork().catch(({ code }) => worker.send(code)))
      worker.ready()
    }); setInterval(() => {}, 1000)`
    const supervisor = await start({ command: [process.execPath, '-e', app], ready: { agent: true } })
    const child = await supervisor.fork()
    await child.ready
    const answer = new Promise((resolve) => child.once('message', resolve))
    child.send('fork')
    expect(await answer).toBe('ENGINE_UNSUPPORTED')
  })
})
