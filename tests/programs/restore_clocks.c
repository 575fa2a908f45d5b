// SPDX-License-Identifier: Apache-2.0
// restore_clocks PROGRESS SECONDS: remembers points of CLOCK_MONOTONIC and CLOCK_BOOTTIME and checks them.
// It writes "TICKS SLEEPS MONOTONIC_NS" every few milliseconds; its threads sleep until a point in time, again and
// again, and check that it has come, and not much earlier.  It says what went wrong and ends with 1.
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static atomic_long ticks, sleeps;
static long long now(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}
static void check(int good, const char *what, long long a, long long b) {
    if (!good) { fprintf(stderr, "%s: %lld %lld\n", what, a, b); _exit(1); }
}
static void *until(void *arg) {
    int kind = (long)arg, word = 0;
    for (;;) {
        clockid_t clock = kind == 1 ? CLOCK_BOOTTIME : CLOCK_MONOTONIC;
        long long end = now(clock) + 400000000LL;
        struct timespec t = {end / 1000000000, end % 1000000000};
        if (kind == 2) while (now(clock) < end) syscall(SYS_futex, &word, FUTEX_WAIT_BITSET_PRIVATE, 0, &t, 0, -1);
        else while (clock_nanosleep(clock, TIMER_ABSTIME, &t, 0)) {}
        check(now(clock) >= end, "woke too early", now(clock), end);
        atomic_fetch_add(&sleeps, 1);
    }
}
int main(int argc, char **argv) {
    int fd = open(argv[1], O_RDWR | O_CREAT, 0600);
    pthread_t thread;
    for (long k = 0; k < 3; k++) pthread_create(&thread, 0, until, (void *)k);
    long long most = atoll(argv[2]) * 1000000000LL, last = now(CLOCK_MONOTONIC), last_boot = now(CLOCK_BOOTTIME);
    for (;;) {
        char text[96] = {0};
        struct timespec nap = {0, 3000000};
        long long mono = now(CLOCK_MONOTONIC), boot = now(CLOCK_BOOTTIME);
        struct timespec raw;
        syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &raw);  // the vdso and the kernel must agree
        long long asked = raw.tv_sec * 1000000000LL + raw.tv_nsec;
        check(asked >= mono && asked < mono + most, "the kernel's clock differs from the vdso's", asked, mono);
        check(mono >= last && mono < last + most, "the monotonic clock jumped", mono, last);
        check(boot >= last_boot && boot < last_boot + most, "the boot clock jumped", boot, last_boot);
        last = mono, last_boot = boot;
        int n = snprintf(text, sizeof text, "%20ld %20ld %20lld\n", atomic_fetch_add(&ticks, 1), atomic_load(&sleeps), mono);
        if (pwrite(fd, text, n, 0) != n) return 2;
        nanosleep(&nap, 0);
    }
}
