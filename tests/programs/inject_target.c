// SPDX-License-Identifier: Apache-2.0
// Programs that check themselves while somebody freezes them and makes calls inside them.
//
//   inject_target MODE FILE [tolerant]
//
// tolerant: epoll_wait, semop and sigwaitinfo may fail with EINTR, as they do at any stop (signal(7)).
//
// FILE (at least 4096 bytes) is mapped shared: the tester reads `progress` and `errors` there without touching us.
// Any disturbance (a changed register, a short sleep, a false EINTR, a lost or reordered signal, a wrong per-CPU
// count) is an error with a text.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/rseq.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

struct shared {
    volatile uint64_t ready, progress, errors;
    char text[256];
    volatile uint64_t quit;
} *shm;

static int tolerant;

// may this call have failed just now?
static int excused(long result) { return result == -1 && errno == EINTR && tolerant; }

static void fail(const char *format, ...)
{
    if (__atomic_fetch_add(&shm->errors, 1, __ATOMIC_SEQ_CST) == 0) {
        va_list args;
        va_start(args, format);
        vsnprintf(shm->text, sizeof shm->text, format, args);
        va_end(args);
    }
}

static void step(void) { __atomic_fetch_add(&shm->progress, 1, __ATOMIC_RELAXED); }

static int64_t now_ns(clockid_t clock)
{
    struct timespec t;
    if (clock_gettime(clock, &t)) fail("clock_gettime: %d", errno);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void check_sleep(const char *what, int64_t start, int64_t wanted)
{
    int64_t slept = now_ns(CLOCK_MONOTONIC) - start;
    if (slept < wanted) fail("%s: slept %ld of %ld ns", what, (long)slept, (long)wanted);
}

// ---- registers, flags, vector registers, red zone

uint64_t saved_rsp, left_turns, got[16];
uint8_t stack_area[8192] __attribute__((aligned(64)));
uint8_t vectors[16][32] __attribute__((aligned(32))), vectors_got[16][32] __attribute__((aligned(32)));
uint64_t carry_lost;

static void mode_regs(void)
{
    for (int n = 0; n < 16; n++)
        for (int k = 0; k < 32; k++) vectors[n][k] = n * 17 + k * 3 + 1;
    while (!shm->quit) {
        memset(stack_area, 0xA5, sizeof stack_area);
        left_turns = 20000;
        __asm__ volatile(
            "push %%rbx\n push %%rbp\n push %%r12\n push %%r13\n push %%r14\n push %%r15\n"
            "mov %%rsp, saved_rsp(%%rip)\n"
            "lea stack_area+4096(%%rip), %%rsp\n"
            "vmovdqa vectors+0(%%rip), %%ymm0\n vmovdqa vectors+32(%%rip), %%ymm1\n"
            "vmovdqa vectors+64(%%rip), %%ymm2\n vmovdqa vectors+480(%%rip), %%ymm15\n"
            "mov $0x1111111111111101, %%rax\n mov $0x1111111111111102, %%rbx\n"
            "mov $0x1111111111111103, %%rcx\n mov $0x1111111111111104, %%rdx\n"
            "mov $0x1111111111111105, %%rsi\n mov $0x1111111111111106, %%rdi\n"
            "mov $0x1111111111111107, %%rbp\n mov $0x1111111111111108, %%r8\n"
            "mov $0x1111111111111109, %%r9\n mov $0x111111111111110a, %%r10\n"
            "mov $0x111111111111110b, %%r11\n mov $0x111111111111110c, %%r12\n"
            "mov $0x111111111111110d, %%r13\n mov $0x111111111111110e, %%r14\n"
            "mov $0x111111111111110f, %%r15\n"
            "mov %%rax, -128(%%rsp)\n mov %%r15, -8(%%rsp)\n"  // the red zone is ours
            "1: stc\n .rept 40\n nop\n .endr\n jc 2f\n incq carry_lost(%%rip)\n"
            "2: decq left_turns(%%rip)\n jnz 1b\n"
            "mov %%rax, got+0(%%rip)\n mov %%rbx, got+8(%%rip)\n mov %%rcx, got+16(%%rip)\n"
            "mov %%rdx, got+24(%%rip)\n mov %%rsi, got+32(%%rip)\n mov %%rdi, got+40(%%rip)\n"
            "mov %%rbp, got+48(%%rip)\n mov %%r8, got+56(%%rip)\n mov %%r9, got+64(%%rip)\n"
            "mov %%r10, got+72(%%rip)\n mov %%r11, got+80(%%rip)\n mov %%r12, got+88(%%rip)\n"
            "mov %%r13, got+96(%%rip)\n mov %%r14, got+104(%%rip)\n mov %%r15, got+112(%%rip)\n"
            "mov %%rsp, got+120(%%rip)\n"
            "vmovdqa %%ymm0, vectors_got+0(%%rip)\n vmovdqa %%ymm1, vectors_got+32(%%rip)\n"
            "vmovdqa %%ymm2, vectors_got+64(%%rip)\n vmovdqa %%ymm15, vectors_got+480(%%rip)\n"
            "mov saved_rsp(%%rip), %%rsp\n"
            "pop %%r15\n pop %%r14\n pop %%r13\n pop %%r12\n pop %%rbp\n pop %%rbx\n"
            "vzeroupper\n" ::: "rax", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "memory", "cc",
            "xmm0", "xmm1", "xmm2", "xmm15");
        for (int n = 0; n < 15; n++)
            if (got[n] != 0x1111111111111101ULL + n) fail("register %d is %lx", n, (long)got[n]);
        if (got[15] != (uint64_t)(stack_area + 4096)) fail("rsp is %lx", (long)got[15]);
        if (carry_lost) fail("the carry flag was lost");
        for (int n = 0; n < 16; n += n == 2 ? 13 : 1)
            if (memcmp(vectors[n], vectors_got[n], 32)) fail("ymm%d changed", n);
        for (int n = 0; n < 8192; n++) {
            int mine = (n >= 4096 - 128 && n < 4096 - 120) || (n >= 4096 - 8 && n < 4096);
            if (!mine && stack_area[n] != 0xA5) fail("byte %d from rsp was written", n - 4096);
        }
        if (*(uint64_t *)(stack_area + 4096 - 128) != 0x1111111111111101ULL ||
            *(uint64_t *)(stack_area + 4096 - 8) != 0x111111111111110fULL)
            fail("the red zone was written");
        step();
    }
}

// ---- sleeps

static void mode_nanosleep(void)
{
    while (!shm->quit) {
        struct timespec wanted = {0, 4000000};
        int64_t start = now_ns(CLOCK_MONOTONIC);
        if (nanosleep(&wanted, NULL)) fail("nanosleep: %s", strerror(errno));
        check_sleep("nanosleep", start, 4000000);
        step();
    }
}

static void mode_clock_nanosleep_abs(void)
{
    while (!shm->quit) {
        int64_t until = now_ns(CLOCK_MONOTONIC) + 4000000;
        struct timespec wanted = {until / 1000000000, until % 1000000000};
        int error = clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &wanted, NULL);
        if (error) fail("clock_nanosleep: %s", strerror(error));
        check_sleep("clock_nanosleep", until, 0);
        step();
    }
}

static void mode_poll(void)
{
    while (!shm->quit) {
        int64_t start = now_ns(CLOCK_MONOTONIC);
        int got_ = poll(NULL, 0, 4);
        if (got_) fail("poll: %d %s", got_, strerror(errno));
        check_sleep("poll", start, 4000000);
        step();
    }
}

static void mode_ppoll(void)
{
    sigset_t inside, outside, now;
    sigemptyset(&outside);
    sigaddset(&outside, SIGUSR1);
    sigprocmask(SIG_SETMASK, &outside, NULL);
    sigfillset(&inside);
    sigdelset(&inside, SIGUSR1);
    while (!shm->quit) {
        struct timespec wanted = {0, 4000000};
        int64_t start = now_ns(CLOCK_MONOTONIC);
        int got_ = ppoll(NULL, 0, &wanted, &inside);
        if (got_) fail("ppoll: %d %s", got_, strerror(errno));
        check_sleep("ppoll", start, 4000000);
        sigprocmask(SIG_SETMASK, NULL, &now);
        if (memcmp(&now, &outside, 8)) fail("mask after ppoll is %lx", *(long *)&now);
        step();
    }
}

static void mode_futex(void)
{
    static int word;
    while (!shm->quit) {
        struct timespec wanted = {0, 4000000};
        int64_t start = now_ns(CLOCK_MONOTONIC);
        long got_ = syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, &wanted, NULL, 0);
        if (got_ != -1 || errno != ETIMEDOUT) fail("futex: %ld %s", got_, strerror(errno));
        check_sleep("futex", start, 4000000);
        step();
    }
}

static void mode_epoll_timeout(void)
{
    int ep = epoll_create1(EPOLL_CLOEXEC);
    while (!shm->quit) {
        struct epoll_event event;
        int64_t start = now_ns(CLOCK_MONOTONIC);
        int got_ = epoll_wait(ep, &event, 1, 5);
        if (excused(got_)) continue;
        if (got_) fail("epoll_wait: %d %s", got_, strerror(errno));
        check_sleep("epoll_wait", start, 4900000);
        step();
    }
}

// ---- waits that another thread ends

static int pipe_fds[2], event_fd;

static void *pipe_feeder(void *unused)
{
    for (uint8_t n = 0; !shm->quit; n++) {
        usleep(3000);
        if (write(pipe_fds[1], &n, 1) != 1) fail("write: %s", strerror(errno));
    }
    return unused;
}

static void mode_read(void)
{
    pthread_t feeder;
    if (pipe(pipe_fds)) fail("pipe");
    pthread_create(&feeder, NULL, pipe_feeder, NULL);
    for (uint8_t n = 0; !shm->quit; n++) {
        uint8_t byte;
        ssize_t got_ = read(pipe_fds[0], &byte, 1);
        if (got_ != 1) fail("read: %zd %s", got_, strerror(errno));
        else if (byte != n) fail("read %d instead of %d", byte, n);
        step();
    }
}

static void *event_feeder(void *unused)
{
    while (!shm->quit) {
        uint64_t one = 1;
        usleep(3000);
        if (write(event_fd, &one, 8) != 8) fail("write: %s", strerror(errno));
    }
    return unused;
}

static void mode_epoll(void)
{
    pthread_t feeder;
    int ep = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN};
    event_fd = eventfd(0, 0);
    epoll_ctl(ep, EPOLL_CTL_ADD, event_fd, &event);
    pthread_create(&feeder, NULL, event_feeder, NULL);
    while (!shm->quit) {
        uint64_t count;
        int got_ = epoll_wait(ep, &event, 1, -1);
        if (excused(got_)) continue;
        if (got_ != 1) fail("epoll_wait: %d %s", got_, strerror(errno));
        if (read(event_fd, &count, 8) != 8) fail("read: %s", strerror(errno));
        step();
    }
}

static int sem_id;

static void *sem_feeder(void *unused)
{
    while (!shm->quit) {
        struct sembuf up = {0, 1, 0};
        usleep(3000);
        if (semop(sem_id, &up, 1)) fail("semop up: %s", strerror(errno));
    }
    return unused;
}

static void mode_semop(void)
{
    pthread_t feeder;
    sem_id = semget(IPC_PRIVATE, 1, 0600);
    pthread_create(&feeder, NULL, sem_feeder, NULL);
    for (int n = 0; !shm->quit; n++) {
        struct sembuf down = {0, -1, 0};
        int got_ = semop(sem_id, &down, 1);
        if (excused(got_)) continue;
        if (got_) fail("semop: %s", strerror(errno));
        if (n == 0) shm->ready = 1;
        step();
    }
    semctl(sem_id, 0, IPC_RMID);
}

static void *signal_feeder(void *unused)
{
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, NULL);
    while (!shm->quit) {
        usleep(3000);
        kill(getpid(), SIGUSR2);
    }
    return unused;
}

static void mode_sigwait(void)
{
    pthread_t feeder;
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    sigprocmask(SIG_BLOCK, &set, NULL);
    pthread_create(&feeder, NULL, signal_feeder, NULL);
    while (!shm->quit) {
        siginfo_t info;
        int got_ = sigwaitinfo(&set, &info);
        if (excused(got_)) continue;
        if (got_ != SIGUSR2) fail("sigwaitinfo: %s", strerror(errno));
        step();
    }
}

// ---- signals

static volatile int expected_value, nr_handled;

static void sequence_handler(int signum, siginfo_t *info, void *context)
{
    (void)signum, (void)context;
    if (info->si_value.sival_int != expected_value)
        fail("signal %d arrived instead of %d", info->si_value.sival_int, expected_value);
    expected_value = info->si_value.sival_int + 1;
    nr_handled++;
    step();
}

static void *sequence_feeder(void *unused)
{
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, NULL);
    for (int n = 0; !shm->quit;) {
        union sigval value = {.sival_int = n};
        if (sigqueue(getpid(), SIGRTMIN + 3, value) == 0) n++;
        else if (errno != EAGAIN) fail("sigqueue: %s", strerror(errno));
        usleep(300);
    }
    return unused;
}

static void mode_signals(void)
{
    pthread_t feeder;
    struct sigaction action = {.sa_sigaction = sequence_handler, .sa_flags = SA_SIGINFO | SA_RESTART};
    sigaction(SIGRTMIN + 3, &action, NULL);
    pthread_create(&feeder, NULL, sequence_feeder, NULL);
    while (!shm->quit) {
        struct timespec wanted = {0, 2000000};
        nanosleep(&wanted, NULL);
    }
}

static void altstack_handler(int signum, siginfo_t *info, void *context)
{
    (void)signum, (void)context;
    volatile uint64_t canary[64];
    for (int n = 0; n < 64; n++) canary[n] = 0xC0FFEE00 + n;
    for (int turn = 0; turn < 3000; turn++) __asm__ volatile("pause" ::: "memory");
    for (int n = 0; n < 64; n++)
        if (canary[n] != 0xC0FFEE00u + n) fail("the alternate stack was written");
    if (!info) fail("no siginfo");
    step();
}

static void mode_altstack(void)
{
    static uint8_t area[65536];
    stack_t stack = {.ss_sp = area, .ss_size = sizeof area};
    struct sigaction action = {.sa_sigaction = altstack_handler, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    sigaltstack(&stack, NULL);
    sigaction(SIGUSR1, &action, NULL);
    while (!shm->quit) {
        raise(SIGUSR1);
        stack_t now;
        sigaltstack(NULL, &now);
        if (now.ss_sp != area || now.ss_flags) fail("the alternate stack is gone");
    }
}

// ---- clocks in the vdso

static void mode_clock(void)
{
    int64_t last = now_ns(CLOCK_MONOTONIC);
    while (!shm->quit) {
        for (int n = 0; n < 20000; n++) {
            int64_t now = now_ns(CLOCK_MONOTONIC);
            if (now < last) fail("the clock went back");
            last = now;
        }
        step();
    }
}

// ---- restartable sequences: per-CPU counters

#define NR_RSEQ_THREADS 3
static struct { uint64_t count; uint8_t pad[56]; } per_cpu[256] __attribute__((aligned(64)));
static pthread_barrier_t barrier;

// adds 1 to the counter of the CPU it runs on; long enough to be caught inside
static __attribute__((noinline)) void per_cpu_increment(void)
{
    __asm__ volatile(
        ".pushsection __rseq_cs, \"aw\"\n .balign 32\n"
        "3: .long 0, 0\n .quad 1f, 2f - 1f, 4f\n .popsection\n"
        "5: lea 3b(%%rip), %%rax\n mov %%rax, %%fs:8(%[rseq])\n"
        "1: mov %%fs:4(%[rseq]), %%eax\n shl $6, %%rax\n add %[base], %%rax\n"
        "mov (%%rax), %%rdx\n mov $60, %%ecx\n"
        "6: pause\n dec %%ecx\n jnz 6b\n"
        "inc %%rdx\n mov %%rdx, (%%rax)\n"
        "2: jmp 7f\n"
        ".byte 0x0f, 0xb9, 0x3d\n .long 0x53053053\n"
        "4: jmp 5b\n"
        "7:\n"
        :: [rseq] "r"(__rseq_offset), [base] "r"(per_cpu) : "rax", "rcx", "rdx", "memory", "cc");
}

static void rseq_round(void)
{
    for (int n = 0; n < 600; n++) per_cpu_increment();
}

static void *rseq_worker(void *unused)
{
    while (!shm->quit) {
        pthread_barrier_wait(&barrier);
        rseq_round();
        pthread_barrier_wait(&barrier);
    }
    return unused;
}

static void mode_rseq(void)
{
    pthread_t thread;
    if (!__rseq_size) fail("no rseq here");
    pthread_barrier_init(&barrier, NULL, NR_RSEQ_THREADS);
    for (int n = 1; n < NR_RSEQ_THREADS; n++) pthread_create(&thread, NULL, rseq_worker, NULL);
    for (uint64_t wanted = 0; !shm->quit;) {
        uint64_t sum = 0;
        wanted += NR_RSEQ_THREADS * 600;
        pthread_barrier_wait(&barrier);
        rseq_round();
        pthread_barrier_wait(&barrier);
        for (int n = 0; n < 256; n++) sum += per_cpu[n].count;
        if (sum != wanted) { fail("%ld increments counted as %ld", (long)wanted, (long)sum); wanted = sum; }
        step();
    }
}

// ---- many threads

static void *spinner(void *unused)
{
    while (!shm->quit) { for (volatile int n = 0; n < 100000; n++); }
    return unused;
}

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static uint64_t under_mutex[2];

static void *sleeper(void *unused)
{
    while (!shm->quit) {
        struct timespec wanted = {0, 3000000};
        int64_t start = now_ns(CLOCK_MONOTONIC);
        if (nanosleep(&wanted, NULL)) fail("nanosleep: %s", strerror(errno));
        check_sleep("nanosleep", start, 3000000);
        pthread_mutex_lock(&mutex);
        under_mutex[0]++;
        if (under_mutex[0] != ++under_mutex[1]) fail("mutex");
        pthread_mutex_unlock(&mutex);
    }
    return unused;
}

static void run_threads(int nr_spinners, int nr_sleepers)
{
    pthread_t thread;
    for (int n = 0; n < nr_spinners; n++) pthread_create(&thread, NULL, spinner, NULL);
    for (int n = 0; n < nr_sleepers; n++) pthread_create(&thread, NULL, sleeper, NULL);
    while (!shm->quit) {
        struct timespec wanted = {0, 2000000};
        if (nanosleep(&wanted, NULL)) fail("nanosleep: %s", strerror(errno));
        step();
    }
}

static void mode_threads9(void) { run_threads(3, 5); }
static void mode_threads64(void) { run_threads(1, 62); }

// threads are born and die all the time
static void *short_life(void *arg) { return arg; }

static void mode_births(void)
{
    while (!shm->quit) {
        pthread_t threads[4];
        for (long n = 0; n < 4; n++)
            if (pthread_create(&threads[n], NULL, short_life, (void *)n)) fail("pthread_create");
        for (long n = 0; n < 4; n++) {
            void *result;
            if (pthread_join(threads[n], &result) || result != (void *)n) fail("pthread_join");
        }
        step();
    }
}

// forks and waits all the time: a foreign child or a lost exit status would show
static void mode_forks(void)
{
    while (!shm->quit) {
        int status;
        pid_t child = fork();
        if (child == 0) _exit(7);
        pid_t got_ = wait(&status);
        if (got_ != child || WEXITSTATUS(status) != 7) fail("wait: %d for %d", got_, child);
        errno = 0;
        if (wait(NULL) != -1 || errno != ECHILD) fail("a child too many");
        step();
    }
}

// one long sleep, frozen many times: never short, and its end is not put off by each freeze
enum long_kind { LONG_NANOSLEEP, LONG_CLOCK_NANOSLEEP, LONG_POLL, LONG_FUTEX, LONG_SELECT, LONG_EPOLL };

static long sleep_long(enum long_kind kind, int ep)
{
    static int word;
    struct timespec wanted = {0, 400000000};
    struct timeval select_wanted = {0, 400000};
    struct epoll_event event;
    long got_;
    switch (kind) {
    case LONG_NANOSLEEP: return nanosleep(&wanted, NULL);
    case LONG_CLOCK_NANOSLEEP:
        errno = clock_nanosleep(CLOCK_MONOTONIC, 0, &wanted, NULL);
        return errno ? -1 : 0;
    case LONG_POLL: return poll(NULL, 0, 400);
    case LONG_FUTEX:
        got_ = syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, &wanted, NULL, 0);
        return got_ == -1 && errno == ETIMEDOUT ? 0 : got_;
    case LONG_SELECT: return select(0, NULL, NULL, NULL, &select_wanted);
    default: return epoll_wait(ep, &event, 1, 400);
    }
}

static void long_sleep(const char *what, enum long_kind kind)
{
    int ep = epoll_create1(EPOLL_CLOEXEC);
    while (!shm->quit) {
        int64_t start = now_ns(CLOCK_MONOTONIC);
        long got_ = sleep_long(kind, ep);
        if (kind == LONG_EPOLL && excused(got_)) continue;
        if (got_) fail("%s: %ld %s", what, got_, strerror(errno));
        check_sleep(what, start, kind == LONG_EPOLL ? 399000000 : 400000000);
        if (now_ns(CLOCK_MONOTONIC) - start > 10000000000) fail("%s was put off", what);
        step();
    }
}

static void mode_nanosleep_long(void) { long_sleep("a long nanosleep", LONG_NANOSLEEP); }
static void mode_clock_nanosleep_long(void) { long_sleep("a long clock_nanosleep", LONG_CLOCK_NANOSLEEP); }
static void mode_poll_long(void) { long_sleep("a long poll", LONG_POLL); }
static void mode_futex_long(void) { long_sleep("a long futex wait", LONG_FUTEX); }
static void mode_select_long(void) { long_sleep("a long select", LONG_SELECT); }
static void mode_epoll_long(void) { long_sleep("a long epoll_wait", LONG_EPOLL); }

// a multi-threaded program that replaces itself all the time
static char **own_argv;

static void mode_execs(void)
{
    pthread_t thread;
    for (int n = 0; n < 3; n++) pthread_create(&thread, NULL, n ? sleeper : spinner, NULL);
    usleep(3000);
    step();
    if (!shm->quit) execv("/proc/self/exe", own_argv);
}

// the same by another thread than the main one, which takes over its id
static void *replace(void *unused)
{
    usleep(rand() % 3000);
    step();
    if (!shm->quit) execv("/proc/self/exe", own_argv);
    exit(shm->errors ? 1 : 0);
    return unused;
}

static void mode_thread_execs(void)
{
    pthread_t thread;
    srand(getpid() ^ (unsigned)time(NULL) ^ (unsigned)shm->progress);
    for (int n = 0; n < 8; n++) pthread_create(&thread, NULL, sleeper, NULL);
    pthread_create(&thread, NULL, replace, NULL);
    for (;;) pause();
}

// a main thread that waits for a vfork child cannot be stopped
static void mode_vfork(void)
{
    while (!shm->quit) {
        pid_t child = vfork();
        if (child == 0) { struct timespec nap = {0, 600000000}; nanosleep(&nap, NULL); _exit(0); }
        waitpid(child, NULL, 0);
        step();
    }
}

// the main thread has ended, another one lives on
static void mode_headless(void)
{
    pthread_t thread;
    pthread_create(&thread, NULL, sleeper, NULL);
    shm->progress = 10;
    pthread_exit(NULL);
}

static const struct { const char *name; void (*run)(void); } modes[] = {
    {"regs", mode_regs}, {"nanosleep", mode_nanosleep}, {"clock-nanosleep", mode_clock_nanosleep_abs},
    {"poll", mode_poll}, {"ppoll", mode_ppoll}, {"futex", mode_futex}, {"epoll-timeout", mode_epoll_timeout},
    {"read", mode_read}, {"epoll", mode_epoll}, {"semop", mode_semop}, {"sigwait", mode_sigwait},
    {"signals", mode_signals}, {"altstack", mode_altstack}, {"clock", mode_clock}, {"rseq", mode_rseq},
    {"threads9", mode_threads9}, {"threads64", mode_threads64}, {"births", mode_births}, {"forks", mode_forks},
    {"nanosleep-long", mode_nanosleep_long}, {"epoll-long", mode_epoll_long}, {"execs", mode_execs},
    {"thread-execs", mode_thread_execs},
    {"clock-nanosleep-long", mode_clock_nanosleep_long}, {"poll-long", mode_poll_long},
    {"futex-long", mode_futex_long}, {"select-long", mode_select_long},
    {"vfork", mode_vfork}, {"headless", mode_headless},
};

int main(int argc, char **argv)
{
    if (argc < 3) return 2;
    int fd = open(argv[2], O_RDWR);
    shm = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (shm == MAP_FAILED) return 3;
    close(fd);
    tolerant = argc > 3;
    own_argv = argv;
    for (size_t n = 0; n < sizeof modes / sizeof *modes; n++)
        if (!strcmp(argv[1], modes[n].name)) {
            shm->ready = 1;
            modes[n].run();
            return shm->errors ? 1 : 0;
        }
    return 4;
}
