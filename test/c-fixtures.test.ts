import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { closeSync, mkdtempSync, openSync, rmSync, writeSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { afterEach, beforeEach, describe, expect, it } from 'vitest'
import { threadIds } from '../src/linux/proc.js'
import { compileC } from './runtimes/compile.js'

let directory: string
let program: ChildProcess | undefined

beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'warmfork-c-'))
})

afterEach(async () => {
  if (program && program.exitCode === null && program.signalCode === null) {
    program.kill('SIGKILL')
    await once(program, 'exit')
  }
  rmSync(directory, { recursive: true, force: true })
})

/** Starts a program and reads up to its `ready`. */
async function start(path: string, ...args: string[]) {
  program = spawn(path, args, { stdio: ['pipe', 'pipe', 'inherit'] })
  const lines = createInterface({ input: program.stdout! })[Symbol.asyncIterator]()
  const layout: string[] = []
  for (;;) {
    const { value, done } = await lines.next()
    if (done) throw new Error(`${path} ended before it was ready`)
    if (value === 'ready') break
    layout.push(value)
  }
  const ask = async (line: string) => {
    program!.stdin!.write(`${line}\n`)
    return (await lines.next()).value as string
  }
  return { pid: program.pid!, layout, ask }
}

/** Changes one byte of another process's memory, whatever its protection. */
function spoil(pid: number, address: number) {
  const memory = openSync(`/proc/${pid}/mem`, 'r+')
  try {
    writeSync(memory, Uint8Array.of(0x77), 0, 1, address)
  } finally {
    closeSync(memory)
  }
}

describe('randmap', () => {
  it('finds nothing wrong with 50 seeds', async () => {
    const path = await compileC('randmap')
    for (let seed = 1; seed <= 50; seed++) {
      const { ask } = await start(path, String(seed))
      expect(await ask('next'), `seed ${seed}`).toMatch(/^ok wiped=0 /)
      expect(await ask('check'), `seed ${seed}`).toMatch(/^ok wiped=0 /)
      program!.stdin!.end()
      await once(program!, 'exit')
    }
  })

  it('makes the same layout from the same seed', async () => {
    const path = await compileC('randmap')
    const first = await start(path, '12')
    program!.kill('SIGKILL')
    await once(program!, 'exit')
    expect((await start(path, '12')).layout).toEqual(first.layout)
  })

  it.each([['written'], ['untouched']])('notices one changed byte in %s memory', async (kind) => {
    const { pid, layout, ask } = await start(await compileC('randmap'), '1')
    const line = layout.find((text) => / private /.test(text) && text.includes(' written') === (kind === 'written'))!
    spoil(pid, Number(line.split(' ')[1]) + 1001)
    expect(await ask('check')).toMatch(/^bad page \d+ \(private/)
  })
})

describe('mapzoo', () => {
  it('keeps every mapping as it was made and as it was written', async () => {
    const { ask } = await start(await compileC('mapzoo'), directory, '--sysv')
    expect(await ask('check')).toBe('ok wipe=kept freed=kept')
    expect(await ask('write')).toBe('written')
    expect(await ask('check')).toBe('ok wipe=kept freed=kept')
  })

  it.each([['private-none'], ['moved'], ['shared-anonymous'], ['file-private-dirty'], ['mlocked'], ['dontneed']])(
    'notices one changed byte in %s',
    async (name) => {
      const { pid, layout, ask } = await start(await compileC('mapzoo'), directory)
      const line = layout.find((text) => text.startsWith(`map ${name} `))!
      spoil(pid, Number(line.split(' ')[2]) + 4097)
      expect(await ask('check')).toBe(`bad ${name} page 1 is something else`)
    },
  )
})

describe('threads64', () => {
  it.each([['gcc'], ['musl-gcc']] as const)(
    'finds all threads right, built with %s',
    async (compiler) => {
      const { pid, ask } = await start(await compileC('threads64', compiler))
      expect(threadIds(pid)).toHaveLength(65)
      for (let round = 0; round < 3; round++) expect(await ask('check')).toBe('ok')
    },
    300_000,
  )
})

describe('jemalloc-check', () => {
  it('gets only zeros from calloc', async () => {
    const { ask } = await start(await compileC('jemalloc-check'), '64')
    for (let round = 0; round < 2; round++) expect(await ask('check')).toBe('bad 0')
  }, 300_000)
})
