import { closeSync, openSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { Supervisor } from '../src/index.js'
import { descendants, isAlive, stat } from '../src/linux/proc.js'
import { ask, ENGINES, eventually, PROGRAMS, usePlace } from './engines-under-test.js'

describe.each(ENGINES)('a supervisor with the %s engine', (engine) => {
  const place = usePlace(engine)

  test('gives a child that reads, answers and ends, in six lines', async () => {
    await using supervisor = await Supervisor.start({
      ...place.current.options(),
      command: [process.execPath, join(PROGRAMS, 'app.mjs')],
      ready: { output: /ready/ },
      pool: { size: 4 },
    })
    const child = await supervisor.fork()
    child.stdin.end('say hello\n')
    const lines: string[] = []
    for await (const line of child.lines()) lines.push(line)
    expect(lines).toEqual(['hello'])
    expect(await child.exit).toEqual({ code: 0, signal: null })
  })

  test('knows the pid of each child, and no two children share one', async () => {
    const supervisor = await place.current.start({ pool: { size: 2 } })
    const children = await Promise.all([supervisor.fork(), supervisor.fork(), supervisor.fork()])
    const said = await Promise.all(children.map((child) => ask(child, 'pid')))
    expect(said).toEqual(children.map((child) => String(child.pid)))
    expect(new Set(said).size).toBe(3)
    expect(supervisor.children).toEqual(children)
  })

  test('gives children that do not see what others do', async () => {
    const supervisor = await place.current.start()
    const [one, other] = [await supervisor.fork(), await supervisor.fork()]
    await ask(one, 'count')
    expect(await ask(one, 'count')).toBe('2')
    expect(await ask(other, 'count')).toBe('1')
  })

  test('passes arguments byte for byte', async () => {
    const hard = ['two words', `'"\`$HOME\\`, 'two\nlines', '', 'grüße, 世界', '-e', '*', '\t']
    const supervisor = await place.current.start({ command: [process.execPath, join(PROGRAMS, 'app.mjs'), ...hard] })
    expect(JSON.parse(await ask(await supervisor.fork(), 'args'))).toEqual(hard)
  })

  test('has 200 children at once', async () => {
    // Not Node, of which 200 cold starts would take minutes with the spawn engine.
    const supervisor = await place.current.start({ command: ['sh', '-c', 'echo ready; exec cat'], pool: { size: 4 } })
    const children = await Promise.all(Array.from({ length: 200 }, () => supervisor.fork()))
    expect(supervisor.children.length).toBe(200)
    expect(children.filter((child) => !isAlive(child.pid))).toEqual([])
    const answers = await Promise.all(
      children.map(async (child, i) => {
        child.stdin.end(`${i}\n`)
        for await (const line of child.lines()) return line
      }),
    )
    expect(answers).toEqual(children.map((_, i) => String(i)))
    expect(await Promise.all(children.map((child) => child.exit))).toEqual(
      children.map(() => ({ code: 0, signal: null })),
    )
    expect(supervisor.children).toEqual([])
  })

  test('forks directly where the pool is empty', async () => {
    const supervisor = await place.current.start({ pool: { size: 0 } })
    const child = await supervisor.fork()
    expect(await ask(child, 'say here')).toBe('here')
    expect((await supervisor.stats()).forks).toEqual({ fromPool: 0, direct: 1, failed: 0 })
  })

  test('gives a child the descriptors of its caller', async () => {
    const supervisor = await place.current.start({
      command: ['sh', '-c', 'echo ready; read name; echo "hello $name"; echo oops >&2'],
      ready: { delayMs: 300 },
    })
    const path = join(place.current.directory, 'stdio')
    const input = openSync(`${path}.in`, 'w+')
    const fds = [input, openSync(`${path}.out`, 'w'), openSync(`${path}.err`, 'w')] as const
    const child = await supervisor.fork({ stdio: fds })
    for (const fd of fds) closeSync(fd)
    await child.exit
    expect(readFileSync(`${path}.out`, 'utf8')).toMatch(/hello/)
    expect(readFileSync(`${path}.err`, 'utf8')).toBe('oops\n')
    expect(() => child.stdout).toThrow(expect.objectContaining({ code: 'BAD_OPTION' }))
  })

  test('goes on when the template dies later, and tells of it', async () => {
    const supervisor = await place.current.start()
    const exited = new Promise((resolve) => supervisor.once('templateExit', resolve))
    process.kill(supervisor.template!.pid, 'SIGKILL')
    expect(await exited).toEqual({ code: null, signal: 'SIGKILL' })
    expect(supervisor.template!.running).toBe(false)
    expect(await ask(await supervisor.fork(), 'say here')).toBe('here')
  })

  test('ends the template after the checkpoint where it is told to', async () => {
    const supervisor = await place.current.start({ template: { afterCheckpoint: 'end' } })
    expect(supervisor.template!.running).toBe(false)
    expect(isAlive(supervisor.template!.pid)).toBe(false)
    expect(await ask(await supervisor.fork(), 'say here')).toBe('here')
  })

  test('tells its figures', async () => {
    const supervisor = await place.current.start()
    const child = await supervisor.fork()
    await ask(child, 'say here')
    const stats = await supervisor.stats()
    expect(stats).toMatchObject({ engine, state: 'running', generation: 1, template: { running: true } })
    expect(stats.children).toMatchObject([{ pid: child.pid, state: 'running', generation: 1 }])
    expect(supervisor.generations()).toMatchObject([{ number: 1 }])
  })

  test('ends with its children all processes that they have started', async () => {
    const supervisor = await place.current.start()
    const child = await supervisor.fork()
    const grandchild = Number(await ask(child, 'start'))
    expect(isAlive(grandchild)).toBe(true)
    await supervisor.stop()
    expect(isAlive(grandchild)).toBe(false)
    expect(await child.exit).toEqual({ code: null, signal: 'SIGTERM' })
  })

  test('forks a program with children of its own, and ends both', async () => {
    const supervisor = await place.current.start({ command: ['sh', '-c', 'sleep 1000 & echo ready; read line; wait'] })
    const child = await supervisor.fork()
    const [own] = descendants(child.pid)
    expect(stat(own!)?.comm).toBe('sleep')
    await child.end({ graceMs: 100 })
    expect(isAlive(own!)).toBe(false)
    expect(isAlive(child.pid)).toBe(false)
  })

  test('kills what ignores SIGTERM when the time is over', async () => {
    const script = "trap '' TERM; echo ready; while :; do sleep 0.1; done"
    const supervisor = await place.current.start({ command: ['sh', '-c', script], template: { stopTimeoutMs: 300 } })
    const child = await supervisor.fork()
    const before = Date.now()
    await supervisor.stop()
    expect(Date.now() - before).toBeGreaterThanOrEqual(300)
    expect(await child.exit).toEqual({ code: null, signal: 'SIGKILL' })
  })

  test('leaves running children alive where it is told to', async () => {
    const supervisor = await place.current.start({ orphans: 'leave' })
    const child = await supervisor.fork()
    await ask(child, 'say here')
    await supervisor.stop()
    expect(isAlive(child.pid)).toBe(true)
    expect(place.current.processes()).toHaveLength(1)
    await child.end()
  })

  test('may be stopped twice, at once and later', async () => {
    const supervisor = await place.current.start()
    await Promise.all([supervisor.stop(), supervisor.stop()])
    await supervisor.stop()
    expect(supervisor.state).toBe('stopped')
  })

  test('gives STOPPED after its stop, also to a fork that was under way', async () => {
    const supervisor = await place.current.start({ pool: { size: 0 } })
    const under = supervisor.fork().then(
      () => 'forked',
      (error) => error.code,
    )
    await supervisor.stop()
    expect(await under).toBe('STOPPED')
    await expect(supervisor.fork()).rejects.toMatchObject({ code: 'STOPPED' })
    await expect(supervisor.stats()).rejects.toMatchObject({ code: 'STOPPED' })
  })

  test.each(['boot', 'ready', 'checkpoint'] as const)(
    'may be stopped during its start, after the phase %s',
    async (phase) => {
      const started = place.current.start(
        {},
        {
          onCreate: (supervisor) => supervisor.on('progress', (done) => done === phase && void supervisor.stop()),
        },
      )
      await expect(started).rejects.toMatchObject({ code: 'STOPPED' })
      expect(place.current.processes()).toEqual([])
    },
  )

  test('ends the start with the reason of an aborted signal', async () => {
    const controller = new AbortController()
    const reason = new Error('changed my mind')
    const started = place.current.start({ ready: { delayMs: 30_000 } }, { signal: controller.signal })
    setTimeout(() => controller.abort(reason), 300)
    await expect(started).rejects.toBe(reason)
    expect(place.current.processes()).toEqual([])
  })

  test('slows forks down while children crash right after them, and then stops forking', async () => {
    const supervisor = await place.current.start({ crashes: { delayAfter: 2, giveUpAfter: 4 } })
    const took: number[] = []
    for (let i = 0; i < 4; i++) {
      const before = performance.now()
      const child = await supervisor.fork()
      took.push(performance.now() - before)
      child.stdin.write('signal SIGSEGV\n')
      expect(await child.exit).toMatchObject({ signal: 'SIGSEGV' })
    }
    expect(took[2]).toBeGreaterThan(90)
    expect(took[3]).toBeGreaterThan(140)
    expect(supervisor.warnings.map(({ kind }) => kind)).toContain('crashes')
    await expect(supervisor.fork()).rejects.toMatchObject({ code: 'CRASH_LOOP' })
  })

  test('needs an agent for what is given to a fork', async () => {
    const supervisor = await place.current.start({ command: ['sh', '-c', 'echo ready; exec cat'] })
    for (const input of [{ args: ['x'] }, { env: { X: 'x' } }, { cwd: '/' }, { data: 'x' }])
      await expect(supervisor.fork(input)).rejects.toMatchObject({ code: 'NEEDS_AGENT' })
  })

  test('runs the program as another user where it is told to', async () => {
    const supervisor = await place.current.start({
      user: 'nobody',
      cwd: '/',
      command: ['sh', '-c', 'echo ready; read line; id -un'],
    })
    const child = await supervisor.fork()
    child.stdin.write('\n')
    for await (const line of child.lines()) expect(line).toBe('nobody')
    expect(await child.exit).toEqual({ code: 0, signal: null })
  })

  test('writes a log that can be searched', async () => {
    const { pino } = await import('pino')
    const lines: string[] = []
    const log = pino({}, { write: (line: string) => lines.push(JSON.parse(line).msg) })
    const supervisor = await place.current.start({ log, name: 'logged' })
    const child = await supervisor.fork()
    child.stdin.end()
    await child.exit
    await eventually(() => lines.some((line) => line.includes('exited')), 'the exit is logged')
    const text = lines.join('\n')
    expect(text).toMatch(/^template=logged pid=\d+ ready ms=\d+$/m)
    expect(text).toMatch(/^generation=1 memory=(cow|copy) rss=\d+ checkpoint ms=\d+$/m)
    expect(text).toMatch(new RegExp(`^child pid=${child.pid} gen=1 forked ms=[\\d.]+$`, 'm'))
    expect(text).toMatch(new RegExp(`^child pid=${child.pid} gen=1 exited code=0 signal=null$`, 'm'))
  })
})

describe('the engine', () => {
  const place = usePlace('spawn')

  test('says that it cannot share memory, where it starts cold', async () => {
    await expect(place.current.start({ memory: 'cow' })).rejects.toMatchObject({ code: 'ENGINE_UNSUPPORTED' })
  })

  test('is spawn, with a warning that says why, where CRIU is missing', async () => {
    process.env.WARMFORK_CRIU = '/nowhere/criu'
    try {
      const supervisor = await place.current.start({ engine: 'auto', command: ['sh', '-c', 'echo ready; exec cat'] })
      expect(supervisor.engine).toBe('spawn')
      expect(supervisor.warnings).toMatchObject([{ kind: 'engine-spawn', code: 'CRIU_MISSING' }])
      await expect(place.current.start({ engine: 'criu' })).rejects.toMatchObject({ code: 'CRIU_MISSING' })
    } finally {
      delete process.env.WARMFORK_CRIU
    }
  })
})
