# SPDX-License-Identifier: Apache-2.0
"""Which private pages of a frozen address space hold data, by the rule of docs/kernel-support.md.

* anonymous VMA: the page is present and not the shared zero page, or really swapped out;
* file-private VMA: the page is anonymous (copied on write), swapped out, or the shared zero page, which stands for a
  copy (UFFDIO_ZEROPAGE, KSM) and not for the file; all else is the file's;
* hugetlb private VMA: as file-private ones, but pages of a pool are never swapped out: what reads SWAPPED is being
  moved in memory, and is waited for, or a marker;
* pte markers (uffd-wp, guard) look SWAPPED and hold nothing.

A page that holds no data is not in the image: restore gives zeroes, or the file.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from checkpointd.linux import pagemap_scan as ps
from checkpointd.memory import PAGE_SHIFT, TASK_SIZE, Runs, Vma, VmaKind, merge_runs
from checkpointd.tracking.base import Space
from checkpointd.tracking.pool_pages import scan_at_rest
from checkpointd.tracking.presence_words import scan_words

BoolArray = npt.NDArray[np.bool_]

_RETURNED = (
    ps.PAGE_IS_WPALLOWED | ps.PAGE_IS_WRITTEN | ps.PAGE_IS_PRESENT | ps.PAGE_IS_SWAPPED | ps.PAGE_IS_PFNZERO
)

_APART_PAGES = 64
"""Smaller anonymous VMAs are scanned together with what lies around them.  Chosen: a call costs some 20 pages."""


@dataclass(frozen=True, slots=True)
class PresentRegions:
    """Regions of pages that hold data (or are guards), each inside one VMA.

    Attributes:
        runs: (n, 2) first page and count.
        categories: (n,) PAGE_IS_* bits.
        vma: (n,) index into the VMAs given.
        guards: runs of guard pages.
    """

    runs: Runs
    categories: npt.NDArray[np.uint64]
    vma: npt.NDArray[np.int64]
    guards: Runs


def private_data(vma: Vma) -> bool:
    """May this VMA hold pages of its own?"""
    return vma.kind in (VmaKind.ANON, VmaKind.FILE_PRIVATE) or (
        vma.kind is VmaKind.HUGETLB and not vma.shared
    )


def anonymous_only(vma: Vma) -> bool:
    """Can no page of this VMA be a file's?"""
    return vma.kind is VmaKind.ANON and vma.inode == 0


@dataclass(frozen=True, slots=True)
class Sight:
    """How pages are looked at on this kernel.

    Attributes:
        has_scan: PAGEMAP_SCAN exists; else plain pagemap words are read.
        has_guard_category: PAGEMAP_SCAN knows guard regions.
    """

    has_scan: bool = True
    has_guard_category: bool = False


def look(space: Space, sight: Sight, *, soft_dirty: bool = False) -> PresentRegions:
    """All pages that hold data, by the means this kernel has.

    Args:
        soft_dirty: tell PAGE_IS_SOFT_DIRTY in the categories.

    Raises:
        OSError: ENOTTY where `sight` is wrong about PAGEMAP_SCAN; ESRCH when the address space is gone.
        CheckpointError: a page of a hugetlb pool is neither there nor absent.
    """
    if sight.has_scan:
        return scan_presence(
            space.pagemap, space.vmas, has_guard_category=sight.has_guard_category, soft_dirty=soft_dirty
        )
    wanted = [vma for vma in space.vmas if private_data(vma)]
    return holding_data(
        space.pagemap, scan_words(space.pid, space.pagemap, wanted, soft_dirty=soft_dirty), space.vmas
    )


def scan_presence(
    pagemap: int,
    vmas: Sequence[Vma],
    *,
    has_guard_category: bool,
    skip: Set[int] = frozenset(),
    soft_dirty: bool = False,
) -> PresentRegions:
    """PAGEMAP_SCAN over the address space, cut at VMA borders and filtered by the rule above.

    Args:
        skip: indices of VMAs that are left out.
        soft_dirty: tell PAGE_IS_SOFT_DIRTY too.

    Raises:
        OSError: ENOTTY without PAGEMAP_SCAN; ESRCH when the address space is gone.
        CheckpointError: a page of a hugetlb pool is neither there nor absent.
    """
    returned = _RETURNED | (ps.PAGE_IS_GUARD if has_guard_category else 0)
    returned |= ps.PAGE_IS_SOFT_DIRTY if soft_dirty else 0

    def regions() -> ps.Regions:
        found = [
            ps.scan(
                pagemap,
                start,
                end,
                anyof=ps.PAGE_IS_PRESENT | ps.PAGE_IS_SWAPPED,
                returned=returned if anonymous else returned | ps.PAGE_IS_FILE,
            )
            for start, end, anonymous in _stretches(vmas, skip)
        ]
        return np.concatenate(found) if found else ps.NO_REGIONS

    return holding_data(pagemap, scan_at_rest(regions, vmas), vmas)


def _stretches(vmas: Sequence[Vma], skip: Set[int]) -> list[tuple[int, int, bool]]:
    """(start, end, holds anonymous memory alone): what is scanned in one call.

    Whether a page is a file's is read from its struct page, for each page a cache miss: of a gigabyte some 40 ms
    against 3 (measured).  So large anonymous VMAs are scanned apart, without asking.
    """
    found: list[tuple[int, int, bool]] = []
    goes_on = False  # may the next VMA join the stretch before it?
    for n, vma in enumerate(vmas):
        large = vma.nr_pages >= _APART_PAGES
        if n in skip or vma.end > TASK_SIZE or (large and not private_data(vma)):
            goes_on = False
            continue
        apart = large and anonymous_only(vma)
        if goes_on and found[-1][2] == apart and (not apart or found[-1][1] == vma.start):
            found[-1] = (found[-1][0], vma.end, apart)
        else:
            found.append((vma.start, vma.end, apart))
        goes_on = True
    return found


def holding_data(pagemap: int, regions: ps.Regions, vmas: Sequence[Vma]) -> PresentRegions:
    """Of regions scanned, in order, those that hold data or are guards, cut at the borders of the VMAs."""
    regions, vma_at = _cut(regions, vmas)
    categories = regions[:, 2]
    present = (categories & np.uint64(ps.PAGE_IS_PRESENT)) != 0
    swapped = ((categories & np.uint64(ps.PAGE_IS_SWAPPED)) != 0) & ~present
    guard = (categories & np.uint64(ps.PAGE_IS_GUARD)) != 0
    runs = np.stack(
        (regions[:, 0] >> np.uint64(PAGE_SHIFT), (regions[:, 1] - regions[:, 0]) >> np.uint64(PAGE_SHIFT)),
        axis=1,
    )

    own = np.array([private_data(vma) for vma in vmas] or [False], dtype=bool)[vma_at]
    huge = np.array([vma.kind is VmaKind.HUGETLB for vma in vmas] or [False], dtype=bool)[vma_at]
    is_file = (categories & np.uint64(ps.PAGE_IS_FILE)) != 0
    is_zero = (categories & np.uint64(ps.PAGE_IS_PFNZERO)) != 0
    holds = own & present & ~is_file
    if is_zero.any():
        of_file = np.array([vma.kind is VmaKind.FILE_PRIVATE for vma in vmas], dtype=bool)[vma_at]
        holds &= ~is_zero | of_file
    maybe = np.flatnonzero(own & swapped & ~huge & ~guard)
    if len(maybe) == 0:
        keep = np.flatnonzero(holds)
        return PresentRegions(runs[keep], categories[keep], vma_at[keep], merge_runs(runs[guard & own]))

    # SWAPPED is either data or a marker: only the pagemap words tell
    extra_runs, extra_cats, extra_vma = [], [], []
    for n in maybe.tolist():
        first, nr = int(runs[n, 0]), int(runs[n, 1])
        file_backed = vmas[int(vma_at[n])].kind is VmaKind.FILE_PRIVATE
        real = ps.swapped_data(pagemap, first, nr, file_backed=file_backed)
        edges = np.flatnonzero(np.diff(np.concatenate(([False], real, [False])).astype(np.int8)))
        for start, end in edges.reshape(-1, 2).tolist():
            extra_runs.append((first + start, end - start))
            extra_cats.append(categories[n])
            extra_vma.append(vma_at[n])
    keep = np.flatnonzero(holds)
    if not extra_runs:
        return PresentRegions(runs[keep], categories[keep], vma_at[keep], merge_runs(runs[guard & own]))
    all_runs = np.concatenate((runs[keep], np.array(extra_runs, dtype=np.uint64)))
    order = np.argsort(all_runs[:, 0], kind="stable")
    return PresentRegions(
        all_runs[order],
        np.concatenate((categories[keep], np.array(extra_cats, dtype=np.uint64)))[order],
        np.concatenate((vma_at[keep], np.array(extra_vma, dtype=np.int64)))[order],
        merge_runs(runs[guard & own]),
    )


def _cut(regions: ps.Regions, vmas: Sequence[Vma]) -> tuple[ps.Regions, npt.NDArray[np.int64]]:
    """Split regions that span VMAs (equal categories join across borders); the VMA index of each piece."""
    if len(regions) == 0 or not vmas:
        return regions[:0], np.zeros(0, dtype=np.int64)
    starts = np.array([vma.start for vma in vmas], dtype=np.uint64)
    ends = np.array([vma.end for vma in vmas], dtype=np.uint64)
    at = np.searchsorted(regions[:, 0], starts, side="right").astype(np.int64) - 1
    inside = (at >= 0) & (regions[at, 0] < starts) & (starts < regions[at, 1])
    if inside.any():
        cuts, owners = starts[inside], at[inside]
        tails = regions[owners].copy()
        tails[:, 0] = cuts
        regions = np.concatenate((regions, tails))
        regions = regions[np.argsort(regions[:, 0], kind="stable")]
        # each piece now ends where the next piece of the same region begins
        overlap = np.flatnonzero(regions[:-1, 1] > regions[1:, 0])
        regions[overlap, 1] = regions[overlap + 1, 0]
    vma_at = np.searchsorted(starts, regions[:, 0], side="right").astype(np.int64) - 1
    valid = (vma_at >= 0) & (regions[:, 0] < ends[vma_at])
    regions, vma_at = regions[valid], vma_at[valid]
    # a region may run on into a mapping that is not the target's: the one injected for this very freeze
    regions[:, 1] = np.minimum(regions[:, 1], ends[vma_at])
    return regions, vma_at
