# SPDX-License-Identifier: Apache-2.0
"""The walks over VMAs that have been registered since the last collection: what was written there, armed anew.

Only page tables are asked, so whoever may open the target's pagemap can make them: the tracker itself, or the page
worker while the agent is at other things.

Raises OSError: ESRCH when the address space is gone.
"""

from __future__ import annotations

import numpy as np

from checkpointd.linux import pagemap_scan as ps
from checkpointd.memory import NO_RUNS, PAGE_SHIFT, Runs, Vma, VmaKind, merge_runs, nr_pages_in
from checkpointd.tracking.base import Ranges, Taken, Written
from checkpointd.tracking.presence import PresentRegions, holding_data

_RETURNED = ps.PAGE_IS_WRITTEN | ps.PAGE_IS_PRESENT | ps.PAGE_IS_SWAPPED | ps.PAGE_IS_PFNZERO
_SHIFT = np.uint64(PAGE_SHIFT)


def take_written(pagemap: int, ranges: Ranges, *, has_guard_category: bool) -> Taken:
    """The first walk: arm what was written to, and tell which pages that were.

    It looks and arms at once: nobody can write between the two, so these pages can be read from then on.

    Args:
        ranges: anonymous memory, registered for asynchronous write-protect.
    """
    existing = ps.PAGE_IS_PRESENT | ps.PAGE_IS_SWAPPED
    returned = _RETURNED | (ps.PAGE_IS_GUARD if has_guard_category else 0)
    regions = np.concatenate(
        [
            ps.scan(
                pagemap,
                start,
                end,
                mask=ps.PAGE_IS_WRITTEN,
                anyof=existing,
                returned=returned,
                flags=ps.PM_SCAN_WP_MATCHING,
            )
            for start, end in ranges
        ]
    )
    of = regions[:, 2] & np.uint64(ps.PAGE_IS_PRESENT | ps.PAGE_IS_PFNZERO)
    if ((of & np.uint64(ps.PAGE_IS_PRESENT)) == 0).any():  # swapped out, or a marker
        return Taken(_runs(regions), merge_runs(_holding(pagemap, regions, ranges).runs))
    if (of == np.uint64(ps.PAGE_IS_PRESENT)).all():
        runs = _runs(regions)
        return Taken(runs, runs)
    return Taken(_runs(regions), _runs(regions[of == np.uint64(ps.PAGE_IS_PRESENT)]))


def look_again(pagemap: int, ranges: Ranges, taken: Taken, *, has_guard_category: bool) -> Written:
    """The second walk: what else is no longer what it was, emptied pages and guards.

    Holes are looked at apart, because arming one that was never touched would cost page tables, and after the rest: a
    page that the kernel discards in between (MADV_FREE) is in both, and so is, as WRITTEN, a hole that somebody fills
    in between.
    """
    guard = ps.PAGE_IS_GUARD if has_guard_category else 0
    anyof, returned = ps.PAGE_IS_WRITTEN | guard, _RETURNED | guard
    others = np.concatenate(
        [ps.scan(pagemap, start, end, anyof=anyof, returned=returned) for start, end in ranges]
    )
    # An armed guard page does not read WRITTEN.  What holds data here was filled between the walks, or written again,
    # by somebody who does not stand still.  It is not armed, so the next collection tells of it too.
    holding = others[(others[:, 2] & np.uint64(ps.PAGE_IS_PRESENT | ps.PAGE_IS_SWAPPED)) != 0]
    seen = taken.seen if len(others) == 0 else merge_runs(np.concatenate((taken.seen, _runs(others))))
    if len(holding) == 0:
        return Written(seen, taken.runs, NO_RUNS, nr_pages_in(taken.runs), taken.read)
    more = _holding(pagemap, holding, ranges)
    runs = merge_runs(np.concatenate((taken.runs, more.runs)))
    return Written(seen, runs, more.guards, nr_pages_in(runs), taken.read)


def _runs(regions: ps.Regions) -> Runs:
    starts = regions[:, 0] >> _SHIFT
    return merge_runs(np.stack((starts, (regions[:, 1] >> _SHIFT) - starts), axis=1))


def _holding(pagemap: int, regions: ps.Regions, ranges: Ranges) -> PresentRegions:
    vmas = [Vma(start, end, 0, False, 0, (0, 0), 0, "", False, VmaKind.ANON) for start, end in ranges]
    return holding_data(pagemap, regions, vmas)
