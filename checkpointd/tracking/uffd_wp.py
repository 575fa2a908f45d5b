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
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace

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
from checkpointd.tracking.base import (
    NOTHING_WRITTEN,
    Collection,
    Found,
    Ranges,
    Space,
    Taken,
    TrackingLostError,
    Written,
)
from checkpointd.tracking.epoch import Epochs
from checkpointd.tracking.presence import PresentRegions, anonymous_only, holding_data, scan_presence
from checkpointd.tracking.walks import look_again, take_written

FEATURES = uffd.FEATURE_WP_ASYNC | uffd.FEATURE_WP_UNPOPULATED | uffd.FEATURE_WP_HUGETLBFS_SHMEM
"""The set our kernel facts were found with; HUGETLBFS_SHMEM and UNPOPULATED make WP_ASYNC use markers."""

_MAX_ARM_CALLS = 32
"""Above this many dirty runs a VMA is armed by one walk instead of one call a run.  Chosen, not tuned."""


QUICK_PAGES = 16
"""Smaller VMAs are looked at in full: three calls would cost more."""


@dataclass(frozen=True, slots=True)
class _Begun:
    """A collection under way.

    Attributes:
        known: VMAs that have been registered since the last collection, by index.
        present: what holds data in all others.
        foreign: which of those known are of somebody else's userfaultfd now.
        taken: waits for what was written in those known; None: there are none.
    """

    space: Space
    known: frozenset[int]
    present: PresentRegions
    foreign: frozenset[int]
    taken: Callable[[], Taken] | None


@dataclass(frozen=True, slots=True)
class _Looked:
    """Of the VMAs that were looked at in full: what holds data, and which of it changed."""

    data: Runs
    clean: Runs
    dirty: Runs


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
        self._begun: _Begun | None = None

    def collect(self, space: Space) -> Collection:
        self.begin(space)
        return self.finish()

    def begin(self, space: Space) -> bool:
        """The first part of a collection; `finish`, the rest of it, must come before the thaw too, or what was armed is
        not known (`rollback` then forgets everything).

        Returns:
            `space.walk` is at work: what comes in between is gained.

        Raises:
            TrackingLostError: see `Tracker.collect`.
        """
        self._settle()
        self._epochs.rollback()  # one that was never decided
        try:
            known = self._known(space)
            foreign = self._register(space.vmas, known)
            # what is registered for write-protect by somebody else's userfaultfd is looked at as all the rest
            known -= foreign
            taken = self._walk(space, known) if known else None
            present = scan_presence(
                space.pagemap, space.vmas, has_guard_category=self._has_guard_category, skip=known
            )
            tracepoint.hit("track.scanned")
            self._begun = _Begun(space, frozenset(known), present, frozenset(foreign), taken)
        except BaseException:
            self._distrust()
            raise
        return space.walk is not None and taken is not None

    @property
    def has_begun(self) -> bool:
        """Is it for `finish` to be called?"""
        return self._begun is not None

    def _walk(self, space: Space, known: set[int]) -> Callable[[], Taken]:
        """Have armed what was written in VMAs registered before."""
        ranges = _addresses(space.vmas, known)
        if space.walk is not None:
            return space.walk(ranges, self._has_guard_category)
        taken = take_written(space.pagemap, ranges, has_guard_category=self._has_guard_category)
        return lambda: taken

    def finish(self) -> Collection:
        """What `begin` began.

        Of VMAs known before, what was written is armed and told of already.  What all their other pages are follows
        from that, and is worked out after the thaw (`later`) where the last collection was committed and nothing is
        suspect: each of them is clean then.

        Raises:
            TrackingLostError: see `Tracker.collect`.
            CheckpointError: whoever walked has failed.
        """
        begun, self._begun = self._begun, None
        assert begun is not None, "begin comes first"
        try:
            pagemap = ps.open_pagemap(begun.space.pid)
            try:
                self._last = self._finish(begun, replace(begun.space, pagemap=pagemap))
            finally:
                os.close(pagemap)
        except BaseException:
            self._distrust()
            raise
        return self._last

    def _finish(self, begun: _Begun, space: Space) -> Collection:
        vmas, always, seen = space.vmas, space.always_dirty, self._seen
        foreign = begun.foreign | self._register(vmas, set(range(len(vmas))) - begun.known - begun.foreign)
        tracepoint.hit("track.registered")
        looked = self._look_at_the_rest(space, begun, foreign)
        tracepoint.hit("track.armed")
        written = NOTHING_WRITTEN
        if begun.taken is not None:
            tracepoint.hit("track.written")
            written = look_again(
                space.pagemap,
                _addresses(vmas, begun.known),
                begun.taken(),
                has_guard_category=self._has_guard_category,
            )
        later = self._epochs.keeps(seen) and len(always) == 0
        known, more = _ranges(vmas, begun.known), written.runs
        unread = NO_RUNS if written.read is more else subtract_runs(more, written.read)

        def found() -> Found:
            rest = _unchanged(seen, known, written)
            clean = rest if later else self._epochs.clean(rest, always)
            dirty = _union(looked.dirty, more, NO_RUNS if later else subtract_runs(rest, clean))
            self._seen = data = _union(looked.data, more, rest)
            self._epochs.close(data, dirty, always)
            return Found(_union(looked.clean, clean), dirty, _nr_written(begun.present) + written.nr_reported)

        collection = Collection(
            found,
            guards=_union(begun.present.guards, written.guards),
            unread=_union(looked.dirty, unread) if later else None,
        )
        if not later:
            collection.forced = intersect_runs(collection.dirty, always)
        return collection

    def _look_at_the_rest(self, space: Space, begun: _Begun, foreign: frozenset[int]) -> _Looked:
        """Of VMAs not known before: arm what is not armed yet, and tell what changed."""
        present, always = begun.present, space.always_dirty
        # on kernels that leave stale write-protect bits after mremap a moved page may look armed: only the base decides
        clean = self._epochs.clean(self._armed(space, present, foreign), always)
        data = merge_runs(present.runs)
        dirty = subtract_runs(data, clean)
        self._lift_stale(space, present, foreign)
        anonymous = {n for n, vma in enumerate(space.vmas) if vma.kind is VmaKind.ANON}
        self._own = _ranges(space.vmas, anonymous - foreign)
        tracepoint.hit("track.lifted")
        late = self._arm(space, dirty, foreign | begun.known)
        if len(late):
            dirty, data, clean = _union(dirty, late), _union(data, late), subtract_runs(clean, late)
        return _Looked(data, clean, dirty)

    def _settle(self) -> None:
        """Work out what the last collection left for later: all else needs it.

        One that was not finished cannot be any more: its mappings are those of a freeze that has ended.
        """
        if self._begun is not None:
            self._distrust()
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

    @property
    def held(self) -> Runs:
        """What held data at the last collection."""
        return self._seen

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
        self._begun, self._last, self._seen = None, None, NO_RUNS
        self._epochs.forget()
        self._may_be_stale = True

    def disarm(self) -> None:
        if self._fd >= 0:
            tracepoint.hit("untrack.begin")
            os.close(self._fd)
            self._fd = -1
            tracepoint.hit("untrack.done")

    def _armed(self, space: Space, present: PresentRegions, foreign: Set[int]) -> Runs:
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

    def _register(self, vmas: tuple[Vma, ...], which: set[int]) -> set[int]:
        """Register what can be of these; the indices of VMAs that belong to somebody else's userfaultfd."""
        foreign: set[int] = set()
        for n in sorted(which):
            vma = vmas[n]
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

    def _lift_stale(self, space: Space, present: PresentRegions, foreign: Set[int]) -> None:
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

    def _arm(self, space: Space, dirty: Runs, skip: Set[int]) -> Runs:
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


def _addresses(vmas: Sequence[Vma], which: Set[int]) -> Ranges:
    return [(vmas[n].start, vmas[n].end) for n in sorted(which)]


def _ranges(vmas: Sequence[Vma], which: Set[int]) -> Runs:
    rows = [(vmas[n].first_page, vmas[n].nr_pages) for n in sorted(which)]
    return merge_runs(np.array(rows, dtype=np.uint64).reshape(-1, 2))


def _union(*parts: Runs) -> Runs:
    full = [part for part in parts if len(part)]
    return merge_runs(full[0] if len(full) == 1 else np.concatenate(full)) if full else NO_RUNS


def _unchanged(seen: Runs, known: Runs, written: Written) -> Runs:
    """What held data in VMAs known before, and still holds it: all but what was written or emptied."""
    return subtract_runs(intersect_runs(seen, known), written.seen)


def _nr_written(present: PresentRegions) -> int:
    written = (present.categories & np.uint64(ps.PAGE_IS_WRITTEN)) != 0
    return nr_pages_in(present.runs[written])
