# SPDX-License-Identifier: Apache-2.0
"""x86-64 system call numbers and arch_prctl(2) codes, for calls made in another process.

Source: Linux arch/x86/entry/syscalls/syscall_64.tbl, arch/x86/include/uapi/asm/prctl.h.
"""

from __future__ import annotations

import enum
import functools
import mmap
import os
from pathlib import Path

from checkpointd.linux._libc import syscall


class Nr(enum.IntEnum):
    """System call numbers."""

    READ = 0
    WRITE = 1
    CLOSE = 3
    POLL = 7
    MMAP = 9
    MPROTECT = 10
    MUNMAP = 11
    BRK = 12
    RT_SIGACTION = 13
    RT_SIGPROCMASK = 14
    MREMAP = 25
    MINCORE = 27
    MADVISE = 28
    SHMGET = 29
    SHMAT = 30
    SHMCTL = 31
    PAUSE = 34
    NANOSLEEP = 35
    GETITIMER = 36
    ALARM = 37
    SETITIMER = 38
    GETPID = 39
    EXIT = 60
    SEMCTL = 66
    SHMDT = 67
    FCNTL = 72
    CHDIR = 80
    UMASK = 95
    SETPGID = 109
    SETSID = 112
    SETGROUPS = 116
    SETRESUID = 117
    SETRESGID = 119
    SETFSUID = 122
    SETFSGID = 123
    CAPSET = 126
    RT_SIGQUEUEINFO = 129
    SIGALTSTACK = 131
    PERSONALITY = 135
    MLOCK = 149
    MLOCKALL = 151
    PRCTL = 157
    ARCH_PRCTL = 158
    SETRLIMIT = 160
    CHROOT = 161
    GETTID = 186
    FUTEX = 202
    SCHED_SETAFFINITY = 203
    SET_TID_ADDRESS = 218
    RESTART_SYSCALL = 219
    TIMER_CREATE = 222
    TIMER_SETTIME = 223
    TIMER_GETTIME = 224
    TIMER_GETOVERRUN = 225
    TIMER_DELETE = 226
    CLOCK_NANOSLEEP = 230
    EPOLL_WAIT = 232
    MBIND = 237
    SET_MEMPOLICY = 238
    GET_MEMPOLICY = 239
    REQUEST_KEY = 249
    KEYCTL = 250
    IOPRIO_SET = 251
    IOPRIO_GET = 252
    OPENAT = 257
    UNSHARE = 272
    SET_ROBUST_LIST = 273
    GET_ROBUST_LIST = 274
    EPOLL_PWAIT = 281
    RT_TGSIGQUEUEINFO = 297
    PRLIMIT64 = 302
    PROCESS_VM_WRITEV = 311
    SCHED_SETATTR = 314
    SCHED_GETATTR = 315
    EXECVEAT = 322
    MEMBARRIER = 324
    MLOCK2 = 325
    RSEQ = 334
    CLONE3 = 435
    CLOSE_RANGE = 436
    EPOLL_PWAIT2 = 441
    MSEAL = 462


MCL_FUTURE, MCL_ONFAULT = 2, 4
ARCH_GET_CPUID = 0x1011
ARCH_GET_XCOMP_PERM = 0x1022
ARCH_REQ_XCOMP_PERM = 0x1023
ARCH_MAP_VDSO_64 = 0x2003

XFEATURE_XTILEDATA = 18
XTILE_MASK = 1 << 17 | 1 << 18

_ISA_PREFIXES = ("sse", "avx", "amx", "bmi", "fma", "xsave", "sha")
_ISA_FLAGS = frozenset(
    {
        "ssse3", "pni", "aes", "vaes", "pclmulqdq", "vpclmulqdq", "popcnt", "movbe", "rdrand", "rdseed", "adx",
        "fsgsbase", "erms", "fsrm", "abm", "f16c", "rdtscp", "clflushopt", "clwb", "gfni", "rtm", "hle", "pku",
        "ospke", "waitpkg", "cldemote", "movdiri", "movdir64b", "serialize", "cx16", "lahf_lm", "cmov",
    }
)  # fmt: skip


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The instruction set extensions of this CPU that user code may have chosen its routines by."""
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith("flags"):
                words = line.partition(":")[2].split()
                return frozenset(w for w in words if w in _ISA_FLAGS or w.startswith(_ISA_PREFIXES))
    return frozenset()


@functools.cache
def clock_ticks() -> int:
    """Clock ticks (of /proc/PID/stat) a second."""
    return os.sysconf("SC_CLK_TCK")


def mmap_min_addr() -> int:
    """The lowest address user code may map."""
    return max(int(Path("/proc/sys/vm/mmap_min_addr").read_text(encoding="ascii")), mmap.PAGESIZE)


def get_robust_list(tid: int) -> tuple[int, int]:
    """(head, length) a thread gave to set_robust_list(2); (0, 0) for none.

    Raises:
        OSError: ESRCH, EPERM (needs ptrace access).
    """
    head, length = bytearray(8), bytearray(8)
    syscall(Nr.GET_ROBUST_LIST, tid, head, length, name="get_robust_list")
    found = int.from_bytes(head, "little")
    return (found, int.from_bytes(length, "little")) if found else (0, 0)
