/** What is the Node agent's own beside the script of all agents: its supervisor is a socket of the test. */
import { existsSync, readlinkSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { afterEach, describe, expect, test } from 'vitest'
import { type AgentSide, Conformer, type ProgramEvent, type RuntimeSpec, SILENCE_MS } from './agents-conformance.js'
import { NODES } from './runtimes/nodes.js'

const path = (relative: string) => fileURLToPath(new URL(relative, import.meta.url))
const AGENT = path('../dist/agents/node/agent.cjs')

describe.skipIf(!existsSync(AGENT))('the Node agent', () => {
  let program: Conformer
  afterEach(() => program.end())

  const spec = (act: string, node = process.execPath, preload = true): RuntimeSpec => ({
    name: 'Node',
    runtime: 'node',
    missing: () => undefined,
    command: [node, path('fixtures/agents-node/acts.mjs'), act],
    env: preload ? { NODE_OPTIONS: `--require ${AGENT}` } : {},
  })
  /** Runs one act of the fixture. It is preloaded, but where the program is to load it by its one line. */
  const start = (...parameters: Parameters<typeof spec>) => Conformer.start(spec(...parameters))
  const greet = async () => {
    const agent = await program.connection()
    agent.send({ type: 'welcome', protocol: 1 })
    return agent
  }
  const fork = async (agent: AgentSide, more = {}): Promise<ProgramEvent> => {
    agent.checkpoint(1)
    await agent.expect('parked')
    agent.send(program.forked(more))
    const drawn = await program.expect('drawn')
    await agent.expect('running')
    return drawn
  }

  test.each(NODES)('tells a fork of %s from its source, in the main thread and in Workers', async (_, node) => {
    program = await start('identity', node)
    const agent = await greet()
    await program.expect('started')
    agent.checkpoint(1)
    expect(await agent.expect('parked')).toEqual({ type: 'parked', id: 1 })
    expect(await program.silence(100)).toEqual([])
    agent.send({ type: 'resumed', id: 1 })
    expect(await program.expect('identity')).toMatchObject({ pid: program.pid, inThread: program.pid })
    await agent.expect('running')
    agent.checkpoint(2)
    await agent.expect('parked')
    agent.send(program.forked({ pid: 4_000_001 }))
    expect(await program.expect('identity')).toMatchObject({ pid: 4_000_001, inThread: 4_000_001 })
    await agent.expect('running')
  })

  test('is there by the one line too, where it was not preloaded', async () => {
    program = await start('hooks', process.execPath, false)
    const agent = await greet()
    await program.expect('started')
    expect(await fork(agent, { generation: 9 })).toMatchObject({ generation: 9, isFork: true })
  })

  test.each(NODES)('says hello before all that a program of %s says when it starts', async (_, node) => {
    const first = `const agent = globalThis[Symbol.for('warmfork.agent')]
      agent.send('early'); agent.fork('first').catch(() => {}); agent.ready(); setInterval(() => {}, 1000)`
    program = await Conformer.start({ ...spec(''), command: [node, '-e', first] })
    const agent = await greet()
    expect((await agent.expect('message')).data).toEqual({ json: 'early' })
    expect((await agent.expect('fork')).data).toEqual({ json: 'first' })
    await agent.expect('ready')
  })

  test('lives through what is no message', async () => {
    program = await start('hooks')
    const agent = await greet()
    await program.expect('started')
    const words = ['null', '5', '"text"', '[]', '{}', '{"type":5}', 'half', '\xff\xfe', '', '{"type":"message"}']
    const senseless = ['{"type":"forkResult","id":99,"pid":5}', '{"type":"childExit"}', '{"type":"resumed","id":1}']
    agent.socket.write(`${[...words, ...senseless, 'x'.repeat(10 << 20)].join('\n')}\n`)
    expect(await fork(agent)).toMatchObject({ isFork: true })
  })

  test('leaves a supervisor whose line does not end', async () => {
    program = await start('hooks')
    const agent = await greet()
    await program.expect('started')
    for (let i = 0; i < 18; i++) agent.socket.write('x'.repeat(1 << 20))
    expect(await agent.next()).toBe(undefined)
    expect(await program.expect('disconnect')).toBeTruthy()
  })

  test('ends in a fork that nobody tells who it is, where its connection ends', async () => {
    program = await start('otherConnection')
    const agent = await greet()
    await program.expect('started')
    const link = () => readlinkSync(`/proc/${program.pid}/fd/${agent.hello.fd}`)
    const before = link()
    agent.checkpoint(1)
    await agent.expect('parked')
    await expect.poll(link, { timeout: 5_000 }).not.toBe(before)
    agent.socket.destroy()
    expect(await program.exit()).toEqual({ code: 70, signal: null })
  })

  test('keeps messages for the first listener, and hears the next one where a listener throws', async () => {
    program = await start('messages')
    const agent = await greet()
    await program.expect('started')
    for (const json of ['first', 'throw', 'last']) agent.send({ type: 'message', data: { json } })
    expect(await program.expect('large')).toMatchObject({ sent: 'BAD_OPTION', forked: 'BAD_OPTION' })
    expect(await program.expect('message')).toMatchObject({ data: 'first' })
    expect(await program.expect('message')).toMatchObject({ data: 'throw' })
    expect(await program.expect('message')).toMatchObject({ data: 'last' })
    expect(await program.expect('uncaught')).toMatchObject({ message: 'of a listener' })
    expect(await agent.silence(0)).toEqual([])
  })

  test('gives up a hook after a checkpoint that does not end, and can be checkpointed again', async () => {
    program = await start('hangAfter')
    const agent = await greet()
    await program.expect('started')
    agent.checkpoint(1, 200)
    await agent.expect('parked')
    agent.send({ type: 'resumed', id: 1 })
    expect(await agent.expect('running')).toMatchObject({
      error: { hook: 'takesUpAgain', message: expect.stringContaining('200 ms') },
    })
    await program.expect('second')
    agent.checkpoint(2, 200)
    expect(await agent.expect('parked')).toMatchObject({ id: 2 })
    agent.send({ type: 'resumed', id: 2 })
    await agent.expect('running')
  })

  test('names a hook that has no name by where it was registered', async () => {
    program = await start('anonymous')
    const agent = await greet()
    await program.expect('started')
    agent.checkpoint(1)
    expect((await agent.expect('refused')).error.hook).toMatch(/^acts\.mjs:\d+$/)
  })

  test('loses nothing of what comes with the answer to a fork: messages of it, and its end', async () => {
    program = await start('fork')
    const agent = await greet()
    const { id } = await agent.expect('fork')
    const lines = [
      { type: 'forkResult', id, pid: 5001, generation: 2 },
      { type: 'message', data: { json: 'first' }, from: 5001 },
      { type: 'childExit', pid: 5001, code: 3, signal: null },
    ]
    agent.socket.write(lines.map((line) => `${JSON.stringify(line)}\n`).join(''))
    expect(await program.expect('child')).toMatchObject({ said: ['first'], ended: { code: 3, signal: null } })
    expect((await program.exit()).code).toBe(0)
  })

  test('keeps the process while it waits for the end of a fork, and no longer', async () => {
    program = await start('fork')
    const agent = await greet()
    const { id } = await agent.expect('fork')
    agent.send({ type: 'forkResult', id, pid: 5001, generation: 2 })
    await program.silence(SILENCE_MS)
    agent.send({ type: 'childExit', pid: 5001, code: null, signal: 'SIGKILL' })
    expect(await program.expect('child')).toMatchObject({ ended: { code: null, signal: 'SIGKILL' } })
    expect(await program.exit()).toEqual({ code: 0, signal: null })
  })

  test('tells of no end of a fork where the supervisor goes first', async () => {
    program = await start('fork')
    const agent = await greet()
    const { id } = await agent.expect('fork')
    agent.send({ type: 'forkResult', id, pid: 5001, generation: 2 })
    await program.silence(SILENCE_MS)
    agent.socket.destroy()
    expect(await program.expect('child')).toMatchObject({ ended: { code: null, signal: null } })
  })

  test('ends by an error that the function of a fork throws, as by any other', async () => {
    program = await start('throw')
    const agent = await greet()
    const { id } = await agent.expect('fork')
    agent.checkpoint(1)
    await agent.expect('parked')
    agent.send(program.forked({ call: id }))
    await agent.expect('running')
    expect(await agent.next()).toBe(undefined)
    expect(await program.exit()).toEqual({ code: 1, signal: null })
    expect(program.stderr).toContain('Error: of its own')
  })

  test('waits for its line whatever signals come', async () => {
    program = await start('signals')
    const agent = await greet()
    await program.expect('started')
    agent.checkpoint(1)
    await agent.expect('parked')
    for (const signal of ['SIGUSR2', 'SIGSTOP', 'SIGCONT', 'SIGUSR2', 'SIGWINCH'] as const) {
      process.kill(program.pid, signal)
      await new Promise((resolve) => setTimeout(resolve, 20))
    }
    expect(await agent.silence()).toEqual([])
    agent.send({ type: 'resumed', id: 1 })
    await agent.expect('running')
    await program.expect('SIGUSR2')
  })

  test('destroys in a fork the connections that the program keeps, before its hooks', async () => {
    program = await start('connections')
    const agent = await greet()
    await program.expect('started')
    expect(await fork(agent)).toMatchObject({ destroyed: { used: true, kept: true }, reused: false })
  })

  test('goes on in the source with the connections that it keeps', async () => {
    program = await start('connections')
    const agent = await greet()
    await program.expect('started')
    agent.checkpoint(1)
    await agent.expect('parked')
    agent.send({ type: 'resumed', id: 1 })
    expect(await program.expect('resumed')).toMatchObject({ destroyed: { used: false, kept: false }, reused: true })
  })

  test('does not wait for Workers that have ended, and names those that have no agent or are busy', async () => {
    program = await start('workers')
    const agent = await greet()
    const park = async (id: number) => {
      agent.checkpoint(id)
      const { threads } = await agent.expect('parked')
      agent.send({ type: 'resumed', id })
      await agent.expect('running')
      return threads
    }
    await program.expect('terminated')
    const since = Date.now()
    expect(await park(1)).toBe(undefined)
    expect(Date.now() - since).toBeLessThan(900)
    await program.expect('withoutAgent')
    expect(await park(2)).toEqual(['Worker 5 (without an agent)'])
    await program.expect('busy')
    expect(await park(3)).toEqual(['Worker 5 (without an agent)', 'Worker 6 (busy)'])
  })
})
