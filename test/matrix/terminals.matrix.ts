/** REPLs that take too long to boot for the tests of every day. */
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { usePlace } from '../engines-under-test.js'
import { converse } from '../repl.js'

describe('a terminal of its own', () => {
  const place = usePlace('criu')
  let home: string
  beforeAll(() => {
    home = mkdtempSync(join(tmpdir(), 'warmfork-home-'))
  })
  afterAll(() => rmSync(home, { recursive: true }))

  test('is what each fork of IRB on JRuby has', async () => {
    const setup = new URL('../../examples/jruby/setup.mjs', import.meta.url).href
    const { jruby } = (await import(setup)) as { jruby: () => string }
    const supervisor = await place.current.start({
      command: [jruby(), '-S', 'irb'],
      template: { tty: { columns: 90, rows: 30 } },
      env: { HOME: home },
      ready: { output: ':001:0> ' },
    })
    expect(supervisor.warnings).toEqual([])
    await converse(supervisor, {
      command: [jruby(), '-S', 'irb'],
      prompt: /^irb\(main\):\d+:0> $/,
      columns: 'IO.console.winsize.last',
      loop: 'loop {}',
      interrupted: /abort then interrupt/,
      who: 'ENV["WHO"]',
    })
  })
})
