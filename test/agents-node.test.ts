import { connect, type Socket } from 'node:net'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { describe, expect, test } from 'vitest'
import type { Child } from '../src/child.js'
import type { SupervisorOptions } from '../src/options.js'
import { ENGINES, eventually, usePlace } from './engines-under-test.js'
import { NODES } from './runtimes/nodes.js'

const APP: readonly [string, ...string[]] = [
  process.execPath,
  join(import.meta.dirname, 'fixtures/agents-node/app.mjs'),
]

let sequence = 0

/** Has the program do something. Rejects with what it threw. */
function tell<T = unknown>(child: Child, command: string, more: object = {}): Promise<T> {
  const id = ++sequence
  return new Promise((resolve, reject) => {
    const onMessage = (data: unknown) => {
      const answer = data as { id?: number; result: T; error?: object }
      if (answer.id !== id) return
      child.off('message', onMessage)
      if (answer.error) reject(answer.error)
      else resolve(answer.result)
    }
    child.on('message', onMessage)
    child.send({ id, command, ...more })
  })
}

interface State {
  pid: number
  port: number
  payload: unknown
  isFork: boolean
  counts: { interval: number; timers: number; connections: number }
}

describe.skipIf(!ENGINES.includes('criu'))('the agent of a Node program', () => {
  const place = usePlace('criu')
  const app = (options: Partial<SupervisorOptions> = {}) =>
    place.current.start({ command: APP, ready: { agent: true }, pool: { size: 0 }, ...options })
  const forked = async (options: Partial<SupervisorOptions> = {}) => {
    const supervisor = await app(options)
    const child = await supervisor.fork()
    await child.ready
    return { supervisor, child }
  }

  test('forks it twenty times at once, of one checkpoint, and each has its own input', async () => {
    const { supervisor, child } = await forked()
    const said: { data: unknown; pid: number }[] = []
    supervisor.on('child', (copy) => copy.on('message', (data) => said.push(data as never)))
    const result = await tell<{ pids: number[]; generations: number[] }>(child, 'fork', { count: 20 })
    expect(new Set(result.pids).size).toBe(20)
    expect(result.generations).toHaveLength(1)
    await eventually(() => said.length === 20, 'all have run their function')
    expect(said.map(({ data }) => data).sort((a, b) => Number(a) - Number(b))).toEqual(result.pids.map((_, i) => i))
    expect(said.map(({ pid }) => pid).sort()).toEqual([...result.pids].sort())
    expect((await tell<State>(child, 'state')).payload).toBe(null)
  })

  test('hears what its forks say before it listens to them, and how each ends', async () => {
    const { child } = await forked()
    const heard = await tell<{ said: number; code: number }[]>(child, 'family', { count: 8 })
    expect(heard).toEqual(Array.from({ length: 8 }, (_, i) => ({ said: i, code: i })))
  })

  test.each(NODES)('draws in no two forks of %s the same, in the main thread and in a Worker', async (_, node) => {
    const supervisor = await app({ command: [node, ...APP.slice(1)] })
    const draws = await Promise.all(
      Array.from({ length: 8 }, async () => {
        const child = await supervisor.fork()
        await child.ready
        return tell<unknown[]>(child, 'draw')
      }),
    )
    const values = draws.flat()
    expect(values.length).toBeGreaterThanOrEqual(8 * 10)
    expect(new Set(values).size).toBe(values.length)
  })

  test('gives a hook on fork all of its time, however long its process was parked', async () => {
    const supervisor = await app({ pool: { size: 1 }, hookTimeoutMs: 400, env: { ON_FORK: 'wait' } })
    await sleep(1_200)
    await (await supervisor.fork()).ready
    expect((await supervisor.stats()).forks).toMatchObject({ fromPool: 1 })
  })

  test('is sent nothing that it would not take', async () => {
    const { child } = await forked()
    expect(() => child.send('x'.repeat(17 << 20))).toThrow(expect.objectContaining({ code: 'BAD_OPTION' }))
    expect(await tell<State>(child, 'state')).toMatchObject({ isFork: true })
  })

  test('forks it in the midst of a thousand connections and a hundred timers, of which it loses none', async () => {
    // The template would accept connections too: it shares the listening socket.
    const { supervisor, child } = await forked({ template: { afterCheckpoint: 'end' } })
    const { port } = await tell<State>(child, 'state')
    const sockets: Socket[] = []
    try {
      for (let i = 0; i < 1000; i++) {
        const socket = connect(port, '127.0.0.1')
        socket.on('error', () => {})
        sockets.push(socket)
        await new Promise((resolve) => socket.once('connect', resolve))
      }
      await eventually(() => sockets.every((socket) => !socket.connecting), 'all are connected')
      await tell(child, 'timers', { count: 100, ms: 700 })
      await tell(child, 'fork')
      const answers = sockets.map(
        (socket) =>
          new Promise<string>((resolve) => {
            let text = ''
            socket.on('data', (chunk) => {
              text += chunk
              if (text.endsWith(`${child.pid}`)) resolve(text)
            })
            socket.once('close', () => resolve('closed'))
          }),
      )
      for (const socket of sockets) socket.write('GET / HTTP/1.1\r\nHost: x\r\n\r\n')
      const texts = await Promise.all(answers)
      expect(texts.filter((text) => !text.startsWith('HTTP/1.1 200'))).toEqual([])
      await sleep(800)
      expect((await tell<State>(child, 'state')).counts).toMatchObject({ connections: 1000, timers: 100 })
      expect(supervisor.children).toHaveLength(2)
    } finally {
      for (const socket of sockets) socket.destroy()
    }
  })

  test.each([
    ['throws', 'throw', 'HOOK_FAILED', /`beforeIt` failed: not now/],
    ['never resolves', 'hang', 'HOOK_FAILED', /`beforeIt` failed: it was not done within 300 ms/],
  ])('lets it go on where a hook before a checkpoint %s', async (_, act, code, message) => {
    const { supervisor, child } = await forked({ hookTimeoutMs: 300 })
    await tell(child, 'hook', { kind: 'before', act })
    await expect(tell(child, 'fork')).rejects.toMatchObject({ code, message: expect.stringMatching(message) })
    await tell(child, 'hook', { kind: 'before', act: 'none' })
    await tell(child, 'fork')
    expect(supervisor.children).toHaveLength(2)
  })

  test('ends with its own status where a hook before a checkpoint exits, and no other does', async () => {
    const { supervisor, child } = await forked()
    await tell(child, 'hook', { kind: 'before', act: 'exit' })
    tell(child, 'fork').catch(() => {})
    expect(await child.exit).toEqual({ code: 5, signal: null })
    await (await supervisor.fork()).ready
  })

  test.each([
    ['throws', 'throw', 70, 'HOOK_FAILED'],
    ['exits', 'exit', 5, 'CHILD_GONE'],
  ])('ends a fork where its hook %s, and the source lives on', async (_, act, code, error) => {
    const { supervisor, child } = await forked()
    await tell(child, 'hook', { kind: 'fork', act })
    const copy = new Promise<Child>((resolve) => supervisor.once('child', resolve))
    await tell(child, 'fork')
    await expect((await copy).ready).rejects.toMatchObject({ code: error })
    expect((await (await copy).exit).code).toBe(code)
    expect((await tell<State>(child, 'state')).pid).toBe(child.pid)
  })

  test('lets a hook fork, once the program goes on', async () => {
    const { supervisor, child } = await forked()
    await tell(child, 'hook', { kind: 'before', act: 'fork' })
    await tell(child, 'fork')
    await eventually(() => supervisor.children.length === 3, "both the program's fork and that of its hook are there")
  })

  test('loses its supervisor where the program closes all descriptors, which gets nothing written into its files', async () => {
    const supervisor = await place.current.start({ command: APP, env: { CLOSE_ALL: '1' }, ready: { delayMs: 700 } })
    await expect(supervisor.fork({ data: 1 })).rejects.toMatchObject({ code: 'NEEDS_AGENT' })
    expect((await supervisor.fork()).state).toBe('running')
  })

  test('fires no timers in a burst', async () => {
    const supervisor = await app({ pool: { size: 1 } })
    const source = await supervisor.fork()
    await source.ready
    await tell(source, 'interval', { ms: 20 })
    const copies: Child[] = []
    supervisor.on('child', (child) => copies.push(child))
    await tell(source, 'fork')
    const before = (await tell<State>(copies[0]!, 'state')).counts.interval
    await sleep(200)
    const { interval } = (await tell<State>(copies[0]!, 'state')).counts
    expect(interval - before).toBeGreaterThan(2)
    expect(interval - before).toBeLessThan(20)
  })

  test('asks on no connection that its source has kept', async () => {
    const { child } = await forked({ env: { WARM: '1' } })
    expect(await tell(child, 'get')).toEqual({ text: expect.stringMatching(/^\d+$/) })
  })

  test('is none where it is switched off, and the program has hooks that nobody calls', async () => {
    const supervisor = await place.current.start({ command: APP, agent: false, ready: { delayMs: 500 } })
    expect(supervisor.warnings.map(({ kind }) => kind)).toContain('repeats')
    await expect(supervisor.fork({ args: ['x'] })).rejects.toMatchObject({ code: 'NEEDS_AGENT' })
  })
})
