# SPDX-License-Identifier: Apache-2.0
"""Descriptors of processes: pidfd_open(2), pidfd_getfd(2), pidfd_send_signal(2).

Raises OSError only: ESRCH (gone), EPERM (ptrace access is needed for `getfd`), EBADF (no such remote fd), ENOSYS
(pidfd_getfd before Linux 5.6).
"""

from __future__ import annotations

import select

from checkpointd.linux._libc import syscall

NR_PIDFD_SEND_SIGNAL = 424
NR_PIDFD_OPEN = 434
NR_PIDFD_GETFD = 438


def pidfd_open(pid: int) -> int:
    """A close-on-exec descriptor of the process, readable once it exited; never another one with its pid."""
    return syscall(NR_PIDFD_OPEN, pid, 0, name="pidfd_open")


def pidfd_getfd(pidfd: int, remote_fd: int) -> int:
    """A close-on-exec duplicate, in our table, of descriptor `remote_fd` of that process."""
    return syscall(NR_PIDFD_GETFD, pidfd, remote_fd, 0, name="pidfd_getfd")


def pidfd_send_signal(pidfd: int, signum: int) -> None:
    """Signal that process, never another one with its pid.  Signal 0 only asks."""
    syscall(NR_PIDFD_SEND_SIGNAL, pidfd, signum, 0, 0, name="pidfd_send_signal")


def has_exited(pidfd: int, *, timeout_s: float = 0.0) -> bool:
    """Did that process exit (a zombie counts), waiting up to `timeout_s`?"""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))
