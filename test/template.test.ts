import { chmodSync, mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { createConnection } from 'node:net'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { memoryUse } from '../src/linux/proc.js'
import { whatIsInHand } from '../src/rest.js'
import { ENGINES, eventually, PROGRAMS, usePlace } from './engines-under-test.js'

describe('the start of a template', () => {
  const place = usePlace('spawn')

  test('fails where there is no such program', async () => {
    await expect(place.current.start({ command: ['no-such-program'] })).rejects.toMatchObject({
      code: 'TEMPLATE_START_FAILED',
      happened: 'there is no program `no-such-program`',
    })
  })

  test('fails where the program may not be executed', async () => {
    const path = join(place.current.directory, 'plain')
    writeFileSync(path, '')
    chmodSync(path, 0o600)
    await expect(place.current.start({ command: [path] })).rejects.toMatchObject({
      code: 'TEMPLATE_START_FAILED',
      happened: expect.stringContaining('may not be executed'),
    })
  })

  test('fails where there is no such working directory', async () => {
    await expect(place.current.start({ cwd: '/no/such' })).rejects.toMatchObject({
      code: 'TEMPLATE_START_FAILED',
      happened: 'the working directory /no/such is no directory',
    })
  })

  test('fails with the last output of a program that ends early', async () => {
    const started = place.current.start({ command: ['sh', '-c', 'echo "no licence" >&2; exit 4'] })
    await expect(started).rejects.toMatchObject({
      code: 'TEMPLATE_EXITED',
      happened: expect.stringContaining('with status 4, and wrote last: no licence'),
      output: 'no licence\n',
    })
  })

  test('fails where a signal ends the program early', async () => {
    await expect(place.current.start({ command: ['sh', '-c', 'kill -9 $$'] })).rejects.toMatchObject({
      code: 'TEMPLATE_EXITED',
      happened: expect.stringContaining('by SIGKILL'),
    })
  })

  test('takes 100 MB of output without keeping it', async () => {
    let bytes = 0
    const before = memoryUse(process.pid)!.rssBytes
    const supervisor = await place.current.start(
      { command: ['sh', '-c', 'head -c 104857600 /dev/zero; echo ready; exec sleep 1000'], pool: { size: 0 } },
      { onCreate: (supervisor) => supervisor.on('templateOutput', (_, chunk) => (bytes += chunk.length)) },
    )
    expect(supervisor.state).toBe('running')
    expect(bytes).toBe(104_857_600 + 'ready\n'.length)
    expect(memoryUse(process.pid)!.rssBytes - before).toBeLessThan(60 * 1024 * 1024)
  })

  test('takes output after the checkpoint too', async () => {
    let bytes = 0
    const supervisor = await place.current.start({
      command: ['sh', '-c', 'echo ready; sleep 0.3; head -c 10485760 /dev/zero; exec sleep 1000'],
      pool: { size: 0 },
    })
    supervisor.on('templateOutput', (_, chunk) => (bytes += chunk.length))
    await eventually(() => bytes === 10_485_760, 'all is read')
  })

  test('keeps the last 64 KiB of output for the error', async () => {
    const started = place.current.start({
      command: ['sh', '-c', 'head -c 1000000 /dev/zero | tr "\\0" x; echo; echo last; exit 1'],
    })
    const error = await started.catch((error) => error)
    expect(error.output.length).toBe(64 * 1024)
    expect(error.output).toMatch(/x\nlast\n$/)
  })

  test('gives it the environment and directory that were asked for, and a stdin that stays open', async () => {
    const script = 'echo "$PWD:$GREETING"; read line || echo closed; exec sleep 1000'
    const seen: string[] = []
    await place.current.start(
      {
        command: ['sh', '-c', script],
        cwd: '/usr',
        env: { GREETING: 'hello', GONE: undefined },
        ready: { delayMs: 300 },
        pool: { size: 0 },
      },
      { onCreate: (supervisor) => supervisor.on('templateOutput', (_, chunk) => seen.push(String(chunk))) },
    )
    expect(seen.join('')).toBe('/usr:hello\n')
  })

  test('refuses a user or a group that is not there', async () => {
    await expect(place.current.start({ user: 'no-such-user' })).rejects.toMatchObject({ code: 'BAD_OPTION' })
    await expect(place.current.start({ group: 'no-such-group' })).rejects.toMatchObject({ code: 'BAD_OPTION' })
    await expect(place.current.start({ user: 4_000_000 })).rejects.toMatchObject({ code: 'BAD_OPTION' })
  })

  test('gives the user all its groups and its home', async () => {
    // `www-data` in group `nogroup` by number: what a machine has for sure.
    const command = ['sh', '-c', 'echo ready; read line; id -u; id -g; echo $HOME'] as const
    const supervisor = await place.current.start({ command, cwd: '/', user: 'www-data', group: 65534 })
    const child = await supervisor.fork()
    child.stdin.write('\n')
    const lines: string[] = []
    for await (const line of child.lines()) lines.push(line)
    expect(lines).toEqual(['33', '65534', '/var/www'])
  })
})

describe('the warm-up', () => {
  const place = usePlace('spawn')
  const server = [process.execPath, join(PROGRAMS, 'server.mjs')] as const
  const port = (output: string) => Number(/port (\d+)/.exec(output)![1])
  const ready = { output: /^port \d+$/ }

  test('asks each URL so many times', async () => {
    const supervisor = await place.current.start({
      command: ['sh', '-c', `exec "${server[0]}" "${server[1]}" 18473`],
      ready,
      warmup: { http: ['http://127.0.0.1:18473/', 'http://127.0.0.1:18473/x'], times: 7, concurrency: 3 },
      pool: { size: 0 },
    })
    // Its connections are closed: nothing would keep the template from its rest.
    expect(await whatIsInHand(supervisor.template!.pid)).toBeUndefined()
    expect(await (await fetch('http://127.0.0.1:18473/hits')).text()).toBe('15')
  })

  test('fails where a URL is answered with an error', async () => {
    const warmup = { http: 'http://127.0.0.1:18474/bad' }
    await expect(place.current.start({ command: [...server, '18474'], ready, warmup })).rejects.toMatchObject({
      code: 'WARMUP_FAILED',
      happened: 'http://127.0.0.1:18474/bad was answered with status 500',
    })
  })

  test('runs a command that knows the template', async () => {
    const path = join(place.current.directory, 'warm')
    const warmup = { command: ['sh', '-c', `kill -0 "$WARMFORK_TEMPLATE_PID" && echo > '${path}'`] as const }
    await place.current.start({
      command: server,
      ready,
      warmup: { command: [...warmup.command] as [string, ...string[]] },
      pool: { size: 0 },
    })
    expect(readFileSync(path, 'utf8')).toBe('\n')
  })

  test('fails with the output of a command that fails', async () => {
    const warmup = { command: ['sh', '-c', 'echo oops >&2; exit 2'] as [string, ...string[]] }
    await expect(place.current.start({ command: server, ready, warmup })).rejects.toMatchObject({
      code: 'WARMUP_FAILED',
      happened: expect.stringContaining('ended with status 2, and wrote last: oops'),
    })
  })

  test('ends a command that takes too long, with what it has started', async () => {
    const warmup = { command: ['sh', '-c', 'sleep 1000 & sleep 1000'] as [string, ...string[]], timeoutMs: 300 }
    await expect(place.current.start({ command: server, ready, warmup })).rejects.toMatchObject({
      code: 'WARMUP_FAILED',
    })
    await eventually(() => place.current.processes().length === 0, 'all is ended')
  })

  test('runs a function of the embedder', async () => {
    let body = ''
    await place.current.start({
      command: server,
      ready,
      warmup: async (template) => {
        body = await (await fetch(`http://127.0.0.1:${port(template.output)}/`)).text()
      },
      pool: { size: 0 },
    })
    expect(body).toBe('1')
  })

  test('fails where the function throws, or the template ends meanwhile', async () => {
    const cause = new Error('no')
    const throwing = () => Promise.reject(cause)
    await expect(place.current.start({ command: server, ready, warmup: throwing })).rejects.toMatchObject({
      code: 'WARMUP_FAILED',
      cause,
    })
    const killing = async (template: { pid: number }) => {
      process.kill(template.pid, 'SIGKILL')
      await new Promise(() => {})
    }
    await expect(place.current.start({ command: server, ready, warmup: killing })).rejects.toMatchObject({
      code: 'TEMPLATE_EXITED',
    })
  })
})

describe('rest', () => {
  const place = usePlace('spawn')

  test('is not reached while a request has no answer, and is when it has one', async () => {
    const supervisor = await place.current.start({
      command: [process.execPath, join(PROGRAMS, 'server.mjs'), '18475'],
      ready: { output: 'port' },
      pool: { size: 0 },
    })
    const pid = supervisor.template!.pid
    expect(await whatIsInHand(pid)).toBeUndefined()
    const socket = createConnection(18475, '127.0.0.1')
    await new Promise((resolve) => socket.once('connect', resolve))
    await new Promise((resolve) => setTimeout(resolve, 200))
    expect(await whatIsInHand(pid)).toBeUndefined()
    socket.write('GET /slow HTTP/1.1\r\nHost: x\r\n\r\n')
    await new Promise((resolve) => setTimeout(resolve, 200))
    expect(await whatIsInHand(pid)).toMatch(/brought a request that has no answer yet/)
    await new Promise((resolve) => socket.once('data', resolve))
    await new Promise((resolve) => setTimeout(resolve, 200))
    // An idle connection that is kept open is at rest.
    expect(await whatIsInHand(pid)).toBeUndefined()
    socket.destroy()
  })

  test('is not reached while a stopped program has data that it did not read', async () => {
    const supervisor = await place.current.start({
      command: [process.execPath, join(PROGRAMS, 'server.mjs'), '18476'],
      ready: { output: 'port' },
      pool: { size: 0 },
    })
    const pid = supervisor.template!.pid
    const socket = createConnection(18476, '127.0.0.1')
    await new Promise((resolve) => socket.once('connect', resolve))
    await new Promise((resolve) => setTimeout(resolve, 100))
    process.kill(pid, 'SIGSTOP')
    socket.write('GET / HTTP/1.1\r\n')
    const late = createConnection(18476, '127.0.0.1')
    await new Promise((resolve) => late.once('connect', resolve))
    const found = await whatIsInHand(pid)
    process.kill(pid, 'SIGCONT')
    for (const each of [socket, late]) each.destroy()
    expect(found).toMatch(/connections wait to be accepted|bytes that it has not read/)
  })
})

describe.skipIf(!ENGINES.includes('criu'))('a checkpoint', () => {
  const place = usePlace('criu')

  test('is refused while a request is in hand for too long', async () => {
    let open: ReturnType<typeof createConnection> | undefined
    const started = place.current.start({
      command: [
        process.execPath,
        '-e',
        "require('http').createServer(() => {}).listen(18477, '127.0.0.1', () => console.log('ready'))",
      ],
      warmup: async () => {
        open = createConnection(18477, '127.0.0.1')
        open.write('GET / HTTP/1.1\r\nHost: x\r\n\r\n')
        await new Promise((resolve) => setTimeout(resolve, 100))
      },
      template: { restTimeoutMs: 300 },
    })
    await expect(started).rejects.toMatchObject({
      code: 'NOT_AT_REST',
      happened: expect.stringContaining('port 18477'),
    })
    open?.destroy()
  })

  test('tells which file it misses, where the program works in a directory that was removed', async () => {
    const cwd = join(place.current.directory, 'cwd')
    mkdirSync(cwd)
    const started = place.current.start(
      { cwd, command: ['sh', '-c', 'echo ready; exec cat'], ready: { delayMs: 300 } },
      {
        onCreate: (supervisor) =>
          supervisor.on('progress', (phase) => phase === 'boot' && rmSync(cwd, { recursive: true })),
      },
    )
    await expect(started).rejects.toMatchObject({ name: 'WarmforkError', message: expect.stringContaining(cwd) })
    expect(place.current.processes()).toEqual([])
  })
})
