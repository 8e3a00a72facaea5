/**
 * The sockets that children accept from: one set for each generation, ours to hand to each fork. Those of a checkpoint are copies of
 * the program's; those of a generation of an earlier supervisor are shared with another generation that has the same address, or
 * made anew. It knows sockets and numbers, and neither images nor forks.
 */
import { closeSync, lstatSync, unlinkSync } from 'node:fs'
import { duplicate } from '../../linux/libc.js'
import { addressKey, bindListeners, type PathOwner, type SharedSocket } from './listening.js'

interface Held {
  /** What tells whether two are at one address. */
  readonly key: string
  readonly fd: number
}

export class SharedSockets {
  /** By generation, and by the inode of the program's socket. */
  readonly #held = new Map<number, Map<number, Held>>()
  /** Paths that were made here: whose they are, and the inode of each. */
  readonly #paths = new Map<string, { readonly key: string; readonly inode: number }>()
  readonly #beforeRemoval: (path: string) => void

  /** `beforeRemoval` is called with each path that was made here and is about to be removed. */
  constructor(beforeRemoval: (path: string) => void) {
    this.#beforeRemoval = beforeRemoval
  }

  /** Takes over the descriptors of a generation that was made here. */
  add(generation: number, sockets: readonly { readonly listener: SharedSocket; readonly fd: number }[]): void {
    this.#held.set(
      generation,
      new Map(sockets.map(({ listener, fd }) => [listener.inode, { key: addressKey(listener), fd }])),
    )
  }

  has(generation: number): boolean {
    return this.#held.has(generation)
  }

  /** Those of a generation by inode, while it is held. */
  of(generation: number): ReadonlyMap<number, number> {
    return new Map([...(this.#held.get(generation) ?? [])].map(([inode, { fd }]) => [inode, fd]))
  }

  /**
   * Has those of a generation that was made elsewhere.
   * @returns paths of Unix sockets that were made
   * @throws PORT_TAKEN, GENERATION_MISFIT
   */
  have(generation: number, listeners: readonly SharedSocket[], owner?: PathOwner): readonly string[] {
    const sockets = new Map<number, Held>()
    const missing: SharedSocket[] = []
    const seen = new Map<string, number>()
    try {
      for (const listener of listeners) {
        const key = addressKey(listener)
        // Where several share an address (SO_REUSEPORT), each stays one of its own.
        const nth = seen.get(key) ?? 0
        seen.set(key, nth + 1)
        const other = this.#find(key, nth)
        if (other === undefined) missing.push(listener)
        else sockets.set(listener.inode, { key, fd: duplicate(other) })
      }
      const made = bindListeners(missing, 'same', owner)
      for (const listener of missing) {
        const key = addressKey(listener)
        sockets.set(listener.inode, { key, fd: made.descriptors.get(listener.inode)! })
        const inode = listener.path === undefined ? undefined : made.paths.get(listener.path)
        if (inode !== undefined) this.#paths.set(listener.path!, { key, inode })
      }
      this.#held.set(generation, sockets)
      return [...made.paths.keys()]
    } catch (error) {
      for (const { fd } of sockets.values()) closeSync(fd)
      throw error
    }
  }

  #find(key: string, nth: number): number | undefined {
    for (const sockets of this.#held.values()) {
      const same = [...sockets.values()].filter((one) => one.key === key)
      if (nth < same.length) return same[nth]!.fd
    }
    return undefined
  }

  /** Closes those of a generation. A path that was made here goes with the last of its socket. */
  release(generation: number): void {
    for (const { fd } of this.#held.get(generation)?.values() ?? []) closeSync(fd)
    this.#held.delete(generation)
    for (const [path, { key, inode }] of this.#paths) {
      if (this.#find(key, 0) !== undefined) continue
      this.#paths.delete(path)
      this.#beforeRemoval(path)
      if (lstatSync(path, { throwIfNoEntry: false })?.ino === inode) unlinkSync(path)
    }
  }

  /** `leavePaths`: somebody serves on them still. */
  close({ leavePaths }: { leavePaths: boolean }): void {
    if (leavePaths) this.#paths.clear()
    for (const generation of [...this.#held.keys()]) this.release(generation)
  }
}
