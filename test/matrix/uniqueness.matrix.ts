import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { usePlace } from '../engines-under-test.js'
import { cached, debianInstall, RUNTIME_CACHE, run } from '../runtimes/runtime.js'
import { documented, drawn, FORKS } from '../uniqueness.js'

const PROGRAMS = join(import.meta.dirname, '../fixtures/uniqueness')

describe(`${FORKS} forks of one generation draw as docs/uniqueness.md says`, () => {
  const place = usePlace('criu')
  const said = (name: string, agent: 'with' | 'without') =>
    Object.fromEntries([...documented(name)].map(([source, found]) => [source, found[agent]]))

  test('JRuby, with its agent and without', async () => {
    const setup = new URL('../../examples/jruby/setup.mjs', import.meta.url).href
    const { jruby } = (await import(setup)) as { jruby: () => string }
    const command: [string, ...string[]] = [jruby(), join(PROGRAMS, 'ruby.rb')]
    expect(await drawn(place.current, command, true)).toEqual(said('JRuby', 'with'))
    expect(await drawn(place.current, command, false)).toEqual(said('JRuby', 'without'))
  })

  test('Go', async () => {
    await debianInstall('go', 'golang-go')
    const source = join(PROGRAMS, 'go.go')
    await cached(RUNTIME_CACHE, 'go-draw', readFileSync(source, 'utf8'), async (into) => {
      const env = { CGO_ENABLED: '0', GO111MODULE: 'off', GOFLAGS: '', GOTOOLCHAIN: 'local' }
      await run('go', ['build', '-o', join(into, 'draw'), source], { timeoutMs: 600_000, env })
    })
    const page = said('Go', 'without')
    const found = await drawn(place.current, [join(RUNTIME_CACHE, 'go-draw/draw')], true)
    // By luck of Go's scheduler all fifty can be the same where mostly some are: seen in three runs of six.
    const luck = (source: string, value: string) => (page[source] === 'some' && value === 'same' ? 'some' : value)
    expect(Object.fromEntries(Object.entries(found).map(([source, value]) => [source, luck(source, value)]))).toEqual(
      page,
    )
  })
})
