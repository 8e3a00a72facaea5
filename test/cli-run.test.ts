/** `warmfork run`: what it hands to the command, what it says, and how it ends. */
import { existsSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { APP, collect, Terminal, until } from './cli-harness.js'

let terminal: Terminal
beforeEach(() => {
  terminal = new Terminal()
})
afterEach(() => terminal.leave())

const SPAWN = ['--engine', 'spawn', '--pool-size', '0'] as const

/** `run` in the foreground until its stderr matches. */
async function runUntil(pattern: RegExp, args: readonly string[], command: readonly string[] = APP) {
  const flags = ['--store', terminal.store, ...terminal.here, ...args]
  const started = await terminal.start(['run', ...flags, '--', ...command])
  const ended = collect(started)
  await until(started.stderr, ended, pattern)
  return { cli: started.process, ended }
}

test('arguments come to the command byte for byte', async () => {
  const args = [
    'two words',
    '"quoted"',
    "it's",
    'two\nlines',
    '',
    '--json',
    '-n',
    '--',
    'grün 漢字 🐢',
    '$HOME',
    '*',
    '\\',
  ]
  await terminal.run('bytes', SPAWN, [...APP, ...args])
  const { stdout } = await terminal.call(['fork', ...terminal.here], { input: 'argv\n' })
  expect(JSON.parse(stdout.trim().split('\n').at(-1)!)).toEqual(args)
})

test("flags behind the command are the command's, with or without `--`", async () => {
  const { cli, ended } = await runUntil(
    /warmfork: ready: /,
    [...SPAWN, '--name', 'x', '--ready-output', 'ready', '--show-output'],
    [...APP, '--name', 'y'],
  )
  cli.kill()
  const { code, stderr } = await ended
  expect(code).toBe(0)
  expect(stderr).toContain('ready ["--name","y"]')
})

test('--env sets a variable, an empty one and one with `=` too', async () => {
  await terminal.run('env', [...SPAWN, '--env', 'A=1=2', '--env', 'B='])
  const { stdout } = await terminal.call(['fork', ...terminal.here], { input: 'env A\nenv B\n' })
  expect(stdout.trim().split('\n').slice(-2)).toEqual(['"1=2"', '""'])
})

test('where stderr is no terminal the steps are plain lines, and stdout stays empty', async () => {
  const { cli, ended } = await runUntil(/warmfork: ready: /, [...SPAWN, '--name', 'x', '--ready-output', 'ready'])
  cli.kill()
  const { stdout, stderr } = await ended
  expect(stdout).toBe('')
  expect(stderr).not.toContain('\u001b')
  expect(stderr.replaceAll(/\b[\d.]+(ms|s)\b/g, 'T').replaceAll(/[\d.]+ MiB/g, 'N MiB')).toBe(
    `warmfork: start ${APP.join(' ').slice(0, 60)}: T\n` +
      'warmfork: wait until it is ready: T\n' +
      'warmfork: checkpoint it: T, generation 1: N MiB, memory is copied\n' +
      `warmfork: ready: x (pid ${cli.pid}, engine spawn); warmfork fork --name x\n`,
  )
})

test('--quiet says nothing', async () => {
  const ready = ['-q', '--name', 'x', '--ready-output', 'ready', ...SPAWN, '--store', terminal.store, ...terminal.here]
  const started = await terminal.start(['run', ...ready, '--', ...APP])
  const ended = collect(started)
  // It is there some time after it was started, and waits for the rest of its boot itself.
  let code: number | null
  do code = (await terminal.call(['fork', ...terminal.here], { input: 'exit 3\n' })).code
  while (code === 1)
  expect(code).toBe(3)
  started.process.kill()
  expect(await ended).toMatchObject({ code: 0, stdout: '', stderr: '' })
})

test('a program that ends while it boots is an error in three lines with its last output', async () => {
  const script = 'echo starting; echo no database >&2; exit 3'
  const args = ['run', '--name', 'x', '-q', ...SPAWN, '--store', terminal.store, ...terminal.here]
  const { code, stderr } = await terminal.call([...args, '--ready-port', '1', '--', 'sh', '-c', script])
  expect(code).toBe(1)
  expect(stderr).toMatch(/^warmfork: could not .*\(TEMPLATE_EXITED\)\n {2}\S.*\n {2}\S.*\n {2}\| /)
  expect(stderr).toContain('  | no database')
})

test('with --json that error is one JSON object, its output in it', async () => {
  const args = ['run', '--json', '--name', 'x', ...SPAWN, '--store', terminal.store, ...terminal.here]
  const { code, stdout, stderr } = await terminal.call([...args, '--', 'sh', '-c', 'echo no database; exit 3'])
  expect({ code, stdout }).toEqual({ code: 1, stdout: '' })
  const error = JSON.parse(stderr)
  expect(Object.keys(error).sort()).toEqual(['code', 'happened', 'message', 'output', 'remedy', 'tried'])
  expect(error).toMatchObject({ code: 'TEMPLATE_EXITED', output: 'no database\n' })
})

test('a command that does not exist is an error', async () => {
  const args = ['run', '--name', 'x', '-q', ...SPAWN, '--store', terminal.store, ...terminal.here]
  const { code, stderr } = await terminal.call([...args, '--', '/no/such/program'])
  expect(code).toBe(1)
  expect(stderr).toContain('(TEMPLATE_START_FAILED)')
})

test.each([
  ['SIGINT', 130],
  ['SIGTERM', 143],
] as const)('%s during the boot ends it with 128 and the number', async (signal, status) => {
  const { cli, ended } = await runUntil(/start /, [...SPAWN, '--name', 'x', '--ready-port', '1'])
  cli.kill(signal)
  expect((await ended).code).toBe(status)
})

test.each(['SIGINT', 'SIGTERM', 'SIGHUP'] as const)('%s ends a running one with status 0', async (signal) => {
  const { process: cli, ended, socket } = await terminal.run('x', SPAWN)
  cli.kill(signal)
  expect(await ended).toMatchObject({ code: 0, signal: null, stderr: '' })
  expect(existsSync(socket)).toBe(false)
})

test('a second SIGINT does not wait for a program that ignores SIGTERM', async () => {
  const script = "trap '' TERM; echo ready; while :; do sleep 1; done"
  const { process: cli, ended } = await terminal.run('x', [...SPAWN, '--stop-timeout', '40s'], ['sh', '-c', script])
  const before = performance.now()
  cli.kill('SIGINT')
  setTimeout(() => cli.kill('SIGINT'), 300)
  expect((await ended).code).toBe(0)
  expect(performance.now() - before).toBeLessThan(15_000)
})

test('ps and stop reach one that still boots', async () => {
  const { ended } = await runUntil(/start /, [...SPAWN, '--name', 'x', '--ready-port', '1'])
  const { stdout } = await terminal.call(['ps', '--json', ...terminal.here])
  expect(JSON.parse(stdout).supervisors[0]).toMatchObject({ name: 'x', state: 'starting', generation: 0 })
  expect((await terminal.call(['stop', ...terminal.here])).code).toBe(0)
  expect((await ended).code).toBe(0)
})

test('fork waits for one that still boots', async () => {
  const ready = join(terminal.directory, 'ready')
  const { cli, ended } = await runUntil(/start /, [...SPAWN, '--name', 'x', '--ready-file', ready])
  const fork = terminal.call(['fork', ...terminal.here], { input: 'exit 9\n' })
  await sleep(700)
  writeFileSync(ready, '')
  expect((await fork).code).toBe(9)
  cli.kill()
  await ended
})

test('a second supervisor of the same name is refused with the pid of the first', async () => {
  const { pid } = await terminal.run('x', SPAWN)
  const { code, stderr } = await terminal.call([
    'run',
    '-q',
    '--name',
    'x',
    ...SPAWN,
    '--store',
    terminal.store,
    ...terminal.here,
    '--',
    ...APP,
  ])
  expect(code).toBe(1)
  expect(stderr).toBe(
    'warmfork: could not start the supervisor x (STORE_LOCKED)\n' +
      `  process ${pid} is a running supervisor of that name\n` +
      '  Stop it with `warmfork stop --name x`, or choose another `--name`.\n',
  )
  expect((await terminal.call(['fork', ...terminal.here], { input: 'exit 2\n' })).code).toBe(2)
})

test('one that is killed leaves a socket that the next of its name replaces', async () => {
  const first = await terminal.run('x', SPAWN)
  first.process.kill('SIGKILL')
  await first.ended
  expect((await terminal.call(['fork', ...terminal.here])).stderr).toContain('(NO_SUPERVISOR)')
  await terminal.run('x', SPAWN)
  expect((await terminal.call(['fork', ...terminal.here], { input: 'exit 8\n' })).code).toBe(8)
})
