/** Rest before a checkpoint, as far as connections of Unix sockets go. */
import { once } from 'node:events'
import { connect, type Socket } from 'node:net'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { expect, test } from 'vitest'
import { useCleanPlace } from './leftovers.js'

const SERVER = fileURLToPath(new URL('fixtures/descriptors/slow-server.py', import.meta.url))
const place = useCleanPlace()

/** A supervisor of a server that somebody has sent a request to. */
async function served(when: string, restTimeoutMs: number) {
  const path = join(place.current.directory, 'socket')
  let client: Socket | undefined
  const supervisor = place.current.start({
    command: ['/usr/bin/python3', SERVER, path, when],
    template: { restTimeoutMs },
    pool: { size: 0 },
    warmup: async () => {
      client = connect(path)
      client.on('error', () => {})
      await once(client, 'connect')
      // Sent, and not only handed to the event loop: else there is rest before it comes.
      await new Promise((resolve) => client?.write('request', resolve))
    },
  })
  return { supervisor: await supervisor.finally(() => client?.unref()), client: client! }
}

test.each([
  ['never', /a connection to .*\/socket has 7 bytes that it has not read/],
  ['deaf', /1 connections wait to be accepted at .*\/socket/],
])(
  'a request on a Unix socket that is read %s keeps the checkpoint off, and the error names it',
  async (when, words) => {
    await expect(served(when, 400)).rejects.toMatchObject({
      code: 'NOT_AT_REST',
      message: expect.stringMatching(words),
    })
  },
)

test('a request on a Unix socket is waited for, and answered once', async () => {
  const started = performance.now()
  const { supervisor, client } = await served('0.5', 10_000)
  try {
    expect(performance.now() - started).toBeGreaterThan(500)
    await supervisor.fork()
    const answer = await new Promise((resolve) => client.once('data', resolve))
    expect(String(answer)).toBe('answer')
  } finally {
    client.destroy()
  }
})
