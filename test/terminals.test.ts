/** Terminals with real programs that read from one. IRB on JRuby is tried in the matrix, since it takes long to boot. */
import { constants, mkdtempSync, readdirSync, readFileSync, readlinkSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { descendants, stat } from '../src/linux/proc.js'
import type { SupervisorOptions } from '../src/options.js'
import { APP, ENGINES, eventually, Place, usePlace } from './engines-under-test.js'
import { converse, type Repl } from './repl.js'
import { CTRL_C, CTRL_D, CTRL_Z, Screen } from './screen.js'

const REPLS: Record<string, Repl> = {
  Node: {
    command: [process.execPath, '-i'],
    prompt: /> $/,
    columns: 'process.stdout.columns',
    loop: 'while (true);',
    interrupted: /interrupted/,
    who: 'process.env.WHO',
  },
  Python: {
    command: ['python3', '-q'],
    prompt: />>> $/,
    columns: '__import__("shutil").get_terminal_size().columns',
    loop: 'while True: pass\r',
    interrupted: /KeyboardInterrupt/,
    who: '__import__("os").environ["WHO"]',
  },
}

/** How many pseudo-terminals the system has. */
const ptys = () => Number(readFileSync('/proc/sys/kernel/pty/nr', 'latin1'))

/** The descriptors of a process that lead to a terminal, with their access mode and O_NONBLOCK. */
function terminalFlags(pid: number): [fd: number, flags: number][] {
  return readdirSync(`/proc/${pid}/fd`)
    .filter((fd) => readlinkSync(`/proc/${pid}/fd/${fd}`).startsWith('/dev/pts/'))
    .map((fd) => {
      const flags = /^flags:\s*(\d+)/m.exec(readFileSync(`/proc/${pid}/fdinfo/${fd}`, 'latin1'))![1]!
      return [Number(fd), Number.parseInt(flags, 8) & (constants.O_NONBLOCK | 3)]
    })
}

/** Session, number of its terminal, and the group in the foreground there. */
function sessionOf(pid: number): number[] {
  return readFileSync(`/proc/${pid}/stat`, 'latin1')
    .replace(/^.*\) \S \d+ \d+ /s, '')
    .split(' ')
    .slice(0, 3)
    .map(Number)
}

describe.skipIf(!ENGINES.includes('criu'))('a terminal of its own', () => {
  const place = usePlace('criu')
  let home: string
  beforeAll(() => {
    home = mkdtempSync(join(tmpdir(), 'warmfork-home-'))
  })
  afterAll(() => rmSync(home, { recursive: true }))
  /** REPLs keep a history in the home directory. */
  const start = ({ env, ...options }: Partial<SupervisorOptions>) =>
    place.current.start({
      template: { tty: { columns: 90, rows: 30 } },
      env: { HOME: home, NODE_REPL_HISTORY: '', ...env },
      ...options,
    })

  test.each([
    ['Node', 'fresh'],
    ['Python', 'fresh'],
    ['Python', 'namespace'],
  ] as const)('is what each fork of the REPL of %s has, with the identity %s', async (name, identity) => {
    const repl = REPLS[name]!
    const supervisor = await start({ command: repl.command, ready: { output: '> ' }, identity })
    await converse(supervisor, repl)
  })

  test('of a shell has job control in a pid namespace', async () => {
    const supervisor = await start({
      command: ['bash', '--norc', '--noprofile', '-i'],
      env: { PS1: 'prompt> ' },
      identity: 'namespace',
      ready: { output: 'prompt>' },
    })
    expect(supervisor.warnings).toEqual([])
    const child = await supervisor.fork()
    const screen = new Screen(child.terminal)
    const sleeping = (state: string) =>
      eventually(
        () => descendants(child.pid).some((pid) => stat(pid)?.comm === 'sleep' && stat(pid)?.state === state),
        state,
      )
    screen.terminal.write('sleep 1000\r')
    await sleeping('S')
    await screen.type(CTRL_C, /\^C.*> $/s)
    await screen.line('echo "status" $?', /^status 130\r$/)
    screen.terminal.write('sleep 1001\r')
    await sleeping('S')
    await screen.type(CTRL_Z, /Stopped.*> $/s)
    await screen.line('jobs', /Stopped +sleep 1001/)
    screen.terminal.write('fg\r')
    await sleeping('S')
    await screen.type(CTRL_C, /\^C.*> $/s)
    await screen.line('stty size', /^30 90\r$/)
    child.terminal.resize(66, 22)
    await screen.line('stty size', /^22 66\r$/)
    screen.terminal.write(CTRL_D)
    expect((await child.exit).signal).toBe(null)
  })

  test.each([
    ['bash', '--norc', '--noprofile', '-i'],
    ['sh', '-i'],
  ])('of %s comes with a warning where the shell has another process group then', async (...command) => {
    const supervisor = await start({
      command: command as [string, ...string[]],
      env: { PS1: 'prompt> ' },
      ready: { output: 'prompt>' },
    })
    const identity = supervisor.warnings.filter(({ kind }) => kind === 'identity')
    expect(identity.map(({ message }) => message)).toEqual([expect.stringContaining("`identity: 'namespace'`")])
    const child = await supervisor.fork()
    const screen = new Screen(child.terminal)
    await screen.line('echo $((6 * 7))', /^42\r$/)
    // What the warning says: what it starts has the terminal, and it never gets it back.
    await screen.type('ls -d /\r', /^\/\r$/m)
    screen.terminal.write('\r')
    await child.exit
  })

  test('comes without a warning where a shell has no job control', async () => {
    const supervisor = await start({ command: ['bash', '-c', 'echo ready; while read -r line; do stty size; done'] })
    expect(supervisor.warnings).toEqual([])
  })

  test('has the size that is asked for, and goes with its child', async () => {
    const supervisor = await start({
      command: ['sh', '-c', 'echo ready; while read -r line; do stty size; done'],
      pool: { size: 1 },
    })
    const descriptors = () => readdirSync('/proc/self/fd').length
    const fork = async (columns: number) => {
      const child = await supervisor.fork({ tty: { columns, rows: 10 } })
      expect(child.terminal.size).toEqual({ columns, rows: 10 })
      const screen = new Screen(child.terminal)
      await screen.type('\r', new RegExp(`^10 ${columns}\r$`, 'm'))
      screen.terminal.write(CTRL_D)
      expect(await child.exit).toEqual({ code: 0, signal: null })
    }
    await fork(40)
    await eventually(() => supervisor.pool.parked.length === 1, 'one is parked')
    const before = descriptors()
    const ptysBefore = ptys()
    for (let i = 0; i < 100; i++) await fork(41 + i)
    // Those of the criu processes that are ahead of the forks come and go.
    await eventually(() => descriptors() <= before + 4, 'no descriptor is left')
    await eventually(() => ptys() <= ptysBefore + 2, 'no terminal is left')
  })

  test('is open as often as in the template, blocking or not as there, and controls the session', async () => {
    const supervisor = await start({ command: REPLS.Node!.command, ready: { output: '> ' } })
    const child = await supervisor.fork()
    const flags = terminalFlags(supervisor.template!.pid)
    expect(terminalFlags(child.pid)).toEqual(flags)
    // libuv opens its terminal once more, in order not to block those who share it.
    expect(new Set(flags.map(([, one]) => one & constants.O_NONBLOCK)).size).toBe(2)
    const [session, terminal, foreground] = sessionOf(child.pid)
    expect([session, foreground]).toEqual([child.pid, child.pid])
    expect(terminal).not.toBe(sessionOf(supervisor.template!.pid)[1])
  })

  test('gives the last words of a program that nobody listened to', async () => {
    const supervisor = await start({ command: ['sh', '-c', 'echo ready; read -r line; echo "got $line"; exit 3'] })
    const child = await supervisor.fork()
    child.terminal.write('this\r')
    expect((await child.exit).code).toBe(3)
    let text = ''
    for await (const chunk of child.terminal) text += chunk
    expect(text).toMatch(/got this\r\n$/)
  })

  test.skipIf(process.getuid?.() !== 0)('belongs to the user of its program', async () => {
    const supervisor = await start({
      command: ['sh', '-c', 'echo ready; read -r line; tty; stat -c %U "$(tty)"; cat'],
      user: 'nobody',
    })
    const [one, other] = [await supervisor.fork(), await supervisor.fork()]
    const shown = [one, other].map((child) => new Screen(child.terminal).type('\r', /^(\/dev\/pts\/\d+)\r\nnobody\r$/m))
    const [first, second] = await Promise.all(shown)
    expect(first).not.toBe(second)
  })

  test('is hung up by close', async () => {
    const supervisor = await start({ command: ['sh', '-c', 'echo ready; cat'] })
    const child = await supervisor.fork()
    child.terminal.close()
    expect((await child.exit).signal).toBe('SIGHUP')
    // As on what is closed: nothing.
    child.terminal.resize(10, 10)
    expect(child.terminal.size).toEqual({ columns: 0, rows: 0 })
  })

  test('stands in the place of pipes', async () => {
    const supervisor = await start({ command: ['sh', '-c', 'echo ready; cat'] })
    const child = await supervisor.fork()
    expect(child.isTTY).toBe(true)
    expect(() => child.stdout).toThrow(/BAD_OPTION.*terminal/s)
    await expect(supervisor.fork({ stdio: 'inherit' })).rejects.toMatchObject({ code: 'BAD_OPTION' })
  })

  test('is not to be had of a template without one', async () => {
    const supervisor = await place.current.start({ command: APP })
    await expect(supervisor.fork({ tty: true })).rejects.toMatchObject({ code: 'BAD_OPTION' })
    const child = await supervisor.fork()
    expect(child.isTTY).toBe(false)
    expect(() => child.terminal).toThrow(/BAD_OPTION.*template: \{ tty: true \}/s)
  })

  test('keeps its program from forking itself, and it goes on', async () => {
    const app = `import('${new URL('../dist/agents/node/worker.js', import.meta.url)}').then(({ worker }) => {
      worker.on('message', () => worker.fork().catch(({ code, message }) => worker.send({ code, message })))
      worker.ready()
    }); setInterval(() => {}, 1000)`
    const supervisor = await start({ command: [process.execPath, '-e', app], ready: { agent: true } })
    const child = await supervisor.fork()
    await child.ready
    for (let i = 0; i < 2; i++) {
      const answer = new Promise((resolve) => child.once('message', resolve))
      child.send('fork')
      expect(await answer).toEqual({ code: 'ENGINE_UNSUPPORTED', message: expect.stringContaining('on a terminal') })
    }
  })
})

test.skipIf(process.platform !== 'linux')('a fork that is started cold has a terminal too', async () => {
  const place = new Place('spawn')
  const supervisor = await place.start({
    command: ['sh', '-c', 'echo ready; while read -r line; do stty size; done'],
    template: { tty: true },
  })
  const child = await supervisor.fork({ tty: { columns: 61, rows: 9 } })
  await new Screen(child.terminal).type('\r', /^9 61\r$/m)
  child.terminal.write(CTRL_D)
  expect(await child.exit).toEqual({ code: 0, signal: null })
  await place.leave()
})
