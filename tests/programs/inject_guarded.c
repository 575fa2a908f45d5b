// SPDX-License-Identifier: Apache-2.0
// A program behind a seccomp filter, otherwise as inject_nolibc: counts, naps, checks.
//
//   inject_guarded FILE ACTION NR [NR ...]
//
// The numbers are answered with ACTION (kill, errno, trap), everything else is allowed.  ACTION strict: strict mode.
// ACTION dispatch: system call user dispatch.  ACTION mdwe: no memory may become executable.
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

struct shared { volatile uint64_t ready, progress, errors; char text[256]; volatile uint64_t quit; };

static volatile char selector;

int main(int argc, char **argv)
{
    int fd = open(argv[1], O_RDWR);
    struct shared *shm = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    struct sock_filter code[64];
    int n = 0;
    unsigned action = !strcmp(argv[2], "kill") ? SECCOMP_RET_KILL_PROCESS
        : !strcmp(argv[2], "trap") ? SECCOMP_RET_TRAP : SECCOMP_RET_ERRNO | EPERM;
    if (!strcmp(argv[2], "strict")) {
        shm->ready = 1;
        if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT)) return 5;
        for (;;) { for (volatile int k = 0; k < 1000000; k++); shm->progress++; }
    }
    if (!strcmp(argv[2], "dispatch")) {
        if (prctl(59 /* PR_SET_SYSCALL_USER_DISPATCH */, 1, 0, 0, &selector)) return 6;
    } else if (!strcmp(argv[2], "mdwe")) {
        if (prctl(65 /* PR_SET_MDWE */, 1, 0, 0, 0)) return 7;
    } else {
        code[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0);
        for (int k = 3; k < argc; k++) {
            code[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, atoi(argv[k]), 0, 1);
            code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, action);
        }
        code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
        struct sock_fprog program = {n, code};
        if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program)) return 8;
    }
    shm->ready = 1;
    while (!shm->quit) {
        struct timespec nap = {0, 1000000};
        if (nanosleep(&nap, NULL)) shm->errors++;
        shm->progress++;
    }
    return 0;
}
