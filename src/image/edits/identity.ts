/**
 * Identity: a fork gets process and thread ids of its own. CRIU restores any id that the image names, so the image is
 * renamed; but C libraries and Go's runtime remember thread ids in memory, and those must say the new ids before the
 * first instruction runs. Each place is checked to hold the old id.
 */
import type { AddressSpace } from '../address-space.js'
import { unsupported } from '../failure.js'
import type { ImageSet } from '../image-set.js'
import { PAGE } from '../pagemap.js'
import { FileEntry, type PstreeEntry, TtyInfoEntry } from '../schema.js'

/** Where a thread's id stands in memory. */
export interface IdPlace {
  threadId: number
  address: bigint
  width: 4 | 8
  runtime: 'glibc' | 'musl' | 'go'
}

/**
 * x86-64: glibc keeps the thread id 0x2d0 bytes behind its thread pointer (`struct pthread`, `tid`), and a pointer to the
 * thread pointer itself 0x10 behind it (`self`). Up to 2.42 the kernel clears that very id at the thread's end; from 2.43
 * on it clears another field, the thread's `joinstate`.
 */
const GLIBC_TID_OFFSET = 0x2d0n
const GLIBC_SELF_OFFSET = 0x10n
/** x86-64: musl keeps the thread id 0x30 bytes behind its thread pointer (`struct pthread`, `tid`). */
const MUSL_TID_OFFSET = 0x30n
/** Go on x86-64: the pointer to g stands 8 bytes before the thread pointer, g's pointer to m at offset 48. */
const GO_G_OFFSET = -8n
const GO_M_OFFSET = 48n
/** `m.procid` lies near the start of m (72 in Go 1.19); its offset changes with Go's versions. */
const GO_M_SEARCHED_BYTES = 128

const pageOf = (address: bigint) => address & ~BigInt(PAGE - 1)

/**
 * Every place in a process's memory that remembers one of its thread ids. Throws IMAGE_UNSUPPORTED where a process keeps an
 * id nowhere that is known, unless `keepsIds` says that its ids stay as they are.
 */
export function findIdPlaces(set: ImageSet, process: PstreeEntry, memory: AddressSpace, keepsIds = false): IdPlace[] {
  const places: IdPlace[] = []
  for (const threadId of process.threads) {
    const found = placesOfThread(set, threadId, memory)
    const core = set.core(threadId)
    if (!keepsIds && found.length === 0 && (process.threads.length > 1 || core.x86?.clearTidAddr)) {
      throw unsupported(
        `give thread ${threadId} of process ${process.pid} (${core.thread?.comm ?? core.task?.comm}) an id of its own`,
        'its C library or runtime is none of glibc, musl and Go, or keeps the id elsewhere',
        "Set `identity: 'namespace'`, with which forks keep their ids; docs/identity.md says what that means.",
      )
    }
    places.push(...found)
  }
  return places
}

function placesOfThread(set: ImageSet, threadId: number, memory: AddressSpace): IdPlace[] {
  const x86 = set.core(threadId).x86
  if (!x86) throw unsupported('give a thread an id of its own', 'the image is not of an x86-64 process')
  const found: IdPlace[] = []
  const { clearTidAddr, registers } = x86
  const { fsBase } = registers
  const glibc = fsBase + GLIBC_TID_OFFSET
  const musl = fsBase + MUSL_TID_OFFSET
  const holdsId = (address: bigint) => memory.readInt32(address) === threadId
  const isGlibc = fsBase !== 0n && memory.readUint64(fsBase + GLIBC_SELF_OFFSET) === fsBase && holdsId(glibc)
  const isMusl = fsBase !== 0n && !isGlibc && clearTidAddr !== glibc && holdsId(musl)
  if (clearTidAddr !== 0n && holdsId(clearTidAddr)) {
    // In musl the kernel clears a lock of the list of threads there, which names its holder for a moment now and then.
    found.push({ threadId, address: clearTidAddr, width: 4, runtime: isMusl ? 'musl' : 'glibc' })
  }
  if (isGlibc && glibc !== clearTidAddr) found.push({ threadId, address: glibc, width: 4, runtime: 'glibc' })
  if (isMusl && musl !== clearTidAddr) found.push({ threadId, address: musl, width: 4, runtime: 'musl' })
  if (fsBase === 0n) return found
  const go = goProcId(threadId, fsBase, memory)
  if (go !== undefined) found.push({ threadId, address: go, width: 8, runtime: 'go' })
  return found
}

function goProcId(threadId: number, fsBase: bigint, memory: AddressSpace): bigint | undefined {
  const g = memory.readUint64(fsBase + GO_G_OFFSET)
  const m = g ? memory.readUint64(g + GO_M_OFFSET) : undefined
  if (!m) return undefined
  for (let offset = 0; offset < GO_M_SEARCHED_BYTES; offset += 8) {
    const address = m + BigInt(offset)
    if (memory.readUint64(address) === BigInt(threadId)) return address
  }
  return undefined
}

/** The pages that must stay out of the shared page file, since every fork writes its own ids there. */
export function pagesOf(places: readonly IdPlace[]): bigint[] {
  return [...new Set(places.map(({ address }) => pageOf(address)))].sort((a, b) => (a < b ? -1 : 1))
}

/**
 * All ids that an image's processes and threads have: each needs a fresh one in a fork. So do groups and sessions whose
 * leader has ended, since CRIU makes a short-lived leader of that id. (The root leads a session, so none lies outside.)
 */
export function idsOf(set: ImageSet): number[] {
  const ids = set.processes().flatMap(({ pid, pgid, sid, threads }) => [pid, ...threads, pgid, sid])
  return [...new Set(ids)].filter((id) => id !== 0)
}

const renamed = (ids: ReadonlyMap<number, number>, id: number) => ids.get(id) ?? id

/** The process tree under its new ids. */
export function renamedTree(set: ImageSet, ids: ReadonlyMap<number, number>): PstreeEntry[] {
  return set.processes().map((entry) => ({
    ...entry,
    pid: renamed(ids, entry.pid),
    ppid: renamed(ids, entry.ppid),
    pgid: renamed(ids, entry.pgid),
    sid: renamed(ids, entry.sid),
    threads: entry.threads.map((id) => renamed(ids, id)),
  }))
}

/** Files that carry process ids in their names, in the order of their meaning: `core-7.img` and the like. */
const NAMED_BY_ID =
  /^(core|mm|pagemap|fs|ids|creds|rlimit|signal-s|signal-p|itimers|posix-timers|sigacts|vmas)-(\d+)\.img$/

/** The name of a file under the new ids; itself where it carries no id. */
export function renamedFile(name: string, ids: ReadonlyMap<number, number>): string {
  const match = NAMED_BY_ID.exec(name)
  return match ? `${match[1]}-${renamed(ids, Number(match[2]))}.img` : name
}

/** Whether files of the image name process ids inside, which must be rewritten for each fork. */
export function filesWithIds(set: ImageSet): string[] {
  const ids = new Set(idsOf(set))
  const found: string[] = []
  if (
    set
      .files()
      .some((file) => ownersOf(file).some(({ pid }) => ids.has(pid)) || (file.pidfd && ids.has(file.pidfd.pid)))
  ) {
    found.push('files.img')
  }
  if (
    set.has('tty-info.img') &&
    set.all('tty-info.img', TtyInfoEntry).some(({ sid, pgrp }) => ids.has(sid) || ids.has(pgrp))
  ) {
    found.push('tty-info.img')
  }
  for (const { threads } of set.processes()) {
    for (const id of threads) {
      if (set.core(id).task?.timers?.posix.some(({ notifyThreadId }) => notifyThreadId)) found.push(`core-${id}.img`)
    }
  }
  return found
}

/** Rewrites the ids inside the files that `filesWithIds` names. */
export function renameIdsInside(set: ImageSet, names: readonly string[], ids: ReadonlyMap<number, number>): void {
  for (const name of names) {
    if (name === 'files.img') {
      const files = set.files()
      for (const file of files) {
        for (const owner of ownersOf(file)) owner.pid = renamed(ids, owner.pid)
        if (file.pidfd) file.pidfd.pid = renamed(ids, file.pidfd.pid)
      }
      set.put(name, FileEntry, files)
    } else if (name === 'tty-info.img') {
      const infos = set.all(name, TtyInfoEntry)
      set.put(
        name,
        TtyInfoEntry,
        infos.map((info) => ({ ...info, sid: renamed(ids, info.sid), pgrp: renamed(ids, info.pgrp) })),
      )
    } else {
      const threadId = Number(/^core-(\d+)/.exec(name)![1])
      const core = set.core(threadId)
      for (const timer of core.task?.timers?.posix ?? []) {
        if (timer.notifyThreadId) timer.notifyThreadId = renamed(ids, timer.notifyThreadId)
      }
      set.putCore(threadId, core)
    }
  }
}

/** The signal owners (F_SETOWN) that an open file may carry: any kind can have one. */
function ownersOf(file: FileEntry): { pid: number }[] {
  return Object.values(file).flatMap((kind) =>
    typeof kind === 'object' && 'owner' in kind && kind.owner.pid !== 0 ? [kind.owner] : [],
  )
}
