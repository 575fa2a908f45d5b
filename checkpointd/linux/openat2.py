# SPDX-License-Identifier: Apache-2.0
"""openat2(2): open a path under rules about how it may be resolved (Linux 5.6).

Raises OSError: ELOOP for a symbolic link that RESOLVE_NO_SYMLINKS forbids, and all of open(2).

Source: openat2(2), include/uapi/linux/openat2.h.
"""

from __future__ import annotations

import os
import struct

from checkpointd.linux._libc import syscall
from checkpointd.linux.fcntl import O_LARGEFILE

AT_FDCWD = -100
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_IN_ROOT = 0x10

_NR_OPENAT2 = 437
# struct open_how: __u64 flags, mode, resolve
OPEN_HOW = struct.Struct("=3Q")
# the kernel refuses what it does not know, and F_GETFL may give more than open(2) takes
_WITH_PATH = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_KNOWN = (
    os.O_ACCMODE | os.O_CREAT | os.O_EXCL | os.O_NOCTTY | os.O_TRUNC | os.O_APPEND | os.O_NONBLOCK | os.O_SYNC
    | os.O_DSYNC | os.O_DIRECT | os.O_NOATIME | O_LARGEFILE | _WITH_PATH
)  # fmt: skip


def openat2(dir_fd: int, path: str, flags: int, resolve: int, mode: int = 0) -> int:
    """A descriptor of `path`, looked up from `dir_fd` (AT_FDCWD: from our working directory).

    Args:
        mode: of a file that O_CREAT makes; 0 without it.
        resolve: RESOLVE_*.
    """
    known = flags & (_WITH_PATH if flags & os.O_PATH else _KNOWN)
    how = OPEN_HOW.pack(known, mode, resolve)
    return syscall(_NR_OPENAT2, dir_fd, os.fsencode(path) + b"\0", how, OPEN_HOW.size, name="openat2")
