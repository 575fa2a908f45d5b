# SPDX-License-Identifier: Apache-2.0
"""userfaultfd(2) ioctls on a descriptor that may belong to another process's address space.

Raises OSError only.  UFFDIO_REGISTER: EBUSY (the range belongs to another userfaultfd), EINVAL (a kind of VMA
that cannot be registered), EPERM (shared mapping of a file opened read-only), ENOMEM (the address space is
gone).  UFFDIO_COPY: see `copy`.

Source: userfaultfd(2), ioctl_userfaultfd(2), Linux include/uapi/linux/userfaultfd.h.
"""

from __future__ import annotations

import fcntl
import struct

NR_USERFAULTFD = 323
UFFD_USER_MODE_ONLY = 1

_UFFDIO_API = 0xC018_AA3F  # struct uffdio_api {u64 api, features, ioctls}
_UFFDIO_REGISTER = 0xC020_AA00  # struct uffdio_register {u64 start, len, mode, ioctls}
_UFFDIO_UNREGISTER = 0x8010_AA01  # struct uffdio_range {u64 start, len}
_UFFDIO_COPY = 0xC028_AA03  # struct uffdio_copy {u64 dst, src, len, mode; s64 copy}
_UFFDIO_WRITEPROTECT = 0xC018_AA06  # struct uffdio_writeprotect {u64 start, len, mode}
_UFFD_API = 0xAA
_MODE_MISSING, _MODE_WP = 1, 2

FEATURE_PAGEFAULT_FLAG_WP = 1 << 0
FEATURE_WP_HUGETLBFS_SHMEM = 1 << 12
FEATURE_WP_UNPOPULATED = 1 << 13
FEATURE_WP_ASYNC = 1 << 15


def handshake(fd: int, features: int) -> int:
    """UFFDIO_API: ask for `features`; what the kernel offers.

    Raises:
        OSError: EINVAL when a feature is unknown to the kernel (the descriptor is then of no more use).
    """
    arg = bytearray(struct.pack("=3Q", _UFFD_API, features, 0))
    fcntl.ioctl(fd, _UFFDIO_API, arg)
    offered: int = struct.unpack("=3Q", arg)[1]
    return offered


def register_wp(fd: int, start: int, end: int) -> None:
    """Register [start, end) in write-protect mode; nothing is protected by this."""
    fcntl.ioctl(fd, _UFFDIO_REGISTER, bytearray(struct.pack("=4Q", start, end - start, _MODE_WP, 0)))


def register_missing(fd: int, start: int, end: int) -> None:
    """Register [start, end) for faults of missing pages only: a range in write-protect mode leaves that mode.

    Its pages are not looked at, unlike when it is unregistered: protected ones stay so.
    """
    fcntl.ioctl(fd, _UFFDIO_REGISTER, bytearray(struct.pack("=4Q", start, end - start, _MODE_MISSING, 0)))


def unregister(fd: int, start: int, end: int) -> None:
    """Undo `register_wp`; protection is lifted."""
    fcntl.ioctl(fd, _UFFDIO_UNREGISTER, bytearray(struct.pack("=2Q", start, end - start)))


def lift_protection(fd: int, start: int, end: int) -> None:
    """Take write protection off every page of a registered range."""
    fcntl.ioctl(fd, _UFFDIO_WRITEPROTECT, bytearray(struct.pack("=3Q", start, end - start, 0)))


def copy(fd: int, to: int, source: int, size_bytes: int) -> int:
    """Make pages at [to, to + size_bytes), inside one registered VMA, of memory of ours; how many bytes were done.

    Each page is allocated, filled and mapped at once, and not cleared before.  It is as if it had been written: mapped
    dirty (soft-dirty too), writable where its VMA is.  There must be no page yet: the first that is there ends it.

    Raises:
        OSError: nothing was done: EEXIST (a page is there), ENOENT (not inside one registered VMA), EAGAIN (its address
            space is being changed), ENOMEM, ESRCH (gone).
    """
    arg = bytearray(struct.pack("=4Qq", to, source, size_bytes, 0, 0))
    try:
        fcntl.ioctl(fd, _UFFDIO_COPY, arg)
    except OSError:
        done: int = struct.unpack("=4Qq", arg)[4]
        if done > 0:
            return done
        raise
    return size_bytes
