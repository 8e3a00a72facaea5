/** Starts of a supervisor from what an earlier one has left on disk. Boots are counted by a file that the program writes to. */
import { execFileSync, spawn } from 'node:child_process'
import { once } from 'node:events'
import {
  appendFileSync,
  chownSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  utimesSync,
  writeFileSync,
} from 'node:fs'
import { request } from 'node:http'
import { createServer } from 'node:net'
import { join } from 'node:path'
import { text } from 'node:stream/consumers'
import { describe, expect, test } from 'vitest'
import { exportGeneration, importGeneration } from '../src/archive.js'
import { encodeManifest, type Manifest, readManifest } from '../src/generations/manifest.js'
import { environment } from '../src/linux/proc.js'
import type { SupervisorOptions } from '../src/options.js'
import type { Supervisor } from '../src/supervisor.js'
import { CLI } from './cli-harness.js'
import { eventually, PROGRAMS } from './engines-under-test.js'
import { useCleanPlace } from './leftovers.js'
import { SupervisorProcess } from './supervisor-process.js'

const place = useCleanPlace()
const inPlace = (name: string) => join(place.current.directory, name)
const boots = () => (existsSync(inPlace('boots')) ? readFileSync(inPlace('boots'), 'utf8').split('\n').length - 1 : 0)

interface Answer {
  pid: number
  boot: number
  hits: number
  greeting: string
}

type At = { port: number; host?: string } | { socketPath: string }

/** What a server answers; the code of the error where there is none. */
function get(at: At): Promise<Answer | string> {
  return new Promise((resolve) => {
    const asked = request({ ...at, path: '/' }, async (response) => resolve(JSON.parse(await text(response))))
    asked.once('error', (error: NodeJS.ErrnoException) => resolve(error.code ?? String(error))).end()
  })
}

async function freePort(host = '127.0.0.1'): Promise<number> {
  const server = createServer()
  await new Promise<void>((resolve) => server.listen(0, host, resolve))
  const { port } = server.address() as { port: number }
  await new Promise((resolve) => server.close(resolve))
  return port
}

/** The program, copied to where it can be edited. */
function options(more: Partial<SupervisorOptions> = {}, ...addresses: string[]): Partial<SupervisorOptions> {
  const worker = join(PROGRAMS, '../../../dist/agents/node/worker.js')
  const files = {
    'server.mjs': readFileSync(join(PROGRAMS, 'restart-server.mjs'), 'utf8'),
    'greeting.mjs': "export const greeting = 'hello'\n",
    'worker.mjs': `export { worker } from ${JSON.stringify(worker)}\n`,
  }
  for (const [name, content] of Object.entries(files)) {
    if (!existsSync(inPlace(name))) writeFileSync(inPlace(name), content)
  }
  return {
    command: [process.execPath, inPlace('server.mjs'), inPlace('boots'), ...addresses],
    name: 'shop',
    reuse: true,
    pool: { size: 1 },
    ...more,
  }
}

const start = (more: Partial<SupervisorOptions> = {}, ...addresses: string[]) =>
  place.current.start(options(more, ...addresses))

/** One that makes a generation and is stopped. */
async function first(more: Partial<SupervisorOptions> = {}, ...addresses: string[]): Promise<void> {
  const supervisor = await start(more, ...addresses)
  await supervisor.stop()
}

const said = (supervisor: Supervisor) =>
  supervisor.warnings.filter(({ kind }) => kind === 'reuse').map(({ message }) => message)

async function say(supervisor: Supervisor, words = 'well'): Promise<string> {
  const child = await supervisor.fork()
  child.stdin.write(`${words}\n`)
  for await (const line of child.lines()) return line.replace(/^\d+ /, '')
  throw new Error('no answer')
}

const generationDirectory = (number: number) => join(place.current.directory, 'store/shop/generations', String(number))

/** Writes a manifest anew, as if another machine had made it. */
async function changeManifest(number: number, change: (manifest: Manifest) => void): Promise<void> {
  const manifest = await readManifest(generationDirectory(number), number)
  change(manifest)
  const path = join(generationDirectory(number), 'manifest.json')
  rmSync(path)
  writeFileSync(path, encodeManifest(manifest), { mode: 0o400 })
}

describe('a start with `reuse`', () => {
  test('boots where there is nothing yet, without a word, and the next one does not', async () => {
    const supervisor = await start()
    expect(boots()).toBe(1)
    expect(said(supervisor)).toEqual([])
    await supervisor.stop()
    const phases: string[] = []
    const again = await place.current.start(options(), {
      onCreate: (created) => created.on('progress', (phase) => phases.push(phase)),
    })
    expect(boots()).toBe(1)
    expect(phases).toEqual(['reuse', 'pool'])
    expect(again.template).toBe(undefined)
    expect(again.generation).toBe(1)
    expect(await say(again)).toBe('1 hello well')
    expect((await again.stats()).generation).toBe(1)
  })

  test('can be made again and again, also after kill -9 with children that run', async () => {
    const port = await freePort()
    await first({}, String(port))
    const killed = new SupervisorProcess(place.current.options(options({}, String(port))))
    await killed.reached('running')
    const pids = [await killed.fork(), await killed.fork()]
    expect(pids).toContain(((await get({ port })) as Answer).pid)
    await killed.kill()
    const supervisor = await start({}, String(port))
    const child = await supervisor.fork()
    expect(await get({ port })).toMatchObject({ pid: child.pid, boot: 1 })
    await supervisor.stop()
    const last = await start({}, String(port))
    const other = await last.fork()
    expect(await get({ port })).toMatchObject({ pid: other.pid, boot: 1, hits: 1 })
    expect(boots()).toBe(1)
  })

  test('has its own mark on its children, not that of the supervisor that booted them', async () => {
    await first()
    const supervisor = await start()
    const child = await supervisor.fork()
    const marks = environment(child.pid)!.filter((entry) => entry.startsWith('WARMFORK_ID_'))
    const [run] = readdirSync(join(place.current.runtimeDirectory, 'shop')).filter((name) => name.startsWith('run-'))
    expect(marks).toEqual([`WARMFORK_ID_${run!.slice('run-'.length)}=1`])
  })

  test('is a base for reforks, whose generations the next start begins with', async () => {
    const port = await freePort()
    await first({}, String(port))
    const supervisor = await start({}, String(port))
    const child = await supervisor.fork()
    for (let i = 0; i < 5; i++) await get({ port })
    const { number } = await supervisor.refork({ from: child })
    await supervisor.stop()
    const last = await start({}, String(port))
    expect(last.generation).toBe(number)
    await last.fork()
    expect(await get({ port })).toMatchObject({ boot: 1, hits: 6 })
    expect(boots()).toBe(1)
  })

  test('gives forks their secrets, arguments and environment', async () => {
    const more = { env: { ...process.env, GREETING: 'of the first' }, template: { secrets: ['GREETING'] } }
    const port = await freePort()
    await first(more, String(port))
    const supervisor = await start({ ...more, env: { ...process.env, GREETING: 'of the second' } }, String(port))
    await supervisor.fork()
    expect(await get({ port })).toMatchObject({ env: 'of the second', boot: 1 })
  })

  test('has programs fork by themselves', async () => {
    await first()
    const supervisor = await start()
    const pid = Number((await say(supervisor, 'fork')).replace('forked ', ''))
    expect(supervisor.children.map((child) => child.pid)).toContain(pid)
    expect(boots()).toBe(1)
  })

  test('keeps workers running', async () => {
    const port = await freePort()
    await first({ workers: 2 }, String(port))
    const supervisor = await start({ workers: 2, pool: { size: 0 } }, String(port))
    await eventually(() => supervisor.workers.workers.length === 2, 'two workers')
    expect(await get({ port })).toMatchObject({ boot: 1 })
  })

  test('gives forks terminals', async () => {
    await first({ template: { tty: true } })
    const supervisor = await start({ template: { tty: true } })
    const child = await supervisor.fork()
    child.terminal.write('hi\r')
    let output = ''
    for await (const chunk of child.terminal) {
      output += chunk
      if (output.includes('1 hello hi')) break
    }
    expect(boots()).toBe(1)
  })
})

describe('a generation that the start is not sure of', () => {
  const verdicts = () => inPlace('store/shop/verdicts.json')
  const change = (more: object) =>
    writeFileSync(verdicts(), JSON.stringify({ ...JSON.parse(readFileSync(verdicts(), 'utf8')), ...more }))

  /** Leaves generation 1 of the template, and generation 2 of a fork. */
  async function two(): Promise<void> {
    const supervisor = await start()
    await supervisor.refork({ from: await supervisor.fork() })
    await supervisor.stop()
  }

  test('that was made by a refork and not tried, is tried first', async () => {
    await two()
    change({ approved: [] })
    const supervisor = await start()
    expect(supervisor.generation).toBe(2)
    expect(JSON.parse(readFileSync(verdicts(), 'utf8')).approved).toEqual([2])
  })

  test('is rejected where it does not pass, and the one before is used', async () => {
    await two()
    change({ approved: [] })
    const check = () => {
      throw new Error('wrong answers')
    }
    const supervisor = await start({ trial: { check } })
    expect(supervisor.generation).toBe(1)
    expect(supervisor.whyRejected(2)).toMatch(/wrong answers/)
    expect(await say(supervisor)).toBe('1 hello well')
  })

  test('that cannot be restored is rejected, and the program is booted at the same port', async () => {
    const port = await freePort()
    await first({}, String(port))
    // Nothing hands its listening socket in.
    await changeManifest(1, (manifest) => {
      ;(manifest.engineData as { listeners: unknown[] }).listeners = []
    })
    const supervisor = await start({}, String(port))
    expect(boots()).toBe(2)
    expect(supervisor.generation).toBe(2)
    expect(supervisor.whyRejected(1)).toBeDefined()
    expect(said(supervisor)).toHaveLength(2)
  })

  test('goes before newer ones where it is pinned', async () => {
    const supervisor = await start()
    await supervisor.refork({ from: await supervisor.fork() })
    await supervisor.pin(1)
    await supervisor.stop()
    const again = await start()
    expect([again.generation, again.pinned]).toEqual([1, 1])
  })
})

describe('what a generation needs', () => {
  test('is made again where it is gone: a log, and a path that a killed supervisor has left', async () => {
    const path = inPlace('server.sock')
    await first({}, path)
    const killed = new SupervisorProcess(place.current.options(options({}, path)))
    await killed.reached('running')
    await killed.fork()
    expect(await get({ socketPath: path })).toMatchObject({ boot: 1 })
    await killed.kill()
    rmSync(inPlace('boots.log'))
    const supervisor = await start({}, path)
    expect(await say(supervisor)).toBe('1 hello well')
    expect(await get({ socketPath: path })).toMatchObject({ boot: 1, pid: supervisor.children[0]!.pid })
    expect(readFileSync(inPlace('boots.log'), 'utf8')).toBe('well\n')
  })

  test('can come from an archive', async () => {
    const port = await freePort()
    const reuse = { watch: ['*.mjs'] }
    await first({ reuse }, String(port))
    const [store, file] = [inPlace('other'), inPlace('shop.tar')]
    await exportGeneration({ name: 'shop', store: inPlace('store'), file })
    const { number } = await importGeneration({ name: 'shop', store, file })
    const supervisor = await start({ store, reuse }, String(port))
    expect([supervisor.generation, boots()]).toEqual([number, 1])
    const child = await supervisor.fork()
    expect(await get({ port })).toMatchObject({ pid: child.pid, boot: 1 })
  })

  test.runIf(process.getuid?.() === 0)('is there for another user and with kept ids too', async () => {
    const path = join(place.current.directory, 'theirs/server.sock')
    mkdirSync(inPlace('theirs'))
    chownSync(inPlace('theirs'), 65_534, 65_534)
    for (const name of ['boots', 'boots.log']) {
      writeFileSync(inPlace(name), '')
      chownSync(inPlace(name), 65_534, 65_534)
    }
    const cwd = inPlace('theirs')
    for (const more of [
      { cwd, user: 'nobody', group: 'nogroup' },
      { cwd, identity: 'namespace' as const },
    ]) {
      rmSync(path, { force: true })
      await first(more, path)
      const before = boots()
      const supervisor = await start(more, path)
      const child = await supervisor.fork()
      expect(await get({ socketPath: path })).toMatchObject({ boot: before })
      expect(statSync(path).uid).toBe('user' in more ? 65_534 : 0)
      const marks = environment(child.pid)!.filter((entry) => entry.startsWith('WARMFORK_ID_'))
      const runs = readdirSync(join(place.current.runtimeDirectory, 'shop')).map((name) => name.slice('run-'.length))
      expect(runs.map((token) => `WARMFORK_ID_${token}=1`)).toEqual(marks)
      expect([boots(), await say(supervisor)]).toEqual([before, `${before} hello well`])
      await supervisor.stop()
    }
  })

  test('is looked for by `warmfork run --reuse`', async () => {
    const { command } = options()
    const flags = ['--name', 'shop', '--store', inPlace('store'), '--runtime-directory', place.current.runtimeDirectory]
    const run = async (...more: string[]): Promise<{ stdout: string; stderr: string }> => {
      const [file, ...args] = [...CLI, 'run', ...flags, '--ready-output', 'ready', '--json', ...more, '--', ...command!]
      const cli = spawn(file, args, { cwd: place.current.directory, stdio: ['ignore', 'pipe', 'pipe'] })
      const output = { stdout: '', stderr: '' }
      cli.stderr.on('data', (chunk) => {
        output.stderr += chunk
      })
      cli.stdout.on('data', (chunk) => {
        output.stdout += chunk
        // It is ready.
        cli.kill('SIGTERM')
      })
      await once(cli, 'close')
      return output
    }
    const reuse = ['--reuse', '--watch', '*.mjs', '--on-mismatch', 'error']
    expect(JSON.parse((await run(...reuse)).stdout).generation).toBe(1)
    expect(JSON.parse((await run(...reuse)).stdout).generation).toBe(1)
    expect(boots()).toBe(1)
    appendFileSync(inPlace('greeting.mjs'), '// edited\n')
    expect(JSON.parse((await run(...reuse)).stderr).message).toMatch(/GENERATION_MISFIT: .*greeting.mjs was changed/)
    expect(JSON.parse((await run('--watch', '*.mjs')).stderr).message).toMatch(/Expected `--reuse` to be there/)
    expect(boots()).toBe(1)
  })

  test('nothing is left of a start that is ended in the middle', async () => {
    const port = await freePort()
    await first({}, String(port))
    const over = new AbortController()
    const starting = place.current.start(options({}, String(port)), {
      signal: over.signal,
      onCreate: (created) => created.on('progress', (phase) => phase === 'reuse' && over.abort(new Error('enough'))),
    })
    await expect(starting).rejects.toThrow('enough')
    expect(await get({ port })).toBe('ECONNREFUSED')
  })
})

describe('listeners after a restart', () => {
  test('are at the same addresses: TCP, of both kinds, a path and an abstract name', async () => {
    const [four, six] = [await freePort(), await freePort('::1')]
    const path = inPlace('server.sock')
    const abstract = `@warmfork-test-${process.pid}`
    const addresses = [String(four), `[${six}]`, path, abstract]
    await first({}, ...addresses)
    const supervisor = await start({}, ...addresses)
    const child = await supervisor.fork()
    const all = [
      { port: four },
      { port: six, host: '::1' },
      { socketPath: path },
      { socketPath: abstract.replace('@', '\0') },
    ]
    for (const at of all) expect(await get(at)).toMatchObject({ pid: child.pid, boot: 1 })
    // What one child removes at its end is there for the next.
    await child.end({ graceMs: 0 })
    const next = await supervisor.fork()
    for (const at of all) expect(await get(at)).toMatchObject({ pid: next.pid })
    await supervisor.stop()
    expect(existsSync(path)).toBe(false)
  })

  test('that somebody else has by now are an error, and no boot is tried', async () => {
    const port = await freePort()
    await first({}, String(port))
    const server = createServer()
    await new Promise<void>((resolve) => server.listen(port, '127.0.0.1', resolve))
    await expect(start({}, String(port))).rejects.toMatchObject({ code: 'PORT_TAKEN' })
    await new Promise((resolve) => server.close(resolve))
    expect(boots()).toBe(1)
  })
})

describe('a generation that does not fit', () => {
  /** Starts again with others; gives why that booted. */
  async function whyCold(more: Partial<SupervisorOptions>, ...addresses: string[]): Promise<string> {
    const before = boots()
    const supervisor = await start(more, ...addresses)
    expect(boots()).toBe(before + 1)
    const [reason, ...others] = said(supervisor)
    expect(others).toEqual([])
    await supervisor.stop()
    return reason!
  }

  test('for its command, directory, options or a declared variable', async () => {
    const env = { ...process.env, GREETING: 'one' }
    const before: Partial<SupervisorOptions> = { env, declaredEnv: ['GREETING'] }
    await first(before)
    const cases: [Partial<SupervisorOptions>, RegExp, ...string[]][] = [
      [before, /the command was .*boots"\] and is .*"more"\] now/, 'more'],
      [{ ...before, env: { ...env, GREETING: 'two' } }, /the environment variable GREETING has another value/],
      [{ ...before, declaredEnv: ['GREETING', 'HOME'] }, /the environment variable HOME was not declared then/],
      [{ ...before, memory: 'copy' }, /the option `memory` was auto and is copy now/],
      [{ ...before, agent: false }, /the option `agent` was on and is off now/],
      [{ ...before, template: { secrets: ['X'] } }, /the option `template.secrets` was \[\] and is \["X"\] now/],
      [{ ...before, descriptors: { '/tmp/**': 'close' } }, /the option `descriptors` was \[\] and is/],
      [{ ...before, template: { tty: true } }, /the option `template.tty` was no terminal and is a terminal now/],
      [{ ...before, reuse: { watch: ['*.cjs'] } }, /the globs of watched files were .* and are \["\*.cjs"\] now/],
    ]
    // Each of them with the error, which needs no boot.
    for (const [more, reason, ...addresses] of cases) {
      const reuse = { ...(typeof more.reuse === 'object' ? more.reuse : {}), onMismatch: 'error' } as const
      const error = await start({ ...more, reuse }, ...addresses).catch((failure) => failure)
      expect(error).toMatchObject({ code: 'GENERATION_MISFIT' })
      expect(error.message).toMatch(reason)
    }
    expect(boots()).toBe(1)
    const elsewhere = await start({ ...before, cwd: '/', reuse: { watch: [], onMismatch: 'error' } }).catch((e) => e)
    expect(elsewhere.message).toMatch(/the working directory was .* and is \/ now/)
  })

  test('for a watched file that was changed, added or removed; and fits again where that is undone', async () => {
    const reuse = { watch: ['*.mjs'] }
    await first({ reuse })
    writeFileSync(inPlace('greeting.mjs'), "export const greeting = 'good day'\n")
    const reason = await whyCold({ reuse })
    expect(reason).toMatch(/^the program is booted, since .*: generation 1: greeting.mjs was changed$/)
    // The older one fits the older code: no boot.
    writeFileSync(inPlace('greeting.mjs'), "export const greeting = 'hello'\n")
    const back = await start({ reuse })
    expect(back.generation).toBe(1)
    expect(await say(back)).toBe('1 hello well')
    await back.stop()
    writeFileSync(inPlace('new.mjs'), '')
    rmSync(inPlace('greeting.mjs'))
    const failed = await place.current
      .start({ ...options({ reuse: { ...reuse, onMismatch: 'error' } }) })
      .catch((error) => error)
    // It was put there again by this test's own preparation.
    expect(failed.message).toMatch(/generation 1: new.mjs was added/)
    expect(boots()).toBe(2)
  })

  test('for a file that was edited during the boot, also where the edit is undone', async () => {
    const reuse = { watch: ['*.mjs'] }
    const edited = await start({
      reuse,
      warmup: () => writeFileSync(inPlace('greeting.mjs'), "export const greeting = 'edited'\n"),
    })
    expect(said(edited)).toEqual([
      'watched files changed during the boot, and no later start uses this generation: greeting.mjs was changed',
    ])
    await edited.stop()
    writeFileSync(inPlace('greeting.mjs'), "export const greeting = 'hello'\n")
    await expect(
      start({
        reuse: { ...reuse, onMismatch: 'error' },
        warmup: () => writeFileSync(inPlace('greeting.mjs'), "export const greeting = 'edited'\n"),
      }),
    ).rejects.toThrow(/greeting.mjs was changed/)
  })

  test('for a file that was edited after the boot and before a refork', async () => {
    const reuse = { watch: ['*.mjs'] }
    const supervisor = await start({ reuse })
    writeFileSync(inPlace('greeting.mjs'), "export const greeting = 'edited'\n")
    await supervisor.refork({ from: await supervisor.fork() })
    await supervisor.stop()
    expect(await whyCold({ reuse })).toMatch(/generation 2: greeting.mjs was changed; generation 1: greeting.mjs was/)
  })

  test('for the kernel, the CPU and the CRIU that it was made with, and a mapped file that was not kept', async () => {
    await first()
    await changeManifest(1, ({ surroundings, mappedFiles }) => {
      surroundings.kernelRelease = '5.10.0-old'
      surroundings.criuVersion = '4.0'
      surroundings.cpuFlagsHash = '0'.repeat(64)
      mappedFiles[0] = { ...mappedFiles[0]!, path: '/gone/lib.so', kept: null, keptAs: undefined, reason: 'a test' }
    })
    const error = await start({ reuse: { onMismatch: 'error' } }).catch((failure) => failure)
    expect(error.message).toMatch(/the kernel was 5.10.0-old and is/)
    expect(error.message).toMatch(/CRIU was 4.0 and is/)
    expect(error.message).toMatch(/the CPU has other features/)
    expect(error.message).toMatch(/the file \/gone\/lib.so is not the one it maps any more/)
    expect(boots()).toBe(1)
  })

  test('for damage: the one before is used, and the damaged one never again', async () => {
    await first()
    const supervisor = await start()
    await supervisor.refork({ from: await supervisor.fork() })
    await supervisor.stop()
    const core = readdirSync(join(generationDirectory(2), 'image')).find((name) => name.startsWith('core-'))!
    const path = join(generationDirectory(2), 'image', core)
    const { atime, mtime } = statSync(path)
    const bytes = readFileSync(path)
    bytes[bytes.length - 1]! ^= 1
    rmSync(path)
    writeFileSync(path, bytes, { mode: 0o400 })
    utimesSync(path, atime, mtime)
    const again = await start()
    expect(again.generation).toBe(1)
    expect(said(again)[0]).toMatch(/^generation 2 is not used: its file image\/core-.* has another content/)
    expect(again.whyRejected(2)).toMatch(/another content/)
    expect(boots()).toBe(1)
  })

  test('for memory that has other bytes, which is seen while it serves', async () => {
    await first()
    const pages = readdirSync(generationDirectory(1)).find((name) => name.endsWith('.warmfork-pages'))!
    // The last page that holds data: nobody needs it to start.
    const path = join(generationDirectory(1), pages)
    const { mtimeNs } = statSync(path, { bigint: true })
    const runs = readFileSync(`${path}.runs`)
    const offset = Number(runs.readBigUInt64LE(runs.length - 16) + runs.readBigUInt64LE(runs.length - 8)) - 8
    execFileSync('dd', [`of=${path}`, 'bs=1', `seek=${offset}`, 'conv=notrunc', 'status=none'], { input: 'damaged!' })
    execFileSync('touch', [
      '-d',
      `@${mtimeNs / 1_000_000_000n}.${String(mtimeNs % 1_000_000_000n).padStart(9, '0')}`,
      path,
    ])
    const supervisor = await start()
    await eventually(() => said(supervisor).length > 0, 'the damage is seen')
    expect(said(supervisor)[0]).toMatch(/^generation 1 is damaged, and no more forks are made of it/)
    await expect(supervisor.fork({ stdio: [0, 1, 2] })).rejects.toMatchObject({ code: 'GENERATION_CORRUPT' })
    await supervisor.stop()
    expect(await whyCold({})).toMatch(/generation 1: it was rejected: .* has another content/)
  })

  test('is no reason to boot without a word', async () => {
    await first({ reuse: false })
    appendFileSync(inPlace('greeting.mjs'), '// edited\n')
    expect(await whyCold({})).toMatch(/it was not written down which files of the application it was made of/)
  })
})
