/**
 * The preload shim, seen from the supervisor: where it lies, how a template gets it, and whether a process really
 * carries it (a static or setuid program does not, whatever its environment says). It knows no engine and no image.
 */
import {
  closeSync,
  copyFileSync,
  existsSync,
  mkdirSync,
  openSync,
  readSync,
  renameSync,
  rmSync,
  statSync,
} from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { environment, mappings } from '../linux/proc.js'

/** The shim's file name: by it the shim finds itself in `LD_PRELOAD`, so a copy must keep it. */
export const SHIM_NAME = 'libwarmfork-shim.so'

/** A page file's name ends so; the shim gives zeros for what is discarded in mappings of such files. */
export const PAGE_FILE_SUFFIX = '.warmfork-pages'

/** With the value `1` in a template's environment, its TCP sockets get SO_REUSEPORT before they are bound. */
export const REUSEPORT_VARIABLE = 'WARMFORK_REUSEPORT'

/** The loader splits `LD_PRELOAD` at spaces and colons and expands `$`, with no way to escape them. */
const UNFIT_FOR_PRELOAD = /[\s:$]/

/** `src/shim/` and `dist/shim/` lie equally deep. */
const builtShim = fileURLToPath(new URL(`../../native/prebuilt/linux-x64/${SHIM_NAME}`, import.meta.url))

/** Where the built shim lies; undefined where it was not built, or on a platform that it does not exist for. */
export function shimPath(): string | undefined {
  if (process.platform !== 'linux' || process.arch !== 'x64') return undefined
  return existsSync(builtShim) ? builtShim : undefined
}

/**
 * Copies the shim into a directory that the workers' user can read (a package below /root is not) and whose path suits
 * `LD_PRELOAD`. Returns the copy's path, or undefined where there is no shim. A copy in use is replaced by rename.
 */
export function installShim(directory: string): string | undefined {
  const source = shimPath()
  if (source === undefined) return undefined
  mkdirSync(directory, { recursive: true })
  const target = join(directory, SHIM_NAME)
  const temporary = `${target}.${process.pid}.tmp`
  try {
    copyFileSync(source, temporary)
    renameSync(temporary, target)
  } finally {
    rmSync(temporary, { force: true })
  }
  return target
}

/** Why a template cannot get the shim from this path, as a sentence; undefined where it can. */
export function whyNotPreloadable(shim: string | undefined): string | undefined {
  if (process.platform !== 'linux' || process.arch !== 'x64') return 'The preload shim exists for Linux on x64 only.'
  if (shim === undefined)
    return 'The preload shim was not built: run `node scripts/build-native.mjs`, which needs a C compiler.'
  if (UNFIT_FOR_PRELOAD.test(shim))
    return `The loader cannot preload ${shim}: its path holds a space, a colon or a dollar sign.`
  return undefined
}

/**
 * The environment with the shim in `LD_PRELOAD`, after what is there. Last, because its functions end in the kernel: a
 * library of the user's that wraps the same ones (or jemalloc, which calls them) comes first and reaches them through
 * it. Also, the last entry can be taken out again by one byte. Unchanged where the shim cannot be preloaded.
 */
export function preloadEnvironment(
  env: Readonly<Record<string, string>>,
  shim: string | undefined = shimPath(),
): Record<string, string> {
  if (shim === undefined || whyNotPreloadable(shim) !== undefined) return { ...env }
  const others = (env.LD_PRELOAD ?? '').split(/[\s:]+/).filter((entry) => entry !== '' && !isShim(entry))
  return { ...env, LD_PRELOAD: [...others, shim].join(':') }
}

/** Whether the shim is mapped in a process. False also where the process is gone. */
export function carriesShim(pid: number): boolean {
  return (mappings(pid) ?? []).some(({ path }) => isShim(path.replace(/ \(deleted\)$/, '')))
}

/** Why a process runs without the shim, as a sentence; undefined where it carries it, or is gone. */
export function whyWithoutShim(pid: number): string | undefined {
  const maps = mappings(pid)
  if (!maps || maps.some(({ path }) => isShim(path.replace(/ \(deleted\)$/, '')))) return undefined
  const elf = inspectProgram(`/proc/${pid}/exe`)
  if (elf && !elf.interpreter) {
    const kind = elf.go ? 'a static Go program' : 'a static program'
    return `The process is ${kind}, which loads no libraries and so no preload shim.`
  }
  if (elf?.foreign) return 'The program is not for x64, as the preload shim is.'
  if (elf?.setId) return 'The program is setuid or setgid, and the loader ignores LD_PRELOAD for it.'
  const entry = environment(pid)?.find((variable) => variable.startsWith('LD_PRELOAD='))
  const shim = entry
    ?.slice('LD_PRELOAD='.length)
    .split(/[\s:]+/)
    .find(isShim)
  if (shim === undefined) {
    return (
      whyNotPreloadable(shimPath()) ??
      'LD_PRELOAD does not name the shim in the environment that the process was started with: something on the way cleared it.'
    )
  }
  if (!existsSync(`/proc/${pid}/root${shim}`))
    return `The process cannot see ${shim}: it was removed, or lies outside of the root directory of the process.`
  return `The loader did not load ${shim}: the user of the process cannot read it, its file system is mounted noexec, or the process has gained capabilities.`
}

/** Whether a process runs a program built by Go, whose runtime clears the memory that it uses again. */
export function isGoProgram(pid: number): boolean {
  return inspectProgram(`/proc/${pid}/exe`)?.go ?? false
}

/**
 * Whether the shim can look at its own mappings in this process. In a root directory without /proc it cannot, and then
 * it refuses to discard memory (EAGAIN); such a process is restored by copying.
 */
export function seesProc(pid: number): boolean {
  // Not existsSync: access(2) goes by the real user, and a supervisor may have its rights as capabilities only.
  return statSync(`/proc/${pid}/root/proc/stat`, { throwIfNoEntry: false }) !== undefined
}

function isShim(path: string): boolean {
  return path === SHIM_NAME || path.endsWith(`/${SHIM_NAME}`)
}

interface Program {
  /** Whether a loader is named (PT_INTERP): it is what reads LD_PRELOAD. */
  interpreter: boolean
  go: boolean
  setId: boolean
  /** Of another machine or word size. */
  foreign: boolean
}

/** What an ELF file says of itself; undefined where it is none, or cannot be read. */
function inspectProgram(path: string): Program | undefined {
  let fd: number
  try {
    fd = openSync(path, 'r')
  } catch {
    return undefined
  }
  try {
    const read = (position: number, length: number): Buffer => {
      const buffer = Buffer.alloc(length)
      return buffer.subarray(0, readSync(fd, buffer, 0, length, position))
    }
    const head = read(0, 64)
    if (head.length < 64 || head.toString('latin1', 0, 4) !== '\x7fELF') return undefined
    const EM_X86_64 = 62
    const ELFCLASS64 = 2
    const SETID = 0o6000
    const setId = (statSync(path).mode & SETID) !== 0
    const foreign = head[4] !== ELFCLASS64 || head.readUInt16LE(18) !== EM_X86_64
    // Of a foreign one the fields lie elsewhere; nothing more is needed of it.
    if (foreign) return { interpreter: true, go: false, setId, foreign }
    const PT_INTERP = 3
    const programs = tableEntries(read, head.readBigUInt64LE(32), head.readUInt16LE(54), head.readUInt16LE(56))
    const interpreter = programs.some((entry) => entry.readUInt32LE(0) === PT_INTERP)
    const sections = tableEntries(read, head.readBigUInt64LE(40), head.readUInt16LE(58), head.readUInt16LE(60))
    const names = sections[head.readUInt16LE(62)]
    let go = false
    if (names) {
      const text = read(Number(names.readBigUInt64LE(24)), Math.min(Number(names.readBigUInt64LE(32)), 1 << 20))
      const words = text.toString('latin1').split('\0')
      go = words.includes('.go.buildinfo') || words.includes('.note.go.buildid')
    }
    return { interpreter, go, setId, foreign }
  } catch {
    return undefined
  } finally {
    closeSync(fd)
  }
}

function tableEntries(
  read: (position: number, length: number) => Buffer,
  at: bigint,
  size: number,
  count: number,
): Buffer[] {
  const table = read(Number(at), size * count)
  const entries: Buffer[] = []
  for (let i = 0; i + size <= table.length && size > 0; i += size) entries.push(table.subarray(i, i + size))
  return entries
}
