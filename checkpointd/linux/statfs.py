# SPDX-License-Identifier: Apache-2.0
"""fstatfs(2): the kind of file system behind a descriptor, which os.fstatvfs does not tell.

Raises OSError.  Source: statfs(2), include/uapi/linux/magic.h, arch/x86 struct statfs.
"""

from __future__ import annotations

import struct

from checkpointd.linux._libc import syscall

TMPFS_MAGIC = 0x0102_1994
PROC_SUPER_MAGIC = 0x9FA0

_NR_FSTATFS = 138
# struct statfs on x86-64: long f_type, f_bsize; u64 blocks, bfree, bavail, files, ffree; int fsid[2];
# long namelen, frsize, flags, spare[4]
STATFS = struct.Struct("=2q5Q2i3q4q")


def file_system_magic(fd: int) -> int:
    """f_type: one of the *_MAGIC numbers."""
    found = bytearray(STATFS.size)
    syscall(_NR_FSTATFS, fd, found, name="fstatfs")
    kind: int = STATFS.unpack(found)[0]
    return kind
