/**
 * Our end of a child's stdout or stderr, as a stream. What Node's own socket lacks: when the child has ended, what is left in the
 * pipe is taken over and the descriptor closed, whether or not anybody reads; a program that looks at the first line of each child
 * would run out of descriptors else. It knows a descriptor, and no process.
 */
import { closeSync, constants, openSync, readSync } from 'node:fs'
import { Socket } from 'node:net'
import { Readable } from 'node:stream'

/** No pipe holds more without privilege (`pipe-max-size`); the default is 64 KiB. */
export const PIPE_BYTES = 1024 * 1024
const CHUNK_BYTES = 64 * 1024

/**
 * Takes what is in a pipe now.
 * @returns `ended`: nobody has its other end open any more
 */
export function takeFromPipe(fd: number): { chunks: Buffer[]; ended: boolean } {
  const chunks: Buffer[] = []
  // A description of its own for the same pipe, which does not block whatever the first one does.
  let own: number | undefined
  try {
    own = openSync(`/proc/self/fd/${fd}`, constants.O_RDONLY | constants.O_NONBLOCK)
    for (let size = 0; size < PIPE_BYTES; ) {
      const buffer = Buffer.allocUnsafe(CHUNK_BYTES)
      const length = readSync(own, buffer)
      if (length === 0) return { chunks, ended: true }
      size += length
      chunks.push(buffer.subarray(0, length))
    }
  } catch {
    // EAGAIN: it is empty, and somebody may write yet. (EMFILE: it stays to be read as before.)
  } finally {
    if (own !== undefined) closeSync(own)
  }
  return { chunks, ended: false }
}

export class OutputPipe extends Readable {
  readonly #fd: number
  readonly #socket: Socket
  #over = false

  /** Takes the descriptor over. */
  constructor(fd: number) {
    super()
    this.#fd = fd
    this.#socket = new Socket({ fd, readable: true, writable: false })
    this.#socket.pause()
    this.#socket.on('data', (chunk: Buffer) => {
      if (!this.push(chunk)) this.#socket.pause()
    })
    this.#socket.on('error', () => {})
    this.#socket.once('close', () => this.#finish())
  }

  override _read(): void {
    this.#socket.resume()
  }

  override _destroy(error: Error | null, done: (error?: Error | null) => void): void {
    this.#over = true
    this.#socket.destroy()
    done(error)
  }

  /**
   * The child has ended. Others can hold the other end yet, which is no reason to keep the program alive.
   * @returns false where they do: then it is to be called again
   */
  childEnded(): boolean {
    // A socket that has come to the end by itself has closed the descriptor, which can be another's by now.
    if (this.#over || this.#socket.destroyed) return true
    // What the socket has read already comes first; `read` hands it to the listener above.
    while (this.#socket.read() !== null);
    // What somebody goes on to write waits in the pipe until it is read.
    if (this.readableLength >= PIPE_BYTES) return false
    const { chunks, ended } = takeFromPipe(this.#fd)
    for (const chunk of chunks) this.push(chunk)
    if (ended) this.#finish()
    else this.unref()
    return ended
  }

  unref(): void {
    this.#socket.unref()
  }

  #finish(): void {
    if (this.#over) return
    this.#over = true
    this.push(null)
    this.#socket.destroy()
  }
}
