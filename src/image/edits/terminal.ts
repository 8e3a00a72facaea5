/**
 * The terminal: each fork of a program on a pty gets a pty of its own. The dump is told that the terminal belongs to the outside,
 * and CRIU takes a descriptor in its place (`--inherit-fd`), makes it the controlling terminal of the session's leader and gives it
 * modes, size and foreground group as the image has them. It hands out one descriptor for one key, though, the same open file
 * description each time, and keeps that one's flags: a Node program, which opens its terminal once more without blocking, would
 * block. So each description gets a key of its own here.
 */
import type { ImageSet } from '../image-set.js'
import { OPEN, TtyInfoEntry } from '../schema.js'

/** One open file description of the terminal. */
export interface InheritedTerminal {
  /** CRIU's key for `--inherit-fd`. */
  key: string
  /** Access mode and O_NONBLOCK, as for `open`. */
  flags: number
}

/** CRIU's type of a terminal that was named with `--external`. */
const EXTERNAL = 5

/** Edits the image's terminals; returns what has to be handed in at each restore. */
export function inheritTerminal(set: ImageSet): InheritedTerminal[] {
  if (!set.has('tty-info.img')) return []
  const infos = set.all('tty-info.img', TtyInfoEntry)
  const groups = new Set(set.processes().map(({ pgid }) => pgid))
  const flags = new Map(set.files().flatMap(({ tty }) => (tty ? [[tty.infoId, tty.flags] as const] : [])))
  const inherited: InheritedTerminal[] = []
  for (const info of infos) {
    if (info.type !== EXTERNAL) continue
    // CRIU makes the key of these two numbers, and uses them for nothing else. No terminal has major number 0.
    info.rdev = inherited.length + 1
    info.dev = 0
    inherited.push({
      key: `tty[${info.rdev.toString(16)}:0]`,
      flags: (flags.get(info.id) ?? OPEN.RDWR) & (OPEN.ACCMODE | OPEN.NONBLOCK),
    })
    // A group that has ended cannot be in the foreground again.
    if (info.sid !== 0 && !groups.has(info.pgrp)) info.pgrp = info.sid
  }
  if (inherited.length > 0) set.put('tty-info.img', TtyInfoEntry, infos)
  return inherited
}
