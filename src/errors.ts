/**
 * The one table of errors. Every error that warmfork throws on purpose is a `WarmforkError` with one of
 * these codes; `docs/errors.md` describes each and a test holds the two together. This file knows no other module.
 */

/** Each code with the sentence that says what to do when nothing more exact is known. */
export const ERROR_CODES = {
  BAD_OPTION: 'Correct the option that the message names.',
  NEEDS_AGENT: 'This needs an agent inside the program: docs/agents.md says for which runtimes there is one.',
  AGENT_LOST: 'Let the program answer its agent, or start the supervisor with `agent: false`.',
  HOOK_FAILED: 'Mend the hook of the program that the message names.',
  ENGINE_UNSUPPORTED: 'The engine in use cannot do this; run `warmfork doctor` to see why CRIU is not used.',
  CRIU_MISSING: 'Run `warmfork doctor --install`.',
  CRIU_TOO_OLD: 'Run `warmfork doctor --install` for a CRIU that suits this kernel.',
  CRIU_RIGHTS: 'Run as root, or give criu its four capabilities: `warmfork doctor` says how.',
  INSTALL_FAILED: 'Read the output in the message, mend it and run `warmfork doctor --install` again.',
  TEMPLATE_START_FAILED: 'Check the command, its path and the working directory.',
  TEMPLATE_EXITED: "Run the command by hand; its last output is in the error's `output`.",
  TEMPLATE_NOT_READY: 'Check the `ready` condition, or raise `ready.timeoutMs`.',
  WARMUP_FAILED: 'Check the warm-up; the template itself was ready.',
  NOT_AT_REST: 'Let the template finish what it has in hand, or raise `template.restTimeoutMs`.',
  CHECKPOINT_FAILED: "Read CRIU's lines in the message; docs/limits.md lists what cannot be checkpointed.",
  IMAGE_VERSION: 'The image was written by a CRIU that warmfork does not know; use CRIU 4.1 or newer.',
  IMAGE_TRUNCATED: 'The image is cut short; take the checkpoint again.',
  IMAGE_CORRUPT: 'The image does not decode; take the checkpoint again.',
  IMAGE_UNSUPPORTED: 'The image holds something that cannot be forked; docs/limits.md says what and why.',
  STORE_LOCKED: 'Stop the other supervisor, or choose another `name`.',
  STORE_UNSAFE: 'Make the store owned by the user of the supervisor, with mode 0700.',
  STORE_NOEXEC: 'Put the store on a file system that is mounted without `noexec`.',
  STORE_UNWRITABLE: 'Make the store writable, or choose another `store`.',
  STORE_GONE: 'The store was removed while in use; stop the supervisor and start it again.',
  DISK_FULL: 'Free space on the file system of the store, or run `warmfork prune`.',
  GENERATION_NOT_FOUND: 'List the generations with `warmfork generations`.',
  GENERATION_CORRUPT: 'Prune the generation; the supervisor makes a new one at its next start.',
  GENERATION_MISFIT: 'Start the supervisor cold, so that it makes a generation that fits.',
  PORT_TAKEN: 'End the program that listens at the address that the message names.',
  GENERATION_IN_USE: 'End the children that the message names first.',
  ARCHIVE_INVALID: 'Do not use the archive; get it anew from where it was exported.',
  REFORK_REFUSED: 'Let the program say again that it may be forked, or give another child.',
  TRIAL_FAILED: 'The new generation was discarded, and the one before serves on; see what its first fork did.',
  RESTORE_FAILED: "Read CRIU's lines in the message.",
  PIDS_EXHAUSTED: 'End processes, or raise kernel.pid_max.',
  FDS_EXHAUSTED: 'Raise the limit of open files (ulimit -n) of the supervisor.',
  CRASH_LOOP: 'Children of this generation crash right after the fork; see why, then start the supervisor anew.',
  CHILD_GONE: 'The child has ended; fork another.',
  STOPPED: 'The supervisor is stopped; start another.',
  NO_SUPERVISOR: 'Start one with `warmfork run`, or name the right one with `--name`.',
  TIMEOUT: 'Raise the time-out that the message names, or see what holds the operation up.',
} as const

export type ErrorCode = keyof typeof ERROR_CODES

export interface ErrorDetails {
  /** What was tried, as a phrase: "restore generation 3". */
  tried: string
  /** What happened, as a sentence without the final stop. */
  happened: string
  /** What to do; by default the table's sentence for the code. */
  remedy?: string
  /** The error underneath. */
  cause?: unknown
  /** Output of the program or of criu that belongs to the error, at most its last 64 KiB. */
  output?: string
}

/** The only class of error that warmfork throws on purpose. Match on `code`, not on the message. */
export class WarmforkError extends Error {
  override readonly name = 'WarmforkError'
  readonly code: ErrorCode
  readonly tried: string
  readonly happened: string
  readonly remedy: string
  readonly output?: string

  constructor(code: ErrorCode, details: ErrorDetails) {
    const remedy = details.remedy ?? ERROR_CODES[code]
    super(`${code}: could not ${details.tried}: ${details.happened}. ${remedy}`, { cause: details.cause })
    this.code = code
    this.tried = details.tried
    this.happened = details.happened
    this.remedy = remedy
    if (details.output !== undefined) this.output = details.output
  }

  toJSON(): Record<string, unknown> {
    const { code, message, tried, happened, remedy, output } = this
    return { code, message, tried, happened, remedy, ...(output === undefined ? {} : { output }) }
  }
}

/** The `errno` name of a Node system error (`ENOENT` …), or undefined. */
export function errnoOf(error: unknown): string | undefined {
  const code = (error as NodeJS.ErrnoException | undefined)?.code
  return typeof code === 'string' && /^E[A-Z0-9]+$/.test(code) ? code : undefined
}
