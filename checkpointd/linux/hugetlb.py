# SPDX-License-Identifier: Apache-2.0
"""Pools of huge pages (hugetlb): flags, and what a pool can still give.

Raises OSError only.

Source: Documentation/admin-guide/mm/hugetlbpage.rst, mmap(2), memfd_create(2), shmget(2).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

MAP_HUGETLB, MFD_HUGETLB, SHM_HUGETLB = 0x4_0000, 0x4, 0o4000
_SIZE_SHIFT = 26  # MAP_HUGE_SHIFT, MFD_HUGE_SHIFT, SHM_HUGE_SHIFT
_POOLS = Path("/sys/kernel/mm/hugepages")
_NAME = re.compile(r"hugepages-(\d+)kB$")


def size_flag(page_bytes: int) -> int:
    """The size of huge pages, as the flags of mmap(2), memfd_create(2) and shmget(2) want it."""
    return (page_bytes.bit_length() - 1) << _SIZE_SHIFT


class Pool(NamedTuple):
    """The pool of one size of pages, in pages.

    Attributes:
        size: all of it.
        free: in the pool and given to nobody.
        reserved: of these, how many are promised to mappings that have not touched them yet.
        more: how many the pool may still grow by, if memory can be found (nr_overcommit_hugepages).
    """

    page_bytes: int
    size: int
    free: int
    reserved: int
    more: int

    @property
    def available(self) -> int:
        return self.free - self.reserved + self.more

    @property
    def control(self) -> Path:
        """The file that says how many pages the pool has."""
        return _POOLS / f"hugepages-{self.page_bytes >> 10}kB" / "nr_hugepages"


def read_pools() -> dict[int, Pool]:
    """All pools of this kernel, by the size of their pages; none where the kernel has no hugetlb."""
    found: dict[int, Pool] = {}
    for directory in sorted(_POOLS.glob("hugepages-*kB")):
        if not (match := _NAME.match(directory.name)):
            continue
        page_bytes = int(match[1]) << 10
        size, free, reserved, surplus, overcommit = (
            int((directory / f"{name}_hugepages").read_text(encoding="ascii"))
            for name in ("nr", "free", "resv", "surplus", "nr_overcommit")
        )
        if reserved > size:  # seen on 6.18: a count that fell below zero, for as long as some process lived
            reserved = 0
        found[page_bytes] = Pool(page_bytes, size, free, reserved, max(0, overcommit - surplus))
    return found
