# SPDX-License-Identifier: Apache-2.0
"""What this kernel can do, found by trying (never by its version), as one frozen value.

Probes work on pages of our own process and undo what they did.  Nothing raises: an unexpected errno is kept as
text in `notes`, so that `checkpoint check` can show it.
"""

from __future__ import annotations

import errno
import functools
import mmap
import os
from dataclasses import dataclass

import numpy as np
from kernel_shim import probe as shim

from checkpointd.linux import pagemap_scan as ps
from checkpointd.linux import userfaultfd as uffd
from checkpointd.linux._libc import syscall
from checkpointd.memory import PAGE_SIZE

_NO_SOFT_DIRTY = shim.nothing("this kernel has no soft-dirty tracking")


@dataclass(frozen=True, slots=True)
class Features:
    """Abilities of the running kernel for this user.

    Attributes:
        pagemap_scan: the ioctl exists (Linux 6.7).
        guard_category: PAGEMAP_SCAN knows PAGE_IS_GUARD (6.15).
        uffd_wp_async: asynchronous write-protect works end to end: armed, written, seen.
        holes_are_written: in memory registered with a userfaultfd PAGEMAP_SCAN calls WRITTEN what is not there,
            an emptied page as well as a hole without page tables (the fixes of 2026); without it only a look
            at all pages tells what vanished.
        soft_dirty: bit 55 of pagemap goes and comes back with writes.
        notes: why something is missing, one line each.
        soft_dirty_kinds: how exact soft-dirty can be made here (patched, emulated, neither), and what loses writes.
    """

    pagemap_scan: bool
    guard_category: bool
    uffd_wp_async: bool
    holes_are_written: bool
    soft_dirty: bool
    notes: tuple[str, ...]
    soft_dirty_kinds: shim.ProbeResult = _NO_SOFT_DIRTY


@functools.cache
def probe() -> Features:
    """Probe once per process."""
    notes: list[str] = []
    area = mmap.mmap(-1, 4 * PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = int(np.frombuffer(area, dtype=np.uint8).ctypes.data)
    pagemap = ps.open_pagemap(os.getpid())
    try:
        for page in range(4):
            area[page * PAGE_SIZE] = 1
        has_scan = _tries(
            notes, "PAGEMAP_SCAN", lambda: ps.scan(pagemap, address, address + PAGE_SIZE, returned=8)
        )
        has_guard = has_scan and _tries(
            notes,
            "PAGE_IS_GUARD",
            lambda: ps.scan(pagemap, address, address + PAGE_SIZE, returned=ps.PAGE_IS_GUARD),
        )
        wp_async, holes = (False, False)
        if has_scan:
            wp_async, holes = _probe_wp_async(area, address, pagemap, notes)
        soft_dirty = _probe_soft_dirty(area, address, pagemap)
        # another process finds out the rest, which takes a while: only where there is something to find
        kinds = shim.probe() if soft_dirty else _NO_SOFT_DIRTY
        return Features(has_scan, has_guard, wp_async, holes, soft_dirty, tuple(notes), kinds)
    finally:
        os.close(pagemap)


def _tries(notes: list[str], what: str, call: object) -> bool:
    try:
        call()  # type: ignore[operator]
    except OSError as error:
        notes.append(f"{what}: {errno.errorcode.get(error.errno or 0, '?')}")
        return False
    return True


def _written(pagemap: int, address: int, nr_pages: int) -> int:
    found = ps.scan(
        pagemap, address, address + nr_pages * PAGE_SIZE, mask=ps.PAGE_IS_WRITTEN, returned=ps.PAGE_IS_WRITTEN
    )
    return int((found[:, 1] - found[:, 0]).sum()) // PAGE_SIZE


def _probe_wp_async(area: mmap.mmap, address: int, pagemap: int, notes: list[str]) -> tuple[bool, bool]:
    """(asynchronous write-protect works, emptied pages read WRITTEN)."""
    try:
        fd = syscall(uffd.NR_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK | uffd.UFFD_USER_MODE_ONLY)
    except OSError as error:
        notes.append(f"userfaultfd: {errno.errorcode.get(error.errno or 0, '?')}")
        return False, False
    try:
        wanted = uffd.FEATURE_WP_ASYNC | uffd.FEATURE_WP_UNPOPULATED | uffd.FEATURE_WP_HUGETLBFS_SHMEM
        uffd.handshake(fd, wanted)
        uffd.register_wp(fd, address, address + 4 * PAGE_SIZE)
        ps.write_protect(pagemap, address, address + 4 * PAGE_SIZE)
        if _written(pagemap, address, 4) != 0:
            notes.append("userfaultfd: armed pages still read WRITTEN")
            return False, False
        area[PAGE_SIZE] = 2
        if _written(pagemap, address, 4) != 1:
            notes.append("userfaultfd: a write to an armed page is not reported")
            return False, False
        area.madvise(mmap.MADV_DONTNEED, 2 * PAGE_SIZE, PAGE_SIZE)
        return True, _written(pagemap, address, 4) == 2 and _void_is_written(fd, pagemap)
    except OSError as error:
        notes.append(f"userfaultfd write-protect: {errno.errorcode.get(error.errno or 0, '?')}")
        return False, False
    finally:
        os.close(fd)


def _void_is_written(fd: int, pagemap: int) -> bool:
    """Is registered memory without even a page table called WRITTEN?"""
    huge_size = 512 * PAGE_SIZE
    with mmap.mmap(-1, 2 * huge_size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        view = np.frombuffer(area, dtype=np.uint8)
        address = int(view.ctypes.data)
        del view
        start = -(-address // huge_size) * huge_size
        uffd.register_wp(fd, start, start + huge_size)
        try:
            return _written(pagemap, start, 512) == 512
        finally:
            uffd.unregister(fd, start, start + huge_size)


def _probe_soft_dirty(area: mmap.mmap, address: int, pagemap: int) -> bool:
    """Write, clear, check, write, check: clear_refs "succeeds" on kernels without soft-dirty too."""
    first = address // PAGE_SIZE

    def dirty() -> bool:
        return bool(ps.read_words(pagemap, first, 1)[0] & np.uint64(ps.PM_SOFT_DIRTY))

    area[0] = 3
    if not dirty():
        return False
    with open("/proc/self/clear_refs", "wb", buffering=0) as file:
        file.write(b"4")
    if dirty():
        return False
    area[0] = 4
    return dirty()
