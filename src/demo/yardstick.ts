/** The yardstick: fork(2) in a C process with as much touched memory. Started once; each `measure` is one fork of it. */
import { type ChildProcess, spawn } from 'node:child_process'
import { existsSync } from 'node:fs'
import { createInterface } from 'node:readline'
import { fileURLToPath } from 'node:url'

const PROGRAM = fileURLToPath(new URL('../../native/prebuilt/linux-x64/warmfork-fork2', import.meta.url))

export class Yardstick {
  readonly #process: ChildProcess
  readonly #lines: AsyncIterator<string>

  private constructor(process: ChildProcess) {
    this.#process = process
    this.#lines = createInterface({ input: process.stdout! })[Symbol.asyncIterator]()
  }

  /** Undefined where the program was not built, or does not run here. */
  static async start(mebibytes: number, pages: 'small' | 'huge'): Promise<Yardstick | undefined> {
    if (!existsSync(PROGRAM)) return undefined
    const child = spawn(PROGRAM, [String(Math.round(mebibytes)), pages], { stdio: ['pipe', 'pipe', 'inherit'] })
    child.on('error', () => {})
    child.stdin.on('error', () => {})
    const yardstick = new Yardstick(child)
    const first = await yardstick.#lines.next()
    if (first.value === 'ready') return yardstick
    yardstick.end()
    return undefined
  }

  /** Milliseconds from fork(2) to the child's first byte. */
  async measure(): Promise<number> {
    this.#process.stdin!.write('x\n')
    const { value } = await this.#lines.next()
    return Number(value)
  }

  end(): void {
    this.#process.kill('SIGKILL')
  }
}
