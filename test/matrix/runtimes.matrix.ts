import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { afterAll, describe, expect, it } from 'vitest'
import { type Child, Supervisor, WarmforkError } from '../../src/index.js'
import { Conversation } from '../runtimes/conversation.js'
import { PROJECT, RUNTIME_CACHE, RUNTIMES, type Runtime } from '../runtimes/index.js'
import { markdown, type Row, writeTable } from './table.js'

const FORKS = 3
const rows = new Map<string, Row>()

/** A start without warmfork: its time, and the checksum that every fork must have. */
async function cold(command: readonly [string, ...string[]]): Promise<{ coldMs: number; sum: string }> {
  const started = performance.now()
  const probe = spawn(command[0], command.slice(1), { stdio: ['pipe', 'pipe', 'inherit'] })
  const exited = once(probe, 'exit')
  try {
    const conversation = new Conversation(probe.stdin, createInterface({ input: probe.stdout }))
    expect(await conversation.next(60_000)).toBe('ready')
    const coldMs = performance.now() - started
    return { coldMs, sum: await conversation.ask('sum') }
  } finally {
    probe.kill('SIGKILL')
    await exited
  }
}

const median = (values: readonly number[]) => values.toSorted((a, b) => a - b)[Math.floor(values.length / 2)]!

/** Boots, checkpoints and forks three times; each fork must answer everything as a cold start would. */
async function tryRuntime(runtime: Runtime, row: Row): Promise<void> {
  const command = runtime.command(RUNTIME_CACHE)
  const { coldMs, sum } = await cold(command)
  row.coldMs = coldMs
  const directory = mkdtempSync(join(tmpdir(), 'warmfork-matrix-'))
  try {
    await using supervisor = await Supervisor.start({
      name: 'matrix',
      command,
      engine: 'criu',
      store: join(directory, 'store'),
      runtimeDirectory: join(directory, 'run'),
      ready: { output: /^ready$/m },
      pool: { size: 0 },
    })
    const [generation] = supervisor.generations()
    row.memory = generation!.memory
    row.templateMiB = generation!.rssBytes / 2 ** 20
    if (runtime.memory) expect(generation!.memory).toBe(runtime.memory)

    const forks: { child: Child; conversation: Conversation; forkMs: number; privateMiB: number }[] = []
    for (let i = 0; i < FORKS; i++) {
      const started = performance.now()
      const child = await supervisor.fork()
      const conversation = new Conversation(child.stdin, child.lines())
      const pong = await conversation.ask('ping')
      const forkMs = performance.now() - started
      if (!runtime.remembersPid) expect(pong).toBe(`pong ${child.pid}`)
      forks.push({ child, conversation, forkMs, privateMiB: (await child.stats()).privateBytes / 2 ** 20 })
    }
    row.forkMs = median(forks.map(({ forkMs }) => forkMs))
    row.privateMiB = median(forks.map(({ privateMiB }) => privateMiB))
    // All three are alive meanwhile: what one writes must not be seen by another.
    for (const { conversation } of forks) {
      expect(await conversation.ask('sum')).toBe(sum)
      expect(await conversation.ask('churn 3', 60_000)).toBe('churned 0')
      expect(await conversation.ask('thread')).toBe('thread ok')
    }
    for (const { conversation } of forks) expect(await conversation.ask('sum')).toBe(sum)
    for (const [i, { child, conversation }] of forks.entries()) {
      conversation.say(`exit ${10 + i}`)
      expect(await child.exit).toEqual({ code: 10 + i, signal: null })
    }
    expect(supervisor.template?.running).toBe(true)
  } finally {
    rmSync(directory, { recursive: true, force: true })
  }
}

describe('forks of', () => {
  for (const runtime of RUNTIMES) {
    it(runtime.name, async ({ skip }) => {
      const row: Row = { runtime: runtime.name, version: '', result: 'works', memory: '' }
      rows.set(runtime.name, row)
      const reason = await runtime.available()
      if (reason) {
        row.result = `not tried: ${reason}`
        skip(reason)
      }
      await runtime.install(RUNTIME_CACHE)
      row.version = await runtime.version(RUNTIME_CACHE)
      try {
        await tryRuntime(runtime, row)
      } catch (error) {
        row.result = error instanceof WarmforkError ? `fails: ${error.code}` : 'fails'
        throw error
      }
    })
  }
})

afterAll(() => {
  const tried = RUNTIMES.flatMap(({ name }) => rows.get(name) ?? [])
  console.log(markdown(tried))
  // A run of some of them (`-t`) says nothing of the others.
  if (tried.length === RUNTIMES.length) writeTable(join(PROJECT, 'docs/limits.md'), tried)
})
