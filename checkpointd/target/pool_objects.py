# SPDX-License-Identifier: Apache-2.0
"""What a shared object of a hugetlb pool holds.

lseek(2) calls all of such an object data, and a look through a mapping would take pages for its holes.  So the pages
that the target's own mappings have are taken, and where the object holds more (st_blocks tells how many: written by
another process, or mapped nowhere) the rest is read, which takes nothing: what is all zeroes there is called a hole.
It reads the same.

Raises OSError: the process or the object is gone.

Source: Linux fs/hugetlbfs/inode.c (hugetlbfs_read_iter), mm/hugetlb.c (hugetlb_add_to_page_cache).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np

from checkpointd.linux import pagemap_scan as ps
from checkpointd.memory import PAGE_SHIFT, PAGE_SIZE, Runs, Vma, runs_of

_BLOCK_BYTES = 512  # of st_blocks
_READ_BYTES = 2 << 20


def held_pages(pid: int, fd: int, page_bytes: int, mapped: Sequence[Vma]) -> Runs:
    """Runs of pages of 4 KiB, whole huge pages at a time.

    Args:
        fd: the object.
        mapped: the target's mappings of it, shared or private.
    """
    facts = os.fstat(fd)
    nr_huge = facts.st_size // page_bytes
    nr_held = facts.st_blocks * _BLOCK_BYTES // page_bytes
    held = np.zeros(nr_huge, dtype=bool)
    if nr_held:
        held[sorted(set(_mapped_pages(pid, page_bytes, mapped)) & set(range(nr_huge)))] = True
    missing = nr_held - int(held.sum())
    for number in np.flatnonzero(~held).tolist():
        if missing <= 0:
            break
        if _has_content(fd, number * page_bytes, page_bytes):
            held[number] = True
            missing -= 1
    return runs_of(np.flatnonzero(held).astype(np.uint64)) * np.uint64(page_bytes >> PAGE_SHIFT)


def _mapped_pages(pid: int, page_bytes: int, mapped: Sequence[Vma]) -> Iterator[int]:
    """Numbers of the object's huge pages that the mappings have."""
    pagemap = ps.open_pagemap(pid)
    try:
        for vma in mapped:
            for address in range(vma.start, vma.end, page_bytes):
                words = ps.read_words(pagemap, address // PAGE_SIZE, 1)
                # a private mapping may have a copy of its own there instead
                if len(words) and int(words[0]) & ps.PM_PRESENT and int(words[0]) & ps.PM_FILE:
                    yield (address - vma.start + vma.offset) // page_bytes
    finally:
        os.close(pagemap)


def _has_content(fd: int, start: int, page_bytes: int) -> bool:
    """Is there a byte other than zero?"""
    room = np.empty(_READ_BYTES, dtype=np.uint8)
    for at in range(start, start + page_bytes, _READ_BYTES):
        got = os.preadv(fd, [room.data], at)
        if room[:got].any():
            return True
    return False
