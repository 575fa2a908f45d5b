# SPDX-License-Identifier: Apache-2.0
"""What tells one object of shared memory from every other.

Not device and inode alone: the kernel numbers the inode of a System V segment by its shmid, on the very device that
numbers memfds and shared anonymous memory, so the two can be equal.

Source: Linux ipc/shm.c (newseg: "shmid gets reported as inode#").
"""

from __future__ import annotations

import functools
import os
from typing import NamedTuple


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
