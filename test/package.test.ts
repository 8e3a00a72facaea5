import { execFile } from 'node:child_process'
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'

const root = join(import.meta.dirname, '..')
const execute = promisify(execFile)
const { name, version, dependencies } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8'))

let work: string
let project: string
let tarball: string
let packed: { path: string; mode: number; size: number }[]

interface Ended {
  stdout: string
  stderr: string
  status: number
}

/** Runs a program in the project as a user would; gives its end whatever it is. */
async function run(file: string, args: readonly string[], timeout = 60_000): Promise<Ended> {
  // npm tells the programs that it starts about this repository: the project knows nothing of it.
  const env = Object.fromEntries(
    Object.entries(process.env).filter(([key]) => !/^(npm_(?!config_)|NODE_OPTIONS|VITEST)/.test(key)),
  )
  const options = {
    cwd: project,
    env: { ...env, NO_COLOR: '1' },
    timeout,
    killSignal: 'SIGKILL' as const,
    maxBuffer: 1 << 26,
  }
  try {
    return { ...(await execute(file, args, options)), status: 0 }
  } catch (error) {
    const { stdout = '', stderr = '', code } = error as { stdout?: string; stderr?: string; code?: number | string }
    if (typeof code !== 'number') throw error
    return { stdout, stderr, status: code }
  }
}

beforeAll(async () => {
  work = mkdtempSync(join(tmpdir(), 'warmfork-package-'))
  // What is packed is compiled from the present sources, in a place of its own: others may be using dist.
  const source = join(work, 'source')
  project = join(work, 'project')
  mkdirSync(source)
  mkdirSync(project)
  await execute('cp', [
    '--archive',
    ...readdirSync(root)
      .filter((entry) => !['node_modules', 'dist', '.git', '.cache'].includes(entry))
      .map((entry) => join(root, entry)),
    source,
  ])
  symlinkSync(join(root, 'node_modules'), join(source, 'node_modules'))
  const options = { cwd: source, timeout: 120_000, killSignal: 'SIGKILL' as const, maxBuffer: 1 << 26 }
  await execute('npm', ['run', 'build', '--silent'], options)
  const { stdout } = await execute('npm', ['pack', '--json', '--ignore-scripts', '--pack-destination', work], options)
  const [pack] = JSON.parse(stdout)
  packed = pack.files
  tarball = join(work, pack.filename)
  writeFileSync(join(project, 'package.json'), JSON.stringify({ name: 'empty', private: true, type: 'module' }))
  const installed = await run('npm', ['install', '--prefer-offline', '--no-audit', '--no-fund', tarball], 180_000)
  if (installed.status !== 0) throw new Error(`npm install failed:\n${installed.stdout}${installed.stderr}`)
}, 300_000)

afterAll(() => rmSync(work, { recursive: true, force: true }))

describe('the packed package', () => {
  const paths = () => packed.map(({ path }) => path)

  test('has what a user needs', () => {
    const needed = [
      'package.json',
      'README.md',
      'LICENSE',
      'dist/index.js',
      'dist/index.d.ts',
      'dist/cli/main.js',
      'docs/limits.md',
      'docs/errors.md',
      'native/prebuilt/linux-x64/libwarmfork-shim.so',
      'native/prebuilt/linux-x64/warmfork-guard',
      'native/prebuilt/linux-x64/warmfork-init',
      'dist/agents/node/agent.cjs',
      'dist/agents/node/worker.js',
      'src/agents/python/sitecustomize.py',
      'src/agents/python/warmfork/__init__.py',
      'src/agents/ruby/warmfork/agent.rb',
    ]
    expect(needed.filter((path) => !paths().includes(path))).toEqual([])
  })

  test('has nothing else', () => {
    const allowed =
      /^(package\.json|README\.md|CHANGELOG\.md|LICENSE|dist\/.+\.(js|cjs|d\.ts|d\.cts)|src\/agents\/(python|ruby)\/.+\.(py|pyi|typed|rb)|docs\/.+\.(md|svg)|native\/prebuilt\/linux-x64\/[\w.-]+)$/
    expect(paths().filter((path) => !allowed.test(path))).toEqual([])
    expect(paths().filter((path) => /test|fixture|bench|\.map$/.test(path))).toEqual([])
  })

  test('is small', () => {
    expect(packed.reduce((sum, { size }) => sum + size, 0)).toBeLessThan(2_000_000)
  })

  test('has native programs that can be executed', () => {
    // The mode of the command itself is npm's to set.
    const programs = packed.filter(({ path }) => /native\/.*\/warmfork-/.test(path))
    expect(programs.length).toBeGreaterThan(0)
    expect(programs.filter(({ mode }) => (mode & 0o111) !== 0o111)).toEqual([])
  })

  test('passes publint', async () => {
    const { publint } = await import('publint')
    const { formatMessage } = await import('publint/utils')
    const { messages, pkg } = await publint({ pkgDir: join(project, 'node_modules', name), pack: false, strict: true })
    expect(messages.map((message) => formatMessage(message, pkg!))).toEqual([])
  })

  test('has no dependency that its code does not import, and imports none that it does not have', async () => {
    const dist = join(project, 'node_modules', name, 'dist')
    const code = paths()
      .filter((path) => /^dist\/.*\.c?js$/.test(path))
      .map((path) => readFileSync(join(dist, '..', path), 'utf8'))
      .join('\n')
    const imported = [...code.matchAll(/(?<!')(?:from|import\(?|\.resolve\()\s*'([^'./\s][^'\s]*)'/g)].map(
      ([, specifier]) => specifier!,
    )
    const packages = imported
      .filter((specifier) => !specifier.startsWith('node:'))
      .map((specifier) =>
        specifier
          .split('/')
          .slice(0, specifier.startsWith('@') ? 2 : 1)
          .join('/'),
      )
    expect([...new Set(packages)].filter((one) => one !== name).sort()).toEqual(Object.keys(dependencies).sort())
  })
})

describe('installed into an empty project', () => {
  test('the command says its version', async () => {
    const { stdout, status } = await run('npx', ['--no-install', 'warmfork', '--version'])
    expect({ stdout, status }).toEqual({ stdout: `${version}\n`, status: 0 })
  })

  test('an ES module can import it', async () => {
    writeFileSync(
      join(project, 'use.mjs'),
      `import * as warmfork from 'warmfork'\nconsole.log(Object.keys(warmfork).sort().join(' '), typeof warmfork.Supervisor.start)\n`,
    )
    const { stdout, stderr } = await run(process.execPath, ['use.mjs'])
    expect({ stdout, stderr }).toEqual({
      stdout: 'Child ERROR_CODES Supervisor WarmforkError exportGeneration importGeneration function\n',
      stderr: '',
    })
  })

  test('require works where Node can require modules, and else names the cause', async () => {
    writeFileSync(join(project, 'use.cjs'), `console.log(typeof require('warmfork').Supervisor)\n`)
    const { stdout, stderr } = await run(process.execPath, ['--no-warnings', 'use.cjs'])
    if (process.features.require_module) expect(stdout).toBe('function\n')
    else expect(stderr).toMatch(/ERR_REQUIRE_ESM|ERR_PACKAGE_PATH_NOT_EXPORTED/)
  })

  test('a program that runs a supervisor works', async () => {
    writeFileSync(
      join(project, 'fork.mjs'),
      `import { Supervisor } from 'warmfork'
const supervisor = await Supervisor.start({
  command: ['sh', '-c', 'echo ready; read line; echo "got $line"; exit 3'], ready: { output: 'ready' },
  store: ${JSON.stringify(join(work, 'store'))}, runtimeDirectory: ${JSON.stringify(join(work, 'run'))},
})
try {
  const child = await supervisor.fork()
  child.stdin.end('hello\\n')
  for await (const line of child.lines()) console.log(line)
  console.log(supervisor.engine, JSON.stringify(await child.exit))
} finally {
  await supervisor.stop()
}
`,
    )
    const { stdout, stderr } = await run(process.execPath, ['fork.mjs'])
    expect({ stdout, stderr }).toEqual({ stdout: 'got hello\ncriu {"code":3,"signal":null}\n', stderr: '' })
  })

  test('its types hold in a strict project, with and without the library check', async () => {
    const readme = readFileSync(join(root, 'README.md'), 'utf8')
    writeFileSync(join(project, 'sample.ts'), /```ts\n(.*?)```/s.exec(readme)![1]!)
    writeFileSync(
      join(project, 'types.ts'),
      `import { type Child, type ErrorCode, type ExitStatus, Supervisor, WarmforkError } from 'warmfork'
const supervisor: Supervisor = await Supervisor.start({ command: ['a'], log: 'info' }, { signal: AbortSignal.timeout(1) })
const child: Child = await supervisor.fork({ stdio: [0, 1, 2] })
const status: ExitStatus = await child.exit
supervisor.on('progress', (phase, elapsedMs) => console.log(phase.length, elapsedMs.toFixed(1), status.signal))
// @ts-expect-error no program
await Supervisor.start({ command: [] })
// @ts-expect-error no such option
await Supervisor.start({ command: ['a'], pools: {} })
export const code: ErrorCode | undefined = new Error() instanceof WarmforkError ? 'TIMEOUT' : undefined
`,
    )
    // The types of Node are the user's to have; here they are those of this repository.
    mkdirSync(join(project, 'node_modules/@types'), { recursive: true })
    for (const one of ['node'])
      symlinkSync(join(root, 'node_modules/@types', one), join(project, 'node_modules/@types', one))
    symlinkSync(join(root, 'node_modules/undici-types'), join(project, 'node_modules/undici-types'))
    writeFileSync(
      join(project, 'tsconfig.json'),
      JSON.stringify({
        compilerOptions: {
          ...{ strict: true, module: 'NodeNext', target: 'ES2022', noEmit: true, types: ['node'] },
          lib: ['ES2023', 'ESNext.Disposable'],
          exactOptionalPropertyTypes: true,
          preserveSymlinks: true,
        },
        files: ['sample.ts', 'types.ts'],
      }),
    )
    const tsc = join(root, 'node_modules/typescript/bin/tsc')
    expect(await run(process.execPath, [tsc, '--skipLibCheck'])).toEqual({ stdout: '', stderr: '', status: 0 })
    expect(await run(process.execPath, [tsc])).toEqual({ stdout: '', stderr: '', status: 0 })
  })

  test('the doctor runs, and forks work from there', async () => {
    const { stdout, status } = await run('npx', [
      '--no-install',
      'warmfork',
      'doctor',
      '--json',
      '--store',
      join(work, 'store'),
    ])
    const report = JSON.parse(stdout)
    expect(report.checks.filter((check: { status: string }) => check.status === 'fail')).toEqual([])
    expect(status).toBe(0)
    // A user's project has no sources to compile.
    expect(report.checks.map((check: { name: string }) => check.name)).not.toContain('compiler')
  })
})
