// SPDX-License-Identifier: Apache-2.0
// A program that sets up state of one group, says "ready", waits until it is told to go on, and then proves to
// itself that everything is as it was.
//
//     restore_self_check GROUP LOG CONTROL
//
// LOG gets "ready", then "ok NAME" or "FAIL NAME: why" lines, then "done".  It goes on when the file CONTROL exists;
// CONTROL holds the nanoseconds for which the process did not exist.
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <grp.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/select.h>
#include <sys/shm.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#define PAGE 4096UL
#define NS 1000000000LL
static int log_fd;
static const char *control;
static atomic_int go_on, nr_ready;
static pthread_mutex_t log_lock = PTHREAD_MUTEX_INITIALIZER;
static long long dead_ns;

static void say(const char *format, ...) {
    char line[4096];
    va_list list;
    va_start(list, format);
    int n = vsnprintf(line, sizeof line - 2, format, list);
    va_end(list);
    if (n > (int)sizeof line - 3) n = sizeof line - 3;
    line[n++] = '\n';
    pthread_mutex_lock(&log_lock);
    if (write(log_fd, line, n) != n) _exit(90);
    pthread_mutex_unlock(&log_lock);
}
#define CHECK(name, cond, ...)                                  \
    do {                                                        \
        if (cond) say("ok %s", name);                           \
        else { char b_[512]; snprintf(b_, sizeof b_, __VA_ARGS__); say("FAIL %s: %s (errno %d)", name, b_, errno); } \
    } while (0)

static long long now_ns(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec * NS + t.tv_nsec;
}
static void (*before_go_on)(void);
static void wait_for_control(void) {
    FILE *f;
    struct timespec t = {0, 3000000};
    while (!(f = fopen(control, "r"))) nanosleep(&t, NULL);
    if (fscanf(f, "%lld", &dead_ns) != 1) dead_ns = 0;
    fclose(f);
    if (before_go_on) before_go_on();
    atomic_store(&go_on, 1);
    syscall(SYS_futex, &go_on, FUTEX_WAKE, 1 << 20, 0, 0, 0);
}
static void all_ready(int nr) {
    while (atomic_load(&nr_ready) < nr) usleep(1000);
    say("ready");
    wait_for_control();
}
static void wait_go(void) {
    while (!atomic_load(&go_on)) syscall(SYS_futex, &go_on, FUTEX_WAIT, 0, 0, 0, 0);
}

// ---------------------------------------------------------------- cpu: registers held over a spin
#define BYTES(name, n, seed) static unsigned char name[n] __attribute__((aligned(64)));
static int cpu_has(unsigned leaf, unsigned sub, int reg, int bit) {
    unsigned r[4];
    __asm__("cpuid" : "=a"(r[0]), "=b"(r[1]), "=c"(r[2]), "=d"(r[3]) : "a"(leaf), "c"(sub));
    return r[reg] >> bit & 1;
}
static void fill(unsigned char *p, size_t n, unsigned seed) {
    for (size_t i = 0; i < n; i++) { seed = seed * 1103515245 + 12345; p[i] = seed >> 16; }
}
struct gpr { uint64_t in[12], out[12], flag; };
static void *cpu_general(void *arg) {
    struct gpr g;
    (void)arg;
    for (int i = 0; i < 12; i++) g.in[i] = 0x0123456789abcdefULL * (i + 3);
    atomic_fetch_add(&nr_ready, 1);
    // all but rax (flag), rsp, rbp, and one base register
    __asm__ volatile(
        "push %%rbp\n mov %0, %%rbp\n"
        "mov 0(%%rbp),%%rbx\n mov 8(%%rbp),%%rcx\n mov 16(%%rbp),%%rdx\n mov 24(%%rbp),%%rsi\n mov 32(%%rbp),%%r8\n"
        "mov 40(%%rbp),%%r9\n mov 48(%%rbp),%%r10\n mov 56(%%rbp),%%r11\n mov 64(%%rbp),%%r12\n"
        "mov 72(%%rbp),%%r13\n mov 80(%%rbp),%%r14\n mov 88(%%rbp),%%r15\n"
        "std\n"  // a flag no one else leaves set
        "1: pause\n cmpl $0, (%1)\n je 1b\n"
        "pushfq\n pop 192(%%rbp)\n cld\n"
        "mov %%rbx,96(%%rbp)\n mov %%rcx,104(%%rbp)\n mov %%rdx,112(%%rbp)\n mov %%rsi,120(%%rbp)\n"
        "mov %%r8,128(%%rbp)\n mov %%r9,136(%%rbp)\n mov %%r10,144(%%rbp)\n mov %%r11,152(%%rbp)\n"
        "mov %%r12,160(%%rbp)\n mov %%r13,168(%%rbp)\n mov %%r14,176(%%rbp)\n mov %%r15,184(%%rbp)\n"
        "pop %%rbp\n"
        :: "a"(&g), "D"(&go_on)
        : "rbx", "rcx", "rdx", "rsi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "memory", "cc");
    CHECK("general registers", !memcmp(g.in, g.out, sizeof g.in), "differ");
    CHECK("direction flag", g.flag >> 10 & 1, "flags %lx", (long)g.flag);
    return 0;
}
static unsigned char vin[32][64] __attribute__((aligned(64))), vout[32][64] __attribute__((aligned(64)));
static void *cpu_sse(void *arg) {
    static unsigned char in[16][16] __attribute__((aligned(64))), out[16][16] __attribute__((aligned(64)));
    unsigned mxcsr_in = 0x5fc0, mxcsr_out = 0, mxcsr_old;
    unsigned short cw_in = 0x0e7f, cw_out = 0, cw_old;
    double x87 = 0.1234567890123, x87_out = 0;
    (void)arg;
    fill(&in[0][0], sizeof in, 5);
    atomic_fetch_add(&nr_ready, 1);
    __asm__ volatile("stmxcsr %0\n fnstcw %1" : "=m"(mxcsr_old), "=m"(cw_old));
    __asm__ volatile(
        "ldmxcsr %3\n fldcw %4\n fldl %5\n"
        "movaps 0(%0),%%xmm0\n movaps 16(%0),%%xmm1\n movaps 32(%0),%%xmm2\n movaps 48(%0),%%xmm3\n"
        "movaps 64(%0),%%xmm4\n movaps 80(%0),%%xmm5\n movaps 224(%0),%%xmm14\n movaps 240(%0),%%xmm15\n"
        "1: pause\n cmpl $0,(%2)\n je 1b\n"
        "movaps %%xmm0,0(%1)\n movaps %%xmm1,16(%1)\n movaps %%xmm2,32(%1)\n movaps %%xmm3,48(%1)\n"
        "movaps %%xmm4,64(%1)\n movaps %%xmm5,80(%1)\n movaps %%xmm14,224(%1)\n movaps %%xmm15,240(%1)\n"
        :: "r"(in), "r"(out), "r"(&go_on), "m"(mxcsr_in), "m"(cw_in), "m"(x87)
        : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm14", "xmm15", "memory");
    __asm__ volatile("fstpl %0\n stmxcsr %1\n fnstcw %2\n ldmxcsr %3\n fldcw %4"
                     : "=m"(x87_out), "=m"(mxcsr_out), "=m"(cw_out) : "m"(mxcsr_old), "m"(cw_old));
    CHECK("sse registers", !memcmp(in, out, 96) && !memcmp(in[14], out[14], 32), "differ");
    CHECK("mxcsr", mxcsr_in == (mxcsr_out & ~0x3fu), "%x", mxcsr_out);
    CHECK("x87", x87 == x87_out && cw_in == cw_out, "%g %x", x87_out, cw_out);
    return 0;
}
__attribute__((target("avx2"))) static void *cpu_avx(void *arg) {
    static unsigned char in[16][32] __attribute__((aligned(64))), out[16][32] __attribute__((aligned(64)));
    (void)arg;
    fill(&in[0][0], sizeof in, 77);
    atomic_fetch_add(&nr_ready, 1);
    __asm__ volatile(
        "vmovaps 0(%0),%%ymm0\n vmovaps 32(%0),%%ymm1\n vmovaps 448(%0),%%ymm14\n vmovaps 480(%0),%%ymm15\n"
        "1: pause\n cmpl $0,(%2)\n je 1b\n"
        "vmovaps %%ymm0,0(%1)\n vmovaps %%ymm1,32(%1)\n vmovaps %%ymm14,448(%1)\n vmovaps %%ymm15,480(%1)\n vzeroupper"
        :: "r"(in), "r"(out), "r"(&go_on) : "xmm0", "xmm1", "xmm14", "xmm15", "memory");
    CHECK("avx registers", !memcmp(in, out, 64) && !memcmp(in[14], out[14], 64), "differ");
    return 0;
}
__attribute__((target("avx512f,avx512bw"))) static void *cpu_avx512(void *arg) {
    uint64_t kin[3] = {0x1122334455667788ULL, 0xf0f0f0f00f0f0f0fULL, 1}, kout[3] = {0};
    (void)arg;
    fill(&vin[0][0], sizeof vin, 99);
    atomic_fetch_add(&nr_ready, 1);
    __asm__ volatile(
        "vmovups 0(%0),%%zmm0\n vmovups 64(%0),%%zmm1\n vmovups 960(%0),%%zmm15\n vmovups 1024(%0),%%zmm16\n"
        "vmovups 1984(%0),%%zmm31\n kmovq 0(%3),%%k1\n kmovq 8(%3),%%k2\n kmovq 16(%3),%%k7\n"
        "1: pause\n cmpl $0,(%2)\n je 1b\n"
        "vmovups %%zmm0,0(%1)\n vmovups %%zmm1,64(%1)\n vmovups %%zmm15,960(%1)\n vmovups %%zmm16,1024(%1)\n"
        "vmovups %%zmm31,1984(%1)\n kmovq %%k1,0(%4)\n kmovq %%k2,8(%4)\n kmovq %%k7,16(%4)\n vzeroupper\n"
        :: "r"(vin), "r"(vout), "r"(&go_on), "r"(kin), "r"(kout)
        : "xmm0", "xmm1", "xmm15", "memory");
    CHECK("avx-512 registers",
          !memcmp(vin[0], vout[0], 128) && !memcmp(vin[15], vout[15], 128) && !memcmp(vin[31], vout[31], 64), "differ");
    CHECK("avx-512 masks", !memcmp(kin, kout, sizeof kin), "%lx", (long)kout[0]);
    return 0;
}
static unsigned char tile_in[16][64] __attribute__((aligned(64))), tile_out[16][64] __attribute__((aligned(64)));
static void *cpu_amx(void *arg) {
    unsigned char config[64] __attribute__((aligned(64))) = {1};
    long stride = 64;
    (void)arg;
    config[16] = 64; config[48] = 16; config[18] = 64; config[49] = 16;
    fill(&tile_in[0][0], sizeof tile_in, 1234);
    __asm__ volatile(
        ".byte 0xc4,0xe2,0x78,0x49,0x00\n"              // ldtilecfg (%rax)
        ".byte 0xc4,0xe2,0x7b,0x4b,0x0c,0x1f\n"         // tileloadd (%rdi,%rbx,1),%tmm1
        :: "a"(config), "D"(tile_in), "b"(stride) : "memory");
    atomic_fetch_add(&nr_ready, 1);
    __asm__ volatile("1: pause\n cmpl $0,(%0)\n je 1b\n" :: "r"(&go_on) : "memory");
    __asm__ volatile(
        ".byte 0xc4,0xe2,0x7a,0x4b,0x0c,0x1f\n"         // tilestored %tmm1,(%rdi,%rbx,1)
        ".byte 0xc4,0xe2,0x78,0x49,0xc0\n"              // tilerelease
        :: "D"(tile_out), "b"(stride) : "memory");
    CHECK("amx tile", !memcmp(tile_in, tile_out, sizeof tile_in), "differs");
    return 0;
}
static void group_cpu(void) {
    pthread_t t[8];
    int n = 0;
    pthread_create(&t[n++], 0, cpu_general, 0);
    pthread_create(&t[n++], 0, cpu_sse, 0);
    if (__builtin_cpu_supports("avx2")) pthread_create(&t[n++], 0, cpu_avx, 0);
    if (__builtin_cpu_supports("avx512bw")) pthread_create(&t[n++], 0, cpu_avx512, 0);
    int amx = cpu_has(7, 0, 3, 24) && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    if (amx) pthread_create(&t[n++], 0, cpu_amx, 0);
    all_ready(n);
    for (int i = 0; i < n; i++) pthread_join(t[i], 0);
    unsigned long permitted = 0;
    if (amx) CHECK("amx permission", !syscall(SYS_arch_prctl, 0x1022, &permitted) && permitted >> 18 & 1, "%lx", permitted);
}

// ---------------------------------------------------------------- threads: what the kernel keeps for each
static __thread unsigned tls_value;
extern const ptrdiff_t __rseq_offset __attribute__((weak));
extern const unsigned int __rseq_size __attribute__((weak));
static void thread_facts(char *out, size_t size) {
    stack_t alt;
    void *head = 0;
    size_t len = 0;
    char name[20] = "";
    sigset_t mask;
    uint64_t bits = 0;
    int *clear = 0, death = -1;
    sigaltstack(0, &alt);
    syscall(SYS_get_robust_list, 0, &head, &len);
    prctl(PR_GET_NAME, name);
    prctl(40, &clear);  // PR_GET_TID_ADDRESS
    prctl(PR_GET_PDEATHSIG, &death);
    pthread_sigmask(0, 0, &mask);
    memcpy(&bits, &mask, 8);
    snprintf(out, size, "tid %ld tls %u alt %p %d %zu robust %p %zu name %s clear %p death %d mask %lx slack %d fs %p",
             syscall(SYS_gettid), tls_value, alt.ss_sp, alt.ss_flags, alt.ss_size, head, len, name, (void *)clear, death,
             (long)bits, prctl(PR_GET_TIMERSLACK), (void *)pthread_self());
}
static pthread_barrier_t barrier;
static void *thread_main(void *arg) {
    long k = (long)arg;
    char before[512], after[512], name[16];
    stack_t alt = {.ss_sp = malloc(65536), .ss_size = 65536};
    sigset_t set;
    tls_value = 1000 + k;
    snprintf(name, sizeof name, "worker %ld", k);
    prctl(PR_SET_NAME, name);
    if (k % 2) sigaltstack(&alt, 0);
    sigemptyset(&set);
    sigaddset(&set, SIGRTMIN + k);
    pthread_sigmask(SIG_BLOCK, &set, 0);
    prctl(PR_SET_PDEATHSIG, k % 3 ? SIGUSR2 : 0);
    prctl(PR_SET_TIMERSLACK, 60000 + k);
    thread_facts(before, sizeof before);
    atomic_fetch_add(&nr_ready, 1);
    wait_go();
    thread_facts(after, sizeof after);
    CHECK(name, !strcmp(before, after), "%s\n  became %s", before, after);
    if (&__rseq_size && __rseq_size) {
        char *area = (char *)__builtin_thread_pointer() + __rseq_offset;
        int r = syscall(SYS_rseq, area, 32, 0, 0x53053053);
        CHECK("rseq is registered", r == -1 && errno == EBUSY, "%d", r);
        int cpu = *(int *)area;
        CHECK("rseq cpu", cpu >= 0 && cpu < 1024, "cpu %d", cpu);
    }
    pthread_barrier_wait(&barrier);  // a futex among all of them
    return (void *)(k + 7);
}
static pthread_mutex_t recursive, robust;
static void group_threads(void) {
    enum { N = 12 };
    pthread_t t[N];
    pthread_mutexattr_t attr;
    pthread_barrier_init(&barrier, 0, N);
    pthread_mutexattr_init(&attr);
    pthread_mutexattr_settype(&attr, PTHREAD_MUTEX_RECURSIVE);
    pthread_mutex_init(&recursive, &attr);
    pthread_mutex_lock(&recursive);
    pthread_mutexattr_init(&attr);
    pthread_mutexattr_setrobust(&attr, PTHREAD_MUTEX_ROBUST);
    pthread_mutex_init(&robust, &attr);
    pthread_mutex_lock(&robust);
    for (long k = 0; k < N; k++) pthread_create(&t[k], 0, thread_main, (void *)k);
    all_ready(N);
    for (long k = 0; k < N; k++) {
        void *result = 0;
        pthread_join(t[k], &result);  // waits for the kernel to clear the thread's id
        if ((long)result != k + 7) say("FAIL join: thread %ld", k);
    }
    CHECK("recursive lock", !pthread_mutex_lock(&recursive) && !pthread_mutex_unlock(&recursive) && !pthread_mutex_unlock(&recursive), "lost");
    CHECK("robust lock", !pthread_mutex_unlock(&robust), "lost");
    pid_t pid = fork();
    if (!pid) _exit(44);
    int status = 0;
    CHECK("fork", waitpid(pid, &status, 0) == pid && WEXITSTATUS(status) == 44, "status %x", status);
}

// ---------------------------------------------------------------- signals
struct ksigaction { unsigned long handler, flags, restorer, mask; };
static volatile sig_atomic_t in_handler, handler_left;
static void on_signal(int s) { (void)s; }
static void on_info(int s, siginfo_t *i, void *c) { (void)s; (void)i; (void)c; }
static void on_alt(int s) {
    stack_t now;
    (void)s;
    in_handler = 1;
    while (!atomic_load(&go_on)) { }
    sigaltstack(0, &now);
    CHECK("handler on its alternate stack", now.ss_flags & SS_ONSTACK, "flags %x", now.ss_flags);
    handler_left = 1;
}
static pid_t alt_tid;
static void *alt_main(void *arg) {
    stack_t alt = {.ss_sp = malloc(65536), .ss_size = 65536};
    sigset_t set;
    volatile double f = 1.0 / 3;
    (void)arg;
    sigaltstack(&alt, 0);
    sigfillset(&set);
    sigdelset(&set, SIGUSR2);
    pthread_sigmask(SIG_SETMASK, &set, 0);
    alt_tid = syscall(SYS_gettid);
    atomic_fetch_add(&nr_ready, 1);
    while (!handler_left) { }
    uint64_t bits = 0;
    pthread_sigmask(0, 0, &set);
    memcpy(&bits, &set, 8);
    CHECK("mask after the handler", !(bits >> (SIGUSR2 - 1) & 1) && bits >> (SIGUSR1 - 1) & 1, "%lx", (long)bits);
    CHECK("floating point after the handler", f == 1.0 / 3, "%g", f);
    return 0;
}
static void *pending_main(void *arg) {
    sigset_t set;
    siginfo_t info;
    struct timespec none = {0, 0};
    (void)arg;
    sigfillset(&set);
    pthread_sigmask(SIG_SETMASK, &set, 0);
    pthread_sigqueue(pthread_self(), SIGRTMIN + 5, (union sigval){.sival_int = 55});
    pthread_sigqueue(pthread_self(), SIGRTMIN + 5, (union sigval){.sival_int = 56});
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    pthread_kill(pthread_self(), SIGUSR1);
    sigtimedwait(&set, &info, &none);
    int usual_code = info.si_code;
    pthread_kill(pthread_self(), SIGUSR1);
    atomic_fetch_add(&nr_ready, 1);
    wait_go();
    for (int want = 55; want <= 56; want++) {
        sigemptyset(&set);
        sigaddset(&set, SIGRTMIN + 5);
        int got = sigtimedwait(&set, &info, &none);
        CHECK("own pending signal", got == SIGRTMIN + 5 && info.si_value.sival_int == want && info.si_code == SI_QUEUE && info.si_pid == getpid(),
              "%d value %d code %d", got, info.si_value.sival_int, info.si_code);
    }
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    int got = sigtimedwait(&set, &info, &none);
    CHECK("own pending SIGUSR1", got == SIGUSR1 && info.si_code == usual_code && info.si_pid == getpid(), "%d code %d", got, info.si_code);
    got = sigtimedwait(&set, &info, &none);
    CHECK("no more pending", got == -1 && errno == EAGAIN, "%d", got);
    return 0;
}
static void group_signals(void) {
    struct ksigaction before[65], after[65];
    sigset_t block, set;
    siginfo_t info;
    struct timespec none = {0, 0};
    pthread_t t[2];
    struct sigaction a = {.sa_handler = on_alt, .sa_flags = SA_ONSTACK};
    sigaction(SIGUSR2, &a, 0);
    a.sa_flags = SA_SIGINFO | SA_RESTART | SA_NODEFER;
    a.sa_sigaction = on_info;
    sigfillset(&a.sa_mask);
    sigaction(SIGIO, &a, 0);
    a.sa_flags = SA_RESETHAND;
    a.sa_handler = on_signal;
    sigaction(SIGWINCH, &a, 0);
    signal(SIGTRAP, SIG_IGN);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_DFL);
    signal(SIGCHLD, SIG_IGN);
    a.sa_flags = SA_NOCLDWAIT | SA_NOCLDSTOP;
    a.sa_handler = SIG_DFL;
    sigaction(SIGTSTP, &a, 0);
    sigemptyset(&block);
    for (int s = SIGRTMIN; s < SIGRTMIN + 8; s++) sigaddset(&block, s);
    sigaddset(&block, SIGHUP);
    sigaddset(&block, SIGTERM);
    sigaddset(&block, SIGTRAP);
    pthread_sigmask(SIG_BLOCK, &block, 0);
    for (int i = 0; i < 6; i++) sigqueue(getpid(), SIGRTMIN + i % 2, (union sigval){.sival_int = 100 + i});
    kill(getpid(), SIGHUP);
    pthread_create(&t[0], 0, alt_main, 0);
    pthread_create(&t[1], 0, pending_main, 0);
    while (atomic_load(&nr_ready) < 2) usleep(1000);
    syscall(SYS_tgkill, getpid(), alt_tid, SIGUSR2);
    while (!in_handler) usleep(1000);
    for (int s = 1; s <= 64; s++) syscall(SYS_rt_sigaction, s, 0, &before[s], 8);
    all_ready(2);
    for (int s = 1; s <= 64; s++) {
        syscall(SYS_rt_sigaction, s, 0, &after[s], 8);
        if (s != SIGKILL && s != SIGSTOP && memcmp(&before[s], &after[s], sizeof after[s]))
            say("FAIL action of %d: %lx %lx became %lx %lx", s, before[s].handler, before[s].flags, after[s].handler, after[s].flags);
    }
    say("ok actions");
    uint64_t bits = 0;
    pthread_sigmask(0, 0, &set);
    memcpy(&bits, &set, 8);
    CHECK("mask", bits >> (SIGTRAP - 1) & 1 && bits >> (SIGTERM - 1) & 1 && !(bits >> (SIGINT - 1) & 1), "%lx", (long)bits);
    for (int i = 0; i < 6; i++) {
        int want_sig = SIGRTMIN + i / 3, want = 100 + i / 3 + 2 * (i % 3);
        int got = sigtimedwait(&block, &info, &none);
        if (i == 0 && got == SIGHUP) {
            CHECK("pending SIGHUP", info.si_code == SI_USER && info.si_pid == getpid(), "code %d", info.si_code);
            got = sigtimedwait(&block, &info, &none);
        }
        CHECK("shared pending signal", got == want_sig && info.si_value.sival_int == want && info.si_pid == getpid() && info.si_uid == getuid(),
              "%d value %d, not %d value %d", got, info.si_value.sival_int, want_sig, want);
    }
    int got = sigtimedwait(&block, &info, &none);
    CHECK("nothing else pending", got == -1 && errno == EAGAIN, "signal %d", got);
    pthread_join(t[0], 0);
    pthread_join(t[1], 0);
}

// ---------------------------------------------------------------- sleeps: interrupted calls go on
#define SLEEP_NS 1500000000LL
enum kind { NANOSLEEP, NANOSLEEP_REM, CLOCK_REL, CLOCK_ABS, CLOCK_REL_REM, POLL, PPOLL, SELECT, FUTEX_REL, FUTEX_ABS, EPOLL, SIGWAIT,
            READ, FUTEX_FOREVER, POLL_FOREVER, EPOLL_FOREVER, NR_KINDS };
static const char *kind_names[] = {"nanosleep", "nanosleep with rest", "clock_nanosleep", "clock_nanosleep absolute", "clock_nanosleep with rest",
    "poll", "ppoll", "select", "futex relative", "futex absolute", "epoll_wait", "sigtimedwait", "read", "futex", "poll for ever", "epoll for ever"};
static int wake_pipe[2], read_pipe[2];
static pid_t sleepers[NR_KINDS];
// A call that waits for ever is made again by its own thread, as after any stop (signal(7)).  On a busy machine we may
// run before it does; a futex whose word we change then ends with EAGAIN, so wait until all are asleep again.
static void all_asleep(void) {
    for (int k = SIGWAIT; k < NR_KINDS; k++)
        for (char state = 0; state != 'S'; usleep(1000)) {
            char name[64];
            snprintf(name, sizeof name, "/proc/self/task/%d/stat", sleepers[k]);
            FILE *f = fopen(name, "r");
            if (!f || fscanf(f, "%*d (%*[^)]) %c", &state) != 1) { say("FAIL a sleeper is gone"); exit(5); }
            fclose(f);
        }
}
static void *sleep_main(void *arg) {
    enum kind k = (long)arg;
    sleepers[k] = syscall(SYS_gettid);
    struct timespec req = {SLEEP_NS / NS, SLEEP_NS % NS}, rem = {0, 0}, abs;
    struct timeval tv = {SLEEP_NS / NS, SLEEP_NS % NS / 1000};
    struct pollfd pfd = {.fd = wake_pipe[0], .events = POLLIN};
    struct epoll_event ev = {.events = EPOLLIN};
    int word = 5, r = -2, want = 0, want_errno = 0, absolute = 0, forever = 0, ep = epoll_create1(0);
    char c;
    sigset_t set;
    epoll_ctl(ep, EPOLL_CTL_ADD, wake_pipe[0], &ev);
    long long start = now_ns(CLOCK_MONOTONIC);
    abs.tv_sec = (start + SLEEP_NS) / NS;
    abs.tv_nsec = (start + SLEEP_NS) % NS;
    atomic_fetch_add(&nr_ready, 1);
    switch (k) {
    case NANOSLEEP: r = syscall(SYS_nanosleep, &req, 0); break;
    case NANOSLEEP_REM: r = syscall(SYS_nanosleep, &req, &rem); break;
    case CLOCK_REL: r = syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, 0, &req, 0); break;
    case CLOCK_REL_REM: r = syscall(SYS_clock_nanosleep, CLOCK_REALTIME, 0, &req, &req); break;
    case CLOCK_ABS: r = syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, TIMER_ABSTIME, &abs, 0); absolute = 1; break;
    case POLL: r = syscall(SYS_poll, &pfd, 1, (int)(SLEEP_NS / 1000000)); break;
    case PPOLL: r = syscall(SYS_ppoll, &pfd, 1, &req, 0, 8); break;
    case SELECT: r = syscall(SYS_select, 0, 0, 0, 0, &tv); break;
    case FUTEX_REL: r = syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 5, &req, 0, 0); want = -1; want_errno = ETIMEDOUT; break;
    case FUTEX_ABS: r = syscall(SYS_futex, &word, FUTEX_WAIT_BITSET_PRIVATE, 5, &abs, 0, -1); want = -1; want_errno = ETIMEDOUT; absolute = 1; break;
    case EPOLL: r = syscall(SYS_epoll_wait, ep, &ev, 1, (int)(SLEEP_NS / 1000000)); break;
    case SIGWAIT:
        sigemptyset(&set); sigaddset(&set, SIGRTMIN);
        r = syscall(SYS_rt_sigtimedwait, &set, 0, 0, 8);
        want = SIGRTMIN; forever = 1;
        break;
    case READ: r = read(read_pipe[0], &c, 1); want = 1; forever = 1; break;
    case FUTEX_FOREVER: r = syscall(SYS_futex, &go_on, FUTEX_WAIT, 0, 0, 0, 0); forever = 1; break;
    case POLL_FOREVER: pfd.fd = read_pipe[0]; pfd.events = POLLPRI; { struct pollfd two[2] = {pfd, {.fd = wake_pipe[0], .events = POLLIN}}; r = syscall(SYS_poll, two, 2, -1); } want = 1; forever = 1; break;
    case EPOLL_FOREVER: r = syscall(SYS_epoll_wait, ep, &ev, 1, -1); want = 1; forever = 1; break;
    case NR_KINDS: break;
    }
    int e = errno;
    long long slept = now_ns(CLOCK_MONOTONIC) - start;
    while (!atomic_load(&go_on)) usleep(1000);
    long long least = forever ? 0 : absolute ? SLEEP_NS : SLEEP_NS + dead_ns;
    errno = e;
    CHECK(kind_names[k], r == want && (r >= 0 || e == want_errno) && slept >= least - 20000000LL && (forever || slept < least + 20 * NS),
          "result %d errno %d slept %lld ms of %lld", r, e, slept / 1000000, least / 1000000);
    return 0;
}
static void group_sleeps(void) {
    pthread_t t[NR_KINDS];
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGRTMIN);
    pthread_sigmask(SIG_BLOCK, &set, 0);
    if (pipe(wake_pipe) || pipe(read_pipe)) exit(3);
    for (long k = 0; k < NR_KINDS; k++) pthread_create(&t[k], 0, sleep_main, (void *)k);
    while (atomic_load(&nr_ready) < NR_KINDS) usleep(1000);
    usleep(300000);
    before_go_on = all_asleep;
    all_ready(NR_KINDS);
    for (long k = 0; k <= EPOLL; k++) pthread_join(t[k], 0);
    pthread_kill(t[SIGWAIT], SIGRTMIN);
    if (write(read_pipe[1], "x", 1) != 1 || write(wake_pipe[1], "x", 1) != 1) exit(4);
    for (long k = SIGWAIT; k < NR_KINDS; k++) pthread_join(t[k], 0);
}

// ---------------------------------------------------------------- timers
static atomic_int alarms, timer_signals;
static atomic_int timer_tid_seen, timer_value_seen;
static void on_alarm(int s) { (void)s; atomic_fetch_add(&alarms, 1); }
static void on_timer(int s, siginfo_t *i, void *c) {
    (void)s; (void)c;
    atomic_store(&timer_tid_seen, syscall(SYS_gettid));
    atomic_store(&timer_value_seen, i->si_value.sival_int);
    atomic_fetch_add(&timer_signals, 1);
}
static pid_t timer_tid;
static void *timer_main(void *arg) {
    (void)arg;
    timer_tid = syscall(SYS_gettid);
    atomic_fetch_add(&nr_ready, 1);
    while (!atomic_load(&go_on)) usleep(500);
    int before = atomic_load(&timer_signals);
    while (atomic_load(&timer_signals) < before + 3) usleep(500);
    return 0;
}
static void group_timers(void) {
    pthread_t t;
    struct sigaction a = {.sa_handler = on_alarm, .sa_flags = SA_RESTART};
    sigaction(SIGALRM, &a, 0);
    a.sa_sigaction = on_timer;
    a.sa_flags = SA_SIGINFO | SA_RESTART;
    sigaction(SIGRTMIN + 1, &a, 0);
    pthread_create(&t, 0, timer_main, 0);
    while (!atomic_load(&nr_ready)) usleep(1000);
    int id[6], made;
    struct sigevent none = {.sigev_notify = SIGEV_NONE};
    for (int i = 0; i < 5; i++) {
        struct sigevent e = none;
        clockid_t clock = i == 3 ? CLOCK_PROCESS_CPUTIME_ID : i == 2 ? CLOCK_BOOTTIME : i == 1 ? CLOCK_REALTIME : CLOCK_MONOTONIC;
        if (i == 4) {
            e = (struct sigevent){.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGRTMIN + 1, .sigev_value.sival_int = 4242};
            e._sigev_un._tid = timer_tid;
        }
        made = syscall(SYS_timer_create, clock, &e, &id[i]);
        if (made) { say("FAIL timer_create %d", i); return; }
    }
    syscall(SYS_timer_delete, id[0]);
    struct itimerspec hour = {.it_value = {3600, 0}, .it_interval = {7, 5}}, fast = {.it_value = {0, 20000000}, .it_interval = {0, 20000000}}, cur;
    syscall(SYS_timer_settime, id[2], 0, &hour, 0);
    syscall(SYS_timer_settime, id[3], 0, &hour, 0);
    syscall(SYS_timer_settime, id[4], 0, &fast, 0);
    struct itimerval real = {{0, 30000}, {0, 30000}}, far = {{9, 0}, {5000, 0}}, got;
    setitimer(ITIMER_REAL, &real, 0);
    setitimer(ITIMER_VIRTUAL, &far, 0);
    setitimer(ITIMER_PROF, &far, 0);
    all_ready(1);
    int before = atomic_load(&alarms);
    for (int i = 0; i < 2000 && atomic_load(&alarms) < before + 3; i++) usleep(5000);
    CHECK("ITIMER_REAL", atomic_load(&alarms) >= before + 3, "no alarms");
    getitimer(ITIMER_VIRTUAL, &got);
    CHECK("ITIMER_VIRTUAL", got.it_interval.tv_sec == 9 && got.it_value.tv_sec > 4900, "%ld %ld", got.it_interval.tv_sec, got.it_value.tv_sec);
    getitimer(ITIMER_PROF, &got);
    CHECK("ITIMER_PROF", got.it_interval.tv_sec == 9 && got.it_value.tv_sec > 4900, "%ld %ld", got.it_interval.tv_sec, got.it_value.tv_sec);
    errno = 0;
    CHECK("deleted timer", syscall(SYS_timer_gettime, id[0], &cur) == -1 && errno == EINVAL, "exists");
    CHECK("stopped timer", !syscall(SYS_timer_gettime, id[1], &cur) && !cur.it_value.tv_sec && !cur.it_value.tv_nsec, "runs");
    CHECK("long timer", !syscall(SYS_timer_gettime, id[2], &cur) && cur.it_interval.tv_sec == 7 && cur.it_interval.tv_nsec == 5 && cur.it_value.tv_sec > 3000 && cur.it_value.tv_sec <= 3600, "%ld", cur.it_value.tv_sec);
    CHECK("cpu timer", !syscall(SYS_timer_gettime, id[3], &cur) && cur.it_interval.tv_sec == 7 && cur.it_value.tv_sec > 3000, "%ld", cur.it_value.tv_sec);
    pthread_join(t, 0);
    CHECK("thread timer", timer_tid_seen == timer_tid && timer_value_seen == 4242, "thread %d value %d", timer_tid_seen, timer_value_seen);
    made = syscall(SYS_timer_create, CLOCK_MONOTONIC, &none, &id[5]);
    CHECK("next timer", !made && id[5] > id[4], "id %d", id[5]);
}

// ---------------------------------------------------------------- identity: credentials, limits, scheduling, ...
static void add_file(char *out, size_t size, const char *path, const char *const *wanted) {
    FILE *f = fopen(path, "r");
    char line[1024];
    size_t n = strlen(out);
    n += snprintf(out + n, size - n, "== %s\n", path);
    while (f && fgets(line, sizeof line, f)) {
        int keep = !wanted;
        for (int i = 0; wanted && wanted[i]; i++) keep |= !strncmp(line, wanted[i], strlen(wanted[i]));
        if (keep && n < size) n += snprintf(out + n, size - n, "%s", line);
    }
    if (f) fclose(f);
}
static void add(char *out, size_t size, const char *format, ...) {
    size_t n = strlen(out);
    va_list list;
    va_start(list, format);
    vsnprintf(out + n, size - n, format, list);
    va_end(list);
}
struct sched_words { uint32_t size, policy; uint64_t flags; int32_t nice; uint32_t priority; uint64_t run, dead, period; };
static void identity_facts(char *out, size_t size) {
    static const char *const status[] = {"Name:", "Umask:", "Tgid:", "Pid:", "Uid:", "Gid:", "Groups:", "NSpid:", "NSsid:", "NSpgid:", "SigIgn:", "SigCgt:",
        "CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:", "NoNewPrivs:", "Seccomp:", "THP_enabled:", "CoreDumping:", "Cpus_allowed:", "Threads:", 0};
    char path[64], text[4096];
    int value = 0;
    out[0] = 0;
    DIR *d = opendir("/proc/self/task");
    struct dirent *e;
    while ((e = readdir(d)))
        if (e->d_name[0] != '.') {
            snprintf(path, sizeof path, "/proc/self/task/%.20s/status", e->d_name);
            add_file(out, size, path, status);
            pid_t tid = atoi(e->d_name);
            struct sched_words w = {0};
            syscall(SYS_sched_getattr, tid, &w, sizeof w, 0);
            add(out, size, "sched %u %lx %d %u ioprio %ld\n", w.policy, (long)w.flags, w.nice, w.priority, syscall(SYS_ioprio_get, 1, tid));
        }
    closedir(d);
    add_file(out, size, "/proc/self/limits", 0);
    for (const char *const *p = (const char *const[]){"cmdline", "environ", "comm", "oom_score_adj", "coredump_filter", "personality", "auxv", "timerslack_ns", 0}; *p; p++) {
        snprintf(path, sizeof path, "/proc/self/%s", *p);
        int fd = open(path, O_RDONLY), n = fd < 0 ? -1 : read(fd, text, sizeof text);
        unsigned hash = 5381;
        for (int i = 0; i < n; i++) hash = hash * 33 + (unsigned char)text[i];
        add(out, size, "%s %d bytes %u\n", *p, n, hash);
        if (fd >= 0) close(fd);
    }
    for (const char *const *p = (const char *const[]){"exe", "cwd", "root", 0}; *p; p++) {
        snprintf(path, sizeof path, "/proc/self/%s", *p);
        int n = readlink(path, text, sizeof text - 1);
        text[n > 0 ? n : 0] = 0;
        add(out, size, "%s %s\n", *p, text);
    }
    prctl(PR_GET_CHILD_SUBREAPER, &value);
    add(out, size, "pid %d dumpable %d subreaper %d securebits %d thp %d membarrier %ld keepcaps %d sid %d pgid %d brk %ld\n", getpid(), prctl(PR_GET_DUMPABLE),
        value, prctl(PR_GET_SECUREBITS), prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0), syscall(SYS_membarrier, 512, 0, 0), prctl(PR_GET_KEEPCAPS), getsid(0), getpgid(0),
        syscall(SYS_brk, 0));
}
static void *idle_main(void *arg) { (void)arg; prctl(PR_SET_NAME, "a thread"); setpriority(PRIO_PROCESS, syscall(SYS_gettid), 7); atomic_fetch_add(&nr_ready, 1); wait_go(); for (;;) pause(); return 0; }
static int capset_to(uint64_t effective, uint64_t permitted, uint64_t inheritable) {
    uint32_t header[2] = {0x20080522, 0};
    uint32_t data[6] = {effective, permitted, inheritable, effective >> 32, permitted >> 32, inheritable >> 32};
    return syscall(SYS_capset, header, data);
}
static void group_identity(const char *how) {
    static char before[65536], after[65536];
    pthread_t t;
    umask(027);
    if (chdir("/tmp")) exit(5);
    FILE *f = fopen("/proc/self/oom_score_adj", "w");
    if (f) { fprintf(f, "321"); fclose(f); }
    f = fopen("/proc/self/coredump_filter", "w");
    if (f) { fprintf(f, "0x13"); fclose(f); }
    struct rlimit r = {123, 456};
    setrlimit(RLIMIT_NOFILE, &r);
    r = (struct rlimit){5000000, 9000000};
    setrlimit(RLIMIT_CORE, &r);
    r = (struct rlimit){4 << 20, RLIM_INFINITY};
    setrlimit(RLIMIT_STACK, &r);
    syscall(SYS_personality, 0x0040000);  // ADDR_NO_RANDOMIZE
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
    prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0);
    prctl(PR_SET_NAME, "odd (name) x");
    syscall(SYS_membarrier, 16, 0, 0);
    syscall(SYS_membarrier, 64, 0, 0);
    syscall(SYS_ioprio_set, 1, 0, 2 << 13 | 6);
    struct sched_param param = {0};
    sched_setscheduler(0, SCHED_BATCH, &param);
    setpriority(PRIO_PROCESS, 0, 5);
    cpu_set_t cpus;
    CPU_ZERO(&cpus);
    CPU_SET(0, &cpus);
    sched_setaffinity(0, sizeof cpus, &cpus);
    pthread_create(&t, 0, idle_main, 0);
    if (!strcmp(how, "user")) {
        gid_t groups[3] = {7, 8, 1234};
        if (setgroups(3, groups) || setresgid(1000, 1001, 1002) || setresuid(2000, 2001, 2002)) exit(6);
    } else if (!strcmp(how, "caps")) {
        // as a service with a few capabilities of its own would be
        uint64_t few = 1ULL << 10 | 1ULL << 13 | 1ULL << 5;
        for (int c = 20; c < 25; c++) prctl(PR_CAPBSET_DROP, c, 0, 0, 0);
        prctl(PR_SET_KEEPCAPS, 1);
        gid_t groups[1] = {33};
        if (syscall(SYS_setgroups, 1, groups) || syscall(SYS_setresgid, 33, 33, 33) || syscall(SYS_setresuid, 33, 33, 33)) exit(6);
        if (capset_to(few, few, few)) exit(7);
        prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, 10, 0, 0);
        prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        prctl(PR_SET_DUMPABLE, 1, 0, 0, 0);
    }
    while (!atomic_load(&nr_ready)) usleep(1000);
    identity_facts(before, sizeof before);
    all_ready(1);
    identity_facts(after, sizeof after);
    char *a, *b, *x = before, *y = after;
    while ((a = strsep(&x, "\n")) && (b = strsep(&y, "\n")))
        if (strcmp(a, b)) say("FAIL identity: %s\n  became %s", a, b);
    say("ok identity");
}

// ---------------------------------------------------------------- memory
static sigjmp_buf jump;
static void on_fault(int s) { (void)s; siglongjmp(jump, 1); }
static int faults(volatile char *p) {
    int bad;
    struct sigaction a = {.sa_handler = on_fault, .sa_flags = SA_NODEFER}, old, old_bus;
    sigaction(SIGSEGV, &a, &old);
    sigaction(SIGBUS, &a, &old_bus);
    if (!(bad = sigsetjmp(jump, 1))) (void)*p;
    sigaction(SIGSEGV, &old, 0);
    sigaction(SIGBUS, &old_bus, 0);
    return bad;
}
static void *map(size_t pages, int prot, int flags, int fd) {
    void *p = mmap(0, pages * PAGE, prot, flags, fd, 0);
    if (p == MAP_FAILED) { say("FAIL mmap: %zu pages flags %x", pages, flags); _exit(8); }
    return p;
}
static int deep_stack(int n) { volatile char room[16384]; memset((char *)room, n, sizeof room); return n ? deep_stack(n - 1) + room[77] * 0 : room[5]; }
static int same(const unsigned char *p, size_t n, unsigned seed) {
    for (size_t i = 0; i < n; i++) { seed = seed * 1103515245 + 12345; if (p[i] != (unsigned char)(seed >> 16)) return 0; }
    return 1;
}
static unsigned char data_page[3 * 4096] = {1};
static void smaps_flags(char *out, size_t size) {
    FILE *f = fopen("/proc/self/smaps", "r");
    char line[1024], head[1024] = "";
    size_t n = 0;
    unsigned long rss = 0, locked = 0;
    while (fgets(line, sizeof line, f)) {
        if (strstr(line, "-") && strchr(line, '-') < strchr(line, ' ')) strcpy(head, line);
        sscanf(line, "Rss: %lu", &rss);
        sscanf(line, "Locked: %lu", &locked);
        if (!strncmp(line, "VmFlags:", 8) && !strstr(head, "[v") && n < size)
            n += snprintf(out + n, size - n, "%.30s %s", head, line);
    }
    fclose(f);
}
static void group_memory(const char *dir) {
    static char flags_before[1 << 20], flags_after[1 << 20];
    char path[512];
    int anon_rw = MAP_PRIVATE | MAP_ANONYMOUS;
    unsigned char *rw = map(64, PROT_READ | PROT_WRITE, anon_rw, -1);
    unsigned char *ro = map(8, PROT_READ | PROT_WRITE, anon_rw, -1);
    unsigned char *none = map(8, PROT_READ | PROT_WRITE, anon_rw, -1);
    unsigned char *code = map(2, PROT_READ | PROT_WRITE, anon_rw, -1);
    fill(rw, 32 * PAGE, 1);
    fill(ro, 8 * PAGE, 2);
    fill(none, 8 * PAGE, 3);
    memcpy(code, "\xb8\x2a\x00\x00\x00\xc3", 6);  // mov $42,%eax; ret
    mprotect(ro, 8 * PAGE, PROT_READ);
    mprotect(none, 8 * PAGE, PROT_NONE);
    mprotect(code, 2 * PAGE, PROT_READ | PROT_EXEC);
    unsigned char *reserve = map(1 << 20, PROT_NONE, anon_rw | MAP_NORESERVE, -1);
    // shared anonymous memory, seen twice, the second time from its middle
    unsigned char *shared = map(16, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1);
    unsigned char *view = mremap(shared + 8 * PAGE, 0, 8 * PAGE, MREMAP_MAYMOVE);
    fill(shared, 16 * PAGE, 4);
    // a memfd, mapped shared and privately, with a hole and a seal
    int memfd = memfd_create("check", MFD_ALLOW_SEALING);
    if (ftruncate(memfd, 32 * PAGE)) exit(9);
    unsigned char *ms = map(32, PROT_READ | PROT_WRITE, MAP_SHARED, memfd), *mp = map(32, PROT_READ | PROT_WRITE, MAP_PRIVATE, memfd);
    fill(ms, 8 * PAGE, 5);
    fill(mp + 4 * PAGE, PAGE, 6);
    fcntl(memfd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW);
    // a file, shared and private
    snprintf(path, sizeof path, "%s/mapped", dir);
    int fd = open(path, O_RDWR | O_CREAT, 0600);
    if (ftruncate(fd, 16 * PAGE)) exit(9);
    unsigned char *fs = map(16, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
    fill(fs, 16 * PAGE, 7);
    msync(fs, 16 * PAGE, MS_SYNC);
    snprintf(path, sizeof path, "%s/private", dir);
    int pfd = open(path, O_RDWR | O_CREAT, 0600);
    for (int i = 0; i < 16; i++) if (write(pfd, fs + i * PAGE, PAGE) != (ssize_t)PAGE) exit(9);
    unsigned char *fp = map(16, PROT_READ | PROT_WRITE, MAP_PRIVATE, pfd);
    fill(fp + 3 * PAGE, PAGE, 8);
    memset(fp + 5 * PAGE, 0, PAGE);  // a zero page that must not become the file's
    close(pfd);
    close(fd);
    // System V, grown beyond its end; a piece moved away, and something else where it was
    int grown_id = shmget(IPC_PRIVATE, 4 * PAGE - 100, IPC_CREAT | 0600), moved_id = shmget(IPC_PRIVATE, 8 * PAGE, IPC_CREAT | 0600);
    unsigned char *grown = 0, *moved = 0, *moved_piece = 0, *between = 0, *tail = 0;
    int has_sysv = grown_id >= 0 && moved_id >= 0;
    if (has_sysv) {
        grown = shmat(grown_id, 0, 0);
        fill(grown, 4 * PAGE - 100, 16);
        grown = mremap(grown, 4 * PAGE, 12 * PAGE, MREMAP_MAYMOVE);
        if (grown == MAP_FAILED) exit(11);
        tail = grown + 10 * PAGE;  // wholly beyond the segment, apart from the rest
        if (munmap(grown + 8 * PAGE, 2 * PAGE)) exit(11);
        moved = shmat(moved_id, 0, 0);
        fill(moved, 8 * PAGE, 17);
        moved_piece = mremap(moved + 2 * PAGE, 2 * PAGE, 2 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, map(2, PROT_NONE, anon_rw, -1));
        between = mmap(moved + 2 * PAGE, 2 * PAGE, PROT_READ | PROT_WRITE, anon_rw | MAP_FIXED_NOREPLACE, -1, 0);
        if (moved_piece == MAP_FAILED || between != moved + 2 * PAGE) exit(11);
        fill(between, 2 * PAGE, 18);
        mprotect(moved + 6 * PAGE, 2 * PAGE, PROT_READ);
        shmctl(grown_id, IPC_RMID, 0);
        shmctl(moved_id, IPC_RMID, 0);
    }
    // System V, partly unmapped
    int shmid = shmget(IPC_PRIVATE, 8 * PAGE, IPC_CREAT | 0600);
    unsigned char *sv = shmat(shmid, 0, 0);
    if (sv == (void *)-1) has_sysv = 0;
    if (has_sysv) { fill(sv, 8 * PAGE, 9); shmctl(shmid, IPC_RMID, 0); munmap(sv + 6 * PAGE, 2 * PAGE); }
    // advice, locks, guards, huge pages
    madvise(rw + 40 * PAGE, 4 * PAGE, MADV_DONTFORK);
    madvise(rw + 44 * PAGE, 4 * PAGE, MADV_WIPEONFORK);
    madvise(rw + 48 * PAGE, 4 * PAGE, MADV_DONTDUMP);
    madvise(rw + 52 * PAGE, 4 * PAGE, MADV_SEQUENTIAL);
    madvise(rw + 56 * PAGE, 4 * PAGE, MADV_NOHUGEPAGE);
    unsigned char *locked = map(8, PROT_READ | PROT_WRITE, anon_rw, -1);
    mlock(locked, 4 * PAGE);
    int onfault = !syscall(SYS_mlock2, locked + 4 * PAGE, 4 * PAGE, 1);
    unsigned char *huge = map(2048, PROT_READ | PROT_WRITE, anon_rw, -1);
    madvise(huge, 2048 * PAGE, MADV_HUGEPAGE);
    fill(huge, 2048 * PAGE, 10);
    unsigned char *guarded = map(16, PROT_READ | PROT_WRITE, anon_rw, -1);
    fill(guarded, 16 * PAGE, 11);
    int has_guard = !madvise(guarded + 4 * PAGE, 4 * PAGE, 102);
    unsigned char *down = map(4, PROT_READ | PROT_WRITE, anon_rw | MAP_GROWSDOWN, -1);
    fill(down, 4 * PAGE, 12);
    unsigned char *heap = sbrk(0);
    if (sbrk(20 * PAGE) == (void *)-1) exit(10);
    fill(heap, 20 * PAGE, 13);
    fill(data_page, sizeof data_page, 14);
    unsigned char *dropped = rw + 32 * PAGE;
    fill(dropped, 4 * PAGE, 15);
    madvise(dropped, 4 * PAGE, MADV_DONTNEED);
    smaps_flags(flags_before, sizeof flags_before);
    unsigned char *end = sbrk(0);
    all_ready(0);
    smaps_flags(flags_after, sizeof flags_after);
    CHECK("anonymous", same(rw, 32 * PAGE, 1), "differs");
    CHECK("read-only", same(ro, 8 * PAGE, 2), "differs");
    CHECK("no access", faults((char *)none), "readable");
    mprotect(none, 8 * PAGE, PROT_READ);
    CHECK("behind no access", same(none, 8 * PAGE, 3), "differs");
    CHECK("code", ((int (*)(void))code)() == 42, "differs");
    CHECK("reserved", faults((char *)reserve) && !mprotect(reserve, PAGE, PROT_READ | PROT_WRITE) && !*reserve, "differs");
    CHECK("shared anonymous", same(shared, 16 * PAGE, 4) && !memcmp(view, shared + 8 * PAGE, 8 * PAGE), "differs");
    view[9] ^= 0x55;
    CHECK("shared views", shared[8 * PAGE + 9] == view[9], "are apart");
    CHECK("memfd", same(ms, 8 * PAGE, 5) && !ms[20 * PAGE], "differs");
    CHECK("memfd private", same(mp, PAGE, 5) && same(mp + 4 * PAGE, PAGE, 6) && !memcmp(mp + PAGE, ms + PAGE, PAGE), "differs");
    ms[9 * PAGE] = 77;
    unsigned char c = 0;
    CHECK("memfd descriptor", pread(memfd, &c, 1, 9 * PAGE) == 1 && c == 77 && fcntl(memfd, F_GET_SEALS) == (F_SEAL_SHRINK | F_SEAL_GROW), "%d seals %x", c, fcntl(memfd, F_GET_SEALS));
    CHECK("file shared", same(fs, 16 * PAGE, 7), "differs");
    CHECK("file private", same(fp, 3 * PAGE, 7) && same(fp + 3 * PAGE, PAGE, 8), "differs");
    int zeros = 1;
    for (unsigned i = 0; i < PAGE; i++) zeros &= !fp[5 * PAGE + i];
    CHECK("file private zero page", zeros && fp[6 * PAGE + 1] == fs[6 * PAGE + 1], "shows the file");
    if (has_sysv) {
        struct shmid_ds ds;
        CHECK("system v", same(sv, 6 * PAGE, 9) && faults((char *)sv + 6 * PAGE), "differs");
        CHECK("system v id", !shmctl(shmid, IPC_STAT, &ds) && ds.shm_perm.mode & SHM_DEST, "id %d", shmid);
        CHECK("system v detach", !shmdt(sv), "failed");
        CHECK("system v grown", same(grown, 4 * PAGE - 100, 16) && faults((char *)grown + 4 * PAGE) && faults((char *)tail), "differs");
        CHECK("system v grown end", !shmdt(grown) && !shmctl(grown_id, IPC_STAT, &ds) && ds.shm_nattch == 1 && !munmap(tail, 2 * PAGE)
              && shmctl(grown_id, IPC_STAT, &ds) == -1, "attached %d times", (int)ds.shm_nattch);
        static unsigned char wanted[8 * 4096];
        fill(wanted, 8 * PAGE, 17);
        CHECK("system v moved", same(moved, 2 * PAGE, 17) && !memcmp(moved_piece, wanted + 2 * PAGE, 2 * PAGE) && !memcmp(moved + 4 * PAGE, wanted + 4 * PAGE, 4 * PAGE)
              && same(between, 2 * PAGE, 18), "differs");
        CHECK("system v moved end", !shmdt(moved) && same(between, 2 * PAGE, 18) && !shmctl(moved_id, IPC_STAT, &ds) && ds.shm_nattch == 1
              && !munmap(moved_piece, 2 * PAGE) && shmctl(moved_id, IPC_STAT, &ds) == -1, "attached %d times", (int)ds.shm_nattch);
    }
    CHECK("huge", same(huge, 2048 * PAGE, 10), "differs");
    if (has_guard) CHECK("guards", faults((char *)guarded + 5 * PAGE) && same(guarded, 4 * PAGE, 11) && !faults((char *)guarded + 8 * PAGE), "differ");
    CHECK("grows down", same(down, 4 * PAGE, 12), "differs");
    CHECK("heap", same(heap, 20 * PAGE, 13) && (unsigned char *)sbrk(5 * PAGE) == end && !(end[5 * PAGE - 1] = 0), "brk %p, not %p", sbrk(0), end);
    CHECK("data", same(data_page, sizeof data_page, 14), "differs");
    CHECK("dropped", !dropped[0] && !dropped[3 * PAGE], "came back");
    char *a, *b, *x = flags_before, *y = flags_after;
    while ((a = strsep(&x, "\n")) && (b = strsep(&y, "\n"))) if (strcmp(a, b)) { say("FAIL flags: %s\n  became %s", a, b); break; }
    (void)onfault;
    for (int i = 0; i < 2000; i++) { char *p = map(16, PROT_READ | PROT_WRITE, anon_rw, -1); *p = 1; if (i % 2) mprotect(p, PAGE, PROT_READ); }
    CHECK("stack grows", deep_stack(400) == 0, "wrong");
}

// ---------------------------------------------------------------- locks: what is mapped later
static int has_flag(void *at, const char *flag) {
    FILE *f = fopen("/proc/self/smaps", "r");
    char line[1024];
    unsigned long from, to;
    int here = 0, found = -1;
    while (fgets(line, sizeof line, f)) {
        if (sscanf(line, "%lx-%lx ", &from, &to) == 2) here = from <= (unsigned long)at && (unsigned long)at < to;
        if (here && !strncmp(line, "VmFlags:", 8)) found = strstr(line, flag) != 0;
    }
    fclose(f);
    return found;
}
static void group_locks(const char *how) {
    int flags = !strcmp(how, "future") ? MCL_FUTURE : !strcmp(how, "onfault") ? MCL_FUTURE | MCL_ONFAULT : 0;
    unsigned char *free_before = map(4, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1), in_core = 9;
    mlock(map(4, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1), 4 * PAGE);
    mprotect(map(2, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1), PAGE, PROT_NONE);  // no neighbours to join
    if (flags && mlockall(flags)) exit(12);
    all_ready(0);
    CHECK("not locked", has_flag(free_before, " lo") == 0, "%d", has_flag(free_before, " lo"));
    unsigned char *later = map(4, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1);
    mincore(later, PAGE, &in_core);
    CHECK("locked later", has_flag(later, " lo") == !!flags, "%d", has_flag(later, " lo"));
    CHECK("on fault", (in_core & 1) == (flags == MCL_FUTURE), "%d", in_core);
}

// ---------------------------------------------------------------- policies: where memory is placed
static void policy_of(char *out, const char *what, void *at) {
    unsigned long nodes[16] = {0};
    int mode = -1;
    if (syscall(SYS_get_mempolicy, &mode, nodes, 1024, at, at ? 2 : 0)) mode = -errno;
    sprintf(out + strlen(out), "%s %x %lx\n", what, mode, nodes[0]);
}
static char thread_before[99], thread_after[99];
static void *policy_main(void *arg) {
    unsigned long node = 1;
    if (strcmp(arg, "mappings")) syscall(SYS_set_mempolicy, 2, &node, 64);  // MPOL_BIND
    policy_of(thread_before, "thread", 0);
    atomic_fetch_add(&nr_ready, 1);
    wait_go();
    policy_of(thread_after, "thread", 0);
    return 0;
}
static void policies(char *out, unsigned char **at) {
    const char *names[] = {"main thread", "bind", "interleave, shared", "half", "other half", "none"};
    for (int i = 0; i < 6; i++) policy_of(out, names[i], at[i]);
}
static void group_policies(const char *how) {
    unsigned long node = 1;
    pthread_t t;
    unsigned char *at[6] = {0};
    char before[999] = "", after[999] = "";
    pthread_create(&t, 0, policy_main, (void *)how);
    if (!strcmp(how, "all")) syscall(SYS_set_mempolicy, 1 | 1 << 15, &node, 64);  // MPOL_PREFERRED, MPOL_F_STATIC_NODES
    at[1] = map(8, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    at[2] = map(8, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1);
    at[3] = map(8, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    at[4] = at[3] + 4 * PAGE;
    at[5] = sbrk(0) - 1;
    if (syscall(SYS_mbind, at[1], 8 * PAGE, 2, &node, 64, 0) || syscall(SYS_mbind, at[2], 8 * PAGE, 3, &node, 64, 0)
        || syscall(SYS_mbind, at[3], 4 * PAGE, 4, 0, 0, 0)) exit(13);  // MPOL_LOCAL
    for (int i = 1; i < 6; i++) *at[i] = i;
    policies(before, at);
    all_ready(1);
    policies(after, at);
    pthread_join(t, 0);
    CHECK("policies", !strcmp(before, after), "%s became %s", before, after);
    CHECK("policy of a thread", !strcmp(thread_before, thread_after), "%s became %s", thread_before, thread_after);
    CHECK("content", *at[1] == 1 && *at[2] == 2 && *at[3] == 3 && *at[4] == 4, "differs");
}

// ---------------------------------------------------------------- switches: what prctl(2) keeps for each thread
static void switches(char *out) {
    int death = -1, tsc = -1;
    prctl(PR_GET_PDEATHSIG, &death);
    prctl(PR_GET_TSC, &tsc);
    sprintf(out, "mce %d slack %d death %d tsc %d merge %d", prctl(PR_MCE_KILL_GET, 0, 0, 0, 0), prctl(PR_GET_TIMERSLACK), death, tsc,
            prctl(68, 0, 0, 0, 0));  // PR_GET_MEMORY_MERGE
}
static void *switches_main(void *arg) {
    char before[199], after[199];
    prctl(PR_MCE_KILL, PR_MCE_KILL_SET, (long)arg, 0, 0);
    prctl(PR_SET_TIMERSLACK, 60000 + (long)arg);
    prctl(PR_SET_PDEATHSIG, SIGWINCH * ((long)arg == 1));
    switches(before);
    atomic_fetch_add(&nr_ready, 1);
    wait_go();
    switches(after);
    CHECK("switches of a thread", !strcmp(before, after), "%s became %s", before, after);
    return 0;
}
static void group_switches(void) {
    pthread_t t[3];
    char before[199], after[199];
    prctl(67, 1, 0, 0, 0);  // PR_SET_MEMORY_MERGE
    prctl(PR_MCE_KILL, PR_MCE_KILL_SET, PR_MCE_KILL_EARLY, 0, 0);
    for (long i = 0; i < 3; i++) pthread_create(&t[i], 0, switches_main, (void *)i);
    switches(before);
    all_ready(3);
    switches(after);
    for (int i = 0; i < 3; i++) pthread_join(t[i], 0);
    CHECK("switches", !strcmp(before, after), "%s became %s", before, after);
}

// ---------------------------------------------------------------- keys: keyrings of the session
static long keyctl(long what, long a, long b, long c) { return syscall(SYS_keyctl, what, a, b, c); }
static long key_of(const char *type, const char *name) { return syscall(SYS_request_key, type, name, 0, 0); }
static void group_keys(const char *how) {
    long session = 0, user = keyctl(0, -4, 0, 0), in_session;
    if (strstr(how, "session")) session = keyctl(1, 0, 0, 0);
    if (strstr(how, "login") && keyctl(8, -4, -3, 0)) exit(14);  // KEYCTL_LINK of the keyring of the user
    if (strstr(how, "key") && syscall(SYS_add_key, "user", "self-check", "secret", 6, session ? -3 : -2) < 0) exit(15);
    all_ready(0);
    in_session = key_of("keyring", "_ses");
    CHECK("session keyring", in_session > 0 == session > 0 || !strcmp(how, "none"), "%ld, not %ld", in_session, session);
    int buffer[32], nr = session ? keyctl(11, -3, (long)buffer, sizeof buffer) : 0;
    CHECK("keyring of the user", nr == (strstr(how, "login") ? 4 : 0) && (!nr || buffer[0] == user), "%d bytes", nr);
    CHECK("keys of the restorer", key_of("user", "of-the-restorer") == -1, "found");
}

int main(int argc, char **argv) {
    if (argc < 4) return 2;
    control = argv[3];
    log_fd = open(argv[2], O_WRONLY | O_CREAT | O_APPEND, 0666);
    if (!strcmp(argv[1], "cpu")) group_cpu();
    else if (!strcmp(argv[1], "threads")) group_threads();
    else if (!strcmp(argv[1], "signals")) group_signals();
    else if (!strcmp(argv[1], "sleeps")) group_sleeps();
    else if (!strcmp(argv[1], "timers")) group_timers();
    else if (!strcmp(argv[1], "identity")) group_identity(argc > 4 ? argv[4] : "");
    else if (!strcmp(argv[1], "memory")) group_memory(argv[4]);
    else if (!strcmp(argv[1], "locks")) group_locks(argv[4]);
    else if (!strcmp(argv[1], "policies")) group_policies(argv[4]);
    else if (!strcmp(argv[1], "switches")) group_switches();
    else if (!strcmp(argv[1], "keys")) group_keys(argv[4]);
    else return 2;
    say("done");
    return 0;
}
