/**
 * Descriptors that a fork is to have closed, though the source has them open. Were their numbers free, the next file that the
 * program opens would get one, and whoever believes to have the old file would write into the new one, or close it. So such a
 * number stays taken, by a descriptor with which nothing can be done (`O_PATH`): reading and writing give EBADF, as on
 * a closed one, and closing it works.
 */
import { corrupt } from '../failure.js'
import type { ImageSet } from '../image-set.js'
import { FdinfoEntry, FILE_TYPE, FileEntry, IdsEntry, OPEN, type RegularFile } from '../schema.js'

export interface ClosedDescriptor {
  pid: number
  fd: number
}

/** Edits files.img and fdinfo images. Returns how many descriptors are closed; one that is not there any more is none. */
export function closeDescriptors(set: ImageSet, closed: readonly ClosedDescriptor[]): number {
  if (closed.length === 0) return 0
  const byImage = new Map<string, Set<number>>()
  const living = set.processes().filter(({ dead }) => !dead)
  for (const { pid, fd } of closed) {
    if (!living.some((process) => process.pid === pid)) continue
    const image = `fdinfo-${set.one(`ids-${pid}.img`, IdsEntry).filesId}.img`
    if (!set.has(image)) continue
    byImage.set(image, (byImage.get(image) ?? new Set()).add(fd))
  }
  const files = set.files()
  const nothing = nowhere(files)
  const left = new Set<number>()
  let count = 0
  for (const [image, fds] of byImage) {
    const entries = set.all(image, FdinfoEntry).map((entry) => {
      if (!fds.has(entry.fd)) return entry
      count++
      left.add(entry.id)
      return { ...entry, id: nothing.id, type: FILE_TYPE.REG }
    })
    set.put(image, FdinfoEntry, entries)
  }
  if (count === 0) return 0
  const open = new Set(set.descriptors().map(({ entry }) => entry.id))
  const gone = new Set([...left].filter((id) => !open.has(id)))
  for (const { eventpoll } of files) {
    // What is watched is known by its number.
    if (eventpoll) eventpoll.watched = eventpoll.watched.filter(({ fd }) => !isClosed(eventpoll.id, fd))
  }
  set.put('files.img', FileEntry, [
    // A regular file may be mapped, or be the path of another entry: it does no harm there.
    ...files.filter(({ id, regular }) => regular || !gone.has(id)),
    { type: FILE_TYPE.REG, id: nothing.id, regular: nothing },
  ])
  return count

  function isClosed(pollId: number, fd: number): boolean {
    const images = set.descriptors().flatMap(({ image, entry }) => (entry.id === pollId ? [image] : []))
    return images.some((image) => byImage.get(image)?.has(fd))
  }
}

function nowhere(files: readonly FileEntry[]): RegularFile {
  const known = files.find(({ regular }) => regular?.name.startsWith('/'))?.regular
  if (!known) throw corrupt('files.img', 'it has no regular file')
  return {
    id: Math.max(...files.map(({ id }) => id)) + 1,
    flags: OPEN.PATH,
    pos: 0n,
    owner: { uid: 0, euid: 0, signum: 0, pidType: 0, pid: 0 },
    name: '/dev/null',
    buildId: [],
    ...(known.mountId === undefined ? {} : { mountId: known.mountId }),
  }
}
