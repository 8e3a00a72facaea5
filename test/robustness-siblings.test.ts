/** What children share with their siblings, and what one of them takes away when it ends. */
import { execFileSync } from 'node:child_process'
import { existsSync, lstatSync, mkdirSync, readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs'
import { request } from 'node:http'
import { createServer } from 'node:net'
import { join } from 'node:path'
import { text } from 'node:stream/consumers'
import { describe, expect, test } from 'vitest'
import type { Supervisor } from '../src/supervisor.js'
import { ask, eventually, PROGRAMS } from './engines-under-test.js'
import { useCleanPlace } from './leftovers.js'

/** Who answers on a Unix socket, or the error's code. */
function whoAnswers(socketPath: string): Promise<string> {
  return new Promise((resolve) => {
    const asked = request({ socketPath, path: '/' }, (response) => resolve(text(response)))
    asked.once('error', (error: NodeJS.ErrnoException) => resolve(error.code ?? String(error))).end()
  })
}

async function allWhoAnswer(socketPath: string, times = 60): Promise<Set<string>> {
  const answers = await Promise.all(Array.from({ length: times }, () => whoAnswers(socketPath)))
  return new Set(answers)
}

describe('a Unix socket that the template listens on', () => {
  const place = useCleanPlace()
  const path = () => join(place.current.directory, 'server.sock')
  const serve = (address = path()) =>
    place.current.start({
      command: [process.execPath, join(PROGRAMS, 'unix-server.mjs'), address],
      template: { afterCheckpoint: 'end' },
      pool: { size: 1 },
    })

  test('is shared by all forks, and none takes it from the others', async () => {
    const supervisor = await serve()
    const children = [await supervisor.fork(), await supervisor.fork(), await supervisor.fork()]
    const pids = new Set(children.map(({ pid }) => String(pid)))
    let seen = new Set<string>()
    for (let i = 0; i < 20 && seen.size < 3; i++) seen = new Set([...seen, ...(await allWhoAnswer(path()))])
    expect(seen).toEqual(pids)
  })

  test('goes on when the child that was forked last is killed', async () => {
    const supervisor = await serve()
    const [one, last] = [await supervisor.fork(), await supervisor.fork()]
    last.kill('SIGKILL')
    await last.exit
    expect(await allWhoAnswer(path(), 20)).toEqual(new Set([String(one.pid)]))
  })

  test('keeps its path when a child removes that at its end', async () => {
    const supervisor = await serve()
    const [one, other] = [await supervisor.fork(), await supervisor.fork()]
    one.stdin.write('close\n')
    expect(await one.exit).toEqual({ code: 0, signal: null })
    await eventually(() => existsSync(path()), 'the path is there again')
    expect(await allWhoAnswer(path(), 20)).toEqual(new Set([String(other.pid)]))
    const later = await supervisor.fork()
    other.kill('SIGKILL')
    await other.exit
    expect(await allWhoAnswer(path(), 20)).toEqual(new Set([String(later.pid)]))
  })

  test('leaves no path behind that a child wanted to be gone', async () => {
    const supervisor = await serve()
    const child = await supervisor.fork()
    child.stdin.write('close\n')
    await child.exit
    await eventually(() => existsSync(path()), 'the path is there again')
    await supervisor.stop()
    expect(readdirSync(place.current.directory).filter((name) => name.includes('sock'))).toEqual([])
  })

  test('is left as it is where nobody removes it, and no link to it', async () => {
    const supervisor = await serve()
    await supervisor.fork()
    expect(readdirSync(place.current.directory).filter((name) => name.includes('sock'))).toHaveLength(2)
    await supervisor.stop()
    expect(readdirSync(place.current.directory).filter((name) => name.includes('sock'))).toEqual(['server.sock'])
  })

  test('gives way to another socket in its place', async () => {
    const supervisor = await serve()
    const child = await supervisor.fork()
    rmSync(path())
    const server = createServer().listen(path())
    await new Promise((resolve) => server.once('listening', resolve))
    const { ino } = lstatSync(path())
    await new Promise((resolve) => setTimeout(resolve, 100))
    await supervisor.fork()
    expect(lstatSync(path()).ino).toBe(ino)
    await child.end({ graceMs: 0 })
    await new Promise((resolve) => server.close(resolve))
  })

  test('has an abstract name that all forks accept on', async () => {
    const name = `warmfork-test-${process.pid}`
    const supervisor = await serve(`@${name}`)
    const children = [await supervisor.fork(), await supervisor.fork()]
    let seen = new Set<string>()
    for (let i = 0; i < 20 && seen.size < 2; i++) seen = new Set([...seen, ...(await allWhoAnswer(`\0${name}`))])
    expect(seen).toEqual(new Set(children.map(({ pid }) => String(pid))))
  })

  test('for datagrams is shared too', async () => {
    const script = `
import os, socket, sys
s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
s.bind(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
print(s.recv(100).decode(), flush=True)
`
    const supervisor = await place.current.start({ command: ['python3', '-c', script, path()], pool: { size: 0 } })
    for (const word of ['one', 'two']) {
      const child = await supervisor.fork()
      child.stdin.write('\n')
      send(path(), word)
      for await (const line of child.lines()) expect(line).toBe(word)
    }
  })
})

describe('what a child removes at its end', () => {
  const place = useCleanPlace()
  const at = (name: string) => join(place.current.directory, name)

  /** Runs a Python program that says `ready`, waits for a line and then does the rest. */
  const python = (boot: string, rest: string) =>
    place.current.start({
      command: [
        'python3',
        '-c',
        `import os, sys, tempfile, shutil\n${boot}\nprint("ready", flush=True)\nsys.stdin.readline()\n${rest}`,
        `${place.current.directory}/`,
      ],
      pool: { size: 0 },
    })

  async function twiceInARow(supervisor: Supervisor): Promise<string[]> {
    const said: string[] = []
    for (let i = 0; i < 2; i++) {
      const child = await supervisor.fork()
      said.push(await ask(child, ''))
      expect(await child.exit).toEqual({ code: 0, signal: null })
    }
    return said
  }

  test('a pid file that it has open: later forks have one again', async () => {
    const supervisor = await python(
      'path = sys.argv[1] + "pid"; f = open(path, "w"); f.write(str(os.getpid())); f.flush()',
      'f.seek(0); f.truncate(); f.write(str(os.getpid())); f.flush(); print(open(path).read(), os.getpid(), flush=True); os.unlink(path)',
    )
    for (const line of await twiceInARow(supervisor)) expect(line).toMatch(/^(\d+) \1$/)
    expect(existsSync(at('pid'))).toBe(false)
  })

  test('a pid file that it does not have open: forks do not need it', async () => {
    const supervisor = await python(
      'path = sys.argv[1] + "pid"; open(path, "w").write("template")',
      'gone = not os.path.exists(path); gone or os.unlink(path); print("gone" if gone else "there", flush=True)',
    )
    expect(await twiceInARow(supervisor)).toEqual(['there', 'gone'])
  })

  test('a temporary directory that it works in, with what lies in it: later forks have it again, empty', async () => {
    const supervisor = await python(
      'path = tempfile.mkdtemp(dir=sys.argv[1]); os.chdir(path); f = open("state", "a")',
      'print(os.getcwd() == path, os.listdir("."), flush=True); f.write("x"); f.flush(); shutil.rmtree(path)',
    )
    expect(await twiceInARow(supervisor)).toEqual(["True ['state']", "True ['state']"])
  })

  test('a file that it reads: later forks read what was kept', async () => {
    writeFileSync(at('data'), 'first\nsecond\n')
    const supervisor = await python(
      'path = sys.argv[1] + "data"; f = open(path); first = f.readline()',
      'print(f.readline().strip(), flush=True); os.unlink(path) if os.path.exists(path) else None',
    )
    expect(await twiceInARow(supervisor)).toEqual(['second', 'second'])
  })

  test('a log that was renamed in between is begun anew', async () => {
    const supervisor = await python(
      'f = open(sys.argv[1] + "log", "a"); f.write("boot\\n"); f.flush()',
      'f.write("%d\\n" % os.getpid()); f.flush(); print("done", flush=True)',
    )
    const first = await supervisor.fork()
    await ask(first, '')
    mkdirSync(at('old'))
    renameSync(at('log'), at('old/log'))
    const second = await supervisor.fork()
    await ask(second, '')
    expect(readFileSync(at('old/log'), 'utf8')).toBe(`boot\n${first.pid}\n`)
    expect(readFileSync(at('log'), 'utf8')).toBe(`${second.pid}\n`)
  })
})

/** Node has no Unix sockets for datagrams. */
function send(path: string, word: string): void {
  const script =
    'import socket, sys; socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(sys.argv[2].encode(), sys.argv[1])'
  execFileSync('python3', ['-c', script, path, word])
}
