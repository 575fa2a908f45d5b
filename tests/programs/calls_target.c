// SPDX-License-Identifier: Apache-2.0
// Calls a freeze interrupts, made without the C library; what became of each is in FILE, a word each.
//
//   calls_target FILE epoll    waits of 300 ms, with a timeout that is loaded once, before the loop: how many ms each took
//   calls_target FILE uring    io_uring_enter, which waits for ever: its errno
//   calls_target FILE cpu      a sleep of 10 s of its own CPU time, of which it spends none: its errno
#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <stdint.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { WAITS = 3, TIMEOUT_MS = 300 };

static struct epoll_event events[8];

static inline long call4(long nr, long a, long b, long c, long d)
{
	register long r10 __asm__("r10") = d;
	long result;

	__asm__ volatile("syscall"
			 : "=a"(result) : "a"(nr), "D"(a), "S"(b), "d"(c), "r"(r10) : "rcx", "r11", "memory");
	return result;
}

static inline int64_t now_ms(void)
{
	struct timespec now;
	long unused;

	__asm__ volatile("syscall"
			 : "=a"(unused) : "a"((long)SYS_clock_gettime), "D"((long)CLOCK_MONOTONIC), "S"(&now)
			 : "rcx", "r11", "memory");
	return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

__attribute__((noinline)) static void wait_often(int epoll, int timeout_ms, volatile int64_t *took)
{
	for (int n = 0; n < WAITS; n++) {
		int64_t begun = now_ms();

		call4(SYS_epoll_wait, epoll, (long)events, 8, timeout_ms);
		took[n] = now_ms() - begun;
	}
}

int main(int argc, char **argv)
{
	int file = open(argv[1], O_RDWR);
	volatile int64_t *told = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);

	if (told == MAP_FAILED || argc != 3)
		return 1;
	if (!strcmp(argv[2], "epoll")) {
		wait_often(epoll_create1(0), TIMEOUT_MS, told);
	} else if (!strcmp(argv[2], "uring")) {
		struct io_uring_params params = { 0 };
		int ring = syscall(SYS_io_uring_setup, 4, &params);

		if (ring < 0)
			return 1;
		told[0] = syscall(SYS_io_uring_enter, ring, 0, 1, IORING_ENTER_GETEVENTS, NULL, 0) < 0 ? errno : -1;
	} else {
		struct timespec wanted = { 10, 0 };

		told[0] = clock_nanosleep(CLOCK_PROCESS_CPUTIME_ID, 0, &wanted, NULL) ?: -1;
	}
	pause();
	return 0;
}
