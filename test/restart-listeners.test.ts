import { spawnSync } from 'node:child_process'
import { createSocket } from 'node:dgram'
import { chownSync, existsSync, lstatSync, mkdtempSync, rmSync, symlinkSync, writeFileSync } from 'node:fs'
import { connect, createServer, type Server } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import {
  addressKey,
  type BoundSockets,
  bindListeners,
  describeSocket,
  type SharedSocket,
} from '../src/engines/criu/listening.js'
import { connectSocket, receive, setSocketOption, socketName, socketOption } from '../src/linux/libc.js'

let directory: string
const opened: { close(): void }[] = []

beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'warmfork-listening-'))
})

afterEach(() => {
  for (const one of opened.splice(0)) one.close()
  rmSync(directory, { recursive: true })
})

/** A socket that Node listens at, as it would be written down. */
async function served(at: { port: number; host: string } | { path: string }, backlog = 77): Promise<SharedSocket> {
  const server = createServer()
  await new Promise<void>((resolve) => server.listen({ ...at, backlog }, resolve))
  const listener = recorded(server, 'path' in at ? at.path : undefined, backlog)
  opened.push({ close: () => server.close() })
  return listener
}

function recorded(server: Server, path: string | undefined, backlog: number): SharedSocket {
  const fd = descriptorOf(server)
  const name = socketName(fd)
  const family = name.readUInt16LE(0)
  const port = family === 1 ? 0 : name.readUInt16BE(2)
  const address = family === 1 ? name.subarray(2) : family === 2 ? name.subarray(4, 8) : name.subarray(8, 24)
  const abstract = path?.startsWith('\0')
  const listener = {
    key: 'any',
    inode: 1,
    family,
    type: 1,
    port,
    address,
    backlog,
    v6only: false,
    ...(path === undefined || abstract ? {} : { path }),
  }
  return { ...listener, socket: describeSocket(listener, fd) }
}

const descriptorOf = (server: Server) => (server as unknown as { _handle: { fd: number } })._handle.fd

async function stop(): Promise<void> {
  for (const one of opened.splice(0)) one.close()
  await new Promise((resolve) => setTimeout(resolve, 10))
}

function bind(listeners: SharedSocket[], how: 'same' | 'private' = 'same'): BoundSockets {
  const bound = bindListeners(listeners, how)
  opened.push(bound)
  return bound
}

/** Serves on a descriptor, and asks it once. */
async function answers(fd: number, at: { port: number; host: string } | { path: string }): Promise<string> {
  const server = createServer((socket) => socket.end('here'))
  // Closing the server closes the descriptor: give it one of its own.
  await new Promise<void>((resolve) => server.listen({ fd }, resolve))
  try {
    return await new Promise<string>((resolve, reject) => {
      let text = ''
      const client = connect(at as { path: string })
      client.on('data', (chunk) => {
        text += chunk
      })
      client.on('end', () => resolve(text))
      client.on('error', reject)
    })
  } finally {
    server.close()
  }
}

/** As `answers`, for the first socket of a set that is spent by it. */
async function firstAnswers(bound: BoundSockets, at: { port: number; host: string } | { path: string }) {
  const [inode, fd] = [...bound.descriptors][0]!
  ;(bound.descriptors as Map<number, number>).delete(inode)
  return answers(fd, at)
}

describe('a socket that is made anew at its address', () => {
  test.each([
    ['IPv4', { port: 0, host: '127.0.0.1' }],
    ['IPv6', { port: 0, host: '::1' }],
    ['all addresses of both', { port: 0, host: '::' }],
  ])('is reached at the same port: %s', async (_, at) => {
    const listener = await served(at)
    await stop()
    const bound = bind([listener])
    expect(bound.addresses.get(1)).toEqual({ port: listener.port })
    expect(await firstAnswers(bound, { port: listener.port, host: at.host === '::' ? '127.0.0.1' : at.host })).toBe(
      'here',
    )
  })

  test('is reached at the same path, and removes it when it is closed', async () => {
    const path = join(directory, 'a.sock')
    const listener = await served({ path })
    await stop()
    const bound = bind([listener])
    expect(lstatSync(path).mode & 0o777).toBe(0o755)
    bound.close()
    expect(existsSync(path)).toBe(false)
  })

  test('is reached at the same abstract name', async () => {
    const path = `\0warmfork-test-${process.pid}`
    const listener = await served({ path })
    await stop()
    expect(await firstAnswers(bind([listener]), { path })).toBe('here')
  })

  test('has the options, the backlog and the blocking mode that it had', async () => {
    const server = createServer()
    await new Promise<void>((resolve) => server.listen({ port: 0, host: '127.0.0.1' }, resolve))
    const fd = descriptorOf(server)
    const int = (value: number) => Buffer.from(Int32Array.of(value).buffer)
    setSocketOption(fd, 1, 9, int(1)) // SO_KEEPALIVE
    setSocketOption(fd, 6, 9, int(3)) // TCP_DEFER_ACCEPT
    setSocketOption(fd, 6, 23, int(16)) // TCP_FASTOPEN
    setSocketOption(fd, 1, 8, int(50_000)) // SO_RCVBUF
    const listener = recorded(server, undefined, 33)
    await new Promise((resolve) => server.close(resolve))
    const bound = bind([listener])
    const anew = bound.descriptors.get(1)!
    expect(describeSocket(listener, anew)).toEqual(listener.socket)
    expect(listener.socket).toMatchObject({ nonblocking: true, listening: true, receiveBuffer: 50_000 })
    expect(socketOption(anew, 6, 9)?.readInt32LE()).toBeGreaterThan(0)
    const queue = spawnSync('cat', ['/proc/net/tcp'], { encoding: 'utf8' }).stdout
    expect(queue).toContain(`:${listener.port.toString(16).toUpperCase().padStart(4, '0')} 00000000:0000 0A`)
  })

  test('for datagrams is reached at the same port', async () => {
    const socket = createSocket('udp4')
    await new Promise<void>((resolve) => socket.bind(0, '127.0.0.1', resolve))
    const { port } = socket.address()
    const { fd } = (socket as unknown as Record<symbol, { handle: { fd: number } }>)[
      Object.getOwnPropertySymbols(socket).find((symbol) => symbol.description === 'state symbol')!
    ]!.handle
    const address = Uint8Array.of(127, 0, 0, 1)
    const listener = { key: 'any', inode: 1, family: 2, type: 2, port, address, backlog: 0, v6only: false }
    const known = { ...listener, socket: describeSocket(listener, fd) }
    expect(known.socket).toMatchObject({ listening: false, protocol: 17 })
    await new Promise<void>((resolve) => socket.close(resolve))
    const bound = bind([known])
    const client = createSocket('udp4')
    await new Promise<void>((resolve) => client.send('a word', port, '127.0.0.1', () => resolve()))
    client.close()
    const heard = Buffer.alloc(16)
    expect(heard.toString('utf8', 0, receive(bound.descriptors.get(1)!, heard))).toBe('a word')
  })

  test('takes the place of a path that a killed program has left', async () => {
    const path = join(directory, 'stale.sock')
    const listener = await served({ path })
    await stop()
    leaveStale(path)
    expect(lstatSync(path).isSocket()).toBe(true)
    expect(await firstAnswers(bind([listener]), { path })).toBe('here')
  })

  test('is refused where another process has the port, and nothing stays of the others', async () => {
    const first = await served({ port: 0, host: '127.0.0.1' })
    await stop()
    const other = { ...(await served({ port: 0, host: '127.0.0.1' })), inode: 2 }
    expect(() => bindListeners([first, other], 'same')).toThrow(
      expect.objectContaining({ code: 'PORT_TAKEN', tried: `listen at TCP port ${other.port} of 127.0.0.1 again` }),
    )
    // The first is free again.
    bind([first])
  })

  test('is refused where somebody listens at the path, and where something else lies there', async () => {
    const path = join(directory, 'live.sock')
    const listener = await served({ path })
    expect(() => bindListeners([listener], 'same')).toThrow(expect.objectContaining({ code: 'PORT_TAKEN' }))
    await stop()
    writeFileSync(path, 'precious')
    expect(() => bindListeners([listener], 'same')).toThrow(/PORT_TAKEN.*no socket/)
    rmSync(path)
    symlinkSync(join(directory, 'elsewhere'), path)
    expect(() => bindListeners([listener], 'same')).toThrow(/PORT_TAKEN.*no socket/)
    expect(existsSync(join(directory, 'elsewhere'))).toBe(false)
  })

  test.runIf(process.getuid?.() === 0)('is made with the rights of the user whose it is', async () => {
    const path = join(directory, 'theirs.sock')
    const listener = await served({ path })
    await stop()
    // A directory that is not theirs.
    const nobody = { uid: 65_534, gid: 65_534 }
    expect(() => bindListeners([listener], 'same', nobody)).toThrow(/GENERATION_MISFIT.*EACCES/)
    chownSync(directory, nobody.uid, nobody.gid)
    opened.push(bindListeners([listener], 'same', nobody))
    expect(lstatSync(path).uid).toBe(nobody.uid)
    // And what is made afterwards is ours again.
    writeFileSync(join(directory, 'ours'), '')
    expect(lstatSync(join(directory, 'ours')).uid).toBe(0)
  })
})

describe('a socket of its own kind that nobody knows', () => {
  test.each([
    ['127.0.0.1', '127.0.0.1'],
    ['0.0.0.0', '127.0.0.1'],
    ['::', '127.0.0.1'],
    ['::', '::1'],
    ['::1', '::1'],
  ])('listens for this machine alone where the program listens at %s, and is reached at %s', async (host, asked) => {
    const listener = await served({ port: 0, host })
    // Nobody is disturbed: the program goes on.
    const bound = bind([listener], 'private')
    const { port } = bound.addresses.get(1) as { port: number }
    expect(port).not.toBe(listener.port)
    expect(await firstAnswers(bound, { port, host: asked })).toBe('here')
  })

  test('has a name of the kernel in place of a path', async () => {
    const listener = await served({ path: join(directory, 'known.sock') })
    const bound = bind([listener], 'private')
    const name = bound.addresses.get(1) as string
    expect(name).toMatch(/^@[0-9a-f]{5}$/)
    // Node 20 itself fills names up with zeros, and means another one then.
    expect(connectSocket(Buffer.from(`\x01\0\0${name.slice(1)}`, 'latin1'), 1)).toBe(undefined)
  })
})

test('sockets at one address are told from others', async () => {
  const one = await served({ port: 0, host: '127.0.0.1' })
  const two = await served({ port: 0, host: '127.0.0.1' })
  expect(addressKey(one)).toBe(addressKey({ ...one, inode: 9, key: 'other' }))
  expect(addressKey(one)).not.toBe(addressKey(two))
})

/** A path with a socket file and no socket. */
function leaveStale(path: string): void {
  const script = `require('node:net').createServer().listen(${JSON.stringify(path)}, () => process.kill(process.pid, 'SIGKILL'))`
  spawnSync(process.execPath, ['-e', script])
}
