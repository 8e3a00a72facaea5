/** `warmfork fork`, `ps` and `stop` against running supervisors. */
import { once } from 'node:events'
import { closeSync, openSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import type { Status } from '../src/control/protocol.js'
import { isAlive } from '../src/linux/proc.js'
import { collect, type Result, type Running, Terminal, until } from './cli-harness.js'
import { ENGINES } from './engines-under-test.js'

const childrenOf = async (terminal: Terminal, state: string) => {
  const { stdout } = await terminal.call(['ps', '--json', ...terminal.here])
  const [supervisor] = (JSON.parse(stdout) as { supervisors: Status[] }).supervisors
  return supervisor!.children.filter((child) => child.state === state)
}

/** A child, once it answers. */
async function forked(terminal: Terminal) {
  const started = await terminal.start(['fork', ...terminal.here])
  const ended = collect(started)
  started.stdin.write('pid\n')
  const pid = Number(/^\d+$/m.exec(await until(started.stdout, ended, /^\d+\n/m)))
  return { ...started, ended, pid }
}

async function gone(pid: number): Promise<boolean> {
  for (let i = 0; i < 200 && isAlive(pid); i++) await sleep(20)
  return !isAlive(pid)
}

describe.each(ENGINES)('fork, with the engine %s', (engine) => {
  const terminal = new Terminal()
  const fork = (input: string): Promise<Result> => terminal.call(['fork', ...terminal.here], { input })
  beforeAll(async () => {
    await terminal.run('shop', ['--engine', engine])
  })
  afterAll(() => terminal.leave())

  test('the exit status of the child is that of the command', async () => {
    expect((await fork('exit 0\n')).code).toBe(0)
    expect((await fork('exit 7\n')).code).toBe(7)
    expect((await fork('exit 255\n')).code).toBe(255)
  })

  test('a child that a signal ends gives 128 and its number', async () => {
    expect((await fork('signal SIGKILL\n')).code).toBe(137)
    expect((await fork('signal SIGTERM\n')).code).toBe(143)
  })

  test('stdin, stdout and stderr of the command are those of the child', async () => {
    const { stdout, stderr, code } = await fork('hello\nerr world\n')
    expect(stdout.split('\n').slice(-2)).toEqual(['hello', ''])
    expect({ stderr, code }).toEqual({ stderr: 'world\n', code: 0 })
  })

  test('stdin and stdout may be files', async () => {
    const [input, output] = [join(terminal.directory, 'input'), join(terminal.directory, 'output')]
    writeFileSync(input, 'hello\nexit 3\n')
    const fds = [openSync(input, 'r'), openSync(output, 'w'), openSync('/dev/null', 'w')]
    const [code] = await once(terminal.spawn(['fork', ...terminal.here], fds), 'exit')
    for (const fd of fds) closeSync(fd)
    expect(code).toBe(3)
    expect(readFileSync(output, 'utf8')).toMatch(/hello\n$/)
  })

  test('what is appended to a file comes behind what is there', async () => {
    const log = join(terminal.directory, 'log')
    writeFileSync(log, 'before\n')
    const input = join(terminal.directory, 'after')
    writeFileSync(input, 'after\n')
    const fds = [openSync(input, 'r'), openSync(log, 'a'), openSync('/dev/null', 'w')]
    await once(terminal.spawn(['fork', ...terminal.here], fds), 'exit')
    for (const fd of fds) closeSync(fd)
    expect(readFileSync(log, 'utf8')).toMatch(/^before\n(ready.*\n)?after\n$/)
  })

  test('the streams may be sockets, as Node makes them', async () => {
    const child = terminal.spawn(['fork', ...terminal.here], 'pipe')
    let text = ''
    child.stdout!.on('data', (chunk) => {
      text += chunk
    })
    child.stdin!.end('hello\nexit 3\n')
    const [code] = await once(child, 'close')
    expect(code).toBe(3)
    expect(text).toMatch(/hello\n$/)
  })

  test('two streams in one file keep their order', async () => {
    const log = join(terminal.directory, 'both')
    const input = join(terminal.directory, 'lines')
    writeFileSync(input, Array.from({ length: 20 }, (_, i) => `out ${i}\nerr ${i}\n`).join(''))
    const output = openSync(log, 'w')
    const fds = [openSync(input, 'r'), output, output]
    await once(terminal.spawn(['fork', ...terminal.here], fds), 'exit')
    for (const fd of new Set(fds)) closeSync(fd)
    const lines = readFileSync(log, 'utf8')
      .split('\n')
      .filter((line) => /^(out )?\d+$/.test(line))
    expect(lines).toEqual(Array.from({ length: 20 }, (_, i) => [`out ${i}`, String(i)]).flat())
  })

  test('stdin may be /dev/null', async () => {
    const fds = [openSync('/dev/null', 'r'), openSync('/dev/null', 'w'), openSync('/dev/null', 'w')]
    const [code] = await once(terminal.spawn(['fork', ...terminal.here], fds), 'exit')
    for (const fd of fds) closeSync(fd)
    expect(code).toBe(0)
  })

  test('many bytes come through whole', async () => {
    const input = join(terminal.directory, 'many')
    const output = join(terminal.directory, 'many.out')
    const text = Array.from({ length: 100_000 }, (_, i) => `line ${i}\n`).join('')
    writeFileSync(input, text)
    const fds = [openSync(input, 'r'), openSync(output, 'w'), openSync('/dev/null', 'w')]
    const [code] = await once(terminal.spawn(['fork', ...terminal.here], fds), 'exit')
    for (const fd of fds) closeSync(fd)
    expect(code).toBe(0)
    expect(readFileSync(output, 'utf8').replace(/^ready.*\n/, '')).toBe(text)
  })

  test('a signal to the command is passed on to the child, and does not end the command', async () => {
    const { process: cli, stdin, ended, pid } = await forked(terminal)
    expect(isAlive(pid)).toBe(true)
    cli.kill('SIGUSR2')
    await sleep(300)
    stdin.end('exit 4\n')
    const { code, stdout } = await ended
    expect(stdout).toContain('got SIGUSR2')
    expect(code).toBe(4)
  })

  test.each([
    ['SIGINT', 130],
    ['SIGTERM', 143],
    ['SIGHUP', 129],
  ] as const)('%s ends the child, and the command with its status', async (signal, status) => {
    const { process: cli, ended, pid } = await forked(terminal)
    cli.kill(signal)
    expect((await ended).code).toBe(status)
    expect(await gone(pid)).toBe(true)
  })

  test('the child of a command that is killed is told as by a terminal that hangs up', async () => {
    const { process: cli, pid } = await forked(terminal)
    cli.kill('SIGKILL')
    expect(await gone(pid)).toBe(true)
  })

  test('eight commands at once each get their own child', async () => {
    const results = await Promise.all(Array.from({ length: 8 }, (_, i) => fork(`pid\nexit ${i}\n`)))
    expect(results.map(({ code }) => code)).toEqual([0, 1, 2, 3, 4, 5, 6, 7])
    expect(new Set(results.map(({ stdout }) => /^\d+$/m.exec(stdout)?.[0])).size).toBe(8)
  })

  test('ps shows parked and running children with their figures', async () => {
    const { ended, stdin, pid } = await forked(terminal)
    const [child, ...others] = await childrenOf(terminal, 'running')
    expect(others).toEqual([])
    expect(child).toMatchObject({ pid, generation: 1, state: 'running' })
    expect(child!.pssBytes).toBeGreaterThan(0)
    const { stdout } = await terminal.call(['ps', ...terminal.here])
    expect(stdout).toMatch(/^shop {2}pid \d+, running for \S+, engine (spawn|criu)\n/)
    expect(stdout).toMatch(/^ +PID +STATE +GEN +REQUESTS +AGE +PRIVATE MiB +SHARED MiB +PSS MiB +CPU % +CPU s$/m)
    expect(stdout).toMatch(
      new RegExp(`^ *${pid} +running +1 +(-|0) +\\S+ +[\\d.]+ +[\\d.]+ +[\\d.]+ +\\d+ +[\\d.]+$`, 'm'),
    )
    expect(stdout).not.toContain('\u001b')
    stdin.end()
    await ended
  })
})

describe('several supervisors', () => {
  const terminal = new Terminal()
  let running: Running[] = []
  beforeAll(async () => {
    running = [await terminal.run('api', ['--engine', 'spawn']), await terminal.run('shop', ['--engine', 'spawn'])]
  })
  afterAll(() => terminal.leave())

  test('fork without a name lists them', async () => {
    const { code, stderr } = await terminal.call(['fork', ...terminal.here])
    expect(code).toBe(1)
    expect(stderr).toBe(
      'warmfork: could not choose a supervisor (NO_SUPERVISOR)\n  several run: api, shop\n  Name one with `--name`.\n',
    )
  })

  test('with --json that error is one line of JSON on stderr', async () => {
    const { stdout, stderr } = await terminal.call(['stop', '--json', ...terminal.here])
    expect(stdout).toBe('')
    expect(JSON.parse(stderr)).toMatchObject({ code: 'NO_SUPERVISOR', happened: 'several run: api, shop' })
  })

  test('a name chooses one', async () => {
    const { code } = await terminal.call(['fork', '--name', 'shop', ...terminal.here], { input: 'exit 5\n' })
    expect(code).toBe(5)
  })

  test('a name that does not run lists those that do', async () => {
    const { stderr } = await terminal.call(['fork', '--name', 'shpo', ...terminal.here])
    expect(stderr).toContain('none of that name runs; running: api, shop')
  })

  test('ps shows all of them, and generations those of the one that is named', async () => {
    const ps = JSON.parse((await terminal.call(['ps', '--json', ...terminal.here])).stdout)
    expect(ps.supervisors.map(({ name }: Status) => name)).toEqual(['api', 'shop'])
    const made = JSON.parse((await terminal.call(['generations', '--json', '-n', 'api', ...terminal.here])).stdout)
    expect(made).toMatchObject({ name: 'api', generations: [{ number: 1, current: true }] })
  })

  test('inspect says that the engine spawn has no images', async () => {
    const { code, stderr } = await terminal.call(['inspect', '-n', 'api', ...terminal.here])
    expect(code).toBe(1)
    expect(stderr).toContain('(ENGINE_UNSUPPORTED)')
  })

  test('stop ends one, is there when it has ended, and leaves the other', async () => {
    const [api] = running
    const { code, stdout } = await terminal.call(['stop', '-n', 'api', ...terminal.here])
    expect({ code, stdout }).toEqual({ code: 0, stdout: `stopped api (pid ${api!.pid})\n` })
    expect(isAlive(api!.pid)).toBe(false)
    expect((await api!.ended).code).toBe(0)
    expect((await terminal.call(['fork', ...terminal.here], { input: 'exit 6\n' })).code).toBe(6)
  })

  test('a child ends with its supervisor, and the command says how', async () => {
    const { ended } = await forked(terminal)
    await terminal.call(['stop', ...terminal.here])
    expect((await ended).code).toBe(143)
  })
})

const GIVEN = [process.execPath, join(import.meta.dirname, 'fixtures/cli/given.mjs')]

describe.skipIf(!ENGINES.includes('criu'))('fork, of a program with an agent', () => {
  const terminal = new Terminal()
  beforeAll(async () => {
    await terminal.run('shop', ['--secret', 'TOKEN'], GIVEN, { env: { TOKEN: 'hidden', GONE: 'x' } })
  })
  afterAll(() => terminal.leave())
  const fork = (args: string[]) => terminal.call(['fork', ...terminal.here, ...args], { input: 'look\n' })

  test('arguments, variables, the directory and the payload are given to it', async () => {
    const given = [
      '--env',
      'A=b c',
      '--unset-env',
      'GONE',
      '--cwd',
      '/',
      '--data',
      '{"n":[1]}',
      '--',
      'first',
      '--second',
      '',
    ]
    const { stdout, code } = await fork(given)
    expect(JSON.parse(stdout)).toEqual({
      args: ['first', '--second', ''],
      env: { A: 'b c', TOKEN: 'hidden' },
      cwd: '/',
      data: { n: [1] },
    })
    expect(code).toBe(0)
  })

  test('without any, it has its secrets', async () => {
    expect(JSON.parse((await fork([])).stdout)).toMatchObject({
      args: [],
      env: { GONE: 'x', TOKEN: 'hidden' },
      data: null,
    })
  })

  test('what is no JSON is refused', async () => {
    expect(await fork(['--data', '{'])).toMatchObject({ code: 2, stderr: expect.stringContaining('It is no JSON') })
  })
})
