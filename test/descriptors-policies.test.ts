/** Policies for descriptors as far as they need no process: which goes before which, what is said, and what the documentation says. */
import { readFileSync } from 'node:fs'
import { describe, expect, test } from 'vitest'
import { DESCRIPTOR_KINDS } from '../src/descriptors/kinds.js'
import { globPattern, planDescriptors } from '../src/descriptors/policies.js'
import type { OpenDescriptor } from '../src/descriptors/survey.js'

const file = (fd: number, target: string, kind: OpenDescriptor['kind'] = 'file-append'): OpenDescriptor => ({
  pid: 7,
  fd,
  kind,
  target,
})
const policiesOf = (...args: Parameters<typeof planDescriptors>) =>
  planDescriptors(...args).descriptors.map(({ policy }) => policy)

describe('a plan', () => {
  test('has the policy of the path, else of the kind, else the default', () => {
    const open = [file(3, '/var/log/app.log'), file(4, '/var/lib/data'), file(5, 'anon_inode:[eventfd]', 'eventfd')]
    const policies = { '/var/log/*': 'reopen', 'file-append': 'close' } as const
    expect(policiesOf(open, policies, 'checkpoint')).toEqual(['reopen', 'close', 'keep'])
    expect(planDescriptors(open, policies, 'checkpoint').closed).toEqual([{ pid: 7, fd: 4 }])
  })

  test('names at most three of what it refuses, and says how many more there are', () => {
    const open = [3, 4, 5, 6, 7].map((fd) => file(fd, `/file-${fd}`))
    expect(() => planDescriptors(open, { '/**': 'error' }, 'checkpoint app')).toThrow(
      expect.objectContaining({
        code: 'CHECKPOINT_FAILED',
        message: expect.stringMatching(/checkpoint app: descriptor 3 .*\/file-3.*\/file-4.*\/file-5\); and 2 more/),
      }),
    )
  })

  test('warns once of a kind, with the places', () => {
    const open = [3, 4, 5, 6].map((fd) => file(fd, `/file-${fd}`, 'file-write'))
    const { warnings } = planDescriptors(open, {}, 'checkpoint')
    expect(warnings).toEqual([expect.stringContaining('(/file-3, /file-4, /file-5 and 1 more)')])
  })

  test('does not close by hand what ends by itself', () => {
    const open = [file(3, 'tcp', 'tcp-connection'), file(4, 'unix', 'unix-connection'), file(5, '/x', 'lock')]
    expect(planDescriptors(open, {}, 'checkpoint').closed).toEqual([])
  })
})

describe('a path', () => {
  test.each([
    ['/var/log/*.log', '/var/log/a.log', true],
    ['/var/log/*.log', '/var/log/b/a.log', false],
    ['/var/**/a.log', '/var/a.log', true],
    ['/var/**/a.log', '/var/log/b/a.log', true],
    ['/var/**', '/var/log/b/a.log', true],
    ['/var/**', '/variable', false],
    ['/a?c', '/abc', true],
    ['/a?c', '/a/c', false],
    ['/a+b.(c)', '/a+b.(c)', true],
    ['/a.b', '/axb', false],
    ['/gone', '/gone (deleted)', true],
  ])('%s and %s: %s', (glob, path, matches) => {
    expect(globPattern(glob).test(path)).toBe(matches)
  })
})

test('docs/descriptors.md has each kind, with its policies in order', () => {
  const page = readFileSync(new URL('../docs/descriptors.md', import.meta.url), 'utf8')
  const table = /<!-- kinds:start -->(.*)<!-- kinds:end -->/s.exec(page)![1]!
  const rows = [...table.matchAll(/^\| `([a-z-]+)` \| ([^|]+) \| ([^|]+) \| (⚠?)/gm)]
  expect(rows.map(([, kind, words, policies, risk]) => ({ kind, words, policies, risk: risk !== '' }))).toEqual(
    Object.entries(DESCRIPTOR_KINDS).map(([kind, { words, policies, ...more }]) => ({
      kind,
      words,
      policies: policies.map((policy) => `\`${policy}\``).join(', '),
      risk: 'risk' in more,
    })),
  )
})
