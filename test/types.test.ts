import type { Readable, Writable } from 'node:stream'
import { expectTypeOf } from 'expect-type'
import { expect, test } from 'vitest'
import type { ForkPayload, WarmforkWorker, WorkerChild } from '../src/agents/node/worker.js'
import * as api from '../src/index.js'
import {
  type Child,
  type ErrorCode,
  type ExitStatus,
  type GenerationInfo,
  Supervisor,
  type SupervisorOptions,
  WarmforkError,
  type Warning,
} from '../src/index.js'

// Checked by the compiler; not executed.
async function types(supervisor: Supervisor, child: Child, worker: WarmforkWorker): Promise<void> {
  expectTypeOf(Supervisor.start).parameter(0).toEqualTypeOf<SupervisorOptions>()
  expectTypeOf(Supervisor.start({ command: ['node'] })).resolves.toEqualTypeOf<Supervisor>()
  expectTypeOf(supervisor.fork()).resolves.toEqualTypeOf<Child>()
  expectTypeOf(supervisor).toExtend<AsyncDisposable>()
  expectTypeOf(child).toExtend<AsyncDisposable>()
  expectTypeOf(child.exit).resolves.toEqualTypeOf<ExitStatus>()
  expectTypeOf<ExitStatus>().toEqualTypeOf<{ code: number | null; signal: NodeJS.Signals | null }>()
  expectTypeOf(child.stdin).toExtend<Writable>()
  expectTypeOf(child.stdout).toExtend<Readable>()
  for await (const line of child.lines()) expectTypeOf(line).toBeString()
  supervisor.on('child', (child) => expectTypeOf(child).toEqualTypeOf<Child>())
  supervisor.on('childExit', (_, status) => expectTypeOf(status).toEqualTypeOf<ExitStatus>())
  supervisor.on('warning', (warning) => expectTypeOf(warning).toEqualTypeOf<Warning>())
  supervisor.on('generation', (generation) => expectTypeOf(generation).toEqualTypeOf<GenerationInfo>())
  child.on('exit', (status) => expectTypeOf(status).toEqualTypeOf<ExitStatus>())
  expectTypeOf(new WarmforkError('STOPPED', { tried: '', happened: '' }).code).toEqualTypeOf<ErrorCode>()

  supervisor.fork({ args: ['a', Buffer.of(1)], env: { A: 'x', B: undefined }, cwd: '/', data: { any: 'thing' } })
  expectTypeOf(child.ready).resolves.toEqualTypeOf<void>()
  child.on('message', (data) => expectTypeOf(data).toBeUnknown())
  expectTypeOf(worker.fork({ data: 1 }, (payload) => payload.data)).resolves.toEqualTypeOf<WorkerChild>()
  expectTypeOf(worker.checkpoint()).resolves.toExtend<AsyncDisposable>()
  expectTypeOf(worker.payload).toEqualTypeOf<ForkPayload | undefined>()
  worker.onFork(({ pid, generation }) => [pid, generation] satisfies number[])

  // @ts-expect-error a payload is given by its key
  await worker.fork('data')
  // @ts-expect-error a command has a program
  await Supervisor.start({ command: [] })
  // @ts-expect-error there is no such option
  await Supervisor.start({ command: ['node'], comand: ['node'] })
  // @ts-expect-error a readiness is of one kind
  await Supervisor.start({ command: ['node'], ready: { prot: 80 } })
  // @ts-expect-error there is no such event
  supervisor.on('childs', () => {})
  // @ts-expect-error there is no such signal
  child.kill('SIGNOTHING')
}

test('the public API has these values, and no more', () => {
  expect(types).toBeTypeOf('function')
  expect(Object.keys(api).sort()).toEqual([
    'Child',
    'ERROR_CODES',
    'Supervisor',
    'WarmforkError',
    'exportGeneration',
    'importGeneration',
  ])
})
