# SPDX-License-Identifier: Apache-2.0
"""What a restore takes from pools of huge pages, worked out before anything exists.  Pure: no I/O.

A mapping of a pool reserves all its pages when it is made, unless it was made with MAP_NORESERVE; then it takes what it
held at the dump.  A shared object takes what its mappings reserve and what it held, once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np

from checkpointd.linux.hugetlb import Pool
from checkpointd.memory import PAGE_SIZE, PRIVATE_OBJECT, PageNumbers, Runs, VmaKind, nr_pages_in, runs_of
from checkpointd.state.memory import AddressSpace, SharedObject

POOL_HINT = "give it more pages (nr_hugepages in /sys/kernel/mm/hugepages), then restore again"


def held_privately(space: AddressSpace, pages_of: Callable[[int], PageNumbers]) -> dict[int, Runs]:
    """Runs of huge pages (address divided by their size) that each private mapping of a pool held, by its start."""
    found: dict[int, Runs] = {}
    for vma in space.vmas:
        if vma.kind is VmaKind.HUGETLB and not vma.shared:
            pages = pages_of(PRIVATE_OBJECT)
            first, last = np.searchsorted(pages, [vma.start // PAGE_SIZE, vma.end // PAGE_SIZE])
            found[vma.start] = huge_runs(pages[first:last], vma.pool_page_bytes)
    return found


def huge_runs(pages: PageNumbers, page_bytes: int) -> Runs:
    """The huge pages that pages of 4 KiB are in."""
    return runs_of(np.unique(pages // np.uint64(page_bytes // PAGE_SIZE)))


def wanted(
    space: AddressSpace,
    held: Mapping[int, Runs],
    pages_of: Callable[[int], PageNumbers],
    exists: Callable[[int], bool],
) -> Counter[int]:
    """How many pages of each size have to be there.

    Args:
        held: see `held_privately`.
        pages_of: of each object of the image.
        exists: tells of a shared object that it is there already, with its pages.
    """
    found: Counter[int] = Counter()
    for vma in space.vmas:
        if vma.kind is VmaKind.HUGETLB and not vma.shared:
            reserves = "nr" not in vma.flags
            nr = (vma.end - vma.start) // vma.pool_page_bytes if reserves else nr_pages_in(held[vma.start])
            found[vma.pool_page_bytes] += nr
    for one in space.objects:
        if one.hugetlb and not exists(one.id):
            found[one.pool_page_bytes] += _wanted_of_object(space, one, pages_of(one.id))
    return found


def _wanted_of_object(space: AddressSpace, one: SharedObject, pages: PageNumbers) -> int:
    size = one.pool_page_bytes
    if one.flavour == "sysv":  # reserves all when it is made
        return -(-one.size_bytes // size)
    takes = np.zeros(-(-one.size_bytes // size), dtype=bool)
    numbers = (pages // np.uint64(size // PAGE_SIZE)).astype(np.int64)
    takes[numbers[numbers < len(takes)]] = True
    for vma in space.vmas:
        if vma.object == one.id and vma.shared and "nr" not in vma.flags:
            takes[vma.offset // size : (vma.offset + vma.end - vma.start) // size] = True
    return int(takes.sum())


def shortages(wanted: Mapping[int, int], pools: Mapping[int, Pool]) -> list[str]:
    """What stands in the way, one sentence for each size of pages."""
    found = []
    for page_bytes, nr in sorted(wanted.items()):
        pool = pools.get(page_bytes)
        size = f"{page_bytes >> 10} KiB"
        if pool is None:
            found.append(f"this machine has no huge pages of {size}, of which the process needs {nr}")
        elif (missing := nr - pool.available) > 0:
            found.append(
                f"{missing} huge pages of {size} are missing: the process needs {nr}, and the pool can give "
                f"{pool.available}; make room with `echo {pool.size + missing} > {pool.control}`"
            )
    return found
