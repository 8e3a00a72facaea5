/** Splits what comes in over a stream into lines of bounded length. It knows no JSON and no socket. */

export class LineSplitter {
  #rest: Buffer[] = []
  #restBytes = 0

  constructor(private readonly maxBytes: number) {}

  /** The lines that are complete now, without their ends. Throws a RangeError where one is too long. */
  push(chunk: Buffer): Buffer[] {
    const lines: Buffer[] = []
    let from = 0
    for (let end = chunk.indexOf(10); end >= 0; end = chunk.indexOf(10, from)) {
      this.#add(chunk.subarray(from, end))
      lines.push(this.#rest.length === 1 ? this.#rest[0]! : Buffer.concat(this.#rest))
      this.#rest = []
      this.#restBytes = 0
      from = end + 1
    }
    if (from < chunk.length) this.#add(chunk.subarray(from))
    return lines
  }

  /** How much of a line that has no end yet there is. */
  get pendingBytes(): number {
    return this.#restBytes
  }

  #add(part: Buffer): void {
    this.#restBytes += part.length
    if (this.#restBytes > this.maxBytes) throw new RangeError(`a line of more than ${this.maxBytes} bytes`)
    this.#rest.push(part)
  }
}
