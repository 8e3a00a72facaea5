/**
 * A pid namespace for one restore: criu is started in it by a tiny first process (init.c), so that what it restores keeps
 * the ids of the image. It knows processes, and nothing of images, generations and children.
 */
import { closeSync, existsSync, readlinkSync, readSync, writeSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { errnoOf, WarmforkError } from '../../errors.js'
import { sendSignal, signalNumber, streamPair, waitChild } from '../../linux/libc.js'
import { children, descendants, isEnding, namespacePid } from '../../linux/proc.js'
import { type ExitStatus, reaper } from '../../linux/reaper.js'
import { spawnProgram } from '../../linux/spawn.js'

const builtInit = fileURLToPath(new URL('../../../native/prebuilt/linux-x64/warmfork-init', import.meta.url))

/** Further ids in the namespace follow on criu's, so that neither its helpers nor what a child starts meets an id of the image. */
const FIRST_ID = 1000

/** A process that is killed and does not end within this time is in an uninterruptible wait. */
const GONE_TIMEOUT_MS = 2_000

export interface NamespaceOptions {
  /** criu, with all its arguments. */
  argv: readonly string[]
  env: Readonly<Record<string, string>>
  /** criu's descriptors from 0 on. */
  fds: readonly number[]
  /** All ids of the image, and the root's. */
  ids: readonly number[]
  rootId: number
}

export class PidNamespace {
  /** Those whose first process has not been reaped. */
  static readonly #all = new Set<PidNamespace>()
  /** Its first process, by the id that it has outside. All that is in the namespace ends with it. */
  readonly init: number
  /** criu, likewise. */
  readonly criu: number
  /** Resolves when the namespace is gone. */
  readonly ended: Promise<unknown>
  #isOver = false
  /** Until the tree is restored. */
  #control: number | undefined

  /** Throws a SystemError (EAGAIN, EMFILE …) or CRIU_RIGHTS. */
  constructor({ argv, env, fds, ids, rootId }: NamespaceOptions) {
    const [mine, its] = streamPair()
    this.#control = mine
    try {
      const command = [builtInit, String(fds.length), String(freeId(ids)), String(rootId), ...argv]
      const starter = spawnProgram(command, env, [...fds, its])
      reaper.watch(starter, { exited: () => {} })
    } catch (error) {
      closeSync(mine)
      throw error
    } finally {
      closeSync(its)
    }
    // It takes some hundred microseconds, of which most is the start of a program.
    const answer = Buffer.alloc(8)
    const length = readSync(mine, answer, 0, answer.length, null)
    const [init, criu] = [answer.readInt32LE(0), answer.readInt32LE(4)]
    if (length < answer.length || criu < 0) {
      closeSync(mine)
      if (length === answer.length) reaper.watch(init, { exited: () => {} })
      throw new WarmforkError('CRIU_RIGHTS', {
        tried: 'fork into a pid namespace',
        happened: `none can be made${criu < 0 ? ` (errno ${-criu})` : ''}`,
        remedy:
          "`identity: 'namespace'` needs CAP_SYS_ADMIN for the supervisor itself: run it as root, or leave `identity` at its default.",
      })
    }
    this.init = init
    this.criu = criu
    PidNamespace.#all.add(this)
    this.ended = new Promise<ExitStatus>((resolve) => {
      reaper.watch(init, {
        exited: (status) => {
          this.#isOver = true
          PidNamespace.#all.delete(this)
          resolve(status)
        },
      })
    })
  }

  /**
   * The ids outside of a restored tree, by those inside; empty where there is no such root. What belonged to a session whose
   * leader has ended is a child of the first process.
   */
  outsideIds(rootId: number): Map<number, number> {
    const root = this.#ours().find((pid) => namespacePid(pid) === rootId)
    return root === undefined
      ? new Map()
      : new Map([root, ...descendants(root), ...descendants(this.init)].map((pid) => [namespacePid(pid) ?? 0, pid]))
  }

  /** Resolves when those that are about to end are reaped. */
  static async settle(): Promise<void> {
    const ending = [...PidNamespace.#all].filter(({ init }) => isEnding(init)).map(({ ended }) => ended)
    if (ending.length > 0) await Promise.race([Promise.all(ending), sleep(GONE_TIMEOUT_MS, undefined, { ref: false })])
  }

  /** Of our own children those that live in the namespace, the youngest first. */
  #ours(): number[] {
    const own = namespaceOf(this.init)
    return children(process.pid)
      .reverse()
      .filter((pid) => pid !== this.init && namespaceOf(pid) === own)
  }

  /** The tree is restored: from here on the namespace is there for as long as something lives in it. */
  keep(): void {
    if (this.#control === undefined) return
    try {
      writeSync(this.#control, '+')
    } catch (error) {
      // Somebody has killed its first process, and all others with it: their exits tell.
      if (errnoOf(error) !== 'EPIPE') throw error
    }
    this.#letGo()
  }

  /** Ends all that is in it. The statuses of those that nobody watches are read here. */
  async end(): Promise<void> {
    const restored = this.#isOver ? [] : this.#ours().filter((pid) => pid !== this.criu)
    this.kill()
    this.#letGo()
    for (const deadline = Date.now() + GONE_TIMEOUT_MS; Date.now() < deadline; await sleep(1)) {
      // The first process ends when all others are gone, those too whose parent is outside.
      for (const pid of restored) if (waitChild(pid).kind === 'none') restored.splice(restored.indexOf(pid), 1)
      if (this.#isOver) return
    }
  }

  /** Kills all that is in it, at once. */
  kill(): void {
    if (!this.#isOver) sendSignal(this.init, signalNumber('SIGKILL'))
  }

  #letGo(): void {
    if (this.#control !== undefined) closeSync(this.#control)
    this.#control = undefined
  }
}

/** Throws CRIU_MISSING where the init was not built. */
export function requireInit(): void {
  if (existsSync(builtInit)) return
  throw new WarmforkError('CRIU_MISSING', {
    tried: 'fork into pid namespaces',
    happened: `${builtInit} is missing`,
    remedy: 'Install the package again, or build it: `node scripts/build-native.mjs`.',
  })
}

/** What is put before a command so that it runs where a process lives; nothing where that is no other pid namespace than ours. */
export function enterNamespaceOf(pid: number): string[] {
  return namespaceOf(pid) === namespaceOf(process.pid) ? [] : [builtInit, 'enter', String(pid)]
}

function namespaceOf(pid: number): string | undefined {
  try {
    return readlinkSync(`/proc/${pid}/ns/pid`)
  } catch {
    return undefined
  }
}

/** An id with a stretch behind it in which no id of the image lies. */
function freeId(ids: readonly number[]): number {
  const ROOM = 1_000
  let candidate = FIRST_ID
  for (const id of [...ids].sort((a, b) => a - b)) {
    if (id > candidate + ROOM) break
    if (id >= candidate) candidate = id + 1
  }
  return candidate
}
