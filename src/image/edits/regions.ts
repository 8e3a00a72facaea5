/**
 * Which parts of a region of memory are to map the new page file, where some of it maps older ones already: written
 * pages in runs are worth a mapping of their own, scattered ones are cheaper copied at each fork, and what lies between
 * can be moved along. It knows costs and addresses, but neither images nor files.
 */

/** A part of a region that is treated as one: all written, or not written at all. */
export interface Atom {
  start: bigint
  end: bigint
  /** What it costs each fork where it stays what it is, in microseconds: its written pages are copied. Infinity: it cannot stay. */
  stayCost: number
  /** What it costs, once, to write it into the new page file. Infinity: it cannot be moved. */
  moveCost: number
  /** Whether it and the atom before, where both stay, are one mapping. */
  joined: boolean
}

/**
 * Microseconds, measured on two cores with Linux 6.18 and CRIU 4.2.1. A restore takes 4 for a mapping more. Memory to copy over a
 * mapping of a page file, as single pages most of the time, takes 14 a page: 3.2 MiB so made a fork of 10 ms one of 22 (and the pages
 * are the fork's own). A moved page is written once, takes space on the disk, and saves a mapping for all forks to come.
 */
export const COSTS = { mapping: 4, copiedRun: 10, copiedPage: 4, movedPage: 0.5 } as const

/**
 * For each atom whether it moves: the choice with the least cost together with that of the mappings it makes. `mappingCost`
 * is raised by those who want fewer mappings.
 */
export function chooseMoved(atoms: readonly Atom[], mappingCost: number): boolean[] {
  // The best sums up to an atom that stays or moves, and whether the atom before moved in them.
  let [stays, moves] = [0, 0]
  const movedBefore: { ifStays: boolean; ifMoves: boolean }[] = []
  for (const [index, { stayCost, moveCost, joined }] of atoms.entries()) {
    const first = index === 0
    const staysFromStays = stays + (joined || first ? 0 : mappingCost)
    const staysFromMoves = moves + mappingCost
    const movesFromStays = stays + (first ? 0 : mappingCost)
    const movesFromMoves = moves
    // Where both are the same, fewer bytes are written.
    movedBefore.push({ ifStays: staysFromMoves < staysFromStays, ifMoves: movesFromMoves < movesFromStays })
    stays = Math.min(staysFromStays, staysFromMoves) + stayCost
    moves = Math.min(movesFromStays, movesFromMoves) + moveCost
  }
  const chosen: boolean[] = []
  let moved = moves < stays
  for (let index = atoms.length - 1; index >= 0; index--) {
    chosen[index] = moved
    moved = moved ? movedBefore[index]!.ifMoves : movedBefore[index]!.ifStays
  }
  return chosen
}

/** How many mappings a choice comes to. */
export function countMappings(atoms: readonly Atom[], moved: readonly boolean[]): number {
  return atoms.filter(({ joined }, i) => i === 0 || moved[i] !== moved[i - 1] || (!moved[i] && !joined)).length
}

/** The stretches that a choice moves, ascending. */
export function movedStretches(atoms: readonly Atom[], moved: readonly boolean[]): { start: bigint; end: bigint }[] {
  const found: { start: bigint; end: bigint }[] = []
  for (const [i, { start, end }] of atoms.entries()) {
    if (!moved[i]) continue
    if (i > 0 && moved[i - 1]) found.at(-1)!.end = end
    else found.push({ start, end })
  }
  return found
}
