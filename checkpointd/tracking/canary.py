# SPDX-License-Identifier: Apache-2.0
"""Canaries: pages of the target that tell whether somebody else cleared its soft-dirty bits.

It lies in a mapping which the target can only read and execute: [vdso], its program, its libraries.  After each clear
of ours we write one byte of it again, the same byte, through /proc/PID/mem; the page becomes a private copy with equal
content and reads soft-dirty.  The target cannot write it, so if it reads clean at the next collection, a clear was not
ours.

Whoever clears may write such pages afterwards himself: CRIU puts the start of its parasite into the first executable
mapping's first page, and what was there back after its clear (seen with 3.17).  So there are up to three, in mappings
of their own, none in a first page where there is another, and one that reads clean is enough.  Not in a last page:
injected calls go through the padding there (target/slot.py).

Only while the target stands still.  Raises OSError when the target is gone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from checkpointd.linux import pagemap_scan as ps
from checkpointd.memory import PAGE_SHIFT, PAGE_SIZE, Vma, VmaKind

_READ_EXEC = 5
_MOST = 3


class Canary:
    """A few pages of one target; see the module's text."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._at: list[tuple[int, int, int]] = []  # start and end of the mapping, the page's address

    def set(self, vmas: Sequence[Vma], pagemap: int) -> bool:
        """Make the pages dirty, right after a clear; False when no page of this target can be watched.

        Args:
            vmas: as they are, with flags from after the clear or before it.
        """
        self._at = []
        candidates = [vma for vma in vmas if vma.kind is VmaKind.VDSO]
        candidates += [vma for vma in vmas if vma.kind is VmaKind.FILE_PRIVATE]
        for vma in candidates:
            if vma.prot != _READ_EXEC or vma.shared or vma.nr_pages < 2:
                continue
            address = vma.start + (PAGE_SIZE if vma.nr_pages > 2 else 0)
            # a page that reads dirty whatever we do can tell nothing
            if self._reads_dirty(pagemap, address):
                continue
            self._write(address)
            if self._reads_dirty(pagemap, address):
                self._at.append((vma.start, vma.end, address))
            if len(self._at) == _MOST:
                break
        return bool(self._at)

    def sings(self, vmas: Sequence[Vma], pagemap: int) -> bool:
        """Do all pages still say that nobody but us cleared?  Ask after all bits have been read."""
        known = {(vma.start, vma.end): vma for vma in vmas}
        for start, end, address in self._at:
            vma = known.get((start, end))
            # with VM_SOFTDIRTY it is another mapping than ours was, and reads dirty for that
            if vma is None or "sd" in vma.flags or not self._reads_dirty(pagemap, address):
                return False
        return bool(self._at)

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
