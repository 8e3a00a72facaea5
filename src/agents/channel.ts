/** Connections of agents, as images and engines know them: which process has which socket, and what a fork has in its place. */
import type { AgentRecord } from './protocol.js'

/** A connection of a process of the source to the supervisor. */
export interface SourceChannel {
  readonly pid: number
  /** Of the process's end. */
  readonly inode: number
  readonly agent: AgentRecord
}

/** What a fork has in place of a `SourceChannel`. */
export interface ForkedChannel {
  readonly source: SourceChannel
  /** The process of the fork, by the id that it has outside of its pid namespace. */
  readonly hostPid: number
  /** The same process, and its parent, by the ids that they themselves see; 0 where the parent is in another namespace. */
  readonly pid: number
  readonly ppid: number
  /** Fresh ids of the process's threads, by those in the source. */
  readonly threads: ReadonlyMap<number, number>
  /** Our end of the connection; the taker closes it. */
  readonly fd: number
}
