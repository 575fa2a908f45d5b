// SPDX-License-Identifier: Apache-2.0
/*
 * What soft-dirty tracking does, one case a run:  softdirty_cases CASE default|precise
 *
 * Prints "name value" lines. Pages are shown as D (reads soft-dirty) or . (reads clean). Exit 77 if this kernel
 * cannot do what the case needs, 2 if something unexpected failed. Areas are mapped with MAP_FIXED into the middle
 * of a PROT_NONE reservation, so that nothing else becomes their neighbour.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096ul
#define RW (PROT_READ | PROT_WRITE)
#define SET 0x50534454
#define GET 0x50534455
#define ANON (MAP_PRIVATE | MAP_ANONYMOUS)

static int precise;

static void fail(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, strerror(errno));
	exit(2);
}

static void cannot(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, strerror(errno));
	exit(77);
}

static int put(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY), ok;

	if (fd < 0)
		return 0;
	ok = write(fd, text, strlen(text)) == (ssize_t)strlen(text);
	close(fd);
	return ok;
}

static long get(const char *path)
{
	char text[64] = "";
	int fd = open(path, O_RDONLY);

	if (fd < 0 || read(fd, text, 63) <= 0)
		return -1;
	close(fd);
	return atol(text);
}

static void clear(void)
{
	if (!put("/proc/self/clear_refs", "4"))
		fail("clear_refs");
}

static uint64_t word(void *p)
{
	static int fd = -1;
	uint64_t w;

	if (fd < 0)
		fd = open("/proc/self/pagemap", O_RDONLY);
	if (pread(fd, &w, 8, (uintptr_t)p / PAGE * 8) != 8)
		fail("pagemap");
	return w;
}

static int dirty(void *p)
{
	return word(p) >> 55 & 1;
}

static void show(const char *name, char *p, int n)
{
	printf("%s ", name);
	for (int i = 0; i < n; i++)
		putchar(dirty(p + i * PAGE) ? 'D' : '.');
	putchar('\n');
}

static int vmas(char *from, char *to)
{
	unsigned long a, b;
	char line[512];
	int n = 0;
	FILE *f = fopen("/proc/self/maps", "r");

	while (fgets(line, sizeof(line), f))
		n += sscanf(line, "%lx-%lx", &a, &b) == 2 && a < (uintptr_t)to && b > (uintptr_t)from;
	fclose(f);
	return n;
}

static char *area(void)
{
	char *p = mmap(NULL, 2048 * PAGE, PROT_NONE, ANON | MAP_NORESERVE, -1, 0);

	if (p == MAP_FAILED)
		fail("mmap");
	return p + 64 * PAGE;
}

static void map(char *p, int n)
{
	if (mmap(p, n * PAGE, RW, ANON | MAP_FIXED, -1, 0) != p)
		fail("mmap");
}

static void touch(char *p, int n)
{
	for (int i = 0; i < n; i++)
		p[i * PAGE]++;
}

static void neighbour(void)
{
	char *a = area();

	map(a, 8);
	touch(a, 8);
	clear();
	show("cleared", a, 8);
	a[3 * PAGE] = 2;
	show("written", a, 8);
	map(a + 8 * PAGE, 8);
	show("behind", a, 16);
	map(a - 4 * PAGE, 4);
	show("before", a - 4 * PAGE, 20);
	printf("vmas %d\n", vmas(a - 4 * PAGE, a + 16 * PAGE));
	touch(a + 8 * PAGE, 8);
	touch(a - 4 * PAGE, 4);
	clear();
	show("again", a - 4 * PAGE, 20);
	printf("vmas_again %d\n", vmas(a - 4 * PAGE, a + 16 * PAGE));
}

static void heap(void)
{
	char *h = (char *)(((uintptr_t)sbrk(0) + PAGE - 1) & ~(PAGE - 1));
	int status;
	pid_t pid;

	if (brk(h + 8 * PAGE))
		fail("brk");
	touch(h, 8);
	clear();
	brk(h + 10 * PAGE);
	show("grown", h, 10);
	pid = fork(); /* in a child: what malloc has there goes too */
	if (!pid)
		_exit(brk(h + 4 * PAGE) == 0 && sbrk(0) == h + 4 * PAGE);
	waitpid(pid, &status, 0);
	printf("shrunk %d\n", WEXITSTATUS(status));
	printf("vmas %d\n", vmas(h, h + 10 * PAGE));
	touch(h + 8 * PAGE, 2);
	clear();
	printf("vmas_again %d\n", vmas(h, h + 10 * PAGE));
}

static void lost_write(void)
{
	char *d = area(), *a = d + 4 * PAGE;

	map(d, 8);
	touch(d, 8);
	mprotect(d, 4 * PAGE, PROT_READ);
	clear();
	map(a + 4 * PAGE, 4);
	mprotect(a, 8 * PAGE, PROT_NONE);
	mprotect(a, 8 * PAGE, RW);
	touch(a, 4);
	show("rewritten", a, 4);
	mprotect(d, 4 * PAGE, RW);
	show("merged", a, 4);
	show("untouched", d, 4);
}

static void ksm(void)
{
	char *a = mmap(NULL, 64 * PAGE, RW, ANON, -1, 0);
	int i, lost = 0;

	for (i = 0; i < 64; i++)
		memset(a + i * PAGE, i + 1, PAGE);
	clear();
	for (i = 0; i < 32; i++)
		memset(a + i * PAGE, 0xee, PAGE);
	if (madvise(a, 64 * PAGE, MADV_MERGEABLE) || !put("/sys/kernel/mm/ksm/pages_to_scan", "5000") ||
	    !put("/sys/kernel/mm/ksm/sleep_millisecs", "5") || !put("/sys/kernel/mm/ksm/run", "1"))
		cannot("KSM");
	for (i = 0; i < 600 && get("/sys/kernel/mm/ksm/pages_sharing") < 28; i++)
		usleep(50000);
	for (i = 0; i < 32; i++)
		lost += !dirty(a + i * PAGE);
	printf("sharing %d\nlost %d\n", get("/sys/kernel/mm/ksm/pages_sharing") >= 28, lost);
	put("/sys/kernel/mm/ksm/run", "2");
}

/* as above, and nothing tells afterwards that the memory was ever mergeable */
static void ksm_unmerged(void)
{
	char *a = mmap(NULL, 64 * PAGE, RW, ANON, -1, 0);
	int i, lost = 0;

	for (i = 0; i < 64; i++)
		memset(a + i * PAGE, i + 1, PAGE);
	clear();
	for (i = 0; i < 32; i++)
		memset(a + i * PAGE, 0xee, PAGE);
	if (madvise(a, 64 * PAGE, MADV_MERGEABLE) || !put("/sys/kernel/mm/ksm/pages_to_scan", "5000") ||
	    !put("/sys/kernel/mm/ksm/sleep_millisecs", "5") || !put("/sys/kernel/mm/ksm/run", "1"))
		cannot("KSM");
	for (i = 0; i < 600 && get("/sys/kernel/mm/ksm/pages_sharing") < 28; i++)
		usleep(50000);
	printf("sharing %d\n", get("/sys/kernel/mm/ksm/pages_sharing") >= 28);
	madvise(a, 64 * PAGE, MADV_UNMERGEABLE);
	put("/sys/kernel/mm/ksm/run", "2");
	for (i = 0; i < 32; i++)
		lost += !dirty(a + i * PAGE);
	printf("lost %d\n", lost);
}

static void hugetlb(void)
{
	char *a;

	put("/proc/sys/vm/nr_hugepages", "4");
	a = mmap(NULL, 2 << 20, RW, ANON | MAP_HUGETLB, -1, 0);
	if (a == MAP_FAILED)
		cannot("huge pages");
	*a = 1;
	show("new", a, 1);
	clear();
	*a = 2;
	show("rewritten", a, 1);
}

static void thp(void)
{
	char *a = mmap(NULL, 4 << 20, RW, ANON, -1, 0);
	int n = 0;

	a = (char *)(((uintptr_t)a + (2 << 20) - 1) & ~((2ul << 20) - 1));
	if (madvise(a, 2 << 20, MADV_HUGEPAGE))
		cannot("transparent huge pages");
	memset(a, 1, 2 << 20);
	clear();
	a[7 * PAGE] = 2;
	for (int i = 0; i < 512; i++)
		n += dirty(a + i * PAGE);
	printf("dirty %d\n", n);
}

static void growth(void)
{
	char *a = area();

	munmap(a, 1024 * PAGE);
	for (int i = 0; i < 512; i += 2) {
		map(a + i * PAGE, 1);
		touch(a + i * PAGE, 1);
	}
	clear();
	printf("clean %d\n", vmas(a, a + 512 * PAGE));
	for (int i = 1; i < 512; i += 2)
		map(a + i * PAGE, 1);
	printf("filled %d\n", vmas(a, a + 512 * PAGE));
	touch(a, 512);
	clear();
	printf("again %d\n", vmas(a, a + 512 * PAGE));
}

static void inherit(void)
{
	int status;
	pid_t pid = fork();

	if (!pid)
		_exit(prctl(GET, 0, 0, 0, 0) == 1);
	waitpid(pid, &status, 0);
	printf("fork %d\n", WEXITSTATUS(status));
	pid = fork();
	if (!pid) {
		execl("/proc/self/exe", "softdirty_cases", "query", "keep", NULL);
		_exit(9);
	}
	waitpid(pid, &status, 0);
	printf("exec %d\n", WEXITSTATUS(status));
}

static void max_map_count(void)
{
	char *a = area();
	long old = get("/proc/sys/vm/max_map_count");
	char text[32];
	int ok = 0, was;

	if (!put("/proc/sys/vm/max_map_count", "400"))
		cannot("max_map_count");
	munmap(a, 1024 * PAGE);
	for (int i = 0; i < 440; i += 2) {
		map(a + i * PAGE, 1);
		touch(a + i * PAGE, 1);
	}
	clear();
	for (int i = 1; i < 440; i += 2)
		ok += mmap(a + i * PAGE, PAGE, RW, ANON | MAP_FIXED, -1, 0) != MAP_FAILED;
	was = vmas(0, (char *)-1ul);
	snprintf(text, sizeof(text), "%ld", old);
	put("/proc/sys/vm/max_map_count", text);
	printf("mapped %d\nbelow_limit %d\n", ok, was <= 400);
}

static void default_for_all(void)
{
	const char *path = "/proc/sys/vm/precise_softdirty_tracking";
	int status;
	pid_t pid;

	if (!put(path, "1"))
		cannot("sysctl");
	printf("running %d\n", prctl(GET, 0, 0, 0, 0));
	pid = fork();
	if (!pid) {
		execl("/proc/self/exe", "softdirty_cases", "query", "keep", NULL);
		_exit(9);
	}
	waitpid(pid, &status, 0);
	printf("started %d\n", WEXITSTATUS(status));
	prctl(SET, 0, 0, 0, 0);
	pid = fork();
	if (!pid) {
		execl("/proc/self/exe", "softdirty_cases", "query", "keep", NULL);
		_exit(9);
	}
	waitpid(pid, &status, 0);
	printf("chosen %d\n", WEXITSTATUS(status));
	put(path, "0");
}

static void seam(void)
{
	char *a = area(), *to = area();

	map(a, 4);
	touch(a, 4);
	clear();
	map(a + 4 * PAGE, 4);
	printf("moved %d\n", mremap(a, 8 * PAGE, 8 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to);
	if (vmas(a, a + 8 * PAGE) == 2)
		printf("errno_is_efault %d\n", errno == EFAULT);
}

static void barrier(void)
{
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register reg = { .mode = UFFDIO_REGISTER_MODE_WP };
	int uffd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | 1);
	char *d = area(), *a = d + 4 * PAGE;

	if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api))
		cannot("userfaultfd");
	map(d, 8);
	touch(d, 8);
	mprotect(d, 4 * PAGE, PROT_READ);
	clear();
	reg.range.start = (uintptr_t)d;
	reg.range.len = 8 * PAGE;
	if (ioctl(uffd, UFFDIO_REGISTER, &reg))
		cannot("write-protect mode");
	a[PAGE] = 2;
	map(a + 4 * PAGE, 4);
	show("behind", a, 8);
	mprotect(a, 8 * PAGE, PROT_NONE);
	mprotect(a, 8 * PAGE, RW);
	touch(a, 4);
	mprotect(d, 4 * PAGE, RW);
	show("merged", a, 4);
	show("untouched", d, 4);
	close(uffd);
	show("closed", a, 4);
}

static void discard(void)
{
	char *a = area();
	volatile char c;

	map(a, 4);
	touch(a, 4);
	clear();
	madvise(a + PAGE, PAGE, MADV_DONTNEED);
	c = a[PAGE];
	(void)c;
	show("discarded", a, 4);
	printf("zero %d\n", a[PAGE] == 0);
}

static void moved(void)
{
	char *a = area(), *to = area();

	map(a, 4);
	touch(a, 4);
	clear();
	if (mremap(a, 4 * PAGE, 4 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to)
		fail("mremap");
	show("moved", to, 4);
}

/* page tables are moved whole where 2 MiB fit, and then their entries are not marked */
static void moved_table(void)
{
	const unsigned long table = 512 * PAGE;
	char *p = mmap(NULL, 8 * table, PROT_NONE, ANON | MAP_NORESERVE, -1, 0);
	char *a = (char *)(((uintptr_t)p + table - 1) & ~(table - 1)), *to = a + 3 * table;
	int lost = 0;

	map(a, 1024);
	map(to, 1024);
	madvise(a, 2 * table, MADV_NOHUGEPAGE);
	madvise(to, 2 * table, MADV_NOHUGEPAGE);
	for (int i = 0; i < 1024; i++) {
		a[i * PAGE] = 1;
		to[i * PAGE] = 2;
	}
	clear();
	if (mremap(a, 2 * table, 2 * table, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to)
		fail("mremap");
	for (int i = 0; i < 1024; i++)
		lost += to[i * PAGE] == 1 && !dirty(to + i * PAGE);
	printf("lost %d\n", lost);
}

static void forked(void)
{
	char *a = area();
	int status;
	pid_t pid;

	map(a, 4);
	touch(a, 4);
	clear();
	pid = fork();
	if (!pid) {
		a[0] = 9;
		_exit(dirty(a) << 1 | dirty(a + PAGE));
	}
	waitpid(pid, &status, 0);
	printf("child %d\n", WEXITSTATUS(status));
	a[2 * PAGE] = 9;
	show("parent", a, 4);
}

static void untracked(void)
{
	char *a = area();

	for (int i = 0; i < 200; i++) {
		map(a + i * PAGE, 1);
		touch(a + i * PAGE, 1);
	}
	printf("vmas %d\n", vmas(a, a + 200 * PAGE));
}

static void arguments(void)
{
	printf("two %d\n", prctl(SET, 2, 0, 0, 0) == -1 && errno == EINVAL);
	printf("third %d\n", prctl(SET, 1, 1, 0, 0) == -1 && errno == EINVAL);
	printf("query %d\n", prctl(GET, 0, 0, 0, 0) == precise);
}

static const struct {
	const char *name;
	void (*run)(void);
} cases[] = {
	{ "neighbour", neighbour }, { "heap", heap }, { "lost_write", lost_write }, { "ksm", ksm },
	{ "hugetlb", hugetlb }, { "thp", thp }, { "growth", growth }, { "inherit", inherit },
	{ "max_map_count", max_map_count }, { "default_for_all", default_for_all }, { "seam", seam },
	{ "barrier", barrier }, { "discard", discard }, { "moved", moved }, { "forked", forked },
	{ "moved_table", moved_table }, { "ksm_unmerged", ksm_unmerged },
	{ "untracked", untracked }, { "arguments", arguments },
};

int main(int argc, char **argv)
{
	setvbuf(stdout, NULL, _IOLBF, 0);
	if (argc != 3)
		return 2;
	if (!strcmp(argv[1], "query"))
		return prctl(GET, 0, 0, 0, 0);
	precise = !strcmp(argv[2], "precise");
	if (precise && prctl(SET, 1, 0, 0, 0))
		cannot("PR_SET_PRECISE_SOFTDIRTY");
	for (unsigned i = 0; i < sizeof(cases) / sizeof(*cases); i++)
		if (!strcmp(argv[1], cases[i].name)) {
			cases[i].run();
			return 0;
		}
	return 2;
}
