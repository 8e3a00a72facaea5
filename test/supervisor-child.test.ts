import { readdirSync } from 'node:fs'
import { text } from 'node:stream/consumers'
import { describe, expect, test } from 'vitest'
import type { Child } from '../src/child.js'
import { isAlive } from '../src/linux/proc.js'
import { ask, ENGINES, usePlace } from './engines-under-test.js'

describe.each(ENGINES)('a child with the %s engine', (engine) => {
  const place = usePlace(engine)

  test('ends with the code or the signal that ended it', async () => {
    const supervisor = await place.current.start()
    const [one, other] = [await supervisor.fork(), await supervisor.fork()]
    one.stdin.write('exit 7\n')
    expect(await one.exit).toEqual({ code: 7, signal: null })
    expect(one.state).toBe('ended')
    expect(one.exitStatus).toEqual({ code: 7, signal: null })
    expect(other.kill('SIGHUP')).toBe(true)
    expect(await other.exit).toEqual({ code: null, signal: 'SIGHUP' })
    expect(other.kill()).toBe(false)
  })

  test('tells of its exit by an event, and so does the supervisor', async () => {
    const supervisor = await place.current.start()
    const heard: unknown[] = []
    supervisor.on('child', (child) => heard.push(child.pid))
    supervisor.on('childExit', (child, status) => heard.push([child.pid, status]))
    const child = await supervisor.fork()
    child.on('exit', (status) => heard.push(status))
    child.stdin.end()
    await child.exit
    await new Promise(setImmediate)
    const status = { code: 0, signal: null }
    expect(heard).toEqual([child.pid, status, [child.pid, status]])
  })

  test('has stdout and stderr apart', async () => {
    const supervisor = await place.current.start()
    const child = await supervisor.fork()
    child.stdin.end('say one\ncomplain two\n')
    expect(await Promise.all([text(child.stdout), text(child.stderr)])).toEqual(['one\n', 'two\n'])
  })

  test('opens /dev/stdout, which is a pipe', async () => {
    const supervisor = await place.current.start({
      command: ['sh', '-c', 'echo ready; read line; echo hello > /dev/stdout'],
    })
    const child = await supervisor.fork()
    child.stdin.write('\n')
    expect(await text(child.stdout)).toBe('hello\n')
  })

  test('leaves what it wrote to be read after its end', async () => {
    const supervisor = await place.current.start()
    const child = await supervisor.fork()
    child.stdin.end('say one\nsay two\n')
    await child.exit
    const lines: string[] = []
    for await (const line of child.lines()) lines.push(line)
    expect(lines).toEqual(['one', 'two'])
    expect(await text(child.stderr)).toBe('')
  })

  test('gives the rest of its lines to a second loop', async () => {
    const supervisor = await place.current.start()
    const child = await supervisor.fork()
    child.stdin.end('say one\nsay two\nsay three\n')
    for await (const line of child.lines()) {
      expect(line).toBe('one')
      break
    }
    const rest: string[] = []
    for await (const line of child.lines()) rest.push(line)
    expect(rest).toEqual(['two', 'three'])
  })

  test('gives a line of 10 MB as one', async () => {
    const supervisor = await place.current.start()
    const child = await supervisor.fork()
    child.stdin.end('write 10000000\n')
    const lengths: number[] = []
    for await (const line of child.lines()) lengths.push(line.length)
    expect(lengths).toEqual([10_000_000])
  })

  test('waits with its output until somebody reads it', async () => {
    const supervisor = await place.current.start()
    const child = await supervisor.fork()
    child.stdin.end('write 1000000\nsay done\n')
    await new Promise((resolve) => setTimeout(resolve, 500))
    expect(child.state).toBe('running')
    expect((await text(child.stdout)).length).toBe(1_000_005)
    expect(await child.exit).toEqual({ code: 0, signal: null })
  })

  test.each(['nobody reads', 'somebody reads the first line'])(
    'costs no descriptor after its end where %s',
    async (how) => {
      const supervisor = await place.current.start({ command: ['sh', '-c', 'echo ready; exec cat'], pool: { size: 1 } })
      const open = async () => {
        await new Promise((resolve) => setTimeout(resolve, 300))
        return readdirSync('/proc/self/fd').length
      }
      const children: Child[] = []
      const run = async () => {
        const child = await supervisor.fork()
        children.push(child)
        if (how === 'nobody reads') child.stdin.end('one\ntwo\nthree\n')
        else {
          await ask(child, 'one\ntwo\nthree')
          child.stdin.end()
        }
        await child.exit
      }
      await run()
      const before = await open()
      for (let i = 0; i < 20; i++) await run()
      // What is started ahead of the next fork comes and goes.
      expect((await open()) - before).toBeLessThan(15)
      const rest: string[] = []
      for await (const line of children.at(-1)!.lines()) rest.push(line)
      expect(rest).toEqual(how === 'nobody reads' ? ['one', 'two', 'three'] : ['two', 'three'])
    },
  )

  test('does not throw when it is written to after its end', async () => {
    const supervisor = await place.current.start()
    const child = await supervisor.fork()
    const { stdin } = child
    child.kill('SIGKILL')
    await child.exit
    expect(await new Promise((resolve) => stdin.write('say one\n', resolve))).toBeInstanceOf(Error)
  })

  test('tells what memory and CPU it uses', async () => {
    const supervisor = await place.current.start()
    const child = await supervisor.fork()
    await ask(child, 'say here')
    const stats = await child.stats()
    expect(stats).toMatchObject({ pid: child.pid, generation: 1, state: 'running' })
    expect(stats.privateBytes).toBeGreaterThan(0)
    expect(stats.rssBytes).toBe(stats.privateBytes + stats.sharedBytes)
    expect(stats.pssBytes).toBeLessThanOrEqual(stats.rssBytes)
    expect(stats.cpuPercent).toBeGreaterThanOrEqual(0)
    expect(stats.elapsedMs).toBeGreaterThan(0)
    child.kill('SIGKILL')
    await child.exit
    await expect(child.stats()).rejects.toMatchObject({ code: 'CHILD_GONE' })
  })

  test('ends by SIGTERM, and by SIGKILL where it does not', async () => {
    const script = "trap 'exit 3' TERM; echo ready; while :; do sleep 0.02; done"
    const good = await place.current.start({ name: 'good', command: ['sh', '-c', script] })
    expect(await (await good.fork()).end()).toEqual({ code: 3, signal: null })
    const deaf = await place.current.start({ name: 'deaf', command: ['sh', '-c', script.replace('exit 3', '')] })
    expect(await (await deaf.fork()).end({ graceMs: 200 })).toEqual({ code: null, signal: 'SIGKILL' })
  })

  test('is ended with what it has started when its scope is left', async () => {
    const supervisor = await place.current.start()
    let pids: number[] = []
    {
      await using child = await supervisor.fork()
      pids = [child.pid, Number(await ask(child, 'start'))]
      expect(pids.map((pid) => isAlive(pid))).toEqual([true, true])
    }
    expect(pids.map((pid) => isAlive(pid))).toEqual([false, false])
  })

  test('that is stopped by a signal ends all the same', async () => {
    const supervisor = await place.current.start()
    const child = await supervisor.fork()
    child.kill('SIGSTOP')
    expect(await child.end()).toEqual({ code: null, signal: 'SIGTERM' })
  })
})
