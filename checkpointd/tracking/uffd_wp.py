# SPDX-License-Identifier: Apache-2.0
"""Dirty tracking by asynchronous userfaultfd write-protect and PAGEMAP_SCAN (Linux 6.7).

Every private anonymous VMA of the target is registered with one userfaultfd that belongs to the target's
address space and is held by us.  At the end of each collection every existing page of a registered VMA is
write-protected; the first write lifts that inside the kernel (no message, no wait) and the page reads WRITTEN.

Why it is exact: a new VMA never merges with a registered one (the userfaultfd context is compared), so "is this
VMA tracked" is known per page as WPALLOWED, and a page is clean only if its VMA was registered, the page was
armed, and it is still armed.  Only anonymous VMAs are armed: MADV_GUARD_INSTALL livelocks on armed file and
shared VMAs, and DONTNEED leaves a stale marker there.

Linux kernel commit 52526ca7fdb9 ("fs/proc/task_mmu: implement IOCTL to get and optionally clear info about
PTEs") (in v6.7); d61ea1cb0095 ("userfaultfd: UFFD_FEATURE_WP_ASYNC") (in v6.7).
"""

from __future__ import annotations

import errno
import os

import numpy as np

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
from checkpointd.tracking.base import Collection, Space, TrackingLostError
from checkpointd.tracking.presence import PresentRegions, scan_presence

FEATURES = uffd.FEATURE_WP_ASYNC | uffd.FEATURE_WP_UNPOPULATED | uffd.FEATURE_WP_HUGETLBFS_SHMEM
"""The set our kernel facts were found with; HUGETLBFS_SHMEM and UNPOPULATED make WP_ASYNC use markers."""

_MAX_ARM_CALLS = 32
"""Above this many dirty runs a VMA is armed by one walk instead of one call a run.  Chosen, not tuned."""


class UffdWpTracker:
    """See the module's text.  Owns `fd`; closing it gives the target back unregistered and unprotected."""

    name = "uffd-wp"
    precision = "exact to 4 KiB pages; a write of the same value counts as a change"
    cost = "0.5 to 0.7 us at the first write to a page after each dump; huge pages written to are split"

    def __init__(self, fd: int, *, has_guard_category: bool) -> None:
        self._fd = fd
        self._has_guard_category = has_guard_category
        self._base: Runs = NO_RUNS  # what held data at the last committed collection
        self._carried: Runs = NO_RUNS  # reported by collections that were rolled back
        self._pending: tuple[Runs, Runs] | None = None  # (data, dirty) of the collection not yet decided
        self._lost = False

    def collect(self, space: Space) -> Collection:
        present = scan_presence(space.pagemap, space.vmas, has_guard_category=self._has_guard_category)
        data = merge_runs(present.runs)
        foreign = self._register(space.vmas)
        clean = self._clean(space, present, foreign)
        dirty = subtract_runs(data, clean)
        self._pending = (data, dirty)
        self._lift_stale(space, present, foreign)
        self._arm(space, dirty)
        return Collection(
            clean=clean,
            dirty=dirty,
            guards=present.guards,
            nr_reported=self._nr_reported(present),
            forced=intersect_runs(dirty, space.always_dirty),
        )

    def commit(self) -> None:
        if self._pending is not None:
            self._base = self._pending[0]
            self._carried = NO_RUNS
            self._pending = None

    def rollback(self) -> None:
        if self._pending is not None:
            self._carried = merge_runs(np.concatenate((self._carried, self._pending[1])))
            self._pending = None

    def disarm(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _clean(self, space: Space, present: PresentRegions, foreign: set[int]) -> Runs:
        if len(self._base) == 0:
            return NO_RUNS
        trackable = np.array(
            [vma.kind is VmaKind.ANON and n not in foreign for n, vma in enumerate(space.vmas)], dtype=bool
        )
        armed = (present.categories & np.uint64(ps.PAGE_IS_WPALLOWED | ps.PAGE_IS_WRITTEN)) == np.uint64(
            ps.PAGE_IS_WPALLOWED
        )
        clean = merge_runs(present.runs[armed & trackable[present.vma]])
        # on kernels that leave stale write-protect bits after mremap a moved page may look armed
        clean = intersect_runs(clean, self._base)
        for unsafe in (self._carried, space.always_dirty):
            if len(unsafe):
                clean = subtract_runs(clean, unsafe)
        return clean

    def _nr_reported(self, present: PresentRegions) -> int:
        written = (present.categories & np.uint64(ps.PAGE_IS_WRITTEN)) != 0
        return nr_pages_in(present.runs[written])

    def _register(self, vmas: tuple[Vma, ...]) -> set[int]:
        """Register what can be; the indices of VMAs that belong to somebody else's userfaultfd."""
        foreign: set[int] = set()
        for n, vma in enumerate(vmas):
            if vma.kind is not VmaKind.ANON:
                continue
            try:
                uffd.register_wp(self._fd, vma.start, vma.end)
            except OSError as error:
                if error.errno == errno.ENOMEM:
                    # the address space this userfaultfd was made for is gone (exec)
                    self._lost = True
                    raise TrackingLostError("the process replaced its address space") from error
                # EBUSY: the target's own userfaultfd; EINVAL, EPERM: cannot be registered.  Read in full.
                foreign.add(n)
        return foreign

    def _lift_stale(self, space: Space, present: PresentRegions, foreign: set[int]) -> None:
        """Clear write-protect bits that outlived the registration of their VMA.

        mremap(2) that moves a registered VMA next to another merges the two and then drops the registration of
        the whole (mremap_userfaultfd_prep), without touching the neighbour's pages: these keep the bit, become
        writable with it, and once registered again would never read WRITTEN.  Seen on 6.18 by the oracle.  Such a
        page is the only kind that is neither WPALLOWED nor WRITTEN.
        """
        stale = (present.categories & np.uint64(ps.PAGE_IS_WPALLOWED | ps.PAGE_IS_WRITTEN)) == 0
        for n in np.unique(present.vma[stale]).tolist():
            vma = space.vmas[n]
            if vma.kind is VmaKind.ANON and n not in foreign:
                uffd.lift_protection(self._fd, vma.start, vma.end)

    def _arm(self, space: Space, dirty: Runs) -> None:
        """Write-protect what the next epoch must watch: pages that were armed before still are."""
        if len(dirty) == 0:
            return
        starts = dirty[:, 0] << np.uint64(PAGE_SHIFT)
        ends = (dirty[:, 0] + dirty[:, 1]) << np.uint64(PAGE_SHIFT)
        if len(dirty) <= _MAX_ARM_CALLS:
            for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
                ps.write_protect(space.pagemap, start, end)
            return
        for vma in space.vmas:
            if vma.kind is not VmaKind.ANON:
                continue
            first = int(np.searchsorted(ends, vma.start, side="right"))
            last = int(np.searchsorted(starts, vma.end, side="left"))
            if first < last:
                ps.write_protect(
                    space.pagemap, max(vma.start, int(starts[first])), min(vma.end, int(ends[last - 1]))
                )
