/**
 * The pipes of a process that is started here, and the reading of them without taking them away from whoever gets them later.
 * Real pipes, where Node would make socket pairs: programs open `/dev/stdout`, which fails on sockets, and CRIU's `--inherit-fd`
 * names pipes. This file knows no process.
 */
import { EventEmitter } from 'node:events'
import { closeSync, constants, fchownSync, fstatSync, openSync } from 'node:fs'
import { Socket } from 'node:net'
import type { Readable } from 'node:stream'
import { StringDecoder } from 'node:string_decoder'
import type { StdioFds } from './engines/engine.js'
import { errnoOf, WarmforkError } from './errors.js'

/** How much of a program's output is kept for error messages. */
export const OUTPUT_TAIL_BYTES = 64 * 1024

export interface Pipes {
  /** Our ends: to write its stdin, to read its stdout and stderr. */
  readonly ours: StdioFds
  /** Its ends, to be closed here once it has them. */
  readonly theirs: StdioFds
}

/**
 * Three pipes. Undefined on systems where they cannot be made (no pipe2 there): Node's own `'pipe'` has to do.
 * @param owner whose pipes they are: a program that opens `/dev/stdout` needs the right to
 * @throws FDS_EXHAUSTED
 */
export async function makePipes(owner?: { uid: number; gid: number }): Promise<Pipes | undefined> {
  if (process.platform !== 'linux') return undefined
  // Loaded here, since it does not load anywhere else than on Linux.
  const { pipe } = await import('./linux/libc.js')
  const made: { read: number; write: number }[] = []
  try {
    for (let i = 0; i < 3; i++) made.push(pipe())
  } catch (error) {
    for (const { read, write } of made) closeAll([read, write])
    const code = errnoOf(error)
    if (code !== 'EMFILE' && code !== 'ENFILE') throw error
    throw new WarmforkError('FDS_EXHAUSTED', {
      tried: 'make the pipes of a process',
      happened: `pipe2 gave ${code}`,
      cause: error,
    })
  }
  const [stdin, stdout, stderr] = made as [(typeof made)[0], (typeof made)[0], (typeof made)[0]]
  if (owner) for (const { read } of made) fchownSync(read, owner.uid, owner.gid)
  return { ours: [stdin.write, stdout.read, stderr.read], theirs: [stdin.read, stdout.write, stderr.write] }
}

export function closeAll(fds: readonly number[]): void {
  for (const fd of fds) closeSync(fd)
}

/** The inodes by which CRIU names the pipes. */
export function pipeInodes(fds: StdioFds): [bigint, bigint, bigint] {
  return fds.map((fd) => fstatSync(fd, { bigint: true }).ino) as [bigint, bigint, bigint]
}

export type OutputStream = 'stdout' | 'stderr'

/**
 * Reads stdout and stderr as fast as they come, so that a program is never held up by them, and keeps the last 64 KiB. It reads
 * through descriptions of its own: `stop()` leaves the pipes as they are.
 */
export class OutputReader extends EventEmitter<{ chunk: [stream: OutputStream, chunk: Buffer]; end: [] }> {
  /** Settles when both have ended. */
  readonly ended: Promise<void>
  lastOutputAt = Date.now()
  #tail: Buffer[] = []
  #tailBytes = 0
  readonly #streams: [OutputStream, Readable][]
  readonly #own: boolean

  private constructor(streams: [OutputStream, Readable][], own: boolean) {
    super()
    this.#streams = streams
    this.#own = own
    this.ended = Promise.all(
      streams.map(([name, stream]) => {
        stream.on('data', (chunk: Buffer) => this.#take(name, chunk))
        stream.on('error', () => {})
        if (own) (stream as Socket).unref()
        return new Promise<void>((resolve) => stream.once('close', resolve))
      }),
    ).then(() => {})
  }

  /** @param stdout our end of the pipe; it stays open and the caller's */
  static ofPipes(stdout: number, stderr: number): OutputReader {
    const reopen = (fd: number) => {
      const own = openSync(`/proc/self/fd/${fd}`, constants.O_RDONLY | constants.O_NONBLOCK)
      return new Socket({ fd: own, readable: true, writable: false })
    }
    return new OutputReader(
      [
        ['stdout', reopen(stdout)],
        ['stderr', reopen(stderr)],
      ],
      true,
    )
  }

  static ofStreams(stdout: Readable, stderr: Readable): OutputReader {
    return new OutputReader(
      [
        ['stdout', stdout],
        ['stderr', stderr],
      ],
      false,
    )
  }

  /** On a terminal both streams are one. */
  static ofTerminal(terminal: Readable): OutputReader {
    return new OutputReader([['stdout', terminal]], false)
  }

  /** The last 64 KiB as text. */
  get tail(): string {
    return new StringDecoder('utf8').end(Buffer.concat(this.#tail).subarray(-OUTPUT_TAIL_BYTES))
  }

  /** Stops reading. What comes from now on is left in the pipes. */
  stop(): void {
    for (const [, stream] of this.#streams) {
      if (this.#own) stream.destroy()
      else stream.removeAllListeners('data').pause()
    }
  }

  #take(stream: OutputStream, chunk: Buffer): void {
    this.lastOutputAt = Date.now()
    this.#tail.push(chunk)
    this.#tailBytes += chunk.length
    while (this.#tailBytes - this.#tail[0]!.length >= OUTPUT_TAIL_BYTES) this.#tailBytes -= this.#tail.shift()!.length
    this.emit('chunk', stream, chunk)
  }
}
