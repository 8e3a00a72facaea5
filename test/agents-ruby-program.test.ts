/** What the Ruby agent does to the program that it is in, and what it bears from it. The supervisor's side is played by the test. */
import { spawnSync } from 'node:child_process'
import { existsSync, mkdirSync, mkdtempSync, readlinkSync, rmSync, symlinkSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterEach, describe, expect, test } from 'vitest'
import { type AgentSide, Conformer } from './agents-conformance.js'

const AGENT = fileURLToPath(new URL('../src/agents/ruby/warmfork/agent.rb', import.meta.url))
const RUBY = '/usr/bin/ruby'

// What it prints are events, as the test's other side reads them.
const PRELUDE = `
require 'warmfork'
def say(event, more = {})
  require 'json'
  $stdout.write(JSON.generate({ event: event }.merge(more)) + "\\n")
  $stdout.flush
end
`

describe.skipIf(!existsSync(RUBY))('the Ruby agent', () => {
  let program: Conformer | undefined
  afterEach(async () => {
    await program?.end()
    program = undefined
  })

  async function start(code: string, flags: string[] = []): Promise<AgentSide> {
    program = await Conformer.start({
      name: 'MRI',
      runtime: 'ruby',
      missing: () => undefined,
      command: [RUBY, ...flags, '-e', PRELUDE + code],
      env: { RUBYOPT: `-r${AGENT}` },
    })
    const agent = await program.connection()
    agent.send({ type: 'welcome', protocol: 1 })
    return agent
  }

  /** Runs a program to its end, without a supervisor unless the environment names one. */
  function run(args: string[], env: Record<string, string> = {}) {
    const { status, stdout, stderr } = spawnSync(RUBY, args, {
      env: { PATH: process.env.PATH!, RUBYOPT: `-r${AGENT}`, ...env },
      encoding: 'utf8',
      timeout: 30_000,
    })
    return { status, stdout, stderr }
  }

  describe('at the start of a program', () => {
    test.each([
      ['no supervisor is named', {}],
      ['nobody listens', { WARMFORK_SOCKET: '/nowhere/agents.sock' }],
      ['the path is too long for a socket', { WARMFORK_SOCKET: `/${'x'.repeat(200)}` }],
    ])('is harmless where %s, with all warnings on', (_, env) => {
      const code = 'require "warmfork"; p [Warmfork.connected?, Warmfork.fork?, Warmfork.ready, fork { exit 3 }.class]'
      expect(run(['-w', '-e', code], env)).toEqual({
        status: 0,
        stdout: '[false, false, nil, Integer]\n',
        stderr: '',
      })
    })

    test('says what is wrong to who wants to fork', () => {
      const code = 'require "warmfork"; begin; Warmfork.fork; rescue Warmfork::Error => e; p e.code; end'
      expect(run(['-e', code]).stdout).toBe('"NO_SUPERVISOR"\n')
    })

    test('leaves the choice of gems to the program, which default gems are too', async () => {
      const agent = await start(
        'said = [defined?(JSON), defined?(Fiddle), defined?(StringScanner)]; say("loaded", gems: said)',
      )
      expect((await program!.expect('loaded')).gems).toEqual([null, null, null])
      expect(await agent.silence(0)).toEqual([])
    })

    test('is one where its directory is a link', () => {
      const directory = mkdtempSync(join(tmpdir(), 'warmfork-link-'))
      try {
        symlinkSync(join(AGENT, '../..'), join(directory, 'linked'))
        const env = { RUBYOPT: `-w -r${join(directory, 'linked/warmfork/agent.rb')} -r${AGENT}` }
        expect(run(['-e', 'require "warmfork"; p $stdin.class'], env)).toEqual({
          status: 0,
          stdout: 'IO\n',
          stderr: '',
        })
      } finally {
        rmSync(directory, { recursive: true })
      }
    })

    test.each([
      ['irb', ['-f', '--noprompt']],
      ['rake', ['--version']],
    ] as [string, string[]][])('lets %s run', (name, args) => {
      expect(run([join('/usr/bin', name), ...args])).toMatchObject({ status: 0, stderr: '' })
    })
  })

  test('has an agent in each process that the program forks, whose parent keeps its own', async () => {
    const agent = await start(`
      at = Process.fork { say("child", pid: Process.pid, connected: Warmfork.connected?); sleep }
      say("parent", pid: at, connected: Warmfork.connected?)
      $stdin.gets
      Process.kill(:KILL, at)
      Process.wait(at)
      say("ended", connected: Warmfork.connected?)
      sleep
    `)
    const other = await program!.connection()
    const parent = await program!.expect('parent')
    expect(other.hello.pid).toBe(parent.pid)
    other.send({ type: 'welcome', protocol: 1 })
    expect(await program!.expect('child')).toMatchObject({ pid: parent.pid, connected: true })
    agent.checkpoint(1)
    await agent.expect('parked')
    agent.send({ type: 'resumed', id: 1 })
    await agent.expect('running')
    program!.say('end it')
    expect(await program!.expect('ended')).toMatchObject({ connected: true })
    expect(await other.next()).toBe(undefined)
  })

  test('connects anew in a process that becomes a daemon', async () => {
    await start(`
      Process.wait(Process.fork { Process.daemon(true, true); say("daemon", pid: Process.pid); $stdin.gets })
      sleep
    `)
    const first = await program!.connection()
    const agent = await program!.connection()
    expect(agent.hello.pid).not.toBe(first.hello.pid)
    expect(await program!.expect('daemon')).toMatchObject({ pid: agent.hello.pid })
    agent.checkpoint(1)
    await agent.expect('parked')
    agent.send({ type: 'resumed', id: 1 })
    await agent.expect('running')
    program!.say('end')
    expect(await agent.next()).toBe(undefined)
  })

  test('is gone, and the program goes on, where the program closes all IO objects', async () => {
    const agent = await start(`
      ObjectSpace.each_object(IO) { |io| io.close unless io.closed? || io.fileno < 3 }
      say("closed")
      sleep 0.1
      say("asked", connected: Warmfork.connected?)
      sleep
    `)
    await program!.expect('closed')
    expect(await program!.expect('asked')).toMatchObject({ connected: false })
    expect(await agent.next()).toBe(undefined)
  })

  test('survives garbage, and a line without an end, as a program without it', async () => {
    const agent = await start('say("started"); $stdin.gets; say("asked", connected: Warmfork.connected?); sleep')
    await program!.expect('started')
    agent.socket.write('{"type":"checkpoint","id":1,"time\n')
    expect(await agent.next()).toBe(undefined)
    program!.say('well?')
    expect(await program!.expect('asked')).toMatchObject({ connected: false })
  })

  test('ends in a fork that nobody tells who it is, where its connection ends', async () => {
    // x86-64's clone (with CLONE_FILES), dup2 and exit: a process that has the descriptors in common replaces one as the restore of a fork does.
    const agent = await start(`
      say("started")
      fd = Integer($stdin.gets)
      other, = UNIXSocket.pair
      if syscall(56, 0x400 | 17, 0, 0, 0, 0).zero?
        until File.exist?("parked"); end
        syscall(33, other.fileno, fd)
        syscall(60, 0)
      end
      say("cloned")
      sleep
    `)
    await program!.expect('started')
    const link = () => readlinkSync(`/proc/${program!.pid}/fd/${agent.hello.fd}`)
    const before = link()
    program!.say(`${agent.hello.fd}`)
    await program!.expect('cloned')
    agent.checkpoint(1)
    await agent.expect('parked')
    mkdirSync(join(program!.directory, 'parked'))
    // The signal of the clone's end can interrupt the read, which sees what is there now, and ends before this looks.
    const isReplaced = () => program!.hasEnded || link() !== before
    await expect.poll(isReplaced, { timeout: 5_000 }).toBe(true)
    agent.socket.destroy()
    expect(await program!.exit()).toEqual({ code: 70, signal: null })
  })

  test('has main stand still for the hooks, but not for ever where it holds what they need', async () => {
    const agent = await start(`
      lock = Mutex.new
      Warmfork.on_fork { lock.synchronize { say("hook") } }
      say("started")
      # Holds the lock most of the time, also when it is stopped.
      loop { lock.synchronize { sleep 0.05 }; sleep 0.001 }
    `)
    await program!.expect('started')
    agent.checkpoint(1)
    await agent.expect('parked')
    agent.send(program!.forked({ timeoutMs: 1_000 }))
    await program!.expect('hook')
    expect(await agent.expect('running')).toEqual({ type: 'running' })
  })

  test('sends threads that are started by a hook off with the usual slice of time', async () => {
    const agent = await start(`
      Warmfork.on_fork { Thread.new { sleep } }
      Thread.new { $stdin.gets; say("priorities", all: Thread.list.map(&:priority).uniq); sleep }
      sleep
    `)
    agent.checkpoint(1)
    await agent.expect('parked')
    agent.send(program!.forked())
    await agent.expect('running')
    // The thread of the checkpoint has said its last word, and may live for a moment yet.
    expect(await program!.silence(100)).toEqual([])
    program!.say('well?')
    expect(await program!.expect('priorities')).toMatchObject({ all: [0] })
  })

  test("leaves a program's own handler of SIGURG in place", async () => {
    const agent = await start(`
      trap(:URG) { $stdout.syswrite(%({"event":"urgent"}\\n)) }
      Warmfork.on_fork { sleep 0.05 }
      say("started")
      loop { sleep 1 }
    `)
    await program!.expect('started')
    agent.checkpoint(1)
    await agent.expect('parked')
    agent.send(program!.forked())
    await agent.expect('running')
    expect(await program!.silence(50)).toEqual([])
    process.kill(program!.pid, 'SIGURG')
    await program!.expect('urgent')
  })

  test('works in a program in whose directory there is nothing', async () => {
    const directory = mkdtempSync(join(tmpdir(), 'warmfork-gone-'))
    mkdirSync(join(directory, 'gone'))
    try {
      const agent = await start(`Dir.chdir(${JSON.stringify(join(directory, 'gone'))}) { say("in") ; $stdin.gets }`)
      await program!.expect('in')
      rmSync(join(directory, 'gone'), { recursive: true })
      agent.checkpoint(1)
      await agent.expect('parked')
      // Ruby would refuse it in another thread's block.
      agent.send(program!.forked({ cwd: directory }))
      expect(await agent.expect('running')).toEqual({ type: 'running' })
    } finally {
      rmSync(directory, { recursive: true })
    }
  })
})
