# SPDX-License-Identifier: Apache-2.0
"""Dirty tracking by the soft-dirty bit of page table entries (CONFIG_MEM_SOFT_DIRTY).

A collection reads bit 55 of every page that holds data, then writes 4 to clear_refs.  Three ways, one class:

* *plain*: what the kernel gives.  New memory that merges with old makes the old read dirty, and where merges lose
  VM_SOFTDIRTY (before Linux 6.19) a clean bit proves nothing at all, so everything is read;
* *patched*: the kernel of kernel-shim/patches keeps clean and new mappings apart once the target has switched it on;
* *barrier*: a userfaultfd of the target is registered on its anonymous memory and protects nothing.  No fault is
  delivered, but registered and new mappings do not merge (kernel_shim.emulation).

What a clean bit is worth in a VMA is `kernel_shim.emulation.trust`; whatever is not EXACT is called dirty, and the
image room compares it with the parent by digest.  Beyond that rule a page is called clean only if

* it held data at the last committed collection: mremap(2) moves whole page tables without marking the entries, and
  a discarded page that reads as zeroes is clean too;
* nothing can have been moved there that way: the kernel marks moved tables (`marks_moves`), or the VMA is behind the
  barrier, which a move leaves;
* the canary says that nobody else cleared (tracking/canary.py), and KSM has not worked since (procfs/ksm.py).

Linux kernel commit 0f8975ec4db2 ("mm: soft-dirty bits for user memory changes tracking") (in v3.11).
"""

from __future__ import annotations

import contextlib
import errno
import os

import numpy as np
import numpy.typing as npt
from kernel_shim.emulation import MergeBarrier, Mode, Trust, trust

from checkpointd.linux import pagemap_scan as ps
from checkpointd.linux import userfaultfd as uffd
from checkpointd.memory import (
    NO_RUNS,
    PAGE_SHIFT,
    Runs,
    Vma,
    VmaKind,
    intersect_runs,
    merge_runs,
    nr_pages_in,
    subtract_runs,
)
from checkpointd.procfs import clear_refs, ksm, maps
from checkpointd.tracking.base import Collection, Found, Space, TrackingLostError
from checkpointd.tracking.canary import Canary
from checkpointd.tracking.epoch import Epochs
from checkpointd.tracking.presence import PresentRegions, Sight, look
from checkpointd.tracking.presence_words import MAYBE_ZERO

NAMES = {Mode.PLAIN: "soft-dirty", Mode.PATCHED: "precise-soft-dirty", Mode.BARRIER: "barrier-soft-dirty"}
_PRECISION = {
    Mode.PLAIN: "whole mappings when new memory joins old ones; huge pages as a whole",
    Mode.PATCHED: "exact to 4 KiB pages; huge pages as a whole",
    Mode.BARRIER: "exact to 4 KiB pages; huge pages as a whole",
}
_COST = {
    Mode.PLAIN: "a page fault at the first write to a page after each dump",
    Mode.PATCHED: "a page fault at the first write to a page after each dump; more mappings between two dumps",
    Mode.BARRIER: "a page fault at the first write to a page after each dump; more mappings, "
    "and no userfaultfd of its own there",
}


class _Seen:
    """A VMA in the words of kernel_shim."""

    def __init__(self, vma: Vma) -> None:
        self.start, self.end, self.flags = vma.start, vma.end, vma.flags
        self.private_anonymous = vma.kind is VmaKind.ANON


class SoftDirtyTracker:
    """See the module's text.

    Attributes:
        mode: which way.
        turned_on: the switch was turned on for us, and is to be turned off after us.

    Args:
        pid: the target.
        mode: PATCHED needs the switch on in the target; BARRIER needs `fd`.
        fd: a userfaultfd of the target's address space, owned from now on; -1 without.
        keeps_writes: merges lose no VM_SOFTDIRTY here (`kernel_shim.probe`).
        marks_moves: the pages of moved page tables are marked here (`kernel_shim.probe`).
    """

    def __init__(
        self,
        pid: int,
        mode: Mode,
        sight: Sight,
        *,
        fd: int = -1,
        keeps_writes: bool,
        marks_moves: bool = False,
    ) -> None:
        self.name = NAMES[mode]
        self.precision = _PRECISION[mode]
        self.cost = _COST[mode]
        self.mode, self.turned_on = mode, False
        self._pid, self._sight, self._fd = pid, sight, fd
        self._keeps_writes, self._marks_moves = keeps_writes, marks_moves
        self._barrier = MergeBarrier(self._register)
        self._canary = Canary(pid)
        self._ksm: ksm.KsmActivity | None = None
        self._epochs = Epochs()

    def collect(self, space: Space) -> Collection:
        self._epochs.rollback()  # one that was never decided
        # flags of this very moment: `sd`, `mg` and `uw` change without a trace in maps
        vmas = maps.read_smaps(self._pid)
        present = look(space, self._sight, soft_dirty=True)
        data = merge_runs(present.runs)
        trusted = self._trusted(space, vmas, present)
        lost = len(self._epochs.base) > 0 and not self._canary.sings(vmas, space.pagemap)
        worked = self._ksm is not None and not ksm.was_idle(self._ksm, ksm.read_activity())
        is_dirty = (present.categories & np.uint64(ps.PAGE_IS_SOFT_DIRTY)) != 0
        clean = NO_RUNS
        if not (lost or worked):
            clean = self._epochs.clean(present.runs[trusted & ~is_dirty], space.always_dirty)
        dirty = subtract_runs(data, clean)
        self._epochs.close(data, dirty, space.always_dirty)
        self._begin_epoch(space, vmas)
        if lost:
            raise TrackingLostError(
                "somebody else cleared the soft-dirty bits, or the program was replaced"
                if self._canary.sings(maps.read_smaps(self._pid), space.pagemap)
                else "no page of the target can tell whether somebody else clears soft-dirty bits"
            )
        return Collection(
            Found(clean, dirty, nr_pages_in(present.runs[is_dirty])),
            guards=present.guards,
            forced=intersect_runs(dirty, space.always_dirty),
        )

    def commit(self) -> None:
        self._epochs.commit()

    def rollback(self) -> None:
        self._epochs.rollback()

    def disarm(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    # -- which clean bits are believed

    def _trusted(self, space: Space, vmas: list[Vma], present: PresentRegions) -> npt.NDArray[np.bool_]:
        """For each region: would a clean bit mean unchanged?"""
        unsafe = [NO_RUNS]
        for vma in vmas:
            seen = _Seen(vma)
            behind = self.mode is Mode.BARRIER and self._barrier.covers(seen)
            verdict = trust(seen, self.mode, keeps_writes=self._keeps_writes, registered=behind)
            # what a VMA looks like now bounds nothing: a moved table may have been cut to pieces since
            if verdict is not Trust.EXACT or not (behind or self._marks_moves):
                unsafe.append(_runs_of(vma.start, vma.end))
        believed = np.array([vma.kind is VmaKind.ANON for vma in space.vmas] or [False], dtype=bool)[
            present.vma
        ]
        believed &= (present.categories & np.uint64(MAYBE_ZERO)) == 0
        bad = merge_runs(np.concatenate(unsafe))
        if len(bad):
            # regions are cut at the borders of what maps showed before; a piece in doubt spoils its region
            first, nr = present.runs[:, 0], present.runs[:, 1]
            at = np.searchsorted(bad[:, 0] + bad[:, 1], first, side="right")
            inside = at < len(bad)
            at[~inside] = 0
            believed &= ~(inside & (bad[at, 0] < first + nr))
        return believed

    # -- the next epoch

    def _begin_epoch(self, space: Space, vmas: list[Vma]) -> None:
        self._ksm = ksm.read_activity()
        try:
            clear_refs.clear_soft_dirty(self._pid)
            if self.mode is Mode.BARRIER:
                # after the clear: registering merges neighbours that became alike, and one may still carry the flag
                self._barrier.extend([_Seen(vma) for vma in vmas])
        except OSError as error:
            if error.errno in (errno.ENOMEM, errno.ESRCH):
                raise TrackingLostError("the process replaced its address space") from error
            raise
        with contextlib.suppress(OSError):
            self._canary.set(vmas, space.pagemap)

    def _register(self, start: int, end: int) -> None:
        uffd.register_wp(self._fd, start, end)


def _runs_of(start: int, end: int) -> Runs:
    return np.array([[start >> PAGE_SHIFT, (end - start) >> PAGE_SHIFT]], dtype=np.uint64)
