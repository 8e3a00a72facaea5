import { readFileSync } from 'node:fs'
import { setTimeout as delay } from 'node:timers/promises'
import { afterAll, afterEach, describe, expect, it } from 'vitest'
import type { MemoryMode } from '../src/engines/engine.js'
import { AddressSpace } from '../src/image/address-space.js'
import { findIdPlaces, type IdPlace } from '../src/image/edits/identity.js'
import { type Range, wipeRanges } from '../src/image/edits/wipe.js'
import type { ImageSet, Process } from '../src/image/image-set.js'
import { message, optional, required } from '../src/image/message.js'
import { processTree, stat, threadIds } from '../src/linux/proc.js'
import { Laboratory, type Program } from './fixtures/forks.js'
import { attributes, bytesAt, differences, isKernels, type Mapped, smaps } from './fixtures/memory-comparison.js'
import { compileC } from './runtimes/compile.js'
import { RUNTIME_CACHE, RUNTIMES } from './runtimes/index.js'

const lab = new Laboratory()
afterAll(() => lab.close())

/** Stops every process of a tree, and waits until each of its threads has stopped. */
async function stopAll(root: number): Promise<number[]> {
  const pids = processTree(root).map(({ pid }) => pid)
  for (const pid of pids) process.kill(pid, 'SIGSTOP')
  const stopped = (pid: number, thread: number) =>
    /^State:\s+T/m.test(readFileSync(`/proc/${pid}/task/${thread}/status`, 'latin1'))
  while (!pids.every((pid) => threadIds(pid).every((thread) => stopped(pid, thread)))) await delay(5)
  return pids
}

/** Where the kernel notes on which processor a thread ran last (rseq), which may differ by the time one looks. */
const WithRseq = message({
  thread: optional(
    5,
    message({ rseq: optional(15, message({ address: required(1, 'uint64'), size: required(2, 'uint32') })) }),
  ),
})

function rseqAreas(image: ImageSet, { threads }: Process): Range[] {
  return threads.flatMap((id) => {
    const rseq = image.one(`core-${id}.img`, WithRseq).thread?.rseq
    return rseq ? [{ start: rseq.address, end: rseq.address + BigInt(rseq.size) }] : []
  })
}

/**
 * A process whose child is stopped gets SIGCHLD, and where it handles that, the kernel has put the signal's frame on its
 * stack when it is restored: below the stack pointer and the 128 bytes that a function may use there, where nothing is
 * kept.
 */
function signalFrame(template: number, child: number): Range[] {
  const stackPointer = (pid: number) => BigInt(readFileSync(`/proc/${pid}/syscall`, 'latin1').trim().split(' ').at(-2)!)
  const [now, then] = [stackPointer(child), stackPointer(template)]
  const RED_ZONE = 128n
  return now < then ? [{ start: now, end: then - RED_ZONE }] : []
}

const isWithin = (inner: Range, outer: Range) => outer.start <= inner.start && inner.end <= outer.end
const placeRange = ({ address, width }: IdPlace): Range => ({ start: address, end: address + BigInt(width) })

/**
 * All of a child's memory is its template's. What may differ is named here, and each difference is the one that is meant:
 * the places that remember thread ids have the child's own; wiped ranges are zero; processors are
 * noted anew.
 */
function expectSameMemory(image: ImageSet, process: Process, template: number, child: number): void {
  const hasChildren = image.processes().some(({ ppid }) => ppid === process.pid)
  const space = new AddressSpace(image, process.pid)
  const places = findIdPlaces(image, process, space)
  space.close()
  const wiped = wipeRanges(image, process.pid)
  const frames = signalFrame(template, child)
  // Only a process with children gets one.
  if (!hasChildren) expect(frames).toEqual([])
  const meant = [...places.map(placeRange), ...wiped, ...rseqAreas(image, process), ...frames]
  const others = differences(template, child).filter((found) => !meant.some((range) => isWithin(found, range)))
  expect(others.map(({ start, end }) => `${start.toString(16)}-${end.toString(16)}`)).toEqual([])

  const remembered = (pid: number) =>
    places.map((place) => Number(bytesAt(pid, placeRange(place)).readUIntLE(0, 4))).sort((a, b) => a - b)
  const runtimes = new Set(places.map(({ runtime }) => runtime))
  for (const pid of [template, child]) {
    const ids = threadIds(pid).sort((a, b) => a - b)
    // Programs of one runtime, whose threads each remember their id once.
    expect(remembered(pid), [...runtimes].join()).toEqual(ids)
  }
  for (const range of wiped) expect(bytesAt(child, range).every((byte) => byte === 0)).toBe(true)
}

/**
 * How a mapping is mapped, without what differs on purpose: `ac` (counted as memory that may be written, which a mapping is
 * from the first time that it is writable), `sd` (changed since somebody last asked), and `lf` (locked as it is touched:
 * CRIU knows locked memory only).
 */
function describeMapping({ perms, vmFlags }: Mapped): string {
  return `${perms} ${vmFlags.filter((flag) => !['ac', 'sd', 'lf'].includes(flag)).join(' ')}`
}

const isPageFile = ({ path }: Mapped) => path.endsWith('.warmfork-pages')

/** The child maps the template's files at the same places, but for private memory that maps the page file. */
function expectSameFiles(template: number, child: number): void {
  const before = smaps(template)
  for (const mapping of smaps(child)) {
    if (isKernels(mapping) || !mapping.path.startsWith('/')) continue
    for (const was of before.filter(({ start, end }) => start < mapping.end && mapping.start < end)) {
      if (isPageFile(mapping)) expect(was.perms[3], `${mapping.start.toString(16)} is private`).toBe('p')
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
  runtime(/^C on musl$/, 1),
  {
    name: 'one of every mapping',
    processes: 1,
    question: 'check',
    command: async () => [await compileC('mapzoo'), lab.fresh('zoo'), '--droppable'],
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
    const pids = await stopAll(program.pid)
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
        expectSameMemory(image, one, one.pid, copy)
        expect(attributes(copy, describeMapping)).toEqual(attributes(one.pid, describeMapping))
        expectSameFiles(one.pid, copy)
      }
      expect(smaps(child.pid).some(isPageFile)).toBe(memory === 'cow')
      // Both go on, and know what they knew.
      for (const pid of pids) process.kill(pid, 'SIGCONT')
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
