// SPDX-License-Identifier: Apache-2.0
//
// The limits that the product is measured against, in the fewest instructions that do the same to the memory.
//
//   limits stop MEGABYTES PERMILLE ROUNDS   stop a child, PAGEMAP_SCAN get and protect, read the dirty pages, let go: one thread
//   limits copy MEGABYTES ROUNDS DIRECTORY  read a child's memory and write it to new files: two threads, a file each (on
//       one file they would take turns)
//   limits fill MEGABYTES ROUNDS DIRECTORY thp|4k   read a warm file into fresh memory: one thread, and then two; then two
//       that add up all words of what they read before they write it into the fresh memory of another process
//
//   limits warm MEGABYTES thp|4k           touch that much memory, of such pages, and give it back
//
// Prints one line of microseconds per round ("stop": scan, copy, total; "fill": one, two, checked), and before each waits for a line on its
// standard input, so that limits and ours can take turns (end of file: as fast as it goes).
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef UFFD_FEATURE_WP_ASYNC
#define UFFD_FEATURE_WP_ASYNC (1 << 15)
#endif
#ifndef UFFD_FEATURE_WP_UNPOPULATED
#define UFFD_FEATURE_WP_UNPOPULATED (1 << 13)
#endif
struct region { uint64_t start, end, categories; };
struct scan {
	uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages, inverted, mask, anyof, returned;
};
#define SCAN_IOCTL 0xc0606610UL
enum { WRITTEN = 2 };

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

static void *fresh(size_t size, int huge);

// Where a hypervisor takes back memory that lay free for seconds, the next touch of it costs a multiple.  What is to be
// measured is not that: free memory is touched once before each measurement that takes some, of the limits and of ours.
static void warm(size_t size, int huge)
{
	char *at = fresh(size, huge);
	for (size_t i = 0; i < size; i += 4096)
		((volatile char *)at)[i] = 1;
	munmap(at, size);
}

static void wait_for_turn(int round, size_t size, int huge)
{
	int c = 0;
	fflush(stdout);
	while (round >= 0 && c != '\n' && c != EOF)
		c = getchar();
	if (size)
		warm(size + size / 4, huge);
}

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static void *fresh(size_t size, int huge)
{
	char *raw = mmap(NULL, size + (2 << 20), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (raw == MAP_FAILED)
		die("mmap");
	char *at = (char *)(((uintptr_t)raw + (2 << 20) - 1) & ~(uintptr_t)((2 << 20) - 1));
	madvise(at, size, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
	return at;
}

static void randomise(char *at, size_t size)
{
	uint64_t x = 88172645463325252ULL;
	for (size_t i = 0; i < size / 8; i++) {
		x ^= x << 13, x ^= x >> 7, x ^= x << 17;
		((uint64_t *)at)[i] = x;
	}
}

static pid_t child(char *memory, size_t size, int tracked, int go[2], int done[2], unsigned long permille)
{
	if (pipe(go) || pipe(done))
		die("pipe");
	pid_t pid = fork();
	if (pid)
		return pid;
	randomise(memory, size);
	int fd = tracked ? syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY) : -1;
	if (tracked) {
		struct uffdio_api api = {.api = UFFD_API,
					 .features = UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED};
		struct uffdio_register reg = {.range = {(uintptr_t)memory, size}, .mode = UFFDIO_REGISTER_MODE_WP};
		if (ioctl(fd, UFFDIO_API, &api) || ioctl(fd, UFFDIO_REGISTER, &reg))
			die("userfaultfd");
	}
	size_t nr_pages = size / 4096, stride = (size_t)(nr_pages * 0.381966) | 1, at = 1;
	char c;
	for (;;) {
		if (write(done[1], "x", 1) != 1 || read(go[0], &c, 1) != 1 || c == 'q')
			_exit(0);
		for (size_t i = 0; i < nr_pages * permille / 1000; i++, at = (at + stride) % nr_pages)
			((volatile uint64_t *)(memory + at * 4096))[0] += 1;
	}
}

static void wait_done(int done[2])
{
	char c;
	if (read(done[0], &c, 1) != 1)
		die("child");
}

static void stop_floor(size_t size, unsigned long permille, int rounds)
{
	int go[2], done[2];
	char *memory = fresh(size, 0);
	pid_t pid = child(memory, size, 1, go, done, permille);
	char path[64];
	wait_done(done);
	snprintf(path, sizeof path, "/proc/%d/pagemap", pid);
	int pagemap = open(path, O_RDONLY);
	size_t nr_pages = size / 4096;
	struct region *vec = malloc(nr_pages * sizeof *vec);
	struct iovec *iov = malloc(nr_pages * sizeof *iov);
	char *buffer = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	memset(vec, 1, nr_pages * sizeof *vec);
	memset(iov, 1, nr_pages * sizeof *iov);
	if (ptrace(PTRACE_SEIZE, pid, 0, 0))
		die("seize");
	for (int r = -2; r < rounds; r++) {
		wait_for_turn(r, 0, 0);
		if (write(go[1], "g", 1) != 1)
			die("go");
		wait_done(done);
		double t0 = now();
		ptrace(PTRACE_INTERRUPT, pid, 0, 0);
		waitpid(pid, NULL, __WALL);
		double t1 = now();
		struct scan arg = {.size = sizeof arg, .flags = 3, .start = (uintptr_t)memory,
				   .end = (uintptr_t)memory + size, .vec = (uintptr_t)vec, .vec_len = nr_pages,
				   .mask = WRITTEN, .returned = WRITTEN};
		long n = ioctl(pagemap, SCAN_IOCTL, &arg);
		if (n < 0)
			die("PAGEMAP_SCAN");
		double t2 = now();
		size_t at = 0;
		for (long i = 0; i < n; i++)
			iov[i] = (struct iovec){(void *)vec[i].start, vec[i].end - vec[i].start};
		for (long i = 0; i < n; i += 1024) {
			long count = n - i < 1024 ? n - i : 1024;
			struct iovec into = {buffer + at, size - at};
			ssize_t got = process_vm_readv(pid, &into, 1, iov + i, count, 0);
			if (got < 0)
				die("process_vm_readv");
			at += got;
		}
		ptrace(PTRACE_CONT, pid, 0, 0);
		double t3 = now();
		if (r >= 0)
			printf("%.0f %.0f %.0f\n", t2 - t1, t3 - t2, t3 - t0);
	}
	kill(pid, SIGKILL);
	waitpid(pid, NULL, __WALL);
}

struct part { pid_t pid; int fd, second_fd; char *memory; size_t start, end; char *into; };

static void *copy_part(void *arg)
{
	struct part *p = arg;
	char *buffer = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	for (size_t at = p->start; at < p->end; at += 1 << 20) {
		struct iovec to = {buffer, 1 << 20}, from = {p->memory + at, 1 << 20};
		if (process_vm_readv(p->pid, &to, 1, &from, 1, 0) != 1 << 20 || pwrite(p->fd, buffer, 1 << 20, at - p->start) != 1 << 20)
			die("copy");
	}
	munmap(buffer, 1 << 20);
	return NULL;
}

static void *fill_part(void *arg)
{
	struct part *p = arg;
	for (size_t at = p->start; at < p->end; at += 1 << 20)
		if (pread(p->fd, p->into + at, 1 << 20, at) != 1 << 20)
			die("fill");
	return NULL;
}

static double both(void *(*work)(void *), struct part part, size_t size, int nr_threads)
{
	pthread_t threads[2];
	struct part parts[2];
	double start = now();
	for (int i = 0; i < nr_threads; i++) {
		parts[i] = part;
		if (i && part.second_fd)
			parts[i].fd = part.second_fd;
		parts[i].start = size / nr_threads * i;
		parts[i].end = size / nr_threads * (i + 1);
		pthread_create(&threads[i], NULL, work, &parts[i]);
	}
	for (int i = 0; i < nr_threads; i++)
		pthread_join(threads[i], NULL);
	return now() - start;
}

static volatile uint64_t sum_of_all;

static void *fill_checked_part(void *arg)
{
	struct part *p = arg;
	uint64_t *buffer = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	uint64_t sum = 0;
	for (size_t at = p->start; at < p->end; at += 1 << 20) {
		if (pread(p->fd, buffer, 1 << 20, at) != 1 << 20)
			die("fill");
		for (size_t i = 0; i < (1 << 20) / 8; i++)
			sum += buffer[i];
		struct iovec from = {buffer, 1 << 20}, to = {p->into + at, 1 << 20};
		if (process_vm_writev(p->pid, &from, 1, &to, 1, 0) != 1 << 20)
			die("process_vm_writev");
	}
	__atomic_fetch_add(&sum_of_all, sum, __ATOMIC_RELAXED);
	munmap(buffer, 1 << 20);
	return NULL;
}

// The memory of a process that sleeps, which never touched it.
static double fill_checked(int fd, size_t size, int huge)
{
	char *into = fresh(size, huge);
	pid_t pid = fork();
	if (pid < 0)
		die("fork");
	if (pid == 0) {
		pause();
		_exit(0);
	}
	double took = both(fill_checked_part, (struct part){.fd = fd, .pid = pid, .into = into}, size, 2);
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
	munmap(into, size);
	return took;
}

int main(int argc, char **argv)
{
	size_t size = argc > 2 ? (size_t)atol(argv[2]) << 20 : 0;
	if (argc == 4 && !strcmp(argv[1], "warm")) {
		warm(size + size / 4, argv[3][0] == 't');
		return 0;
	}
	if (argc < 5)
		return 2;
	char path[512];
	if (!strcmp(argv[1], "stop")) {
		stop_floor(size, atol(argv[3]), atoi(argv[4]));
		return 0;
	}
	int rounds = atoi(argv[3]), go[2], done[2];
	snprintf(path, sizeof path, "%s/limit", argv[4]);
	if (!strcmp(argv[1], "copy")) {
		char *memory = fresh(size, 0);
		pid_t pid = child(memory, size, 0, go, done, 0);
		wait_done(done);
		for (int r = -1; r < rounds; r++) {
			wait_for_turn(r, size, 0);
			int fds[2];
			for (int i = 0; i < 2; i++) { // each is gone when it is closed
				fds[i] = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
				unlink(path);
			}
			double took = both(copy_part, (struct part){.pid = pid, .fd = fds[0], .second_fd = fds[1], .memory = memory}, size, 2);
			close(fds[0]);
			close(fds[1]);
			if (r >= 0)
				printf("%.0f\n", took);
		}
		kill(pid, SIGKILL);
		waitpid(pid, NULL, 0);
		return 0;
	}
	int huge = argc > 5 && argv[5][0] == 't', fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
	char *content = fresh(size, 0);
	randomise(content, size);
	for (size_t at = 0; at < size; at += 1 << 20)
		if (pwrite(fd, content + at, 1 << 20, at) != 1 << 20)
			die("write");
	munmap(content, size);
	for (int r = -1; r < rounds; r++) {
		double took[2];
		wait_for_turn(r, size, huge);
		for (int n = 1; n <= 2; n++) {
			char *into = fresh(size, huge);
			took[n - 1] = both(fill_part, (struct part){.fd = fd, .into = into}, size, n);
			munmap(into, size);
		}
		double checked = fill_checked(fd, size, huge);
		if (r >= 0)
			printf("%.0f %.0f %.0f\n", took[0], took[1], checked);
	}
	unlink(path);
	return 0;
}
