// SPDX-License-Identifier: Apache-2.0
//
// A target that changes its memory on command and does nothing else.
//
//   oracle_target DIRECTORY        DIRECTORY holds the FIFOs cmd0 and rep0 (and cmdK, repK for relative K)
//
// Reads lines from cmd0, answers each with one line on rep0: "ok [NUMBER]" or "errno N" or "fault".
// Between two answers it is blocked in read(2), so whoever looks at it sees one and the same state, except while
// a storm runs (see `storm`).  Every command may fail: a history with any line left out is still a history.
// Sizes are pages.  A slot is one range the target made; a file is one shared memory object held by descriptor.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <linux/memfd.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096UL
#define HUGE (2UL << 20)
#define NR_SLOTS 64
#define NR_FILES 8
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102
#define MADV_GUARD_REMOVE 103
#endif
#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif

static struct slot { char *at; size_t pages; int is_hugetlb; } slots[NR_SLOTS];
static struct { int fd; size_t pages; int is_tmpfs; } files[NR_FILES];
static const char *directory;
static int in_fd, out_fd;
static sigjmp_buf on_fault;
static volatile sig_atomic_t guarded;

static void fault(int sig)
{
	if (!guarded) {
		signal(sig, SIG_DFL);
		return;
	}
	siglongjmp(on_fault, 1);
}

// ---- contents ------------------------------------------------------------------------------------------------
// No page written by `fill` repeats one written before: the value counts up, the place is mixed in.
static void fill_page(char *page, uint64_t value)
{
	uint64_t *word = (uint64_t *)page;
	for (size_t i = 0; i < PAGE / 8; i++)
		word[i] = (value * 0x9E3779B97F4A7C15ULL) ^ ((uint64_t)(uintptr_t)page >> 12) ^ (i << 40) ^ value;
}

static void fill_file_page(char *buffer, uint64_t value, size_t index)
{
	uint64_t *word = (uint64_t *)buffer;
	for (size_t i = 0; i < PAGE / 8; i++)
		word[i] = (value * 0xD1B54A32D192ED03ULL) ^ index ^ (i << 40);
}

// ---- helpers of the commands ---------------------------------------------------------------------------------
static struct slot *free_slot(unsigned wanted)
{
	struct slot *slot = &slots[wanted % NR_SLOTS];
	if (slot->pages) {                      // a slot in use is given back first
		munmap(slot->at, slot->pages * PAGE);
		slot->pages = 0;
	}
	return slot;
}

static long keep(unsigned n, void *at, size_t pages)
{
	if (at == MAP_FAILED)
		return -errno;
	slots[n % NR_SLOTS].at = at;
	slots[n % NR_SLOTS].pages = pages;
	slots[n % NR_SLOTS].is_hugetlb = 0;
	return 0;
}

// The range [first, first + n) of a slot, cut to what the slot has.  0 when it is empty.
static size_t cut(struct slot *s, size_t first, size_t n, char **at)
{
	if (!s->pages)
		return 0;
	first %= s->pages;
	if (n > s->pages - first)
		n = s->pages - first;
	*at = s->at + first * PAGE;
	return n;
}

// The same for calls that want whole pages, which of a hugetlb slot are huge ones.
static size_t cut_whole(struct slot *s, size_t first, size_t n, char **at)
{
	if (!(n = cut(s, first, n, at)) || !s->is_hugetlb)
		return n;
	char *end = (char *)(((uintptr_t)*at + n * PAGE + HUGE - 1) & ~(HUGE - 1));
	*at = (char *)((uintptr_t)*at & ~(HUGE - 1));
	return (end - *at) / PAGE;
}

static long do_map(unsigned n, const char *kind, size_t pages, unsigned file, void *where, int extra)
{
	int rw = PROT_READ | PROT_WRITE, priv = MAP_PRIVATE | MAP_ANONYMOUS;
	size_t size = pages * PAGE;
	long rc;
	char path[512];
	if (!strcmp(kind, "anon"))
		return keep(n, mmap(where, size, rw, priv | extra, -1, 0), pages);
	if (!strcmp(kind, "noreserve"))
		return keep(n, mmap(where, size, rw, priv | MAP_NORESERVE | extra, -1, 0), pages);
	if (!strcmp(kind, "growsdown"))
		return keep(n, mmap(where, size, rw, priv | MAP_GROWSDOWN | extra, -1, 0), pages);
	if (!strcmp(kind, "none"))
		return keep(n, mmap(where, size, PROT_NONE, priv | extra, -1, 0), pages);
	if (!strcmp(kind, "populate"))
		return keep(n, mmap(where, size, rw, priv | MAP_POPULATE | extra, -1, 0), pages);
	if (!strcmp(kind, "locked"))
		return keep(n, mmap(where, size, rw, priv | MAP_LOCKED | extra, -1, 0), pages);
	if (!strcmp(kind, "hugetlb")) {
		rc = keep(n, mmap(NULL, 2 * HUGE, rw, priv | MAP_HUGETLB, -1, 0), 2 * HUGE / PAGE);
		slots[n % NR_SLOTS].is_hugetlb = !rc;
		return rc;
	}
	if (!strncmp(kind, "huge-", 5)) {
		void *at = MAP_FAILED;
		if (!strcmp(kind, "huge-shared"))
			at = mmap(NULL, 2 * HUGE, rw, MAP_SHARED | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
		if (!strcmp(kind, "huge-memfd")) {
			int fd = memfd_create("huge", MFD_CLOEXEC | MFD_HUGETLB);
			if (fd >= 0 && !ftruncate(fd, 2 * HUGE))
				at = mmap(NULL, 2 * HUGE, rw, MAP_SHARED, fd, 0);
			close(fd);
		}
		if (!strcmp(kind, "huge-sysv")) {
			int id = shmget(IPC_PRIVATE, 2 * HUGE, IPC_CREAT | SHM_HUGETLB | 0600);
			if (id < 0)
				return -errno;
			at = shmat(id, NULL, 0);
			shmctl(id, IPC_RMID, NULL);
		}
		rc = keep(n, at, 2 * HUGE / PAGE);
		slots[n % NR_SLOTS].is_hugetlb = !rc;
		return rc;
	}
	if (!strcmp(kind, "thp")) {                                       // a whole aligned huge page and a bit
		char *at = mmap(NULL, 3 * HUGE, rw, priv, -1, 0);
		if (at == MAP_FAILED)
			return -errno;
		char *good = (char *)(((uintptr_t)at + HUGE - 1) & ~(HUGE - 1));
		munmap(at, good - at);
		munmap(good + HUGE + 8 * PAGE, at + 3 * HUGE - (good + HUGE + 8 * PAGE));
		rc = keep(n, good, HUGE / PAGE + 8);
		madvise(good, HUGE + 8 * PAGE, MADV_HUGEPAGE);
		return rc;
	}
	if (!strcmp(kind, "shared"))
		return keep(n, mmap(where, size, rw, MAP_SHARED | MAP_ANONYMOUS | extra, -1, 0), pages);
	if (!strcmp(kind, "zero")) {
		int fd = open("/dev/zero", O_RDWR | O_CLOEXEC);
		rc = keep(n, mmap(where, size, rw, MAP_PRIVATE | extra, fd, 0), pages);
		close(fd);
		return rc;
	}
	if (!strcmp(kind, "sysv")) {
		int id = shmget(IPC_PRIVATE, size, IPC_CREAT | 0600);
		if (id < 0)
			return -errno;
		void *at = shmat(id, NULL, 0);
		shmctl(id, IPC_RMID, NULL);
		return at == (void *)-1 ? -errno : keep(n, at, pages);
	}
	if (!strcmp(kind, "private-file") || !strcmp(kind, "shared-file")) {   // on disk, same content every time
		snprintf(path, sizeof path, "%s/disk.%s", directory, kind);
		int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
		if (fd < 0)
			return -errno;
		char buffer[PAGE];
		struct stat st;
		fstat(fd, &st);
		for (size_t i = st.st_size / PAGE; i < 64; i++) {
			fill_file_page(buffer, 7, i);
			if (pwrite(fd, buffer, PAGE, i * PAGE) != (ssize_t)PAGE)
				break;
		}
		size_t first = pages < 64 ? (pages * 3) % (64 - pages) : 0;
		rc = keep(n, mmap(where, size, rw, (kind[0] == 'p' ? MAP_PRIVATE : MAP_SHARED) | extra, fd,
				  first * PAGE), pages);
		close(fd);
		return rc;
	}
	if (!strcmp(kind, "file") || !strcmp(kind, "file-private")) {          // a memfd or tmpfs file held open
		file %= NR_FILES;
		if (!files[file].pages)
			return -EBADF;
		if (pages > files[file].pages)
			pages = files[file].pages;
		size_t first = files[file].pages > pages ? (pages * 5) % (files[file].pages - pages) : 0;
		return keep(n, mmap(where, pages * PAGE, rw, (kind[4] ? MAP_PRIVATE : MAP_SHARED) | extra,
				    files[file].fd, first * PAGE), pages);
	}
	return -EINVAL;
}

static long do_write(struct slot *s, const char *how, size_t first, size_t n, uint64_t value)
{
	char *at;
	volatile char sink;
	if (!(n = cut(s, first, n, &at)))
		return -ENOENT;
	for (size_t i = 0; i < n; i++) {
		char *page = at + i * PAGE;
		if (!strcmp(how, "fill"))
			fill_page(page, value + i);
		else if (!strcmp(how, "byte"))
			((volatile char *)page)[(value * 2654435761u) % PAGE] = (char)(value | 1);
		else if (!strcmp(how, "stride")) {
			if (i % 3 == 0)
				((volatile uint64_t *)page)[value % 512] = value * 31 + i;
		} else if (!strcmp(how, "zero"))
			memset(page, 0, PAGE);
		else if (!strcmp(how, "same"))
			((volatile char *)page)[0] = ((volatile char *)page)[0];
		else if (!strcmp(how, "read"))
			sink = ((volatile char *)page)[value % PAGE];
		else
			return -EINVAL;
	}
	(void)sink;
	return n;
}

static long do_advise(struct slot *s, const char *what, size_t first, size_t n)
{
	static const struct { const char *name; int value; } table[] = {
		{"dontneed", MADV_DONTNEED}, {"free", MADV_FREE}, {"pageout", MADV_PAGEOUT}, {"cold", MADV_COLD},
		{"hugepage", MADV_HUGEPAGE}, {"nohugepage", MADV_NOHUGEPAGE}, {"collapse", MADV_COLLAPSE},
		{"mergeable", MADV_MERGEABLE}, {"unmergeable", MADV_UNMERGEABLE}, {"dontfork", MADV_DONTFORK},
		{"dofork", MADV_DOFORK}, {"wipeonfork", MADV_WIPEONFORK}, {"keeponfork", MADV_KEEPONFORK},
		{"remove", MADV_REMOVE}, {"guard", MADV_GUARD_INSTALL}, {"unguard", MADV_GUARD_REMOVE},
		{"populate-read", 22}, {"populate-write", 23}, {"dontdump", MADV_DONTDUMP},
	};
	char *at;
	if (!(n = cut_whole(s, first, n, &at)))
		return -ENOENT;
	for (size_t i = 0; i < sizeof table / sizeof table[0]; i++)
		if (!strcmp(what, table[i].name))
			return madvise(at, n * PAGE, table[i].value) ? -errno : 0;
	return -EINVAL;
}

// ---- the kernel writes into our pages ------------------------------------------------------------------------
static long by_pipe(struct slot *s, size_t first, uint64_t value)
{
	char *at, buffer[PAGE];
	int fds[2];
	if (!cut(s, first, 1, &at))
		return -ENOENT;
	if (pipe2(fds, O_CLOEXEC))
		return -errno;
	fill_page(buffer, value);
	long rc = write(fds[1], buffer, PAGE);
	rc = read(fds[0], at, PAGE) < 0 ? -errno : 0;
	close(fds[0]);
	close(fds[1]);
	return rc;
}

static int direct_file(uint64_t value)
{
	char path[512];
	static char buffer[PAGE] __attribute__((aligned(4096)));
	snprintf(path, sizeof path, "%s/disk.direct", directory);
	int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	if (fd < 0)
		return -1;
	fill_file_page(buffer, value, 99);
	if (pwrite(fd, buffer, PAGE, 0) != (ssize_t)PAGE)
		return close(fd), -1;
	close(fd);
	return open(path, O_RDONLY | O_CLOEXEC | O_DIRECT);
}

static long by_direct(struct slot *s, size_t first, uint64_t value)
{
	char *at;
	if (!cut(s, first, 1, &at))
		return -ENOENT;
	int fd = direct_file(value);
	if (fd < 0)
		return -errno;
	long rc = pread(fd, at, PAGE, 0) < 0 ? -errno : 0;
	close(fd);
	return rc;
}

static long by_self_vm(struct slot *s, size_t first, uint64_t value)   // FOLL_WRITE from another call path
{
	char *at, buffer[PAGE];
	if (!cut(s, first, 1, &at))
		return -ENOENT;
	fill_page(buffer, value);
	struct iovec from = {buffer, PAGE}, to = {at, PAGE};
	return process_vm_writev(getpid(), &from, 1, &to, 1, 0) < 0 ? -errno : 0;
}

static struct {
	int fd;
	unsigned *sq_tail, *sq_mask, *sq_array, *cq_head, *cq_tail, *cq_mask;
	struct io_uring_sqe *sqes;
	struct io_uring_cqe *cqes;
	void *sq, *cq;
	size_t sq_size, cq_size, sqes_size;
	char *at;
} ring = {.fd = -1};

static long ring_open(struct slot *s, size_t first)
{
	char *at;
	struct io_uring_params p = {0};
	if (ring.fd >= 0)
		return -EBUSY;
	if (!cut(s, first, 1, &at))
		return -ENOENT;
	ring.fd = syscall(SYS_io_uring_setup, 4, &p);
	if (ring.fd < 0)
		return -errno;
	struct iovec buffer = {at, PAGE};
	if (syscall(SYS_io_uring_register, ring.fd, IORING_REGISTER_BUFFERS, &buffer, 1)) {
		long rc = -errno;
		close(ring.fd);
		ring.fd = -1;
		return rc;
	}
	ring.at = at;
	ring.sq_size = p.sq_off.array + p.sq_entries * sizeof(unsigned);
	ring.cq_size = p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe);
	ring.sqes_size = p.sq_entries * sizeof(struct io_uring_sqe);
	int prot = PROT_READ | PROT_WRITE, flags = MAP_SHARED | MAP_POPULATE;
	ring.sq = mmap(NULL, ring.sq_size, prot, flags, ring.fd, IORING_OFF_SQ_RING);
	ring.cq = mmap(NULL, ring.cq_size, prot, flags, ring.fd, IORING_OFF_CQ_RING);
	ring.sqes = mmap(NULL, ring.sqes_size, prot, flags, ring.fd, IORING_OFF_SQES);
	ring.sq_tail = (unsigned *)((char *)ring.sq + p.sq_off.tail);
	ring.sq_mask = (unsigned *)((char *)ring.sq + p.sq_off.ring_mask);
	ring.sq_array = (unsigned *)((char *)ring.sq + p.sq_off.array);
	ring.cq_head = (unsigned *)((char *)ring.cq + p.cq_off.head);
	ring.cq_tail = (unsigned *)((char *)ring.cq + p.cq_off.tail);
	ring.cq_mask = (unsigned *)((char *)ring.cq + p.cq_off.ring_mask);
	ring.cqes = (struct io_uring_cqe *)((char *)ring.cq + p.cq_off.cqes);
	return 0;
}

// The kernel writes into the registered (pinned) page.  From a pipe it does so at once; from a disk it starts a
// kernel worker, which stays among our tasks for seconds.
static long ring_read(uint64_t value, int from_disk)
{
	char buffer[PAGE];
	int fds[2] = {-1, -1}, fd;
	if (ring.fd < 0)
		return -ENOENT;
	if (from_disk)
		fd = direct_file(value);
	else {
		if (pipe2(fds, O_CLOEXEC))
			return -errno;
		fill_page(buffer, value);
		if (write(fds[1], buffer, PAGE) != (ssize_t)PAGE)
			return -EIO;
		close(fds[1]);
		fd = fds[0];
	}
	if (fd < 0)
		return -errno;
	unsigned tail = *ring.sq_tail, index = tail & *ring.sq_mask;
	struct io_uring_sqe *sqe = &ring.sqes[index];
	memset(sqe, 0, sizeof *sqe);
	sqe->opcode = IORING_OP_READ_FIXED;
	sqe->fd = fd;
	sqe->addr = (uintptr_t)ring.at;
	sqe->len = PAGE;
	ring.sq_array[index] = index;
	atomic_store_explicit((_Atomic unsigned *)ring.sq_tail, tail + 1, memory_order_release);
	long rc = syscall(SYS_io_uring_enter, ring.fd, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0);
	if (rc < 0)
		rc = -errno;
	else {
		rc = ring.cqes[*ring.cq_head & *ring.cq_mask].res;
		atomic_store_explicit((_Atomic unsigned *)ring.cq_head, *ring.cq_head + 1, memory_order_release);
	}
	close(fd);
	return rc < 0 ? rc : 0;
}

static long ring_close(void)
{
	if (ring.fd < 0)
		return -ENOENT;
	munmap(ring.sq, ring.sq_size);
	munmap(ring.cq, ring.cq_size);
	munmap(ring.sqes, ring.sqes_size);
	close(ring.fd);
	ring.fd = -1;
	return 0;
}

// ---- our own userfaultfd: a missing page gives SIGBUS, so no thread of ours must serve it ---------------------
static int own_uffd = -1;

static long uffd_on(struct slot *s)
{
	if (own_uffd < 0) {
		own_uffd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
		struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_SIGBUS};
		if (own_uffd < 0 || ioctl(own_uffd, UFFDIO_API, &api))
			return -errno;
	}
	struct uffdio_register reg = {
		.range = {(uintptr_t)s->at, s->pages * PAGE}, .mode = UFFDIO_REGISTER_MODE_MISSING};
	if (!s->pages)
		return -ENOENT;
	return ioctl(own_uffd, UFFDIO_REGISTER, &reg) ? -errno : 0;
}

static long uffd_copy(struct slot *s, size_t first, uint64_t value)
{
	char *at, buffer[PAGE];
	if (own_uffd < 0 || !cut(s, first, 1, &at))
		return -ENOENT;
	fill_page(buffer, value);
	struct uffdio_copy copy = {.dst = (uintptr_t)at, .src = (uintptr_t)buffer, .len = PAGE};
	return ioctl(own_uffd, UFFDIO_COPY, &copy) ? -errno : 0;
}

static long uffd_off(void)
{
	if (own_uffd < 0)
		return -ENOENT;
	close(own_uffd);
	own_uffd = -1;
	return 0;
}

// ---- a storm: a thread writes round after round, page 0 first, so that every true state is r.. r, r-1.. r-1 ----
static struct { pthread_t thread; atomic_int run; struct slot *slot; size_t pages; int fd; } storm;

// the other storm: the disk writes into our pages, again and again, from a file whose pages all differ
static void *storming_direct(void *unused)
{
	for (uint64_t round = 0; atomic_load(&storm.run); round++)
		for (size_t i = 0; i < storm.pages; i++)
			if (pread(storm.fd, storm.slot->at + i * PAGE, PAGE, ((round + i) % 64) * PAGE) < 0)
				return unused;
	return unused;
}

static int direct_source(void)
{
	char path[512], buffer[PAGE];
	snprintf(path, sizeof path, "%s/disk.storm", directory);
	int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	for (size_t i = 0; fd >= 0 && i < 64; i++) {
		fill_file_page(buffer, 5, i);
		if (pwrite(fd, buffer, PAGE, i * PAGE) != (ssize_t)PAGE)
			break;
	}
	close(fd);
	return open(path, O_RDONLY | O_CLOEXEC | O_DIRECT);
}

static void *storming(void *unused)
{
	uint64_t round = 0;
	while (atomic_load(&storm.run)) {
		round++;
		for (size_t i = 0; i < storm.pages; i++)
			atomic_store((_Atomic uint64_t *)(storm.slot->at + i * PAGE), round);
	}
	return unused;
}

static long storm_start(unsigned n, size_t pages, int is_direct)
{
	if (storm.pages)
		return -EBUSY;
	storm.fd = is_direct ? direct_source() : -1;
	if (is_direct && storm.fd < 0)
		return -errno;
	free_slot(n);
	long rc = keep(n, mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), pages);
	if (rc)
		return rc;
	memset(slots[n % NR_SLOTS].at, 0, pages * PAGE);
	madvise(slots[n % NR_SLOTS].at, pages * PAGE, MADV_NOHUGEPAGE);
	storm.slot = &slots[n % NR_SLOTS];
	storm.pages = pages;
	atomic_store(&storm.run, 1);
	if (pthread_create(&storm.thread, NULL, is_direct ? storming_direct : storming, NULL))
		return storm.pages = 0, -EAGAIN;
	return (long)(uintptr_t)storm.slot->at;
}

static long storm_stop(void)
{
	if (!storm.pages)
		return -ENOENT;
	atomic_store(&storm.run, 0);
	pthread_join(storm.thread, NULL);
	storm.pages = 0;
	if (storm.fd >= 0)
		close(storm.fd);
	storm.fd = -1;
	return 0;
}

// ---- relatives: share our pages, take commands on their own FIFOs ---------------------------------------------
static int open_fifo(const char *name, unsigned k, int flags)
{
	char path[512];
	snprintf(path, sizeof path, "%s/%s%u", directory, name, k);
	return open(path, flags);
}

static void serve(void);

// The relative is our sibling (CLONE_PARENT): whoever started us reaps it, and we have no child to wait for.
static long relate(unsigned k)
{
	long pid = syscall(SYS_clone, CLONE_PARENT | SIGCHLD, NULL, NULL, NULL, NULL);
	if (pid < 0)
		return -errno;
	if (pid == 0) {
		close(in_fd);
		close(out_fd);
		in_fd = open_fifo("cmd", k, O_RDONLY);
		out_fd = open_fifo("rep", k, O_WRONLY);
		serve();
		_exit(0);
	}
	return pid;
}

// A child of our own that writes where we could, and ends: afterwards the pages are ours alone again.
static long forked(struct slot *s, size_t first, size_t n, uint64_t value)
{
	pid_t child = fork();
	if (child < 0)
		return -errno;
	if (child == 0) {
		guarded = 0;                                          // a fault ends the child alone
		do_write(s, "fill", first, n, value);
		_exit(0);
	}
	int status;
	while (waitpid(child, &status, 0) < 0)
		if (errno != EINTR)
			return -errno;
	return 0;
}

static int burn_stack(int depth, uint64_t value)
{
	volatile char room[PAGE];
	room[0] = (char)(value + depth);
	return depth ? burn_stack(depth - 1, value) + room[0] : room[0];
}

// The C library's heap grows the same way (for a first thread, say): only what we added to its end is taken back.
static long do_brk(long pages, uint64_t value)
{
	static char *first, *behind;
	char *old = sbrk(0);
	if (old != behind)
		first = old;
	if (pages < 0 && old + pages * (long)PAGE < first)
		return -EINVAL;
	if (sbrk(pages * (long)PAGE) == (void *)-1)
		return -errno;
	behind = sbrk(0);
	for (long i = 0; i < pages; i += 2)
		old[i * (long)PAGE + (long)(value % PAGE)] = (char)value;
	return 0;
}

static long do_remap(struct slot *s, const char *how, size_t pages)
{
	char *at;
	if (!s->pages)
		return -ENOENT;
	if (!strcmp(how, "move")) {
		at = mmap(NULL, s->pages * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (at == MAP_FAILED)
			return -errno;
		char *got = mremap(s->at, s->pages * PAGE, s->pages * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, at);
		if (got == MAP_FAILED) {
			long rc = -errno;
			munmap(at, s->pages * PAGE);
			return rc;
		}
		s->at = got;
		return 0;
	}
	if (!strcmp(how, "dontunmap")) {            // both ranges stay; the slot follows the pages
		at = mremap(s->at, s->pages * PAGE, s->pages * PAGE, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL);
		if (at == MAP_FAILED)
			return -errno;
		s->at = at;
		return 0;
	}
	if (pages == 0)
		return -EINVAL;
	at = mremap(s->at, s->pages * PAGE, pages * PAGE, !strcmp(how, "resize") ? MREMAP_MAYMOVE : 0);
	if (at == MAP_FAILED)
		return -errno;
	s->at = at;
	s->pages = pages;
	return 0;
}

static long file_make(unsigned f, const char *kind, size_t pages)
{
	char path[512];
	f %= NR_FILES;
	if (files[f].pages)
		close(files[f].fd);
	files[f].pages = 0;
	if (!strcmp(kind, "memfd"))
		files[f].fd = memfd_create("oracle", MFD_CLOEXEC);
	else {
		snprintf(path, sizeof path, "%s/tmpfs/file%u", directory, f);
		files[f].fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	}
	if (files[f].fd < 0 || ftruncate(files[f].fd, pages * PAGE))
		return -errno;
	files[f].pages = pages;
	return 0;
}

static long file_change(unsigned f, const char *how, size_t first, size_t n, uint64_t value)
{
	char buffer[PAGE];
	f %= NR_FILES;
	if (!files[f].pages)
		return -ENOENT;
	first %= files[f].pages;
	if (n > files[f].pages - first)
		n = files[f].pages - first;
	if (!strcmp(how, "punch"))
		return fallocate(files[f].fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, first * PAGE, n * PAGE)
			       ? -errno : 0;
	if (!strcmp(how, "grow")) {
		if (ftruncate(files[f].fd, (files[f].pages + n) * PAGE))
			return -errno;
		files[f].pages += n;
		return 0;
	}
	for (size_t i = 0; i < n; i++) {
		fill_file_page(buffer, value + i, first + i);
		if (pwrite(files[f].fd, buffer, PAGE, (first + i) * PAGE) != (ssize_t)PAGE)
			return -errno;
	}
	return n;
}

// ---- commands ------------------------------------------------------------------------------------------------
static long obey(char *line)
{
	char verb[32] = "", word[32] = "";
	unsigned n = 0, m = 0;
	long a = 0, b = 0;
	unsigned long value = 0;
	char *at;
	if (sscanf(line, "%31s %u %31s %ld %ld %lu %u", verb, &n, word, &a, &b, &value, &m) < 1)
		return -EINVAL;
	struct slot *s = &slots[n % NR_SLOTS];
	size_t first = (size_t)a, pages = b > 0 ? (size_t)b : 1;
	if (!strcmp(verb, "ping"))
		return getpid();
	if (!strcmp(verb, "map")) {                                   // map SLOT KIND FILE PAGES
		free_slot(n);
		return do_map(n, word, pages, (unsigned)a, NULL, 0);
	}
	if (!strcmp(verb, "over")) {                                  // over SLOT KIND FIRST PAGES _ OTHER
		struct slot *under = &slots[m % NR_SLOTS];            // MAP_FIXED over part of another slot
		if (under == s || !(pages = cut(under, first, pages, &at)))
			return -ENOENT;
		free_slot(n);
		long rc = do_map(n, word, pages, m, at, MAP_FIXED);
		return rc;
	}
	if (!strcmp(verb, "next")) {                                  // next SLOT KIND _ PAGES _ OTHER
		struct slot *left = &slots[m % NR_SLOTS];             // right behind another slot
		if (left == s || !left->pages)
			return -ENOENT;
		free_slot(n);
		return do_map(n, word, pages, m, left->at + left->pages * PAGE, MAP_FIXED_NOREPLACE);
	}
	if (!strcmp(verb, "write"))                                   // write SLOT HOW FIRST PAGES VALUE
		return do_write(s, word, first, pages, value);
	if (!strcmp(verb, "unmap")) {                                 // unmap SLOT all|part FIRST PAGES
		if (!(pages = cut_whole(s, first, pages, &at)))
			return -ENOENT;
		if (!strcmp(word, "all")) {
			at = s->at;
			pages = s->pages;
			s->pages = 0;
		}
		return munmap(at, pages * PAGE) ? -errno : 0;
	}
	if (!strcmp(verb, "protect")) {                               // protect SLOT none|r|rw FIRST PAGES
		if (!(pages = cut_whole(s, first, pages, &at)))
			return -ENOENT;
		int prot = !strcmp(word, "rw") ? PROT_READ | PROT_WRITE : !strcmp(word, "r") ? PROT_READ : PROT_NONE;
		return mprotect(at, pages * PAGE, prot) ? -errno : 0;
	}
	if (!strcmp(verb, "remap"))                                   // remap SLOT HOW _ PAGES
		return do_remap(s, word, pages);
	if (!strcmp(verb, "advise"))                                  // advise SLOT WHAT FIRST PAGES
		return do_advise(s, word, first, pages);
	if (!strcmp(verb, "lock")) {                                  // lock SLOT on|off FIRST PAGES
		if (!(pages = cut(s, first, pages, &at)))
			return -ENOENT;
		return (!strcmp(word, "on") ? mlock(at, pages * PAGE) : munlock(at, pages * PAGE)) ? -errno : 0;
	}
	if (!strcmp(verb, "kernel")) {                                // kernel SLOT pipe|direct|vm FIRST _ VALUE
		if (!strcmp(word, "pipe"))
			return by_pipe(s, first, value);
		return !strcmp(word, "direct") ? by_direct(s, first, value) : by_self_vm(s, first, value);
	}
	if (!strcmp(verb, "ring"))                                    // ring SLOT open|read|disk|close FIRST _ VALUE
		return !strcmp(word, "open") ? ring_open(s, first) : !strcmp(word, "close")
										? ring_close() : ring_read(value, word[0] == 'd');
	if (!strcmp(verb, "uffd"))                                    // uffd SLOT on|copy|off FIRST _ VALUE
		return !strcmp(word, "on") ? uffd_on(s) : !strcmp(word, "copy") ? uffd_copy(s, first, value)
										 : uffd_off();
	if (!strcmp(verb, "brk"))                                     // brk _ _ PAGES _ VALUE
		return do_brk(a, value);
	if (!strcmp(verb, "stack"))                                   // stack _ _ DEPTH _ VALUE
		return burn_stack((int)(a % 64), value) & 0;
	if (!strcmp(verb, "file"))                                    // file FILE memfd|tmpfs _ PAGES
		return file_make(n, word, pages);
	if (!strcmp(verb, "change"))                                  // change FILE write|punch|grow FIRST PAGES VALUE
		return file_change(n, word, first, pages, value);
	if (!strcmp(verb, "relate"))                                  // relate K
		return relate(n);
	if (!strcmp(verb, "storm"))                                   // storm SLOT start|direct|stop _ PAGES
		return !strcmp(word, "stop") ? storm_stop() : storm_start(n, pages, !strcmp(word, "direct"));
	if (!strcmp(verb, "fork"))                                    // fork SLOT _ FIRST PAGES VALUE
		return forked(s, first, pages, value);
	if (!strcmp(verb, "where"))                                   // where SLOT: its address
		return s->pages ? (long)(uintptr_t)s->at : -ENOENT;
	if (!strcmp(verb, "exec")) {                                  // a new program at the same FIFOs
		char self[512];
		char *argv[] = {"oracle_target", (char *)directory, "again", NULL};
		ssize_t len = readlink("/proc/self/exe", self, sizeof self - 1);
		if (len < 0)
			return -errno;
		self[len] = 0;
		fcntl(in_fd, F_SETFD, 0);
		fcntl(out_fd, F_SETFD, 0);
		dup2(in_fd, 10);
		dup2(out_fd, 11);
		execv(self, argv);
		return -errno;
	}
	return -EINVAL;
}

static void serve(void)
{
	static char line[256];
	for (;;) {
		size_t len = 0;
		for (;;) {                                            // one byte at a time: nothing is read ahead
			ssize_t got = read(in_fd, line + len, 1);
			if (got < 0 && errno == EINTR)
				continue;
			if (got <= 0)
				return;
			if (line[len] == '\n')
				break;
			if (len < sizeof line - 1)
				len++;
		}
		line[len] = 0;
		char answer[64];
		volatile long rc;
		guarded = 1;
		if (sigsetjmp(on_fault, 1))
			rc = -EFAULT;
		else
			rc = obey(line);
		guarded = 0;
		int size = snprintf(answer, sizeof answer, rc < 0 ? "errno %ld\n" : "ok %ld\n", rc < 0 ? -rc : rc);
		if (write(out_fd, answer, size) != size)
			return;
	}
}

int main(int argc, char **argv)
{
	if (argc < 2)
		return 2;
	directory = argv[1];
	struct sigaction action = {.sa_handler = fault, .sa_flags = SA_NODEFER};
	sigaction(SIGSEGV, &action, NULL);
	sigaction(SIGBUS, &action, NULL);
	if (argc > 2) {                                               // after exec
		in_fd = 10;
		out_fd = 11;
		if (write(out_fd, "ok 0\n", 5) != 5)
			return 1;
	} else {
		in_fd = open_fifo("cmd", 0, O_RDONLY);
		out_fd = open_fifo("rep", 0, O_WRONLY);
	}
	if (in_fd < 0 || out_fd < 0)
		return 1;
	serve();
	return 0;
}
