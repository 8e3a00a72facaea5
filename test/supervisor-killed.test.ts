import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { describe, expect, test } from 'vitest'
import { isAlive, stat } from '../src/linux/proc.js'
import { ENGINES, eventually, PROGRAMS, usePlace } from './engines-under-test.js'

describe.each(ENGINES)('a supervisor with the %s engine that is killed', (engine) => {
  const place = usePlace(engine)
  const command = ['sh', '-c', 'sleep 1000 & echo ready; exec cat'] as const

  const supervise = (options: object) => {
    const all = { ...place.current.options({ command }), pool: { size: 3 }, ...options }
    const child = spawn(process.execPath, ['--import', 'tsx', join(PROGRAMS, 'supervise.ts'), JSON.stringify(all)], {
      stdio: ['ignore', 'pipe', 'inherit'],
    })
    return { child, lines: createInterface({ input: child.stdout }) }
  }

  test.each(['boot', 'ready', 'rest', 'checkpoint', 'pool'])(
    'after the phase %s leaves no process',
    async (dieAfter) => {
      // The spawn engine does not wait for rest, as it carries nothing over.
      if (engine === 'spawn' && dieAfter === 'rest') return
      const { child } = supervise({ dieAfter })
      const [, signal] = await once(child, 'exit')
      expect(signal).toBe('SIGKILL')
      await place.current.swept()
    },
  )

  test('with children and a full pool leaves no process', async () => {
    const { child, lines } = supervise({ children: 3 })
    const { children, parked } = JSON.parse((await once(lines, 'line'))[0])
    expect([...children, ...parked].filter((pid: number) => !isAlive(pid))).toEqual([])
    child.kill('SIGKILL')
    await once(child, 'exit')
    await place.current.swept()
  })

  test('leaves the running children where it was told to, and nothing else', async () => {
    const { child, lines } = supervise({ children: 2, orphans: 'leave', stdio: 'pipe' })
    const { children } = JSON.parse((await once(lines, 'line'))[0])
    // They would end with their stdin: what is tried is that nobody kills them.
    for (const pid of children) process.kill(pid, 'SIGSTOP')
    child.kill('SIGKILL')
    await once(child, 'exit')
    const left = () => place.current.processes().map((entry) => Number(entry.split(' ')[0]))
    await eventually(() => left().every((pid) => children.includes(stat(pid)?.sid)), 'only these are left')
    expect(children.filter((pid: number) => !isAlive(pid))).toEqual([])
    // Each has a child of its own.
    expect(left()).toHaveLength(2 * children.length)
    for (const pid of left()) process.kill(pid, 'SIGKILL')
    await place.current.swept()
  })
})
