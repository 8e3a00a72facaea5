import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { createInterface } from 'node:readline'
import { afterEach, beforeAll, describe, expect, it } from 'vitest'
import { Conversation } from './runtimes/conversation.js'
import { RUNTIME_CACHE, RUNTIMES } from './runtimes/index.js'

const all = process.env.WARMFORK_ALL_RUNTIMES === '1'

for (const runtime of RUNTIMES.filter(({ local }) => local || all)) {
  const reason = await runtime.available()
  describe.skipIf(reason !== undefined)(`the probe in ${runtime.name}`, () => {
    let probe: ChildProcess | undefined

    beforeAll(() => runtime.install(RUNTIME_CACHE), 900_000)

    afterEach(async () => {
      if (probe && probe.exitCode === null && probe.signalCode === null) {
        probe.kill('SIGKILL')
        await once(probe, 'exit')
      }
    })

    async function start(): Promise<Conversation> {
      const [command, ...args] = runtime.command(RUNTIME_CACHE)
      probe = spawn(command, args, { stdio: ['pipe', 'pipe', 'inherit'] })
      const conversation = new Conversation(probe.stdin!, createInterface({ input: probe.stdout! }))
      expect(await conversation.next(60_000)).toBe('ready')
      return conversation
    }

    it('answers each line of the protocol and ends with the code it is told', async () => {
      const conversation = await start()
      expect(await conversation.ask('ping')).toMatch(/^pong [1-9]\d*$/)
      const sum = await conversation.ask('sum')
      expect(sum).toMatch(/^sum [0-9a-f]{8}$/)
      expect(await conversation.ask('churn 2')).toBe('churned 0')
      expect(await conversation.ask('thread')).toBe('thread ok')
      expect(await conversation.ask('sum')).toBe(sum)
      expect(await conversation.ask('what')).toBe('unknown')
      conversation.say('exit 7')
      expect(await once(probe!, 'exit')).toEqual([7, null])
    }, 120_000)

    it('has the same content at every start', async () => {
      const sums = []
      for (let i = 0; i < 2; i++) {
        const conversation = await start()
        sums.push(await conversation.ask('sum'))
        conversation.say('exit 0')
        await once(probe!, 'exit')
      }
      expect(sums[0]).toBe(sums[1])
    }, 120_000)

    it('ends when its stdin ends', async () => {
      await start()
      probe!.stdin!.end()
      expect(await once(probe!, 'exit')).toEqual([0, null])
    }, 120_000)
  })
}
