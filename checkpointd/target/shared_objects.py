# SPDX-License-Identifier: Apache-2.0
"""What tells one object of shared memory from every other.

Not device and inode alone: the kernel numbers the inode of a System V segment by its shmid, on the very device that
numbers memfds and shared anonymous memory, so the two can be equal.

Source: Linux ipc/shm.c (newseg: "shmid gets reported as inode#"), fs/hugetlbfs/inode.c (one mount of the kernel's own
for each size of huge pages).
"""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

from checkpointd.linux.hugetlb import MFD_HUGETLB, size_flag


class ObjectKey(NamedTuple):
    """`dev` is (major, minor)."""

    dev: tuple[int, int]
    inode: int
    is_sysv: bool = False


@functools.cache
def shared_memory_device() -> int:
    """st_dev of the kernel's own tmpfs: memfds, shared anonymous memory and System V segments, and nothing else."""
    fd = os.memfd_create("probe", os.MFD_CLOEXEC)
    try:
        return os.fstat(fd).st_dev
    finally:
        os.close(fd)


@functools.cache
def pool_device(page_bytes: int) -> int:
    """st_dev of the kernel's own hugetlbfs for pages of that size; -1 where there is none.

    Mappings made with MAP_HUGETLB, memfds and System V segments of huge pages are there, and no file with a name.
    """
    try:
        fd = os.memfd_create("probe", os.MFD_CLOEXEC | MFD_HUGETLB | size_flag(page_bytes))
    except OSError:
        return -1
    try:
        return os.fstat(fd).st_dev
    finally:
        os.close(fd)
