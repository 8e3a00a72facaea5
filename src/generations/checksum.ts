/**
 * SHA-256 of files, and of the runs that hold data in a sparse page file. It knows neither manifests nor directories.
 *
 * A page file has holes of a gibibyte between its slots, so it is never read from end to end: its checksum covers its
 * runs, in their order, and nothing between them.
 */
import { createHash } from 'node:crypto'
import { closeSync, fstatSync, openSync, readFileSync, readSync } from 'node:fs'
import { type FileHandle, open } from 'node:fs/promises'
import { nextData, nextHole } from '../linux/libc.js'

/** A stretch of a page file that holds data: both in bytes. */
export type Run = readonly [offset: number, length: number]

/** Hashed in pieces of this size, so that the event loop stands still for 0.2 ms at a time (measured: 1.8 GB/s with SHA-NI). */
const PIECE_BYTES = 256 * 1024

/** SHA-256 of a whole file, in hex, and how many bytes that were. */
export async function fileChecksum(path: string, signal?: AbortSignal): Promise<{ bytes: number; sha256: string }> {
  const hash = createHash('sha256')
  const handle = await open(path, 'r')
  try {
    let bytes = 0
    const piece = Buffer.allocUnsafe(PIECE_BYTES)
    for (;;) {
      signal?.throwIfAborted()
      const { bytesRead } = await handle.read(piece, 0, piece.length, bytes)
      if (bytesRead === 0) return { bytes, sha256: hash.digest('hex') }
      hash.update(piece.subarray(0, bytesRead))
      bytes += bytesRead
    }
  } finally {
    await handle.close()
  }
}

/** SHA-256 over the runs' bytes, in hex. A run that ends behind the file's end throws a RangeError. */
export async function runsChecksum(path: string, runs: readonly Run[], signal?: AbortSignal): Promise<string> {
  const hash = createHash('sha256')
  const handle = await open(path, 'r')
  try {
    const piece = Buffer.allocUnsafe(PIECE_BYTES)
    for (const [offset, length] of runs) {
      for (let done = 0; done < length; ) {
        signal?.throwIfAborted()
        const wanted = Math.min(piece.length, length - done)
        const got = await readFully(handle, piece, wanted, offset + done)
        if (got < wanted) throw new RangeError(`a run ends at byte ${offset + length}, behind the end of ${path}`)
        hash.update(piece.subarray(0, got))
        done += got
      }
    }
    return hash.digest('hex')
  } finally {
    await handle.close()
  }
}

/**
 * Whether a page file has anything but zeros outside its runs: a mapping that grows comes upon that. Only stretches that
 * the file system says hold data are read, which outside the runs are none: so the event loop may wait for it.
 */
export function hasStrayData(path: string, runs: readonly Run[]): boolean {
  const ascending = [...runs].sort(([a], [b]) => a - b)
  const fd = openSync(path, 'r')
  try {
    const piece = Buffer.allocUnsafe(PIECE_BYTES)
    let next = 0
    for (let at = nextData(fd, 0); at !== undefined; at = nextData(fd, at)) {
      const end = nextHole(fd, at)
      if (end === undefined) return false
      while (at < end) {
        while (next < ascending.length && ascending[next]![0] + ascending[next]![1] <= at) next++
        const [start, length] = ascending[next] ?? [Number.POSITIVE_INFINITY, 0]
        if (start <= at) {
          at = Math.min(end, start + length)
          continue
        }
        const got = readSync(fd, piece, 0, Math.min(piece.length, end - at, start - at), at)
        if (got === 0) return false
        if (!piece.subarray(0, got).equals(ZEROS.subarray(0, got))) return true
        at += got
      }
    }
    return false
  } finally {
    closeSync(fd)
  }
}

const ZEROS = Buffer.alloc(PIECE_BYTES)

/** The checksum of a file, or of its runs where a file of runs is named, while the event loop waits. */
export function checksumNow(path: string, runsPath?: string): string {
  const hash = createHash('sha256')
  const fd = openSync(path, 'r')
  try {
    const runs: Run[] = runsPath === undefined ? [[0, fstatSync(fd).size]] : decodeRuns(readFileSync(runsPath))
    const piece = Buffer.allocUnsafe(4 * PIECE_BYTES)
    for (const [offset, length] of runs) {
      for (let done = 0; done < length; ) {
        const got = readSync(fd, piece, 0, Math.min(piece.length, length - done), offset + done)
        if (got === 0) break
        hash.update(piece.subarray(0, got))
        done += got
      }
    }
    return hash.digest('hex')
  } finally {
    closeSync(fd)
  }
}

async function readFully(handle: FileHandle, into: Buffer, wanted: number, position: number): Promise<number> {
  let got = 0
  while (got < wanted) {
    const { bytesRead } = await handle.read(into, got, wanted - got, position + got)
    if (bytesRead === 0) break
    got += bytesRead
  }
  return got
}

/** Runs as they lie in a `.runs` file: pairs of little-endian 64-bit numbers, offset and length. */
export function encodeRuns(runs: readonly Run[]): Buffer {
  const out = Buffer.alloc(runs.length * 16)
  runs.forEach(([offset, length], index) => {
    out.writeBigUInt64LE(BigInt(offset), index * 16)
    out.writeBigUInt64LE(BigInt(length), index * 16 + 8)
  })
  return out
}

/** Throws a RangeError where the bytes are not whole pairs. */
export function decodeRuns(bytes: Buffer): Run[] {
  if (bytes.length % 16 !== 0) throw new RangeError(`${bytes.length} bytes are not whole pairs of numbers`)
  const runs: Run[] = []
  for (let at = 0; at < bytes.length; at += 16) {
    runs.push([Number(bytes.readBigUInt64LE(at)), Number(bytes.readBigUInt64LE(at + 8))])
  }
  return runs
}
