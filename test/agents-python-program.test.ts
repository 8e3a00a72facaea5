/** What the Python agent does to the program that it is in, and what it bears from it. The supervisor's side is played by the test. */
import { spawnSync } from 'node:child_process'
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { homedir, tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, describe, expect, it } from 'vitest'
import { type AgentSide, Conformer } from './agents-conformance.js'
import { PYTHON_AGENT, pythons } from './fixtures/agents-conformance/python.js'

const PYTHONS = pythons()
const [, SYSTEM] = PYTHONS[0]!
const NEWEST = PYTHONS.at(-1)![1]
const PYTHON2 = join(process.env.PYENV_ROOT ?? join(homedir(), '.pyenv'), 'versions/2.7.18/bin/python')

// A program that says that it has started is past its imports: in the middle of one it holds a lock that a hook may need.
const PRELUDE = `
import json, os, sys
def say(event, **more):
    os.write(1, (json.dumps({"event": event, **more}) + "\\n").encode())
import warmfork
`

describe.skipIf(!existsSync(SYSTEM))('the Python agent', () => {
  let program: Conformer
  let directory: string | undefined
  afterEach(async () => {
    await program?.end()
    if (directory) rmSync(directory, { recursive: true })
    directory = undefined
  })

  async function start(code: string, interpreter = SYSTEM, flags: string[] = []): Promise<AgentSide> {
    program = await Conformer.start({
      name: 'Python',
      runtime: 'python',
      missing: () => undefined,
      command: [interpreter, ...flags, '-c', PRELUDE + code],
      env: { PYTHONPATH: PYTHON_AGENT },
    })
    const agent = await program.connection()
    agent.send({ type: 'welcome', protocol: 1 })
    return agent
  }

  async function park(agent: AgentSide): Promise<void> {
    agent.checkpoint(1)
    await agent.expect('parked')
  }

  /** Runs a program to its end, without a supervisor unless the environment names one. */
  function run(interpreter: string, code: string, env: Record<string, string> = {}, flags: string[] = []) {
    const { status, stdout, stderr } = spawnSync(interpreter, [...flags, '-c', code], {
      env: { PATH: process.env.PATH!, PYTHONPATH: PYTHON_AGENT, PYTHONDONTWRITEBYTECODE: '1', ...env },
      encoding: 'utf8',
      timeout: 30_000,
    })
    return { status, stdout, stderr }
  }

  describe('at the start of a program', () => {
    it('runs the sitecustomize that its own stands before', () => {
      directory = mkdtempSync(join(tmpdir(), 'warmfork-site-'))
      writeFileSync(
        join(directory, 'sitecustomize.py'),
        'import sys\nprint("shadowed", __name__, __file__)\nvalue = 5\n',
      )
      const path = `${PYTHON_AGENT}:${directory}`
      const code = 'import sitecustomize; print(sitecustomize.value)'
      for (const [, interpreter] of PYTHONS) {
        const { stdout, stderr } = run(interpreter, code, { PYTHONPATH: path })
        expect(stdout).toBe(`shadowed sitecustomize ${join(directory, 'sitecustomize.py')}\n5\n`)
        expect(stderr).toBe('')
      }
    })

    it('finds no end in itself where two of it are on the path', () => {
      directory = mkdtempSync(join(tmpdir(), 'warmfork-site-'))
      writeFileSync(join(directory, 'sitecustomize.py'), readFileSync(join(PYTHON_AGENT, 'sitecustomize.py')))
      const path = `${PYTHON_AGENT}:${directory}:${PYTHON_AGENT}`
      expect(run(SYSTEM, 'print(1)', { PYTHONPATH: path })).toMatchObject({ stdout: '1\n', stderr: '' })
    })

    it('leaves the error of a sitecustomize as it would have been', () => {
      directory = mkdtempSync(join(tmpdir(), 'warmfork-site-'))
      writeFileSync(join(directory, 'sitecustomize.py'), 'raise ValueError("broken")\n')
      const alone = run(SYSTEM, 'print(1)', { PYTHONPATH: directory })
      expect(alone.stderr).toContain('broken')
      expect(run(SYSTEM, 'print(1)', { PYTHONPATH: `${PYTHON_AGENT}:${directory}` })).toEqual(alone)
    })

    it.skipIf(!existsSync(PYTHON2))('lets a Python that is too old for it run', () => {
      expect(run(PYTHON2, 'print(1)', { WARMFORK_SOCKET: '/nowhere' })).toEqual({
        status: 0,
        stdout: '1\n',
        stderr: '',
      })
    })

    it('says nothing where nobody is there', () => {
      for (const path of ['/nowhere', `/${'long'.repeat(100)}`, '/dev/null']) {
        const code = 'import warmfork; warmfork.ready(); print(warmfork.connected, warmfork.send(1))'
        expect(run(SYSTEM, code, { WARMFORK_SOCKET: path })).toEqual({ status: 0, stdout: 'False False\n', stderr: '' })
      }
    })

    it('gives its API to a program that was not started by warmfork', () => {
      const code = `
import warmfork
@warmfork.on_fork
def hook(): pass
warmfork.ready()
try: warmfork.fork()
except warmfork.WarmforkError as error: print(error.code, warmfork.is_fork, warmfork.payload, warmfork.generation)
`
      expect(run(SYSTEM, code)).toMatchObject({ stdout: 'NO_SUPERVISOR False None None\n', stderr: '' })
    })

    it.each(PYTHONS)('loads next to nothing in %s', async (_, interpreter) => {
      const list = 'import sys; print(sorted(sys.modules))'
      const without = new Set(run(interpreter, list, { PYTHONPATH: '' }).stdout.match(/'[^']+'/g))
      await start('say("modules", names=sorted(sys.modules))', interpreter)
      // What the prelude of the test loads is not the agent's.
      const prelude = new Set(run(interpreter, `import json; ${list}`, { PYTHONPATH: '' }).stdout.match(/'[^']+'/g))
      const names = ((await program.expect('modules')).names as string[]).filter(
        (name) => !without.has(`'${name}'`) && !prelude.has(`'${name}'`),
      )
      const allowed = ['_socket', 'atexit', 'gc', 'itertools', 'sitecustomize', 'warmfork', 'warmfork._agent']
      expect(names.filter((name) => !allowed.includes(name))).toEqual([])
    })

    it('is silent in a program that closes all descriptors that it does not know', async () => {
      const agent = await start(`
import time
os.closerange(3, 256)
say("closed")
sys.stdin.readline()
warmfork.ready()
say("end")
`)
      await program.expect('closed')
      program.say('')
      await program.expect('end')
      expect(await program.exit()).toEqual({ code: 0, signal: null })
      expect(await agent.next()).toBe(undefined)
      expect(program.stderr).toBe('')
    })

    it('leaves nothing open that Python would warn of', async () => {
      await start('say("end")', NEWEST, ['-X', 'dev', '-W', 'error'])
      await program.expect('end')
      expect(await program.exit()).toEqual({ code: 0, signal: null })
      expect(program.stderr).toBe('')
    })
  })

  describe('while it is parked', () => {
    it.each(PYTHONS)(
      'keeps a computing main thread of %s from running until the hooks are done',
      async (_, interpreter) => {
        const agent = await start(
          `
import time
count = 0
@warmfork.on_fork
def hook():
    before = count
    time.sleep(0.1)  # lets go of the interpreter's lock
    say("hook", more=count - before)
say("started")
while not warmfork.is_fork or count == 0:
    count += 1
reached = count
for _ in range(10): count += 1
say("went on")
sys.stdin.read()
`,
          interpreter,
        )
        await program.expect('started')
        await park(agent)
        agent.send(program.forked())
        // Some versions let it do a few bytecodes before it stops.
        expect((await program.expect('hook')).more).toBeLessThanOrEqual(1)
        await program.expect('went on')
        await agent.expect('running')
      },
    )

    it('lets no thread run Python', async () => {
      const agent = await start(`
import mmap, threading, time
file = os.open("counters", os.O_RDWR | os.O_CREAT)
os.ftruncate(file, 16)
memory = mmap.mmap(file, 16)
def count(at):
    n = 0
    while True:
        n += 1
        memory[at:at + 8] = n.to_bytes(8, "little")
        if at: time.sleep(0)  # comes for the lock again and again
for at in (0, 8):
    threading.Thread(target=count, args=(at,), daemon=True).start()
say("started")
sys.stdin.read()
`)
      await program.expect('started')
      const counters = () => readFileSync(join(program.directory, 'counters'))
      await park(agent)
      const parked = counters()
      await new Promise((resolve) => setTimeout(resolve, 100))
      expect(counters().equals(parked)).toBe(true)
      agent.send({ type: 'resumed', id: 1 })
      await agent.expect('running')
      await new Promise((resolve) => setTimeout(resolve, 100))
      const later = counters()
      for (const at of [0, 8]) expect(later.readBigUInt64LE(at)).toBeGreaterThan(parked.readBigUInt64LE(at))
    })

    it('names the threads that it cannot stop, and not those of Python', async () => {
      const agent = await start(`
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
say("started")
sys.stdin.readline()
libc = ctypes.CDLL(None)
thread = ctypes.c_ulong()
libc.pthread_create(ctypes.byref(thread), None, libc.pause, None)
libc.pthread_setname_np(thread, b"of C")
say("made")
sys.stdin.read()
`)
      await program.expect('started')
      agent.checkpoint(1)
      expect(await agent.expect('parked')).not.toHaveProperty('threads')
      agent.send({ type: 'resumed', id: 1 })
      await agent.expect('running')
      await program.ask('', 'made')
      agent.checkpoint(2)
      expect(await agent.expect('parked')).toMatchObject({ threads: ['of C'] })
    })

    it('leaves the sequence of the module random to the source, and gives a fork another', async () => {
      const agent = await start(`
import random
random.seed(42)
for line in sys.stdin:
    say("drawn", value=random.random())
`)
      const expected = [
        ...run(SYSTEM, 'import random; random.seed(42); print(random.random(), random.random())').stdout.matchAll(
          /\S+/g,
        ),
      ]
      const values = expected.map(Number)
      expect(await program.ask('', 'drawn')).toMatchObject({ value: values[0] })
      await park(agent)
      agent.send({ type: 'resumed', id: 1 })
      await agent.expect('running')
      expect(await program.ask('', 'drawn')).toMatchObject({ value: values[1] })
      await park(agent)
      agent.send(program.forked())
      await agent.expect('running')
      expect(values).not.toContain((await program.ask('', 'drawn')).value)
    })

    it('keeps signals for the program, whose handler runs when the hooks are done', async () => {
      const agent = await start(`
import signal, time
def handler(*_):
    say("handler")
    sys.exit(5)
signal.signal(signal.SIGTERM, handler)
@warmfork.on_fork
def hook():
    time.sleep(0.1)
    say("hook")
say("started")
while True: pass
`)
      await program.expect('started')
      await park(agent)
      process.kill(program.pid, 'SIGTERM')
      await program.silence(50)
      agent.send(program.forked())
      await program.expect('hook')
      await program.expect('handler')
      // Whether the agent says `running` before the handler has ended the process is open.
      expect(await program.exit()).toEqual({ code: 5, signal: null })
      expect(program.stderr).toBe('')
    })

    it('reads also where a default time-out of sockets, or somebody, has made its descriptor non-blocking', async () => {
      const agent = await start(`
import socket
socket.setdefaulttimeout(0.01)
for fd in map(int, os.listdir("/proc/self/fd")):
    try: os.set_blocking(fd, fd < 3)
    except OSError: pass
say("started")
sys.stdin.read()
`)
      await program.expect('started')
      for (const id of [1, 2]) {
        agent.checkpoint(id)
        await agent.expect('parked')
        expect(await agent.silence(50)).toEqual([])
        agent.send({ type: 'resumed', id })
        await agent.expect('running')
      }
    })
  })

  describe('with hooks', () => {
    it('takes no coroutine functions', () => {
      const code = `
import warmfork
async def hook(): pass
for register in (warmfork.before_checkpoint, warmfork.after_checkpoint, warmfork.on_fork):
    try: register(hook)
    except TypeError as error: print("plain function" in str(error))
`
      expect(run(SYSTEM, code).stdout).toBe('True\nTrue\nTrue\n')
    })

    it('lets those before a checkpoint wait for what runs in the main thread', async () => {
      const agent = await start(`
import asyncio
async def close(): await asyncio.sleep(0.01); say("closed")
async def main():
    loop = asyncio.get_running_loop()
    warmfork.before_checkpoint(lambda: asyncio.run_coroutine_threadsafe(close(), loop).result())
    warmfork.on_fork(lambda: loop.call_soon_threadsafe(say, "scheduled"))
    say("started")
    await asyncio.sleep(60)
asyncio.run(main())
`)
      await program.expect('started')
      await park(agent)
      await program.expect('closed')
      agent.send(program.forked())
      await agent.expect('running')
      await program.expect('scheduled')
    })

    it('refuses to fork in one', async () => {
      const agent = await start(`
@warmfork.before_checkpoint
def forks(): warmfork.fork()
say("started")
sys.stdin.read()
`)
      await program.expect('started')
      agent.checkpoint(1)
      expect(await agent.expect('refused')).toMatchObject({
        error: { hook: 'forks', message: expect.stringContaining('NOT_AT_REST') },
      })
    })

    it('takes one that exits for one that fails', async () => {
      const agent = await start(`
@warmfork.before_checkpoint
def exits():
    if not how: sys.exit(3)
@warmfork.on_fork
def exitsInFork(): sys.exit(3)
how = None
say("started")
for line in sys.stdin:
    how = line
    say("pong")
`)
      await program.expect('started')
      agent.checkpoint(1)
      expect(await agent.expect('refused')).toMatchObject({ error: { hook: 'exits', message: 'SystemExit(3)' } })
      await program.ask('x', 'pong')
      await park(agent)
      agent.send(program.forked())
      expect(await agent.expect('failed')).toMatchObject({ error: { hook: 'exitsInFork', message: 'SystemExit(3)' } })
      expect(await program.exit()).toEqual({ code: 70, signal: null })
    })

    it('ends the child of an os.fork() in one when it returns, and parks its parent', async () => {
      const agent = await start(`
@warmfork.before_checkpoint
def forks():
    pid = os.fork()
    if pid: say("child", status=os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
say("started")
sys.stdin.read()
`)
      await program.expect('started')
      agent.checkpoint(1)
      expect(await program.expect('child')).toMatchObject({ status: 0 })
      await agent.expect('parked')
    })

    it('starts what they start without blocked signals', async () => {
      const agent = await start(`
import subprocess
@warmfork.on_fork
def hook():
    status = subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True).stdout
    say("blocked", mask=int(status.split("SigBlk:")[1].split()[0], 16))
say("started")
sys.stdin.read()
`)
      await program.expect('started')
      await park(agent)
      agent.send(program.forked())
      expect(await program.expect('blocked')).toMatchObject({ mask: 0 })
    })

    it('fails where it cannot change to the directory', async () => {
      const agent = await start('sys.stdin.read()')
      await park(agent)
      agent.send(program.forked({ cwd: '/nowhere/at/all' }))
      expect((await agent.expect('failed')).error.message).toContain('/nowhere/at/all')
      expect((await program.exit()).code).toBe(70)
    })
  })

  describe('in a program that forks by itself', () => {
    it.each(PYTHONS)(
      'connects anew in the child of %s, without a warning of its own thread',
      async (_, interpreter) => {
        const agent = await start(
          `
say("parent", fds=os.listdir("/proc/self/fd"))
pid = os.fork()
if pid == 0:
    say("child", fds=os.listdir("/proc/self/fd"))
    sys.stdin.read()
    os._exit(0)
sys.stdin.readline()
`,
          interpreter,
          ['-W', 'error'],
        )
        const child = await program.connection()
        expect(child.hello.pid).not.toBe(program.pid)
        expect(child.hello.runtime).toBe('python')
        child.send({ type: 'welcome', protocol: 1 })
        // One connection each.
        const { fds } = await program.expect('parent')
        expect((await program.expect('child')).fds).toHaveLength((fds as string[]).length)
        child.checkpoint(1)
        await child.expect('parked')
        expect(await agent.silence(0)).toEqual([])
        child.send({ type: 'resumed', id: 1 })
        await child.expect('running')
        await park(agent)
        agent.send({ type: 'resumed', id: 1 })
        await agent.expect('running')
        expect(program.stderr).toBe('')
      },
    )

    it('runs with multiprocessing', async () => {
      await start(`
import multiprocessing
def work(n): return os.getpid(), n * n
with multiprocessing.get_context("fork").Pool(2) as pool:
    say("results", values=[value for _, value in pool.map(work, range(4))])
`)
      expect(await program.expect('results')).toMatchObject({ values: [0, 1, 4, 9] })
      expect(await program.exit()).toEqual({ code: 0, signal: null })
      expect(program.stderr).toBe('')
    })
  })

  it('returns twice from a fork in the main thread', async () => {
    const agent = await start(`
pid = warmfork.fork(b"\\xff")
say("returned", pid=pid, payload=(warmfork.payload or b"").hex())
pid = warmfork.fork()
say("returned", pid=pid, payload=(warmfork.payload or b"").hex())
`)
    const first = await agent.expect('fork')
    expect(first.data).toEqual({ base64: '/w==' })
    await park(agent)
    agent.send(program.forked({ call: first.id, data: first.data! }))
    await agent.expect('running')
    expect(await program.expect('returned')).toMatchObject({ pid: 0, payload: 'ff' })
    const second = await agent.expect('fork')
    await park(agent)
    agent.send({ type: 'resumed', id: 1 })
    await agent.expect('running')
    agent.send({ type: 'forkResult', id: second.id, pid: 77, generation: 4 })
    expect(await program.expect('returned')).toMatchObject({ pid: 77, payload: 'ff' })
  })

  it('returns None from a checkpoint in its forks', async () => {
    const agent = await start('say("returned", none=warmfork.checkpoint() is None); sys.stdin.read()')
    await agent.expect('keep')
    await park(agent)
    // Of a request that was made when the checkpoint was there already.
    agent.send(program.forked({ call: 99 }))
    await agent.expect('running')
    expect(await program.expect('returned')).toMatchObject({ none: true })
  })

  it('goes on without a supervisor that sends what is no message', async () => {
    const agent = await start('for line in sys.stdin: say("pong", connected=warmfork.connected)')
    expect(await program.ask('', 'pong')).toBeTruthy()
    agent.socket.write('[1, 2\n')
    expect(await agent.next()).toBe(undefined)
    expect(await program.ask('', 'pong')).toMatchObject({ connected: false })
    expect(program.stderr).toBe('')
  })

  it('does not send what is too long', async () => {
    await start(`
try: warmfork.send("x" * (8 << 20))
except warmfork.WarmforkError as error: say("error", code=error.code)
try: warmfork.send({1, 2})
except TypeError: say("type error")
`)
    expect(await program.expect('error')).toMatchObject({ code: 'BAD_OPTION' })
    await program.expect('type error')
  })
})
