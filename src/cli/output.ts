/**
 * Writing to the terminal, and to what stands in its place. It knows no subcommand. It writes to the descriptors themselves:
 * to touch `process.stdout` sets O_NONBLOCK on the very pipe that a forked child is to write to, and costs milliseconds.
 */
import { writeSync } from 'node:fs'
import { isatty } from 'node:tty'
import { errnoOf } from '../errors.js'

/** Writes all of it. A reader that has gone away ends the program quietly, as SIGPIPE would. */
function write(fd: 1 | 2, text: string): void {
  let rest = Buffer.from(text)
  while (rest.length > 0) {
    try {
      rest = rest.subarray(writeSync(fd, rest))
    } catch (error) {
      const code = errnoOf(error)
      if (code === 'EPIPE') process.exit(fd === 1 ? 141 : 1)
      if (code !== 'EAGAIN') throw error
      // Somebody else has made the pipe non-blocking, and it is full.
      Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 5)
    }
  }
}

/** One or more lines to stdout. */
export function print(text: string): void {
  write(1, `${text}\n`)
}

/** One or more lines to stderr. */
export function printError(text: string): void {
  write(2, `${text}\n`)
}

/** The one JSON document of a command. */
export function printJson(value: unknown): void {
  print(JSON.stringify(value, null, 2))
}

/** Whether what is written there may have colours: https://no-color.org, and only on a terminal. */
export function hasColours(fd: 1 | 2, env: NodeJS.ProcessEnv = process.env): boolean {
  return !env.NO_COLOR && env.TERM !== 'dumb' && isatty(fd)
}
