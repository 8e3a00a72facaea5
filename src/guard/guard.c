/*
 * The guard: ends all that a supervisor made when the supervisor goes, also where that is by kill -9. It reads what to
 * end from a pipe whose other end only the supervisor holds; the end of that pipe is the supervisor's end. It knows
 * processes, files and directories, and nothing of forks, images or pools. A static binary without libc.
 *
 *   warmfork-guard TOKEN   0: the pipe to read from, 1: where it answers
 *
 * Lines on 0 (a path is written with \n for a newline and \\ for a backslash):
 *   + PID START   a process of ours, with its start time in clock ticks since the boot
 *   c PID START   one of criu: ended first, so that no new child appears behind our back
 *   x PID START   an id that a restore may give to a process of ours, which starts no earlier than that: half restored, it
 *                 carries no mark, and with criu ended it would go on alone
 *   - PID         no longer ours
 *   ~ PID         this process, its session and its descendants live on
 *   f PATH        a file to unlink at the end
 *   d PATH        a directory to remove at the end, with all in it
 *   e PATH        a directory to remove at the end if it is empty
 *   k PATH        keep it after all
 *   !             answered by `ok`: all lines before it have been read
 * At the end of 0 it sweeps, answers `swept N left M` where somebody still reads, and exits. Until then it only reads.
 */
#include "../shim/syscall.h"

DEFINE_START;

enum {
  SIGHUP_ = 1, SIGINT_ = 2, SIGQUIT_ = 3, SIGKILL_ = 9, SIGPIPE_ = 13, SIGTERM_ = 15, SIGSTOP_ = 19,
  PATH_BYTES = 4096,
  LINE_BYTES = 2 * PATH_BYTES + 16,
  SWEEP_MS = 10000,
  CRIU_MS = 3000,
  PF_EXITING = 4,
};

/* ---- memory: arrays that grow --------------------------------------------------------------------------------- */

struct array {
  char *items;
  size_t count, capacity, size;
};

/* Room for one more item, zeroed; null where there is no memory. */
static void *add(struct array *array) {
  if (array->count == array->capacity) {
    size_t capacity = array->capacity ? array->capacity * 2 : PAGE_BYTES / array->size;
    size_t before = (array->capacity * array->size + PAGE_BYTES - 1) & ~(PAGE_BYTES - 1);
    size_t after = (capacity * array->size + PAGE_BYTES - 1) & ~(PAGE_BYTES - 1);
    long items = before ? raw(SYS_mremap, (long)array->items, (long)before, (long)after, 1, 0, 0)
                        : raw(SYS_mmap, 0, (long)after, 3, 0x22, -1, 0);
    if (failed(items)) return 0;
    array->items = (char *)items;
    array->capacity = capacity;
  }
  void *item = array->items + array->count++ * array->size;
  zero_bytes(item, array->size);
  return item;
}

static void remove_at(struct array *array, size_t i) {
  array->count--;
  if (i != array->count)
    copy_bytes(array->items + i * array->size, array->items + array->count * array->size, array->size);
}

/* ---- what we were told ----------------------------------------------------------------------------------------- */

struct tracked {
  int pid;
  char criu;
  /* It may be there or not; if so, it has started at `start` or later. */
  char expected;
  /* Of a spared one the start time is what it was when we were told; 0 where it was gone. */
  uint64_t start;
};

/* One process of /proc. */
struct process {
  int pid, parent, group, session, threads;
  char state, ours, spared, exited;
  uint64_t start;
};

/* A path in the arena `texts`, by its offset: the arena moves. */
struct path {
  size_t at;
  /* The letter of its line. */
  char kind;
};

static struct array tracked = {.size = sizeof(struct tracked)};
static struct array spared = {.size = sizeof(struct tracked)};
static struct array paths = {.size = sizeof(struct path)};
static struct array texts = {.size = 1};
static struct array processes = {.size = sizeof(struct process)};
/* Never signalled: ourselves, the supervisor, what it descends from. */
static struct array exempt = {.size = sizeof(int)};

/* `WARMFORK_ID_<token>=`, as it stands in an environment. */
static char token_variable[256];
static size_t token_length;

#define EACH(type, name, array) \
  for (type *name = (type *)(array).items; name < (type *)(array).items + (array).count; name++)

/* ---- /proc ----------------------------------------------------------------------------------------------------- */

static char *put_text(char *to, const char *text) {
  while (*text) *to++ = *text++;
  *to = 0;
  return to;
}

static char *put_number(char *to, uint64_t number) {
  char digits[24];
  int n = 0;
  do digits[n++] = (char)('0' + number % 10);
  while (number /= 10);
  while (n) *to++ = digits[--n];
  *to = 0;
  return to;
}

static const char *read_number(const char *from, uint64_t *number) {
  while (*from == ' ') from++;
  int minus = *from == '-';
  if (minus) from++;
  if (*from < '0' || *from > '9') return 0;
  uint64_t n = 0;
  while (*from >= '0' && *from <= '9') n = n * 10 + (uint64_t)(*from++ - '0');
  *number = minus ? -n : n;
  return from;
}

static long open_of(int pid, const char *name) {
  char path[48];
  char *end = put_number(put_text(path, "/proc/"), (uint64_t)pid);
  put_text(put_text(end, "/"), name);
  return raw(SYS_openat, AT_FDCWD_, (long)path, O_CLOEXEC_, 0, 0, 0);
}

/* 1, or 0 where there is no such process. */
static int read_process(int pid, struct process *process) {
  long fd = open_of(pid, "stat");
  if (failed(fd)) return 0;
  char text[512];
  long n = raw(SYS_read, fd, (long)text, sizeof text - 1, 0, 0, 0);
  raw(SYS_close, fd, 0, 0, 0, 0, 0);
  if (n <= 0) return 0;
  text[n] = 0;
  /* The name stands in parentheses and may hold some: the last one ends it. */
  char *at = text + n;
  while (at > text && *at != ')') at--;
  if (at == text) return 0;
  const char *next = at + 2;
  char state = *next++;
  uint64_t fields[20];
  for (int i = 0; i < 20; i++)
    if (!(next = read_number(next, &fields[i]))) return 0;
  *process = (struct process){.pid = pid, .parent = (int)fields[0], .group = (int)fields[1], .session = (int)fields[2],
                              .threads = (int)fields[16], .state = state, .start = fields[18],
                              .exited = (fields[5] & PF_EXITING) && fields[19] == 0};
  return 1;
}

/*
 * A zombie whose other threads still run is not gone. The first process of a pid namespace is, once it has no memory any
 * more: it waits for the zombies of its namespace, for ever where whoever has inherited them does not reap.
 */
static int is_gone(const struct process *process) {
  return process->state == 'X' || ((process->state == 'Z' || process->exited) && process->threads <= 1);
}

/* Whether a process has the token as a whole variable name in the environment that it was started with. */
static int has_token(int pid) {
  if (token_length == 0) return 0;
  long fd = open_of(pid, "environ");
  if (failed(fd)) return 0;
  char text[8192];
  size_t matched = 0;
  int at_start = 1, found = 0;
  while (!found) {
    long n = raw(SYS_read, fd, (long)text, sizeof text, 0, 0, 0);
    if (n == -EINTR_) continue;
    if (n <= 0) break;
    for (long i = 0; i < n && !found; i++) {
      if (at_start && text[i] == token_variable[matched]) {
        found = ++matched == token_length;
      } else {
        at_start = text[i] == 0;
        matched = 0;
      }
    }
  }
  raw(SYS_close, fd, 0, 0, 0, 0, 0);
  return found;
}

static void read_all_processes(void) {
  processes.count = 0;
  long fd = raw(SYS_openat, AT_FDCWD_, (long)"/proc", O_CLOEXEC_ | O_DIRECTORY_, 0, 0, 0);
  if (failed(fd)) return;
  static char buffer[32768] __attribute__((aligned(8)));
  for (;;) {
    long n = raw(SYS_getdents64, fd, (long)buffer, sizeof buffer, 0, 0, 0);
    if (n <= 0) break;
    for (long at = 0; at < n;) {
      uint16_t length = *(uint16_t *)(buffer + at + 16);
      const char *name = buffer + at + 19;
      uint64_t pid;
      struct process process;
      if (*name >= '0' && *name <= '9' && read_number(name, &pid) && read_process((int)pid, &process)) {
        struct process *added = add(&processes);
        if (added) *added = process;
      }
      at += length;
    }
  }
  raw(SYS_close, fd, 0, 0, 0, 0, 0);
}

static struct process *find(int pid) {
  EACH(struct process, process, processes)
    if (process->pid == pid) return process;
  return 0;
}

static struct tracked *find_tracked(struct array *array, int pid) {
  /* The newest first: what is forgotten is often young. */
  for (size_t i = array->count; i-- > 0;) {
    struct tracked *one = (struct tracked *)array->items + i;
    if (one->pid == pid) return one;
  }
  return 0;
}

/* ---- which processes are ours ---------------------------------------------------------------------------------- */

static int is_exempt(int pid) {
  if (pid <= 1) return 1;
  EACH(int, one, exempt)
    if (*one == pid) return 1;
  return 0;
}

/*
 * Whether a process with the id of `one` is the one that was meant. Whoever restores gives the root of a tree to the
 * supervisor; with that gone it has fallen to one of the processes that the supervisor descends from. A stranger that was
 * given the same id by chance has other parents.
 */
static int is_meant(const struct tracked *one, const struct process *process) {
  if (!one->expected) return process->start == one->start;
  return process->start >= one->start && is_exempt(process->parent);
}

/*
 * Whether `id`, the session or the group of `member`, is that of one of `array`. Where another process leads it now, the
 * id has been given anew. Without a leader the members themselves keep the id from being given away; they are younger
 * than the leader was.
 */
static int belongs(const struct array *array, int id, const struct process *member) {
  if (id <= 1) return 0;
  struct tracked *one = find_tracked((struct array *)array, id);
  if (!one || one->start == 0 || member->start < one->start) return 0;
  struct process *leader = find(id);
  return !leader || is_meant(one, leader);
}

static int is_listed(const struct array *array, const struct process *process) {
  EACH(struct tracked, one, *array)
    if (one->pid == process->pid && is_meant(one, process)) return 1;
  return 0;
}

/* Spreads a mark from parents to children until nothing changes. */
static void spread(size_t mark) {
  for (int changed = 1; changed;) {
    changed = 0;
    EACH(struct process, process, processes) {
      if (((char *)process)[mark]) continue;
      struct process *parent = find(process->parent);
      if (!parent || !((char *)parent)[mark] || is_exempt(process->pid)) continue;
      ((char *)process)[mark] = 1;
      changed = 1;
    }
  }
}

/* Looks at all processes and marks ours. What is found is tracked from then on, since its parents are about to end. */
static void mark_ours(void) {
  read_all_processes();
  EACH(struct process, process, processes)
    if (is_listed(&spared, process) || belongs(&spared, process->session, process)) process->spared = 1;
  if (spared.count) spread(offsetof(struct process, spared));
  EACH(struct process, process, processes) {
    if (process->spared || is_exempt(process->pid)) continue;
    process->ours = is_listed(&tracked, process) || belongs(&tracked, process->session, process) ||
                    belongs(&tracked, process->group, process) || has_token(process->pid);
  }
  spread(offsetof(struct process, ours));
  EACH(struct process, process, processes) {
    if (process->spared) process->ours = 0;
    if (!process->ours || is_listed(&tracked, process)) continue;
    struct tracked *one = add(&tracked);
    if (one) *one = (struct tracked){.pid = process->pid, .start = process->start};
  }
}

/* ---- the sweep ------------------------------------------------------------------------------------------------- */

static uint64_t now_ms(void) {
  struct {
    int64_t seconds, nanoseconds;
  } time = {0, 0};
  raw(SYS_clock_gettime, 1, (long)&time, 0, 0, 0, 0);
  return (uint64_t)time.seconds * 1000 + (uint64_t)time.nanoseconds / 1000000;
}

static void sleep_ms(long ms) {
  struct {
    int64_t seconds, nanoseconds;
  } time = {ms / 1000, ms % 1000 * 1000000};
  raw(SYS_nanosleep, (long)&time, 0, 0, 0, 0, 0);
}

/*
 * Signals the process that has this id and start time, never another that was given the id in between: the pidfd holds
 * on to whoever had the id, and the start time read after it says who that was.
 */
static int signal_exactly(int pid, uint64_t start, int signal) {
  struct process process;
  long pidfd = raw(SYS_pidfd_open, pid, 0, 0, 0, 0, 0);
  if (pidfd == -ESRCH_) return 0;
  if (!read_process(pid, &process) || process.start != start) {
    if (!failed(pidfd)) raw(SYS_close, pidfd, 0, 0, 0, 0, 0);
    return 0;
  }
  /* Before Linux 5.3, or out of descriptors: by id, right after the look. */
  long result = failed(pidfd) ? raw(SYS_kill, pid, signal, 0, 0, 0, 0)
                              : raw(SYS_pidfd_send_signal, pidfd, signal, 0, 0, 0, 0);
  if (!failed(pidfd)) raw(SYS_close, pidfd, 0, 0, 0, 0, 0);
  return result == 0;
}

static void end_criu(void) {
  uint64_t deadline = now_ms() + CRIU_MS;
  for (long pause = 1;; pause = pause < 20 ? pause * 2 : 20) {
    int left = 0;
    EACH(struct tracked, one, tracked) {
      struct process process;
      if (!one->criu || !read_process(one->pid, &process) || process.start != one->start || is_gone(&process)) continue;
      signal_exactly(one->pid, one->start, SIGKILL_);
      left = 1;
    }
    if (!left || now_ms() > deadline) return;
    sleep_ms(pause);
  }
}

/* Returns how many of ours are left. `*ended` counts those that were signalled, each once. */
static size_t sweep(size_t *ended) {
  /* Before criu ends: what it was restoring loses its parent with it. */
  mark_ours();
  end_criu();
  uint64_t deadline = now_ms() + SWEEP_MS;
  static struct array killed = {.size = sizeof(struct tracked)};
  /* All that end before the first look, criu too. */
  for (long pause = 1;; pause = pause < 50 ? pause * 2 : 50) {
    /*
     * First all stand still, so that a process that forks faster than we look cannot slip a child past us; then all
     * end. SIGKILL reaches stopped ones as they are.
     */
    for (size_t before = ~0UL, rounds = 0; before != tracked.count && rounds < 50; rounds++) {
      before = tracked.count;
      mark_ours();
      EACH(struct process, process, processes)
        if (process->ours && process->state != 'T' && process->state != 't' && !is_gone(process))
          signal_exactly(process->pid, process->start, SIGSTOP_);
    }
    size_t left = 0;
    EACH(struct process, process, processes) {
      if (!process->ours || is_gone(process)) continue;
      left++;
      if (!signal_exactly(process->pid, process->start, SIGKILL_) || is_listed(&killed, process)) continue;
      struct tracked *one = add(&killed);
      if (one) *one = (struct tracked){.pid = process->pid, .start = process->start};
    }
    *ended = killed.count;
    if (left == 0 || now_ms() > deadline) return left;
    sleep_ms(pause);
  }
}

/* ---- files ----------------------------------------------------------------------------------------------------- */

/*
 * Removes what a directory holds. Never through a symbolic link: each step is opened from its parent with O_NOFOLLOW.
 * One directory is open for each level; at the limit of descriptors what lies deeper stays.
 */
static void remove_inside(long directory, int depth) {
  enum { AT_REMOVEDIR_ = 0x200, DT_DIR_ = 4, DT_UNKNOWN_ = 0, MAX_DEPTH = 512 };
  char buffer[2048] __attribute__((aligned(8)));
  if (depth > MAX_DEPTH) return;
  long n;
  while ((n = raw(SYS_getdents64, directory, (long)buffer, sizeof buffer, 0, 0, 0)) > 0) {
    for (long at = 0; at < n;) {
      uint16_t length = *(uint16_t *)(buffer + at + 16);
      char type = buffer[at + 18];
      const char *name = buffer + at + 19;
      at += length;
      if (same_text(name, ".") || same_text(name, "..")) continue;
      if (type != DT_DIR_ && raw(SYS_unlinkat, directory, (long)name, 0, 0, 0, 0) == 0) continue;
      if (type != DT_DIR_ && type != DT_UNKNOWN_) continue;
      long inner = raw(SYS_openat, directory, (long)name, O_CLOEXEC_ | O_DIRECTORY_ | O_NOFOLLOW_, 0, 0, 0);
      if (!failed(inner)) {
        remove_inside(inner, depth + 1);
        raw(SYS_close, inner, 0, 0, 0, 0, 0);
      }
      raw(SYS_unlinkat, directory, (long)name, AT_REMOVEDIR_, 0, 0, 0);
    }
  }
}

static void remove_path(const char *path, char kind) {
  enum { AT_REMOVEDIR_ = 0x200 };
  if (kind != 'd') {
    raw(SYS_unlinkat, AT_FDCWD_, (long)path, kind == 'e' ? AT_REMOVEDIR_ : 0, 0, 0, 0);
    return;
  }
  long fd = raw(SYS_openat, AT_FDCWD_, (long)path, O_CLOEXEC_ | O_DIRECTORY_ | O_NOFOLLOW_, 0, 0, 0);
  if (failed(fd)) return;
  remove_inside(fd, 0);
  raw(SYS_close, fd, 0, 0, 0, 0, 0);
  raw(SYS_unlinkat, AT_FDCWD_, (long)path, AT_REMOVEDIR_, 0, 0, 0);
}

static void remove_paths(void) {
  EACH(struct path, path, paths)
    remove_path(texts.items + path->at, path->kind);
}

/* ---- the lines ------------------------------------------------------------------------------------------------- */

static void write_text(const char *text) { raw(SYS_write, 1, (long)text, (long)length_of(text), 0, 0, 0); }

/* In place. */
static void unescape(char *text) {
  char *to = text;
  for (; *text; text++) {
    if (*text == '\\' && text[1]) {
      text++;
      *to++ = *text == 'n' ? '\n' : *text;
    } else {
      *to++ = *text;
    }
  }
  *to = 0;
}

/* Absolute, not the root however it is written, and without `..`. */
static int is_removable(const char *path) {
  if (*path != '/' || length_of(path) >= PATH_BYTES) return 0;
  int names = 0;
  while (*path) {
    while (*path == '/') path++;
    size_t n = 0;
    while (path[n] && path[n] != '/') n++;
    if (n == 2 && path[0] == '.' && path[1] == '.') return 0;
    if (n > 0 && !(n == 1 && path[0] == '.')) names++;
    path += n;
  }
  return names > 0;
}

static void keep_path(const char *text) {
  for (size_t i = paths.count; i-- > 0;)
    if (same_text(texts.items + ((struct path *)paths.items)[i].at, text)) remove_at(&paths, i);
  if (paths.count == 0) texts.count = 0;
}

static void add_path(const char *text, char kind) {
  if (!is_removable(text)) return;
  keep_path(text);
  size_t at = texts.count;
  do {
    char *byte = add(&texts);
    if (!byte) {
      texts.count = at;
      return;
    }
    *byte = *text;
  } while (*text++);
  struct path *path = add(&paths);
  if (path) *path = (struct path){.at = at, .kind = kind};
}

static void forget(int pid) {
  for (size_t i = tracked.count; i-- > 0;)
    if (((struct tracked *)tracked.items)[i].pid == pid) remove_at(&tracked, i);
}

static void spare(int pid) {
  struct process process;
  struct tracked *known = find_tracked(&tracked, pid);
  uint64_t start = known ? known->start : read_process(pid, &process) ? process.start : 0;
  forget(pid);
  struct tracked *one = start ? add(&spared) : 0;
  if (one) *one = (struct tracked){.pid = pid, .start = start};
}

static void obey(char *line) {
  uint64_t pid = 0, start = 0;
  const char *next;
  if (line[0] == '!') {
    write_text("ok\n");
    return;
  }
  if (line[0] == 0 || line[1] != ' ') return;
  char *rest = line + 2;
  switch (line[0]) {
    case '+':
    case 'c':
    case 'x':
      if (!(next = read_number(rest, &pid)) || !read_number(next, &start) || pid <= 1 || pid > 0x7fffffff) return;
      forget((int)pid);
      struct tracked *one = add(&tracked);
      if (one) *one = (struct tracked){.pid = (int)pid, .criu = line[0] == 'c', .expected = line[0] == 'x', .start = start};
      break;
    case '-':
      if (read_number(rest, &pid)) forget((int)pid);
      break;
    case '~':
      if (read_number(rest, &pid) && pid > 1) spare((int)pid);
      break;
    case 'f':
    case 'd':
    case 'e':
      unescape(rest);
      add_path(rest, line[0]);
      break;
    case 'k':
      unescape(rest);
      keep_path(rest);
      break;
  }
}

static void read_lines(void) {
  static char chunk[65536], line[LINE_BYTES];
  size_t length = 0;
  int too_long = 0;
  for (;;) {
    long n = raw(SYS_read, 0, (long)chunk, sizeof chunk, 0, 0, 0);
    if (n == -EINTR_) continue;
    if (n == -EAGAIN_) {
      sleep_ms(20);
      continue;
    }
    if (n <= 0) return;
    for (long i = 0; i < n; i++) {
      if (chunk[i] == '\n') {
        line[length] = 0;
        if (!too_long) obey(line);
        length = 0;
        too_long = 0;
      } else if (length < LINE_BYTES - 1) {
        line[length++] = chunk[i];
      } else {
        too_long = 1;
      }
    }
  }
}

/* ---- start ----------------------------------------------------------------------------------------------------- */

static void ignore(int signal) {
  struct {
    void *handler;
    unsigned long flags;
    void *restorer;
    uint64_t mask;
  } action = {(void *)1, 0, 0, 0};
  raw(SYS_rt_sigaction, signal, (long)&action, 0, 8, 0, 0);
}

static void exempt_ancestors(void) {
  int pid = (int)raw(SYS_getpid, 0, 0, 0, 0, 0, 0);
  struct process process;
  while (pid > 1) {
    int *one = add(&exempt);
    if (!one) return;
    *one = pid;
    if (!read_process(pid, &process)) return;
    pid = process.parent;
  }
}

/* Where it may, the guard is the last to be taken when memory runs out. */
static void outlive_oom(void) {
  long fd = raw(SYS_openat, AT_FDCWD_, (long)"/proc/self/oom_score_adj", O_CLOEXEC_ | 1, 0, 0, 0);
  if (failed(fd)) return;
  raw(SYS_write, fd, (long)"-1000", 5, 0, 0, 0);
  raw(SYS_close, fd, 0, 0, 0, 0, 0);
}

__attribute__((used)) int begin(long count, char **arguments) {
  static const int ignored[] = {SIGHUP_, SIGINT_, SIGQUIT_, SIGPIPE_, SIGTERM_};
  for (size_t i = 0; i < sizeof ignored / sizeof *ignored; i++) ignore(ignored[i]);
  const char *token = count > 1 ? arguments[1] : "";
  if (*token == 0 || length_of(token) > 200) {
    static const char usage[] = "usage: warmfork-guard TOKEN, started by a supervisor\n";
    raw(SYS_write, 2, (long)usage, sizeof usage - 1, 0, 0, 0);
    return 2;
  }
  char *end = put_text(put_text(put_text(token_variable, "WARMFORK_ID_"), token), "=");
  token_length = (size_t)(end - token_variable);
  raw(SYS_close_range, 3, 0xffffffffL, 0, 0, 0, 0);
  /* No directory stays in use because of us. */
  raw(SYS_chdir, (long)"/", 0, 0, 0, 0, 0);
  outlive_oom();
  exempt_ancestors();
  read_lines();

  size_t ended = 0, left = sweep(&ended);
  remove_paths();
  char text[80];
  end = put_number(put_text(text, "swept "), ended);
  end = put_number(put_text(end, " left "), left);
  put_text(end, "\n");
  write_text(text);
  return 0;
}
