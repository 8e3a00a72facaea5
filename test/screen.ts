/** Somebody who sits at a terminal, types, and looks at what is shown. It knows no program. */
import { stripVTControlCharacters } from 'node:util'
import type { Terminal } from '../src/terminal.js'
import { eventually } from './engines-under-test.js'

export const CTRL_C = '\x03'
export const CTRL_D = '\x04'
export const CTRL_Z = '\x1a'
export const UP = '\x1b[A'
export const BACKSPACE = '\x7f'

/** Programs that edit lines ask, and some wait half a second for an answer. */
const WHERE_IS_THE_CURSOR = '\x1b[6n'
const AT_THE_TOP = '\x1b[1;1R'

export class Screen {
  #shown = ''

  /** @param prompt what stands last on the screen where the program waits for a line */
  constructor(
    readonly terminal: Terminal,
    readonly prompt: RegExp = /> $/,
  ) {
    terminal.on('data', (chunk: Buffer) => {
      this.#shown += chunk
      if (chunk.includes(WHERE_IS_THE_CURSOR)) terminal.write(AT_THE_TOP)
    })
  }

  /** All that was shown, without colours and moves of the cursor. */
  get text(): string {
    return stripVTControlCharacters(this.#shown)
  }

  /** Types, and gives what is shown from then on, once it matches. */
  async type(keys: string, pattern: RegExp): Promise<string> {
    const from = this.#shown.length
    this.terminal.write(keys)
    const since = () => stripVTControlCharacters(this.#shown.slice(from))
    try {
      await eventually(() => pattern.test(since()), `${pattern} is shown after ${JSON.stringify(keys)}`)
    } catch (error) {
      throw new Error(`${(error as Error).message}; it was: ${JSON.stringify(since())}`)
    }
    return since()
  }

  /** The same for a line, whose answer is complete when the prompt is there again. */
  line(keys: string, answer: RegExp): Promise<string> {
    return this.type(`${keys}\r`, new RegExp(`${answer.source}[\\s\\S]*${this.prompt.source}`, 'm'))
  }
}
