import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { ERROR_CODES, type ErrorCode, WarmforkError } from '../src/errors.js'

const root = join(import.meta.dirname, '..')
const page = readFileSync(join(root, 'docs/errors.md'), 'utf8')
const sections = new Map(
  page
    .split(/^### /m)
    .slice(1)
    .map((section) => [section.slice(0, section.indexOf('\n')), section] as const),
)
const codes = Object.keys(ERROR_CODES) as ErrorCode[]

const sources = readdirSync(join(root, 'src'), { recursive: true, encoding: 'utf8' })
  .filter((name) => name.endsWith('.ts') && name !== 'errors.ts')
  .map((name) => readFileSync(join(root, 'src', name), 'utf8'))

describe('the table of error codes', () => {
  test('is described in docs/errors.md, code by code, and that page has no other', () => {
    expect([...sections.keys()].sort()).toEqual([...codes].sort())
  })

  test.each(codes)('%s: the page says when it comes and what to do', (code) => {
    expect(sections.get(code)).toMatch(/\*\*When:\*\* \S/)
    expect(sections.get(code)).toMatch(/\*\*What to do:\*\* \S/)
  })

  test.each(codes)('%s is thrown by something in src', (code) => {
    // As the code of a new error, at once or chosen between two. A mention in a comment, a type or a set is none.
    const thrown = new RegExp(`new WarmforkError\\(\\s*(?:[^'(){}]*\\?\\s*)?(?:'[A-Z_]+'\\s*:\\s*)?'${code}'`)
    const passedOn = new RegExp(`(?:code|Code|failure|error|fail|as)\\w*\\((?:[^()]*,\\s*)?'${code}'`)
    const chosen = new RegExp(`\\? '${code}' :|: '${code}',|return '${code}'`)
    expect(sources.some((source) => [thrown, passedOn, chosen].some((form) => form.test(source)))).toBe(true)
  })

  test('has no code that src uses and it lacks', () => {
    const used = sources.flatMap((source) =>
      [...source.matchAll(/new WarmforkError\('([A-Z_]+)'/g)].map(([, code]) => code),
    )
    expect(used.filter((code) => !codes.includes(code as ErrorCode))).toEqual([])
  })

  test.each(codes)('%s: its remedy is a sentence', (code) => {
    expect(ERROR_CODES[code]).toMatch(/^[A-Z].*\.$/)
  })
})

describe('an error', () => {
  const error = new WarmforkError('DISK_FULL', {
    tried: 'fork',
    happened: 'the file system is full',
    cause: new Error('ENOSPC'),
    output: 'last words',
  })

  test('says what was tried, what happened and what to do, under its code', () => {
    expect(error.message).toBe(`DISK_FULL: could not fork: the file system is full. ${ERROR_CODES.DISK_FULL}`)
    expect(error.cause).toEqual(new Error('ENOSPC'))
  })

  test('takes a remedy of its own in place of that of the table', () => {
    expect(new WarmforkError('TIMEOUT', { tried: 'a', happened: 'b', remedy: 'Wait.' }).message).toMatch(/b\. Wait\.$/)
  })

  test('becomes JSON with all that a reader can use', () => {
    expect(JSON.parse(JSON.stringify(error))).toEqual({
      code: 'DISK_FULL',
      message: error.message,
      tried: 'fork',
      happened: 'the file system is full',
      remedy: ERROR_CODES.DISK_FULL,
      output: 'last words',
    })
  })
})
