import { describe, expect, test } from 'vitest'
import { backoffMs, CrashBackoff } from '../src/backoff.js'

const crash = { code: null, signal: 'SIGSEGV' } as const
const well = { code: 0, signal: null } as const

describe('the back-off', () => {
  test('grows by half from 100 ms and stays at 15 s', () => {
    expect([1, 2, 3].map(backoffMs)).toEqual([100, 150, 225])
    expect(backoffMs(14)).toBe(15_000)
    expect(backoffMs(1_000_000)).toBe(15_000)
  })
})

describe('the back-off after crashes', () => {
  const make = () => {
    const clock = { now: 1_000_000 }
    const backoff = new CrashBackoff({ soonMs: 1_000, delayAfter: 3, giveUpAfter: 5 }, () => clock.now)
    return { clock, backoff, crashes: (n: number) => Array.from({ length: n }, () => backoff.ended(crash, 10)) }
  }

  test('does not delay before enough crashes in a row', () => {
    const { backoff, crashes } = make()
    crashes(2)
    expect(backoff.takeTurn()).toBe(0)
    crashes(1)
    expect(backoff.takeTurn()).toBe(100)
  })

  test('lets one fork through at a time', () => {
    const { backoff, clock, crashes } = make()
    crashes(3)
    expect([backoff.takeTurn(), backoff.takeTurn(), backoff.takeTurn()]).toEqual([100, 200, 300])
    clock.now += 300
    expect(backoff.takeTurn()).toBe(100)
  })

  test('gives up in the end, and a child that ends well does not change that', () => {
    const { backoff, crashes } = make()
    crashes(5)
    backoff.ended(well, 10)
    expect(backoff.isLoop).toBe(true)
  })

  test('takes back one crash, not all, for a child that ends well', () => {
    const { backoff, crashes } = make()
    crashes(3)
    backoff.ended(well, 10)
    expect(backoff.isDelaying).toBe(false)
    crashes(1)
    expect(backoff.isDelaying).toBe(true)
  })

  test('does not count a crash of a child that ran for longer', () => {
    const { backoff } = make()
    expect(backoff.ended(crash, 1_000)).toBe(false)
    expect(backoff.ended({ code: null, signal: 'SIGKILL' }, 10)).toBe(false)
    expect(backoff.ended({ code: 1, signal: null }, 10)).toBe(false)
  })

  test('counts the status by which a shell tells of a crash', () => {
    expect(make().backoff.ended({ code: 139, signal: null }, 10)).toBe(true)
  })
})
