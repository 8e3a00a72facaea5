/**
 * The little of tar that an archive needs: headers of regular files in the `ustar` form, all alike but for name and size. A
 * reader knows beforehand which header comes next and compares it byte by byte, so that links, devices and odd paths need no
 * rule each; here stands also what to say of one that differs. It knows nothing of generations.
 */
import { invalid } from './failure.js'

export const BLOCK_BYTES = 512
/** Two blocks of zeros. */
export const END = Buffer.alloc(2 * BLOCK_BYTES)
const OCTAL_LIMIT = 8 ** 11

/** The header of a member. Names have at most 100 bytes. */
export function header(name: string, bytes: number): Buffer {
  const block = Buffer.alloc(BLOCK_BYTES)
  if (block.write(name, 0, 'latin1') > 100) throw new RangeError(`the name ${name} is too long`)
  block.write('0000400\0', 100, 'latin1')
  block.write('0000000\0', 108, 'latin1')
  block.write('0000000\0', 116, 'latin1')
  // Beyond 8 GiB in GNU tar's binary form, which all tars of today read.
  if (bytes < OCTAL_LIMIT) block.write(`${bytes.toString(8).padStart(11, '0')}\0`, 124, 'latin1')
  else {
    block[124] = 0x80
    block.writeBigUInt64BE(BigInt(bytes), 128)
  }
  block.write('00000000000\0', 136, 'latin1')
  block.write('0', 156, 'latin1')
  block.write('ustar\u000000', 257, 'latin1')
  block.write(`${checksum(block).toString(8).padStart(6, '0')}\0 `, 148, 'latin1')
  return block
}

/** How many zeros follow a member's content. */
export function paddingBytes(bytes: number): number {
  return (BLOCK_BYTES - (bytes % BLOCK_BYTES)) % BLOCK_BYTES
}

/** What a header says, as far as it can be read; undefined where it is none. */
export function parse(block: Buffer): { name: string; bytes: number; type: string } | undefined {
  const stored = /^ *([0-7]{1,7})[\0 ]/.exec(block.toString('latin1', 148, 156))?.[1]
  if (stored === undefined || Number.parseInt(stored, 8) !== checksum(block)) return undefined
  const text = (from: number, to: number) => block.toString('utf8', from, to).split('\0', 1)[0]!
  const prefix = block.toString('latin1', 257, 262) === 'ustar' ? text(345, 500) : ''
  const name = prefix === '' ? text(0, 100) : `${prefix}/${text(0, 100)}`
  return { name, bytes: sizeOf(block), type: String.fromCharCode(block[156]!) }
}

function sizeOf(block: Buffer): number {
  if (block[124]! & 0x80) return Number(block.readBigUInt64BE(128))
  return Number.parseInt(block.toString('latin1', 124, 136).trim(), 8)
}

function checksum(block: Buffer): number {
  let sum = 8 * 0x20
  for (let at = 0; at < BLOCK_BYTES; at++) if (at < 148 || at >= 156) sum += block[at]!
  return sum
}

const KINDS: Readonly<Record<string, string>> = {
  '1': 'a hard link',
  '2': 'a symbolic link',
  '3': 'a device',
  '4': 'a device',
  '5': 'a directory',
  '6': 'a FIFO',
}

/** Why a header is not the one that was expected. `before`: the members that came already; `others`: those that are to come. */
export function strange(
  block: Buffer,
  expected: { name: string; bytes: number } | undefined,
  before: ReadonlySet<string>,
  others: ReadonlySet<string>,
): Error {
  const next = expected === undefined ? 'its end' : `its member ${expected.name}`
  if (block.equals(END.subarray(0, BLOCK_BYTES))) return invalid(`it ends before ${next}`)
  const found = parse(block)
  if (!found) return invalid(`the header in the place of ${next} is damaged`)
  const { name, bytes, type } = found
  const shown = JSON.stringify(name)
  if (KINDS[type] !== undefined) return invalid(`its member ${shown} is ${KINDS[type]}`)
  if (name.startsWith('/') || name.split('/').includes('..')) return invalid(`its member ${shown} leads out of it`)
  if (before.has(name)) return invalid(`its member ${shown} is in it twice`)
  if (name !== expected?.name) {
    if (!others.has(name)) return invalid(`its member ${shown} is not in its list`)
    return invalid(`its member ${expected?.name} is missing: ${shown} stands in its place`)
  }
  if (bytes !== expected.bytes) {
    return invalid(`its member ${shown} has ${bytes} bytes, and ${expected.bytes} by its list`)
  }
  return invalid(`the header of its member ${shown} is not as it was written`)
}
