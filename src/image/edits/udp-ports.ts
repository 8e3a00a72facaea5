/**
 * UDP sockets that are connected to somebody: a resolver, a collector of metrics. CRIU would bind each fork's to the source's
 * port, which is taken. A fork sends from a port of its own, which the kernel gives it when it connects, and so gets the answers
 * to what it asks itself.
 */
import type { ImageSet } from '../image-set.js'
import { FileEntry } from '../schema.js'

const SOCK_DGRAM = 2

/** Edits files.img. Returns how many sockets get ports of their own. */
export function freeUdpPorts(set: ImageSet): number {
  const files = set.files()
  let count = 0
  for (const { inet } of files) {
    if (!inet || inet.type !== SOCK_DGRAM || inet.destinationPort === 0 || inet.sourcePort === 0) continue
    inet.sourcePort = 0
    count++
  }
  if (count > 0) set.put('files.img', FileEntry, files)
  return count
}
