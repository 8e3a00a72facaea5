/** Programs that do not behave as a template should. */
import { existsSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { descendants, isAlive, stat } from '../src/linux/proc.js'
import { ask, eventually } from './engines-under-test.js'
import { useCleanPlace } from './leftovers.js'

const sh = (script: string) => ['/bin/sh', '-c', script] as const
const wait = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms))

describe('a template that', () => {
  const place = useCleanPlace()

  test('never gets ready ends with all that it has started, and the error says what it waited for', async () => {
    const started = place.current.start({
      command: sh('sleep 1000 & echo almost; setsid sleep 1000'),
      ready: { output: 'ready', timeoutMs: 500 },
    })
    await expect(started).rejects.toMatchObject({
      code: 'TEMPLATE_NOT_READY',
      message: expect.stringMatching(/ready/),
      output: expect.stringContaining('almost'),
    })
  })

  test('ignores SIGTERM is killed when its time is over, and so are its forks', async () => {
    const supervisor = await place.current.start({
      command: sh("trap '' TERM; echo ready; while :; do sleep 0.05; done"),
      template: { stopTimeoutMs: 300 },
    })
    const [template, child] = [supervisor.template!.pid, await supervisor.fork()]
    const before = performance.now()
    await supervisor.stop()
    expect(performance.now() - before).toBeGreaterThan(290)
    expect([template, child.pid].map((pid) => isAlive(pid))).toEqual([false, false])
  })

  test('forks into the background and ends: the error says so', async () => {
    const pidFile = join(place.current.directory, 'pid')
    const started = place.current.start({
      command: sh(`(setsid sh -c 'echo $$ > ${pidFile}; echo started; exec sleep 1000' &); sleep 0.2; exit 0`),
    })
    await expect(started).rejects.toMatchObject({
      code: 'TEMPLATE_EXITED',
      message: expect.stringMatching(/status 0.*background/),
    })
    // What it left in the background carries our mark.
    await eventually(() => existsSync(pidFile), 'it was there')
    expect(isAlive(Number(readFileSync(pidFile, 'utf8')))).toBe(false)
  })

  test('forks into the background once it is ready: the error says so', async () => {
    const started = place.current.start({
      command: sh('(setsid sleep 1000 &); echo ready; sleep 0.05; exit 0'),
      ready: { delayMs: 400 },
    })
    await expect(started).rejects.toMatchObject({ code: 'TEMPLATE_EXITED' })
  })

  test('has closed its stdin and stdout gives children whose streams are at their end', async () => {
    const supervisor = await place.current.start({
      command: sh('exec <&- >&-; echo ready >&2; while :; do sleep 0.05; done'),
      ready: { output: 'ready', stream: 'stderr' },
    })
    const child = await supervisor.fork()
    const lines: string[] = []
    for await (const line of child.lines()) lines.push(line)
    expect(lines).toEqual([])
    child.stdin.write('nobody reads this\n')
    expect(isAlive(child.pid)).toBe(true)
    expect(await child.end({ graceMs: 200 })).toMatchObject({ signal: 'SIGTERM' })
  })

  test('has replaced its stdout by a file gives children that write there', async () => {
    const log = join(place.current.directory, 'log')
    const supervisor = await place.current.start({
      command: sh(`exec >>${log}; echo ready >&2; read line; echo "$line"`),
      ready: { output: 'ready', stream: 'stderr' },
    })
    for (const word of ['one', 'two']) {
      const child = await supervisor.fork()
      child.stdin.write(`${word}\n`)
      await child.exit
    }
    expect(readFileSync(log, 'utf8')).toBe('one\ntwo\n')
  })

  test('has duplicated its stdout gives children that have it twice', async () => {
    const supervisor = await place.current.start({ command: sh('exec 5>&1; echo ready; read line; echo "$line" >&5') })
    const child = await supervisor.fork()
    child.stdin.write('five\n')
    for await (const line of child.lines()) expect(line).toBe('five')
    expect(await child.exit).toEqual({ code: 0, signal: null })
  })

  test('has children in sessions and groups of their own gives forks that have them too', async () => {
    const jobs = 'set -m; sleep 1001 & setsid --wait sleep 1002 & sleep 0.2; echo ready'
    const supervisor = await place.current.start({
      command: ['/bin/bash', '-c', `${jobs}; read line; wait`],
    })
    const child = await supervisor.fork()
    const own = new Map(descendants(child.pid).map((pid) => [pid, stat(pid)!]))
    const described = [...own.values()].map(({ pid, pgid, sid, comm }) => ({
      comm,
      leadsGroup: pgid === pid,
      session: sid === pid ? 'own' : sid === child.pid ? 'of the child' : 'another',
    }))
    expect(described.sort((a, b) => `${a.comm}${a.session}`.localeCompare(`${b.comm}${b.session}`))).toEqual([
      { comm: 'setsid', leadsGroup: true, session: 'of the child' },
      { comm: 'sleep', leadsGroup: true, session: 'of the child' },
      { comm: 'sleep', leadsGroup: true, session: 'own' },
    ])
    await child.end({ graceMs: 200 })
    expect([...own.keys()].filter((pid) => isAlive(pid))).toEqual([])
    expect(descendants(supervisor.template!.pid)).toHaveLength(3)
  })

  test('writes all the time does not write into its forks', async () => {
    const supervisor = await place.current.start({
      command: sh('i=0; while :; do i=$((i+1)); echo "line $$ $i"; [ $i = 300 ] && echo ready; sleep 0.001; done'),
      pool: { size: 1 },
    })
    const child = await supervisor.fork()
    const numbers: number[] = []
    for await (const line of child.lines()) {
      const found = /^line \d+ (\d+)$|^ready$/.exec(line)
      expect(found).not.toBeNull()
      if (found![1]) numbers.push(Number(found![1]))
      if (numbers.length === 50) break
    }
    // It goes on where the checkpoint was, with nothing twice and nothing left out.
    expect(numbers).toEqual(Array.from({ length: 50 }, (_, i) => numbers[0]! + i))
    expect(numbers[0]).toBeGreaterThan(200)
  })

  test('has a zombie gives forks that have one too, and can wait for it', async () => {
    const supervisor = await place.current.start({
      command: ['python3', '-c', ZOMBIE],
    })
    for (let i = 0; i < 2; i++) {
      const child = await supervisor.fork()
      expect(await ask(child, '')).toBe('7')
    }
  })

  test('was given hard arguments has forks with the same command line, byte for byte', async () => {
    const hard = [
      'two words',
      '\'"`$HOME\\',
      'two\nlines',
      '',
      'grüße, 世界 \u{1F600}',
      '-e',
      '*',
      '\t',
      '\u0001',
      'x'.repeat(20_000),
    ]
    const script =
      'import sys; print("ready", flush=True); sys.stdin.readline(); print(repr([a.encode() for a in sys.argv[1:]]), flush=True)'
    const command = ['python3', '-c', script, ...hard] as const
    const supervisor = await place.current.start({ command, pool: { size: 1 } })
    const child = await supervisor.fork()
    const line = readFileSync(`/proc/${child.pid}/cmdline`)
    expect(line.equals(readFileSync(`/proc/${supervisor.template!.pid}/cmdline`))).toBe(true)
    expect(line.includes(Buffer.from(`${hard.join('\0')}\0`))).toBe(true)
    const said = await ask(child, '')
    expect(said).toContain("b'two words'")
    expect(said).toContain(String.raw`b'two\nlines', b''`)
    expect(said).toContain(String.raw`gr\xc3\xbc\xc3\x9fe, \xe4\xb8\x96\xe7\x95\x8c \xf0\x9f\x98\x80`)
  })

  test('ends by itself right after the checkpoint leaves a supervisor that forks', async () => {
    const supervisor = await place.current.start({
      command: sh('echo ready; read line; echo "$line"'),
      pool: { size: 1 },
    })
    process.kill(supervisor.template!.pid, 'SIGKILL')
    await wait(100)
    expect(await ask(await supervisor.fork(), 'still here')).toBe('still here')
  })

  test('stops itself is not waited for without end', async () => {
    const started = place.current.start({
      command: sh('echo almost; kill -STOP $$; echo ready'),
      ready: { output: 'ready', timeoutMs: 500 },
    })
    await expect(started).rejects.toMatchObject({ code: 'TEMPLATE_NOT_READY' })
  })
})

const ZOMBIE = `
import os, sys
pid = os.fork()
if pid == 0: os._exit(7)
import time; time.sleep(0.1)
print("ready", flush=True)
sys.stdin.readline()
kids = open("/proc/self/task/%d/children" % os.getpid()).read().split()
_, status = os.waitpid(int(kids[0]), 0)
print(os.WEXITSTATUS(status), flush=True)
`
