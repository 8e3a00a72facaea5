/**
 * Descriptors for a restored child. Its template had pipes, and the child goes on as if it had them still: a Node program has its
 * stdin in an epoll set, where the kernel takes neither regular files nor /dev/null (EPERM); and CRIU opens an inherited
 * pipe anew by /proc, which fails for sockets, and begins to write at the start of a file that others append to. So a pipe or
 * a terminal is passed on as it is; of anything else the child gets a pipe, and this process carries the bytes.
 */
import { closeSync, createReadStream, createWriteStream, fstatSync } from 'node:fs'
import { Socket } from 'node:net'
import type { Readable, Writable } from 'node:stream'
import { setTimeout as sleep } from 'node:timers/promises'
import { isatty } from 'node:tty'
import { WarmforkError } from '../../errors.js'
import { duplicate, isStreamSocket, pipe } from '../../linux/libc.js'
import type { StdioFds } from '../engine.js'

/** How long after the child's end its last output is waited for. What it has started may hold the pipe open for ever. */
const LAST_OUTPUT_MS = 250

interface Output {
  readonly pipe: { read: number; write: number }
  readonly to: number
}

export class Relay {
  /** For the child. */
  readonly fds: StdioFds
  /** Ends of pipes that are the child's alone, to be closed here as soon as it has them. */
  readonly #childEnds: number[] = []
  #input: { pipe: { read: number; write: number }; from: number } | undefined
  readonly #outputs: Output[] = []
  #inputStreams: [Readable, Writable] | undefined
  #written: Promise<unknown> = Promise.resolve()
  readonly #passed: number[] = []
  /** Descriptors that are this object's to close. */
  readonly #open = new Set<number>()

  /**
   * @param stdio its descriptors stay the caller's: this object has copies. Throws BAD_OPTION for a socket that cannot be read and
   * written as a stream (datagrams); FDS_EXHAUSTED by way of EMFILE.
   */
  constructor(stdio: StdioFds) {
    for (const fd of stdio) checkStream(fd)
    try {
      this.fds = stdio.map((fd, stream) => {
        const copy = duplicate(fd)
        this.#open.add(copy)
        return isPipeOrTerminal(fd) ? this.#pass(copy) : this.#replace(copy, stream)
      }) as unknown as StdioFds
    } catch (error) {
      this.cancel()
      throw error
    }
  }

  /** The child has its descriptors: the bytes begin to move. */
  begin(): void {
    for (const fd of [...this.#passed, ...this.#childEnds]) this.#close(fd)
    // What is open from here on belongs to streams, which close it.
    this.#open.clear()
    if (this.#input) {
      const source = readerOf(this.#input.from)
      const sink = new Socket({ fd: this.#input.pipe.write, readable: false, writable: true })
      this.#inputStreams = [source, sink]
      void carry(source, sink).then(() => sink.end())
    }
    this.#written = Promise.all(
      this.#outputs.map(async ({ pipe: { read }, to }) => {
        const sink = writerOf(to)
        await carry(new Socket({ fd: read, readable: true, writable: false }), sink)
        // Not ended: that would shut down a socket which others share.
        sink.destroy()
      }),
    ).catch(() => {})
  }

  /** No child came of it. */
  cancel(): void {
    for (const fd of this.#open) this.#close(fd)
  }

  /** The child has ended: resolves when its last output is where it should be. */
  async finish(): Promise<void> {
    for (const stream of this.#inputStreams ?? []) stream.destroy()
    const late = new AbortController()
    await Promise.race([this.#written, sleep(LAST_OUTPUT_MS, undefined, { signal: late.signal }).catch(() => {})])
    late.abort()
  }

  #close(fd: number): void {
    if (this.#open.delete(fd)) closeSync(fd)
  }

  #makePipe(): { read: number; write: number } {
    const made = pipe()
    this.#open.add(made.read).add(made.write)
    return made
  }

  #pass(fd: number): number {
    this.#passed.push(fd)
    return fd
  }

  #replace(fd: number, stream: number): number {
    if (stream === 0) {
      const made = this.#makePipe()
      this.#input = { pipe: made, from: fd }
      this.#childEnds.push(made.read)
      return made.read
    }
    // Both in one pipe where both go to one file (`2>&1`), so that their order is kept.
    const same = this.#outputs.find(({ to }) => isSameFile(to, fd))
    if (same) {
      this.#close(fd)
      return same.pipe.write
    }
    const made = this.#makePipe()
    this.#outputs.push({ pipe: made, to: fd })
    this.#childEnds.push(made.write)
    return made.write
  }
}

/** Node makes streams of TCP and Unix stream sockets only. */
function checkStream(fd: number): void {
  if (!fstatSync(fd).isSocket() || isStreamSocket(fd)) return
  throw new WarmforkError('BAD_OPTION', {
    tried: 'fork',
    happened: `expected \`stdio\` to be files, pipes, terminals or stream sockets, got a socket of another type (descriptor ${fd})`,
    remedy: 'Give the child a pipe, and carry the datagrams yourself.',
  })
}

function isPipeOrTerminal(fd: number): boolean {
  return fstatSync(fd).isFIFO() || isatty(fd)
}

function isSameFile(one: number, other: number): boolean {
  const [a, b] = [fstatSync(one, { bigint: true }), fstatSync(other, { bigint: true })]
  return a.ino === b.ino && a.dev === b.dev
}

function readerOf(fd: number): Readable {
  return fstatSync(fd).isSocket() ? new Socket({ fd, readable: true, writable: false }) : createReadStream('', { fd })
}

/** Writes go where the descriptor stands, which is the end of the file where it is open for appending. */
function writerOf(fd: number): Writable {
  return fstatSync(fd).isSocket() ? new Socket({ fd, readable: false, writable: true }) : createWriteStream('', { fd })
}

/** Carries bytes until one side ends. A sink that fails ends the source, so that the child sees a broken pipe. */
async function carry(source: Readable, sink: Writable): Promise<void> {
  source.on('error', () => {})
  sink.on('error', () => source.destroy())
  try {
    for await (const chunk of source) {
      // A destroyed sink calls back with an error.
      await new Promise<void>((resolve, reject) => {
        sink.write(chunk, (error) => (error ? reject(error) : resolve()))
      })
    }
  } catch {
    // One of them was destroyed.
  } finally {
    source.destroy()
  }
}
