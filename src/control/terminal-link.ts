/**
 * A child's terminal and the terminal of the client that asked for it: what is typed at the one goes to the other, and what the
 * other shows comes back. This process carries the bytes, since the client's terminal belongs to a session that the child is no part
 * of. It knows two terminals, and neither client nor supervisor.
 */
import { closeSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import { ReadStream } from 'node:tty'
import { rawModes, setTerminalModes, terminalModes } from '../linux/pty.js'
import type { Terminal } from '../terminal.js'

/** A terminal that does not take its last output within this time is not waited for: it may be gone, or held up. */
const LAST_OUTPUT_MS = 1_000

export class TerminalLink {
  readonly #terminal: Terminal
  readonly #input: number
  readonly #modes: Uint8Array
  readonly #keyboard: Stream
  readonly #screen: Stream
  readonly #ended: Promise<void>
  #over = false

  /**
   * Sets the client's terminal to raw mode (what is typed, Ctrl-C too, is a byte for the child, and the child's own terminal makes of
   * it what its modes say), and begins to carry.
   * @param input, output descriptors of the client's terminal, which are this object's to close from now on
   */
  constructor(terminal: Terminal, input: number, output: number) {
    this.#terminal = terminal
    this.#input = input
    this.#modes = terminalModes(input)
    setTerminalModes(input, rawModes(this.#modes))
    this.#keyboard = new Stream(input)
    this.#screen = new Stream(output)
    const [keyboard, screen] = [this.#keyboard.socket, this.#screen.socket]
    keyboard.pipe(terminal, { end: false })
    this.#ended = new Promise((resolve) => terminal.once('close', resolve).once('end', resolve))
    terminal.on('data', (chunk: Buffer) => {
      if (screen.write(chunk)) return
      terminal.pause()
      screen.once('drain', () => terminal.resume())
    })
  }

  /** Of the client's terminal as they were, in base64. */
  get modes(): string {
    return Buffer.from(this.#modes).toString('base64')
  }

  /** The child has ended: resolves when the client's terminal has its last output. */
  async finish(): Promise<void> {
    const shown = this.#ended.then(() => new Promise((resolve) => this.#screen.socket.write('', resolve)))
    const late = new AbortController()
    await Promise.race([shown, sleep(LAST_OUTPUT_MS, undefined, { signal: late.signal }).catch(() => {})])
    late.abort()
    this.#end()
  }

  /** The client has gone: its terminal is given back as it was found, and the child's hangs up. */
  abandon(): void {
    this.#terminal.close()
    this.#end()
  }

  #end(): void {
    if (this.#over) return
    this.#over = true
    try {
      setTerminalModes(this.#input, this.#modes)
    } catch {
      // The terminal itself is gone.
    }
    this.#keyboard.close()
    this.#screen.close()
  }
}

/**
 * A stream over a terminal whose writes wait in memory where the terminal is held up, which those of Node's `WriteStream` do by
 * holding up the whole process.
 */
class Stream {
  readonly socket: ReadStream
  readonly #fd: number
  /** libuv opens a terminal anew, so as not to change the flags that others see, and leaves the descriptor to its owner. */
  readonly #ownsDescriptor: boolean

  constructor(fd: number) {
    this.#fd = fd
    this.socket = new ReadStream(fd)
    this.socket.on('error', () => {})
    const { fd: opened } = (this.socket as unknown as { _handle: { fd: number } })._handle
    this.#ownsDescriptor = opened !== fd
  }

  close(): void {
    this.socket.destroy()
    if (this.#ownsDescriptor) closeSync(this.#fd)
  }
}
