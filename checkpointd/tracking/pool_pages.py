# SPDX-License-Identifier: Apache-2.0
"""Pages of a hugetlb pool that are being moved in memory are waited for: they are neither there nor absent.

The kernel moves such pages at times (memory hotplug, contiguous allocations, move_pages(2)).  PAGEMAP_SCAN calls the
entry that stands for one SWAPPED, as it does a marker of userfaultfd, which does not read WRITTEN.  A pagemap word
shows nothing at all of either; but smaps counts what is being moved.  A page whose memory failed looks the same for
ever.

Source: Linux fs/proc/task_mmu.c (pagemap_hugetlb_category, pagemap_hugetlb_range, smaps_hugetlb_range).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from checkpointd.errors import CheckpointError
from checkpointd.linux import pagemap_scan as ps
from checkpointd.memory import Vma, VmaKind
from checkpointd.procfs import maps

MOVE_S = 2.0
"""How long one is waited for; 1 GiB takes some 0.3 s.  Chosen."""

_PAUSE_S = 0.001


def private_pool(vmas: Sequence[Vma]) -> list[Vma]:
    """Those that hold pages of a pool as their own."""
    return [vma for vma in vmas if vma.kind is VmaKind.HUGETLB and not vma.shared]


def scan_at_rest(look: Callable[[], ps.Regions], vmas: Sequence[Vma]) -> ps.Regions:
    """What `look` finds by PAGEMAP_SCAN (SWAPPED and WRITTEN told) when no page is being moved.

    Raises:
        CheckpointError: one does not come to rest.
    """
    pool = private_pool(vmas)
    regions = look()
    give_up_at = time.monotonic() + MOVE_S
    while (moving := _moving(regions, pool)) is not None:
        _pause(give_up_at, f"the huge page at {moving:#x}")
        regions = look()
    return regions


def _moving(regions: ps.Regions, pool: Sequence[Vma]) -> int | None:
    """An address that is being moved."""
    if not pool:
        return None
    states = regions[:, 2] & np.uint64(ps.PAGE_IS_PRESENT | ps.PAGE_IS_SWAPPED | ps.PAGE_IS_WRITTEN)
    for region in regions[states == ps.PAGE_IS_SWAPPED | ps.PAGE_IS_WRITTEN]:
        start, end = int(region[0]), int(region[1])
        for vma in pool:
            if start < vma.end and end > vma.start:
                return max(start, vma.start)
    return None


def words_at_rest(pid: int, look: Callable[[], ps.Regions], vmas: Sequence[Vma]) -> ps.Regions:
    """What `look` finds by pagemap words when as much is present as smaps counts.

    Raises:
        CheckpointError: a page does not come to rest.
        OSError: the process is gone.
    """
    pool = private_pool(vmas)
    regions = look()
    give_up_at = time.monotonic() + MOVE_S
    while pool and (short := _short(regions, pool, maps.read_pool_bytes(pid))) is not None:
        _pause(give_up_at, f"a huge page of mapping {short}")
        regions = look()
    return regions


def _short(regions: ps.Regions, pool: Sequence[Vma], counted: dict[int, int]) -> Vma | None:
    """A mapping of which more or less is present than was counted just after."""
    present = regions[(regions[:, 2] & np.uint64(ps.PAGE_IS_PRESENT)) != 0]
    for vma in pool:
        inside = present[(present[:, 0] >= vma.start) & (present[:, 1] <= vma.end)]
        if int((inside[:, 1] - inside[:, 0]).sum()) != counted.get(vma.start, 0):
            return vma
    return None


def _pause(give_up_at: float, what: str) -> None:
    if time.monotonic() > give_up_at:
        raise CheckpointError(
            f"{what} can be neither read nor called absent: the kernel is moving it, or its memory is broken; "
            "nothing was saved",
            hint="the target runs on; dump it again, and look for memory failures in the kernel's log",
        )
    time.sleep(_PAUSE_S)
