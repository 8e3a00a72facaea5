/**
 * Takes a fork apart from its source: of what two processes cannot have at once it gets one of its own, or its end. It puts the
 * edits for that together; what is wanted of each descriptor, others have decided.
 */
import { type ClosedDescriptor, closeDescriptors } from './edits/closed-descriptors.js'
import { dropPipeData } from './edits/stray-pipes.js'
import { freeUdpPorts } from './edits/udp-ports.js'
import { detachUnixPeers } from './edits/unix-peers.js'
import type { ImageSet } from './image-set.js'
import { OPEN } from './schema.js'

export interface DetachOptions {
  /** Inodes of sockets and pipes that each fork gets from us: left as they are. */
  readonly inherited: ReadonlySet<number>
  /** Inodes of Unix sockets for datagrams that a fork is not to connect anew. */
  readonly disconnected: ReadonlySet<number>
  /** Descriptors that a fork is to have closed. */
  readonly closed: readonly ClosedDescriptor[]
}

export interface Detached {
  /** Where forks connect Unix sockets for datagrams to, as the kernel has the address. */
  readonly reconnected: readonly Uint8Array[]
  /** What was edited, for people. */
  readonly edits: {
    readonly unixConnectionsClosed: number
    readonly unixSocketsReconnected: number
    readonly udpSocketsReconnected: number
    readonly pipesEmptied: number
    readonly descriptorsClosed: number
  }
}

export function detach(set: ImageSet, { inherited, disconnected, closed }: DetachOptions): Detached {
  const descriptorsClosed = closeDescriptors(set, closed)
  const pipesEmptied = dropPipeData(set, new Set(outsidePipes(set).filter((id) => !inherited.has(id))))
  const unix = detachUnixPeers(set, { inherited, disconnected })
  const udpSocketsReconnected = freeUdpPorts(set)
  return {
    reconnected: unix.reconnected,
    edits: {
      unixConnectionsClosed: unix.closed,
      unixSocketsReconnected: unix.reconnected.length,
      udpSocketsReconnected,
      pipesEmptied,
      descriptorsClosed,
    },
  }
}

/** Pipes of which the image has one end. */
function outsidePipes(set: ImageSet): number[] {
  const [READS, WRITES] = [1, 2]
  const ends = new Map<number, number>()
  for (const { pipe } of set.files()) {
    if (!pipe) continue
    const access = pipe.flags & OPEN.ACCMODE
    const has = access === OPEN.RDWR ? READS | WRITES : access === OPEN.WRONLY ? WRITES : READS
    ends.set(pipe.pipeId, (ends.get(pipe.pipeId) ?? 0) | has)
  }
  return [...ends].flatMap(([id, has]) => (has === (READS | WRITES) ? [] : [id]))
}
