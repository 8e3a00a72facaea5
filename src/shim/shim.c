/*
 * The preload shim. Loaded with LD_PRELOAD into a template, it keeps the template such that it can be checkpointed
 * (no io_uring, no protection keys), and keeps its forks right: memory that a fork maps from a page file must read as
 * zeros once it is discarded, as anonymous memory does. It uses no library, so that one file serves glibc and musl;
 * it knows nothing of the supervisor but the name rule of page files and the variables below.
 *
 * Everything here runs in signal handlers, in vfork children and in many threads at once. So: no allocation, no locks,
 * no state but what is written once at start, and caches whose every writer writes the same.
 *
 * What it cannot reach: calls that libc makes inside itself (glibc's malloc calls its own mremap and madvise; it counts
 * on zeros after neither, and a growth runs into the hole that is left after each slot of a page file), and raw
 * system calls of other libraries (liburing).
 */
#define _GNU_SOURCE
#include <elf.h>
#include <link.h>
#include <stdarg.h>

#include "syscall.h"

#define EXPORT __attribute__((visibility("default")))
#define WEAK __attribute__((weak))
#define NOINLINE __attribute__((noinline))
#define LIKELY(x) __builtin_expect(!!(x), 1)

/* The name rule: a file whose name ends so is a page file of a generation. */
static const char page_file_suffix[] = ".warmfork-pages";
/* How the shim knows itself in LD_PRELOAD. */
static const char shim_name[] = "libwarmfork-shim.so";
/* Set by us for a helper that starts programs in our place: it is to take the shim out of their environment. */
static const char strip_variable[] = "WARMFORK_STRIP=1";
static const char reuseport_variable[] = "WARMFORK_REUSEPORT=1";

enum {
  PROT_WRITE_ = 2,
  MAP_PRIVATE_ = 2,
  MAP_FIXED_ = 0x10,
  MAP_ANONYMOUS_ = 0x20,
  MAP_FIXED_NOREPLACE_ = 0x100000,
  MS_INVALIDATE_ = 2,
  MLOCK_ONFAULT_ = 1,
  MADV_DONTNEED_ = 4,
  MADV_FREE_ = 8,
  MADV_DONTNEED_LOCKED_ = 24,
  MADV_GUARD_INSTALL_ = 102,
  MREMAP_MAYMOVE_ = 1,
  MREMAP_FIXED_ = 2,
  MREMAP_DONTUNMAP_ = 4,
};

extern int *__errno_location(void);
extern char **environ WEAK;
extern int dl_iterate_phdr(int (*)(struct dl_phdr_info *, size_t, void *), void *) WEAK;
extern const char *gnu_get_libc_version(void) WEAK;

/* The kernel's answer as libc gives it. errno is left alone where the call succeeds. */
__attribute__((used)) long warmfork_result(long result) {
  if (!failed(result)) return result;
  *__errno_location() = (int)-result;
  return -1;
}

static inline uintptr_t page_up(uintptr_t n) { return (n + PAGE_BYTES - 1) & ~(PAGE_BYTES - 1); }

/* ---- what is mapped where ------------------------------------------------------------------------------------- */

enum kind { ANONYMOUS, PAGE_FILE, OTHER };

struct region {
  uintptr_t start, end;
  int prot;
  enum kind kind;
};

/* An open /proc/.../maps, with the state of the text reader. */
struct maps {
  int fd;
  int textual;
  uint16_t have, at;
  char buffer[480];
};

/* Linux 6.11: struct procmap_query of linux/fs.h. */
struct procmap_query {
  uint64_t size, flags, address;
  uint64_t start, end, vma_flags, page_size, offset, inode;
  uint32_t device_major, device_minor, name_size, build_id_size;
  uint64_t name, build_id;
};
#define PROCMAP_QUERY_ 0xc0686611L
enum { QUERY_SHARED = 8, QUERY_COVERING_OR_NEXT = 0x10, QUERY_FILE_BACKED = 0x20 };

/* Set once where the kernel does not know PROCMAP_QUERY. */
static volatile int no_procmap_query
#ifdef WARMFORK_NO_PROCMAP
    = 1
#endif
    ;

/*
 * The thread's own file, not /proc/self: that one names the first thread, and is empty once the first thread has ended
 * (pthread_exit in main).
 */
static long open_maps(void) {
  long fd = raw(SYS_openat, AT_FDCWD_, (long)"/proc/thread-self/maps", O_CLOEXEC_, 0, 0, 0);
  if (fd == -ENOENT_) fd = raw(SYS_openat, AT_FDCWD_, (long)"/proc/self/maps", O_CLOEXEC_, 0, 0, 0);
  return fd;
}

static int ends_with(const char *text, size_t length, const char *end, size_t end_length) {
  return length >= end_length && same_bytes(text + length - end_length, end, end_length);
}

static int is_page_file(const char *name, size_t length) {
  static const char deleted[] = " (deleted)";
  if (ends_with(name, length, deleted, sizeof deleted - 1)) length -= sizeof deleted - 1;
  return ends_with(name, length, page_file_suffix, sizeof page_file_suffix - 1);
}

/* Asks for the name of the mapping at an address: 1 a page file, 0 not, -errno. */
static inline __attribute__((always_inline)) long query_name(int fd, uintptr_t address, char *name, uint32_t size) {
  struct procmap_query query = {.size = sizeof query, .address = address, .name = (uint64_t)name, .name_size = size};
  long result = raw(SYS_ioctl, fd, PROCMAP_QUERY_, (long)&query, 0, 0, 0);
  if (failed(result)) return result;
  return query.name_size > 0 && is_page_file(name, query.name_size - 1);
}

/* Apart, so that only a long name costs a page of stack: handlers run on small ones. */
static NOINLINE long query_long_name(int fd, uintptr_t address) {
  char name[4096];
  return query_name(fd, address, name, sizeof name);
}

static NOINLINE long query_any_name(int fd, uintptr_t address) {
  char name[256];
  long result = query_name(fd, address, name, sizeof name);
  return result == -ENAMETOOLONG_ ? query_long_name(fd, address) : result;
}

static int next_byte(struct maps *maps) {
  if (maps->at == maps->have) {
    long n = raw(SYS_read, maps->fd, (long)maps->buffer, sizeof maps->buffer, 0, 0, 0);
    if (n <= 0) return -1;
    maps->have = (uint16_t)n;
    maps->at = 0;
  }
  return (unsigned char)maps->buffer[maps->at++];
}

static int read_hex(struct maps *maps, uintptr_t *value) {
  *value = 0;
  for (;;) {
    int c = next_byte(maps);
    int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
    if (digit < 0) return c;
    *value = *value << 4 | (uintptr_t)digit;
  }
}

/* The next line of maps: `start-end rwxp offset dev inode   path`. 1, or 0 at the end. */
static int read_line(struct maps *maps, struct region *region) {
  if (read_hex(maps, &region->start) != '-') return 0;
  read_hex(maps, &region->end);
  region->prot = next_byte(maps) == 'r' ? 1 : 0;
  if (next_byte(maps) == 'w') region->prot |= 2;
  if (next_byte(maps) == 'x') region->prot |= 4;
  int shared = next_byte(maps) == 's';
  int c = next_byte(maps);
  for (int field = 0; field < 2; field++)
    while ((c = next_byte(maps)) != ' ' && c >= 0) continue;
  int inode = 0;
  while ((c = next_byte(maps)) >= '0' && c <= '9') inode |= c - '0';
  while (c == ' ') c = next_byte(maps);
  /* Only the end of the name matters, so only that is kept. */
  char name[96];
  size_t length = 0;
  for (; c >= 0 && c != '\n'; c = next_byte(maps)) {
    if (length == sizeof name) {
      copy_bytes(name, name + sizeof name - 32, 32);
      length = 32;
    }
    name[length++] = (char)c;
  }
  region->kind = shared ? OTHER : inode == 0 ? ANONYMOUS : is_page_file(name, length) ? PAGE_FILE : OTHER;
  return 1;
}

/*
 * The first region that ends after `from`: 1, or 0 where there is none, or -errno. With `files` anonymous ones may be
 * left out. Calls on one `maps` go upwards: the text is read only once.
 */
static long next_region(struct maps *maps, uintptr_t from, int files, struct region *region) {
  if (!maps->textual) {
    struct procmap_query query = {.size = sizeof query, .address = from};
    query.flags = QUERY_COVERING_OR_NEXT | (files ? QUERY_FILE_BACKED : 0);
    long result = raw(SYS_ioctl, maps->fd, PROCMAP_QUERY_, (long)&query, 0, 0, 0);
    if (result == -ENOENT_) return 0;
    if (!failed(result)) {
      *region = (struct region){query.start, query.end, (int)(query.vma_flags & 7), OTHER};
      if (query.vma_flags & QUERY_SHARED) return 1;
      if (query.inode == 0) {
        region->kind = ANONYMOUS;
        return 1;
      }
      result = query_any_name(maps->fd, query.start > from ? query.start : from);
      if (result == 1) region->kind = PAGE_FILE;
      return failed(result) && result != -ENOENT_ ? result : 1;
    }
    if (result != -ENOTTY_ && result != -EINVAL_) return result;
    no_procmap_query = 1;
    maps->textual = 1;
  }
  do {
    if (!read_line(maps, region)) return 0;
  } while (region->end <= from);
  return 1;
}

/*
 * The first page-file region in [from, to): 1, 0, or -errno. Only a search through everything asks for file mappings
 * alone: the kernel then walks over all others up to the next one (70 us with 2,000 of them).
 */
static long next_page_file(struct maps *maps, uintptr_t from, uintptr_t to, struct region *region) {
  int files = to == ~0UL;
  for (;;) {
    long found = next_region(maps, from, files, region);
    if (found != 1) return found;
    if (region->start >= to) return 0;
    if (region->kind == PAGE_FILE) {
      if (region->start < from) region->start = from;
      if (region->end > to) region->end = to;
      return 1;
    }
    from = region->end;
  }
}

/* ---- work that needs the maps ---------------------------------------------------------------------------------- */

struct work {
  void (*run)(struct work *, struct maps *);
  /* False as long as the maps could not be opened. */
  int done;
  long result;
  uintptr_t start, end;
  int advice;
  uintptr_t new_length, new_address;
  int flags;
};

static long run_with_maps(struct work *work) {
  struct maps maps;
  long fd = open_maps();
  if (failed(fd)) return fd;
  maps.fd = (int)fd;
  maps.textual = no_procmap_query;
  maps.have = maps.at = 0;
  work->done = 1;
  work->run(work, &maps);
  raw(SYS_close, fd, 0, 0, 0, 0, 0);
  return 0;
}

static void run_aside(void *argument) {
  /* Limits and descriptors are this helper's own copies: both may give way for the maps. */
  enum { RLIMIT_NOFILE_ = 7 };
  uint64_t limit[2];
  if (!failed(raw(SYS_prlimit64, 0, RLIMIT_NOFILE_, 0, (long)limit, 0, 0))) {
    limit[0] = limit[1];
    raw(SYS_prlimit64, 0, RLIMIT_NOFILE_, (long)limit, 0, 0, 0);
  }
  raw(SYS_close, 0, 0, 0, 0, 0, 0);
  raw(SYS_close, 1, 0, 0, 0, 0, 0);
  run_with_maps(argument);
}

/*
 * A process at its limit of descriptors can open nothing. A helper that shares its memory but has its own copy of the
 * descriptor table can: it closes one, and does the work in the memory of both. It is made as posix_spawn makes its
 * child (CLONE_VM, CLONE_VFORK, all signals blocked), and without an exit signal, so that no wait() sees it.
 */
static NOINLINE void run_in_helper(struct work *work) {
  enum { STACK_BYTES = 32768, CLONE_VM_ = 0x100, CLONE_VFORK_ = 0x4000, WALL = 0x40000000, SIG_SETMASK_ = 2 };
  long stack = raw(SYS_mmap, 0, STACK_BYTES, 3, MAP_PRIVATE_ | MAP_ANONYMOUS_, -1, 0);
  if (failed(stack)) return;
  uint64_t all = ~0UL, before;
  raw(SYS_rt_sigprocmask, SIG_SETMASK_, (long)&all, (long)&before, sizeof all, 0, 0);
  long pid = clone_call(CLONE_VM_ | CLONE_VFORK_, (char *)stack + STACK_BYTES, run_aside, work);
  if (!failed(pid))
    while (raw(SYS_wait4, pid, 0, WALL, 0, 0, 0) == -EINTR_) continue;
  raw(SYS_rt_sigprocmask, SIG_SETMASK_, (long)&before, 0, sizeof before, 0, 0);
  raw(SYS_munmap, stack, STACK_BYTES, 0, 0, 0, 0);
}

/* False where nothing can be learned: no /proc, or no descriptor left in the whole system. */
static int do_work(struct work *work) {
  long result = run_with_maps(work);
  if (result == -EMFILE_ || result == -ENFILE_) run_in_helper(work);
  return work->done;
}

/* ---- madvise --------------------------------------------------------------------------------------------------- */

/*
 * Fresh anonymous memory over a part of a page-file mapping.
 *
 * What the new mapping keeps: address, protection, and (with MADV_DONTNEED_LOCKED) being locked. What it loses are the
 * flags of earlier advice: MADV_HUGEPAGE and MADV_NOHUGEPAGE cost speed or memory only; of MADV_DONTFORK and
 * MADV_DONTDUMP more would be lost, but only smaps could tell, milliseconds a call. So it is for the one who makes the
 * image not to map ranges with those two from a page file.
 */
static long make_anonymous(uintptr_t start, uintptr_t end, int prot, int advice) {
  size_t length = end - start;
  /* The kernel refuses to discard locked memory. Invalidating says whether it is locked, and does nothing else. */
  int locked = raw(SYS_msync, (long)start, (long)length, MS_INVALIDATE_, 0, 0, 0) == -EBUSY_;
  if (locked && advice != MADV_DONTNEED_LOCKED_) return -EINVAL_;
  long result = raw(SYS_mmap, (long)start, (long)length, prot, MAP_PRIVATE_ | MAP_ANONYMOUS_ | MAP_FIXED_, -1, 0);
  if (failed(result)) {
    /* Most likely the process has as many mappings as it may (65,530), and this would split one. Zeros can be written. */
    if (result != -ENOMEM_ || !(prot & PROT_WRITE_)) return result;
    zero_bytes((void *)start, length);
    return 0;
  }
  if (locked) raw(SYS_mlock2, (long)start, (long)length, MLOCK_ONFAULT_, 0, 0, 0);
  return 0;
}

/* As the kernel goes through a range: holes are told at the end, any other failure ends it. */
static int step(struct work *work, long result) {
  if (!failed(result)) return 1;
  work->result = result;
  return result == -ENOMEM_;
}

static void discard_range(struct work *work, struct maps *maps) {
  uintptr_t at = work->start;
  while (at < work->end) {
    struct region region;
    long found = next_page_file(maps, at, work->end, &region);
    if (failed(found)) {
      work->result = -EAGAIN_;
      return;
    }
    uintptr_t plain_end = found ? region.start : work->end;
    if (plain_end > at && !step(work, raw(SYS_madvise, (long)at, (long)(plain_end - at), work->advice, 0, 0, 0))) return;
    if (!found) return;
    if (!step(work, make_anonymous(region.start, region.end, region.prot, work->advice))) return;
    /* A guard stands in anonymous memory now: taken away later, it uncovers zeros. */
    if (work->advice == MADV_GUARD_INSTALL_ &&
        !step(work, raw(SYS_madvise, (long)region.start, (long)(region.end - region.start), work->advice, 0, 0, 0)))
      return;
    at = region.end;
  }
}

/*
 * Up to this size a range is first tried with MADV_FREE, which the kernel refuses on file mappings: no descriptor, and
 * for small ranges cheaper than asking for the maps. The content is doomed in either case. Measured on Linux 6.18, us a
 * call on touched pages: 1 page 0.7 plain, 1.8 with this, 3.2 with open, PROCMAP_QUERY and close; 4 pages 1.2, 3.1, 3.8;
 * 16 pages 3.4, 8.5, 6.2. Asking costs 2.5 us whatever the size.
 */
#define PROBE_BYTES (4 * PAGE_BYTES)

static long discard(uintptr_t start, size_t length, int advice) {
  uintptr_t end = start + page_up(length);
  /* What the kernel refuses, it refuses itself. */
  if ((start & (PAGE_BYTES - 1)) || end <= start || page_up(length) < length)
    return raw(SYS_madvise, (long)start, (long)length, advice, 0, 0, 0);
  int probed = advice == MADV_FREE_ || end - start <= PROBE_BYTES;
  if (probed) {
    long result = raw(SYS_madvise, (long)start, (long)length, MADV_FREE_, 0, 0, 0);
    /* Not refused: there is no file mapping in the range (there may be holes). */
    if (advice == MADV_FREE_ && result != -EINVAL_) return result;
    if (result == 0 || result == -ENOMEM_) return raw(SYS_madvise, (long)start, (long)length, advice, 0, 0, 0);
  }
  struct work work = {.run = discard_range, .start = start, .end = end, .advice = advice};
  if (LIKELY(do_work(&work))) return work.result;
  /*
   * Nothing can be learned of the maps. Where MADV_FREE is taken, no page file is there. Where it is not, old bytes
   * might come back: rather a failure, which allocators take for "not discarded".
   */
  long result = probed ? -EINVAL_ : raw(SYS_madvise, (long)start, (long)length, MADV_FREE_, 0, 0, 0);
  if (result == 0 || result == -ENOMEM_) return raw(SYS_madvise, (long)start, (long)length, advice, 0, 0, 0);
  return -EAGAIN_;
}

static int discards(long advice) {
  return advice == MADV_DONTNEED_ || advice == MADV_FREE_ || advice == MADV_DONTNEED_LOCKED_ ||
         advice == MADV_GUARD_INSTALL_;
}

static long advise(uintptr_t start, size_t length, int advice) {
  if (discards(advice)) return discard(start, length, advice);
  return raw(SYS_madvise, (long)start, (long)length, advice, 0, 0, 0);
}

EXPORT int madvise(void *address, size_t length, int advice) {
  return (int)warmfork_result(advise((uintptr_t)address, length, advice));
}

/* posix_madvise is not here: its POSIX_MADV_DONTNEED discards nothing, in glibc and in musl. */

struct vector {
  void *base;
  size_t length;
};

/* jemalloc purges whole batches so. The kernel lets a process discard in its own memory only. */
static long advise_many(int pidfd, const struct vector *vectors, size_t count, int advice, unsigned flags) {
  if (!discards(advice)) return raw(SYS_process_madvise, pidfd, (long)vectors, (long)count, advice, flags, 0);
  long result = raw(SYS_process_madvise, pidfd, (long)vectors, 0, advice, flags, 0);
  if (failed(result)) return result;
  long done = 0;
  for (size_t i = 0; i < count; i++) {
    result = advise((uintptr_t)vectors[i].base, vectors[i].length, advice);
    if (failed(result)) return done > 0 ? done : result;
    done += (long)vectors[i].length;
  }
  return done;
}

EXPORT long process_madvise(int pidfd, const struct vector *vectors, size_t count, int advice, unsigned flags) {
  return warmfork_result(advise_many(pidfd, vectors, count, advice, flags));
}

/* ---- mremap ---------------------------------------------------------------------------------------------------- */

/*
 * Moves [start, end), mapping by mapping, to `to`, where a reserved region of that size is. Private pages move, they are
 * not copied. Undone where it fails in the middle (the limit of mappings).
 */
static long move_pieces(struct maps *maps, uintptr_t start, uintptr_t end, uintptr_t to, int keep_source) {
  uintptr_t at = start;
  long result = 0;
  while (at < end) {
    struct region region;
    /* Moving takes mappings away behind us only, so that going upwards stays right. */
    long found = next_region(maps, at, 0, &region);
    if (found != 1 || region.start > at) {
      result = failed(found) ? found : -EFAULT_;
      break;
    }
    uintptr_t piece_end = region.end < end ? region.end : end;
    long length = (long)(piece_end - at);
    long flags = MREMAP_MAYMOVE_ | MREMAP_FIXED_;
    result = keep_source ? raw(SYS_mremap, (long)at, length, length, flags | MREMAP_DONTUNMAP_, (long)(to + (at - start)), 0)
                         : -EINVAL_;
    /* DONTUNMAP on file mappings is of Linux 5.13. */
    if (result == -EINVAL_) result = raw(SYS_mremap, (long)at, length, length, flags, (long)(to + (at - start)), 0);
    if (failed(result)) break;
    at = piece_end;
  }
  if (at == end) return 0;
  if (at > start && !keep_source) {
    /* Back, each mapping as it lies there now; one piece at a time, since they are still apart. */
    for (uintptr_t back = start; back < at; back += PAGE_BYTES)
      raw(SYS_mremap, (long)(to + (back - start)), PAGE_BYTES, PAGE_BYTES, MREMAP_MAYMOVE_ | MREMAP_FIXED_, (long)back, 0);
  }
  return failed(result) ? result : -ENOMEM_;
}

/*
 * mremap over a range that holds page-file mappings, or that discarding has split. Growing never extends the file
 * mapping: what was cut off earlier would come back. The grown part is anonymous, so the range is several mappings from
 * then on, which is why moving goes piece by piece.
 */
static void remap_range(struct work *work, struct maps *maps) {
  uintptr_t start = work->start, end = work->end, length = end - start;
  int page_files = 0, pieces = 0, prot = 0;
  for (uintptr_t at = start; at < end; pieces++) {
    struct region region;
    long found = next_region(maps, at, 0, &region);
    /* A hole, a stranger, or mixed protections: as the kernel says. */
    if (found != 1 || region.start > at || region.kind == OTHER || (pieces > 0 && region.prot != prot)) goto plain;
    if (region.kind == PAGE_FILE) page_files = 1;
    prot = region.prot;
    at = region.end;
  }
  if (pieces == 1 && !page_files) goto plain;

  int fixed = work->flags & MREMAP_FIXED_, keep = work->flags & MREMAP_DONTUNMAP_;
  uintptr_t to_length = work->new_length;
  if (to_length < length) {
    /* Smaller: what is cut off goes; the rest is moved below if it is to go elsewhere. */
    raw(SYS_munmap, (long)(start + to_length), (long)(length - to_length), 0, 0, 0, 0);
    end = start + to_length;
    length = to_length;
  }
  if (!fixed && !keep) {
    if (to_length == length) {
      work->result = (long)start;
      return;
    }
    /* Growing where it lies, if the space after it is free. */
    long grown = raw(SYS_mmap, (long)end, (long)(to_length - length), prot,
                     MAP_PRIVATE_ | MAP_ANONYMOUS_ | MAP_FIXED_NOREPLACE_, -1, 0);
    if (grown == (long)end) {
      work->result = (long)start;
      return;
    }
    /* Before Linux 4.17 the flag is a mere hint. */
    if (!failed(grown)) raw(SYS_munmap, grown, (long)(to_length - length), 0, 0, 0, 0);
    if (!(work->flags & MREMAP_MAYMOVE_)) {
      work->result = -ENOMEM_;
      return;
    }
  }
  long to = raw(SYS_mmap, fixed || keep ? (long)work->new_address : 0, (long)to_length, prot,
                MAP_PRIVATE_ | MAP_ANONYMOUS_ | (fixed ? MAP_FIXED_ : 0), -1, 0);
  if (failed(to)) {
    work->result = to;
    return;
  }
  /* The text of maps is read from its beginning again. */
  struct maps again = {.fd = maps->fd, .textual = maps->textual};
  if (again.textual) {
    long fd = open_maps();
    if (failed(fd)) {
      raw(SYS_munmap, to, (long)to_length, 0, 0, 0, 0);
      work->result = -ENOMEM_;
      return;
    }
    again.fd = (int)fd;
  }
  long moved = move_pieces(&again, start, end, (uintptr_t)to, keep);
  if (again.fd != maps->fd) raw(SYS_close, again.fd, 0, 0, 0, 0, 0);
  if (failed(moved)) {
    raw(SYS_munmap, to, (long)to_length, 0, 0, 0, 0);
    work->result = moved;
    return;
  }
  /* What is left behind reads as zeros. */
  if (keep) raw(SYS_mmap, (long)start, (long)length, prot, MAP_PRIVATE_ | MAP_ANONYMOUS_ | MAP_FIXED_, -1, 0);
  work->result = to;
  return;
plain:
  work->result = raw(SYS_mremap, (long)start, (long)length, (long)work->new_length, work->flags, (long)work->new_address, 0);
}

static long remap(uintptr_t start, size_t old_length, size_t new_length, int flags, uintptr_t new_address) {
  uintptr_t from = page_up(old_length), to = page_up(new_length);
  int known = MREMAP_MAYMOVE_ | MREMAP_FIXED_ | MREMAP_DONTUNMAP_;
  int moves = flags & (MREMAP_FIXED_ | MREMAP_DONTUNMAP_);
  /* A length of 0, what the kernel refuses, and a range that shrinks where it lies (which uncovers nothing). */
  int wrong = (start | (moves ? new_address : 0)) & (PAGE_BYTES - 1) || from < old_length || to < new_length ||
              start + from < start || (flags & ~known) || (moves && !(flags & MREMAP_MAYMOVE_)) ||
              ((flags & MREMAP_DONTUNMAP_) && from != to);
  if ((flags & MREMAP_FIXED_) && new_address < start + from && start < new_address + to) wrong = 1;
  if (wrong || from == 0 || to == 0 || (to < from && !moves))
    return raw(SYS_mremap, (long)start, (long)old_length, (long)new_length, flags, (long)new_address, 0);
  struct work work = {.run = remap_range, .start = start, .end = start + from, .new_length = to,
                      .new_address = new_address, .flags = flags};
  if (LIKELY(do_work(&work))) return work.result;
  /*
   * Nothing can be learned. Naming memory is refused on file mappings (Linux 5.17 where it is configured; it clears a
   * name that the memory had): then a growth might uncover old bytes, and is refused; callers allocate anew and copy.
   */
  enum { PR_SET_VMA_ = 0x53564d41, EBADF_ = 9 };
  if (to > from && raw(SYS_prctl, PR_SET_VMA_, 0, (long)start, PAGE_BYTES, 0, 0) == -EBADF_) return -ENOMEM_;
  return raw(SYS_mremap, (long)start, (long)old_length, (long)new_length, flags, (long)new_address, 0);
}

EXPORT void *mremap(void *address, size_t old_length, size_t new_length, int flags, ...) {
  uintptr_t new_address = 0;
  if (flags & (MREMAP_FIXED_ | MREMAP_DONTUNMAP_)) {
    va_list rest;
    va_start(rest, flags);
    new_address = va_arg(rest, uintptr_t);
    va_end(rest);
  }
  return (void *)warmfork_result(remap((uintptr_t)address, old_length, new_length, flags, new_address));
}

/* ---- protection keys: CRIU does not restore them --------------------------------------------------------------- */

EXPORT int pkey_alloc(unsigned flags, unsigned rights) {
  (void)flags, (void)rights;
  return (int)warmfork_result(-ENOSPC_);
}

/* ---- bind ------------------------------------------------------------------------------------------------------ */

/* Written once, at start. */
static int set_reuseport;

/*
 * A second template may bind a port that is being served, where the supervisor asks for it by WARMFORK_REUSEPORT=1.
 * Not for port 0, where the kernel chooses a free one.
 */
static long bind_socket(int fd, const void *address, unsigned length) {
  enum { AF_INET_ = 2, AF_INET6_ = 10, SOL_SOCKET_ = 1, SO_TYPE_ = 3, SO_REUSEPORT_ = 15, SOCK_STREAM_ = 1 };
  if (set_reuseport && address && length >= 16) {
    const uint16_t *header = address;
    int type = 0, on = 1;
    unsigned size = sizeof type;
    if ((header[0] == AF_INET_ || header[0] == AF_INET6_) && header[1] != 0 &&
        raw(SYS_getsockopt, fd, SOL_SOCKET_, SO_TYPE_, (long)&type, (long)&size, 0) == 0 && type == SOCK_STREAM_)
      raw(SYS_setsockopt, fd, SOL_SOCKET_, SO_REUSEPORT_, (long)&on, sizeof on, 0);
  }
  return raw(SYS_bind, fd, (long)address, length, 0, 0, 0);
}

EXPORT int bind(int fd, const void *address, unsigned length) {
  return (int)warmfork_result(bind_socket(fd, address, length));
}

/* ---- starting programs: a forked child does not hand the shim on ------------------------------------------------ */

/* Both written once, at start: the time namespace then (`time:[4026531834]`), and whether a helper is to strip. */
static char first_time_namespace[32];
static int strip_always;

static void time_namespace(char *name) {
  long n = raw(SYS_readlink, (long)"/proc/self/ns/time", (long)name, 31, 0, 0, 0);
  name[failed(n) ? 0 : n] = 0;
}

static void look_for_page_file(struct work *work, struct maps *maps) {
  struct region region;
  work->result = next_page_file(maps, 0, ~0UL, &region) == 1;
}

/*
 * Whether this process is a restored child, or was forked by one. CRIU gives each restored tree a time namespace of its
 * own, and its memory is mapped from a page file where it is shared; either tells, neither is so in a template.
 */
static int is_restored(void) {
  if (strip_always) return 1;
  char name[32];
  time_namespace(name);
  if (name[0] && first_time_namespace[0] && !same_text(name, first_time_namespace)) return 1;
  struct work work = {.run = look_for_page_file};
  return do_work(&work) && work.result == 1;
}

static const char preload_key[] = "LD_PRELOAD=";

/* Whether an entry of LD_PRELOAD of that length is the shim: by its file name. */
static int is_shim(const char *entry, size_t length) {
  size_t n = sizeof shim_name - 1;
  return ends_with(entry, length, shim_name, n) && (length == n || entry[length - n - 1] == '/');
}

/*
 * Writes `LD_PRELOAD=` and the entries of `value` but the shim; `to` may be `value`'s own string. Returns how many
 * entries are left, or -1 where the shim is not among them. Without `to` it only looks.
 */
static int without_shim(const char *variable, char *to) {
  const char *entry = variable + sizeof preload_key - 1;
  int found = 0, left = 0;
  if (to && to != variable) copy_bytes(to, variable, sizeof preload_key - 1);
  char *out = to ? to + sizeof preload_key - 1 : 0;
  for (;;) {
    size_t length = 0;
    while (entry[length] && entry[length] != ':' && entry[length] != ' ') length++;
    char separator = entry[length];
    const char *next = entry + length + 1;
    if (is_shim(entry, length)) {
      found = 1;
    } else if (length > 0) {
      if (out) {
        if (left > 0) *out++ = ':';
        copy_bytes(out, entry, length);
        out += length;
      }
      left++;
    }
    if (!separator) break;
    entry = next;
  }
  if (out) *out = 0;
  return found ? left : -1;
}

static int starts_with(const char *text, const char *start) {
  while (*start)
    if (*text++ != *start++) return 0;
  return 1;
}

/* One way to start a program; `go` gets the environment to start it with. */
struct launch {
  long (*go)(struct launch *, char **environment);
  const char *path;
  char **arguments;
  int fd, flags;
  /* posix_spawn's own. */
  void *pid;
  const void *actions, *attributes;
};

/*
 * Java starts programs through this helper of its own, which gets the environment to use from the JVM over a pipe. It
 * keeps the shim, and is told to strip it.
 */
static int is_helper(const char *path) {
  static const char name[] = "jspawnhelper";
  return path && ends_with(path, length_of(path), name, sizeof name - 1);
}

/* The environment is copied to the stack: a vfork child shares its parent's memory, and what it allocates stays there. */
static NOINLINE long launch_without_shim(struct launch *launch, char **environment, size_t count, size_t at) {
  size_t length = length_of(environment[at]);
  char *copy[count + 2];
  char value[length + 1];
  size_t n = 0;
  if (is_helper(launch->path)) {
    while (n < count) copy[n] = environment[n], n++;
    copy[n++] = (char *)strip_variable;
  } else {
    int left = without_shim(environment[at], value);
    for (size_t i = 0; i < count; i++) {
      if (i == at) {
        if (left > 0) copy[n++] = value;
      } else if (!strip_always || !same_text(environment[i], strip_variable)) {
        copy[n++] = environment[i];
      }
    }
  }
  copy[n] = 0;
  return launch->go(launch, copy);
}

static long start_program(struct launch *launch, char **environment) {
  if (!environment) return launch->go(launch, environment);
  size_t count = 0, at = ~0UL;
  for (; environment[count]; count++)
    if (at == ~0UL && starts_with(environment[count], preload_key) && without_shim(environment[count], 0) >= 0) at = count;
  /* A larger environment does not fit on every stack (musl's threads: 128 KiB). */
  if (at == ~0UL || count > 4096 || !is_restored()) return launch->go(launch, environment);
  return launch_without_shim(launch, environment, count, at);
}

/* -- the functions of the libraries behind ours -- */

struct search {
  const char *name;
  uintptr_t own;
  int past_own;
  void *found;
};

static uint32_t gnu_hash(const char *name) {
  uint32_t hash = 5381;
  for (; *name; name++) hash = hash * 33 + (unsigned char)*name;
  return hash;
}

static int look_in_object(struct dl_phdr_info *info, size_t size, void *data) {
  (void)size;
  struct search *search = data;
  const Elf64_Dyn *dynamic = 0;
  int own = 0;
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const Elf64_Phdr *header = &info->dlpi_phdr[i];
    uintptr_t start = info->dlpi_addr + header->p_vaddr;
    if (header->p_type == PT_DYNAMIC) dynamic = (const Elf64_Dyn *)start;
    if (header->p_type == PT_LOAD && search->own >= start && search->own - start < header->p_memsz) own = 1;
  }
  if (own) {
    search->past_own = 1;
    return 0;
  }
  if (!search->past_own || !dynamic) return 0;
  uintptr_t symbols = 0, strings = 0, hash = 0, gnu = 0, versions = 0;
  for (; dynamic->d_tag != DT_NULL; dynamic++) {
    /* glibc has added the load address already, musl and the vDSO have not. */
    uintptr_t value = dynamic->d_un.d_ptr;
    if (value < info->dlpi_addr) value += info->dlpi_addr;
    if (dynamic->d_tag == DT_SYMTAB) symbols = value;
    if (dynamic->d_tag == DT_STRTAB) strings = value;
    if (dynamic->d_tag == DT_HASH) hash = value;
    if (dynamic->d_tag == DT_GNU_HASH) gnu = value;
    if (dynamic->d_tag == DT_VERSYM) versions = value;
  }
  if (!symbols || !strings) return 0;
  const Elf64_Sym *table = (const Elf64_Sym *)symbols;
  uint32_t first = 0, last = 0;
  const uint32_t *chain = 0;
  if (gnu) {
    const uint32_t *head = (const uint32_t *)gnu;
    const uint32_t *buckets = (const uint32_t *)((const uint64_t *)(head + 4) + head[2]);
    if (head[0] == 0) return 0;
    first = buckets[gnu_hash(search->name) % head[0]];
    if (first < head[1]) return 0;
    chain = buckets + head[0] - head[1];
    last = ~0U;
  } else if (hash) {
    last = ((const uint32_t *)hash)[1];
  }
  for (uint32_t i = first; i < last; i++) {
    const Elf64_Sym *symbol = &table[i];
    int type = ELF64_ST_TYPE(symbol->st_info);
    /* Of a name with several versions the one without the hidden bit is the default. */
    int hidden = versions && (((const uint16_t *)versions)[i] & 0x8000);
    if (symbol->st_shndx != SHN_UNDEF && type == STT_FUNC && !hidden &&
        same_text((const char *)strings + symbol->st_name, search->name)) {
      search->found = (void *)(info->dlpi_addr + symbol->st_value);
      return 1;
    }
    if (chain && (chain[i] & 1)) break;
  }
  return 0;
}

enum next { EXECVPE, POSIX_SPAWN, POSIX_SPAWNP, SYSTEM, POPEN, NEXT_COUNT };
static const char next_names[NEXT_COUNT][16] = {"execvpe", "posix_spawn", "posix_spawnp", "system", "popen"};
static void *volatile next_functions[NEXT_COUNT];

/*
 * What dlsym(RTLD_NEXT) does. Not dlsym itself: before glibc 2.34 it is in a library that need not be loaded. All are
 * looked up at start, since the walk takes a lock of the loader's; later only where a constructor came before ours.
 */
static void *next_function(enum next which) {
  if (next_functions[which]) return next_functions[which];
  struct search search = {.name = next_names[which], .own = (uintptr_t)&shim_name};
  if (dl_iterate_phdr) dl_iterate_phdr(look_in_object, &search);
  return next_functions[which] = search.found;
}

/* -- exec -- */

static long go_execve(struct launch *launch, char **environment) {
  return raw(SYS_execve, (long)launch->path, (long)launch->arguments, (long)environment, 0, 0, 0);
}

static long go_execveat(struct launch *launch, char **environment) {
  return raw(SYS_execveat, launch->fd, (long)launch->path, (long)launch->arguments, (long)environment, launch->flags, 0);
}

/* libc's searches PATH, and gives a script without `#!` to the shell. errno is set by it. */
static long go_execvpe(struct launch *launch, char **environment) {
  int (*next)(const char *, char **, char **) = next_function(EXECVPE);
  if (!next) return -ENOSYS_;
  next(launch->path, launch->arguments, environment);
  return -*__errno_location();
}

static long exec_at(int fd, const char *path, char **arguments, char **environment, int flags) {
  struct launch launch = {.go = go_execveat, .fd = fd, .path = path, .arguments = arguments, .flags = flags};
  return start_program(&launch, environment);
}

static long exec_path(const char *path, char **arguments, char **environment) {
  struct launch launch = {.go = go_execve, .path = path, .arguments = arguments};
  return start_program(&launch, environment);
}

static long exec_search(const char *file, char **arguments, char **environment) {
  struct launch launch = {.go = go_execvpe, .path = file, .arguments = arguments};
  return start_program(&launch, environment);
}

static char **own_environment(void) { return &environ ? environ : 0; }

EXPORT int execve(const char *path, char *const arguments[], char *const environment[]) {
  return (int)warmfork_result(exec_path(path, (char **)arguments, (char **)environment));
}

EXPORT int execv(const char *path, char *const arguments[]) {
  return (int)warmfork_result(exec_path(path, (char **)arguments, own_environment()));
}

EXPORT int execvp(const char *file, char *const arguments[]) {
  return (int)warmfork_result(exec_search(file, (char **)arguments, own_environment()));
}

EXPORT int execvpe(const char *file, char *const arguments[], char *const environment[]) {
  return (int)warmfork_result(exec_search(file, (char **)arguments, (char **)environment));
}

EXPORT int execveat(int fd, const char *path, char *const arguments[], char *const environment[], int flags) {
  return (int)warmfork_result(exec_at(fd, path, (char **)arguments, (char **)environment, flags));
}

EXPORT int fexecve(int fd, char *const arguments[], char *const environment[]) {
  enum { AT_EMPTY_PATH_ = 0x1000 };
  if (fd < 0 || !arguments || !environment) return (int)warmfork_result(-EINVAL_);
  return (int)warmfork_result(exec_at(fd, "", (char **)arguments, (char **)environment, AT_EMPTY_PATH_));
}

/* The arguments of a call with a list of them, as an array; `last` is what follows the list. */
#define COLLECT(first, last)                                      \
  va_list rest;                                                   \
  va_start(rest, first);                                          \
  size_t count = 1;                                               \
  if (first)                                                      \
    while (va_arg(rest, char *)) count++;                         \
  va_end(rest);                                                   \
  char *arguments[count + 1];                                     \
  arguments[0] = (char *)first;                                   \
  va_start(rest, first);                                          \
  for (size_t i = 1; i <= count && first; i++) arguments[i] = va_arg(rest, char *); \
  last;                                                           \
  va_end(rest)

EXPORT int execl(const char *path, const char *argument, ...) {
  COLLECT(argument, );
  return (int)warmfork_result(exec_path(path, arguments, own_environment()));
}

EXPORT int execlp(const char *file, const char *argument, ...) {
  COLLECT(argument, );
  return (int)warmfork_result(exec_search(file, arguments, own_environment()));
}

EXPORT int execle(const char *path, const char *argument, ...) {
  char **environment;
  COLLECT(argument, environment = va_arg(rest, char **));
  return (int)warmfork_result(exec_path(path, arguments, environment));
}

/* -- posix_spawn: returns the error, and leaves errno -- */

typedef int spawn_function(void *, const char *, const void *, const void *, char **, char **);

static long go_spawn(struct launch *launch, char **environment) {
  spawn_function *next = next_function((enum next)launch->flags);
  if (!next) return ENOSYS_;
  return next(launch->pid, launch->path, launch->actions, launch->attributes, launch->arguments, environment);
}

static int spawn(enum next which, void *pid, const char *path, const void *actions, const void *attributes,
                 char *const arguments[], char *const environment[]) {
  struct launch launch = {.go = go_spawn, .path = path, .arguments = (char **)arguments, .flags = which,
                          .pid = pid, .actions = actions, .attributes = attributes};
  return (int)start_program(&launch, (char **)environment);
}

EXPORT int posix_spawn(void *pid, const char *path, const void *actions, const void *attributes,
                       char *const arguments[], char *const environment[]) {
  return spawn(POSIX_SPAWN, pid, path, actions, attributes, arguments, environment);
}

EXPORT int posix_spawnp(void *pid, const char *file, const void *actions, const void *attributes,
                        char *const arguments[], char *const environment[]) {
  return spawn(POSIX_SPAWNP, pid, file, actions, attributes, arguments, environment);
}

/* -- system and popen: they take the process's own environment -- */

/*
 * Takes the shim out of our own environment. Where it is the last entry, as the supervisor puts it, that is one byte
 * written, the same by every thread; else the entries after it move up, which one thread does.
 */
static void strip_own_environment(void) {
  static volatile int busy;
  char **environment = own_environment();
  if (!environment) return;
  for (; *environment; environment++) {
    if (!starts_with(*environment, preload_key) || without_shim(*environment, 0) < 0) continue;
    if (!is_restored()) return;
    if (__sync_lock_test_and_set(&busy, 1)) return;
    without_shim(*environment, *environment);
    __sync_lock_release(&busy);
    return;
  }
}

EXPORT int system(const char *command) {
  int (*next)(const char *) = next_function(SYSTEM);
  if (!next) return (int)warmfork_result(-ENOSYS_);
  if (command) strip_own_environment();
  return next(command);
}

EXPORT void *popen(const char *command, const char *mode) {
  void *(*next)(const char *, const char *) = next_function(POPEN);
  if (!next) {
    warmfork_result(-ENOSYS_);
    return 0;
  }
  strip_own_environment();
  return next(command, mode);
}

/* ---- syscall --------------------------------------------------------------------------------------------------- */

DEFINE_SYSCALL_FUNCTION;

/* The calls that programs make by number, like the functions above. */
__attribute__((used)) long warmfork_syscall(long number, long a, long b, long c, long d, long e, long f) {
  long result;
  switch (number) {
    /* CRIU cannot dump a ring; libuv, when told that there are none, goes on without. */
    case SYS_io_uring_setup:
    case SYS_io_uring_enter:
    case SYS_io_uring_register: result = -ENOSYS_; break;
    case SYS_pkey_alloc: result = -ENOSPC_; break;
    case SYS_madvise: result = advise((uintptr_t)a, (size_t)b, (int)c); break;
    case SYS_process_madvise: result = advise_many((int)a, (const struct vector *)b, (size_t)c, (int)d, (unsigned)e); break;
    case SYS_mremap: result = remap((uintptr_t)a, (size_t)b, (size_t)c, (int)d, (uintptr_t)e); break;
    case SYS_bind: result = bind_socket((int)a, (const void *)b, (unsigned)c); break;
    case SYS_execve: result = exec_path((const char *)a, (char **)b, (char **)c); break;
    case SYS_execveat: result = exec_at((int)a, (const char *)b, (char **)c, (char **)d, (int)e); break;
    default: result = raw(number, a, b, c, d, e, f); break;
  }
  return warmfork_result(result);
}

/* ---- start ----------------------------------------------------------------------------------------------------- */

/* glibc hands the arguments of main to constructors, and may not have set `environ` yet; musl has, and hands nothing. */
__attribute__((constructor)) static void start(int count, char **arguments, char **given) {
  (void)count, (void)arguments;
  char **environment = own_environment();
  if (!environment && gnu_get_libc_version) environment = given;
  for (; environment && *environment; environment++) {
    if (same_text(*environment, reuseport_variable)) set_reuseport = 1;
    if (same_text(*environment, strip_variable)) strip_always = 1;
  }
  time_namespace(first_time_namespace);
  for (int i = 0; i < NEXT_COUNT; i++) next_function((enum next)i);
}
