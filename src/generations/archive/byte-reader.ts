/**
 * Bytes that arrive in pieces of any size, read in pieces of the size that is wanted. The source may fill the same memory again
 * when the next piece is asked for. It knows nothing of what they mean.
 */
import { invalid } from './failure.js'

export class ByteReader {
  readonly #source: AsyncIterator<Uint8Array>
  #current: Buffer = Buffer.alloc(0)
  #read = 0

  constructor(source: AsyncIterable<Uint8Array>) {
    this.#source = source[Symbol.asyncIterator]()
  }

  /** How many bytes were taken. */
  get position(): number {
    return this.#read
  }

  /** Exactly so many bytes, which the caller bounds. Throws ARCHIVE_INVALID where there are fewer. */
  async take(length: number, what: string): Promise<Buffer> {
    if (!(await this.#gather(length))) {
      throw invalid(`it is cut short: it ends at byte ${this.#read + this.#current.length}, in ${what}`)
    }
    return Buffer.from(this.#shift(length))
  }

  /** At most so many bytes, as many as there are at once, until more is asked for; undefined at the end. */
  async some(atMost: number): Promise<Buffer | undefined> {
    if (!(await this.#gather(1))) return undefined
    return this.#shift(Math.min(atMost, this.#current.length))
  }

  /** The next bytes without taking them, fewer at the end; until more is asked for. */
  async peek(length: number): Promise<Buffer> {
    await this.#gather(length)
    return this.#current.subarray(0, length)
  }

  /** Gives back what the source holds. */
  async close(): Promise<void> {
    await this.#source.return?.()
  }

  #shift(length: number): Buffer {
    const taken = this.#current.subarray(0, length)
    this.#current = this.#current.subarray(length)
    this.#read += length
    return taken
  }

  /** Whether so many bytes are there. */
  async #gather(length: number): Promise<boolean> {
    if (this.#current.length >= length) return true
    // Copied, since it is the source's.
    const pieces: Buffer[] = this.#current.length === 0 ? [] : [Buffer.from(this.#current)]
    let total = this.#current.length
    while (total < length) {
      const { value, done } = await this.#source.next()
      if (done) break
      const piece = Buffer.from(value.buffer, value.byteOffset, value.byteLength)
      total += piece.length
      // The last one is copied by joining it, or is the only one.
      pieces.push(total < length ? Buffer.from(piece) : piece)
    }
    this.#current = pieces.length === 1 ? pieces[0]! : Buffer.concat(pieces)
    return total >= length
  }
}
