/**
 * Pseudo-terminals, through koffi. A library that starts programs on a pty of its own cannot serve here: criu is handed the slave
 * side by descriptor, once for each time that the program has it open, and starts nothing. It knows descriptors, and no program.
 */
import { closeSync, fchownSync, fstatSync, readSync } from 'node:fs'
import { constants } from 'node:os'
import koffi from 'koffi'
import { duplicate, setNonblocking, systemError } from './libc.js'

const lib = koffi.load(null)

const c = {
  openpt: lib.func('int posix_openpt(int flags)'),
  grantpt: lib.func('int grantpt(int fd)'),
  unlockpt: lib.func('int unlockpt(int fd)'),
  ioctl: lib.func('ioctl', 'int', ['int', 'unsigned long', 'void *']),
  ioctlNumber: lib.func('ioctl', 'int', ['int', 'unsigned long', 'long']),
}

/** As x86-64 and arm64 have them. */
const TCGETS = 0x5401
const TCSETS = 0x5402
const TIOCGWINSZ = 0x5413
const TIOCSWINSZ = 0x5414
const TIOCGPTPEER = 0x5441

const O_RDWR = 0o2
const O_NOCTTY = 0o400
const O_NONBLOCK = 0o4000
const O_CLOEXEC = 0o2000000
const ACCESS_MODE = 0o3

/** The kernel's `struct termios`: 36 bytes; room for a larger one. */
const TERMIOS_BYTES = 64

export interface WindowSize {
  columns: number
  rows: number
}

function check(syscall: string, result: number): number {
  if (result >= 0) return result
  throw systemError(syscall, koffi.errno())
}

/** The master side of a new pty, close-on-exec. Throws a SystemError: ENOSPC where the system has no more of them, EMFILE. */
export function openMaster(): number {
  const master = check('posix_openpt', c.openpt(O_RDWR | O_NOCTTY | O_CLOEXEC))
  check('grantpt', c.grantpt(master))
  check('unlockpt', c.unlockpt(master))
  return master
}

/**
 * The slave side, close-on-exec and with an open file description of its own (TIOCGPTPEER, Linux 4.13: no path is needed).
 * @param flags access mode and O_NONBLOCK of `open`; others are left out
 */
export function openSlave(master: number, flags = O_RDWR): number {
  const kept = flags & (ACCESS_MODE | O_NONBLOCK)
  // With O_CLOEXEC the file itself would seem to have that flag ever after.
  const slave = check('TIOCGPTPEER', c.ioctlNumber(master, TIOCGPTPEER, kept | O_NOCTTY))
  try {
    return duplicate(slave)
  } finally {
    closeSync(slave)
  }
}

/** Makes the slave a user's, so that its programs can open it by its path. Its group stays: that of `write` and `mesg`. */
export function giveSlave(slave: number, uid: number): void {
  const { uid: owner, gid } = fstatSync(slave)
  if (owner !== uid) fchownSync(slave, uid, gid)
}

export function windowSize(fd: number): WindowSize {
  const size = Buffer.alloc(8)
  check('TIOCGWINSZ', c.ioctl(fd, TIOCGWINSZ, size))
  return { rows: size.readUInt16LE(0), columns: size.readUInt16LE(2) }
}

/** Where it differs from the present size, the foreground process group gets SIGWINCH. */
export function setWindowSize(fd: number, { columns, rows }: WindowSize): void {
  const size = Buffer.alloc(8)
  size.writeUInt16LE(rows, 0)
  size.writeUInt16LE(columns, 2)
  check('TIOCSWINSZ', c.ioctl(fd, TIOCSWINSZ, size))
}

/** What `stty` shows, to be set again later. */
export function terminalModes(fd: number): Uint8Array {
  const modes = Buffer.alloc(TERMIOS_BYTES)
  check('TCGETS', c.ioctl(fd, TCGETS, modes))
  return modes
}

/** The same modes with nothing done to what is typed or shown, as `cfmakeraw` makes them: each byte is passed on as it is. */
export function rawModes(modes: Uint8Array): Uint8Array {
  const raw = Buffer.from(modes)
  const [IGNBRK, BRKINT, PARMRK, ISTRIP, INLCR, IGNCR, ICRNL, IXON] = [1, 2, 8, 0x20, 0x40, 0x80, 0x100, 0x400]
  const [ISIG, ICANON, ECHO, ECHONL, IEXTEN] = [1, 2, 8, 0x40, 0x8000]
  const [OPOST, CSIZE, CS8, PARENB] = [1, 0x30, 0x30, 0x100]
  const without = (offset: number, flags: number) => raw.readUInt32LE(offset) & ~flags
  raw.writeInt32LE(without(0, IGNBRK | BRKINT | PARMRK | ISTRIP | INLCR | IGNCR | ICRNL | IXON), 0)
  raw.writeInt32LE(without(4, OPOST), 4)
  raw.writeInt32LE(without(8, CSIZE | PARENB) | CS8, 8)
  raw.writeInt32LE(without(12, ISIG | ICANON | ECHO | ECHONL | IEXTEN), 12)
  // c_cc follows on the four flags and c_line: a read gives what is there, from one byte on.
  const [VTIME, VMIN] = [17 + 5, 17 + 6]
  raw[VTIME] = 0
  raw[VMIN] = 1
  return raw
}

export function setTerminalModes(fd: number, modes: Uint8Array): void {
  check('TCSETS', c.ioctl(fd, TCSETS, Buffer.from(modes)))
}

const CHUNK_BYTES = 64 * 1024

/**
 * What waits to be read at the master, without waiting for more.
 * @returns `ended`: nobody has the slave open any more
 */
export function takeFromMaster(master: number): { chunks: Buffer[]; ended: boolean } {
  const chunks: Buffer[] = []
  setNonblocking(master, true)
  for (;;) {
    const buffer = Buffer.allocUnsafe(CHUNK_BYTES)
    try {
      const length = readSync(master, buffer)
      if (length === 0) return { chunks, ended: true }
      chunks.push(buffer.subarray(0, length))
    } catch (error) {
      // EIO is how a master tells that its slave is closed.
      return { chunks, ended: (error as NodeJS.ErrnoException).errno === -constants.errno.EIO }
    }
  }
}
