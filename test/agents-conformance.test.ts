/** Every agent against one script. Each runtime has a spec in test/fixtures/agents-conformance. */
import { existsSync, readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest'
import type { FromAgent } from '../src/agents/protocol.js'
import { type AgentSide, Conformer, type RuntimeSpec } from './agents-conformance.js'

const SPECS = fileURLToPath(new URL('fixtures/agents-conformance/', import.meta.url))
const version = JSON.parse(readFileSync(new URL('../package.json', import.meta.url), 'utf8')).version

const specs = (
  await Promise.all(
    readdirSync(SPECS)
      .filter((name) => name.endsWith('.ts'))
      .map(async (name) => (await import(join(SPECS, name))).default as RuntimeSpec[]),
  )
).flat()

const base64 = (value: string | Buffer) => Buffer.from(value).toString('base64')
/** No UTF-8. */
const BYTES = Buffer.from([0xff, 0xfe, 0x20, 0x27, 0x0a, 0x22, 0x80])
const TEXT = ' "quoted" \\ \'single\'\n$HOME  Grüße 🍴 '

for (const spec of specs) {
  const missing = spec.missing()
  describe.skipIf(missing)(`the agent of ${spec.name}${missing ? ` (${missing})` : ''}`, () => {
    describe('in a program that is not forked', () => {
      let program: Conformer
      let agent: AgentSide
      let id = 0

      beforeAll(async () => {
        program = await Conformer.start(spec)
        agent = await program.connection()
      })
      afterAll(() => program.end())

      /** A whole checkpoint, with what the program prints in it. */
      async function park(): Promise<void> {
        agent.checkpoint(++id)
        await program.expect('beforeB')
        await program.expect('beforeA')
        expect(await agent.expect('parked')).toMatchObject({ id })
      }
      async function resume(): Promise<void> {
        agent.send({ type: 'resumed', id })
        await program.expect('afterA')
        await program.expect('afterB')
        expect(await agent.expect('running')).toEqual({ type: 'running' })
      }

      it('says who it is', async () => {
        expect(agent.hello).toMatchObject({
          protocol: 1,
          agent: `${spec.runtime}/${version}`,
          runtime: spec.runtime,
          pid: program.pid,
        })
        expect(agent.hello.version).toMatch(/^\d+\.\d+/)
        expect(existsSync(`/proc/${program.pid}/fd/${agent.hello.fd}`)).toBe(true)
        agent.send({ type: 'welcome', protocol: 1 })
        await program.expect('started')
      })

      it('has a descriptor that what the program starts does not inherit', () => {
        const info = readFileSync(`/proc/${program.pid}/fdinfo/${agent.hello.fd}`, 'latin1')
        expect(Number.parseInt(/^flags:\s+(\d+)/m.exec(info)![1]!, 8) & 0o2000000).toBe(0o2000000)
      })

      it('ignores types and members that it does not know', async () => {
        agent.send({ type: 'unheardOf', whatever: [{ deep: null }] })
        agent.socket.write('{"type":"error","message":"of no matter","more":1}\n')
        expect(await agent.silence()).toEqual([])
        await program.ask('ping', 'pong')
      })

      it('says that the program is ready', async () => {
        program.say('ready')
        await agent.expect('ready')
      })

      it('runs the hooks of a checkpoint, those before it in reverse order, and nothing of the program in between', async () => {
        await park()
        program.say('ping')
        expect(await program.silence()).toEqual([])
        expect(await agent.silence(0)).toEqual([])
        agent.send({ type: 'resumed', id })
        await program.expect('afterA')
        await program.expect('afterB')
        await program.expect('pong')
        expect(await agent.expect('running')).toEqual({ type: 'running' })
      })

      it('goes on as the source where there was no checkpoint', async () => {
        await park()
        agent.send({ type: 'resumed', id, error: { code: 'CHECKPOINT_FAILED', message: 'the disk is full' } })
        await program.expect('afterA')
        await program.expect('afterB')
        expect((await agent.expect('running')).type).toBe('running')
        await program.ask('ping', 'pong')
      })

      it('reads lines that come in pieces, and several at once', async () => {
        const line = `${JSON.stringify({ type: 'checkpoint', id: ++id, reason: 'template', timeoutMs: 10_000 })}\n`
        for (const part of [line.slice(0, 10), line.slice(10, 11), line.slice(11)]) {
          agent.socket.write(part)
          await new Promise((resolve) => setTimeout(resolve, 30))
        }
        await program.expect('beforeB')
        await program.expect('beforeA')
        await agent.expect('parked')
        const message = { type: 'message', data: { json: 'behind it' } }
        agent.socket.write(`{"type":"resu`)
        await new Promise((resolve) => setTimeout(resolve, 30))
        agent.socket.write(`med","id":${id}}\n${JSON.stringify(message)}\n`)
        await program.expect('afterA')
        await program.expect('afterB')
        expect(await program.expect('message')).toMatchObject({ data: 'behind it' })
        await agent.expect('running')
      })

      it('refuses where a hook throws, undoes what ran, and lets the program go on', async () => {
        program.say('arm beforeA throw')
        await program.ask('ping', 'pong')
        agent.checkpoint(++id)
        await program.expect('beforeB')
        await program.expect('beforeA')
        const refused = await agent.expect('refused')
        expect(refused).toMatchObject({ id, error: { hook: 'beforeA', message: 'not now' } })
        expect(refused.error.stack).toContain('not now')
        expect(await program.silence()).toContain('afterB')
        await program.ask('ping', 'pong')
        // The next one is another.
        await park()
        await resume()
      })

      it('refuses where a hook does not return in time, and lets the program go on', async () => {
        program.say('arm beforeA hang')
        await program.ask('ping', 'pong')
        agent.checkpoint(++id, 300)
        await program.expect('beforeB')
        await program.expect('beforeA')
        expect(await agent.expect('refused')).toMatchObject({ id, error: { hook: 'beforeA' } })
        expect(await program.silence()).toContain('afterB')
        await program.ask('ping', 'pong')
        await park()
        await resume()
      })

      it('tells of a hook after the checkpoint that throws, and lets the program go on', async () => {
        program.say('arm afterA throw')
        await program.ask('ping', 'pong')
        await park()
        agent.send({ type: 'resumed', id })
        await program.expect('afterA')
        await program.expect('afterB')
        expect(await agent.expect('running')).toMatchObject({ error: { hook: 'afterA', message: 'not now' } })
        await program.ask('ping', 'pong')
      })

      it('asks for a fork, and hears of it and of its end', async () => {
        program.say(`fork ${JSON.stringify({ text: TEXT, list: [1, null, true] })}`)
        const request = await agent.expect('fork')
        expect(request).toMatchObject({ data: { json: { text: TEXT, list: [1, null, true] } } })
        expect(request).not.toHaveProperty('generation')
        await park()
        await resume()
        agent.send({ type: 'forkResult', id: request.id, pid: 4711, generation: 5 })
        expect(await program.expect('forked')).toMatchObject({ pid: 4711 })
        agent.send({ type: 'childExit', pid: 4711, code: null, signal: 'SIGKILL' })
        expect(await program.expect('childExit')).toMatchObject({ pid: 4711, code: null, signal: 'SIGKILL' })
      })

      it('asks for forks at once, each of which has its own answer', async () => {
        program.say('fork 1')
        program.say('fork 2')
        const requests = [await agent.expect('fork'), await agent.expect('fork')]
        expect(new Set(requests.map((request) => request.id)).size).toBe(2)
        await park()
        await resume()
        for (const request of requests) {
          const { json } = request.data as { json: number }
          agent.send({ type: 'forkResult', id: request.id, pid: 5000 + json, generation: 5 })
        }
        const pids = [(await program.expect('forked')).pid, (await program.expect('forked')).pid]
        expect(pids.sort()).toEqual([5001, 5002])
      })

      it('gives the error of a fork that was refused to who asked for it', async () => {
        program.say('fork null')
        const { id: call } = await agent.expect('fork')
        agent.send({ type: 'forkResult', id: call, error: { code: 'PIDS_EXHAUSTED', message: 'no more' } })
        expect(await program.expect('failed')).toMatchObject({ code: 'PIDS_EXHAUSTED' })
      })

      it('keeps a checkpoint, forks from it, and gives it back', async () => {
        program.say('keep')
        const keep = await agent.expect('keep')
        await park()
        await resume()
        agent.send({ type: 'keepResult', id: keep.id, generation: 8 })
        expect(await program.expect('kept')).toMatchObject({ generation: 8 })
        program.say('keepFork 5')
        const fork = await agent.expect('fork')
        expect(fork).toMatchObject({ generation: 8, data: { json: 5 } })
        expect(fork.id).not.toBe(keep.id)
        agent.send({ type: 'forkResult', id: fork.id, pid: 6001, generation: 8 })
        expect(await program.expect('forked')).toMatchObject({ pid: 6001 })
        program.say('drop')
        expect(await agent.expect('drop')).toEqual({ type: 'drop', generation: 8 })
      })

      it('carries messages both ways', async () => {
        program.say(`send ${JSON.stringify({ text: TEXT })}`)
        expect(await agent.expect('message')).toEqual({ type: 'message', data: { json: { text: TEXT } } })
        agent.send({ type: 'message', data: { json: { text: TEXT } } })
        expect(await program.expect('message')).toMatchObject({ data: { text: TEXT } })
        agent.send({ type: 'message', data: { base64: base64(BYTES) }, from: 4711 })
        expect(await program.expect('message')).toMatchObject({ data: { base64: base64(BYTES) }, from: 4711 })
        const large = 'x'.repeat(2 << 20)
        agent.send({ type: 'message', data: { json: large }, from: 'parent' })
        expect(await program.expect('message')).toEqual({ event: 'message', data: large, from: 'parent' })
      })
    })

    describe('in a fork', () => {
      let program: Conformer
      let agent: AgentSide
      let calls: number[]

      beforeAll(async () => {
        program = await Conformer.start(spec)
        agent = await program.greet()
        program.say('fork "answered"')
        program.say('fork "of the source"')
        calls = [(await agent.expect('fork')).id, (await agent.expect('fork')).id]
        agent.checkpoint(1)
        await program.expect('beforeB')
        await program.expect('beforeA')
        await agent.expect('parked')
      })
      afterAll(() => program.end())

      it('runs the hooks on fork in order before anything else of the program, and then the call that asked', async () => {
        program.say('ping')
        agent.send(
          program.forked({
            args: ['', 'two words', TEXT, { base64: base64(BYTES) }],
            env: {
              set: { CONFORMANCE_TEXT: TEXT, CONFORMANCE_BYTES: { base64: base64(BYTES) }, CONFORMANCE_EMPTY: '' },
              unset: ['CONFORMANCE_UNSET', 'CONFORMANCE_NEVER_THERE'],
            },
            cwd: '/usr',
            data: { json: { text: TEXT, nested: [1.5, null, { '': [] }] } },
            call: calls[0]!,
          }),
        )
        await program.expect('forkA')
        await program.expect('forkB')
        expect(await agent.expect('running')).toEqual({ type: 'running' })
        expect((await program.silence()).sort()).toEqual(['isFork', 'pong'])
      })

      it('shows the program its arguments, environment, directory and payload byte for byte', async () => {
        const names = 'CONFORMANCE_TEXT CONFORMANCE_BYTES CONFORMANCE_EMPTY CONFORMANCE_UNSET CONFORMANCE_NEVER_THERE'
        expect(await program.ask(`look ${names}`, 'look')).toEqual({
          event: 'look',
          args: ['', 'two words', TEXT, BYTES].map(base64),
          env: { CONFORMANCE_TEXT: base64(TEXT), CONFORMANCE_BYTES: base64(BYTES), CONFORMANCE_EMPTY: '' },
          cwd: base64('/usr'),
          isFork: true,
          generation: 3,
          pid: program.pid,
          data: { text: TEXT, nested: [1.5, null, { '': [] }] },
        })
      })

      it('can be checkpointed and forked again, with other input', async () => {
        agent.checkpoint(1)
        await program.expect('beforeB')
        await program.expect('beforeA')
        await agent.expect('parked')
        const cwd = Buffer.from(program.directory)
        agent.send(
          program.forked({
            generation: 4,
            args: [],
            env: { set: { CONFORMANCE_UNSET: 'again' }, unset: ['CONFORMANCE_TEXT'] },
            cwd: { base64: base64(cwd) },
            data: { base64: base64(BYTES) },
          }),
        )
        await program.expect('forkA')
        await program.expect('forkB')
        await agent.expect('running')
        expect(await program.ask('look CONFORMANCE_UNSET CONFORMANCE_TEXT', 'look')).toMatchObject({
          args: [],
          env: { CONFORMANCE_UNSET: base64('again') },
          cwd: base64(cwd),
          generation: 4,
          data: { base64: base64(BYTES) },
        })
      })

      it('leaves alone what it is not told', async () => {
        agent.checkpoint(1)
        await program.expect('beforeB')
        await program.expect('beforeA')
        await agent.expect('parked')
        agent.send(program.forked({ generation: 5, worker: false }))
        await program.expect('forkA')
        await program.expect('forkB')
        await agent.expect('running')
        const seen = await program.ask('look CONFORMANCE_UNSET', 'look')
        expect(seen).toMatchObject({ env: { CONFORMANCE_UNSET: base64('again') }, generation: 5 })
        expect(seen.data ?? null).toBe(null)
      })

      it('takes a payload of 1 MiB', async () => {
        agent.checkpoint(1)
        await program.expect('beforeB')
        await program.expect('beforeA')
        await agent.expect('parked')
        const large = Buffer.alloc(1 << 20, BYTES)
        agent.send(program.forked({ data: { base64: base64(large) } }))
        await program.expect('forkA')
        await program.expect('forkB')
        await agent.expect('running')
        expect(await program.ask('look', 'look')).toMatchObject({ data: { base64: base64(large) } })
      })

      it('goes on asking for forks', async () => {
        program.say('fork "again"')
        const { id } = await agent.expect('fork')
        expect(calls).not.toContain(id)
        agent.send({ type: 'forkResult', id, pid: 7001, generation: 5 })
        expect(await program.expect('forked')).toMatchObject({ pid: 7001 })
      })

      it('ends with status 70 where a hook throws', async () => {
        program.say('arm forkA throw')
        await program.ask('ping', 'pong')
        agent.checkpoint(1)
        await program.expect('beforeB')
        await program.expect('beforeA')
        await agent.expect('parked')
        agent.send(program.forked())
        await program.expect('forkA')
        expect(await agent.expect('failed')).toMatchObject({ error: { hook: 'forkA', message: 'not now' } })
        expect(await program.exit()).toEqual({ code: 70, signal: null })
      })
    })

    describe('that serves', () => {
      let program: Conformer
      let agent: AgentSide
      let port: number
      let id = 0

      beforeAll(async () => {
        program = await Conformer.start(spec)
        agent = await program.greet()
        port = (await program.ask('serve', 'serving')).port as number
        // What an agent loads before its first checkpoint is there then: JRuby's takes a second for it.
        program.say('ready')
        await agent.expect('ready')
      })
      afterAll(() => program.end())

      const ask = async (path: string) => (await fetch(`http://127.0.0.1:${port}${path}`)).text()
      /** The next message that tells of no requests. */
      const hear = async <T extends FromAgent['type']>(type: T): Promise<Extract<FromAgent, { type: T }>> => {
        for (;;) {
          const message = await agent.next()
          if (message?.type === 'requests') continue
          if (message?.type !== type) throw new Error(`expected \`${type}\`, got ${JSON.stringify(message)}`)
          return message as Extract<FromAgent, { type: T }>
        }
      }
      const hooksBefore = async () => {
        await program.expect('beforeB')
        await program.expect('beforeA')
      }

      it('says that it counts, counts what is answered, and is silent where nothing changes', async () => {
        expect(agent.hello.counts).toBe(true)
        for (let i = 0; i < 5; i++) {
          expect(await ask('/now')).toBe('answered')
          expect(await program.expect('request')).toMatchObject({ path: '/now' })
        }
        const counts = await agent.silence(400)
        expect(counts.map(({ type }) => type)).toEqual(counts.map(() => 'requests'))
        expect(counts.at(-1)).toMatchObject({ total: 5, ms: expect.any(Number) })
        expect(await agent.silence()).toEqual([])
      })

      it('waits for what is in hand before the hooks of a refork, and holds back what comes until they are done', async () => {
        const slow = ask('/wait')
        await program.expect('request')
        agent.checkpoint(++id, 20_000, 'refork')
        expect(await program.silence()).toEqual([])
        const held = ask('/held')
        expect(await program.silence()).toEqual([])
        program.say('answer')
        expect(await slow).toBe('answered')
        await hooksBefore()
        expect(await hear('parked')).toMatchObject({ id, held: 1 })
        agent.send({ type: 'resumed', id })
        await program.expect('afterA')
        await program.expect('afterB')
        expect(await program.expect('request')).toMatchObject({ path: '/held' })
        expect(await held).toBe('answered')
        await hear('running')
      })

      it('refuses a refork whose requests do not end, without hooks, and serves others meanwhile', async () => {
        const slow = ask('/wait')
        await program.expect('request')
        agent.checkpoint(++id, 2_000, 'refork')
        expect(await ask('/now')).toBe('answered')
        await program.expect('request')
        const { error } = await hear('refused')
        expect(error).toMatchObject({ code: 'BUSY', message: expect.stringContaining('GET /wait') })
        expect(error).not.toHaveProperty('hook')
        program.say('answer')
        expect(await slow).toBe('answered')
        expect(await program.silence()).toEqual([])
      })

      it('waits for nothing where forks come from it otherwise', async () => {
        const slow = ask('/wait')
        await program.expect('request')
        agent.checkpoint(++id, 10_000, 'fork')
        await hooksBefore()
        expect(await hear('parked')).not.toHaveProperty('held')
        agent.send({ type: 'resumed', id })
        await program.expect('afterA')
        await program.expect('afterB')
        await hear('running')
        program.say('answer')
        expect(await slow).toBe('answered')
      })

      it('is never given, in a fork, what the source holds back, and counts from 0', async () => {
        await agent.silence(300)
        const slow = ask('/wait')
        await program.expect('request')
        agent.checkpoint(++id, 20_000, 'refork')
        expect(await program.silence()).toEqual([])
        const held = ask('/held').catch(() => 'closed')
        expect(await program.silence()).toEqual([])
        program.say('answer')
        await slow
        await hooksBefore()
        expect(await hear('parked')).toMatchObject({ held: 1 })
        // The source's count of the last one may wait, and is not the fork's.
        agent.send(program.forked({ id }))
        await program.expect('forkA')
        await program.expect('forkB')
        await hear('running')
        expect(await held).not.toBe('answered')
        expect(await program.silence()).toEqual([])
        expect(await ask('/own')).toBe('answered')
        expect(await program.expect('request')).toMatchObject({ path: '/own' })
        expect((await agent.silence(400)).at(-1)).toMatchObject({ type: 'requests', total: 1 })
      })

      it('refuses every refork once it is no longer fork-safe, before hooks, and other checkpoints not', async () => {
        program.say('unsafe it holds a lease')
        expect(await hear('unsafe')).toEqual({ type: 'unsafe', reason: 'it holds a lease' })
        for (let i = 0; i < 2; i++) {
          agent.checkpoint(++id, 10_000, 'refork')
          const { error } = await hear('refused')
          expect(error).toMatchObject({ code: 'UNSAFE', message: expect.stringContaining('it holds a lease') })
        }
        expect(await program.silence(0)).toEqual([])
        agent.checkpoint(++id, 10_000, 'fork')
        await hooksBefore()
        await hear('parked')
        agent.send({ type: 'resumed', id })
        await program.expect('afterA')
        await program.expect('afterB')
        await hear('running')
      })
    })

    describe('left alone', () => {
      let program: Conformer
      afterEach(() => program.end())

      it('ends with status 70 where a hook on fork does not return in time', async () => {
        program = await Conformer.start(spec)
        const agent = await program.greet()
        program.say('arm forkA hang')
        await program.ask('ping', 'pong')
        agent.checkpoint(1)
        await program.expect('beforeB')
        await program.expect('beforeA')
        await agent.expect('parked')
        agent.send(program.forked({ timeoutMs: 300 }))
        await program.expect('forkA')
        expect(await agent.expect('failed')).toMatchObject({ error: { hook: 'forkA' } })
        expect(await program.exit()).toEqual({ code: 70, signal: null })
      })

      it('answers the call for a checkpoint that stays, in a fork of it', async () => {
        program = await Conformer.start(spec)
        const agent = await program.greet()
        program.say('keep')
        await agent.expect('keep')
        agent.checkpoint(1)
        await program.expect('beforeB')
        await program.expect('beforeA')
        await agent.expect('parked')
        // It was asked for when the image was there already, which so does not know it.
        agent.send(program.forked({ call: 99 }))
        await program.expect('forkA')
        await program.expect('forkB')
        await agent.expect('running')
        await program.expect('isFork')
        await program.ask('ping', 'pong')
      })

      it('lets the program live on where its connection ends while it is parked', async () => {
        program = await Conformer.start(spec)
        const agent = await program.greet()
        program.say('fork 1')
        await agent.expect('fork')
        agent.checkpoint(1)
        await program.expect('beforeB')
        await program.expect('beforeA')
        await agent.expect('parked')
        agent.socket.destroy()
        const events = [await program.expect('afterA'), await program.expect('afterB')]
        expect(events).toHaveLength(2)
        await program.expect('failed')
        await program.ask('ping', 'pong')
        await program.ask('fork 2', 'failed')
      })

      it('lets the program go on where it is sent away', async () => {
        program = await Conformer.start(spec)
        const agent = await program.connection()
        agent.send({ type: 'goodbye', reason: 'it speaks another version' })
        await program.expect('started')
        expect(await agent.next()).toBe(undefined)
        await program.ask('fork 1', 'failed')
        program.say('ready')
        await program.ask('ping', 'pong')
      })

      it('writes nothing into a file that has its descriptor now', async () => {
        program = await Conformer.start(spec)
        const agent = await program.greet()
        const file = join(program.directory, 'innocent')
        await program.ask(`reuse ${agent.hello.fd} ${file}`, 'reused')
        program.say('ready')
        program.say('send 1')
        // A read that waits in the kernel still has the connection: it hears of this, and must not answer into the file.
        if (!agent.socket.destroyed) agent.checkpoint(1)
        await program.ask('ping', 'pong')
        await program.ask('fork 1', 'failed')
        expect(await agent.silence()).toEqual([])
        expect(readFileSync(file, 'utf8')).toBe('')
        await program.ask('ping', 'pong')
      })
    })
  })
}
