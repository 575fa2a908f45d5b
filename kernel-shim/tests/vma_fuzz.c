// SPDX-License-Identifier: Apache-2.0
/*
 * Mapping fuzzer with a memory of its own: random changes of an address space, writes in between, and a
 * clear_refs now and then. Before each clear every page is compared with what was done to it.
 *
 *   vma_fuzz SEED NR_OPERATIONS precise|default|mixed [NR_PAGES]
 *
 * Missed: written or moved here since the last clear, present, and reads clean. Over-reported: present, older than the last
 * clear, not written since, and reads dirty. With "precise" a missed page is a failure (exit 1); with "default"
 * it is the known loss of stock kernels and only counted; "mixed" switches at random and judges nothing.
 * A second thread reads through process_vm_readv() all the time, for the sake of faults beside the changes.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096ul
#define MOST 2048
#define TABLE 512 /* pages of one page table */
#define PR_SET_PRECISE_SOFTDIRTY 0x50534454
#define RW (PROT_READ | PROT_WRITE)

enum { UNMAPPED, ANON, FILE_PRIVATE };
struct page {
	unsigned char kind, prot, written, fresh, backed;
};

static struct page pages[MOST];
static int nr_pages = MOST;
static char *arena;
static uint64_t state;
static int pagemap_fd, clear_fd, file_fd;
static long missed, over, exact, clears, most_vmas, tables;
static volatile int stop;

static unsigned rnd(unsigned below)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return (state >> 11) % below;
}

static void die(const char *what)
{
	perror(what);
	exit(2);
}

static char *at(int i)
{
	return arena + i * PAGE;
}

static void forget(int from, int n)
{
	memset(pages + from, 0, n * sizeof(*pages));
}

static void became(int from, int n, int kind, int prot)
{
	for (int i = from; i < from + n; i++)
		pages[i] = (struct page){ .kind = kind, .prot = prot, .fresh = 1 };
}

static void *reader(void *unused)
{
	uint64_t x = 88172645463325252ull;
	char byte;

	while (!stop) {
		struct iovec to = { &byte, 1 }, from;

		x ^= x << 13;
		x ^= x >> 7;
		x ^= x << 17;
		from = (struct iovec){ at((x >> 20) % nr_pages), 1 };
		process_vm_readv(getpid(), &to, 1, &from, 1, 0);
		usleep(50);
	}
	return unused;
}

static long count_vmas(void)
{
	char buffer[65536];
	long n = 0;
	ssize_t got;
	int fd = open("/proc/self/maps", O_RDONLY);

	while ((got = read(fd, buffer, sizeof(buffer))) > 0)
		for (ssize_t i = 0; i < got; i++)
			n += buffer[i] == '\n';
	close(fd);
	return n;
}

static void check_and_clear(void)
{
	static uint64_t words[MOST];
	long vmas = count_vmas();

	if (vmas > most_vmas)
		most_vmas = vmas;
	if (pread(pagemap_fd, words, nr_pages * 8, (uintptr_t)arena / PAGE * 8) != nr_pages * 8)
		die("pagemap");
	for (int i = 0; i < nr_pages; i++) {
		int dirty = words[i] >> 55 & 1, present = words[i] >> 63;

		if (pages[i].kind == UNMAPPED || !present)
			continue;
		if (pages[i].written && !dirty)
			missed++;
		else if (!pages[i].written && !pages[i].fresh && dirty)
			over++;
		else
			exact++;
	}
	if (pwrite(clear_fd, "4", 1, 0) != 1)
		die("clear_refs");
	clears++;
	for (int i = 0; i < nr_pages; i++)
		pages[i].written = pages[i].fresh = 0;
}

static int move(int i, int j, int n)
{
	if (mremap(at(i), n * PAGE, n * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, at(j)) != at(j))
		return 0;
	memcpy(pages + j, pages + i, n * sizeof(*pages));
	for (int k = j; k < j + n; k++) { /* the kernel marks what it moves; what holds data is not what was here */
		pages[k].fresh = 1;
		pages[k].written = pages[k].backed;
	}
	forget(i, n);
	return 1;
}

/* Alone in its page table, so that the kernel may move that. */
static void move_table(void)
{
	int nr = nr_pages / TABLE, i = rnd(nr) * TABLE, j = rnd(nr) * TABLE;

	if (i == j || mmap(at(i), TABLE * PAGE, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != at(i))
		return;
	became(i, TABLE, ANON, RW);
	for (int k = i; k < i + TABLE; k += 1 + rnd(8)) {
		*at(k) = k;
		pages[k].written = pages[k].backed = 1;
	}
	if (rnd(2))
		check_and_clear();
	tables += move(i, j, TABLE);
}

static void run(long operations, int mode)
{
	for (long op = 0; op < operations; op++) {
		int n = 1 + rnd(rnd(4) ? 6 : 40), i = rnd(nr_pages - n), j, what = rnd(100);

		if (what < 40) { /* write where it is allowed */
			for (int k = i; k < i + n; k++)
				if (pages[k].kind != UNMAPPED && pages[k].prot == RW) {
					at(k)[rnd(PAGE)] = op;
					pages[k].written = pages[k].backed = 1;
				}
		} else if (what < 52) {
			int prot = rnd(5) ? RW : PROT_READ;

			if (mmap(at(i), n * PAGE, prot, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == at(i))
				became(i, n, ANON, prot);
		} else if (what < 56) { /* offsets that continue those of the neighbours */
			if (mmap(at(i), n * PAGE, RW, MAP_PRIVATE | MAP_FIXED, file_fd, i * PAGE) == at(i))
				became(i, n, FILE_PRIVATE, RW);
		} else if (what < 63) {
			munmap(at(i), n * PAGE);
			forget(i, n);
		} else if (what < 75) {
			int prot = rnd(3) ? RW : rnd(2) ? PROT_READ : PROT_NONE, mapped = 1;

			for (int k = i; k < i + n; k++)
				mapped &= pages[k].kind != UNMAPPED;
			if (mapped && !mprotect(at(i), n * PAGE, prot))
				for (int k = i; k < i + n; k++)
					pages[k].prot = prot;
		} else if (what < 79) { /* move a piece */
			j = rnd(nr_pages - n);
			if ((j + n <= i || i + n <= j) && pages[i].kind != UNMAPPED && move(i, j, n))
				;
			/* a refused move may have unmapped the destination already: look */
			else if (j + n <= i || i + n <= j) {
				unsigned char vec[64];

				for (int k = j; k < j + n; k++)
					if (mincore(at(k), PAGE, vec))
						forget(k, 1);
			}
		} else if (what < 82) { /* grow in place */
			if (n > 1 && pages[i].kind == ANON && mremap(at(i), PAGE, n * PAGE, 0) == at(i))
				for (int k = i + 1; k < i + n; k++)
					pages[k] = (struct page){ .kind = ANON, .prot = pages[i].prot };
		} else if (what < 86) {
			madvise(at(i), n * PAGE, MADV_DONTNEED);
			for (int k = i; k < i + n; k++)
				pages[k].written = pages[k].backed = 0;
		} else if (what < 88) {
			madvise(at(i), n * PAGE, rnd(2) ? MADV_RANDOM : MADV_NORMAL);
		} else if (what < 90) {
			if (rnd(2))
				mlock(at(i), n * PAGE);
			else
				munlock(at(i), n * PAGE);
		} else if (what < 91) {
			madvise(at(i), n * PAGE, rnd(2) ? MADV_DONTFORK : MADV_DOFORK);
		} else if (what < 95) { /* the heap, for its own sake */
			static char *low;

			if (!low)
				low = sbrk(0);
			brk(low + rnd(64) * PAGE);
			if ((char *)sbrk(0) > low)
				*low = op;
		} else if (what < 96 && !rnd(20)) {
			pid_t pid = fork();

			if (!pid) {
				for (int k = 0; k < nr_pages; k += 7)
					if (pages[k].kind != UNMAPPED && pages[k].prot == RW && pages[k].kind == ANON)
						madvise(at(k), PAGE, MADV_POPULATE_WRITE);
				_exit(0);
			}
			waitpid(pid, NULL, 0);
		} else if (what < 97 && mode == 2) {
			prctl(PR_SET_PRECISE_SOFTDIRTY, rnd(2), 0, 0, 0);
		} else if (what == 97 && !rnd(4)) {
			move_table();
		} else if (what >= 99) {
			check_and_clear();
		}
	}
}

int main(int argc, char **argv)
{
	long operations;
	pthread_t thread;
	int mode;

	if (argc != 4 && argc != 5)
		return 2;
	if (argc == 5)
		nr_pages = atoi(argv[4]);
	if (nr_pages < 64 || nr_pages > MOST)
		return 2;
	state = strtoull(argv[1], NULL, 0) * 0x9e3779b97f4a7c15ull + 1;
	operations = atol(argv[2]);
	mode = !strcmp(argv[3], "precise") ? 1 : !strcmp(argv[3], "mixed") ? 2 : 0;
	if (prctl(PR_SET_PRECISE_SOFTDIRTY, mode == 1, 0, 0, 0) && mode)
		die("PR_SET_PRECISE_SOFTDIRTY");
	arena = mmap(NULL, (nr_pages + 3 * TABLE) * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	munmap(arena, (nr_pages + 3 * TABLE) * PAGE);
	arena = (char *)(((uintptr_t)arena + 2 * TABLE * PAGE - 1) & -(TABLE * PAGE)); /* a hole before and after */
	pagemap_fd = open("/proc/self/pagemap", O_RDONLY);
	clear_fd = open("/proc/self/clear_refs", O_WRONLY);
	file_fd = syscall(SYS_memfd_create, "fuzz", 0);
	if (pagemap_fd < 0 || clear_fd < 0 || file_fd < 0 || ftruncate(file_fd, nr_pages * PAGE))
		die("open");
	check_and_clear();
	if (pthread_create(&thread, NULL, reader, NULL))
		die("pthread_create");
	run(operations, mode);
	stop = 1;
	pthread_join(thread, NULL);
	check_and_clear();
	printf("%s: seed %s, %ld operations, %ld clears: missed %ld, over-reported %ld, exact %ld, most VMAs %ld, tables moved %ld\n",
	       argv[3], argv[1], operations, clears, missed, over, exact, most_vmas, tables);
	return mode == 1 && missed;
}
