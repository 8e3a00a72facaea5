import { type ChildProcess, spawn, spawnSync } from 'node:child_process'
import { chmodSync, copyFileSync, mkdirSync, mkdtempSync, readdirSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest'
import { isAlive, mappings } from '../src/linux/proc.js'
import {
  carriesShim,
  installShim,
  isGoProgram,
  preloadEnvironment,
  REUSEPORT_VARIABLE,
  SHIM_NAME,
  seesProc,
  shimPath,
  whyNotPreloadable,
  whyWithoutShim,
} from '../src/shim/shim.js'

const root = new URL('..', import.meta.url).pathname
const fixtures = join(root, 'test/fixtures/shim')
const TIMEOUT_MS = 60_000

/** Programs and shims that the tests build; readable for every user. */
let built: string
let shim: string
/** The shim as it is on kernels before 6.11. */
let textShim: string

function compile(compiler: string, args: string[]): void {
  const run = spawnSync(compiler, args, { encoding: 'utf8', timeout: TIMEOUT_MS })
  if (run.error) {
    const hint = compiler === 'musl-gcc' ? 'apt-get install musl-tools' : 'apt-get install gcc'
    throw new Error(`the tests need ${compiler}: ${hint}`, { cause: run.error })
  }
  if (run.status !== 0) throw new Error(`${compiler} ${args.join(' ')}:\n${run.stderr}`)
}

beforeAll(() => {
  const run = spawnSync(process.execPath, ['scripts/build-native.mjs'], {
    cwd: root,
    encoding: 'utf8',
    timeout: TIMEOUT_MS,
  })
  expect(run.stderr).toBe('')
  shim = shimPath()!
  built = mkdtempSync(join(tmpdir(), 'warmfork-shim-'))
  chmodSync(built, 0o755)
  for (const [compiler, suffix] of [
    ['gcc', 'glibc'],
    ['musl-gcc', 'musl'],
  ] as const) {
    for (const name of ['memory', 'launch', 'binder']) {
      compile(compiler, [
        '-O1',
        '-Wall',
        '-Werror',
        '-pthread',
        '-o',
        join(built, `${name}-${suffix}`),
        join(fixtures, `${name}.c`),
      ])
    }
  }
  compile('gcc', ['-shared', '-fPIC', '-o', join(built, 'mapper.so'), join(fixtures, 'mapper.c')])
  mkdirSync(join(built, 'text'))
  textShim = join(built, 'text', SHIM_NAME)
  compile('gcc', [
    ...[
      '-O2',
      '-fPIC',
      '-shared',
      '-nostdlib',
      '-ffreestanding',
      '-fno-builtin',
      '-fno-stack-protector',
      '-fvisibility=hidden',
    ],
    ...['-fno-tree-loop-distribute-patterns', '-DWARMFORK_NO_PROCMAP', '-o', textShim, join(root, 'src/shim/shim.c')],
  ])
}, 2 * TIMEOUT_MS)

afterAll(() => rmSync(built, { recursive: true, force: true }))

let running: ChildProcess[] = []

afterEach(async () => {
  for (const child of running) {
    if (child.exitCode !== null || child.signalCode !== null) continue
    const ended = new Promise((resolve) => child.once('exit', resolve))
    child.kill('SIGKILL')
    await ended
  }
  running = []
})

const plainEnvironment = { PATH: process.env.PATH ?? '/usr/bin:/bin', HOME: process.env.HOME ?? '/' }

function run(
  command: string,
  args: string[],
  env: Record<string, string> = {},
): { status: number | null; output: string } {
  const { status, stdout, stderr, error } = spawnSync(command, args, {
    env: { ...plainEnvironment, ...env },
    cwd: built,
    encoding: 'utf8',
    timeout: TIMEOUT_MS,
  })
  return { status, output: `${stdout}${stderr}${error ? error.message : ''}`.trim() }
}

const preloaded = (...libraries: string[]) => ({ LD_PRELOAD: libraries.join(':') })
const isInstalled = (command: string) => spawnSync(command, ['--version'], { timeout: TIMEOUT_MS }).error === undefined

const memoryCases: Array<[name: string, behaviour: string]> = [
  ['small', 'a page that is discarded reads as zeros, and its neighbours as before'],
  ['large', 'many pages that are discarded read as zeros'],
  ['free', 'MADV_FREE is taken, and gives zeros'],
  [
    'crossing',
    'a range over anonymous, page-file, foreign and shared mappings and a hole is discarded each by its kind',
  ],
  ['refused', 'what the kernel refuses is refused, and other advice changes nothing'],
  ['locked', 'locked memory is discarded only where the kernel would'],
  ['guard', 'a guard that is taken away uncovers zeros'],
  ['by_number', 'calls through syscall() and process_madvise behave alike'],
  ['other_calls', 'io_uring and protection keys are not there, other calls get all their arguments'],
  ['shrink_grow', 'what was cut off by mremap does not come back'],
  ['unmap_grow', 'what was unmapped does not come back by a growth'],
  ['grow_blocked', 'a mapping that cannot grow in place is moved, or refused'],
  ['split_grow', 'a range that discarding has split grows by one mremap'],
  ['split_fixed', 'a range that discarding has split is moved to a given address'],
  ['dontunmap', 'MREMAP_DONTUNMAP leaves zeros behind'],
  ['foreign_remap', 'mremap of other mappings stays with the kernel'],
  ['threads', 'eight threads discard and move at once'],
  ['first_thread_ended', 'a process whose first thread has ended is served'],
  ['closed_descriptors', 'a process that has closed all its descriptors is served'],
  ['descriptor_limit', 'a process at its limit of descriptors is served'],
  ['no_proc', 'without /proc discarding fails rather than giving old bytes'],
  ['map_limit', 'a process that may have no more mappings gets zeros'],
  ['handler', 'a signal handler on a small stack may discard'],
  ['long_name', 'a page file with a very long path is known'],
]

describe.each(['glibc', 'musl'])('memory of a page file, on %s', (libc) => {
  it.each(memoryCases)('%s: %s', (name) => {
    expect(run(join(built, `memory-${libc}`), [name, built], preloaded(shim))).toEqual({ status: 0, output: '' })
  })

  it.each(memoryCases)('%s without PROCMAP_QUERY: %s', (name) => {
    expect(run(join(built, `memory-${libc}`), [name, built], preloaded(textShim))).toEqual({ status: 0, output: '' })
  })

  it('holds what anonymous memory would after random walks', () => {
    for (let seed = 1; seed <= 12; seed++) {
      const library = seed % 3 === 0 ? textShim : shim
      const result = run(join(built, `memory-${libc}`), ['walk', built, `${seed}`], preloaded(library))
      expect({ seed, ...result }).toEqual({ seed, status: 0, output: '' })
    }
  })
})

it('without the shim the old bytes come back, so that the cases above can fail', () => {
  const failing = ['small', 'free', 'shrink_grow', 'dontunmap', 'split_grow', 'other_calls']
  const passed = failing.filter((name) => run(join(built, 'memory-glibc'), [name, built]).status === 0)
  expect(passed).toEqual([])
})

describe.each(['glibc', 'musl'])('bind, on %s', (libc) => {
  it('leaves sockets alone where it is not asked', () => {
    expect(run(join(built, `binder-${libc}`), [], preloaded(shim)).output).toBe('0/0:0 0/0:0 0/0:0 0/0:0 0/0:0 -1/22:0')
  })

  it('sets SO_REUSEPORT on TCP sockets with a port where it is asked', () => {
    const env = { ...preloaded(shim), [REUSEPORT_VARIABLE]: '1' }
    expect(run(join(built, `binder-${libc}`), [], env).output).toBe('0/0:1 0/0:1 0/0:0 0/0:0 0/0:0 -1/22:0')
  })

  it('is asked by the value 1 only', () => {
    const env = { ...preloaded(shim), [REUSEPORT_VARIABLE]: '10' }
    expect(run(join(built, `binder-${libc}`), [], env).output).toMatch(/^0\/0:0 /)
  })
})

const ways = [
  ...['execve', 'execv', 'execvp', 'execvpe', 'execl', 'execlp', 'execle', 'fexecve', 'execveat', 'syscall'],
  ...['posix_spawn', 'posix_spawnp', 'system', 'popen', 'vfork'],
]

describe.each(['glibc', 'musl'])('programs that a %s program starts', (libc) => {
  // The libraries named here do not exist: the loader says so and goes on, and the names stay in the variable.
  const other = '/nonexistent/libother.so'
  const launch = (mode: 'MAPPED' | 'PLAIN', way: string, preload: string) => {
    const { stdout } = spawnSync(join(built, `launch-${libc}`), [mode, way], {
      env: { ...plainEnvironment, OTHER: 'kept', LD_PRELOAD: preload },
      encoding: 'utf8',
      timeout: TIMEOUT_MS,
    })
    return stdout.split('\n')[0]
  }

  it.each(ways)('carry the shim when a template starts them with %s', (way) => {
    expect(launch('PLAIN', way, shim)).toBe(`[${shim}] kept zero`)
  })

  it.each(ways)('do not carry the shim when a fork starts them with %s', (way) => {
    expect(launch('MAPPED', way, shim)).toMatch(/^\[(unset)?\] kept zero$/)
  })

  it.each(ways)('keep the other preloaded libraries when a fork starts them with %s', (way) => {
    for (const preload of [`${other}:${shim}`, `${shim}:${other}`, `${shim} ${other}`, `:${shim}:${other}:${shim}:`]) {
      expect({ preload, got: launch('MAPPED', way, preload) }).toEqual({ preload, got: `[${other}] kept zero` })
    }
    const both = `/nonexistent/a.so:${shim}:/nonexistent/b.so`
    expect(launch('MAPPED', way, both)).toBe('[/nonexistent/a.so:/nonexistent/b.so] kept zero')
  })

  it('fail as they would without it', () => {
    expect(launch('MAPPED', 'posix_spawn_fails', shim)).toBe('ENOENT')
    expect(run(join(built, `launch-${libc}`), ['MAPPED', 'execvp_fails'], preloaded(shim)).output).toBe(
      'execvp: No such file or directory',
    )
    expect(launch('MAPPED', 'system_null', shim)).toBe('yes')
  })
})

describe('programs that a fork of a runtime starts', () => {
  const print = 'echo "[$LD_PRELOAD]"'
  /** `mapper.so` maps a page file into the runtime, as in a fork, and stays preloaded as a library of the user's. */
  const inFork = (command: string, args: string[]) => run(command, args, preloaded(join(built, 'mapper.so'), shim))
  const inTemplate = (command: string, args: string[]) => run(command, args, preloaded(shim))

  const node = `const c = require('child_process')
    console.log(c.execFileSync('sh', ['-c', '${print}'], { encoding: 'utf8' }) + c.execSync('${print}', { encoding: 'utf8', env: { ...process.env } }))`
  const python = `import os, subprocess, sys
a = ['sh', '-c', '${print}']
for kw in ({}, {'close_fds': False}, {'env': dict(os.environ)}, {'start_new_session': True}): sys.stdout.write(subprocess.run(a, stdout=subprocess.PIPE, text=True, **kw).stdout)
sys.stdout.flush()
os.posix_spawn('/bin/sh', a, os.environ) and os.wait()
os.system('${print}')`
  const ruby = `puts \`${print}\`; $stdout.flush; system('${print}'); system(ENV.to_h, 'sh', '-c', '${print}'); Process.wait(spawn('${print}')); exec('${print}')`
  const bash = `${print}; sh -c '${print}'; (${print}); env sh -c '${print}' | cat; exec sh -c '${print}'`

  const lines = (output: string) => [...new Set(output.split('\n').filter((line) => line.startsWith('[')))]

  it.each([
    ['node', [process.execPath, ['-e', node]]],
    ['python3', ['python3', ['-c', python]]],
    ['ruby', ['ruby', ['-e', ruby]]],
  ] as Array<[string, [string, string[]]]>)('%s', (name, [command, args]) => {
    if (!isInstalled(command)) throw new Error(`the tests need ${name}`)
    expect(lines(inFork(command, args).output)).toEqual([`[${join(built, 'mapper.so')}]`])
    expect(lines(inTemplate(command, args).output)).toEqual([`[${shim}]`])
  })

  it('bash', () => {
    // What the shell itself knows of the variable is its own affair; what it starts is ours.
    const [, ...started] = inFork('bash', ['-c', bash]).output.split('\n')
    expect(started.filter((line) => !line.includes(shim))).toHaveLength(3)
    expect(lines(inTemplate('bash', ['-c', bash]).output)).toEqual([`[${shim}]`])
  })

  it.each(['POSIX_SPAWN', 'VFORK', 'FORK'])(
    'java, with its launch mechanism %s',
    (mechanism) => {
      if (!isInstalled('java')) throw new Error('the tests need java: apt-get install default-jdk-headless')
      writeFileSync(
        join(built, 'Launch.java'),
        `import java.util.*; public class Launch { public static void main(String[] a) throws Exception {
        new ProcessBuilder("sh", "-c", "echo [$LD_PRELOAD] $WARMFORK_STRIP").inheritIO().start().waitFor();
        ProcessBuilder b = new ProcessBuilder("sh", "-c", "echo [$LD_PRELOAD] $WARMFORK_STRIP"); b.environment().put("X", "1");
        b.inheritIO().start().waitFor(); } }`,
      )
      const args = [
        '-Xshare:auto',
        '-XX:TieredStopAtLevel=1',
        `-Djdk.lang.Process.launchMechanism=${mechanism}`,
        join(built, 'Launch.java'),
      ]
      expect(lines(inFork('java', args).output)).toEqual([`[${join(built, 'mapper.so')}]`])
      expect(lines(inTemplate('java', args).output)).toEqual([`[${shim}]`])
    },
    TIMEOUT_MS,
  )
})

describe('the boot of a template', () => {
  const script = `const maps = require('fs').readFileSync('/proc/self/maps', 'utf8')
    console.log(maps.includes('/${SHIM_NAME}') && process.env.LD_PRELOAD)`

  it.each([
    ['#!/usr/bin/env node', './boot.js', []],
    ['sh -c', 'sh', ['-c', 'sh -c ./boot.js']],
    ['npx', 'npx', ['--no', '-c', 'node ./boot.js']],
    ['npm exec of a local bin', 'npx', ['--no', 'boot']],
    ['bash and env', 'bash', ['-c', 'true; env X=1 nice node boot.js; true']],
  ] as Array<[string, string, string[]]>)('keeps the shim through %s', (_name, command, args) => {
    writeFileSync(join(built, 'boot.js'), `#!/usr/bin/env node\n${script}\n`)
    chmodSync(join(built, 'boot.js'), 0o755)
    mkdirSync(join(built, 'node_modules/.bin'), { recursive: true })
    copyFileSync(join(built, 'boot.js'), join(built, 'node_modules/.bin/boot'))
    chmodSync(join(built, 'node_modules/.bin/boot'), 0o755)
    expect(run(command, args, preloaded(shim))).toEqual({ status: 0, output: shim })
  })
})

describe('preloadEnvironment', () => {
  it('puts the shim last, once, and keeps the rest', () => {
    expect(preloadEnvironment({ A: 'b' }, '/x/libwarmfork-shim.so')).toEqual({
      A: 'b',
      LD_PRELOAD: '/x/libwarmfork-shim.so',
    })
    const env = { LD_PRELOAD: '/usr/lib/libjemalloc.so.2 /old/libwarmfork-shim.so:/b.so' }
    expect(preloadEnvironment(env, '/x/libwarmfork-shim.so').LD_PRELOAD).toBe(
      '/usr/lib/libjemalloc.so.2:/b.so:/x/libwarmfork-shim.so',
    )
  })

  it('leaves the environment as it is where the path cannot be preloaded, and says why', () => {
    expect(preloadEnvironment({ A: 'b' }, '/with space/libwarmfork-shim.so')).toEqual({ A: 'b' })
    expect(whyNotPreloadable('/with space/libwarmfork-shim.so')).toMatch(/holds a space/)
    expect(whyNotPreloadable(undefined)).toMatch(/was not built/)
    expect(whyNotPreloadable(shim)).toBeUndefined()
  })

  it('has a copy of the shim where other users can read it', () => {
    const copy = installShim(join(built, 'copy'))!
    expect(installShim(join(built, 'copy'))).toBe(copy)
    expect(readdirSync(join(built, 'copy'))).toEqual([SHIM_NAME])
    expect(run(join(built, 'memory-glibc'), ['small', built], preloaded(copy))).toEqual({ status: 0, output: '' })
  })
})

describe('whether a process carries the shim', () => {
  async function start(command: string, args: string[], options: { env?: Record<string, string>; uid?: number } = {}) {
    const child = spawn(command, args, { stdio: 'ignore', ...options, env: { ...plainEnvironment, ...options.env } })
    running.push(child)
    const pid = child.pid!
    const { env } = options
    // Ready once the program itself is mapped, and sleeps.
    for (let i = 0; i < 500; i++) {
      const maps = mappings(pid) ?? []
      if (maps.some(({ path }) => path.endsWith(command.slice(command.lastIndexOf('/')))) && maps.length > 4) break
      await new Promise((resolve) => setTimeout(resolve, 10))
    }
    await new Promise((resolve) => setTimeout(resolve, 100))
    expect(isAlive(pid), `${command} with ${JSON.stringify(env)}`).toBe(true)
    return pid
  }

  it('is seen in its mappings', async () => {
    const withShim = await start('/bin/sleep', ['100'], { env: preloaded(shim) })
    expect([carriesShim(withShim), whyWithoutShim(withShim), seesProc(withShim), isGoProgram(withShim)]).toEqual([
      true,
      undefined,
      true,
      false,
    ])
    expect(carriesShim(process.pid)).toBe(false)
  })

  it('is known to be impossible for a static program, and for one of Go', async () => {
    const source = join(built, 'static.c')
    writeFileSync(source, '#include <unistd.h>\nint main(void) { for (;;) pause(); }\n')
    compile('gcc', ['-static', '-o', join(built, 'static'), source])
    const plain = await start(join(built, 'static'), [], { env: preloaded(shim) })
    expect([carriesShim(plain), whyWithoutShim(plain), isGoProgram(plain)]).toEqual([
      false,
      'The process is a static program, which loads no libraries and so no preload shim.',
      false,
    ])
    writeFileSync(
      source,
      '#include <unistd.h>\n__attribute__((section(".go.buildinfo"), used)) char mark[16] = "x";\nint main(void) { for (;;) pause(); }\n',
    )
    compile('gcc', ['-static', '-o', join(built, 'static-go'), source])
    const go = await start(join(built, 'static-go'), [], { env: preloaded(shim) })
    expect([isGoProgram(go), whyWithoutShim(go)]).toEqual([true, expect.stringContaining('a static Go program')])
  })

  it('is explained where the environment was cleared, or names no file', async () => {
    const cleared = await start('/bin/sleep', ['100'])
    expect(whyWithoutShim(cleared)).toMatch(/^LD_PRELOAD does not name the shim .* cleared it\.$/)
    const missing = await start('/bin/sleep', ['100'], { env: preloaded('/nonexistent/libwarmfork-shim.so') })
    expect(whyWithoutShim(missing)).toMatch(/^The process cannot see \/nonexistent\/libwarmfork-shim\.so/)
  })

  it.runIf(process.getuid?.() === 0)(
    'is explained for a setuid program, and for a user who cannot read the shim',
    async () => {
      const program = join(built, 'setuid-sleep')
      copyFileSync('/bin/sleep', program)
      chmodSync(program, 0o4755)
      const readable = installShim(join(built, 'copy'))!
      const setuid = await start(program, ['100'], { env: preloaded(readable), uid: 65534 })
      expect(whyWithoutShim(setuid)).toMatch(/^The program is setuid/)
      const hidden = join(built, 'hidden')
      installShim(hidden)
      chmodSync(hidden, 0o700)
      const unreadable = await start('/bin/sleep', ['100'], { env: preloaded(join(hidden, SHIM_NAME)), uid: 65534 })
      expect(whyWithoutShim(unreadable)).toMatch(/cannot read it/)
    },
  )

  it('has no answer for a process that is gone', () => {
    const { pid } = spawnSync('true')
    expect([carriesShim(pid), whyWithoutShim(pid), isGoProgram(pid)]).toEqual([false, undefined, false])
  })
})
