import { type ChildProcess, spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest'
import { Guard, guardPath, guardVariable } from '../src/guard/guard.js'
import { isAlive, stat } from '../src/linux/proc.js'

const root = new URL('..', import.meta.url).pathname
const WAIT_MS = 15_000

beforeAll(() => {
  const built = spawnSync(process.execPath, ['scripts/build-native.mjs'], {
    cwd: root,
    encoding: 'utf8',
    timeout: 60_000,
  })
  expect(built.stderr).toBe('')
})

let directory: string
let nextToken = 0
let token: string
/** Processes of the test's own, ended after it whatever happened. */
let own: Array<{ pid: number; start: number }> = []

beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'warmfork-guard-'))
  token = `test_${process.pid}_${nextToken++}`
})

afterEach(() => {
  for (const { pid, start } of own) if (isAlive(pid, start)) process.kill(pid, 'SIGKILL')
  own = []
  rmSync(directory, { recursive: true, force: true })
})

function remember(pid: number): number {
  const found = stat(pid)
  if (found) own.push({ pid, start: found.startTicks })
  return pid
}

async function until(what: string, condition: () => boolean): Promise<void> {
  const deadline = Date.now() + WAIT_MS
  while (!condition()) {
    if (Date.now() > deadline) throw new Error(`waited ${WAIT_MS} ms in vain until ${what}`)
    await new Promise((resolve) => setTimeout(resolve, 10))
  }
}

const gone = (pid: number) => until(`process ${pid} is gone`, () => !isAlive(pid))

function startTicks(pid: number): number {
  const found = stat(pid)
  if (!found) throw new Error(`process ${pid} has ended too early`)
  return found.startTicks
}

/** A supervisor in a process of its own, to be killed. */
class StandIn {
  readonly lines: AsyncIterator<string>
  guard = 0

  constructor(readonly child: ChildProcess) {
    this.lines = createInterface({ input: child.stdout! })[Symbol.asyncIterator]()
  }

  static async start(): Promise<StandIn> {
    const script = join(root, 'test/fixtures/guard/supervisor.ts')
    const child = spawn(process.execPath, ['--import', 'tsx', script, token], {
      cwd: root,
      stdio: ['pipe', 'pipe', 'inherit'],
    })
    remember(child.pid!)
    const standIn = new StandIn(child)
    standIn.guard = remember((await standIn.line()).guard as number)
    return standIn
  }

  async line(): Promise<Record<string, unknown>> {
    const { value } = await this.lines.next()
    if (value === undefined) throw new Error('the stand-in ended')
    return JSON.parse(value)
  }

  async call(name: string, ...args: unknown[]): Promise<unknown> {
    this.child.stdin!.write(`${JSON.stringify({ call: name, args })}\n`)
    return (await this.line()).answer
  }

  /** Starts a script in the stand-in; it prints the ids of its processes in one line. */
  async run(script: string, { marked = false, detached = false } = {}): Promise<number[]> {
    const { said } = (await this.call('spawn', script, marked, detached)) as { said: string }
    return said.split(' ').map(Number).map(remember)
  }

  async track(pid: number, method = 'track'): Promise<void> {
    await this.call(method, pid, startTicks(pid))
  }

  /** kill -9, and the guard's sweep awaited. */
  async kill(): Promise<void> {
    await this.call('ping')
    this.child.kill('SIGKILL')
    await gone(this.guard)
  }
}

describe('when the supervisor is killed with -9', () => {
  it('ends a tracked process', async () => {
    const supervisor = await StandIn.start()
    const [pid] = await supervisor.run('echo $$; exec sleep 1000')
    await supervisor.track(pid!)
    await supervisor.kill()
    expect(isAlive(pid!)).toBe(false)
  })

  it('ends a stopped process, and one that ignores SIGTERM', async () => {
    const supervisor = await StandIn.start()
    const [stopped] = await supervisor.run('echo $$; exec sleep 1000')
    const [stubborn] = await supervisor.run("trap '' TERM HUP INT; echo $$; while :; do sleep 1; done")
    await supervisor.track(stopped!)
    await supervisor.track(stubborn!)
    process.kill(stopped!, 'SIGSTOP')
    await until('it is stopped', () => stat(stopped!)?.state === 'T')
    await supervisor.kill()
    expect([stopped, stubborn].filter((pid) => isAlive(pid!))).toEqual([])
  })

  it('ends descendants of a tracked process that have a new session and an empty environment', async () => {
    const supervisor = await StandIn.start()
    const pids = await supervisor.run('setsid env -i /bin/sleep 1000 & a=$!; sleep 0.2; echo $$ $a; wait')
    await supervisor.track(pids[0]!)
    await supervisor.kill()
    expect(pids.filter((pid) => isAlive(pid))).toEqual([])
  })

  it('ends an orphan with a cleared environment by its session', async () => {
    const supervisor = await StandIn.start()
    const pids = await supervisor.run('( env -i /bin/sleep 1000 & echo $$ $! ); exec sleep 1000', { detached: true })
    await until('the orphan has another parent', () => stat(pids[1]!)?.ppid !== pids[0])
    expect(stat(pids[1]!)?.sid).toBe(pids[0])
    await supervisor.track(pids[0]!)
    await supervisor.kill()
    expect(pids.filter((pid) => isAlive(pid))).toEqual([])
  })

  it('ends an orphan of a new session by the token in its environment', async () => {
    const supervisor = await StandIn.start()
    const pids = await supervisor.run('( setsid sleep 1000 & sleep 0.2; echo $$ $! ); exec sleep 1000', {
      marked: true,
    })
    await until('the orphan has another parent', () => stat(pids[1]!)?.ppid !== pids[0])
    // Nothing is tracked: the token alone says whose they are.
    await supervisor.kill()
    expect(pids.filter((pid) => isAlive(pid))).toEqual([])
  })

  it('takes the token for a whole name only', async () => {
    const supervisor = await StandIn.start()
    const near = [`${guardVariable(token)}9`, `X${guardVariable(token)}`, `OTHER=${guardVariable(token)}`]
    const strangers = near.map((name) => {
      const child = spawn('sleep', ['1000'], { env: { [name.split('=')[0]!]: `${name}=1` }, stdio: 'ignore' })
      return remember(child.pid!)
    })
    await supervisor.kill()
    expect(strangers.filter((pid) => !isAlive(pid))).toEqual([])
  })

  it('ends the criu processes and what they have started', async () => {
    const supervisor = await StandIn.start()
    const pids = await supervisor.run('setsid env -i /bin/sleep 1000 & sleep 0.2; echo $$ $!; wait')
    await supervisor.track(pids[0]!, 'trackCriu')
    await supervisor.kill()
    expect(pids.filter((pid) => isAlive(pid))).toEqual([])
  })

  it('ends a chain of processes, each of which lives for a moment only', async () => {
    const supervisor = await StandIn.start()
    // Each link starts the next one in a new session and ends.
    const link = join(directory, 'link.sh')
    writeFileSync(link, 'sleep 0.01; setsid /bin/sh "$0" & exit 0\n')
    const links = () => spawnSync('pgrep', ['-f', link], { encoding: 'utf8' }).stdout
    await supervisor.run(`/bin/sh ${link} & echo $$; sleep 1000`, { marked: true })
    const first = links()
    // A look can miss the link that is there: it starts the next one meanwhile.
    const isAnother = (seen: string) => seen !== '' && seen !== first
    await until('it has gone on', () => isAnother(links()))
    await supervisor.kill()
    expect([links(), links(), links()]).toEqual(['', '', ''])
  })

  it('leaves a process alone whose id was given anew', async () => {
    const supervisor = await StandIn.start()
    const stranger = remember(spawn('setsid', ['sleep', '1000'], { stdio: 'ignore' }).pid!)
    // As if one of ours had had that id before: same id, earlier start.
    await supervisor.call('track', stranger, startTicks(stranger) - 1000)
    await supervisor.kill()
    expect(isAlive(stranger)).toBe(true)
  })

  it('leaves a session alone whose id was given anew', async () => {
    const supervisor = await StandIn.start()
    const leader = spawn('bash', ['-c', 'sleep 1000 & echo $!; wait'], {
      stdio: ['ignore', 'pipe', 'inherit'],
      detached: true,
    })
    remember(leader.pid!)
    const member = remember(
      Number(await new Promise<string>((resolve) => leader.stdout.once('data', (data) => resolve(`${data}`)))),
    )
    await supervisor.call('track', leader.pid!, startTicks(leader.pid!) - 1000)
    await supervisor.kill()
    expect([leader.pid!, member].filter((pid) => !isAlive(pid))).toEqual([])
  })

  it('leaves what was forgotten', async () => {
    const supervisor = await StandIn.start()
    const [pid] = await supervisor.run('echo $$; exec sleep 1000', { detached: true })
    await supervisor.track(pid!)
    await supervisor.call('forget', pid)
    await supervisor.kill()
    expect(isAlive(pid!)).toBe(true)
  })

  it('spares a process with its session and its descendants', async () => {
    const supervisor = await StandIn.start()
    const script = `setsid sleep 1000 & descendant=$!
      orphan=$(sh -c 'sleep 1000 > /dev/null & echo $!')
      sleep 0.2; echo $$ $descendant $orphan; wait`
    const spared = await supervisor.run(script, { detached: true, marked: true })
    const [ended] = await supervisor.run('echo $$; exec sleep 1000', { marked: true })
    await supervisor.track(spared[0]!)
    await supervisor.call('spare', spared[0])
    await supervisor.kill()
    expect(spared.filter((pid) => !isAlive(pid))).toEqual([])
    expect(isAlive(ended!)).toBe(false)
  })

  it('ends an unmarked orphan that has an id which a restore was to give', async () => {
    const supervisor = await StandIn.start()
    // Both have an empty environment, a session of their own and a parent that has ended.
    const orphan = 'echo $( (setsid env -i /bin/sleep 1000 >/dev/null & echo $!) )'
    const [expected] = await supervisor.run(orphan)
    const [other] = await supervisor.run(orphan)
    await supervisor.call('expect', expected, startTicks(expected!) - 1)
    await supervisor.kill()
    expect([expected, other].map((pid) => isAlive(pid!))).toEqual([false, true])
  })

  it('leaves a stranger alone that was given an expected id', async () => {
    const supervisor = await StandIn.start()
    // A child of a process that is none of the supervisor's, and one that was there before the restore began.
    const parent = spawn('/bin/bash', ['-c', 'sleep 1000 & echo $!; wait'], {
      stdio: ['ignore', 'pipe', 'inherit'],
      env: {},
    })
    remember(parent.pid!)
    const stranger = remember(Number((await once(createInterface({ input: parent.stdout }), 'line'))[0]))
    const [older] = await supervisor.run('echo $( (setsid env -i /bin/sleep 1000 >/dev/null & echo $!) )')
    await supervisor.call('expect', stranger, startTicks(stranger) - 1)
    await supervisor.call('expect', older, startTicks(older!) + 1)
    await supervisor.kill()
    expect([stranger, older].map((pid) => isAlive(pid!))).toEqual([true, true])
  })

  it('forgets an expected id', async () => {
    const supervisor = await StandIn.start()
    const [pid] = await supervisor.run('echo $( (setsid env -i /bin/sleep 1000 >/dev/null & echo $!) )')
    await supervisor.call('expect', pid, startTicks(pid!))
    await supervisor.call('forget', pid)
    await supervisor.kill()
    expect(isAlive(pid!)).toBe(true)
  })

  it('removes a directory that is empty at the end, where it is to be left otherwise', async () => {
    const supervisor = await StandIn.start()
    const inside = join(directory, 'parent/inside')
    mkdirSync(inside, { recursive: true })
    mkdirSync(join(directory, 'other'))
    writeFileSync(join(directory, 'other/file'), 'x')
    await supervisor.call('removeAtEnd', inside)
    await supervisor.call('removeAtEnd', join(directory, 'parent'), 'empty directory')
    await supervisor.call('removeAtEnd', join(directory, 'other'), 'empty directory')
    await supervisor.kill()
    expect(readdirSync(directory)).toEqual(['other'])
  })

  it('removes files and directories, and follows no symbolic link', async () => {
    const supervisor = await StandIn.start()
    const keep = join(directory, 'keep')
    const inside = join(directory, 'remove')
    mkdirSync(join(keep, 'sub'), { recursive: true })
    mkdirSync(join(inside, 'a/b/c'), { recursive: true })
    writeFileSync(join(keep, 'sub/file'), 'x')
    for (let i = 0; i < 200; i++) writeFileSync(join(inside, `a/b/file ${i} with a long name to fill the buffer`), 'x')
    symlinkSync(keep, join(inside, 'a/link'))
    symlinkSync(keep, join(directory, 'linked'))
    const strange = join(directory, 'new\nline \\ back')
    writeFileSync(strange, 'x')
    const kept = join(directory, 'kept after all')
    mkdirSync(kept)
    await supervisor.call('removeAtEnd', inside)
    await supervisor.call('removeAtEnd', strange, 'file')
    await supervisor.call('removeAtEnd', join(directory, 'linked'))
    await supervisor.call('removeAtEnd', kept)
    await supervisor.call('keep', kept)
    await supervisor.kill()
    expect(readdirSync(directory).sort()).toEqual(['keep', 'kept after all', 'linked'])
    expect(existsSync(join(keep, 'sub/file'))).toBe(true)
  })

  it('works although the guard was sent TERM, INT, HUP, QUIT and PIPE', async () => {
    const supervisor = await StandIn.start()
    const [pid] = await supervisor.run('echo $$; exec sleep 1000')
    await supervisor.track(pid!)
    for (const signal of ['SIGTERM', 'SIGINT', 'SIGHUP', 'SIGQUIT', 'SIGPIPE'] as const)
      process.kill(supervisor.guard, signal)
    await supervisor.call('ping')
    expect(isAlive(pid!)).toBe(true)
    await supervisor.kill()
    expect(isAlive(pid!)).toBe(false)
  })

  it('knows thousands of processes', async () => {
    const supervisor = await StandIn.start()
    const [pid] = await supervisor.run('echo $$; exec sleep 1000')
    await supervisor.track(pid!)
    // Ids that no process has (the kernel's own limit is 4,194,304).
    for (let i = 0; i < 5000; i++)
      supervisor.child.stdin!.write(`${JSON.stringify({ call: 'track', args: [5_000_000 + i, 1] })}\n`)
    for (let i = 0; i < 5000; i++) await supervisor.line()
    await supervisor.kill()
    expect(isAlive(pid!)).toBe(false)
  })

  it('is started again when it dies, and told everything anew', async () => {
    const supervisor = await StandIn.start()
    const [pid] = await supervisor.run('echo $$; exec sleep 1000')
    const removed = join(directory, 'removed')
    mkdirSync(removed)
    await supervisor.track(pid!)
    await supervisor.call('removeAtEnd', removed)
    process.kill(supervisor.guard, 'SIGKILL')
    supervisor.guard = remember((await supervisor.line()).restarted as number)
    expect(isAlive(pid!)).toBe(true)
    await supervisor.kill()
    expect(isAlive(pid!)).toBe(false)
    expect(existsSync(removed)).toBe(false)
  })
})

describe('when the supervisor is killed while it starts a guard', () => {
  it('ends what is tracked and removes what is to go, although the supervisor was dead before the guard ran', async () => {
    const child = spawn('sleep', ['1000'], { stdio: 'ignore', env: {}, detached: true })
    const pid = remember(child.pid!)
    const goes = join(directory, 'goes')
    mkdirSync(goes)
    const journal = join(directory, 'journal')
    const answer = join(directory, 'answer')
    writeFileSync(journal, `+ ${pid} ${startTicks(pid)}\nd ${goes}\n`)
    // The shell is the supervisor, whose child execs the guard only once it is an orphan.
    const orphan = `until read -r _ _ _ parent _ < /proc/$BASHPID/stat && [ "$parent" != $$ ]; do sleep 0.01; done
      exec "$1" "$2" < "$3" > "$4"`
    const run = spawnSync(
      '/bin/bash',
      ['-c', `( ${orphan} ) & kill -9 $$`, 'bash', guardPath()!, token, journal, answer],
      { timeout: WAIT_MS, stdio: 'ignore' },
    )
    expect(run.signal).toBe('SIGKILL')
    await until('the guard answers', () => existsSync(answer) && statSync(answer).size > 0)
    expect(readFileSync(answer, 'utf8')).toBe('swept 1 left 0\n')
    expect({ alive: isAlive(pid), there: existsSync(goes) }).toEqual({ alive: false, there: false })
  })
})

describe('when the supervisor stops', () => {
  it('ends what is tracked, says how many, and leaves the supervisor', async () => {
    const guard = await Guard.start(token)
    const child = spawn('sh', ['-c', 'sleep 1000 & sleep 1000 & wait'], { stdio: 'ignore' })
    remember(child.pid!)
    await until(
      'it has its children',
      () => readdirSync('/proc').filter((name) => stat(Number(name))?.ppid === child.pid).length === 2,
    )
    const ended = new Promise((resolve) => child.once('exit', (_code, signal) => resolve(signal)))
    guard.track(child.pid!, startTicks(child.pid!))
    expect(await guard.end()).toEqual({ swept: 3, left: 0 })
    expect(await ended).toBe('SIGKILL')
    expect(guard.pid).toBeUndefined()
  })

  it('has another guard sweep where the first one is dead', async () => {
    const guard = await Guard.start(token)
    const child = spawn('sleep', ['1000'], { stdio: 'ignore' })
    guard.track(remember(child.pid!), startTicks(child.pid!))
    const first = guard.pid!
    // It cannot begin its sweep.
    process.kill(first, 'SIGSTOP')
    const end = guard.end()
    await new Promise((resolve) => setTimeout(resolve, 50))
    process.kill(first, 'SIGKILL')
    expect(await end).toEqual({ swept: 1, left: 0 })
    await gone(child.pid!)
  })

  it('ends once, whoever asks', async () => {
    const guard = await Guard.start(token)
    expect(guard.end()).toBe(guard.end())
    expect(await guard.end()).toEqual({ swept: 0, left: 0 })
  })

  it('keeps no program alive that has nothing else to do', () => {
    const script = `import { Guard } from ${JSON.stringify(join(root, 'src/guard/guard.ts'))}; await Guard.start('${token}'); console.log('last line')`
    const run = spawnSync(process.execPath, ['--import', 'tsx', '--input-type=module', '-e', script], {
      cwd: root,
      encoding: 'utf8',
      timeout: WAIT_MS,
    })
    expect({ status: run.status, stdout: run.stdout }).toEqual({ status: 0, stdout: 'last line\n' })
  })

  it('costs no processor time while it waits', async () => {
    const guard = await Guard.start(token)
    const ticks = () => spawnSync('awk', ['{print $14 + $15}', `/proc/${guard.pid}/stat`], { encoding: 'utf8' }).stdout
    const before = ticks()
    await new Promise((resolve) => setTimeout(resolve, 300))
    expect(ticks()).toBe(before)
    await guard.end()
  })
})

describe('what it refuses', () => {
  it.each(['relative/path', '/', '//', '/./', '/tmp/../etc', ''])('does not remove %j', async (path) => {
    const guard = await Guard.start(token)
    try {
      expect(() => guard.removeAtEnd(path)).toThrow(/BAD_OPTION/)
    } finally {
      await guard.end()
    }
  })

  it('obeys no line that is cut, foreign, or names a path that is not safe', () => {
    const inside = join(directory, 'inside')
    mkdirSync(inside)
    const lines = [
      '+ 1 0',
      '+ -1 0',
      'q',
      '+',
      'd relative',
      'd /',
      `d ${directory}/x/../inside`,
      `d ${'/x'.repeat(5000)}`,
      '~ 1',
      '!',
    ]
    // The last line has no end: it was cut off by the supervisor's death.
    const run = spawnSync(guardPath()!, [token], {
      input: `${lines.join('\n')}\nd ${inside}`,
      encoding: 'utf8',
      timeout: WAIT_MS,
    })
    expect(run.stdout).toBe('ok\nswept 0 left 0\n')
    expect(existsSync(inside)).toBe(true)
  })

  it('does not start with a token that is no variable name', async () => {
    await expect(Guard.start('a=b')).rejects.toThrow(/BAD_OPTION.*letters, digits and underscores/)
  })
})
