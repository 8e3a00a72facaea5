import { spawnSync } from 'node:child_process'
import { chownSync, readdirSync, readFileSync, readlinkSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { beforeAll, describe, expect, test } from 'vitest'
import { CRIU_CAPABILITIES } from '../src/engines/criu/rights.js'
import { children, descendants, isAlive, isEnding, stat, threadIds } from '../src/linux/proc.js'
import type { SupervisorOptions } from '../src/options.js'
import { ask, eventually, PROGRAMS, usePlace } from './engines-under-test.js'
import { useCleanPlace } from './leftovers.js'
import { compileC } from './runtimes/compile.js'
import { SupervisorProcess } from './supervisor-process.js'

const IDENTITY = fileURLToPath(new URL('fixtures/identity/', import.meta.url))
const FAMILY: SupervisorOptions['command'] = [process.execPath, join(PROGRAMS, 'family.mjs'), '1']
/** Isolated, so that no agent is loaded. */
const ASYNCIO: SupervisorOptions['command'] = ['/usr/bin/python3', '-I', join(IDENTITY, 'asyncio-app.py')]

/** Its own agent. */
const MINI: SupervisorOptions['command'] = [
  '/usr/bin/python3',
  '-I',
  fileURLToPath(new URL('fixtures/agents/mini.py', import.meta.url)),
]

const isRoot = process.getuid?.() === 0
const hasPython = spawnSync('/usr/bin/python3', ['--version']).status === 0
const NOBODY = 65534
const AS_NOBODY = ['setpriv', `--reuid=${NOBODY}`, `--regid=${NOBODY}`, '--clear-groups']
/** In a clone below a home that is closed to others, nobody can run what is tried here. */
const isOpen = spawnSync(AS_NOBODY[0]!, [...AS_NOBODY.slice(1), 'cat', join(PROGRAMS, 'app.mjs')]).status === 0
const wait = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms))

/** The namespaces' first processes. */
function inits(): number[] {
  return children(process.pid).filter((pid) => stat(pid)?.comm === 'warmfork-init' && isAlive(pid))
}

/** What is seen by somebody inside, by way of the child's own /proc. */
function insidePids(pid: number): number[] {
  return readdirSync(`/proc/${pid}/root/proc`)
    .filter((name) => /^\d+$/.test(name))
    .map(Number)
    .sort((a, b) => a - b)
}

const namespaces = (pid: number) => ['pid', 'mnt'].map((kind) => readlinkSync(`/proc/${pid}/ns/${kind}`))

describe.skipIf(!isRoot)("forks with `identity: 'namespace'`", () => {
  const place = useCleanPlace()
  const start = (options: Partial<SupervisorOptions> = {}) => place.current.start({ identity: 'namespace', ...options })

  test('have the ids of the template inside, each its own outside, and a /proc of their own', async () => {
    const supervisor = await start({ command: FAMILY, pool: { size: 2 } })
    const template = supervisor.template!.pid
    const relatives = descendants(template).sort((a, b) => a - b)
    const forks = await Promise.all(Array.from({ length: 5 }, () => supervisor.fork()))
    for (const child of forks) {
      expect(await ask(child, 'pid')).toBe(String(template))
      expect(
        (await ask(child, 'relatives'))
          .split(' ')
          .map(Number)
          .sort((a, b) => a - b),
      ).toEqual(relatives)
      // With the first process of the namespace; criu has gone.
      expect(insidePids(child.pid)).toEqual([1, template, ...relatives].sort((a, b) => a - b))
      expect(readdirSync(`/proc/${child.pid}/root/proc/${template}/task`).map(Number)).toEqual(threadIds(template))
      expect(stat(child.pid)).toMatchObject({ ppid: process.pid, pgid: child.pid, sid: child.pid })
    }
    const all = [template, process.pid, ...forks.map((child) => child.pid)]
    expect(new Set(all).size).toBe(7)
    const seen = all.map((pid) => namespaces(pid).join())
    expect(new Set(seen).size).toBe(6)
    expect(new Set(supervisor.children)).toEqual(new Set(forks))
  })

  test('end as they end, and leave nothing of their namespace', async () => {
    const supervisor = await start({ pool: { size: 0 } })
    const ways: [string, { code: number | null; signal: string | null }][] = [
      ['exit 0', { code: 0, signal: null }],
      ['exit 7', { code: 7, signal: null }],
      ['exit 143', { code: 143, signal: null }],
      ['signal SIGTERM', { code: null, signal: 'SIGTERM' }],
      ['signal SIGKILL', { code: null, signal: 'SIGKILL' }],
      ['signal SIGSEGV', { code: null, signal: 'SIGSEGV' }],
    ]
    for (const [command, status] of ways) {
      const child = await supervisor.fork()
      child.stdin.write(`${command}\n`)
      expect(await child.exit).toEqual(status)
    }
    const child = await supervisor.fork()
    expect(child.kill('SIGINT')).toBe(true)
    expect(await child.exit).toEqual({ code: null, signal: 'SIGINT' })
    // Those that are started ahead have one each.
    await eventually(() => inits().length === 2, 'the namespaces are gone')
  })

  test('stand still while they are parked, and are noticed when somebody continues them', async () => {
    const supervisor = await start({ pool: { size: 1 } })
    const parked = supervisor.pool.parked[0]!.pid
    await eventually(() => stat(parked)?.state === 'T', 'it stands still')
    process.kill(parked, 'SIGCONT')
    await eventually(() => supervisor.warnings.some(({ kind }) => kind === 'stray-resume'), 'it is noticed')
    const child = await supervisor.fork()
    expect(child.pid).not.toBe(parked)
    expect(await ask(child, 'say hello')).toBe('hello')
  })

  test('take in their orphans, and end with all that they have started, whatever that has done to hide', async () => {
    const supervisor = await start({ command: FAMILY, pool: { size: 0 } })
    const [one, other] = [await supervisor.fork(), await supervisor.fork()]
    const started = [one, other].map((child) => descendants(child.pid))
    await ask(one, 'start')
    const hidden = descendants(one.pid)
    expect(hidden).toHaveLength(6)
    process.kill(one.pid, 'SIGKILL')
    await one.exit
    // As without a namespace, what a child leaves lives until the supervisor ends.
    expect(hidden.filter((pid) => !isAlive(pid))).toEqual([])
    expect(hidden.map((pid) => stat(pid)?.comm)).toEqual(hidden.map(() => 'sleep'))
    expect(hidden.map((pid) => stat(stat(pid)!.ppid)?.comm)).toEqual(hidden.map(() => 'warmfork-init'))
    process.kill(hidden[0]!, 'SIGKILL')
    await eventually(() => stat(hidden[0]!) === undefined, 'the orphan is reaped')
    await other.end({ graceMs: 0 })
    await eventually(() => started[1]!.every((pid) => !isAlive(pid)), 'the rest of the tree is ended')
    await supervisor.stop()
    expect(hidden.filter((pid) => isAlive(pid))).toEqual([])
  })

  test('keep the ids of unlinked files apart', async () => {
    const script = 'exec 5<>gone; rm gone; echo content >&5; echo ready; read word; echo $word; exec cat'
    const supervisor = await start({ command: ['sh', '-c', script], pool: { size: 0 } })
    const forks = await Promise.all(Array.from({ length: 5 }, () => supervisor.fork()))
    expect(await Promise.all(forks.map((child) => ask(child, 'here')))).toEqual(forks.map(() => 'here'))
    const contents = forks.map((child) => readFileSync(`/proc/${child.pid}/fd/5`, 'utf8'))
    expect(contents).toEqual(forks.map(() => 'content\n'))
  })

  test('are made also where criu is killed in the middle, and nothing of it is left', async () => {
    const supervisor = await start({ command: FAMILY, pool: { size: 0 } })
    let killed = 0
    for (const ms of [0, 1, 2, 4, 6, 8, 10, 14]) {
      let over = false
      const fork = supervisor.fork().finally(() => {
        over = true
      })
      // What it restores has its log open too for a while, but leads no group, or a session as well.
      const restoring = () =>
        children(process.pid).filter((pid) => {
          const found = stat(pid)
          return found?.pgid === pid && found.sid !== pid && isWriting(pid, 'restore.log')
        })
      let found: number[] = []
      for (; !over && found.length === 0; await new Promise(setImmediate)) found = restoring()
      await wait(ms)
      for (const pid of found) {
        killed++
        try {
          process.kill(pid, 'SIGKILL')
        } catch {
          // It was faster.
        }
      }
      const child = await fork
      expect(await ask(child, 'pid')).toBe(String(supervisor.template!.pid))
      await child.end({ graceMs: 0 })
    }
    expect(killed).toBeGreaterThan(2)
    await eventually(() => inits().length <= 2, 'the namespaces are gone')
  })

  test('belong to the user that was asked for', async () => {
    const supervisor = await start({
      command: ['sh', '-c', 'echo ready; read word; id -u; id -g'],
      user: NOBODY,
      group: NOBODY,
      cwd: '/',
    })
    const child = await supervisor.fork()
    child.stdin.end('go\n')
    const lines: string[] = []
    for await (const line of child.lines()) lines.push(line)
    expect(lines).toEqual([String(NOBODY), String(NOBODY)])
    expect(await child.exit).toEqual({ code: 0, signal: null })
  })

  test.skipIf(!hasPython)(
    'go on with an event loop that does not bear a new pid, of which is warned without',
    async () => {
      const fresh = await place.current.start({ command: ASYNCIO, pool: { size: 0 } })
      const broken = await fresh.fork()
      broken.stdin.end('hello\n')
      expect(await broken.exit).toEqual({ code: 1, signal: null })
      expect(Buffer.concat(await broken.stderr.toArray()).toString()).toContain('no running event loop')
      const warnings = fresh.warnings.filter(({ kind }) => kind === 'identity')
      expect(warnings).toEqual([{ kind: 'identity', message: expect.stringContaining("`identity: 'namespace'`") }])
      await fresh.stop()

      const supervisor = await start({ command: ASYNCIO, pool: { size: 0 } })
      const child = await supervisor.fork()
      expect(await ask(child, 'hello')).toBe(`${supervisor.template!.pid} hello`)
      expect(supervisor.warnings.filter(({ message }) => message.includes('event loop'))).toEqual([])
    },
  )

  test.skipIf(!hasPython)('is not advised to a Python that runs no event loop', async () => {
    const script = 'import asyncio, select, sys; e = select.epoll(); print("ready", flush=True); sys.stdin.read()'
    const supervisor = await place.current.start({ command: ['/usr/bin/python3', '-c', script], pool: { size: 0 } })
    expect(supervisor.warnings.filter(({ message }) => message.includes('event loop'))).toEqual([])
  })

  test('draw the same from OpenSSL, of which is warned', async () => {
    const script = `const { randomBytes } = require('crypto'); randomBytes(8); console.log('ready')
      process.stdin.on('data', () => console.log(randomBytes(16).toString('hex')))`
    const supervisor = await start({ command: [process.execPath, '-e', script], pool: { size: 0 } })
    const forks = [await supervisor.fork(), await supervisor.fork()]
    const [one, other] = await Promise.all(forks.map((child) => ask(child, 'draw')))
    expect(one).toBe(other)
    expect(supervisor.warnings).toContainEqual({ kind: 'identity', message: expect.stringContaining('OpenSSL') })
  })

  test('end with a supervisor that is killed with SIGKILL', async () => {
    const { env: _, ...options } = place.current.options({ command: FAMILY, identity: 'namespace', pool: { size: 2 } })
    const supervisor = new SupervisorProcess(options, { env: { [place.current.mark]: '1' } })
    await supervisor.reached('running')
    const pid = await supervisor.fork()
    expect(await supervisor.ask(pid, 'start')).toMatch(/^\d+ \d+ \d+$/)
    await supervisor.kill()
    await place.current.swept()
  })

  test('live on without their supervisor where they are to, and their namespace with them', async () => {
    const { env: _, ...options } = place.current.options({
      command: ['sh', '-c', 'echo ready; exec sleep 1000'],
      identity: 'namespace',
      orphans: 'leave',
      pool: { size: 1 },
    })
    const supervisor = new SupervisorProcess(options, { env: { [place.current.mark]: '1' } })
    await supervisor.reached('running')
    const pid = await supervisor.fork()
    const init = children(supervisor.pid).find(
      (one) => one !== pid && namespaces(one).join() === namespaces(pid).join(),
    )!
    await supervisor.kill()
    const others = () => place.current.processes().filter((entry) => !entry.startsWith(`${pid} `))
    await eventually(() => others().length === 0, 'all others are ended')
    await wait(100)
    expect([pid, init].map((one) => stat(one)?.comm)).toEqual(['sleep', 'warmfork-init'])
    process.kill(pid, 'SIGKILL')
    await eventually(() => isEnding(init), 'its init ends with it')
    await place.current.swept()
  })
})

describe.skipIf(!isRoot || !isOpen)('a supervisor that is not root', () => {
  const place = usePlace('criu')
  const start = (capabilities: string) => {
    for (const path of [place.current.directory, place.current.runtimeDirectory]) chownSync(path, NOBODY, NOBODY)
    const { env: _, ...options } = place.current.options({ identity: 'namespace', cwd: place.current.directory })
    const wrapper = [...AS_NOBODY, `--inh-caps=-all${capabilities}`, `--ambient-caps=-all${capabilities}`]
    const env = { [place.current.mark]: '1', HOME: place.current.directory }
    return new SupervisorProcess(options, { wrapper, env })
  }

  test('and has the four capabilities forks into pid namespaces, and its children have none of them', async () => {
    const supervisor = start(CRIU_CAPABILITIES.map((name) => `,+${name}`).join(''))
    await supervisor.reached('running')
    const pid = await supervisor.fork()
    const { template } = await supervisor.state()
    expect(await supervisor.ask(pid, 'pid')).toBe(String(template))
    expect(readFileSync(`/proc/${pid}/status`, 'latin1')).toMatch(/^CapEff:\t0+$/m)
    expect(namespaces(pid)[0]).not.toBe(namespaces(supervisor.pid)[0])
    await supervisor.stop()
  })
})

describe.skipIf(!isRoot || !hasPython)('forks that a program in a pid namespace asks for', () => {
  const place = usePlace('criu')

  test('have those ids again, three deep', async () => {
    const supervisor = await place.current.start({
      identity: 'namespace',
      command: MINI,
      ready: { agent: true },
      pool: { size: 1 },
    })
    const { pid } = supervisor.template!
    let current = await supervisor.fork()
    for (let depth = 1; depth <= 3; depth++) {
      await current.ready
      const known = new Set(supervisor.children)
      current.send({ do: `say {"type":"fork","id":${depth}}` })
      await eventually(() => supervisor.children.some((one) => !known.has(one)), `fork ${depth} is there`)
      current = supervisor.children.find((one) => !known.has(one))!
    }
    await current.ready
    const answer = new Promise((resolve) => current.once('message', resolve))
    current.send({ do: 'state' })
    expect(await answer).toMatchObject({ pid, forked: { pid, call: 3, threads: { [pid]: pid } } })
    expect(new Set(supervisor.children.map((child) => namespaces(child.pid).join())).size).toBe(4)
    await current.end()
  })
})

describe.skipIf(!isRoot)('a program of which it is not known where it keeps thread ids', () => {
  const place = useCleanPlace()
  let program: string
  beforeAll(async () => {
    program = await compileC('foreign-threads')
  })

  test('cannot be forked with fresh ids, and the error says what to set', async () => {
    await expect(place.current.start({ command: [program] })).rejects.toMatchObject({
      code: 'IMAGE_UNSUPPORTED',
      remedy: expect.stringContaining("`identity: 'namespace'`"),
    })
  })

  test('is forked with the ids that it has', async () => {
    const supervisor = await place.current.start({ command: [program], identity: 'namespace', pool: { size: 0 } })
    const { pid } = supervisor.template!
    const forks = await Promise.all([supervisor.fork(), supervisor.fork()])
    const answers = await Promise.all(forks.map((child) => ask(child, 'ids')))
    expect(answers).toEqual(forks.map(() => threadIds(pid).join(' ')))
  })
})

function isWriting(pid: number, name: string): boolean {
  try {
    return readdirSync(`/proc/${pid}/fd`).some((fd) => readlinkSync(`/proc/${pid}/fd/${fd}`).endsWith(name))
  } catch {
    return false
  }
}
