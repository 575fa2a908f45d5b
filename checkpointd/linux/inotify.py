# SPDX-License-Identifier: Apache-2.0
"""inotify(7) with the watch descriptors one asks for.

All raise OSError with the errno of the call.
"""

from __future__ import annotations

import errno
import fcntl
import os

from checkpointd.linux._libc import syscall

# include/uapi/linux/inotify.h: bits that fdinfo shows and inotify_add_watch takes
IN_ALL_EVENTS = 0xFFF
IN_EXCL_UNLINK = 0x0400_0000
IN_ONESHOT = 0x8000_0000
WATCH_BITS = IN_ALL_EVENTS | IN_EXCL_UNLINK | IN_ONESHOT

# _IOW('I', 0, __s32), since Linux 4.17 with CONFIG_CHECKPOINT_RESTORE; see fs/notify/inotify/inotify_user.c
_INOTIFY_IOC_SETNEXTWD = 0x4004_4900

_NR_INOTIFY_ADD_WATCH, _NR_INOTIFY_RM_WATCH, _NR_INOTIFY_INIT1 = 254, 255, 294


def init(flags: int) -> int:
    """A new instance; flags IN_NONBLOCK (O_NONBLOCK), IN_CLOEXEC (O_CLOEXEC)."""
    return syscall(_NR_INOTIFY_INIT1, flags, name="inotify_init1")


def add_watch(fd: int, path: str, mask: int) -> int:
    """Watch a path; the watch descriptor."""
    return syscall(_NR_INOTIFY_ADD_WATCH, fd, os.fsencode(path) + b"\0", mask, name="inotify_add_watch")


def remove_watch(fd: int, wd: int) -> None:
    """The kernel queues an IN_IGNORED event for it."""
    syscall(_NR_INOTIFY_RM_WATCH, fd, wd, name="inotify_rm_watch")


def set_next_wd(fd: int, wd: int) -> bool:
    """Ask that the next watch be numbered `wd`.  False where the kernel has no such request."""
    try:
        fcntl.ioctl(fd, _INOTIFY_IOC_SETNEXTWD, wd)
    except OSError as error:
        if error.errno in (errno.ENOTTY, errno.EINVAL):
            return False
        raise
    return True
