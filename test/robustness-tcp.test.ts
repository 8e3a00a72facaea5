/** Unmodified servers on a TCP port. */
import { Agent, get } from 'node:http'
import { createServer } from 'node:net'
import { join } from 'node:path'
import { text } from 'node:stream/consumers'
import { describe, expect, test } from 'vitest'
import { ask, PROGRAMS } from './engines-under-test.js'
import { useCleanPlace } from './leftovers.js'

interface Answer {
  body: string
  /** Of our side of the connection. */
  localPort: number
}

function fetched(port: number, agent?: Agent): Promise<Answer> {
  return new Promise((resolve, reject) => {
    const options = { host: '127.0.0.1', port, path: '/', agent: agent ?? false }
    const asked = get(options, (response) => {
      const localPort = response.socket.localPort!
      text(response).then((body) => resolve({ body, localPort }), reject)
    })
    asked.once('error', reject)
  })
}

/** A port that is free now. */
async function freePort(): Promise<number> {
  const server = createServer().listen(0, '127.0.0.1')
  await new Promise((resolve) => server.once('listening', resolve))
  const { port } = server.address() as { port: number }
  await new Promise((resolve) => server.close(resolve))
  return port
}

describe('a server on a TCP port', () => {
  const place = useCleanPlace()

  async function serve(warm?: (port: number) => Promise<void>, afterCheckpoint: 'continue' | 'end' = 'continue') {
    let port = 0
    const supervisor = await place.current.start({
      command: [process.execPath, join(PROGRAMS, 'tcp-server.mjs')],
      ready: { output: 'port' },
      template: { afterCheckpoint },
      pool: { size: 0 },
      warmup: async ({ output }) => {
        port = Number(/port (\d+)/.exec(output)![1])
        await warm?.(port)
      },
    })
    return { supervisor, port }
  }

  async function whoAnswers(port: number, times: number): Promise<Set<string>> {
    return new Set((await Promise.all(Array.from({ length: times }, () => fetched(port)))).map(({ body }) => body))
  }

  test('is shared by its forks, which all answer', async () => {
    const { supervisor, port } = await serve(undefined, 'end')
    const children = [await supervisor.fork(), await supervisor.fork()]
    let seen = new Set<string>()
    for (let i = 0; i < 20 && seen.size < 2; i++) seen = new Set([...seen, ...(await whoAnswers(port, 40))])
    expect(seen).toEqual(new Set(children.map(({ pid }) => String(pid))))
  })

  test('loses no connection that waits when its only child is killed', async () => {
    const { supervisor, port } = await serve(undefined, 'end')
    const child = await supervisor.fork()
    child.kill('SIGSTOP')
    const waiting = fetched(port)
    await new Promise((resolve) => setTimeout(resolve, 100))
    child.kill('SIGKILL')
    await child.exit
    const next = await supervisor.fork()
    expect((await waiting).body).toBe(String(next.pid))
  })

  test('keeps its open connections, of which its forks see the end', async () => {
    const agent = new Agent({ keepAlive: true, maxSockets: 1 })
    try {
      let first: Answer | undefined
      const { supervisor, port } = await serve(async (port) => {
        first = await fetched(port, agent)
      })
      expect(first!.body).toBe(String(supervisor.template!.pid))
      const child = await supervisor.fork()
      await expect.poll(() => ask(child, 'connections')).toBe('0')
      expect(await ask(child, 'closed')).toBe('1')
      const again = await fetched(port, agent)
      expect(again).toEqual(first)
    } finally {
      agent.destroy()
    }
  })

  test('gives its port back at the stop', async () => {
    const { supervisor, port } = await serve()
    await supervisor.fork()
    await supervisor.stop()
    const server = createServer().listen(port, '127.0.0.1')
    await new Promise((resolve, reject) => server.once('listening', resolve).once('error', reject))
    await new Promise((resolve) => server.close(resolve))
  })

  test('python3 -m http.server: its forks answer after the template has ended', async () => {
    const port = await freePort()
    const supervisor = await place.current.start({
      command: ['python3', '-m', 'http.server', String(port), '--bind', '127.0.0.1'],
      ready: { port },
      template: { afterCheckpoint: 'end' },
      pool: { size: 1 },
    })
    const children = [await supervisor.fork(), await supervisor.fork()]
    for (const child of children) child.stderr.resume()
    for (let i = 0; i < 10; i++) expect((await fetched(port)).body).toContain('Directory listing')
    await children[0]!.end({ graceMs: 100 })
    for (let i = 0; i < 10; i++) expect((await fetched(port)).body).toContain('Directory listing')
  })
})
