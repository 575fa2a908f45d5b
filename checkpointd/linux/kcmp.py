# SPDX-License-Identifier: Apache-2.0
"""kcmp(2): do two descriptors point at one open file description?

Raises OSError: ENOSYS without CONFIG_KCMP, EBADF for a closed descriptor, EPERM without ptrace access.
"""

from __future__ import annotations

import struct

from checkpointd.linux._libc import syscall

NR_KCMP = 312
KCMP_FILE, KCMP_VM, KCMP_FILES, KCMP_FS = 0, 1, 2, 3
KCMP_SYSVSEM = 6
KCMP_EPOLL_TFD = 7


def _kcmp(pid: int, kind: int, index1: int, index2: int | bytes, *, other: int | None = None) -> int:
    return syscall(NR_KCMP, pid, pid if other is None else other, kind, index1, index2, name="kcmp")


def shares_files(pid: int, tid: int) -> bool:
    """Do two threads have one table of descriptors (CLONE_FILES)?"""
    return _kcmp(pid, KCMP_FILES, 0, 0, other=tid) == 0


def shares_directories(pid: int, tid: int) -> bool:
    """Do two threads have one root, working directory and umask (CLONE_FS)?"""
    return _kcmp(pid, KCMP_FS, 0, 0, other=tid) == 0


def shares_memory(pid: int, other: int) -> bool:
    """Do two processes have one address space (CLONE_VM)?"""
    return _kcmp(pid, KCMP_VM, 0, 0, other=other) == 0


def differ_in_undo_lists(pid: int, other: int) -> bool:
    """Have two processes different lists of semaphore adjustments (SEM_UNDO), or one a list and the other none?"""
    return _kcmp(pid, KCMP_SYSVSEM, 0, 0, other=other) != 0


def compare_files(pid: int, fd1: int, fd2: int) -> int:
    """0 for the same description, else -1 or 1: an order to sort by, fixed while both are open."""
    return {0: 0, 1: -1}.get(_kcmp(pid, KCMP_FILE, fd1, fd2), 1)


def epoll_watches(pid: int, fd: int, epoll_fd: int, watched_fd: int, nth: int = 0) -> bool:
    """Is `fd` the description that `epoll_fd` watches as its `nth` entry numbered `watched_fd`?"""
    # struct kcmp_epoll_slot: __u32 efd, __u32 tfd, __u32 toff
    return _kcmp(pid, KCMP_EPOLL_TFD, fd, struct.pack("=3I", epoll_fd, watched_fd, nth)) == 0
