/** Talks to a probe program line by line, whatever started it. */
import type { Writable } from 'node:stream'

const ANSWER = /^(ready$|pong |sum |churned |thread |unknown$)/

export class Conversation {
  readonly #stdin: Pick<Writable, 'write'>
  readonly #lines: AsyncIterator<string>

  constructor(stdin: Pick<Writable, 'write'>, lines: AsyncIterable<string>) {
    this.#stdin = stdin
    this.#lines = lines[Symbol.asyncIterator]()
  }

  /** The next line that a probe says; what its runtime prints besides is skipped. Rejects after the time, or when the output ends. */
  async next(timeoutMs = 30_000): Promise<string> {
    let timer: NodeJS.Timeout | undefined
    const tooLate = new Promise<never>((_, reject) => {
      timer = setTimeout(() => reject(new Error(`the probe said nothing for ${timeoutMs} ms`)), timeoutMs)
    })
    try {
      for (;;) {
        const { value, done } = await Promise.race([this.#lines.next(), tooLate])
        if (done) throw new Error('the output of the probe ended')
        if (ANSWER.test(value)) return value
      }
    } finally {
      clearTimeout(timer)
    }
  }

  async ask(line: string, timeoutMs?: number): Promise<string> {
    this.#stdin.write(`${line}\n`)
    return this.next(timeoutMs)
  }

  say(line: string): void {
    this.#stdin.write(`${line}\n`)
  }
}
