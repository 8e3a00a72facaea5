/*
 * The yardstick: what fork(2) takes in a process with as much touched memory as the template, until the child's first
 * byte arrives. Usage: fork2 MIB small|huge. Prints `ready`, then for each line on stdin one fork's milliseconds.
 * `small` has 4 KiB pages (MADV_NOHUGEPAGE), as the heaps of runtimes mostly do; `huge` asks for huge pages.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static double now(void) {
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

int main(int argc, char **argv) {
	if (argc != 3) {
		fprintf(stderr, "usage: fork2 MIB small|huge\n");
		return 2;
	}
	size_t size = strtoul(argv[1], NULL, 10) << 20;
	int huge = strcmp(argv[2], "huge") == 0;
	if (size > 0) {
		char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (memory == MAP_FAILED) {
			perror("fork2: mmap");
			return 1;
		}
		madvise(memory, size, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
		for (size_t at = 0; at < size; at += 4096) memory[at] = (char)at + 1;
	}
	puts("ready");
	fflush(stdout);
	char line[16];
	while (fgets(line, sizeof line, stdin)) {
		int ends[2];
		if (pipe(ends)) {
			perror("fork2: pipe");
			return 1;
		}
		double before = now();
		pid_t pid = fork();
		if (pid < 0) {
			perror("fork2: fork");
			return 1;
		}
		if (pid == 0) {
			if (write(ends[1], "x", 1) != 1) _exit(1);
			_exit(0);
		}
		char byte;
		if (read(ends[0], &byte, 1) != 1) return 1;
		double after = now();
		printf("%.3f\n", after - before);
		fflush(stdout);
		waitpid(pid, NULL, 0);
		close(ends[0]);
		close(ends[1]);
	}
	return 0;
}
