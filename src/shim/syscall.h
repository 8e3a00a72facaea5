/*
 * System calls without a C library, for the shim and the guard. Everything that is particular to x86-64 stands in the
 * one #if block below: another architecture is another block with the same names, and nothing else changes.
 */
#ifndef WARMFORK_SYSCALL_H
#define WARMFORK_SYSCALL_H

#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__)

#define PAGE_BYTES 4096UL

enum {
  SYS_read = 0,
  SYS_write = 1,
  SYS_close = 3,
  SYS_poll = 7,
  SYS_mmap = 9,
  SYS_munmap = 11,
  SYS_rt_sigaction = 13,
  SYS_rt_sigprocmask = 14,
  SYS_ioctl = 16,
  SYS_mremap = 25,
  SYS_msync = 26,
  SYS_madvise = 28,
  SYS_nanosleep = 35,
  SYS_getpid = 39,
  SYS_bind = 49,
  SYS_setsockopt = 54,
  SYS_getsockopt = 55,
  SYS_clone = 56,
  SYS_execve = 59,
  SYS_exit = 60,
  SYS_wait4 = 61,
  SYS_kill = 62,
  SYS_chdir = 80,
  SYS_readlink = 89,
  SYS_setpgid = 109,
  SYS_getppid = 110,
  SYS_setsid = 112,
  SYS_prctl = 157,
  SYS_mount = 165,
  SYS_getdents64 = 217,
  SYS_clock_gettime = 228,
  SYS_exit_group = 231,
  SYS_openat = 257,
  SYS_unlinkat = 263,
  SYS_unshare = 272,
  SYS_signalfd4 = 289,
  SYS_prlimit64 = 302,
  SYS_setns = 308,
  SYS_execveat = 322,
  SYS_mlock2 = 325,
  SYS_pkey_alloc = 330,
  SYS_pidfd_send_signal = 424,
  SYS_io_uring_setup = 425,
  SYS_io_uring_enter = 426,
  SYS_io_uring_register = 427,
  SYS_pidfd_open = 434,
  SYS_clone3 = 435,
  SYS_close_range = 436,
  SYS_process_madvise = 440,
};

/* A system call as the kernel answers it: -errno where it fails. */
static inline long raw(long number, long a, long b, long c, long d, long e, long f) {
  long result;
  register long r10 __asm__("r10") = d;
  register long r8 __asm__("r8") = e;
  register long r9 __asm__("r9") = f;
  __asm__ volatile("syscall"
                   : "=a"(result)
                   : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                   : "rcx", "r11", "memory");
  return result;
}

static inline void zero_bytes(void *to, size_t count) {
  __asm__ volatile("rep stosb" : "+D"(to), "+c"(count) : "a"(0) : "memory");
}

/* Forwards: right for ranges that overlap where `to` lies below `from`. */
static inline void copy_bytes(void *to, const void *from, size_t count) {
  __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(count) : : "memory");
}

/*
 * clone(2) with a stack of its own; the child calls function(argument) and exits. Returns the child's id or -errno.
 * `top` is aligned to 16 bytes.
 */
static inline long clone_call(long flags, void *top, void (*function)(void *), void *argument) {
  void **stack = (void **)top - 2;
  stack[0] = argument;
  stack[1] = (void *)function;
  long result;
  register long r10 __asm__("r10") = 0;
  register long r8 __asm__("r8") = 0;
  __asm__ volatile("syscall\n\t"
                   "test %%rax, %%rax\n\t"
                   "jnz 1f\n\t"
                   "xor %%ebp, %%ebp\n\t"
                   "pop %%rdi\n\t"
                   "pop %%rax\n\t"
                   "call *%%rax\n\t"
                   "mov $60, %%eax\n\t"
                   "xor %%edi, %%edi\n\t"
                   "syscall\n\t"
                   "hlt\n"
                   "1:"
                   : "=a"(result)
                   : "a"(SYS_clone), "D"(flags), "S"(stack), "d"(0), "r"(r10), "r"(r8)
                   : "rcx", "r11", "memory");
  return result;
}

/*
 * The body of libc's syscall(): the numbers of interest go to warmfork_syscall() with the arguments as they came, all
 * others to the kernel without a stack frame, as in libc. (A frame would break callers of syscall(SYS_vfork).)
 */
#define DEFINE_SYSCALL_FUNCTION                      \
  __asm__(                                           \
      ".text\n.globl syscall\n.type syscall, @function\nsyscall:\n" \
      "  .cfi_startproc\n"                           \
      "  cmp $28, %rdi\n  je 1f\n"                   \
      "  cmp $25, %rdi\n  je 1f\n"                   \
      "  cmp $49, %rdi\n  je 1f\n"                   \
      "  cmp $59, %rdi\n  je 1f\n"                   \
      "  cmp $322, %rdi\n  je 1f\n"                  \
      "  cmp $330, %rdi\n  je 1f\n"                  \
      "  cmp $425, %rdi\n  jl 2f\n"                  \
      "  cmp $427, %rdi\n  jle 1f\n"                 \
      "  cmp $440, %rdi\n  je 1f\n"                  \
      "2:\n"                                         \
      "  mov %rdi, %rax\n  mov %rsi, %rdi\n  mov %rdx, %rsi\n  mov %rcx, %rdx\n" \
      "  mov %r8, %r10\n  mov %r9, %r8\n  mov 8(%rsp), %r9\n" \
      "  syscall\n"                                  \
      "  cmp $-4095, %rax\n  jae 3f\n  ret\n"        \
      "3:\n  mov %rax, %rdi\n  jmp warmfork_result\n" \
      "1:\n  jmp warmfork_syscall\n"                 \
      "  .cfi_endproc\n.size syscall, .-syscall\n")

/* The entry of a program without libc: calls int begin(long argc, char **argv) and exits with what it returns. */
#define DEFINE_START               \
  __asm__(                         \
      ".text\n.globl _start\n_start:\n" \
      "  xor %ebp, %ebp\n"         \
      "  mov (%rsp), %rdi\n"       \
      "  lea 8(%rsp), %rsi\n"      \
      "  and $-16, %rsp\n"         \
      "  call begin\n"             \
      "  mov %eax, %edi\n"         \
      "  mov $231, %eax\n"         \
      "  syscall\n")

#else
#error "warmfork's native parts know x86-64 only; add a block for this architecture here"
#endif

enum {
  EPERM_ = 1,
  ENOENT_ = 2,
  ESRCH_ = 3,
  EINTR_ = 4,
  EAGAIN_ = 11,
  ENOMEM_ = 12,
  EFAULT_ = 14,
  EBUSY_ = 16,
  EEXIST_ = 17,
  EINVAL_ = 22,
  ENFILE_ = 23,
  EMFILE_ = 24,
  ENOTTY_ = 25,
  ENOSPC_ = 28,
  ENAMETOOLONG_ = 36,
  ENOSYS_ = 38,
};

#define AT_FDCWD_ (-100L)
#define O_CLOEXEC_ 02000000L
#define O_DIRECTORY_ 0200000L
#define O_NOFOLLOW_ 0400000L

/* Whether an answer of the kernel is -errno. */
static inline int failed(long result) { return (unsigned long)result > -4096UL; }

static inline size_t length_of(const char *text) {
  size_t n = 0;
  while (text[n]) n++;
  return n;
}

static inline int same_bytes(const char *a, const char *b, size_t count) {
  for (size_t i = 0; i < count; i++)
    if (a[i] != b[i]) return 0;
  return 1;
}

static inline int same_text(const char *a, const char *b) {
  while (*a && *a == *b) a++, b++;
  return *a == *b;
}

#endif
