/** The command line itself: help, usage errors, completions. Nothing is started. */
import { execFileSync } from 'node:child_process'
import { mkdirSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { afterAll, describe, expect, test } from 'vitest'
import { Terminal } from './cli-harness.js'

const terminal = new Terminal()
afterAll(() => terminal.leave())

const SUBCOMMANDS = [
  'run',
  'fork',
  'ps',
  'generations',
  'inspect',
  'refork',
  'rollback',
  'pin',
  'unpin',
  'prune',
  'flatten',
  'export',
  'import',
  'stop',
  'doctor',
  'demo',
  'completion',
]

const helps = new Map<string, Promise<string>>()

function helpOf(subcommand: string): Promise<string> {
  const help = helps.get(subcommand) ?? terminal.call([subcommand, '--help']).then(({ stdout }) => stdout)
  helps.set(subcommand, help)
  return help
}

async function flagsOf(subcommand: string): Promise<string[]> {
  return [...(await helpOf(subcommand)).matchAll(/^ {2}(?:-\w, )?(--[a-z-]+)/gm)].map((match) => match[1]!)
}

describe('usage', () => {
  test('--version prints the version', async () => {
    const result = await terminal.call(['--version'])
    expect(result).toMatchObject({ code: 0, stderr: '' })
    expect(result.stdout).toMatch(/^\d+\.\d+\.\d+\n$/)
  })

  test('--help names every subcommand, with examples', async () => {
    const { code, stdout } = await terminal.call(['--help'])
    expect(code).toBe(0)
    for (const name of SUBCOMMANDS) expect(stdout).toMatch(new RegExp(`^  ${name} `, 'm'))
    expect(stdout).toContain('Examples:')
  })

  test('every subcommand has examples in its help', async () => {
    for (const name of SUBCOMMANDS.filter((each) => each !== 'doctor' && each !== 'demo')) {
      expect(await helpOf(name)).toMatch(/\nExamples:\n {2}# \w.*\n {2}/)
    }
  })

  test('without a subcommand the help goes to stderr, with status 2', async () => {
    const { code, stdout, stderr } = await terminal.call([])
    expect({ code, stdout }).toEqual({ code: 2, stdout: '' })
    expect(stderr).toContain('Usage: warmfork')
  })

  test.each([
    [['frok'], "unknown command 'frok'", 'Did you mean fork?'],
    [['run', '--pool-szie', '3', '--', 'true'], "unknown option '--pool-szie'", 'Did you mean --pool-size?'],
    [['run'], "missing required argument 'command'", 'See `warmfork run --help`.'],
    [
      ['run', '--max-parked', '10', '--', 'true'],
      "option '--max-parked <time>' argument '10' is invalid",
      'Write a time as `500ms`, `10s`, `5m`, `2h` or `7d`.',
    ],
    [
      ['run', '--engine', 'docker', '--', 'true'],
      "option '--engine <engine>' argument 'docker' is invalid",
      'Allowed choices are auto, criu, spawn.',
    ],
    [
      ['run', '--ready-port', '1', '--ready-file', 'x', '--', 'true'],
      "option '--ready-port <port>' cannot be used with option '--ready-file <file>'",
      'See `warmfork run --help`.',
    ],
    [['prune'], 'it was not said which', 'Give numbers, or `--keep` and `--older-than`.'],
    [['ps', 'now'], "too many arguments for 'ps'. Expected 0 arguments but got 1", 'See `warmfork ps --help`.'],
  ])('%j says what is wrong in three lines, with status 2', async (args, happened, remedy) => {
    const { code, stdout, stderr } = await terminal.call(args)
    const [first, ...rest] = stderr.split('\n')
    expect(first).toMatch(/^warmfork: could not .* \(BAD_OPTION\)$/)
    expect(rest).toEqual([`  ${happened}`, `  ${remedy}`, ''])
    expect({ code, stdout }).toEqual({ code: 2, stdout: '' })
  })

  test('an option that only the library can judge is a usage error too', async () => {
    const { code, stderr } = await terminal.call(['run', '--name', 'a/b', '--', 'true'])
    expect(code).toBe(2)
    expect(stderr).toContain('Expected `name` to be letters, digits')
  })

  test('with --json a usage error is JSON on stderr', async () => {
    const { code, stderr } = await terminal.call(['ps', '--json', '--nmae', 'x'])
    expect(code).toBe(2)
    expect(JSON.parse(stderr)).toMatchObject({ code: 'BAD_OPTION', happened: "unknown option '--nmae'" })
  })

  test('--debug adds the stack', async () => {
    const { stderr } = await terminal.call(['ps', '--debug', ...terminal.here])
    expect(stderr).toMatch(/^warmfork: could not .*\n.*\n.*\nWarmforkError: .*\n +at /)
  })
})

describe('without a supervisor', () => {
  test.each([['ps'], ['fork'], ['stop']])('%s says that none runs, with status 1', async (name) => {
    const { code, stdout, stderr } = await terminal.call([name, ...terminal.here])
    expect({ code, stdout }).toEqual({ code: 1, stdout: '' })
    expect(stderr).toBe(
      'warmfork: could not choose a supervisor (NO_SUPERVISOR)\n' +
        `  none runs (looked in ${terminal.runtimeDirectory})\n` +
        '  Start one with `warmfork run`, or name the right one with `--name`.\n',
    )
  })

  test('a name that does not run is named in the error', async () => {
    const { code, stderr } = await terminal.call(['fork', '--name', 'shop', ...terminal.here])
    expect(code).toBe(1)
    expect(stderr).toContain('could not reach the supervisor shop (NO_SUPERVISOR)')
  })

  test('generations says that the store holds none', async () => {
    const { code, stderr } = await terminal.call(['generations', '--store', terminal.store, ...terminal.here])
    expect(code).toBe(1)
    expect(stderr).toContain('(GENERATION_NOT_FOUND)')
  })

  test('a runtime directory whose socket would have too long a path is refused', async () => {
    const { code, stderr } = await terminal.call([
      'ps',
      '--name',
      'x',
      '--runtime-directory',
      `/tmp/${'x'.repeat(120)}`,
    ])
    expect(code).toBe(2)
    expect(stderr).toContain("and a socket's has at most 107")
  })
})

describe('completion', () => {
  test.each(['bash', 'zsh', 'fish'])('the script for %s has every subcommand and flag', async (shell) => {
    const { code, stdout } = await terminal.call(['completion', shell])
    expect(code).toBe(0)
    for (const name of SUBCOMMANDS) {
      expect(stdout).toContain(name)
      const flags = await flagsOf(name)
      expect(flags).toContain('--help')
      for (const flag of flags) expect(stdout).toContain(shell === 'fish' ? `-l ${flag.slice(2)} ` : flag)
    }
  })

  test('an unknown shell is a usage error', async () => {
    expect((await terminal.call(['completion', 'csh'])).code).toBe(2)
  })

  test('bash completes subcommands, flags and values with it', async () => {
    const { stdout: script } = await terminal.call(['completion', 'bash'])
    const complete = (...words: string[]) => {
      const list = words.map((word) => `'${word}'`).join(' ')
      const lines = `${script}\nCOMP_WORDS=(${list}) COMP_CWORD=${words.length - 1}\n_warmfork\nprintf '%s\\n' "\${COMPREPLY[@]}"`
      return execFileSync('bash', ['-c', lines], { encoding: 'utf8', cwd: terminal.directory }).trim().split('\n')
    }
    mkdirSync(join(terminal.directory, 'shop'))
    writeFileSync(join(terminal.directory, 'shop.txt'), '')
    expect(complete('warmfork', 'fo')).toEqual(['fork'])
    expect(complete('warmfork', 'run', '--engine', '')).toEqual(['auto', 'criu', 'spawn'])
    expect(complete('warmfork', 'run', '--pool-s')).toEqual(['--pool-size'])
    expect(complete('warmfork', 'run', '--cwd', 'sh')).toEqual(['shop'])
    expect(complete('warmfork', 'completion', 'z')).toEqual(['zsh'])
  })
})
