/**
 * Starts a program without copying this process first. Node's own spawn forks, which for a large heap takes milliseconds in
 * which the event loop stands still; posix_spawn shares the memory until the program is executed (CLONE_VM and CLONE_VFORK
 * in glibc and musl). Its exit status is read by the reaper, since libuv knows nothing of it.
 */
import { closeSync } from 'node:fs'
import koffi from 'koffi'
import { duplicate, systemError } from './libc.js'

const lib = koffi.load(null)
const posix = {
  spawnp: lib.func(
    'int posix_spawnp(_Out_ int *pid, const char *file, const void *actions, const void *attributes, char **argv, char **envp)',
  ),
  actionsInit: lib.func('int posix_spawn_file_actions_init(void *actions)'),
  actionsDup2: lib.func('int posix_spawn_file_actions_adddup2(void *actions, int from, int to)'),
  actionsDestroy: lib.func('int posix_spawn_file_actions_destroy(void *actions)'),
  attributesInit: lib.func('int posix_spawnattr_init(void *attributes)'),
  attributesFlags: lib.func('int posix_spawnattr_setflags(void *attributes, short flags)'),
  attributesDefault: lib.func('int posix_spawnattr_setsigdefault(void *attributes, const void *signals)'),
  attributesMask: lib.func('int posix_spawnattr_setsigmask(void *attributes, const void *signals)'),
  attributesDestroy: lib.func('int posix_spawnattr_destroy(void *attributes)'),
}

/** sizeof of glibc's and musl's types on 64 bits: posix_spawn_file_actions_t 80, posix_spawnattr_t 336, sigset_t 128. */
const ACTIONS_BYTES = 80
const ATTRIBUTES_BYTES = 336
const SIGSET_BYTES = 128
const POSIX_SPAWN_SETPGROUP = 0x02
const POSIX_SPAWN_SETSIGDEF = 0x04
const POSIX_SPAWN_SETSIGMASK = 0x08

/** Node ignores SIGPIPE and handles others; a program starts with none of that. */
const ALL_SIGNALS = Buffer.alloc(SIGSET_BYTES, 0xff)
const NO_SIGNALS = Buffer.alloc(SIGSET_BYTES)

/**
 * Starts a program, found by PATH, as the leader of a process group of its own (a Ctrl-C at a terminal is not for it);
 * `fds[i]` becomes its descriptor i, and it gets no others (ours are all close-on-exec).
 * Returns its process id. Throws a SystemError: ENOENT, EACCES, EAGAIN, EMFILE.
 */
export function spawnProgram(
  argv: readonly string[],
  env: Readonly<Record<string, string>>,
  fds: readonly number[],
): number {
  const actions = Buffer.alloc(ACTIONS_BYTES)
  const attributes = Buffer.alloc(ATTRIBUTES_BYTES)
  const moved: number[] = []
  posix.actionsInit(actions)
  posix.attributesInit(attributes)
  try {
    const { attributesFlags } = posix
    attributesFlags(attributes, POSIX_SPAWN_SETPGROUP | POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETSIGMASK)
    posix.attributesDefault(attributes, ALL_SIGNALS)
    posix.attributesMask(attributes, NO_SIGNALS)
    // A source that is itself the target of another would be overwritten before its turn.
    const sources = fds.map((fd) => {
      if (fd >= fds.length) return fd
      moved.push(duplicate(fd, fds.length))
      return moved.at(-1)!
    })
    for (const [target, source] of sources.entries()) posix.actionsDup2(actions, source, target)
    const pid = [0]
    const environment = Object.entries(env).map(([key, value]) => `${key}=${value}`)
    const error: number = posix.spawnp(pid, argv[0]!, actions, attributes, [...argv, null], [...environment, null])
    if (error !== 0) throw systemError(`spawn ${argv[0]}`, error)
    return pid[0]!
  } finally {
    posix.actionsDestroy(actions)
    posix.attributesDestroy(attributes)
    for (const fd of moved) closeSync(fd)
  }
}
