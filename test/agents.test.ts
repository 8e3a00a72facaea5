import { execFileSync } from 'node:child_process'
import { readdirSync, readFileSync } from 'node:fs'
import { connect } from 'node:net'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { describe, expect, test } from 'vitest'
import type { Forked } from '../src/agents/protocol.js'
import type { Child } from '../src/child.js'
import { environment } from '../src/linux/proc.js'
import type { SupervisorOptions } from '../src/options.js'
import type { Supervisor } from '../src/supervisor.js'
import { ENGINES, eventually, usePlace } from './engines-under-test.js'

const MINI: readonly [string, ...string[]] = [
  'python3',
  // Without the environment's PYTHONPATH: this program is its own agent.
  '-I',
  fileURLToPath(new URL('fixtures/agents/mini.py', import.meta.url)),
]

interface Answer {
  event: string
  pid: number
  seed: string
  words: string[]
  forked: Forked
}

/** Has the program do something, and gives what it says by its agent. */
async function tell(child: Child, words: string): Promise<Answer> {
  const answer = new Promise<unknown>((resolve) => child.once('message', resolve))
  child.send({ do: words })
  return (await answer) as Answer
}

const fds = () => readdirSync('/proc/self/fd').length

describe.each(ENGINES)('an agent with the %s engine', (engine) => {
  const place = usePlace(engine)
  const mini = (options: Partial<SupervisorOptions> = {}) =>
    place.current.start({ command: MINI, ready: { agent: true }, ...options })

  test('tells each fork who it is, before it goes on', async () => {
    const supervisor = await mini()
    const children = [await supervisor.fork(), await supervisor.fork()]
    const answers: Answer[] = []
    for (const child of children) {
      await child.ready
      answers.push(await tell(child, 'state'))
    }
    for (const [i, { pid, forked, words }] of answers.entries()) {
      expect(pid).toBe(children[i]!.pid)
      expect(forked).toMatchObject({ pid, ppid: process.pid, generation: 1, worker: true })
      expect(words).toEqual(['before', 'fork'])
    }
    expect(answers[0]!.forked.seed).not.toBe(answers[1]!.forked.seed)
  })

  test('hands arguments, environment, directory and data over, byte for byte', async () => {
    const supervisor = await mini()
    const odd = Buffer.from([0xff, 0xfe, 0x20, 0x80])
    const args = ['', ' two  spaces ', '"quoted" \'too\'', 'two\nlines', 'Grüße 漢字 🙂', '$HOME `id` \\', odd]
    const child = await supervisor.fork({
      args,
      env: { FOO: 'b=a r', EMPTY: '', ODD: odd, PATH: undefined },
      cwd: '/tmp',
      data: { deep: [1, null, 'x'] },
    })
    const { forked } = await tell(child, 'state')
    expect(forked.args).toEqual([...args.slice(0, -1), { base64: odd.toString('base64') }])
    expect(forked.env).toEqual({
      set: { FOO: 'b=a r', EMPTY: '', ODD: { base64: odd.toString('base64') } },
      unset: ['PATH'],
    })
    expect(forked).toMatchObject({ cwd: '/tmp', data: { json: { deep: [1, null, 'x'] } } })
  })

  test('hands a mebibyte of bytes over', async () => {
    const supervisor = await mini()
    const data = Buffer.alloc(1 << 20, 'all of it\0\xff\n', 'latin1')
    const child = await supervisor.fork({ data })
    await child.ready
    const { forked } = await tell(child, 'state')
    expect(Buffer.from((forked.data as { base64: string }).base64, 'base64').equals(data)).toBe(true)
  })

  test('keeps secrets from the template and its image, and hands them to each fork', async () => {
    const secret = `geheim-${Math.random()}-${Date.now()}`
    const supervisor = await mini({ env: { DATABASE_PASSWORD: secret }, template: { secrets: ['DATABASE_PASSWORD'] } })
    expect(environment(supervisor.template!.pid)!.join('\n')).not.toContain(secret)
    const child = await supervisor.fork({ env: { OTHER: 'x' } })
    const { forked } = await tell(child, 'state')
    expect(forked.env!.set).toEqual({ DATABASE_PASSWORD: secret, OTHER: 'x' })
    if (engine === 'spawn') return
    expect(() => execFileSync('grep', ['-rqF', secret, supervisor.store])).toThrow()
    expect(() => execFileSync('grep', ['-rqF', 'DATABASE_NOT_THERE', supervisor.store])).toThrow()
    expect(execFileSync('grep', ['-rlF', 'MINI_PROTOCOL', supervisor.store]).length).toBeGreaterThan(0)
  })

  test('ends a fork whose hook fails, and no other', async () => {
    const supervisor = await mini({ env: { MINI_FORK: 'throw' } })
    const child = await supervisor.fork()
    await expect(child.ready).rejects.toMatchObject({
      code: 'HOOK_FAILED',
      message: expect.stringContaining('`onIt` failed: not me'),
      output: 'at onIt',
    })
    expect(await child.exit).toEqual({ code: 70, signal: null })
    expect(supervisor.warnings.map(({ kind }) => kind)).toContain('hooks')
    expect(supervisor.state).toBe('running')
  })

  test('ends a fork whose hooks are not done in time', async () => {
    const supervisor = await mini({ env: { MINI_FORK: 'silent' }, hookTimeoutMs: 300 })
    const child = await supervisor.fork()
    await expect(child.ready).rejects.toMatchObject({ code: 'HOOK_FAILED', message: expect.stringContaining('300 ms') })
    expect(await child.exit).toEqual({ code: null, signal: 'SIGKILL' })
  })

  /** What no engine has a part in is tried with one. */
  if (engine !== ENGINES.at(-1)) return

  test.each([
    ['NUL in an argument', { args: ['a\0b'] }, 'args[0]'],
    ['arguments that are no list', { args: 'x' as unknown as string[] }, 'args'],
    ['a name with =', { env: { 'A=B': 'x' } }, 'env'],
    ['NUL in bytes', { env: { A: Buffer.from([1, 0]) } }, 'env.A'],
    ['an empty directory', { cwd: '' }, 'cwd'],
    ['data that JSON cannot have', { data: 1n }, 'data'],
    ['nine mebibytes', { data: Buffer.alloc(9 << 20) }, 'may have 8388608'],
  ])('refuses %s', async (_, input, words) => {
    const supervisor = await mini({ pool: { size: 0 } })
    await expect(supervisor.fork(input)).rejects.toMatchObject({
      code: 'BAD_OPTION',
      message: expect.stringContaining(words),
    })
    await (await supervisor.fork()).ready
  })

  test('without one, secrets are not withheld in vain', async () => {
    const options = { env: { KEY: 'x' }, template: { secrets: ['KEY'] } }
    await expect(place.current.start({ command: ['sh', '-c', 'echo ready; cat'], ...options })).rejects.toMatchObject({
      code: 'NEEDS_AGENT',
    })
    await expect(mini({ agent: false, ready: { output: 'x' }, ...options })).rejects.toThrow()
  })

  test('that loses its descriptor leaves a program that goes on', async () => {
    const supervisor = await mini()
    const child = await supervisor.fork()
    await child.ready
    child.stdin.write('close\npid\n')
    for await (const line of child.lines()) {
      expect(JSON.parse(line)).toEqual({ event: 'pid', pid: child.pid })
      break
    }
    await eventually(() => child.agents!.links.length === 0, 'the connection is closed')
    expect(() => child.send('x')).toThrow(/NEEDS_AGENT/)
    expect(child.state).toBe('running')
  })

  test.each([
    ['what is no JSON', Buffer.from('hello there\n')],
    ['what is no message', Buffer.from('[1,2]\n')],
    ['a member of another type', Buffer.from('{"type":"fork","id":"x"}\n')],
    ['10 MB without an end', Buffer.alloc(10_000_000, 0x20)],
  ])('that says %s loses its connection, and the program goes on', async (_, bytes) => {
    const supervisor = await mini()
    const child = await supervisor.fork()
    await child.ready
    child.stdin.write(`raw ${bytes.toString('base64')}\npid\n`)
    const lines = child.lines()
    await eventually(() => child.agents!.links.length === 0, 'the connection is closed')
    for await (const line of lines) {
      const { event, pid } = JSON.parse(line)
      if (event === 'pid') expect(pid).toBe(child.pid)
      if (event === 'pid') break
    }
    expect(supervisor.warnings.map(({ kind }) => kind)).toContain('agent')
    expect((await supervisor.fork()).pid).not.toBe(child.pid)
  })

  test('of another version of the protocol is sent away', async () => {
    const supervisor = await place.current.start({ command: MINI, env: { MINI_PROTOCOL: '9' } })
    expect(supervisor.warnings.map(({ message }) => message).join()).toContain('version 9 of the agent protocol')
    await expect(supervisor.fork({ data: 1 })).rejects.toMatchObject({ code: 'NEEDS_AGENT' })
    expect((await supervisor.fork()).state).toBe('running')
  })

  test('of a stranger is sent away', async () => {
    const supervisor = await mini()
    const path = environment(supervisor.template!.pid)!
      .find((entry) => entry.startsWith('WARMFORK_SOCKET='))!
      .slice('WARMFORK_SOCKET='.length)
    const said = await new Promise<string>((resolve, reject) => {
      let text = ''
      const socket = connect(path, () => {
        const hello = {
          type: 'hello',
          protocol: 1,
          agent: 'x',
          runtime: 'x',
          version: '1',
          pid: supervisor.template!.pid,
        }
        socket.write(`${JSON.stringify({ ...hello, fd: 3 })}\n`)
      })
      socket.on('data', (chunk) => {
        text += chunk
      })
      socket.once('error', reject).once('close', () => resolve(text))
    })
    expect(JSON.parse(said)).toEqual({ type: 'goodbye', reason: 'no program that boots' })
    await (await supervisor.fork()).ready
  })

  test('and its user speak to each other', async () => {
    const supervisor = await mini()
    const child = await supervisor.fork()
    const heard: unknown[] = []
    child.on('message', (data) => heard.push(data))
    child.stdin.write('say {"type":"message","data":{"json":{"a":1}}}\n')
    child.stdin.write('say {"type":"message","data":{"base64":"/w=="}}\n')
    await eventually(() => heard.length === 2, 'both are heard')
    expect(heard).toEqual([{ a: 1 }, Buffer.from([0xff])])
    child.send({ greeting: 'hello' })
    for await (const line of child.lines()) {
      expect(JSON.parse(line).message).toEqual({ type: 'message', data: { json: { greeting: 'hello' } } })
      break
    }
  })
})

describe.skipIf(!ENGINES.includes('criu'))('an agent before a checkpoint', () => {
  const place = usePlace('criu')
  const mini = (options: Partial<SupervisorOptions> = {}) =>
    place.current.start({ command: MINI, ready: { agent: true }, ...options })

  test('refuses it with the name of the hook that failed', async () => {
    await expect(mini({ env: { MINI_BEFORE: 'throw' } })).rejects.toMatchObject({
      code: 'HOOK_FAILED',
      message: expect.stringContaining('the hook `beforeIt` failed: no'),
      output: 'at beforeIt',
    })
  })

  test('gives no answer, and its forks are as those of a program without', async () => {
    const supervisor = await mini({ env: { MINI_BEFORE: 'silent' }, hookTimeoutMs: 100 })
    const warning = supervisor.warnings.find(({ kind }) => kind === 'agent')
    expect(warning?.message).toContain('AGENT_LOST')
    await expect(supervisor.fork({ data: 1 })).rejects.toMatchObject({ code: 'NEEDS_AGENT' })
    const child = await supervisor.fork()
    child.stdin.write('pid\n')
    for await (const line of child.lines()) {
      if (JSON.parse(line).event === 'pid') break
    }
    expect(child.state).toBe('running')
  })

  test('lets the template go on', async () => {
    const supervisor = await mini()
    const { pid } = supervisor.template!
    const heard: unknown[] = []
    supervisor.on('templateMessage', (data) => heard.push(data))
    expect(supervisor.template!.running).toBe(true)
    expect(pid).toBeGreaterThan(0)
  })
})

describe.skipIf(!ENGINES.includes('criu'))('a fork that a program asks for', () => {
  const place = usePlace('criu')
  const mini = (options: Partial<SupervisorOptions> = {}) =>
    place.current.start({ command: MINI, ready: { agent: true }, pool: { size: 0 }, ...options })
  // A fork shares the stdin of its parent: whichever reads first has the word. So they are spoken to by their agents.
  const generations = (supervisor: Supervisor) =>
    readdirSync(join(supervisor.store, supervisor.name, 'generations')).filter((name) => /^\d+$/.test(name))

  /** The lines of a program and those that share its stdout. */
  async function events(child: Child, count: number, wanted: (event: string) => boolean = () => true) {
    const found: Record<string, never>[] = []
    if (count === 0) return found
    for await (const line of child.lines()) {
      const value = JSON.parse(line)
      if (wanted(value.event) && found.push(value) === count) break
    }
    return found as unknown as { event: string; pid: number; call: number; data: unknown; message: never }[]
  }

  test('is a copy of it with its data, and shares its output; the program hears of its end', async () => {
    const supervisor = await mini()
    const child = await supervisor.fork()
    child.send({ do: 'say {"type":"fork","id":3,"data":{"json":"input"}}' })
    const both = await events(child, 2)
    const forked = both.find(({ event }) => event === 'forked')!
    const result = both.find(({ event }) => event === 'forkResult')!
    const copy = supervisor.children.find(({ pid }) => pid === forked.pid)!
    expect(forked).toMatchObject({ call: 3, data: { json: 'input' } })
    expect(result.message).toEqual({ type: 'forkResult', id: 3, pid: copy.pid, generation: copy.generation })
    expect((await tell(copy, 'state')).words).toEqual(['before', 'fork', 'before', 'fork'])
    expect((await tell(child, 'state')).words).toEqual(['before', 'fork', 'before', 'resumed'])
    copy.kill('SIGUSR1')
    const [exit] = await events(child, 1)
    expect(exit).toMatchObject({ event: 'childExit', message: { pid: copy.pid, code: null, signal: 'SIGUSR1' } })
    await eventually(() => generations(supervisor).length === 1, 'its generation is removed')
  })

  test('can be asked for a hundred times at once, of one checkpoint', async () => {
    const supervisor = await mini()
    const child = await supervisor.fork()
    await child.ready
    const calls = Array.from({ length: 100 }, (_, i) => JSON.stringify({ type: 'fork', id: i, data: { json: i } }))
    child.stdin.write(`raw ${Buffer.from(`${calls.join('\n')}\n`).toString('base64')}\n`)
    const all = await events(child, 200)
    const forked = all.filter(({ event }) => event === 'forked')
    expect(new Set(forked.map(({ pid }) => pid)).size).toBe(100)
    expect(forked.map(({ call }) => call).sort((a, b) => a - b)).toEqual(calls.map((_, i) => i))
    for (const { call, data } of forked) expect(data).toEqual({ json: call })
    const results = all.filter(({ event }) => event === 'forkResult')
    expect(new Set(results.map(({ message }) => (message as { generation: number }).generation)).size).toBe(1)
    expect(supervisor.children).toHaveLength(101)
  })

  test('can ask for one itself, ten deep', async () => {
    const supervisor = await mini()
    const first = await supervisor.fork()
    let current = first
    for (let depth = 1; depth <= 10; depth++) {
      const known = new Set(supervisor.children)
      current.send({ do: `say {"type":"fork","id":${depth}}` })
      await eventually(() => supervisor.children.some((one) => !known.has(one)), `fork ${depth} is there`)
      current = supervisor.children.find((one) => !known.has(one))!
      await current.ready
    }
    const { words, forked } = await tell(current, 'state')
    expect(words.filter((word) => word === 'fork')).toHaveLength(11)
    expect(forked).toMatchObject({ call: 10, pid: current.pid })
  })

  test('while a checkpoint is under way waits for the next', async () => {
    const supervisor = await mini()
    const child = await supervisor.fork()
    await child.ready
    child.send({ do: 'say {"type":"fork","id":1}' })
    await new Promise((resolve) => setTimeout(resolve, 15))
    child.send({ do: 'say {"type":"fork","id":2}' })
    const results = await events(child, 2, (event) => event === 'forkResult')
    expect(results.map(({ message }) => (message as { id: number }).id)).toEqual([1, 2])
  })

  test('can be made again of a checkpoint that is kept, until that is dropped', async () => {
    const supervisor = await mini()
    const child = await supervisor.fork()
    child.send({ do: 'say {"type":"keep","id":1}' })
    const [kept] = await events(child, 1)
    const { generation } = kept!.message as { generation: number }
    for (const id of [2, 3]) child.send({ do: `say {"type":"fork","id":${id},"generation":${generation}}` })
    const results = await events(child, 2, (event) => event === 'forkResult')
    expect(results.map(({ message }) => message)).toEqual([
      expect.objectContaining({ generation }),
      expect.objectContaining({ generation }),
    ])
    child.send({ do: `say {"type":"drop","generation":${generation}}` })
    child.send({ do: `say {"type":"fork","id":4,"generation":${generation}}` })
    const [refused] = await events(child, 1, (event) => event === 'forkResult')
    expect(refused!.message).toMatchObject({ id: 4, error: { code: 'GENERATION_NOT_FOUND' } })
  })

  test('and the program speak to each other', async () => {
    const supervisor = await mini()
    const child = await supervisor.fork()
    child.send({ do: 'say {"type":"fork","id":1}' })
    const [forked] = await events(child, 1, (event) => event === 'forked')
    child.send({ do: `say {"type":"message","to":${forked!.pid},"data":{"json":"down"}}` })
    const [down] = await events(child, 1, (event) => event === 'message')
    expect(down!.message).toEqual({ type: 'message', data: { json: 'down' }, from: 'parent' })
    const copy = supervisor.children.find(({ pid }) => pid === forked!.pid)!
    copy.send({ do: 'say {"type":"message","to":"parent","data":{"json":"up"}}' })
    const [up] = await events(child, 1, (event) => event === 'message')
    expect(up!.message).toEqual({ type: 'message', data: { json: 'up' }, from: copy.pid })
    child.send({ do: 'say {"type":"message","to":1,"data":{"json":"nobody"}}' })
    expect((await events(child, 1))[0]!.event).toBe('error')
  })

  test('of the template shares its output with it', async () => {
    const supervisor = await mini()
    const output: string[] = []
    supervisor.on('templateOutput', (_, chunk) => output.push(chunk.toString()))
    const { pid } = supervisor.template!
    process.kill(pid, 'SIGUSR2')
    await eventually(() => supervisor.children.length === 1, 'it is there')
    await supervisor.children[0]!.ready
    await eventually(() => output.join('').includes(`"pid": ${supervisor.children[0]!.pid}`), 'its word is heard')
  })

  test('leaves nothing, and repeats nothing, in 500', async () => {
    const supervisor = await mini()
    const parent = await supervisor.fork()
    await parent.ready
    parent.send({ do: 'say {"type":"keep","id":1}' })
    const [kept] = await events(parent, 1)
    const { generation } = kept!.message as { generation: number }
    const before = fds()
    const seeds = new Set<string>()
    const seen = new Set<number>()
    for (let round = 0; round < 20; round++) {
      const calls = Array.from({ length: 25 }, (_, i) =>
        JSON.stringify({ type: 'fork', id: round * 25 + i, generation }),
      )
      parent.stdin.write(`raw ${Buffer.from(`${calls.join('\n')}\n`).toString('base64')}\n`)
      await events(parent, 25, (event) => event === 'forkResult')
      const copies = supervisor.children.filter((one) => one !== parent)
      for (const copy of copies) {
        await copy.ready
        const { forked, seed } = await tell(copy, 'state')
        seeds.add(seed).add(forked.seed)
        seen.add(copy.pid)
      }
      await Promise.all(copies.map((copy) => copy.end({ graceMs: 0 })))
    }
    expect(seeds.size).toBe(1000)
    expect(seen.size).toBe(500)
    await eventually(() => fds() <= before + 4, 'all descriptors are given back')
    expect(readFileSync('/proc/self/status', 'latin1')).toContain('Tgid')
  })
})
