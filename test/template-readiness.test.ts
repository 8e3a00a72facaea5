import { writeFileSync } from 'node:fs'
import { createServer } from 'node:net'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import type { ReadyOption } from '../src/options.js'
import { PROGRAMS, usePlace } from './engines-under-test.js'

const place = usePlace('spawn')
const shell = (script: string): readonly [string, ...string[]] => ['sh', '-c', script]
/** A program that is ready after 300 ms, starts without a pool. */
const start = (script: string, ready: ReadyOption) =>
  place.current.start({ command: shell(script), ready, pool: { size: 0 } })

async function freePort(): Promise<number> {
  const server = createServer().listen(0, '127.0.0.1')
  await new Promise((resolve) => server.once('listening', resolve))
  const { port } = server.address() as { port: number }
  await new Promise((resolve) => server.close(resolve))
  return port
}

describe('a template is ready', () => {
  test('when its output matches a regular expression, in a line that comes in pieces', async () => {
    const supervisor = await start('printf "listening on "; sleep 0.3; echo "port 80 now"; exec sleep 1000', {
      output: /^listening on port \d+ now$/,
    })
    expect(supervisor.template!.readyMs).toBeGreaterThanOrEqual(290)
  })

  test('when its output contains a text, without a line end', async () => {
    await start('printf "> "; exec sleep 1000', { output: '> ' })
  })

  test('when the stream that was named matches, and not the other', async () => {
    const supervisor = await start('echo ready; sleep 0.3; echo ready >&2; exec sleep 1000', {
      output: 'ready',
      stream: 'stderr',
    })
    expect(supervisor.template!.readyMs).toBeGreaterThanOrEqual(290)
  })

  test.each(['g', 'y'])('each time that a regular expression with the flag %s matches', async (flag) => {
    const output = new RegExp('ready', flag)
    await start('echo ready; exec sleep 1000', { output })
    await start('echo ready; exec sleep 1000', { output })
  })

  test('when a port accepts', async () => {
    const port = await freePort()
    const supervisor = await place.current.start({
      command: [process.execPath, join(PROGRAMS, 'server.mjs'), String(port)],
      ready: { port },
      pool: { size: 0 },
    })
    expect(supervisor.template!.running).toBe(true)
  })

  test('when a URL is answered with 2xx, and not with 500', async () => {
    const port = await freePort()
    const command = [process.execPath, join(PROGRAMS, 'server.mjs'), String(port)] as const
    await place.current.start({
      command,
      ready: { http: `http://127.0.0.1:${port}/` },
      pool: { size: 0 },
      name: 'good',
    })
    const bad = { http: `http://127.0.0.1:${port}/bad`, timeoutMs: 500 }
    await expect(
      place.current.start({ command: shell('exec sleep 1000'), ready: bad, name: 'bad' }),
    ).rejects.toMatchObject({
      code: 'TEMPLATE_NOT_READY',
    })
  })

  test('when a file appears, not by one that was there before', async () => {
    const path = join(place.current.directory, 'ready-file')
    writeFileSync(path, '')
    await new Promise((resolve) => setTimeout(resolve, 50))
    const supervisor = await start(`sleep 0.3; echo > '${path}'; exec sleep 1000`, { file: path })
    expect(supervisor.template!.readyMs).toBeGreaterThanOrEqual(290)
  })

  test('after a delay', async () => {
    const supervisor = await start('exec sleep 1000', { delayMs: 200 })
    expect(supervisor.template!.readyMs).toBeGreaterThanOrEqual(199)
  })

  test('when it is idle: no CPU use', async () => {
    const busy = 'end=$(($(date +%s%N) + 700000000)); while [ $(date +%s%N) -lt $end ]; do :; done'
    const supervisor = await start(`${busy}; exec sleep 1000`, { idleMs: 300 })
    expect(supervisor.template!.readyMs).toBeGreaterThanOrEqual(900)
  })

  test('when it is idle: no output', async () => {
    const supervisor = await start('for i in 1 2 3 4; do sleep 0.2; echo $i; done; exec sleep 1000', { idleMs: 400 })
    expect(supervisor.template!.readyMs).toBeGreaterThanOrEqual(1_150)
  })

  test('when a function says so', async () => {
    const seen: string[] = []
    const supervisor = await start('sleep 0.3; echo up; exec sleep 1000', (template) => {
      seen.push(template.output)
      return template.output.includes('up')
    })
    expect(seen[0]).toBe('')
    expect(seen.at(-1)).toBe('up\n')
    expect(supervisor.template!.running).toBe(true)
  })

  test('when the promise of a function resolves with nothing', async () => {
    await start('exec sleep 1000', async () => {})
  })
})

describe('a template is not ready', () => {
  const never: readonly [string, ReadyOption][] = [
    ['output', { output: 'never', timeoutMs: 300 }],
    ['port', { port: 9, timeoutMs: 300 }],
    ['http', { http: 'http://127.0.0.1:9/', timeoutMs: 300 }],
    ['file', { file: 'never', timeoutMs: 300 }],
    ['idle', { idleMs: 10_000, timeoutMs: 300 }],
    ['function', { check: () => false, timeoutMs: 300 }],
    ['function that never resolves', { check: () => new Promise(() => {}), timeoutMs: 300 }],
  ]

  test.each(never)('when the condition %s is not met in time: the error has its last output', async (_, ready) => {
    const started = start('echo one; echo two >&2; exec sleep 1000', ready)
    await expect(started).rejects.toMatchObject({
      code: 'TEMPLATE_NOT_READY',
      output: expect.stringMatching(/^(one\ntwo\n|two\none\n)$/),
    })
    expect(place.current.processes()).toEqual([])
  })

  test('when the function throws: the error is the cause', async () => {
    const cause = new Error('no database')
    const started = start('exec sleep 1000', () => {
      throw cause
    })
    await expect(started).rejects.toMatchObject({
      code: 'TEMPLATE_NOT_READY',
      cause,
      happened: expect.stringContaining('no database'),
    })
  })
})
