/** The name of a variable in the memory of an image. */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { AddressSpace } from '../src/image/address-space.js'
import { findVariable } from '../src/image/edits/environment.js'
import { MAP, VMA_STATUS } from '../src/image/schema.js'
import { regular, type TinyImage, tinyImage, vma } from './fixtures/tiny-image.js'

const STACK = 0x7ff0_0000_0000n
const NAMES = { from: 'MARK_aaaa', to: 'MARK_bbbb' }

let directory: string
beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'warmfork-environment-'))
})
afterEach(() => rmSync(directory, { recursive: true }))

/** Where the name stands in an environment that begins at an address. */
function find(text: string, start: bigint): [offset: number, bytes: string][] {
  const words: [bigint, Uint8Array][] = [[start, Buffer.from(text)]]
  return findIn(text, start, { processes: [{ pid: 7, vmas: [vma(STACK, 2)], pages: [[STACK, 2, 0]], words }] })
}

function findIn(text: string, start: bigint, image: TinyImage): [offset: number, bytes: string][] {
  const set = tinyImage(directory, image)
  const memory = new AddressSpace(set, 7)
  try {
    return findVariable(memory, [start, start + BigInt(text.length)], NAMES).map(({ address, bytes }) => [
      Number(address - STACK),
      Buffer.from(bytes).toString(),
    ])
  } finally {
    memory.close()
  }
}

test('is found as a whole name, each time', () => {
  const text = 'MARK_aaaa=1\0XMARK_aaaa=1\0A=MARK_aaaa=\0MARK_aaaab=1\0MARK_aaaa=2\0'
  expect(find(text, STACK + 64n)).toEqual([
    [64, 'MARK_bbbb'],
    [64 + text.lastIndexOf('MARK_aaaa=2'), 'MARK_bbbb'],
  ])
})

test('is found where it lies in two pages, as two pieces', () => {
  expect(find('MARK_aaaa=1\0', STACK + 4096n - 3n)).toEqual([
    [4093, 'MAR'],
    [4096, 'K_bbbb'],
  ])
})

test('is left alone where its memory is that of a file, which all forks share', () => {
  const path = join(directory, 'shared')
  writeFileSync(path, Buffer.concat([Buffer.from('MARK_aaaa=1\0')], 4096))
  const status = VMA_STATUS.REGULAR | VMA_STATUS.FILE_PRIVATE
  const mapped = vma(STACK, 1, { shmid: 5n, flags: MAP.PRIVATE, status })
  const image = (pages: [bigint, number, number][], words: [bigint, Uint8Array][]) => ({
    files: [regular(5, path)],
    processes: [{ pid: 7, vmas: [mapped], pages, words }],
  })
  const text = 'MARK_aaaa=1\0'
  expect(findIn(text, STACK, image([], []))).toEqual([])
  expect(findIn(text, STACK, image([[STACK, 1, 0]], [[STACK, Buffer.from(text)]]))).toEqual([[0, 'MARK_bbbb']])
})

test('can only be changed to one of the same length', () => {
  const set = tinyImage(directory, { processes: [{ pid: 7 }] })
  const memory = new AddressSpace(set, 7)
  expect(() => findVariable(memory, [0n, 0n], { from: 'A', to: 'AB' })).toThrow(RangeError)
  memory.close()
})
