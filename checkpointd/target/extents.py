# SPDX-License-Identifier: Apache-2.0
"""Which pages of memory objects and files hold data (SEEK_DATA/SEEK_HOLE; lseek(2)).

A page that the kernel moves in memory at that very moment (compaction) may look like a hole: its successor takes its
place first and is marked up to date after that, which is what lseek asks for.  So holes are looked at twice.  That
moment is long when the processor that moves the page is taken away; a memory object counts its pages, though, so it
is known when some were not found.

Raises OSError (but ENXIO, which is how lseek says that no data follows).

Source: Linux mm/filemap.c (folio_seek_hole_data), mm/migrate.c (folio_migrate_flags), mm/shmem.c (i_blocks).
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator, Sequence

import numpy as np

from checkpointd.linux.statfs import TMPFS_MAGIC, file_system_magic
from checkpointd.memory import PAGE_SHIFT, Runs, merge_runs, nr_pages_in

_BLOCK_BYTES = 512  # of st_blocks
_MORE_LOOKS, _PAUSE_S = 3, 0.0005


def all_data_extents(objects: Sequence[tuple[str, int]]) -> list[Runs]:
    """Page runs that hold data, of each (path, size in bytes).

    Where memory objects have more pages than were found, a few more looks follow, a pause before each: the same for all
    of them, because a target stands still for it.  Pages that were only allocated (fallocate(2)) cost it for nothing.
    """
    found, short = [], []
    for n, (path, size_bytes) in enumerate(objects):
        with _opened(path) as fd:
            found.append(data_extents(fd, size_bytes))
            if _has_more(fd, found[n]):
                short.append(n)
    for _ in range(_MORE_LOOKS):
        if not short:
            break
        time.sleep(_PAUSE_S)
        for n in short.copy():
            path, size_bytes = objects[n]
            with _opened(path) as fd:
                found[n] = merge_runs(np.concatenate((found[n], _look(fd, size_bytes))))
                if not _has_more(fd, found[n]):
                    short.remove(n)
    return found


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _has_more(fd: int, found: Runs) -> bool:
    """Has a memory object more pages?  Files on disks count other things in st_blocks, and none of theirs moves so."""
    if nr_pages_in(found) << PAGE_SHIFT >= os.fstat(fd).st_blocks * _BLOCK_BYTES:
        return False
    return file_system_magic(fd) == TMPFS_MAGIC


def data_extents(fd: int, size_bytes: int) -> Runs:
    """Page runs that hold data; holes are looked at twice."""
    found = _look(fd, size_bytes)
    hole = 0
    for first, nr in [*found.tolist(), (-(-size_bytes >> PAGE_SHIFT), 0)]:
        if hole < first and _next_data(fd, hole << PAGE_SHIFT, size_bytes) < first << PAGE_SHIFT:
            again = _look(fd, size_bytes)
            return merge_runs(np.concatenate((found, again)))
        hole = first + nr
    return found


def _look(fd: int, size_bytes: int) -> Runs:
    found, at = [], 0
    while (start := _next_data(fd, at, size_bytes)) < size_bytes:
        try:
            end = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            break  # a relative that runs has just cut the object
        first, last = start >> PAGE_SHIFT, (end + (1 << PAGE_SHIFT) - 1) >> PAGE_SHIFT
        found.append((first, last - first))
        at = end
    return np.array(found, dtype=np.uint64).reshape(-1, 2)


def _next_data(fd: int, at: int, size_bytes: int) -> int:
    """Where data begins at or behind `at`; `size_bytes` when there is none."""
    try:
        return min(os.lseek(fd, at, os.SEEK_DATA), size_bytes)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return size_bytes
