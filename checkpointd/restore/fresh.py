# SPDX-License-Identifier: Apache-2.0
"""Filling private anonymous memory that holds nothing yet: by UFFDIO_COPY, which takes two thirds of the time.

A write to a page that is not there makes the kernel clear it first, and then be overwritten.  UFFDIO_COPY allocates a
page, fills it and maps it.  The VMA has to be registered with a userfaultfd; write-protect mode is taken, with nothing
protected, so that any other way to write works there as well, and `close` gives all VMAs back as they were.

Neighbours of one kind are registered together, also those that are written otherwise: VMAs that differed in this while
pages came would never merge again, even with the registration gone (their anon_vma is not shared), and mremap(2) over
both would fail.

Left out is what must be of huge pages (UFFDIO_COPY makes small ones), and short runs of pages, which cost less together
in one process_vm_writev(2).  Where there is no userfaultfd nothing is fresh, and no error.

Raises OSError: the process is gone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt

from checkpointd.linux import userfaultfd as uffd
from checkpointd.memory import PAGE_SHIFT, VmaKind
from checkpointd.restore.plan import FLAGS_BEFORE_CONTENT, is_filled_writable
from checkpointd.restore.stub import Stub
from checkpointd.state.memory import AddressSpace, VmaState
from checkpointd.tracking.make import make_userfaultfd

MIN_RUN_PAGES = 16
"""Shorter runs are for process_vm_writev(2): a call for each would cost more than clearing the pages."""
_MIN_VMA_PAGES = 64
_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_KERNEL_TELLS_HUGE = (6, 7)  # PAGEMAP_SCAN


class FreshMemory:
    """Which mappings of the new process are filled this way, and doing it; safe for many threads.

    Args:
        dumped_on: release of the kernel that the image is from.

    Attributes:
        starts: first addresses of the VMAs, as a set.
    """

    def __init__(self, stub: Stub, space: AddressSpace, dumped_on: str) -> None:
        self.starts: set[int] = set()
        self._ranges: list[tuple[int, int]] = []
        self._fd = -1
        # what was of huge pages without asking is not known from older kernels, and comes by itself where it did
        unknown = not _tells_huge(dumped_on) and _makes_huge_pages()
        wanted = {
            vma.start for vma in space.vmas if is_fresh(vma) and not (unknown and "nh" not in vma.flags)
        }
        if wanted and self._open(stub):
            for chain in chains(space):
                inside = {vma.start for vma in chain} & wanted
                if inside:
                    self._register(chain[0].start, chain[-1].end, inside)

    def _open(self, stub: Stub) -> bool:
        """Make the userfaultfd, if one can be had."""
        with contextlib.suppress(
            OSError
        ):  # an old kernel, a security module: this is but one way to fill memory
            self._fd = make_userfaultfd(stub.pid, stub, uffd.FEATURE_PAGEFAULT_FLAG_WP)
        return self._fd >= 0

    def _register(self, start: int, end: int, starts: set[int]) -> None:
        with contextlib.suppress(OSError):  # below the lowest address that may be mapped, too many VMAs
            uffd.register_wp(self._fd, start, end)
            self._ranges.append((start, end))
            self.starts |= starts

    def write(self, first_page: int, data: npt.NDArray[np.uint8]) -> int:
        """Fill adjacent pages of one of these VMAs; bytes done: less than asked if a page was there already."""
        at, to, done = int(data.ctypes.data), first_page << PAGE_SHIFT, 0
        while done < data.nbytes:
            try:
                done += uffd.copy(self._fd, to + done, at + done, data.nbytes - done)
            except OSError as error:
                if error.errno in (errno.ESRCH, errno.ENOMEM):
                    raise
                break  # whatever it is, process_vm_writev(2) can or says so
        return done

    def close(self) -> None:
        """Unregister all; what is written stays.

        Leaving write-protect mode walks all page tables to lift protection, a tenth of the time of the whole fill.
        There is none, so another mode is entered first.
        """
        for start, end in self._ranges:
            with contextlib.suppress(OSError):  # the process is gone; or closing does it, and takes longer
                uffd.register_missing(self._fd, start, end)
                uffd.unregister(self._fd, start, end)
        self._ranges, self.starts = [], set()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def is_fresh(vma: VmaState) -> bool:
    """May the VMA be filled by UFFDIO_COPY?"""
    return (
        vma.kind is VmaKind.ANON
        and vma.end - vma.start >= _MIN_VMA_PAGES << PAGE_SHIFT
        and is_filled_writable(vma)
        and not vma.huge
        and not vma.flags & {"hg", "dp"}
    )


def chains(space: AddressSpace) -> list[list[VmaState]]:
    """Adjacent private anonymous VMAs that differ in their protection alone while they are filled, in order.

    These share an anon_vma, so they can merge when they are given one protection.
    """
    found: list[list[VmaState]] = []
    for vma in space.vmas:
        if vma.kind is not VmaKind.ANON:
            continue
        last = found[-1][-1] if found else None
        if last and last.end == vma.start and not (last.flags ^ vma.flags) & FLAGS_BEFORE_CONTENT:
            found[-1].append(vma)
        else:
            found.append([vma])
    return found


def _tells_huge(release: str) -> bool:
    version = re.match(r"(\d+)\.(\d+)", release)
    return version is not None and (int(version[1]), int(version[2])) >= _KERNEL_TELLS_HUGE


def _makes_huge_pages() -> bool:
    """Does the kernel here make huge pages unasked?"""
    try:
        return "[always]" in _THP.read_text()
    except OSError:
        return False
