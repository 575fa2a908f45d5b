# SPDX-License-Identifier: Apache-2.0
"""Facts about a target that decide how its memory is read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from checkpointd.errors import TargetGone
from checkpointd.image.info import ImageInfo
from checkpointd.memory import NO_RUNS, PageNumbers, Runs, Vma, VmaKind, merge_runs
from checkpointd.procfs import process

BoolArray = npt.NDArray[np.bool_]

_ALONE = np.uint64(1 << 63 | 1 << 56)  # present, mapped once
_ALONE_MASK = _ALONE | np.uint64(1 << 62 | 1 << 61)  # not swapped, not a file's
_NEAR_PAGES = 32
_NR_WITNESSES = 8  # of either kind


def identity_of(pid: int) -> process.ProcessIdentity:
    """By which the process is known again, though its pid may be another's then.

    Raises:
        TargetGone: no such process.
    """
    try:
        return process.identity(pid)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise TargetGone(f"no process with pid {pid}", hint="look it up with `ps`", pid=pid) from error


def parent_warnings(parent: ImageInfo, own: process.ProcessIdentity) -> list[str]:
    """What to say of a parent that was named by the user."""
    if (parent.pid, parent.start_time, parent.boot_id) == (own.pid, own.start_time, own.boot_id):
        return []
    return [
        f"the parent {parent.id[:12]} is an image of another process ({parent.pid}, {parent.comm}): what is the same "
        "there, at the same addresses, is not stored again"
    ]


def mapped_by_nobody_else(pid: int, runs: Runs) -> BoolArray:
    """For each run of a frozen process: is every page in memory and mapped by this process alone?

    Such a page can be read by process_vm_readv(2), the faster way: it pins, and a page pinned that another process
    maps too is copied first (it is un-shared for good: memory the target and its relatives did not use before).  Who
    the relatives are cannot be told from the tree of processes (a sibling whose parent has ended, a copy that has moved
    elsewhere); the kernel's count of mappings can.  Nobody begins to share a page meanwhile: that takes a fork of the
    process itself, which stands still.

    Measured on 6.18: 7 ns a page looked at, against 0.3 us for reading one quickly and 1.5 us and more the other way.

    Source: Documentation/admin-guide/mm/pagemap.rst (bit 56), Linux mm/gup.c (gup_must_unshare).
    """
    alone = np.zeros(len(runs), dtype=bool)
    if len(runs) == 0:
        return alone
    starts = runs[:, 0].astype(np.int64)
    ends = starts + runs[:, 1].astype(np.int64)
    # clusters of runs near each other: one read of the pagemap for each
    edges = np.flatnonzero(starts[1:] - ends[:-1] > _NEAR_PAGES) + 1
    first_runs = np.concatenate(([0], edges))
    last_runs = np.concatenate((edges, [len(runs)]))
    pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for first, last in zip(first_runs.tolist(), last_runs.tolist(), strict=True):
            base, end = int(starts[first]), int(ends[last - 1])
            words = np.frombuffer(os.pread(pagemap, (end - base) * 8, base * 8), dtype=np.uint64)
            if len(words) != end - base:
                continue  # it is exiting: the read will tell
            shared = (words & _ALONE_MASK) != _ALONE
            before = np.concatenate(([0], np.cumsum(shared)))
            alone[first:last] = before[ends[first:last] - base] == before[starts[first:last] - base]
    finally:
        os.close(pagemap)
    return alone


@dataclass(frozen=True, slots=True)
class KnownAlone:
    """Pages that only this process mapped when it was still running: need not be looked at in the freeze.

    Looking takes some 7 to 100 ns a page (the kernel reads the count in each page's struct page), for which the
    target would stand still.  What changes it is a fork of the process; that shares all its pages again, so a few
    of them are witnesses, some of them pages that are seldom written.  What they cannot see (every one written anew
    since the fork) costs memory, nothing else.

    Attributes:
        runs: these pages.
        witnesses: page numbers of some of them.
    """

    runs: Runs
    witnesses: PageNumbers

    @classmethod
    def look(cls, pid: int, runs: Runs, cold: Runs) -> KnownAlone:
        """Of these runs those that nobody else maps now.

        Args:
            cold: other pages of the process, which it has not written for a while.
        """
        alone = runs[mapped_by_nobody_else(pid, runs)]
        some = _some(cold)
        some = some[mapped_by_nobody_else(pid, some)]
        return cls(alone, np.concatenate((_some(alone)[:, 0], some[:, 0])))

    def still(self, pid: int) -> Runs:
        """The runs, or none when a witness has been shared since (or is gone); of the frozen process."""
        wanted, mask = int(_ALONE), int(_ALONE_MASK)
        pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            for page in self.witnesses.tolist():
                if int.from_bytes(os.pread(pagemap, 8, page * 8), "little") & mask != wanted:
                    return NO_RUNS
        finally:
            os.close(pagemap)
        return self.runs


def _some(runs: Runs) -> Runs:
    """A few pages from all over the runs, each a run."""
    if len(runs) == 0:
        return NO_RUNS
    ends = np.cumsum(runs[:, 1].astype(np.int64))
    wanted = np.unique(np.linspace(0, int(ends[-1]) - 1, _NR_WITNESSES).astype(np.int64))
    at = np.searchsorted(ends, wanted, side="right")
    pages = runs[at, 0] + (wanted - (ends[at] - runs[at, 1].astype(np.int64))).astype(np.uint64)
    return np.stack((pages, np.ones(len(pages), dtype=np.uint64)), axis=1)


def is_watched(vmas: Sequence[Vma]) -> bool:
    """Is memory registered with a userfaultfd for missing or minor faults, which is somebody else's?

    Its owner may have asked to be told of forks (UFFD_FEATURE_EVENT_FORK): a fork then waits until the owner has read
    that, and the owner may be one of the threads that stand still.  Source: Linux fs/userfaultfd.c (dup_fctx).
    """
    return any(vma.flags & {"um", "ui"} for vma in vmas)


def forks_cost_pool_pages(vmas: Sequence[Vma]) -> bool:
    """Does the target hold pages of a hugetlb pool as its own?

    A forked copy would share them, and the target's next write to one take another page from the pool; of an empty pool
    the kernel takes the copy's.  Whatever the flags say of MADV_DONTFORK: they may be older than the freeze.  Source:
    Linux mm/hugetlb.c (hugetlb_wp, unmap_ref_private).
    """
    return any(vma.kind is VmaKind.HUGETLB and not vma.shared for vma in vmas)


def written_beside(pid: int, vmas: Sequence[Vma], *, kernel_workers: bool) -> Runs:
    """Pages that may be written behind the back of page tables or of a freeze: read whatever the tracker says.

    Devices write pinned memory; the kernel tells how much is pinned (VmPin), not what.  A worker of the kernel that
    outlived its io_uring does not stand still: a write of it between the look at soft-dirty bits and their clearing
    would be seen by nobody.  In either case all anonymous memory is suspect.
    """
    if not kernel_workers and process.nr_pinned_kb(pid) == 0:
        return NO_RUNS
    rows = [(vma.first_page, vma.nr_pages) for vma in vmas if vma.kind is VmaKind.ANON]
    return merge_runs(np.array(rows, dtype=np.uint64).reshape(-1, 2))
