/** What forks have in place of what their template has open: each kind with a small program that holds it. */
import { type ChildProcess, spawn, spawnSync } from 'node:child_process'
import { createSocket } from 'node:dgram'
import { once } from 'node:events'
import { existsSync, readFileSync, renameSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { createServer, type Server, type Socket } from 'node:net'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { fileURLToPath } from 'node:url'
import { beforeAll, describe, expect, test } from 'vitest'
import type { SupervisorOptions } from '../src/options.js'
import { CLI } from './cli-harness.js'
import { ask, PROGRAMS } from './engines-under-test.js'
import { useCleanPlace } from './leftovers.js'
import { compileC } from './runtimes/compile.js'
import { run } from './runtimes/runtime.js'

const FIXTURES = fileURLToPath(new URL('fixtures/descriptors/', import.meta.url))

let holder: string
beforeAll(async () => {
  holder = await compileC('holder')
})

const place = useCleanPlace()

/** A supervisor of a program that holds one kind of thing. */
function hold(kind: string, argument = '', options: Partial<SupervisorOptions> = {}) {
  return place.current.start({ command: [holder, kind, argument], pool: { size: 0 }, ...options })
}

const inPlace = (name: string) => join(place.current.directory, name)

async function listening(server: Server, where: string | number): Promise<Server> {
  server.listen(where)
  await once(server, 'listening')
  return server
}

describe('a file that is open', () => {
  test('for appending is opened by each fork, and what they write stands whole', async () => {
    const log = inPlace('log')
    const supervisor = await hold('append', log)
    expect(supervisor.warnings).toEqual([])
    const forks = await Promise.all([supervisor.fork(), supervisor.fork(), supervisor.fork()])
    const line = (n: number) => String(n).repeat(100)
    await Promise.all(
      forks.map(async (fork, n) => {
        for (let i = 0; i < 50; i++) expect(await ask(fork, `write ${line(n)},`)).toBe('written')
      }),
    )
    const lines = readFileSync(log, 'utf8').split(',').slice(0, -1)
    expect(lines.length).toBe(150)
    expect(new Set(lines)).toEqual(new Set([0, 1, 2].map(line)))
  })

  test('for appending is the new one where it was rotated, and made again where it is missing', async () => {
    const log = inPlace('log')
    const supervisor = await hold('append', log)
    await ask(await supervisor.fork(), 'write one')
    renameSync(log, `${log}.1`)
    await ask(await supervisor.fork(), 'write two')
    writeFileSync(`${log}.new`, 'new ')
    renameSync(`${log}.new`, log)
    await ask(await supervisor.fork(), 'write three')
    expect([readFileSync(`${log}.1`, 'utf8'), readFileSync(log, 'utf8')]).toEqual(['one', 'new three'])
  })

  test('for writing has a position of its own in each fork, which is warned of', async () => {
    const data = inPlace('data')
    const supervisor = await hold('write', data)
    expect(supervisor.warnings.map(({ message }) => message)).toEqual([
      expect.stringMatching(`open for writing \\(${data}\\).*over what others have written`),
    ])
    const [one, other] = [await supervisor.fork(), await supervisor.fork()]
    await ask(one, 'write aaaa')
    await ask(other, 'write bb')
    await ask(one, 'write cc')
    expect(readFileSync(data, 'utf8')).toBe('bbaacc')
  })

  test.each(['/sys/kernel/mm/transparent_hugepage/enabled', '/proc/version'])(
    'and is made up by the kernel (%s) is opened by each fork',
    async (path) => {
      if (!existsSync(path)) return
      const supervisor = await hold('read', path)
      expect(await ask(await supervisor.fork(), 'read')).toBe(readFileSync(path, 'latin1').split('\n')[0])
    },
  )

  test('is not warned of where the policy is asked for by name', async () => {
    const supervisor = await hold('write', inPlace('data'), { descriptors: { 'file-write': 'reopen' } })
    expect(supervisor.warnings).toEqual([])
  })

  test.each(['unlinked', 'tmpfile'])('and %s is a copy in each fork', async (kind) => {
    const supervisor = await hold(kind, kind === 'tmpfile' ? place.current.directory : inPlace('ghost'))
    const [one, other] = [await supervisor.fork(), await supervisor.fork()]
    for (const [fork, text] of [
      [one, 'first'],
      [other, 'other'],
    ] as const) {
      await ask(fork, 'rewind')
      await ask(fork, `write ${text}`)
      await ask(fork, 'rewind')
    }
    expect([await ask(one, 'read'), await ask(other, 'read')]).toEqual(['first', 'other'])
    expect(existsSync(inPlace('ghost'))).toBe(false)
  })

  test('can be closed in the forks, which cannot write to it, nor get its number for another', async () => {
    const data = inPlace('data')
    const supervisor = await hold('write', data, { descriptors: { [`${place.current.directory}/*`]: 'close' } })
    expect(supervisor.warnings).toEqual([])
    const fork = await supervisor.fork()
    expect([await ask(fork, 'open'), await ask(fork, 'write x')]).toEqual(['open', 'error EBADF'])
    expect(statSync(data).size).toBe(0)
  })
})

describe.each(['flock', 'fcntl', 'ofd'])('a %s lock', (kind) => {
  test('stays with the template, and forks take it one at a time once that has ended', async () => {
    const supervisor = await hold(kind, inPlace('lock'), { descriptors: { 'file-write': 'reopen' } })
    expect(supervisor.warnings.map(({ message }) => message)).toEqual([expect.stringMatching('lock.*no fork has it')])
    const [one, other] = [await supervisor.fork(), await supervisor.fork()]
    expect(await ask(one, 'lock')).toBe('error EAGAIN')
    const ended = once(supervisor, 'templateExit')
    process.kill(supervisor.template!.pid, 'SIGKILL')
    await ended
    expect([await ask(one, 'lock'), await ask(other, 'lock')]).toEqual(['locked', 'error EAGAIN'])
  })
})

describe('a connection to a program outside', () => {
  test.each(['Unix', 'TCP'])(
    'by a %s socket goes on in the template, byte for byte, and has ended in each fork',
    async (family) => {
      const sockets: Socket[] = []
      const server = createServer((socket) => sockets.push(socket))
      await listening(server, family === 'Unix' ? inPlace('socket') : 0)
      const address = server.address()
      const where = typeof address === 'string' ? address : String(address?.port)
      try {
        let [sent, echoed, wrong] = [0, 0, 0]
        let talking = true
        const starting = place.current.start({
          command: [process.execPath, join(FIXTURES, 'echo-client.mjs'), where],
          pool: { size: 0 },
        })
        await once(server, 'connection')
        const template = sockets[0]!
        template.on('data', (data) => {
          for (const byte of data) if (byte !== echoed++ % 251) wrong++
        })
        const talk = async () => {
          while (talking) {
            template.write(Buffer.from(Array.from({ length: 997 }, () => sent++ % 251)))
            await new Promise((resolve) => setTimeout(resolve, 2))
          }
        }
        const done = talk()
        const supervisor = await starting
        const forks = await Promise.all(Array.from({ length: 4 }, () => supervisor.fork()))
        const states = await Promise.all(
          forks.map(async (fork) => {
            await expect.poll(async () => JSON.parse(await ask(fork, 'state'))).toMatchObject({ closed: true })
            return JSON.parse(await ask(fork, 'state'))
          }),
        )
        const before = echoed
        await expect.poll(() => echoed).toBeGreaterThan(before)
        talking = false
        await done
        await expect.poll(() => echoed).toBe(sent)
        expect(wrong).toBe(0)
        // Nothing that waited in the socket is read by a fork: all have read as much as the template had.
        expect(new Set(states.map(({ received }) => received)).size).toBe(1)
        expect(sockets.length).toBe(1)
      } finally {
        for (const socket of sockets) socket.destroy()
        server.close()
      }
    },
  )

  test('that had bytes to be read gives a fork the end, and not those bytes', async () => {
    const server = await listening(
      createServer((socket) => socket.on('error', () => {}).write('for the template')),
      inPlace('socket'),
    )
    try {
      const supervisor = await hold('unix', inPlace('socket'))
      const fork = await supervisor.fork()
      expect([await ask(fork, 'read'), await ask(fork, 'write x')]).toEqual(['end', 'error EPIPE'])
    } finally {
      server.close()
    }
  })

  test('can be a reason for no checkpoint', async () => {
    const server = await listening(createServer(), inPlace('socket'))
    try {
      await expect(
        hold('unix', inPlace('socket'), { descriptors: { 'unix-connection': 'error' } }),
      ).rejects.toMatchObject({
        code: 'CHECKPOINT_FAILED',
        message: expect.stringMatching(/descriptor 3 of process \d+ is a Unix connection.*'close' lets the fork go on/),
      })
    } finally {
      server.close()
    }
  })

  test('by UDP is one of its own port in each fork, which gets its own answers', async () => {
    const server = createSocket('udp4')
    server.on('message', (data, { port }) => server.send(`${data} from ${port}`, port))
    server.bind(0, '127.0.0.1')
    await once(server, 'listening')
    try {
      const supervisor = await hold('udp', String(server.address().port))
      const forks = await Promise.all([supervisor.fork(), supervisor.fork()])
      for (const [n, fork] of forks.entries()) await ask(fork, `write ${n}`)
      const answers = await Promise.all(forks.map((fork) => ask(fork, 'read')))
      expect(answers).toEqual([expect.stringMatching(/^0 from/), expect.stringMatching(/^1 from/)])
      expect(new Set(answers.map((answer) => answer.split(' ')[2])).size).toBe(2)
    } finally {
      server.close()
    }
  })

  test('by a Unix socket for datagrams, such as to the log, is made anew by each fork; without anybody there, it is not connected', async () => {
    const path = inPlace('log')
    let receiver = await receive(path)
    try {
      const supervisor = await hold('syslog', path)
      expect(await ask(await supervisor.fork(), 'write one')).toBe('written')
      expect(await receiver.line()).toBe('one')
      await receiver.end()
      expect(await ask(await supervisor.fork(), 'write two')).toBe('error ENOTCONN')
      receiver = await receive(path)
      expect(await ask(await supervisor.fork(), 'write three')).toBe('written')
      expect(await receiver.line()).toBe('three')
    } finally {
      await receiver.end()
    }
  })
})

async function receive(path: string) {
  const child: ChildProcess = spawn('python3', [join(FIXTURES, 'receiver.py'), path], {
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  const lines = createInterface({ input: child.stdout! })[Symbol.asyncIterator]()
  await lines.next()
  return {
    line: async () => (await lines.next()).value as string,
    end: async () => {
      if (child.exitCode !== null || child.signalCode !== null) return
      child.kill()
      await once(child, 'exit')
    },
  }
}

describe('a socket that is bound and does not listen yet', () => {
  test.each([
    ['TCP', "socket.socket(); s.bind(('127.0.0.1', 0))"],
    ['Unix', "socket.socket(socket.AF_UNIX); s.bind('socket')"],
  ])('(%s) is shared, and any fork can listen at it', async (_, code) => {
    const script = `import socket, sys\ns = ${code}\nprint('ready', flush=True)\nfor line in sys.stdin:\n  s.listen(); print(s.getsockname(), flush=True)`
    const supervisor = await place.current.start({ command: ['/usr/bin/python3', '-c', script], pool: { size: 0 } })
    const [one, other] = [await supervisor.fork(), await supervisor.fork()]
    const address = await ask(one, 'listen')
    expect(await ask(other, 'listen')).toBe(address)
    if (address === 'socket') expect(statSync(inPlace('socket')).isSocket()).toBe(true)
  })
})

test('a listener can be closed in the forks, also where it is watched: then the template alone serves', async () => {
  let port = 0
  const supervisor = await place.current.start({
    command: [process.execPath, join(PROGRAMS, 'tcp-server.mjs')],
    ready: { output: 'port' },
    warmup: ({ output }) => {
      port = Number(/port (\d+)/.exec(output)![1])
    },
    pool: { size: 0 },
    descriptors: { 'tcp-listener': 'close' },
  })
  const [fork] = [await supervisor.fork(), await supervisor.fork()]
  const answers = await Promise.all(
    Array.from({ length: 20 }, async () => (await fetch(`http://127.0.0.1:${port}`)).text()),
  )
  expect(new Set(answers)).toEqual(new Set([String(supervisor.template!.pid)]))
  expect(await ask(fork!, 'connections')).toBe('0')
})

describe('a pipe to a program outside', () => {
  test.each([
    ['pipe-in', 'read', 'end'],
    ['pipe-out', 'write x', 'error EPIPE'],
  ])('(%s) has nobody at its other end in a fork, and is warned of', async (kind, command, answer) => {
    const supervisor = await hold(kind)
    expect(supervisor.warnings.map(({ message }) => message)).toEqual([
      expect.stringContaining('a pipe to another program'),
    ])
    const forks = [await supervisor.fork(), await supervisor.fork()]
    // What waited in it is not read by each fork.
    expect(await Promise.all(forks.map((fork) => ask(fork, command)))).toEqual([answer, answer])
  })
})

describe('what is within the program', () => {
  test.each([
    ['pair', 'use', 'inside'],
    ['pipe', 'use', 'inside'],
    ['eventfd', 'use', '7'],
    ['signalfd', 'use', 'signal 10'],
    ['epoll', 'use', 'event 42'],
    ['epoll-closed', 'use', 'event 42'],
    ['pidfd-self', 'use', 'alive'],
    ['pidfd-child', 'use', 'alive'],
    ['netlink', 'use', 'held'],
    ['fanotify', 'use', 'held'],
  ])('(%s) is copied into each fork, with its state', async (kind, command, answer) => {
    const supervisor = await hold(kind, '/')
    const forks = [await supervisor.fork(), await supervisor.fork()]
    expect(await Promise.all(forks.map((fork) => ask(fork, command)))).toEqual([answer, answer])
    expect(supervisor.warnings).toEqual([])
  })

  test.each(['memfd', 'shared-memory'])('(%s) is not shared between forks', async (kind) => {
    const supervisor = await hold(kind)
    const [one, other] = [await supervisor.fork(), await supervisor.fork()]
    const rewind = async () => {
      if (kind === 'memfd') for (const fork of [one, other]) await ask(fork, 'rewind')
    }
    await rewind()
    await ask(one, 'write mine!!')
    await rewind()
    expect([await ask(one, 'read'), await ask(other, 'read')]).toEqual([
      'mine!!',
      kind === 'memfd' ? 'memory' : 'shared',
    ])
  })

  test('(timerfd) ticks on in a fork, without a burst of what it has missed', async () => {
    const supervisor = await hold('timerfd')
    await new Promise((resolve) => setTimeout(resolve, 500))
    const fork = await supervisor.fork()
    await new Promise((resolve) => setTimeout(resolve, 120))
    // One each 50 ms.
    expect(Number(await ask(fork, 'use'))).toBeLessThan(6)
    await new Promise((resolve) => setTimeout(resolve, 120))
    expect(Number(await ask(fork, 'use'))).toBeGreaterThan(0)
  })

  test('(inotify) tells each fork of changes', async () => {
    const supervisor = await hold('inotify', place.current.directory)
    const forks = [await supervisor.fork(), await supervisor.fork()]
    writeFileSync(inPlace('new-file'), '')
    const told = await Promise.all(forks.map((fork) => ask(fork, 'use')))
    rmSync(inPlace('new-file'))
    expect(told).toEqual(['new-file', 'new-file'])
  })
})

/** What CRIU cannot take, as the user reads it. */
const REFUSED: [kind: string, argument: string, words: string][] = [
  ['mptcp', '', 'a socket of a family that CRIU does not know (tcp 127.0.0.1:'],
  ['unlinked-large', '', 'an unlinked file of more than 64 MiB'],
  ['io_uring-direct', '', 'an io_uring (anon_inode:[io_uring])'],
  ['perf', '', 'a handle on a part of the kernel (perf, userfaultfd, bpf, landlock) (anon_inode:[perf_event])'],
  ['userfaultfd', '', '(anon_inode:[userfaultfd])'],
  ['bpf-map', '', '(anon_inode:bpf-map)'],
  ['landlock', '', '(anon_inode:[landlock-ruleset])'],
  ['vsock', '', 'a socket of a family that CRIU does not know'],
  ['mqueue', '/warmfork-test', 'a file without a path'],
  ['memfd-secret', '', 'a file without a path'],
  ['pidfd-outside', '', 'a pidfd of a process outside of the program'],
  ['pty', '', 'a pseudo-terminal that the program controls'],
  ['device', '/dev/fuse', 'a device with state (/dev/fuse)'],
  ['device', '/dev/net/tun', 'a device with state (/dev/net/tun)'],
]

describe('what cannot be checkpointed', () => {
  test.each(REFUSED)(
    '(%s %s) is told before the checkpoint, with its place and what to do',
    async (kind, argument, words) => {
      // Not every kernel has everything, nor may everybody.
      const there = spawnSync(holder, [kind, argument], { input: '', encoding: 'utf8', cwd: place.current.directory })
      if (there.status !== 0) return expect(there.stdout).toMatch(/^error/)
      const error = await hold(kind, argument).catch((error) => error)
      expect(error).toMatchObject({ code: 'CHECKPOINT_FAILED' })
      expect(error.message).toMatch(/descriptor 3 of process \d+ is /)
      expect(error.message).toContain(words)
      expect(error.message).not.toContain('criu says')
      expect(error.remedy).toMatch(/^(Close|Open|Let) /)
    },
  )

  test('is System V shared memory, which is named though no descriptor leads to it', async () => {
    await expect(hold('shm')).rejects.toMatchObject({
      code: 'CHECKPOINT_FAILED',
      message: expect.stringMatching(/process \d+ has mapped System V shared memory \(\/SYSV.*POSIX shared memory/),
    })
  })

  test("is CRIU's to try where that is asked for, and then the error has its words", async () => {
    await expect(hold('perf', '', { descriptors: { kernel: 'keep' } })).rejects.toMatchObject({
      code: 'CHECKPOINT_FAILED',
      message: expect.stringContaining('criu says'),
    })
  })
})

test('`warmfork inspect` reports what a fork has instead of what', async () => {
  const server = await listening(createServer(), inPlace('socket'))
  try {
    const supervisor = await hold('unix', inPlace('socket'))
    const inspect = (...flags: string[]) =>
      run(process.execPath, [
        ...CLI.slice(1),
        'inspect',
        '--name',
        supervisor.name,
        '--store',
        supervisor.store,
        ...flags,
      ])
    expect(JSON.parse(await inspect('--json')).descriptors).toContainEqual({
      pid: supervisor.template!.pid,
      fd: 3,
      kind: 'unix-connection',
      target: `unix ${inPlace('socket')}`,
      policy: 'close',
    })
    expect(await inspect()).toMatch(
      /^What a fork has instead\nKIND +POLICY +PID:FD +TARGET\n(.*\n)*Unix connection to another program +close +\d+:3 +unix /m,
    )
  } finally {
    server.close()
  }
})

describe('the option `descriptors`', () => {
  test.each([
    [
      { 'unix-connection': 'keep' },
      "Expected `descriptors.unix-connection` to be 'close' or 'error', got `keep` (string)",
    ],
    [{ eventfd: 'forget' }, "to be one of 'keep', 'reopen', 'close', 'error'"],
    [{ socks: 'close' }, 'Expected `descriptors.socks` not to be there: it is neither a kind of descriptor nor a path'],
  ])('%j is refused', async (descriptors, words) => {
    await expect(hold('nothing', '', { descriptors: descriptors as never })).rejects.toMatchObject({
      code: 'BAD_OPTION',
      message: expect.stringContaining(words),
    })
  })

  test('cannot give a path a policy that does not go with what is there', async () => {
    await expect(hold('write', inPlace('data'), { descriptors: { '/**/data': 'keep' } })).rejects.toMatchObject({
      code: 'BAD_OPTION',
      message: expect.stringMatching(/to be 'reopen' or 'close' or 'error', since .*data is a file open for writing/),
    })
  })
})
