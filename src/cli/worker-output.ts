/**
 * What workers write, on one of our own streams: whole lines, each with the pid of its worker. It knows streams, and neither children
 * nor supervisors.
 */

import { once } from 'node:events'
import type { Readable, Writable } from 'node:stream'
import { setTimeout as sleep } from 'node:timers/promises'

/** A longer line is written in parts, each with the pid: a worker that ends no line must not fill our memory. */
const MAX_LINE_BYTES = 64 * 1024

/** How long the last output may take when all is over: who reads it may have stopped to. */
const LAST_OUTPUT_MS = 1_000

/** It holds everything back until `begin`, so that what is said first comes first. */
export class WorkerOutput {
  readonly #sink: Writable
  /** Waiting until somebody has read what was written. Their workers wait with them, once their pipes are full. */
  readonly #held = new Set<Readable>()
  readonly #open = new Set<Readable>()
  #isGone = false

  constructor(sink: Writable) {
    this.#sink = sink
    sink.cork()
    // One listener for all, as there can be many workers.
    sink.on('drain', () => this.#release())
    sink.on('error', () => {
      // Who has read it has gone, which is no reason to end: workers serve on.
      this.#isGone = true
      this.#release()
    })
  }

  begin(): void {
    this.#sink.uncork()
  }

  /** Shows what comes over this stream of a worker. */
  show(pid: number, stream: Readable): void {
    const prefix = Buffer.from(`[${pid}] `)
    let rest: Buffer = Buffer.alloc(0)
    this.#open.add(stream)
    stream.on('data', (chunk: Buffer) => {
      const all = rest.length > 0 ? Buffer.concat([rest, chunk]) : chunk
      const parts: Buffer[] = []
      let from = 0
      for (let end = all.indexOf(10); end >= 0; end = all.indexOf(10, from)) {
        parts.push(prefix, all.subarray(from, end + 1))
        from = end + 1
      }
      rest = all.subarray(from)
      if (rest.length > MAX_LINE_BYTES) {
        parts.push(prefix, rest, LINE_END)
        rest = Buffer.alloc(0)
      }
      if (parts.length > 0) this.#write(Buffer.concat(parts), stream)
    })
    stream.once('close', () => {
      this.#open.delete(stream)
      this.#held.delete(stream)
      if (rest.length > 0) this.#write(Buffer.concat([prefix, rest, LINE_END]))
    })
  }

  /** Resolves when all is written, or nobody reads any more. */
  async finish(): Promise<void> {
    const late = new AbortController()
    const written = async () => {
      await Promise.all([...this.#open].map((stream) => once(stream, 'close', { signal: late.signal })))
      await new Promise((resolve) => this.#sink.write('', resolve))
    }
    const waiting = sleep(LAST_OUTPUT_MS, undefined, { signal: late.signal }).catch(() => {})
    await Promise.race([written().catch(() => {}), waiting])
    late.abort()
  }

  #write(bytes: Buffer, stream?: Readable): void {
    if (this.#isGone || this.#sink.write(bytes) || !stream) return
    this.#held.add(stream)
    stream.pause()
  }

  #release(): void {
    for (const stream of this.#held) stream.resume()
    this.#held.clear()
  }
}

const LINE_END = Buffer.from('\n')
