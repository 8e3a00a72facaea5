/** What a terminal gets: colours, a list that moves, and a child whose streams it is. Python's pty gives the terminal. */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { APP, CLI, Terminal } from './cli-harness.js'

const terminal = new Terminal()
beforeAll(async () => {
  await terminal.run('shop', ['--engine', 'spawn'])
})
afterAll(() => terminal.leave())

const quoted = (words: readonly string[]) => words.map((word) => `'${word.replaceAll("'", "'\\''")}'`).join(' ')

const ON_A_TERMINAL = 'import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))'

/** Runs the CLI on a terminal of its own; what it shows, and its exit status. */
async function onTerminal(
  args: readonly string[],
  options: { input?: string; env?: Record<string, string>; until?: RegExp } = {},
) {
  const env: NodeJS.ProcessEnv = { ...process.env, TERM: 'xterm', ...options.env }
  if (!options.env?.NO_COLOR) delete env.NO_COLOR
  // (`script` of util-linux 2.38 now and then does not notice that its child has ended.)
  const command = `stty cols 150 rows 40; exec ${quoted([...CLI, ...args])}`
  const script = spawn('python3', ['-c', ON_A_TERMINAL, '/bin/sh', '-c', command], {
    env,
    timeout: 40_000,
  })
  script.stdin.on('error', () => {})
  let shown = ''
  script.stdout.on('data', (chunk) => {
    shown += chunk
    if (options.until?.test(shown)) script.stdin.write('\u0003')
  })
  if (options.input !== undefined) script.stdin.write(options.input)
  const [code] = await once(script, 'close')
  return { shown, code }
}

test('ps has bold headings', async () => {
  const { shown, code } = await onTerminal(['ps', ...terminal.here])
  expect(shown).toContain('\u001b[1mshop\u001b[22m')
  expect(code).toBe(0)
})

test.each([{ NO_COLOR: '1' }, { TERM: 'dumb' }])('%o means no colours', async (env) => {
  const { shown } = await onTerminal(['ps', ...terminal.here], { env })
  expect(shown).toContain('shop')
  expect(shown).not.toContain('\u001b')
})

test('an error is marked in red', async () => {
  const { shown, code } = await onTerminal(['fork', '--name', 'none', ...terminal.here])
  expect(shown).toContain('\u001b[31mwarmfork:\u001b[39m could not reach the supervisor none')
  expect(code).toBe(1)
})

test('the child has the terminal, and Ctrl-C comes to it', async () => {
  const { shown, code } = await onTerminal(['fork', ...terminal.here], {
    input: 'hello\n',
    until: /hello\r\n.*hello\r\n/s,
  })
  expect(shown).toContain('hello')
  expect(code).toBe(130)
})

test('run shows a list of its steps, and Ctrl-C ends it with status 0', async () => {
  const args = ['run', '--name', 'list', '--engine', 'spawn', '--store', terminal.store, ...terminal.here]
  const { shown, code } = await onTerminal([...args, '--ready-output', 'ready', '--', ...APP], {
    until: /warmfork: ready: list/,
  })
  expect(shown).toMatch(/✔.* wait until it is ready: \d+ms/)
  expect(shown).toMatch(/✔.* checkpoint it.*, generation 1: [\d.]+ MiB, memory is copied/)
  expect(shown).toMatch(/✔.* park 1 child/)
  expect(code).toBe(0)
})

test('run marks the step that failed', async () => {
  const args = ['run', '--name', 'list', '--engine', 'spawn', '--store', terminal.store, ...terminal.here]
  const { shown, code } = await onTerminal([...args, '--ready-port', '1', '--', 'sh', '-c', 'sleep 0.3; exit 3'])
  expect(shown).toMatch(/✖.* wait until it is ready/)
  expect(shown).toContain('(TEMPLATE_EXITED)')
  expect(code).toBe(1)
})
