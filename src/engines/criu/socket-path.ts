/**
 * Keeps the path of a Unix socket that children accept from: many servers remove it when they end, and would take it from
 * their siblings. A hard link beside it holds on to the socket, and the path is made again from it. It knows one path, and
 * nothing of who removes it.
 */
import { type FSWatcher, linkSync, lstatSync, unlinkSync, watch } from 'node:fs'
import { basename, dirname, join } from 'node:path'

/** Whoever puts another socket in place of the old one removes that first: a moment later the path is there again. */
const LOOK_AFTER_MS = 20

export class SocketPath {
  readonly #inode: number
  readonly #watcher: FSWatcher | undefined
  #look: NodeJS.Timeout | undefined
  #remade = false

  private constructor(
    readonly path: string,
    /** The hard link, to be removed should we die. */
    readonly kept: string,
    inode: number,
  ) {
    this.#inode = inode
    this.#watcher = this.#watch()
  }

  /** Undefined where there is no such socket, or no link to it can be made beside it. */
  static keep(path: string): SocketPath | undefined {
    const kept = join(dirname(path), `.${basename(path)}.warmfork-${process.pid}`)
    try {
      const stats = lstatSync(path)
      if (!stats.isSocket()) return undefined
      if (lstatSync(kept, { throwIfNoEntry: false })) unlinkSync(kept)
      linkSync(path, kept)
      return new SocketPath(path, kept, stats.ino)
    } catch {
      return undefined
    }
  }

  /** Makes the path again where it is missing. */
  remake(): void {
    if (lstatSync(this.path, { throwIfNoEntry: false })) return
    try {
      linkSync(this.kept, this.path)
      this.#remade = true
    } catch {
      // Somebody else was faster, or the directory is gone.
    }
  }

  /** Lets go. A path that somebody wanted to be gone goes. */
  close(): void {
    clearTimeout(this.#look)
    this.#watcher?.close()
    if (this.#remade && lstatSync(this.path, { throwIfNoEntry: false })?.ino === this.#inode) remove(this.path)
    remove(this.kept)
  }

  #watch(): FSWatcher | undefined {
    try {
      const name = basename(this.path)
      const watcher = watch(dirname(this.path), { persistent: false }, (_, changed) => {
        if (changed !== name) return
        this.#look ??= setTimeout(() => {
          this.#look = undefined
          this.remake()
        }, LOOK_AFTER_MS).unref()
      })
      watcher.on('error', () => {})
      return watcher
    } catch {
      // No inotify is left: the next fork looks.
      return undefined
    }
  }
}

function remove(path: string): void {
  try {
    unlinkSync(path)
  } catch {
    // It is gone.
  }
}
