/** What a terminal gets: colours, a list that moves, and a child whose streams it is. Python's pty gives the terminal. */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { closeSync, rmSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest'
import { isAlive } from '../src/linux/proc.js'
import { openMaster, openSlave, setWindowSize, terminalModes } from '../src/linux/pty.js'
import { Terminal as Pty } from '../src/terminal.js'
import { APP, CLI, Terminal } from './cli-harness.js'
import { ENGINES, eventually } from './engines-under-test.js'
import { CTRL_C, CTRL_D, Screen } from './screen.js'

const terminal = new Terminal()
beforeAll(async () => {
  await terminal.run('shop', ['--engine', 'spawn'])
})
afterAll(() => terminal.leave())

const quoted = (words: readonly string[]) => words.map((word) => `'${word.replaceAll("'", "'\\''")}'`).join(' ')

const ON_A_TERMINAL = 'import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))'

/** Runs a line of a shell on a terminal of its own; what it shows, and its exit status. */
async function shell(line: string, options: { input?: string; env?: Record<string, string>; until?: RegExp } = {}) {
  const env: NodeJS.ProcessEnv = { ...process.env, TERM: 'xterm', ...options.env }
  if (!options.env?.NO_COLOR) delete env.NO_COLOR
  // (`script` of util-linux 2.38 now and then does not notice that its child has ended.)
  const script = spawn('python3', ['-c', ON_A_TERMINAL, '/bin/sh', '-c', line], { env, timeout: 40_000 })
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

/** Runs the CLI on a terminal. */
function onTerminal(args: readonly string[], options?: Parameters<typeof shell>[1]) {
  return shell(`stty cols 150 rows 40; exec ${quoted([...CLI, ...args])}`, options)
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

describe.skipIf(!ENGINES.includes('criu'))('fork --tty', () => {
  const supervised = new Terminal()
  const made: (() => void)[] = []
  beforeAll(async () => {
    const options = { env: { NODE_REPL_HISTORY: '' } }
    await supervised.run('repl', ['--tty', '--ready-output', '> '], [process.execPath, '-i'], options)
    await supervised.run('plain')
  })
  afterEach(() => {
    for (const giveBack of made.splice(0)) giveBack()
  })
  afterAll(() => supervised.leave())

  /** The command on a terminal of 100 columns, as its controlling one. */
  function fork(args: readonly string[] = ['--tty'], name = 'repl', place = supervised) {
    const master = openMaster()
    setWindowSize(master, { columns: 100, rows: 30 })
    const slave = openSlave(master)
    const before = terminalModes(slave)
    const modesAreBack = () => Buffer.from(terminalModes(slave)).equals(before)
    const screen = new Screen(new Pty(master))
    const command = spawn('setsid', ['--ctty', ...CLI, 'fork', '--name', name, ...args, ...place.here], {
      stdio: [slave, slave, slave],
    })
    made.push(() => {
      command.kill('SIGKILL')
      screen.terminal.close()
      closeSync(slave)
    })
    return { command, screen, modesAreBack, exited: once(command, 'exit').then(([code]) => code) }
  }

  /** The same, once its REPL answers. */
  async function repl(value: number, args?: readonly string[]) {
    const started = fork(args)
    await started.screen.line(`const mine = ${value}`, /undefined\r$/)
    return started
  }

  test('shows the terminal of a child on this one', async () => {
    const [one, other] = await Promise.all([repl(1001), repl(1002, ['--tty', '--env', 'WHO=me'])])
    await other.screen.line('mine', /^1002\r$/)
    await one.screen.line('mine', /^1001\r$/)
    await other.screen.line('process.env.WHO', /^'me'\r$/)
    await one.screen.line('process.stdout.columns', /^100\r$/)
    one.screen.terminal.resize(77, 20)
    // It goes over the command and the supervisor.
    while (!/^77\r$/m.test(await one.screen.line('process.stdout.columns', /^\d+\r$/))) await sleep(20)
    await one.screen.type('console.log("l" + "oops"); while (true);\r', /^loops\r$/m)
    await one.screen.type(CTRL_C, /interrupted[\s\S]*> $/)
    one.screen.terminal.write(CTRL_D)
    expect(await one.exited).toBe(0)
    expect(one.modesAreBack()).toBe(true)
    other.screen.terminal.write('process.exit(mine - 995)\r')
    expect(await other.exited).toBe(7)
    expect(other.modesAreBack()).toBe(true)
    expect(one.screen.text).not.toContain('1002')
  })

  test('gives the terminal back where the command is killed, and hangs up', async () => {
    const { command, screen, modesAreBack } = await repl(1003)
    const pid = Number(/^(\d+)\r$/m.exec(await screen.line('process.pid', /^\d+\r$/))![1])
    command.kill('SIGKILL')
    await eventually(modesAreBack, 'the modes are back')
    await eventually(() => !isAlive(pid), 'the child is ended')
  })

  test('gives the terminal back where the supervisor is killed', async () => {
    const killed = new Terminal()
    try {
      const { process: supervisor } = await killed.run(
        'repl',
        ['--tty', '--ready-output', '> '],
        [process.execPath, '-i'],
        {
          env: { NODE_REPL_HISTORY: '' },
        },
      )
      const { screen, exited, modesAreBack } = fork(['--tty'], 'repl', killed)
      await screen.line('6 * 7', /^42\r$/)
      supervisor.kill('SIGKILL')
      expect(await exited).toBe(1)
      expect(modesAreBack()).toBe(true)
    } finally {
      // A control socket stays until the next supervisor of that name, or goes with its directory.
      await eventually(() => killed.processes().length === 0, 'the guard has ended what was left')
      rmSync(killed.runtimeDirectory, { recursive: true })
      await killed.leave()
    }
  })

  test('is refused in the background, where it would take the terminal from the shell', async () => {
    const command = `${quoted([...CLI, 'fork', '--tty', '--name', 'repl', ...supervised.here])} & wait $!; echo "status $?"`
    const { shown } = await shell(`set -m; ${command}`)
    expect(shown).toContain('runs in the background')
    expect(shown).toContain('status 2')
  })

  test('is an error where the template has none, or this is none', async () => {
    const { screen, exited, modesAreBack } = fork(['--tty'], 'plain')
    expect(await exited).toBe(2)
    await eventually(() => /\(BAD_OPTION\).*`warmfork run --tty`/s.test(screen.text), 'the error is shown')
    expect(modesAreBack()).toBe(true)
    const { code, stderr } = await supervised.call(['fork', '--tty', '--name', 'repl', ...supervised.here])
    expect(code).toBe(2)
    expect(stderr).toContain('are no terminal')
  })

  test('is told of where it is left out', async () => {
    const { code, stderr } = await supervised.call(['fork', '--name', 'repl', ...supervised.here])
    expect(code).toBe(2)
    expect(stderr).toContain('`warmfork fork --tty`')
  })
})
