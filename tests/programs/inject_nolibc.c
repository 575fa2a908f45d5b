// SPDX-License-Identifier: Apache-2.0
// A program without any library: counts in a shared mapping and naps, checking both.  Run with FILE as argument.
#include <stdint.h>

static long call(long nr, long a, long b, long c, long d, long e, long f)
{
    register long r10 __asm__("r10") = d, r8 __asm__("r8") = e, r9 __asm__("r9") = f;
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "0"(nr), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}

struct shared { volatile uint64_t ready, progress, errors; char text[256]; volatile uint64_t quit; };

__attribute__((used)) static void run(long *stack)
{
    char **argv = (char **)(stack + 1);
    long fd = call(2, (long)argv[1], 2, 0, 0, 0, 0);
    struct shared *shm = (struct shared *)call(9, 0, 4096, 3, 1, fd, 0);
    call(3, fd, 0, 0, 0, 0, 0);
    shm->ready = 1;
    while (!shm->quit) {
        long nap[2] = {0, 1000000};
        volatile uint64_t sum = 0;
        for (uint64_t n = 1; n <= 20000; n++) sum += n;
        if (sum != 200010000) shm->errors++;
        if (call(35, (long)nap, 0, 0, 0, 0, 0)) shm->errors++;
        shm->progress++;
    }
    call(231, shm->errors != 0, 0, 0, 0, 0, 0);
}

__asm__(".globl _start\n_start: mov %rsp, %rdi\n and $-16, %rsp\n call run\n hlt\n");
