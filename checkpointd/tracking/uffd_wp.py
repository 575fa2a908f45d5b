# SPDX-License-Identifier: Apache-2.0
"""Dirty tracking by asynchronous userfaultfd write-protect and PAGEMAP_SCAN (Linux 6.7).

Every private anonymous VMA of the target is registered with one userfaultfd that belongs to the target's
address space and is held by us.  At the end of each collection every existing page of a registered VMA is
write-protected; the first write lifts that inside the kernel (no message, no wait) and the page reads WRITTEN.

Why it is exact: a new VMA never merges with a registered one (the userfaultfd context is compared), so "is this
VMA tracked" is known per page as WPALLOWED, and a page is clean only if its VMA was registered, the page was
armed, and it is still armed.  Only anonymous VMAs are armed: MADV_GUARD_INSTALL livelocks on armed file and
shared VMAs, and DONTNEED leaves a stale marker there.

Most of a target has been registered for long and has not changed.  Of such a VMA only the pages that read WRITTEN
(or guard) are asked for, and armed by the same walk: 0.5 ms a GiB against 3 to 40 for all of it (measured).  What is
known to have held data then still does, unchanged, unless it is among them: an emptied page reads WRITTEN too, on
kernels where `Features.holes_are_written`; elsewhere everything is looked at each time.

Linux kernel commit 52526ca7fdb9 ("fs/proc/task_mmu: implement IOCTL to get and optionally clear info about
PTEs") (in v6.7); d61ea1cb0095 ("userfaultfd: UFFD_FEATURE_WP_ASYNC") (in v6.7).
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np

from checkpointd import tracepoint
from checkpointd.linux import pagemap_scan as ps
from checkpointd.linux import userfaultfd as uffd
from checkpointd.memory import (
    NO_RUNS,
    PAGE_SHIFT,
    PAGE_SIZE,
    Runs,
    Vma,
    VmaKind,
    intersect_runs,
    merge_runs,
    nr_pages_in,
    subtract_runs,
)
from checkpointd.tracking.base import Collection, Found, Space, TrackingLostError
from checkpointd.tracking.epoch import Epochs
from checkpointd.tracking.presence import PresentRegions, anonymous_only, holding_data, scan_presence

FEATURES = uffd.FEATURE_WP_ASYNC | uffd.FEATURE_WP_UNPOPULATED | uffd.FEATURE_WP_HUGETLBFS_SHMEM
"""The set our kernel facts were found with; HUGETLBFS_SHMEM and UNPOPULATED make WP_ASYNC use markers."""

_MAX_ARM_CALLS = 32
"""Above this many dirty runs a VMA is armed by one walk instead of one call a run.  Chosen, not tuned."""


QUICK_PAGES = 16
"""Smaller VMAs are looked at in full: three calls would cost more."""

_WALK_BESIDE_PAGES = 65_536
"""From so many pages on the second walk takes longer (0.2 ms) than to have another thread do it meanwhile."""

_WRITTEN_RETURNED = ps.PAGE_IS_WRITTEN | ps.PAGE_IS_PRESENT | ps.PAGE_IS_SWAPPED | ps.PAGE_IS_PFNZERO


@dataclass(frozen=True, slots=True)
class _Written:
    """Attributes:
    regions: all that was written, emptied or is a guard, whatever it holds; in any order.
    present: the pages of these that hold data.
    raced: some of them were written while we looked, and `Space.early` was not told of these.
    """

    regions: ps.Regions
    present: PresentRegions
    raced: bool

    def seen(self) -> Runs:
        """The pages of all regions."""
        regions = self.regions
        return merge_runs(
            np.stack((regions[:, 0], regions[:, 1] - regions[:, 0]), axis=1) >> np.uint64(PAGE_SHIFT)
        )


class UffdWpTracker:
    """See the module's text.  Owns `fd`; closing it gives the target back unregistered and unprotected."""

    name = "uffd-wp"
    precision = "exact to 4 KiB pages; a write of the same value counts as a change"
    cost = "0.5 to 0.7 us at the first write to a page after each dump; huge pages written to are split"

    def __init__(self, fd: int, *, has_guard_category: bool, holes_are_written: bool = False) -> None:
        self._fd = fd
        self._has_guard_category = has_guard_category
        self._holes_are_written = holes_are_written
        self._epochs = Epochs()
        self._last: Collection | None = None  # may still have to be worked out
        self._seen: Runs = NO_RUNS  # what held data at the last collection, committed or not
        self._own: Runs = NO_RUNS  # VMAs that were registered by us at the last collection
        self._may_be_stale = False
        self._walker = ThreadPoolExecutor(1, thread_name_prefix="second-walk")
        self._walker_tid = 0

    @property
    def walker_tid(self) -> int:
        """The thread that makes the second walk, for which the target waits; started when first asked for."""
        if not self._walker_tid:
            self._walker_tid = self._walker.submit(threading.get_native_id).result()
        return self._walker_tid

    def collect(self, space: Space) -> Collection:
        self._settle()
        self._epochs.rollback()  # one that was never decided
        known = self._known(space)
        present = self._present(space, known)
        tracepoint.hit("track.scanned")
        try:
            foreign = self._register(space.vmas)
            tracepoint.hit("track.registered")
            if known & foreign:
                # registered for write-protect by somebody else's userfaultfd
                known -= foreign
                present = self._present(space, known)
            return self._collect(space, present, known, foreign)
        except BaseException:
            self._distrust()
            raise

    def _collect(
        self, space: Space, present: PresentRegions, known: set[int], foreign: set[int]
    ) -> Collection:
        """Arm what is not armed yet, and tell what changed.

        Of VMAs known before, what was written is armed and told of already.  What all their other pages are follows
        from that, and is worked out after the thaw (`later`) where the last collection was committed and nothing is
        suspect: each of them is clean then.
        """
        seen, always = self._seen, space.always_dirty
        written = self._take_written(space, sorted(known))
        later = self._epochs.keeps(seen) and len(always) == 0 and not written.raced
        unchanged = NO_RUNS if later else _unchanged(seen, space.vmas, known, written)
        changed = NO_RUNS if later else written.present.runs
        armed = _union(self._armed(space, present, foreign), unchanged)
        # on kernels that leave stale write-protect bits after mremap a moved page may look armed: only the base decides
        clean = self._epochs.clean(armed, always)
        data = _union(present.runs, changed, unchanged)
        dirty = subtract_runs(data, clean)
        self._lift_stale(space, present, foreign)
        anonymous = {n for n, vma in enumerate(space.vmas) if vma.kind is VmaKind.ANON}
        self._own = _ranges(space.vmas, anonymous - foreign)
        tracepoint.hit("track.lifted")
        late = self._arm(space, dirty, foreign | known)
        if len(late):
            dirty, data, clean = _union(dirty, late), _union(data, late), subtract_runs(clean, late)
        tracepoint.hit("track.armed")

        def found() -> Found:
            nr_reported = _nr_written(present) + _nr_written(written.present)
            if not later:
                return self._close(data, Found(clean, dirty, nr_reported), always)
            rest, more = _unchanged(seen, space.vmas, known, written), written.present.runs
            all_found = Found(_union(clean, rest), _union(dirty, more), nr_reported)
            return self._close(_union(data, more, rest), all_found, always)

        self._last = Collection(
            found,
            guards=_union(present.guards, written.present.guards),
            forced=NO_RUNS if later else intersect_runs(dirty, always),
            unread=dirty if later and space.early is not None else None,
        )
        if not later:
            self._settle()
        return self._last

    def _close(self, data: Runs, found: Found, always_dirty: Runs) -> Found:
        self._seen = data
        self._epochs.close(data, found.dirty, always_dirty)
        return found

    def _settle(self) -> None:
        """Work out what the last collection left for later: all else needs it."""
        if self._last is not None:
            _ = self._last.found

    def _known(self, space: Space) -> set[int]:
        """VMAs that have been registered since the last collection, by index: ask for their WRITTEN pages only."""
        if len(self._seen) == 0 or not self._holes_are_written:
            return set()
        return {
            n
            for n, vma in enumerate(space.vmas)
            if vma.nr_pages >= QUICK_PAGES and anonymous_only(vma) and _is_registered(space.pagemap, vma)
        }

    def _present(self, space: Space, known: set[int]) -> PresentRegions:
        """What holds data in all VMAs but these."""
        return scan_presence(
            space.pagemap, space.vmas, has_guard_category=self._has_guard_category, skip=known
        )

    def _take_written(self, space: Space, which: Sequence[int]) -> _Written:
        """Arm what was written to in VMAs registered before, and tell which pages that were; and what else is no
        longer what it was: emptied pages, guards.

        One walk looks and arms: nobody can write between the two, so these pages can be read at once.  Holes are looked
        at apart, because arming one that was never touched would cost page tables, and after it: a page that the kernel
        discards in between (MADV_FREE) is in both, and so is, as WRITTEN, a hole that somebody fills in between.
        """
        guard = ps.PAGE_IS_GUARD if self._has_guard_category else 0
        vmas = [space.vmas[n] for n in which]

        def walk(mask: int, inverted: int, anyof: int, flags: int) -> ps.Regions:
            found = [
                ps.scan(
                    space.pagemap,
                    vma.start,
                    vma.end,
                    mask=mask,
                    inverted=inverted,
                    anyof=anyof,
                    returned=_WRITTEN_RETURNED | guard,
                    flags=flags,
                )
                for vma in vmas
            ]
            return np.concatenate(found) if found else ps.NO_REGIONS

        def look_again() -> ps.Regions:
            tracepoint.hit("track.written")
            return walk(0, 0, ps.PAGE_IS_WRITTEN | guard, 0)

        taken = walk(ps.PAGE_IS_WRITTEN, 0, ps.PAGE_IS_PRESENT | ps.PAGE_IS_SWAPPED, ps.PM_SCAN_WP_MATCHING)
        is_long = sum(vma.nr_pages for vma in vmas) >= _WALK_BESIDE_PAGES
        beside = self._walker.submit(look_again) if is_long else None
        try:
            present = holding_data(space.pagemap, taken, vmas)
            if space.early is not None:
                space.early(present.runs)
        finally:
            if beside is not None:
                wait((beside,))
        others = look_again() if beside is None else beside.result()
        # An armed guard page does not read WRITTEN.  What holds data here was filled between the walks, or written
        # again: by somebody who does not stand still, and it is not armed.
        holding = (others[:, 2] & np.uint64(ps.PAGE_IS_PRESENT | ps.PAGE_IS_SWAPPED)) != 0
        raced = bool((holding & ((others[:, 2] & np.uint64(guard)) == 0)).any())  # guards hold nothing
        if holding.any():
            regions = np.concatenate((taken, others[holding]))
            regions = regions[np.argsort(regions[:, 0], kind="stable")]
            present = holding_data(space.pagemap, regions, vmas)
        return _Written(np.concatenate((taken, others)), present, raced)

    def written_now(self, pid: int) -> Runs:
        """What would be dirty of the pages that held data; the target may be running."""
        if len(self._seen) == 0:
            return NO_RUNS
        pagemap = ps.open_pagemap(pid)
        try:
            start, end = int(self._seen[0, 0]) << PAGE_SHIFT, int(self._seen[-1].sum()) << PAGE_SHIFT
            found = ps.scan(pagemap, start, end, mask=ps.PAGE_IS_WRITTEN, returned=ps.PAGE_IS_WRITTEN)
        finally:
            os.close(pagemap)
        runs = np.stack((found[:, 0], found[:, 1] - found[:, 0]), axis=1) >> np.uint64(PAGE_SHIFT)
        return intersect_runs(merge_runs(runs), self._seen)

    def commit(self) -> None:
        try:
            self._settle()
        except BaseException:
            self._distrust()
            raise
        self._epochs.commit()

    def rollback(self) -> None:
        try:
            self._settle()
        except Exception:  # no memory for it: whoever rolls back has an error to tell already
            self._distrust()
        except BaseException:
            self._distrust()
            raise
        self._epochs.rollback()

    def _distrust(self) -> None:
        """What was armed is not known: nothing is clean until a collection has looked at everything."""
        self._last, self._seen = None, NO_RUNS
        self._epochs.forget()
        self._may_be_stale = True

    def disarm(self) -> None:
        self._walker.shutdown()
        if self._fd >= 0:
            tracepoint.hit("untrack.begin")
            os.close(self._fd)
            self._fd = -1
            tracepoint.hit("untrack.done")

    def _armed(self, space: Space, present: PresentRegions, foreign: set[int]) -> Runs:
        """Pages of VMAs watched by us that nobody has written to since they were armed.

        Somebody else's userfaultfd may have let go of a VMA between the look at its pages, which then tell of his
        arming, and its registration.
        """
        if len(self._epochs.base) == 0:
            return NO_RUNS
        trackable = np.array(
            [vma.kind is VmaKind.ANON and n not in foreign for n, vma in enumerate(space.vmas)], dtype=bool
        )
        armed = (present.categories & np.uint64(ps.PAGE_IS_WPALLOWED | ps.PAGE_IS_WRITTEN)) == np.uint64(
            ps.PAGE_IS_WPALLOWED
        )
        return intersect_runs(merge_runs(present.runs[armed & trackable[present.vma]]), self._own)

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
                    raise TrackingLostError("the process replaced its address space") from error
                # EBUSY: the target's own userfaultfd; EINVAL, EPERM: cannot be registered.  Read in full.
                foreign.add(n)
        return foreign

    def _lift_stale(self, space: Space, present: PresentRegions, foreign: set[int]) -> None:
        """Clear write-protect bits that outlived the registration of their VMA.

        mremap(2) that moves a registered VMA next to another merges the two and then drops the registration of
        the whole (mremap_userfaultfd_prep), without touching the neighbour's pages: these keep the bit, become
        writable with it, and once registered again would never read WRITTEN.  Seen on 6.18 by the oracle.  Such a
        page is the only kind that is neither WPALLOWED nor WRITTEN; but a collection that failed has registered its
        VMA, and it looks like an armed one then.
        """
        stale = (present.categories & np.uint64(ps.PAGE_IS_WPALLOWED | ps.PAGE_IS_WRITTEN)) == 0
        wanted = range(len(space.vmas)) if self._may_be_stale else sorted(set(present.vma[stale].tolist()))
        for n in wanted:
            vma = space.vmas[n]
            if vma.kind is VmaKind.ANON and n not in foreign:
                uffd.lift_protection(self._fd, vma.start, vma.end)
        self._may_be_stale = False

    def _arm(self, space: Space, dirty: Runs, skip: set[int]) -> Runs:
        """Write-protect what the next epoch must watch: pages that were armed before still are.

        Args:
            skip: VMAs that are armed already, or are memory of somebody else's userfaultfd: that is left alone, it may
                be his own asynchronous write-protection.

        Returns:
            Pages that hold data and were armed though not in `dirty`: written since they were looked at, by somebody
            who does not stand still (a kernel worker, process_vm_writev of another process).  They are dirty too.
        """
        wanted = subtract_runs(dirty, _ranges(space.vmas, skip))
        if len(wanted) == 0:
            return NO_RUNS
        starts = wanted[:, 0] << np.uint64(PAGE_SHIFT)
        ends = (wanted[:, 0] + wanted[:, 1]) << np.uint64(PAGE_SHIFT)
        if len(wanted) <= _MAX_ARM_CALLS:
            for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
                ps.write_protect(space.pagemap, start, end)
            return NO_RUNS
        armed = []
        for n, vma in enumerate(space.vmas):
            if vma.kind is not VmaKind.ANON or n in skip:
                continue
            first = int(np.searchsorted(ends, vma.start, side="right"))
            last = int(np.searchsorted(starts, vma.end, side="left"))
            if first < last:
                armed.append(
                    ps.scan(
                        space.pagemap,
                        max(vma.start, int(starts[first])),
                        min(vma.end, int(ends[last - 1])),
                        mask=ps.PAGE_IS_WRITTEN,
                        anyof=ps.PAGE_IS_PRESENT | ps.PAGE_IS_SWAPPED,
                        returned=ps.PAGE_IS_PRESENT | ps.PAGE_IS_SWAPPED | ps.PAGE_IS_PFNZERO,
                        flags=ps.PM_SCAN_WP_MATCHING,
                    )
                )
        if not armed:
            return NO_RUNS
        return subtract_runs(
            merge_runs(holding_data(space.pagemap, np.concatenate(armed), space.vmas).runs), dirty
        )


def _is_registered(pagemap: int, vma: Vma) -> bool:
    """Is the VMA registered for asynchronous write-protect?  One page is asked about: it is a property of VMAs."""
    wanted = ps.PAGE_IS_WPALLOWED
    return len(ps.scan(pagemap, vma.start, vma.start + PAGE_SIZE, mask=wanted, returned=wanted)) > 0


def _ranges(vmas: Sequence[Vma], which: set[int]) -> Runs:
    rows = [(vmas[n].first_page, vmas[n].nr_pages) for n in sorted(which)]
    return merge_runs(np.array(rows, dtype=np.uint64).reshape(-1, 2))


def _union(*parts: Runs) -> Runs:
    full = [part for part in parts if len(part)]
    return merge_runs(full[0] if len(full) == 1 else np.concatenate(full)) if full else NO_RUNS


def _unchanged(seen: Runs, vmas: Sequence[Vma], known: set[int], written: _Written) -> Runs:
    """What held data in these VMAs, and still holds it: all but what was written or emptied."""
    return subtract_runs(intersect_runs(seen, _ranges(vmas, known)), written.seen())


def _nr_written(present: PresentRegions) -> int:
    written = (present.categories & np.uint64(ps.PAGE_IS_WRITTEN)) != 0
    return nr_pages_in(present.runs[written])
