/**
 * The environment that a process was started with, as /proc and its own children see it: a name in it is changed to another of the
 * same length. It knows a process's memory, and not what the name is for.
 */
import type { AddressSpace } from '../address-space.js'
import { PAGE } from '../pagemap.js'

/** Bytes of a process's memory that are to be others, inside of one page. */
export interface TextPlace {
  address: bigint
  bytes: Uint8Array
}

/** More is no environment: the kernel lets arguments and environment have 6 MiB together. */
const MOST_BYTES = 6n << 20n
const PAGE_N = BigInt(PAGE)

/**
 * Where a variable's name stands between two addresses, and what is to stand there, as far as its pages are in the image. Throws a
 * RangeError where the two names are not of the same length.
 */
export function findVariable(
  memory: AddressSpace,
  [start, end]: readonly [bigint, bigint],
  { from, to }: { from: string; to: string },
): TextPlace[] {
  if (from.length !== to.length) throw new RangeError('a name can only be changed to one of the same length')
  if (end <= start || end - start > MOST_BYTES) return []
  const pieces: Buffer[] = []
  for (let at = start; at < end; ) {
    const next = (at / PAGE_N + 1n) * PAGE_N
    const length = Number((next < end ? next : end) - at)
    pieces.push(memory.read(at, length) ?? Buffer.alloc(length))
    at += BigInt(length)
  }
  const text = Buffer.concat(pieces)
  const wanted = Buffer.from(`${from}=`)
  const places: TextPlace[] = []
  for (let at = text.indexOf(wanted); at >= 0; at = text.indexOf(wanted, at + 1)) {
    if (at > 0 && text[at - 1] !== 0) continue
    places.push(...dividedByPages(start + BigInt(at), Buffer.from(to)))
  }
  return places.every(({ address }) => memory.offsetOf(address) !== undefined) ? places : []
}

function dividedByPages(address: bigint, bytes: Buffer): TextPlace[] {
  const first = Math.min(bytes.length, PAGE - Number(address % PAGE_N))
  const places = [{ address, bytes: bytes.subarray(0, first) }]
  if (first < bytes.length) places.push({ address: address + BigInt(first), bytes: bytes.subarray(first) })
  return places
}
