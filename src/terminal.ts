/**
 * Our end of a pty: what its program shows, as a stream, and what is typed to it. It knows a descriptor, and no process.
 */
import { closeSync } from 'node:fs'
import { Duplex } from 'node:stream'
import { ReadStream } from 'node:tty'
import { duplicate, setNonblocking } from './linux/libc.js'
import { setWindowSize, takeFromMaster, type WindowSize, windowSize } from './linux/pty.js'

export type TerminalSize = WindowSize

/**
 * A terminal, from the side of who sits at it: reading gives what the program shows, and a write is typed. What nobody reads stays in
 * the pty, and a program that shows more than some KiB waits until somebody reads. `end()` types nothing: for an end of file, type
 * `\x04`; to hang up, call `close()`.
 */
export class Terminal extends Duplex {
  readonly #fd: number
  /** Made when somebody reads or writes: a parked child costs a descriptor, and no handle of the event loop. */
  #socket: ReadStream | undefined
  #over = false

  /** Takes the master's descriptor over. @internal */
  constructor(master: number) {
    super({ allowHalfOpen: true, emitClose: true })
    this.#fd = master
    // A program that has ended reads nothing, which is no reason to crash.
    this.on('error', () => {})
  }

  /** Columns and rows as they are now; 0 where it is closed. */
  get size(): TerminalSize {
    return this.#closed ? { columns: 0, rows: 0 } : windowSize(this.#fd)
  }

  /** Where that is another size, the program in the foreground gets SIGWINCH. Nothing happens where it is closed. */
  resize(columns: number, rows: number): void {
    if (!this.#closed) setWindowSize(this.#fd, { columns, rows })
  }

  /** Hangs up: the program gets SIGHUP, and its next read an end of file. */
  close(): void {
    this.destroy()
  }

  override _read(): void {
    if (!this.#over) this.#open().resume()
  }

  override _write(chunk: Buffer, _encoding: BufferEncoding, done: (error?: Error | null) => void): void {
    if (this.#over) done()
    else this.#open().write(chunk, (error) => done(this.#over ? null : error))
  }

  override _destroy(error: Error | null, done: (error?: Error | null) => void): void {
    this.#shut()
    done(error)
  }

  /**
   * The program has ended: takes over what is left in the pty, and closes it.
   * @internal
   */
  programEnded(): void {
    if (this.#over) return
    // What the socket has read already comes first; `read` hands it to the listener.
    while (this.#socket && this.#socket.read() !== null);
    if (!this.#closed) for (const chunk of takeFromMaster(this.#fd).chunks) this.push(chunk)
    this.#finish()
  }

  /**
   * The same terminal for somebody else, who finds nothing of what was shown so far: this one is over. (A stream that was read once
   * would not flow for the next listener.)
   * @internal
   */
  handOver(): Terminal {
    if (this.#closed) return this
    const fd = duplicate(this.#fd)
    this.close()
    takeFromMaster(fd)
    return new Terminal(fd)
  }

  unref(): void {
    this.#socket?.unref()
  }

  /** A socket that has come to the end by itself has closed the descriptor before it says so. */
  get #closed(): boolean {
    return this.#over || this.#socket?.destroyed === true
  }

  #open(): ReadStream {
    if (this.#socket) return this.#socket
    setNonblocking(this.#fd, true)
    const socket = new ReadStream(this.#fd)
    socket.pause()
    socket.on('data', (chunk: Buffer) => {
      if (!this.push(chunk)) socket.pause()
    })
    // EIO is how a master tells that nobody has the slave open any more.
    socket.on('error', () => {})
    socket.once('close', () => this.#finish())
    this.#socket = socket
    return socket
  }

  #finish(): void {
    if (this.#over) return
    this.#shut()
    this.push(null)
    this.end()
  }

  #shut(): void {
    if (this.#over) return
    this.#over = true
    if (this.#socket) this.#socket.destroy()
    else closeSync(this.#fd)
  }
}
