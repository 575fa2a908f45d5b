# SPDX-License-Identifier: Apache-2.0
"""What PAGEMAP_SCAN would tell, from plain pagemap words, for kernels without it (before Linux 6.7).

8 bytes a page are read, of the mappings that hold anything (smaps tells), at most 2 MiB of words at a time.
The one thing the words do not say is "this is the shared page of zeroes": its frame number does, which takes
CAP_SYS_ADMIN.  Without it a page that is not exclusively mapped may be that one, and is marked `MAYBE_ZERO`.

Source: Documentation/admin-guide/mm/pagemap.rst, Linux fs/proc/task_mmu.c.
"""

from __future__ import annotations

import functools
import mmap
import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from checkpointd.linux import pagemap_scan as ps
from checkpointd.memory import PAGE_SHIFT, PAGE_SIZE, Vma
from checkpointd.procfs import maps
from checkpointd.tracking.pool_pages import words_at_rest

MAYBE_ZERO = 1 << 32
"""A category of ours: present, and it could not be told whether it is the shared page of zeroes."""

_CHUNK_PAGES = 1 << 18
_BITS = (
    (ps.PM_PRESENT, ps.PAGE_IS_PRESENT),
    (ps.PM_SWAP, ps.PAGE_IS_SWAPPED),
    (ps.PM_FILE, ps.PAGE_IS_FILE),
    (ps.PM_SOFT_DIRTY, ps.PAGE_IS_SOFT_DIRTY),
    (ps.PM_GUARD, ps.PAGE_IS_GUARD),
)


def scan_words(pid: int, pagemap: int, vmas: Sequence[Vma], *, soft_dirty: bool) -> ps.Regions:
    """Regions of present or swapped pages with their categories, sorted, none across a VMA's border.

    Args:
        vmas: the mappings wanted, sorted.
        soft_dirty: tell PAGE_IS_SOFT_DIRTY too (more and shorter regions).

    Raises:
        OSError: the process is gone.
        CheckpointError: a page of a hugetlb pool is neither there nor absent.
    """

    def regions() -> ps.Regions:
        found: list[ps.Regions] = []
        for start, end in _overlaps(vmas, maps.read_populated(pid)):
            for at in range(start, end, _CHUNK_PAGES * PAGE_SIZE):
                nr_pages = min(_CHUNK_PAGES, (end - at) >> PAGE_SHIFT)
                words = ps.read_words(pagemap, at >> PAGE_SHIFT, nr_pages)
                found.append(regions_of(words, at >> PAGE_SHIFT, zero_frame(), soft_dirty=soft_dirty))
        return np.concatenate(found) if found else np.zeros((0, 3), dtype=np.uint64)

    return words_at_rest(pid, regions, vmas)


def regions_of(words: npt.NDArray[np.uint64], first_page: int, zero: int, *, soft_dirty: bool) -> ps.Regions:
    """Words of neighbouring pages as regions.

    Args:
        zero: frame number of the shared page of zeroes, 0 when frame numbers are hidden.
    """
    at = np.flatnonzero(words & np.uint64(ps.PM_PRESENT | ps.PM_SWAP))
    if len(at) == 0:
        return np.zeros((0, 3), dtype=np.uint64)
    words = words[at]
    categories = np.zeros(len(at), dtype=np.uint64)
    for bit, category in _BITS:
        if category != ps.PAGE_IS_SOFT_DIRTY or soft_dirty:
            categories[(words & np.uint64(bit)) != 0] |= np.uint64(category)
    present = (words & np.uint64(ps.PM_PRESENT)) != 0
    if zero:
        is_zero = present & ((words & np.uint64(ps.PM_FRAME)) == np.uint64(zero))
        categories[is_zero] |= np.uint64(ps.PAGE_IS_PFNZERO)
    else:
        # nobody's exclusively: a page of zeroes never is
        categories[present & ((words & np.uint64(ps.PM_MMAP_EXCLUSIVE)) == 0)] |= np.uint64(MAYBE_ZERO)
    starts = np.concatenate(([True], (np.diff(at) != 1) | (np.diff(categories) != 0)))
    first = np.flatnonzero(starts)
    last = np.concatenate((first[1:], [len(at)])) - 1
    regions = np.empty((len(first), 3), dtype=np.uint64)
    regions[:, 0] = (at[first] + first_page).astype(np.uint64) << np.uint64(PAGE_SHIFT)
    regions[:, 1] = (at[last] + first_page + 1).astype(np.uint64) << np.uint64(PAGE_SHIFT)
    regions[:, 2] = categories[first]
    return regions


@functools.cache
def zero_frame() -> int:
    """Frame number of the page every untouched page reads as; 0 when we may not see frame numbers."""
    area = mmap.mmap(-1, PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    content = np.frombuffer(area, dtype=np.uint8)
    content.any()  # a read maps it
    address = int(content.ctypes.data)
    pagemap = ps.open_pagemap(os.getpid())
    try:
        return int(ps.read_words(pagemap, address >> PAGE_SHIFT, 1)[0] & np.uint64(ps.PM_FRAME))
    finally:
        os.close(pagemap)


def _overlaps(vmas: Sequence[Vma], populated: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The parts of `vmas` inside `populated`, cut at the borders of both; both are sorted."""
    found, n = [], 0
    for vma in vmas:
        while n < len(populated) and populated[n][1] <= vma.start:
            n += 1
        k = n
        while k < len(populated) and populated[k][0] < vma.end:
            found.append((max(vma.start, populated[k][0]), min(vma.end, populated[k][1])))
            k += 1
    return found
