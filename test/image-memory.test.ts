import { closeSync, openSync, writeSync } from 'node:fs'
import { afterAll, afterEach, describe, expect, it } from 'vitest'
import type { MemoryMode } from '../src/engines/engine.js'
import { stat } from '../src/linux/proc.js'
import { Laboratory, type Program } from './fixtures/forks.js'
import {
  attributes,
  bytesAt,
  describeMapping,
  isKernels,
  isPageFile,
  smaps,
  wrongMemory,
} from './fixtures/memory-comparison.js'
import { compileC } from './runtimes/compile.js'
import { RUNTIME_CACHE, RUNTIMES } from './runtimes/index.js'

const lab = new Laboratory()
afterAll(() => lab.close())

/** The child maps the template's files at the same places, but for private memory that maps the page file. */
function expectSameFiles(template: number, child: number): void {
  const before = smaps(template)
  for (const mapping of smaps(child)) {
    if (isKernels(mapping) || !mapping.path.startsWith('/')) continue
    for (const was of before.filter(({ start, end }) => start < mapping.end && mapping.start < end)) {
      if (was.path.includes('/hsperfdata_')) expect(isPageFile(mapping)).toBe(true)
      else if (isPageFile(mapping)) expect(was.perms[3], `${mapping.start.toString(16)} is private`).toBe('p')
      // CRIU makes shared anonymous memory anew as a file in memory.
      else if (was.path.startsWith('/dev/zero')) expect(mapping.path).toBe(`/memfd:${was.path}`)
      else expect([mapping.path, mapping.offset - mapping.start]).toEqual([was.path, was.offset - was.start])
    }
  }
}

interface Subject {
  name: string
  /** Processes of its tree. */
  processes: number
  command(): Promise<readonly string[]>
  /** A question with the answer that every copy gives. */
  question: string
}

const runtime = (name: RegExp, processes = 1): Subject => ({
  name: RUNTIMES.find((one) => name.test(one.name))!.name,
  processes,
  question: 'sum',
  async command() {
    const found = RUNTIMES.find((one) => name.test(one.name))!
    await found.install(RUNTIME_CACHE)
    return found.command(RUNTIME_CACHE)
  },
})

const subjects: Subject[] = [
  runtime(/^Node \d+$/),
  runtime(/^CPython$/),
  runtime(/^JDK 17, G1$/),
  runtime(/^bash/, 2),
  runtime(/^C on musl$/),
  runtime(/^Go/),
  {
    name: 'one of every mapping',
    processes: 1,
    question: 'check',
    command: async () => [await compileC('mapzoo'), lab.fresh('zoo'), '--droppable', '--guard'],
  },
  { name: '64 threads', processes: 1, question: 'check', command: async () => [await compileC('threads64')] },
  {
    name: '64 threads on musl',
    processes: 1,
    question: 'check',
    command: async () => [await compileC('threads64', 'musl-gcc')],
  },
]

describe.each(subjects)('a fork of $name', (subject) => {
  afterEach(async () => {
    await lab.endAll()
  })

  const forked = async (memory: MemoryMode) => {
    const program: Program = lab.start(await subject.command())
    await program.talk.untilReady()
    const pids = await program.stop()
    const { number } = await lab.checkpoint(program, memory)
    return { program, pids, child: await lab.fork(number), image: await lab.image(number) }
  }

  it.each(['cow', 'copy'] as const)(
    'has all memory of its template, mapped alike, %s',
    async (memory) => {
      const { program, pids, child, image } = await forked(memory)
      expect(pids).toHaveLength(subject.processes)
      const processes = image.processes()
      expect(processes.map(({ pid }) => pid).sort()).toEqual([...pids].sort())
      for (const [index, one] of processes.entries()) {
        const copy = child.process.pids[index]!
        expect(stat(copy)?.state).toBe('T')
        expect(wrongMemory(image, one, one.pid, copy)).toEqual([])
        expect(attributes(copy, describeMapping)).toEqual(attributes(one.pid, describeMapping))
        expectSameFiles(one.pid, copy)
      }
      const heap = smaps(child.pid).some((mapping) => isPageFile(mapping) && mapping.end - mapping.start > 16n * 4096n)
      expect(heap).toBe(memory === 'cow')
      // Both go on, and know what they knew.
      program.goOn()
      child.resume()
      const answer = await child.talk.ask(subject.question)
      expect(answer).toMatch(/^(sum [0-9a-f]+|ok.*)$/)
      const own = await program.talk.ask(subject.question)
      // What was wiped or freed may be gone in the child.
      if (subject.question === 'sum') expect(own).toBe(answer)
    },
    300_000,
  )
})

describe('the comparison', () => {
  it.each([
    ['private-rw', 'written memory'],
    ['private-untouched', 'memory that nobody touched'],
    ['sparse-16G-middle', 'the middle of a mapping that is too large to read'],
    ['private-none', 'memory that may not be read'],
  ])('notices one changed byte in %s', async (name) => {
    const program = lab.start([await compileC('mapzoo'), lab.fresh('zoo')])
    const layout = await program.talk.untilReady()
    await program.stop()
    const { number } = await lab.checkpoint(program, 'cow')
    const child = await lab.fork(number)
    const image = await lab.image(number)
    const [one] = image.processes()
    expect(wrongMemory(image, one!, program.pid, child.pid)).toEqual([])
    const address = BigInt(layout.find((line) => line.startsWith(`map ${name} `))!.split(' ')[2]!) + 77n
    const memory = openSync(`/proc/${child.pid}/mem`, 'r+')
    // (Node takes positions as bigint for reads only.)
    writeSync(
      memory,
      Uint8Array.of(bytesAt(child.pid, { start: address, end: address + 1n })[0]! ^ 1),
      0,
      1,
      Number(address),
    )
    closeSync(memory)
    const range = `${address.toString(16)}-${(address + 1n).toString(16)}`
    expect(wrongMemory(image, one!, program.pid, child.pid)).toEqual([`${range} differs`])
    await lab.endAll()
  })
})
