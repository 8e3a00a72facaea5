import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { ENGINES, usePlace } from './engines-under-test.js'
import { compileC } from './runtimes/compile.js'
import { documented, drawn } from './uniqueness.js'

const PROGRAMS = join(import.meta.dirname, 'fixtures/uniqueness')

describe.skipIf(!ENGINES.includes('criu'))('fifty forks of one generation draw as docs/uniqueness.md says', () => {
  const place = usePlace('criu')

  test.each([
    ['Node', [process.execPath, join(PROGRAMS, 'node.mjs')]],
    ['Python', ['python3', join(PROGRAMS, 'python.py')]],
    ['Ruby', ['ruby', join(PROGRAMS, 'ruby.rb')]],
  ] as [string, [string, ...string[]]][])('%s, with its agent and without', async (name, command) => {
    const table = documented(name)
    const expected = (agent: 'with' | 'without') =>
      Object.fromEntries([...table].map(([source, said]) => [source, said[agent]]))
    expect(await drawn(place.current, command, true)).toEqual(expected('with'))
    expect(await drawn(place.current, command, false)).toEqual(expected('without'))
  })

  test('C', async () => {
    const said = Object.fromEntries([...documented('C')].map(([source, { without }]) => [source, without]))
    expect(await drawn(place.current, [await compileC('draw')], true)).toEqual(said)
  })
})
