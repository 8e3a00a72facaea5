/**
 * Whether a program has nothing in hand, as far as that can be seen from outside. What is looked at: the TCP and Unix connections
 * that it has accepted. What cannot be known: jobs from a queue, timers, a transaction with a database, a response that pauses in
 * its middle (it looks like one that is complete), a request that is being worked on although its answer has begun, and of Unix
 * connections (the kernel keeps no times of them) one that was read and has no answer yet. An agent inside the program will know;
 * this only keeps the plain mistakes out.
 */
import { closeSync, readdirSync, readFileSync, readlinkSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import { WarmforkError } from './errors.js'
import type { TcpInfo } from './linux/libc.js'
import { descendants } from './linux/proc.js'
import { quoted, type Template } from './template.js'

const LOOK_AGAIN_MS = 20
/** A connection that was in use so recently is taken to be in use yet. */
const QUIET_MS = 50

const ESTABLISHED = 0x01
const LISTEN = 0x0a

interface TcpSocket {
  readonly state: number
  readonly localPort: number
  readonly remotePort: number
  /** Bytes not yet acknowledged by the other side. */
  readonly unsent: number
  /** Bytes that the program has not read; of a listening socket, connections that it has not accepted. */
  readonly unread: number
  readonly pid: number
  readonly fd: number
}

/**
 * Waits until the template is at rest.
 * @throws NOT_AT_REST that names what is in hand, TEMPLATE_EXITED, or the reason of `signal`
 */
export async function untilAtRest(
  template: Template,
  command: readonly string[],
  timeoutMs: number,
  signal?: AbortSignal,
): Promise<void> {
  const tried = `checkpoint ${quoted(command)}`
  let busy: string | undefined
  let looked = false
  const late = () =>
    new WarmforkError('NOT_AT_REST', {
      tried,
      happened: `after ${timeoutMs} ms it is busy yet: ${busy ?? 'not looked at'}`,
    })
  const wait = async (signal: AbortSignal) => {
    for (;;) {
      const before = looked && busy === undefined
      busy = await whatIsInHand(template.pid)
      // Twice in a row: a connection that is accepted during a look is seen neither in the queue nor among the descriptors.
      if (busy === undefined && before) return
      looked = true
      await sleep(LOOK_AGAIN_MS, undefined, { signal })
    }
  }
  await template.during(wait, { tried, timeoutMs: Math.max(3 * LOOK_AGAIN_MS, timeoutMs), late, signal })
}

export interface LookOptions {
  /** Processes that are not looked at: somebody inside of them knows better. @default none */
  except?: ReadonlySet<number>
  /**
   * The tree stands still. A connection that was in use less than this ago is taken to be in use yet, in milliseconds.
   * @default it runs, and what is seen may be over: 50
   */
  quietMs?: number
}

/** What a process and its descendants have in hand, as a phrase; undefined where they are at rest. */
export async function whatIsInHand(root: number, options: LookOptions = {}): Promise<string | undefined> {
  if (process.platform !== 'linux') return undefined
  const tree = [root, ...descendants(root)].filter((pid) => !options.except?.has(pid))
  return (await tcpInHand(tree, options.quietMs)) ?? unixInHand(tree)
}

async function tcpInHand(tree: readonly number[], quietMs: number | undefined): Promise<string | undefined> {
  const sockets = tree.flatMap(tcpSockets)
  const served = new Set(sockets.filter((socket) => socket.state === LISTEN).map((socket) => socket.localPort))
  for (const socket of sockets) {
    const { state, localPort, remotePort, unread, unsent } = socket
    if (state === LISTEN && unread > 0) return `${unread} connections wait to be accepted on port ${localPort}`
    if (state !== ESTABLISHED || !served.has(localPort)) continue
    const connection = `the connection from port ${remotePort} to port ${localPort}`
    if (unread > 0) return `${connection} has ${unread} bytes that it has not read`
    const activity = await lastActivity(socket)
    // What is sent and not acknowledged yet is the kernel's to deliver; what it has not sent yet may be the part of an answer.
    const bytesUnderWay = quietMs === undefined || !activity ? unsent : activity.bytesNotSent
    if (bytesUnderWay > 0) return `${connection} has ${bytesUnderWay} bytes under way`
    if (activity === undefined) continue
    const { lastDataSentMs: sentMs, lastDataReceivedMs: receivedMs, bytesReceived, bytesAcknowledged } = activity
    // A first request can come in the same tick in which the connection was made.
    const unanswered = receivedMs < sentMs || (bytesReceived > 0n && bytesAcknowledged === 0n && unsent === 0)
    if (unanswered) return `${connection} brought a request that has no answer yet`
    // In the same tick of the kernel's, the answer to one request and the next request cannot be told apart.
    const leastMs = sentMs < receivedMs ? (quietMs ?? QUIET_MS) : QUIET_MS
    if (Math.min(receivedMs, sentMs) < leastMs) return `${connection} was in use less than ${leastMs} ms ago`
  }
  return undefined
}

/** What was sent by one side and not read by the other, on connections that were accepted from outside. */
async function unixInHand(tree: readonly number[]): Promise<string | undefined> {
  const owned = new Set(tree.flatMap((pid) => [...socketDescriptors(pid).keys()].map(Number)))
  if (owned.size === 0) return undefined
  const { unixSockets } = await import('./linux/unix-sockets.js')
  const all = unixSockets()
  const own = [...owned].flatMap((inode) => all.get(inode) ?? [])
  // What a server accepts has the address that it listens at.
  const served = new Set(own.filter(({ state }) => state === LISTEN).map(({ name }) => name))
  for (const { state, name, peer, unread, unsent } of own) {
    if (state === LISTEN && unread > 0) return `${unread} connections wait to be accepted at ${name}`
    if (state !== ESTABLISHED || name === '' || !served.has(name) || owned.has(peer)) continue
    if (unread > 0) return `a connection to ${name} has ${unread} bytes that it has not read`
    if (unsent > 0) return `a connection to ${name} has bytes under way`
  }
  return undefined
}

/** Descriptors of a process that are sockets, by inode. */
function socketDescriptors(pid: number): Map<string, number> {
  const fds = new Map<string, number>()
  try {
    for (const fd of readdirSync(`/proc/${pid}/fd`)) {
      const inode = /^socket:\[(\d+)\]$/.exec(readlinkSync(`/proc/${pid}/fd/${fd}`))?.[1]
      if (inode !== undefined) fds.set(inode, Number(fd))
    }
  } catch {
    // It ends, or closes one of them just now: the next look will tell.
  }
  return fds
}

/** TCP sockets that a process has open, from its descriptors and its network namespace's tables. */
function tcpSockets(pid: number): TcpSocket[] {
  const fds = socketDescriptors(pid)
  if (fds.size === 0) return []
  return ['tcp', 'tcp6'].flatMap((table) => {
    let text: string
    try {
      text = readFileSync(`/proc/${pid}/net/${table}`, 'latin1')
    } catch {
      return []
    }
    return text
      .split('\n')
      .slice(1)
      .flatMap((line) => parseTcpLine(line, pid, fds) ?? [])
  })
}

/** `  0: 0100007F:1F90 0100007F:C350 01 00000000:00000000 00:00000000 00000000 0 0 12345 …`: queues are sent:received, all hexadecimal. */
function parseTcpLine(line: string, pid: number, fds: ReadonlyMap<string, number>): TcpSocket | undefined {
  const [, local, remote, state, queues, , , , , inode] = line.trim().split(/\s+/)
  const fd = fds.get(inode ?? '')
  if (fd === undefined) return undefined
  const port = (address: string) => Number.parseInt(address.slice(address.lastIndexOf(':') + 1), 16)
  const [unsent, unread] = queues!.split(':').map((hex) => Number.parseInt(hex, 16))
  return {
    state: Number.parseInt(state!, 16),
    localPort: port(local!),
    remotePort: port(remote!),
    unsent: unsent!,
    unread: unread!,
    pid,
    fd,
  }
}

/** How long ago a connection last took and gave data; undefined without the right to ask (ptrace), or where it is gone. */
async function lastActivity({ pid, fd }: TcpSocket): Promise<TcpInfo | undefined> {
  const { pidfdGetfd, pidfdOpen, tcpInfo } = await import('./linux/libc.js')
  const opened: number[] = []
  try {
    opened.push(pidfdOpen(pid))
    opened.push(pidfdGetfd(opened[0]!, fd))
    return tcpInfo(opened[1]!)
  } catch {
    return undefined
  } finally {
    for (const each of opened) closeSync(each)
  }
}
