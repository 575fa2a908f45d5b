# SPDX-License-Identifier: Apache-2.0
"""fstatfs(2): the kind of file system behind a descriptor, which os.fstatvfs does not tell.

Raises OSError.  Source: statfs(2), include/uapi/linux/magic.h, arch/x86 struct statfs.
"""

from __future__ import annotations

import struct

from checkpointd.linux._libc import syscall

TMPFS_MAGIC = 0x0102_1994
PROC_SUPER_MAGIC = 0x9FA0
HUGETLBFS_MAGIC = 0x9584_58F6

_NR_FSTATFS = 138
# struct statfs on x86-64: long f_type, f_bsize; u64 blocks, bfree, bavail, files, ffree; int fsid[2];
# long namelen, frsize, flags, spare[4]
STATFS = struct.Struct("=2q5Q2i3q4q")


def file_system_magic(fd: int) -> int:
    """f_type: one of the *_MAGIC numbers."""
    return _fstatfs(fd)[0]


def pool_page_bytes(fd: int) -> int:
    """Size of the huge pages that a file of a hugetlb pool is made of; 0 for every other file."""
    kind, block_bytes = _fstatfs(fd)
    return block_bytes if kind == HUGETLBFS_MAGIC else 0


def _fstatfs(fd: int) -> tuple[int, int]:
    """f_type and f_bsize."""
    found = bytearray(STATFS.size)
    syscall(_NR_FSTATFS, fd, found, name="fstatfs")
    kind, block_bytes = STATFS.unpack(found)[:2]
    return kind, block_bytes
