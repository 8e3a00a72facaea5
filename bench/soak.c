// What the soak forks: says `ready`, and answers each line with the line, its pid, and how many of its threads have answered with
// ids of their own. Its argument: how many threads it has besides the first one.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MOST 64

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t asked = PTHREAD_COND_INITIALIZER, answered = PTHREAD_COND_INITIALIZER;
static int question, answers, count;
static long ids[MOST];

static void *wait_for_questions(void *argument) {
  (void)argument;
  pthread_mutex_lock(&lock);
  for (int seen = question;;) {
    while (seen == question) pthread_cond_wait(&asked, &lock);
    seen = question;
    ids[answers++] = syscall(SYS_gettid);
    pthread_cond_signal(&answered);
  }
}

// How many have answered, each with another id than all others and the process.
static int ask_threads(void) {
  int right = 0;
  pthread_mutex_lock(&lock);
  answers = 0;
  question++;
  pthread_cond_broadcast(&asked);
  while (answers < count) pthread_cond_wait(&answered, &lock);
  for (int i = 0; i < count; i++) {
    int own = ids[i] != getpid() && syscall(SYS_tgkill, getpid(), ids[i], 0) == 0;
    for (int other = 0; other < i; other++) own = own && ids[other] != ids[i];
    right += own;
  }
  pthread_mutex_unlock(&lock);
  return right;
}

int main(int argc, char **argv) {
  char line[256];
  count = argc > 1 ? atoi(argv[1]) : 0;
  if (count < 0 || count > MOST) return 2;
  for (int i = 0; i < count; i++) {
    pthread_t thread;
    if (pthread_create(&thread, 0, wait_for_questions, 0)) return 1;
  }
  puts("ready");
  fflush(stdout);
  while (fgets(line, sizeof line, stdin)) {
    line[strcspn(line, "\n")] = 0;
    printf("%s %d %d\n", line, getpid(), ask_threads());
    fflush(stdout);
  }
  return 0;
}
