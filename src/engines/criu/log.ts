/** What of criu's log a person needs: its error lines, without time stamps and source places, in order and once each. */
import { readFileSync } from 'node:fs'

const LINE = /^(?:\(\d+\.\d+\)\s*)?(?:\d+:\s*)?(Error|Warn)\s*\(([^)]*)\):\s*(.*)$/

/** Lines that are there in every run without the rights that nobody needs. */
const HARMLESS = [/Can't setup RLIMIT_NOFILE/, /Some limits? could not be/, /TCP_REPAIR_WINDOW/]

/** At most the last 12 error lines; warnings only where there is no error. */
export function meaningfulLines(log: string): string[] {
  const errors: string[] = []
  const warnings: string[] = []
  for (const line of log.split('\n')) {
    const match = LINE.exec(line.trim())
    if (!match || HARMLESS.some((pattern) => pattern.test(line))) continue
    const list = match[1] === 'Error' ? errors : warnings
    if (!list.includes(match[3]!)) list.push(match[3]!)
  }
  return (errors.length > 0 ? errors : warnings).slice(-12)
}

/** The text of a log file; empty where criu did not get as far as to write one. */
export function readLog(path: string): string {
  try {
    return readFileSync(path, 'utf8')
  } catch {
    return ''
  }
}

/** One sentence for an error's message. */
export function summarize(log: string, otherwise: string): string {
  const lines = meaningfulLines(log)
  return lines.length > 0 ? `criu says: ${lines.join('; ')}` : otherwise
}

/** Why criu failed; `exit` is its status or the signal that ended it. */
export function explain(log: string, exit: string): string {
  const words = summarize(log, '')
  // What a criu says that somebody ends is not why.
  if (exit.startsWith('SIG')) return `criu was ended by ${exit}${words ? ` (${words})` : ''}`
  return words || `criu ended with ${exit} and without a word`
}

/** CRIU's words for "this id is taken": clone3 with set_tid gave EEXIST (17), for a process or for a thread. */
export function isIdCollision(log: string): boolean {
  return /Can't fork for \d+.*File exists|Unable to create a thread: -17\b/.test(log)
}

/** The process id that was taken, where criu says so of one. */
export function takenId(log: string): number | undefined {
  const found = /Can't fork for (\d+).*File exists/.exec(log)
  return found ? Number(found[1]) : undefined
}

/** The same for EAGAIN (11). */
export function isOutOfProcesses(log: string): boolean {
  return /\b(?:Can't fork for \d+|fork): Resource temporarily unavailable|Unable to create a thread: -11\b/.test(log)
}
