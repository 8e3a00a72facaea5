import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { type Atom, chooseMoved, countMappings, movedStretches } from '../src/image/edits/regions.js'

/** Atoms one behind the other, of a page each. */
function atomsOf(list: readonly Pick<Atom, 'stayCost' | 'moveCost' | 'joined'>[]): Atom[] {
  return list.map((atom, i) => ({ ...atom, start: BigInt(i) << 12n, end: BigInt(i + 1) << 12n }))
}

function costOf(atoms: readonly Atom[], moved: readonly boolean[], mappingCost: number): number {
  const own = atoms.reduce((sum, { stayCost, moveCost }, i) => sum + (moved[i] ? moveCost : stayCost), 0)
  return own + (countMappings(atoms, moved) - 1) * mappingCost
}

function* choices(length: number): Generator<boolean[]> {
  for (let bits = 0; bits < 2 ** length; bits++) yield Array.from({ length }, (_, i) => ((bits >> i) & 1) === 1)
}

const cost = fc.oneof(fc.integer({ min: 0, max: 40 }), fc.constant(0), fc.constant(Number.POSITIVE_INFINITY))
const atom = fc
  .record({ stayCost: cost, moveCost: cost, joined: fc.boolean() })
  // One of both is always possible.
  .filter(({ stayCost, moveCost }) => Number.isFinite(stayCost) || Number.isFinite(moveCost))
const region = fc.array(atom, { minLength: 1, maxLength: 9 }).map(atomsOf)

describe('what moves to a new page file', () => {
  it('costs the least of all choices', () => {
    fc.assert(
      fc.property(region, fc.integer({ min: 0, max: 30 }), (atoms, mappingCost) => {
        const least = Math.min(...[...choices(atoms.length)].map((moved) => costOf(atoms, moved, mappingCost)))
        expect(costOf(atoms, chooseMoved(atoms, mappingCost), mappingCost)).toBe(least)
      }),
      { numRuns: 300, seed: 1 },
    )
  })

  it('makes no more mappings where mappings cost more', () => {
    fc.assert(
      fc.property(region, (atoms) => {
        const counts = [1, 8, 64, 1e6].map((mappingCost) => countMappings(atoms, chooseMoved(atoms, mappingCost)))
        expect(counts).toEqual([...counts].sort((a, b) => b - a))
      }),
      { numRuns: 300, seed: 2 },
    )
  })

  it('is nothing where nothing was written', () => {
    const atoms = atomsOf(Array.from({ length: 5 }, (_, i) => ({ stayCost: 0, moveCost: 0, joined: i > 0 })))
    expect(chooseMoved(atoms, 6)).toEqual(atoms.map(() => false))
  })

  it('is a run of written pages and not a single one', () => {
    const stays = { stayCost: 0, moveCost: 500, joined: true }
    const moved = (pages: number) =>
      chooseMoved(atomsOf([stays, { stayCost: 4 + 2 * pages, moveCost: 0, joined: true }, stays]), 6)[1]
    expect([1, 4, 5, 100].map(moved)).toEqual([false, false, true, true])
  })

  it('is one stretch where what lies between runs is cheaper moved than mapped', () => {
    const run = { stayCost: 200, moveCost: 0, joined: true }
    const between = (moveCost: number) => atomsOf([run, { stayCost: 0, moveCost, joined: true }, run])
    const stretches = (moveCost: number) => movedStretches(between(moveCost), chooseMoved(between(moveCost), 6))
    expect(stretches(11)).toEqual([{ start: 0n, end: 3n << 12n }])
    expect(stretches(13)).toHaveLength(2)
  })
})
