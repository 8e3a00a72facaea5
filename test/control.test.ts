/** The control socket: who may speak, and what comes of what should not be said. Against a supervisor that runs. */
import { spawn } from 'node:child_process'
import { chmodSync, mkdirSync, statSync } from 'node:fs'
import { connect, createServer } from 'node:net'
import { dirname, join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { ControlClient } from '../src/control/client.js'
import { MAX_LINE_BYTES, PROTOCOL } from '../src/control/protocol.js'
import { defaultRuntimeDirectory } from '../src/control/runtime-directory.js'
import { LineSplitter } from '../src/lines.js'
import { resolveOptions } from '../src/options.js'
import { type Running, Terminal } from './cli-harness.js'
import { failure, isRoot } from './fixtures/generations.js'

const terminal = new Terminal()
let supervisor: Running
beforeAll(async () => {
  supervisor = await terminal.run('shop', ['--engine', 'spawn', '--pool-size', '0'])
})
afterAll(() => terminal.leave())

const HELLO = `{"hello":{"protocol":${PROTOCOL}}}\n`

/** Sends bytes, and gives the lines that came until the connection ended. */
function say(...parts: (string | Buffer)[]): Promise<Record<string, unknown>[]> {
  return new Promise((resolve) => {
    const socket = connect(supervisor.socket)
    let text = ''
    socket.on('data', (chunk) => {
      text += chunk
    })
    socket.on('error', () => {})
    socket.on('close', () =>
      resolve(
        text
          .trim()
          .split('\n')
          .map((line) => JSON.parse(line)),
      ),
    )
    for (const part of parts) socket.write(part)
    socket.end()
  })
}

/** Whether it still serves. */
async function serves(): Promise<boolean> {
  const client = await ControlClient.connect(supervisor.socket)
  const { state } = await client.request('status', {})
  client.close()
  return state === 'running'
}

describe('what is said to a supervisor', () => {
  test('it says hello first, with its name and the version of the protocol', async () => {
    const [first] = await say(HELLO)
    expect(first).toEqual({
      hello: {
        protocol: PROTOCOL,
        version: expect.any(String),
        name: 'shop',
        pid: supervisor.pid,
        store: terminal.store,
      },
    })
  })

  test.each([
    ['garbage', 'GET / HTTP/1.1\r\n\r\n', 'a line is no JSON'],
    ['bytes that are no text', Buffer.from([0xff, 0xfe, 0x00, 0x0a]), 'a line is no JSON'],
    ['a list', '[]\n', 'a line is no object'],
    ['no hello', '{"id":1,"method":"status"}\n', 'the first line is no hello'],
    ['half a line', '{"hello":', 'the connection ended in the middle of a line'],
    ['a request without an id', `${HELLO}{"method":"status"}\n`, 'a request has no id'],
    ['a negative id', `${HELLO}{"id":-1,"method":"status"}\n`, 'a request has no id'],
    ['half a request', `${HELLO}{"id":1,`, 'the connection ended in the middle of a line'],
  ])('%s ends the connection with a reason, and nothing else', async (_, bytes, happened) => {
    const lines = await say(bytes)
    expect(lines.at(-1)).toMatchObject({ error: { code: 'BAD_OPTION', happened } })
    expect(lines.at(-1)).not.toHaveProperty('id')
    expect(await serves()).toBe(true)
  })

  test('another version of the protocol is refused with both', async () => {
    const [, answer] = await say('{"hello":{"protocol":99}}\n')
    expect((answer!.error as { happened: string }).happened).toMatch(/^the client speaks version 99 .* version 1$/)
  })

  test.each([
    [
      'an unknown method',
      '{"id":1,"method":"reboot"}',
      'there is no method "reboot"; there are status, fork, signal, resize, refork, rollback, pin, workers, stop',
    ],
    [
      'a method of the prototype',
      '{"id":1,"method":"constructor"}',
      'there is no method "constructor"; there are status, fork, signal, resize, refork, rollback, pin, workers, stop',
    ],
    [
      'no method',
      '{"id":1}',
      'there is no method undefined; there are status, fork, signal, resize, refork, rollback, pin, workers, stop',
    ],
    [
      'unknown params',
      '{"id":1,"method":"status","params":{"all":true}}',
      'the params of status are not what it takes',
    ],
    [
      'params that are no object',
      '{"id":1,"method":"status","params":[1]}',
      'the params of status are not what it takes',
    ],
    [
      'a signal that is none',
      '{"id":1,"method":"signal","params":{"request":2,"signal":"SIGWRONG"}}',
      'the params of signal are not what it takes',
    ],
    [
      'a time below zero',
      '{"id":1,"method":"stop","params":{"graceMs":-1}}',
      'the params of stop are not what it takes',
    ],
  ])('%s is answered, and the connection goes on', async (_, line, happened) => {
    const answers = await say(`${HELLO}${line}\n{"id":2,"method":"signal","params":{"request":1,"signal":"SIGINT"}}\n`)
    expect(answers.slice(1)).toEqual([
      { id: 1, error: expect.objectContaining({ code: 'BAD_OPTION', happened }) },
      { id: 2, result: { delivered: false } },
    ])
  })

  test('a line of 10 MB is refused without being kept', async () => {
    const lines = await say(HELLO, Buffer.alloc(10_000_000, 97))
    expect(lines.at(-1)).toMatchObject({ error: { happened: `a line of more than ${MAX_LINE_BYTES} bytes` } })
    expect(await serves()).toBe(true)
  })

  test('a request that comes in single bytes is answered', async () => {
    const bytes = Buffer.from(`${HELLO}{"id":1,"method":"signal","params":{"request":1,"signal":"SIGINT"}}\n`)
    const answers = await say(...Array.from(bytes, (byte) => Buffer.from([byte])))
    expect(answers.at(-1)).toEqual({ id: 1, result: { delivered: false } })
  })

  test('a client that goes away without a word harms nothing', async () => {
    for (let i = 0; i < 50; i++) {
      await new Promise<void>((resolve) => {
        const socket = connect(supervisor.socket, () => socket.destroy())
        socket.once('close', () => resolve())
      })
    }
    expect(await serves()).toBe(true)
  })

  test('100 clients are served at once', async () => {
    const clients = await Promise.all(Array.from({ length: 100 }, () => ControlClient.connect(supervisor.socket)))
    const results = await Promise.all(
      clients.map((client) => client.request('signal', { request: 9, signal: 'SIGINT' })),
    )
    for (const client of clients) client.close()
    expect(results).toEqual(Array.from({ length: 100 }, () => ({ delivered: false })))
  })
})

describe('who may speak', () => {
  test('the socket and its directory are for its user only', () => {
    expect(statSync(supervisor.socket).mode & 0o777).toBe(0o600)
    expect(statSync(dirname(supervisor.socket)).mode & 0o777).toBe(0o700)
  })

  test.runIf(isRoot)('another user is refused, even where the modes let him in', async () => {
    const opened = [terminal.directory, terminal.runtimeDirectory, dirname(supervisor.socket)]
    for (const path of opened) chmodSync(path, 0o711)
    chmodSync(supervisor.socket, 0o666)
    try {
      const script = `require('net').connect(process.argv[1]).on('data', (line) => process.stdout.write(line)).on('error', () => {})`
      const other = spawn(process.execPath, ['-e', script, supervisor.socket], {
        uid: 65_534,
        gid: 65_534,
        timeout: 10_000,
      })
      let text = ''
      other.stdout.on('data', (chunk) => {
        text += chunk
      })
      await new Promise((resolve) => other.once('close', resolve))
      expect(JSON.parse(text)).toMatchObject({
        error: { happened: 'user 65534 may not speak to a supervisor of user 0' },
      })
    } finally {
      chmodSync(supervisor.socket, 0o600)
      for (const path of opened) chmodSync(path, 0o700)
    }
  })
})

describe('the client', () => {
  /** Something else that listens. */
  async function impostor(greeting: string): Promise<{ path: string; close(): Promise<void> }> {
    const directory = join(terminal.directory, 'other')
    mkdirSync(directory, { recursive: true, mode: 0o700 })
    const path = join(directory, 'control.sock')
    const server = createServer((socket) => {
      socket.on('error', () => {}).resume()
      socket.write(greeting)
    })
    await new Promise<void>((resolve) => server.listen(path, resolve))
    return { path, close: () => new Promise((resolve) => server.close(() => resolve())) }
  }

  test('says that something else listens', async () => {
    const { path, close } = await impostor('220 mail ESMTP\r\n')
    const error = await failure('BAD_OPTION', () => ControlClient.connect(path))
    expect(error.happened).toBe('what answers there does not speak the protocol of warmfork')
    await close()
  })

  test('names both versions where the supervisor is another', async () => {
    const { path, close } = await impostor('{"hello":{"protocol":2,"version":"9.0.0"}}\n')
    const error = await failure('BAD_OPTION', () => ControlClient.connect(path))
    expect(error.message).toContain('it speaks version 2 of the protocol (warmfork 9.0.0) and this is version 1')
    await close()
  })

  test('gives up on a supervisor that says nothing', async () => {
    const { path, close } = await impostor('')
    await failure('TIMEOUT', () => ControlClient.connect(path))
    await close()
  })

  test('tells that there is no socket', async () => {
    await failure('NO_SUPERVISOR', () => ControlClient.connect(join(terminal.directory, 'control.sock')))
  })
})

test('the command line looks where a supervisor is by default', () => {
  expect(defaultRuntimeDirectory()).toBe(resolveOptions({ command: ['true'] }).runtimeDirectory)
})

describe('lines', () => {
  test('are put together from parts, and bounded', () => {
    const lines = new LineSplitter(8)
    expect(lines.push(Buffer.from('one\ntw'))).toEqual([Buffer.from('one')])
    expect(lines.pendingBytes).toBe(2)
    expect(lines.push(Buffer.from('o\n\nthree\n')).map(String)).toEqual(['two', '', 'three'])
    expect(() => lines.push(Buffer.from('123456789'))).toThrow(RangeError)
  })
})
