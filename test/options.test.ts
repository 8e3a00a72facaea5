import { describe, expect, test } from 'vitest'
import { WarmforkError } from '../src/errors.js'
import { defaultName, resolveOptions, type SupervisorOptions } from '../src/options.js'

const base = { command: ['node', 'app.js'] }
const check = (options: object) => resolveOptions({ ...base, ...options } as unknown as SupervisorOptions)

const BAD: readonly [options: object, message: string][] = [
  [
    { command: undefined },
    'Expected `command` to be a non-empty array of strings, the program first, got `undefined` (undefined)',
  ],
  [{ command: [] }, 'Expected `command` to be a non-empty array of strings, the program first, got `[]` (array)'],
  [
    { command: 'node app.js' },
    'Expected `command` to be a non-empty array of strings, the program first, got `node app.js` (string)',
  ],
  [{ command: [''] }, 'Expected `command[0]` not to be empty, got `` (string)'],
  [{ command: ['node', 1] }, 'Expected `command[1]` to be a string, got `1` (number)'],
  [{ command: ['node', 'a\0b'] }, 'Expected `command[1]` to be a string without NUL, got'],
  [{ cwd: 3 }, 'Expected `cwd` to be a string, got `3` (number)'],
  [{ env: { A: 1 } }, 'Expected `env.A` to be a string, got `1` (number)'],
  [{ name: '../x' }, 'Expected `name` to be letters, digits, `.`, `_` and `-`, at most 64, got `../x` (string)'],
  [{ engine: 'crui' }, "Expected `engine` to be one of 'auto', 'criu', 'spawn', got `crui` (string)"],
  [{ identity: 'host' }, "Expected `identity` to be one of 'fresh', 'namespace', got `host` (string)"],
  [{ memory: true }, "Expected `memory` to be one of 'auto', 'cow', 'copy', got `true` (boolean)"],
  [{ pool: 4 }, 'Expected `pool` to be an object, got `4` (number)'],
  [{ pool: { size: -1 } }, 'Expected `pool.size` to be a whole number, 0 or more, got `-1` (number)'],
  [
    { refork: true },
    "Expected `refork` to be false, 'auto', an object with `after`, or a function, got `true` (boolean)",
  ],
  [{ refork: { after: [] } }, 'Expected `refork.after` to be a non-empty array of numbers above 0, got `[]` (array)'],
  [
    { refork: { unit: 'days' } },
    "Expected `refork.unit` to be one of 'requests', 'forks', 'seconds', got `days` (string)",
  ],
  [{ workers: -1 }, 'Expected `workers` to be a whole number, 0 or more, got `-1` (number)'],
  [{ canary: true }, 'Expected `canary` to be false, or an object with `children` and `crashes`, got `true` (boolean)'],
  [{ reuse: 'yes' }, 'Expected `reuse` to be true, false or an object, got `yes` (string)'],
  [{ reuse: { watch: '*.js' } }, 'Expected `reuse.watch` to be an array of globs, got `*.js` (string)'],
  [{ reuse: { onMismatch: 'boot' } }, "Expected `reuse.onMismatch` to be one of 'cold', 'error', got `boot` (string)"],
  [{ pool: { size: 1.5 } }, 'Expected `pool.size` to be a whole number, 0 or more, got `1.5` (number)'],
  [
    { pool: { refillConcurrency: 0 } },
    'Expected `pool.refillConcurrency` to be a whole number, 1 or more, got `0` (number)',
  ],
  [{ forkTimeoutMs: 0 }, 'Expected `forkTimeoutMs` to be more than 0 milliseconds, got `0` (number)'],
  [{ forkTimeoutMs: 1e12 }, 'Expected `forkTimeoutMs` to be at most 2147483647 ms, got `1000000000000` (number)'],
  [{ forkTimeoutMs: '5s' }, 'Expected `forkTimeoutMs` to be a time in milliseconds, got `5s` (string)'],
  [
    { ready: {} },
    'Expected `ready` to be a function or an object with one of `output`, `port`, `http`, `file`, `delayMs`, `idleMs`, `agent`, `check`, got `{}` (object)',
  ],
  [{ ready: { port: 80, file: 'x' } }, 'Expected `ready` to be a function or an object with one of'],
  [{ ready: { port: 70_000 } }, 'Expected `ready.port` to be a port, 1 to 65535, got `70000` (number)'],
  [{ ready: { http: 'localhost' } }, 'Expected `ready.http` to be an http or https URL, got `localhost` (string)'],
  [{ ready: { output: 3 } }, 'Expected `ready.output` to be a regular expression or a string, got `3` (number)'],
  [
    { warmup: { http: [] } },
    'Expected `warmup.http` to be an http or https URL, or an array of such, got `[]` (array)',
  ],
  [
    { warmup: 'npm run warm' },
    'Expected `warmup` to be a function or an object with one of `command`, `http`, `run`, got `npm run warm` (string)',
  ],
  [{ stdio: [0, 1] }, "Expected `stdio` to be 'pipe', 'inherit' or three descriptors, got `[0,1]` (array)"],
  [{ log: 'loud' }, 'Expected `log` to be a pino logger or a level, got `loud` (string)'],
  [{ log: console }, 'Expected `log` to be a pino logger or a level, got'],
  [
    { crashes: { delayAfter: 5, giveUpAfter: 3 } },
    'Expected `crashes.giveUpAfter` to be `crashes.delayAfter` or more, got `3` (number)',
  ],
]

const UNKNOWN: readonly [options: object, path: string, remedy: string][] = [
  [{ comand: 1 }, 'comand', 'Did you mean `command`?'],
  [{ pool: { sise: 1 } }, 'pool.sise', 'Did you mean `pool.size`?'],
  [{ template: { bootTimeout: 1 } }, 'template.bootTimeout', 'Did you mean `template.bootTimeoutMs`?'],
  [{ ready: { port: 1, hots: 'x' } }, 'ready.hots', 'Did you mean `ready.host`?'],
  [{ warmup: { http: 'http://x/', time: 3 } }, 'warmup.time', 'Did you mean `warmup.times`?'],
  [{ frobnicate: 1 }, 'frobnicate', 'Remove it.'],
]

describe('options', () => {
  test.each(BAD)('%j are refused in one style', (options, message) => {
    const error = (() => {
      try {
        check(options)
      } catch (error) {
        return error as WarmforkError
      }
    })()
    expect(error).toBeInstanceOf(WarmforkError)
    expect(error?.code).toBe('BAD_OPTION')
    expect(error?.happened).toContain(message)
  })

  test.each(UNKNOWN)('%j have an unknown key, and the nearest one is suggested', (options, path, remedy) => {
    expect(() => check(options)).toThrow(
      expect.objectContaining({
        code: 'BAD_OPTION',
        remedy,
        happened: expect.stringContaining(`Expected \`${path}\` not to be there`),
      }),
    )
  })

  test('that are no object are refused', () => {
    expect(() => resolveOptions(undefined as never)).toThrow(expect.objectContaining({ code: 'BAD_OPTION' }))
  })

  test('have the defaults that are documented', () => {
    expect(check({ cwd: '/srv/shop', env: {}, name: 'x' })).toEqual({
      command: ['node', 'app.js'],
      cwd: '/srv/shop',
      env: {},
      name: 'x',
      store: expect.any(String),
      runtimeDirectory: expect.any(String),
      engine: 'auto',
      memory: 'auto',
      identity: 'fresh',
      descriptors: {},
      ready: { kind: 'idle', idleMs: 1_000, timeoutMs: 60_000 },
      warmup: undefined,
      template: {
        afterCheckpoint: 'continue',
        bootTimeoutMs: 60_000,
        restTimeoutMs: 10_000,
        stopTimeoutMs: 5_000,
        tty: undefined,
        secrets: [],
      },
      pool: { size: 1, maxParkedMs: 60_000, refillConcurrency: 2 },
      workers: { count: 0, replaceAtOnce: 0, restTimeoutMs: 30_000 },
      refork: false,
      keep: 2,
      reuse: false,
      trial: { timeoutMs: 10_000, settleMs: 200, check: undefined },
      canary: { children: 10, crashes: 2 },
      crashes: { soonMs: 1_000, delayAfter: 5, giveUpAfter: 16 },
      user: undefined,
      group: undefined,
      declaredEnv: [],
      orphans: 'end',
      stdio: 'pipe',
      log: 'silent',
      checkpointTimeoutMs: 120_000,
      forkTimeoutMs: 10_000,
      agent: true,
      hookTimeoutMs: 10_000,
    })
  })

  test('park nothing where forks get other descriptors than pipes', () => {
    expect(check({ stdio: 'inherit' }).pool.size).toBe(0)
  })

  test('give a readiness the time of the boot where it names none', () => {
    expect(check({ ready: { port: 80 }, template: { bootTimeoutMs: 5 } }).ready.timeoutMs).toBe(5)
    expect(check({ ready: { port: 80, timeoutMs: 7 }, template: { bootTimeoutMs: 5 } }).ready.timeoutMs).toBe(7)
  })
})

describe('the default name', () => {
  test('is made of the directory, the program and a hash', () => {
    expect(defaultName(['node', '--enable-source-maps', 'server.js'], '/srv/shop')).toMatch(/^shop-server-[0-9a-f]{6}$/)
    expect(defaultName(['/usr/bin/redis-server'], '/')).toMatch(/^redis-server-[0-9a-f]{6}$/)
  })

  test('differs for another argument and another directory', () => {
    const names = [
      defaultName(['node', 'a.js'], '/x'),
      defaultName(['node', 'a.js', '1'], '/x'),
      defaultName(['node', 'a.js'], '/y/x'),
    ]
    expect(new Set(names).size).toBe(3)
  })

  test.each([['node', '-e', 'console.log("ü/../")'], ['-'], ['a'.repeat(300)], ['世界']] as [string, ...string[]][])(
    'can be used as a name for %j, %j',
    (...command) => {
      const name = defaultName(command, '/srv/ä b')
      expect(resolveOptions({ command, name }).name).toBe(name)
    },
  )
})
