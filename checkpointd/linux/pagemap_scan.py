# SPDX-License-Identifier: Apache-2.0
"""The PAGEMAP_SCAN ioctl on /proc/PID/pagemap, and plain pagemap words.

Raises OSError only: ENOTTY where the kernel lacks the ioctl (before Linux 6.7), EINVAL for an unknown category,
ESRCH when the address space is gone.

Source: ioctl_pagemap_scan(2), Documentation/admin-guide/mm/pagemap.rst, Linux fs/proc/task_mmu.c.
"""

from __future__ import annotations

import fcntl
import os
import struct

import numpy as np
import numpy.typing as npt

Regions = npt.NDArray[np.uint64]
"""(n, 3): start address, end address, categories."""

NO_REGIONS: Regions = np.zeros((0, 3), dtype=np.uint64)

PAGE_IS_WPALLOWED = 1 << 0
PAGE_IS_WRITTEN = 1 << 1
PAGE_IS_FILE = 1 << 2
PAGE_IS_PRESENT = 1 << 3
PAGE_IS_SWAPPED = 1 << 4
PAGE_IS_PFNZERO = 1 << 5
PAGE_IS_HUGE = 1 << 6
PAGE_IS_SOFT_DIRTY = 1 << 7
PAGE_IS_GUARD = (
    1 << 8
)  # Linux kernel commit a516403787e0 ("fs/proc: extend the PAGEMAP_SCAN ioctl ...") (in v6.15)

PM_SCAN_WP_MATCHING = 1 << 0
PM_SCAN_CHECK_WPASYNC = 1 << 1

# _IOWR('f', 16, struct pm_scan_arg), 12 * u64
_PAGEMAP_SCAN = 0xC060_6610
_ARG = struct.Struct("=12Q")

PM_FRAME = (1 << 55) - 1
"""The page frame number of a present page; 0 to callers without CAP_SYS_ADMIN."""
PM_SOFT_DIRTY = 1 << 55
PM_MMAP_EXCLUSIVE = 1 << 56
PM_UFFD_WP = 1 << 57
PM_GUARD = 1 << 58
PM_FILE = 1 << 61
PM_SWAP = 1 << 62
PM_PRESENT = 1 << 63
SWP_PTE_MARKER = 31
"""Swap type of pte markers (uffd-wp, guard): not swapped-out data.  Seen with CAP_SYS_ADMIN only."""

_VEC_LEN = 1 << 14


def open_pagemap(pid: int) -> int:
    """A descriptor of the process's pagemap; it stays bound to the address space of this moment."""
    return os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)


def scan(
    fd: int,
    start: int,
    end: int,
    *,
    mask: int = 0,
    anyof: int = 0,
    inverted: int = 0,
    returned: int = 0,
    flags: int = 0,
) -> Regions:
    """Regions of [start, end) whose pages fit the categories.

    Args:
        mask, anyof, inverted: `category_mask`, `category_anyof_mask`, `category_inverted`.
        returned: `return_mask`; neighbours that agree in it are one region.
        flags: PM_SCAN_*.

    Returns:
        Sorted regions; with PM_SCAN_WP_MATCHING also those just write-protected.
    """
    found: list[Regions] = []
    while start < end:
        vec = np.empty((_VEC_LEN, 3), dtype=np.uint64)
        arg = bytearray(
            _ARG.pack(
                _ARG.size, flags, start, end, 0, vec.ctypes.data, _VEC_LEN, 0, inverted, mask, anyof, returned
            )
        )
        nr = fcntl.ioctl(fd, _PAGEMAP_SCAN, arg)
        found.append(vec[:nr])
        # walk_end is stale unless the vector filled up (it then tells where to go on), and even then when the very
        # last region filled it
        if nr < _VEC_LEN:
            break
        start = max(_ARG.unpack(arg)[4], int(vec[-1, 1]))
    return np.concatenate(found) if found else NO_REGIONS


def write_protect(fd: int, start: int, end: int) -> None:
    """Arm every existing page of [start, end) that lies in a VMA registered for asynchronous write-protect.

    Where nothing is returned the kernel does not look at single pages: a hole that has a page table is armed too, which
    changes nothing of what it holds.  Wanted are PRESENT or SWAPPED pages, since others would cost page tables.
    """
    wanted = (PAGE_IS_WRITTEN, PAGE_IS_PRESENT | PAGE_IS_SWAPPED)
    arg = bytearray(_ARG.pack(_ARG.size, PM_SCAN_WP_MATCHING, start, end, 0, 0, 0, 0, 0, *wanted, 0))
    fcntl.ioctl(fd, _PAGEMAP_SCAN, arg)


def read_words(fd: int, first_page: int, nr_pages: int) -> npt.NDArray[np.uint64]:
    """Pagemap words of a range; shorter than asked when the address space ended."""
    words = np.empty(nr_pages, dtype=np.uint64)
    view = memoryview(words.data).cast("B")
    done = 0
    while done < len(view):
        nr = os.preadv(fd, [view[done:]], (first_page << 3) + done)
        if nr <= 0:
            break
        done += nr
    return words[: done >> 3]


def swapped_data(fd: int, first_page: int, nr_pages: int, *, file_backed: bool) -> npt.NDArray[np.bool_]:
    """For pages that a scan just reported SWAPPED: do they hold data (True), or is it a pte marker (False)?

    Only a word that shows a marker makes one.  A page that the kernel was moving when it was scanned (compaction,
    splitting of a huge page: a migration entry reads SWAPPED too) may be present again: it holds data.
    Without CAP_SYS_ADMIN the type is hidden, and every one but a guard is called data: reading it is safe, only larger.

    Args:
        file_backed: the VMA is a private mapping of a file, whose own pages are no data.
    """
    words = read_words(fd, first_page, nr_pages)
    if len(words) < nr_pages:  # the address space ended: whoever reads these pages hears of it
        words = np.concatenate((words, np.zeros(nr_pages - len(words), dtype=np.uint64)))
    in_swap = (words & np.uint64(PM_SWAP | PM_PRESENT)) == np.uint64(PM_SWAP)
    shown = (words & np.uint64(PM_FRAME)) != 0
    marker = in_swap & shown & ((words & np.uint64(31)) == SWP_PTE_MARKER)
    marker |= (words & np.uint64(PM_GUARD)) != 0  # shown to everybody
    holds: npt.NDArray[np.bool_] = ~marker
    if file_backed:
        holds &= (words & np.uint64(PM_FILE)) == 0
    return holds
