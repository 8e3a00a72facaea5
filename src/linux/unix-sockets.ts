/**
 * The Unix sockets of our network namespace, with what /proc does not say: who is connected to whom, and how much waits in each
 * (`sock_diag`, CONFIG_UNIX_DIAG, which CRIU needs too). It knows no process.
 */
import { closeSync } from 'node:fs'
import { receive, send, socket } from './libc.js'

export interface UnixSocketState {
  readonly inode: number
  /** SOCK_STREAM (1), SOCK_DGRAM (2) or SOCK_SEQPACKET (5). */
  readonly type: number
  /** As in the kernel's tcp_states.h: 1 connected, 7 not connected, 10 listening. */
  readonly state: number
  /** Its address: a path, or a name that begins with `@` for an abstract one; empty where it has none. */
  readonly name: string
  /** Inode of the socket that it is connected to; 0 where there is none. */
  readonly peer: number
  /** Bytes to be read; of a listening socket, connections to be accepted. */
  readonly unread: number
  /** Bytes that the other side has not read, with what the kernel needs to keep them. */
  readonly unsent: number
}

const AF_NETLINK = 16
const SOCK_RAW = 3
const NETLINK_SOCK_DIAG = 4
const AF_UNIX = 1
const SOCK_DIAG_BY_FAMILY = 20
const NLM_F_REQUEST_DUMP = 0x301
const NLMSG_ERROR = 2
const NLMSG_DONE = 3
const HEADER_BYTES = 16
const MESSAGE_BYTES = 16
/** Name, peer and lengths of the queues. */
const SHOW = 1 | 4 | 0x10
const ATTRIBUTE = { NAME: 0, PEER: 2, QUEUES: 4 } as const
/** The kernel sends at most 32 KiB at once. */
const BUFFER_BYTES = 64 << 10

/** By inode; empty where the kernel cannot say. */
export function unixSockets(): Map<number, UnixSocketState> {
  const found = new Map<number, UnixSocketState>()
  let fd: number
  try {
    fd = socket(AF_NETLINK, SOCK_RAW, NETLINK_SOCK_DIAG)
  } catch {
    return found
  }
  try {
    send(fd, request())
    const buffer = Buffer.alloc(BUFFER_BYTES)
    for (;;) {
      const answer = buffer.subarray(0, receive(fd, buffer))
      for (let at = 0; at + HEADER_BYTES <= answer.length; ) {
        const length = answer.readUInt32LE(at)
        const type = answer.readUInt16LE(at + 4)
        if (type === NLMSG_DONE || type === NLMSG_ERROR || length < HEADER_BYTES) return found
        const socket = parse(answer.subarray(at + HEADER_BYTES, at + length))
        found.set(socket.inode, socket)
        at += align(length)
      }
      if (answer.length === 0) return found
    }
  } catch {
    return found
  } finally {
    closeSync(fd)
  }
}

const align = (length: number) => (length + 3) & ~3

function request(): Buffer {
  const bytes = Buffer.alloc(HEADER_BYTES + 24)
  bytes.writeUInt32LE(bytes.length, 0)
  bytes.writeUInt16LE(SOCK_DIAG_BY_FAMILY, 4)
  bytes.writeUInt16LE(NLM_F_REQUEST_DUMP, 6)
  bytes.writeUInt8(AF_UNIX, HEADER_BYTES)
  // All states.
  bytes.writeUInt32LE(0xffffffff, HEADER_BYTES + 4)
  bytes.writeUInt32LE(SHOW, HEADER_BYTES + 12)
  return bytes
}

function parse(message: Buffer): UnixSocketState {
  let [name, peer, unread, unsent] = ['', 0, 0, 0]
  for (let at = MESSAGE_BYTES; at + 4 <= message.length; ) {
    const length = message.readUInt16LE(at)
    const value = message.subarray(at + 4, at + length)
    switch (message.readUInt16LE(at + 2)) {
      case ATTRIBUTE.NAME:
        name = value[0] === 0 ? `@${value.toString('utf8', 1)}` : value.toString('utf8').replace(/\0.*$/s, '')
        break
      case ATTRIBUTE.PEER:
        peer = value.readUInt32LE(0)
        break
      case ATTRIBUTE.QUEUES:
        unread = value.readUInt32LE(0)
        unsent = value.readUInt32LE(4)
        break
    }
    if (length < 4) break
    at += align(length)
  }
  return { inode: message.readUInt32LE(4), type: message[1]!, state: message[2]!, name, peer, unread, unsent }
}
