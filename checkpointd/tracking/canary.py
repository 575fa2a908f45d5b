# SPDX-License-Identifier: Apache-2.0
"""The canary: a page of the target that tells whether somebody else cleared its soft-dirty bits.

It is the first page of a mapping which the target can only read and execute: [vdso], or its program.  After each
clear of ours we write one byte of it again, the same byte, through /proc/PID/mem; the page becomes a private copy with
equal content and reads soft-dirty.  The target cannot write it, so if it reads clean at the next collection, a clear
was not ours.  The first page and not the last: injected calls go through the padding at the end (target/slot.py).

Only while the target stands still.  Raises OSError when the target is gone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from checkpointd.linux import pagemap_scan as ps
from checkpointd.memory import PAGE_SHIFT, Vma, VmaKind

_READ_EXEC = 5


class Canary:
    """At most one page of one target; see the module's text."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._at: tuple[int, int] | None = None  # start and end of the mapping

    def set(self, vmas: Sequence[Vma], pagemap: int) -> bool:
        """Make the page dirty, right after a clear; False when no page of this target can be watched.

        Args:
            vmas: as they are, with flags from after the clear or before it.
        """
        self._at = None
        candidates = [vma for vma in vmas if vma.kind is VmaKind.VDSO]
        candidates += [vma for vma in vmas if vma.kind is VmaKind.FILE_PRIVATE]
        for vma in candidates:
            if vma.prot != _READ_EXEC or vma.shared or vma.nr_pages < 2:
                continue
            # a page that reads dirty whatever we do can tell nothing
            if self._reads_dirty(pagemap, vma.start):
                continue
            self._write(vma.start)
            if self._reads_dirty(pagemap, vma.start):
                self._at = (vma.start, vma.end)
                return True
        return False

    def sings(self, vmas: Sequence[Vma], pagemap: int) -> bool:
        """Does the page still say that nobody but us cleared?  Ask after all bits have been read."""
        if self._at is None:
            return False
        for vma in vmas:
            if (vma.start, vma.end) == self._at:
                # with VM_SOFTDIRTY it is another mapping than ours was, and reads dirty for that
                return "sd" not in vma.flags and self._reads_dirty(pagemap, vma.start)
        return False

    def _write(self, address: int) -> None:
        fd = os.open(f"/proc/{self._pid}/mem", os.O_RDWR | os.O_CLOEXEC)
        try:
            os.pwrite(fd, os.pread(fd, 1, address), address)
        finally:
            os.close(fd)

    @staticmethod
    def _reads_dirty(pagemap: int, address: int) -> bool:
        words = ps.read_words(pagemap, address >> PAGE_SHIFT, 1)
        return bool(len(words) and words[0] & np.uint64(ps.PM_SOFT_DIRTY))
