/** That memory is shared at all: a mapping that is copied in place of shared costs time and memory, and breaks nothing. */
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { Store } from '../src/generations/store.js'
import { Supervisor } from '../src/supervisor.js'

const MIB = 1024 * 1024

describe('a Node program of 100 MiB, half of it objects', () => {
  let directory: string
  let supervisor: Supervisor

  beforeAll(async () => {
    directory = mkdtempSync(join(tmpdir(), 'warmfork-sharing-'))
    const program = `
      const kept = []
      while (process.memoryUsage.rss() < 100 * 2 ** 20) {
        for (let i = 0; i < 5000; i++) kept.push({ id: kept.length, name: 'record ' + kept.length })
        kept.push(Buffer.alloc(512 * 1024, 1))
      }
      process.stdin.on('data', () => console.log(kept.length))
      console.log('ready')`
    supervisor = await Supervisor.start({
      command: [process.execPath, '-e', program],
      name: 'sharing',
      engine: 'criu',
      store: join(directory, 'store'),
      ready: { output: /ready/ },
      pool: { size: 0 },
    })
  })

  afterAll(async () => {
    await supervisor?.stop()
    rmSync(directory, { recursive: true, force: true })
  })

  it('is shared but for a few hundred KiB, which each fork copies', async () => {
    await using store = await Store.open({ root: join(directory, 'store'), name: 'sharing', access: 'read' })
    const generation = (await store.newest())!
    const { copiedBytes, sharedBytes } = generation.manifest.edits as { copiedBytes: number; sharedBytes: number }
    expect(generation.manifest.memory).toBe('cow')
    expect(copiedBytes).toBeLessThan(1 * MIB)
    expect(sharedBytes).toBeGreaterThan(50 * MIB)
    expect(supervisor.warnings).toEqual([])
  })

  it('leaves a child less than 4 MiB of its own after its first answer', async () => {
    const child = await supervisor.fork()
    child.stdin.write('x\n')
    for await (const line of child.lines()) {
      expect(Number(line)).toBeGreaterThan(1000)
      break
    }
    const { privateBytes } = await child.stats()
    expect(privateBytes).toBeGreaterThan(0)
    expect(privateBytes).toBeLessThan(4 * MIB)
    await child.end()
  })
})
