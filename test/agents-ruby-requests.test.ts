/** What the Ruby agents do about requests: MRI with WEBrick, MRI and JRuby with a Rack application, and with blocks. */
import { existsSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { afterEach, describe, expect, test } from 'vitest'
import { reforkUnderLoad, Serving, stream } from './agents-requests.js'
import { ENGINES, usePlace } from './engines-under-test.js'
import specs from './fixtures/agents-conformance/ruby.js'

const PROGRAM = fileURLToPath(new URL('fixtures/agents-ruby/serving.rb', import.meta.url))
/** Directories with libraries, between colons: Debian's ruby-rack and puma, unpacked. */
const libraries = process.env.WARMFORK_TEST_RUBY_LIBRARIES?.split(':') ?? []
const found = (file: string) => libraries.some((directory) => existsSync(`${directory}/${file}`))
const BROUGHT = [...(found('rack.rb') ? ['builder'] : []), ...(found('puma.rb') ? ['puma'] : [])]
const MRI = ['webrick', 'rack', 'blocks', ...BROUGHT]

for (const spec of specs) {
  const missing = spec.missing()
  const kinds = spec.name === 'MRI' ? MRI : ['rack']
  const [ruby] = spec.command
  const flags = libraries.flatMap((directory) => ['-I', directory])
  const commandOf = (kind: string): [string, ...string[]] => [ruby, ...flags, PROGRAM, kind]
  const start = (kind: string) => Serving.start({ command: commandOf(kind) }, { env: spec.env })

  describe.skipIf(missing)(`the agent of ${spec.name}, of requests${missing ? ` (${missing})` : ''}`, () => {
    let serving: Serving
    afterEach(() => serving.program.end())

    test.each(kinds)(
      'counts each request of %s once, at most ten times a second, and is silent afterwards',
      async (kind) => {
        serving = await start(kind)
        expect(serving.agent.hello.counts).toBe(true)
        const since = Date.now()
        for (let round = 0; round < 3; round++) {
          await Promise.all(Array.from({ length: 40 }, (_, i) => serving.get(`/now?ms=${i % 2}`)))
          await sleep(60)
        }
        const counts = await serving.counted()
        expect(counts.at(-1)?.total).toBe(120)
        expect(counts.at(-1)!.ms).toBeGreaterThan(60)
        expect(counts.length).toBeLessThanOrEqual((Date.now() - since) / 100 + 1)
        expect(await serving.agent.silence(200)).toEqual([])
      },
    )

    test.each(kinds)(
      'waits in %s for what is in hand, holds back what comes, and lets it go in the source',
      async (kind) => {
        serving = await start(kind)
        const slow = serving.get('/wait?id=slow')
        await sleep(300)
        serving.checkpoint()
        await sleep(200)
        const held = [serving.get('/now?id=held'), serving.get('/now?id=held')]
        await sleep(300)
        expect(serving.words()).toEqual([])
        serving.letGo()
        expect(await serving.hear('parked')).toMatchObject({ held: 2 })
        await slow
        expect(serving.words()).toEqual(['slow', 'hook'])
        serving.resume()
        await serving.hear('running')
        await Promise.all(held)
        expect(serving.words()).toEqual(['slow', 'hook', 'held', 'held'])
        expect((await serving.counted()).at(-1)?.total).toBe(3)
      },
    )

    test.each(kinds)('drops in a fork of %s what was held back, which counts from 0', async (kind) => {
      serving = await start(kind)
      await serving.get('/now')
      const slow = serving.get('/wait')
      await sleep(300)
      serving.checkpoint()
      await sleep(100)
      const held = serving.get('/now?id=held').catch(() => 'closed')
      await sleep(300)
      serving.letGo()
      await slow
      expect(await serving.hear('parked')).toMatchObject({ held: 1 })
      serving.become()
      await serving.hear('running')
      expect(await held).not.toMatch(/^\d+$/)
      await serving.get('/now?id=after')
      expect(serving.words()).toEqual(['hook', 'after'])
      expect((await serving.counted()).at(-1)?.total).toBe(1)
    })

    test('refuses where one never ends, and serves the others meanwhile', async () => {
      serving = await start('blocks')
      const slow = serving.get('/wait')
      await sleep(300)
      serving.checkpoint('refork', 2_000)
      const since = Date.now()
      await serving.get('/now')
      expect(Date.now() - since).toBeLessThan(1_000)
      const { error } = await serving.hear('refused')
      expect(error.code).toBe('BUSY')
      expect(error.message).toMatch(/^1 request is in hand, for [23]\d{3} ms: GET \/wait$/)
      expect(error).not.toHaveProperty('hook')
      expect(serving.words()).toEqual([])
      serving.letGo()
      await slow
      serving.checkpoint()
      expect(await serving.hear('parked')).not.toHaveProperty('held')
      serving.resume()
      await serving.hear('running')
    })

    test.each(kinds.filter((kind) => kind !== 'blocks'))(
      'waits in %s for no event stream, and does not count it',
      async (kind) => {
        serving = await start(kind)
        const end = await stream(serving.port, '/stream')
        serving.checkpoint('refork', 2_000)
        await serving.hear('parked')
        serving.resume()
        await serving.hear('running')
        end()
        expect(await serving.counted()).toEqual([])
      },
    )

    test('holds nothing back and waits for nothing where the program forks from a request', async () => {
      serving = await start('rack')
      const asked = serving.get('/fork')
      const { id } = await serving.hear('fork')
      serving.checkpoint('fork', 2_000)
      await serving.hear('parked')
      serving.resume()
      await serving.hear('running')
      serving.agent.send({ type: 'forkResult', id, pid: 4711, generation: 2 })
      expect(await asked).toBe('4711')
    })

    test('refuses every refork of a program that is no longer fork-safe, before hooks', async () => {
      serving = await start('rack')
      serving.agent.send({ type: 'message', data: { json: 'unsafe' } })
      expect(await serving.hear('unsafe')).toEqual({ type: 'unsafe', reason: 'it holds a lease' })
      for (let i = 0; i < 2; i++) {
        serving.checkpoint()
        const { error } = await serving.hear('refused')
        expect(error).toMatchObject({ code: 'UNSAFE', message: expect.stringContaining('it holds a lease') })
      }
      expect(serving.words()).toEqual([])
      serving.checkpoint('fork')
      await serving.hear('parked')
      serving.become()
      await serving.hear('running')
      // A copy is no safer.
      serving.checkpoint()
      expect((await serving.hear('refused')).error.code).toBe('UNSAFE')
    })
  })

  describe.skipIf(missing !== undefined || !ENGINES.includes('criu'))(`a child of ${spec.name} under load`, () => {
    const place = usePlace('criu')
    // Where the connection is known. Else what was read and had not begun can be missed.
    test.each(
      spec.name === 'MRI' ? ['webrick', 'blocks', ...BROUGHT.filter((kind) => kind !== 'builder')] : ['blocks'],
    )('loses nothing when it is reforked, and nothing of it runs in a fork: %s', async (kind) => {
      const env = { RUBYLIB: spec.env.RUBYLIB! }
      await reforkUnderLoad(place.current, { command: commandOf(kind), env })
    })
  })
}
