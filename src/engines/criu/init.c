/*
 * Starts a criu in a pid namespace of its own, with a first process that stays: what criu restores there keeps the ids
 * that it had. It knows namespaces and processes, and nothing of forks, images or pools. A static binary without libc.
 *
 *   warmfork-init CONTROL CRIU ROOT COMMAND...
 *   warmfork-init enter PID COMMAND...   runs a command in the pid and mount namespaces of a process, and ends as it ends
 *
 * CONTROL: a descriptor, one end of a stream socket pair. The ids of the first process and of criu, as the starter sees
 *   them, are written to it (two 32-bit numbers; the second is -errno where criu could not be started). Then one byte
 *   is awaited: the tree is restored. Its end without that byte ends the namespace, and with it all that is in there.
 * CRIU: the id of criu inside; further ones follow on it. It is none of those that are restored.
 * ROOT: the id of the root of what is restored, inside.
 *
 * Three processes come of it, each a child of the starter (CLONE_PARENT), so that the starter reads all exit statuses
 * itself: this one, which ends at once; the first of the namespace, which waits until it is alone; and criu, whose own
 * `restore_sibling` gives the restored root to the starter as well. Outside they have ids like any other process.
 */
#include "../../shim/syscall.h"

DEFINE_START;

enum {
  CLONE_NEWNS_ = 0x20000,
  CLONE_PARENT_ = 0x8000,
  CLONE_NEWPID_ = 0x20000000,
  MS_NOSUID_NODEV_NOEXEC_ = 2 | 4 | 8,
  MS_REC_SLAVE_ = 0x4000 | 1 << 19,
  POLLIN_ = 1,
  SIGCHLD_ = 17,
  SIGKILL_ = 9,
  PR_SET_PDEATHSIG_ = 1,
  WNOHANG_WALL_ = 1 | 0x40000000,
  PATH_BYTES = 4096,
  LOOK_AGAIN_MS = 1000,
};

static void write_words(const char *words) { raw(SYS_write, 2, (long)words, (long)length_of(words), 0, 0, 0); }

static char *put_number(char *to, long number) {
  char digits[24];
  int n = 0;
  do digits[n++] = (char)('0' + number % 10);
  while (number /= 10);
  while (n) *to++ = digits[--n];
  *to = 0;
  return to;
}

static long parse_number(const char *text) {
  long number = 0;
  while (*text >= '0' && *text <= '9') number = number * 10 + (*text++ - '0');
  return number;
}

static long fail(const char *tried, long error) {
  char number[24];
  put_number(number, -error);
  write_words("warmfork-init: could not ");
  write_words(tried);
  write_words(" (errno ");
  write_words(number);
  write_words(")\n");
  return error;
}

/* ---- the first process of the namespace ------------------------------------------------------------------------ */

struct poll {
  int fd;
  short events, seen;
};

static void reap(long signals) {
  char record[128];
  raw(SYS_read, signals, (long)record, sizeof record, 0, 0, 0);
  while (raw(SYS_wait4, -1, 0, WNOHANG_WALL_, 0, 0, 0) > 0) {
  }
}

/* Waits for `fd` to be readable, and takes in orphans meanwhile. */
static void await_readable(long fd, long signals) {
  struct poll both[2] = {{(int)fd, POLLIN_, 0}, {(int)signals, POLLIN_, 0}};
  for (;;) {
    both[0].seen = both[1].seen = 0;
    long ready = raw(SYS_poll, (long)both, 2, -1, 0, 0, 0);
    if (ready <= 0) continue;
    if (both[1].seen) reap(signals);
    if (both[0].seen) return;
  }
}

/*
 * Signals from inside that have no handler do not reach it. It ends when the root has ended and nobody else is there: the
 * root is not its child, so that it is looked for.
 */
static int keep(long control, long root) {
  if (control > 0) raw(SYS_close_range, 0, control - 1, 0, 0, 0, 0);
  raw(SYS_close_range, control + 1, 0xffffffffL, 0, 0, 0, 0);
  raw(SYS_chdir, (long)"/", 0, 0, 0, 0, 0);
  raw(SYS_setsid, 0, 0, 0, 0, 0, 0);
  uint64_t child_ended = 1ULL << (SIGCHLD_ - 1);
  raw(SYS_rt_sigprocmask, 0, (long)&child_ended, 0, 8, 0, 0);
  long signals = raw(SYS_signalfd4, -1, (long)&child_ended, 8, O_CLOEXEC_ | 04000, 0, 0);
  if (failed(signals)) return 1;
  char byte;
  await_readable(control, signals);
  if (raw(SYS_read, control, (long)&byte, 1, 0, 0, 0) != 1) return 1;
  raw(SYS_close, control, 0, 0, 0, 0, 0);
  long pidfd = raw(SYS_pidfd_open, root, 0, 0, 0, 0, 0);
  if (!failed(pidfd)) await_readable(pidfd, signals);
  /* A zombie is there until its parent has read its status: of that the kernel tells nobody else. */
  for (int pause = 5; raw(SYS_kill, -1, 0, 0, 0, 0, 0) != -ESRCH_; pause = pause * 2 < LOOK_AGAIN_MS ? pause * 2 : LOOK_AGAIN_MS) {
    struct poll orphans = {(int)signals, POLLIN_, 0};
    if (raw(SYS_poll, (long)&orphans, 1, pause, 0, 0, 0) > 0) reap(signals);
  }
  return 0;
}

/* ---- criu ------------------------------------------------------------------------------------------------------ */

/* criu has helpers, whose ids follow on the last one that was given: those of the image may be low. */
static void set_last_id(long id) {
  long fd = raw(SYS_openat, AT_FDCWD_, (long)"/proc/sys/kernel/ns_last_pid", O_CLOEXEC_ | 1, 0, 0, 0);
  if (failed(fd)) return;
  char number[24];
  char *end = put_number(number, id);
  raw(SYS_write, fd, (long)number, end - number, 0, 0, 0);
  raw(SYS_close, fd, 0, 0, 0, 0, 0);
}

/* execvp; returns -errno. */
static long execute(char **command, char **environment) {
  const char *path = "/usr/sbin:/usr/bin:/sbin:/bin";
  for (char **one = environment; *one; one++)
    if (same_bytes(*one, "PATH=", 5)) path = *one + 5;
  for (const char *at = command[0]; *at; at++)
    if (*at == '/') return raw(SYS_execve, (long)command[0], (long)command, (long)environment, 0, 0, 0);
  size_t name = length_of(command[0]);
  for (;;) {
    size_t length = 0;
    while (path[length] && path[length] != ':') length++;
    char file[PATH_BYTES];
    if (length + name + 2 <= sizeof file) {
      copy_bytes(file, path, length);
      file[length] = '/';
      copy_bytes(file + length + 1, command[0], name + 1);
      raw(SYS_execve, (long)file, (long)command, (long)environment, 0, 0, 0);
    }
    if (!path[length]) return -ENOENT_;
    path += length + 1;
  }
}

static int restore(long control, long id, char **command, char **environment) {
  raw(SYS_close, control, 0, 0, 0, 0, 0);
  raw(SYS_setpgid, 0, 0, 0, 0, 0, 0);
  /* What the machine mounts later is seen here too, and nothing of ours outside. */
  long result = raw(SYS_mount, 0, (long)"/", 0, MS_REC_SLAVE_, 0, 0);
  if (failed(result)) return fail("part the mounts from the machine's", result), 1;
  result = raw(SYS_mount, (long)"proc", (long)"/proc", (long)"proc", MS_NOSUID_NODEV_NOEXEC_, 0, 0);
  if (failed(result)) return fail("mount /proc", result), 1;
  set_last_id(id);
  fail("execute criu", execute(command, environment));
  return 127;
}

/* ---- a command in the namespaces of another -------------------------------------------------------------------- */

static long enter(const char *pid, const char *kind) {
  char path[64] = "/proc/";
  size_t length = length_of(pid);
  if (length > 12) return -EINVAL_;
  copy_bytes(path + 6, pid, length);
  copy_bytes(path + 6 + length, kind, length_of(kind) + 1);
  long fd = raw(SYS_openat, AT_FDCWD_, (long)path, O_CLOEXEC_, 0, 0, 0);
  if (failed(fd)) return fd;
  long result = raw(SYS_setns, fd, 0, 0, 0, 0, 0);
  raw(SYS_close, fd, 0, 0, 0, 0, 0);
  return result;
}

static int run_inside(const char *pid, char **command, char **environment) {
  /* /proc is the namespace's own once the mounts are. */
  long result = enter(pid, "/ns/pid");
  if (!failed(result)) result = enter(pid, "/ns/mnt");
  if (failed(result)) return fail("enter the namespaces of a process", result), 1;
  long child = raw(SYS_clone, SIGCHLD_, 0, 0, 0, 0, 0);
  if (failed(child)) return fail("start a process in a pid namespace", child), 1;
  if (child == 0) {
    raw(SYS_prctl, PR_SET_PDEATHSIG_, SIGKILL_, 0, 0, 0, 0);
    fail("execute the command", execute(command, environment));
    return 127;
  }
  int status = 0;
  while (raw(SYS_wait4, child, (long)&status, 0x40000000, 0, 0, 0) == -EINTR_) {
  }
  return status & 0x7f ? 128 + (status & 0x7f) : status >> 8 & 0xff;
}

__attribute__((used)) int begin(long count, char **arguments) {
  if (count >= 4 && same_text(arguments[1], "enter"))
    return run_inside(arguments[2], arguments + 3, arguments + count + 1);
  if (count < 5) {
    write_words("usage: warmfork-init CONTROL CRIU ROOT COMMAND..., started by a supervisor\n");
    return 2;
  }
  long control = parse_number(arguments[1]), criu = parse_number(arguments[2]), root = parse_number(arguments[3]);
  long result = raw(SYS_unshare, CLONE_NEWPID_ | CLONE_NEWNS_, 0, 0, 0, 0, 0);
  if (failed(result)) return fail("make a pid namespace", result), 1;
  long first = raw(SYS_clone, CLONE_PARENT_, 0, 0, 0, 0, 0);
  if (failed(first)) return fail("start the first process of a pid namespace", first), 1;
  if (first == 0) return keep(control, root);
  int ids[] = {(int)criu};
  struct {
    uint64_t flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid, set_tid_size, cgroup;
  } call = {.flags = CLONE_PARENT_, .set_tid = (uint64_t)(size_t)ids, .set_tid_size = 1};
  result = raw(SYS_clone3, (long)&call, sizeof call, 0, 0, 0, 0);
  if (result == 0) return restore(control, criu, arguments + 4, arguments + count + 1);
  if (failed(result)) fail("start criu in a pid namespace", result);
  int answer[] = {(int)first, (int)result};
  raw(SYS_write, control, (long)answer, sizeof answer, 0, 0, 0);
  return 0;
}
