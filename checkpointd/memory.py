# SPDX-License-Identifier: Apache-2.0
"""Words for memory: pages, ranges, runs and VMAs.  Frozen values, no I/O.

A *page number* is an address (or, in a shared object, an offset) divided by `PAGE_SIZE`.  A *run* is
`[first, first + nr)` of page numbers; many runs are an (n, 2) uint64 array of (first, nr), sorted, not
overlapping, not touching.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
TASK_SIZE = 0x7FFF_FFFF_F000  # x86-64, 4-level page tables

PageNumbers = npt.NDArray[np.uint64]
Runs = npt.NDArray[np.uint64]

_END_OF_PAGES = np.uint64(1 << 63)
_FEW_RUNS = 40
"""Up to so many together a loop is faster than numpy, by 10 us and more, for which targets stand still."""

NO_PAGES: PageNumbers = np.zeros(0, dtype=np.uint64)
NO_RUNS: Runs = np.zeros((0, 2), dtype=np.uint64)

PRIVATE_OBJECT = 0
"""Object id of the address space's own (private) pages; its page numbers are addresses >> 12.

Every other object id (1, 2, ...) is one shared memory object of the image, paged by offset >> 12.
"""

FILE_CONTENT_OBJECTS = 1 << 20
"""Object ids from here on hold the content of open deleted files: this number plus the description's index."""


class VmaKind(enum.StrEnum):
    """What a VMA is, by how it must be saved (kernel-support.md has the table)."""

    ANON = "anon"  # private anonymous, [heap], [stack], brk, /dev/zero private
    FILE_PRIVATE = "file-private"  # private mapping of a file: only its copied-on-write pages are ours
    FILE_SHARED = "file-shared"  # shared mapping of a file on disk: the file is the content
    SHMEM = "shmem"  # shared anonymous, memfd, tmpfs, System V: content saved once per object
    HUGETLB = "hugetlb"  # of a pool of huge pages (MAP_HUGETLB), private or shared
    VDSO = "vdso"
    VVAR = "vvar"
    VSYSCALL = "vsyscall"
    DEVICE = "device"  # VM_IO or VM_PFNMAP: cannot be saved
    SECRETMEM = "secretmem"  # memfd_secret: cannot be read


@dataclass(frozen=True, slots=True)
class Vma:
    """One line of /proc/PID/smaps.

    Attributes:
        start, end: bytes, page aligned, half open.
        prot: PROT_READ|PROT_WRITE|PROT_EXEC as for mmap(2).
        shared: MAP_SHARED.
        offset: bytes into the file.
        dev: (major, minor) of the file's device.
        path: as the kernel prints it, with escapes undone; "" for anonymous.  " (deleted)" is stripped
            into `deleted`.
        flags: the two-letter VmFlags of smaps (proc_pid_smaps(5)); empty when only maps was read.
        huge_bytes: AnonHugePages of smaps: how much of it lay in transparent huge pages then.
        protection_key: of pkeys(7); 0 for none.
        pool_page_bytes: size of the pages of the hugetlb pool it is of; 0 for all other memory.
    """

    start: int
    end: int
    prot: int
    shared: bool
    offset: int
    dev: tuple[int, int]
    inode: int
    path: str
    deleted: bool
    kind: VmaKind
    flags: frozenset[str] = frozenset()
    huge_bytes: int = field(default=0, compare=False)
    protection_key: int = field(default=0, compare=False)
    pool_page_bytes: int = field(default=0, compare=False)

    @property
    def nr_pages(self) -> int:
        return (self.end - self.start) >> PAGE_SHIFT

    @property
    def first_page(self) -> int:
        return self.start >> PAGE_SHIFT

    @property
    def size_bytes(self) -> int:
        return self.end - self.start

    def __str__(self) -> str:
        prot = "".join(c if self.prot & bit else "-" for c, bit in (("r", 1), ("w", 2), ("x", 4)))
        name = f" {self.path}" if self.path else ""
        return f"{self.start:x}-{self.end:x} {prot}{'s' if self.shared else 'p'}{name}"


def runs_of(pages: PageNumbers) -> Runs:
    """Sorted page numbers as runs."""
    if len(pages) == 0:
        return NO_RUNS
    breaks = np.flatnonzero(np.diff(pages) != 1) + 1
    starts = np.concatenate((np.zeros(1, dtype=np.int64), breaks))
    ends = np.concatenate((breaks, np.array([len(pages)], dtype=np.int64)))
    out = np.empty((len(starts), 2), dtype=np.uint64)
    out[:, 0] = pages[starts]
    out[:, 1] = ends - starts
    return out


def pages_of(runs: Runs) -> PageNumbers:
    """Runs as sorted page numbers."""
    if len(runs) == 0:
        return NO_PAGES
    counts = runs[:, 1].astype(np.int64)
    total = int(counts.sum())
    offsets = np.cumsum(counts) - counts
    return (
        np.repeat(runs[:, 0].astype(np.int64) - offsets, counts) + np.arange(total, dtype=np.int64)
    ).astype(np.uint64)


def nr_pages_in(runs: Runs) -> int:
    """How many pages the runs hold."""
    return int(runs[:, 1].sum()) if len(runs) else 0


def is_member(pages: PageNumbers, among: PageNumbers) -> npt.NDArray[np.bool_]:
    """For each of `pages`: does sorted `among` hold it?"""
    if len(among) == 0:
        return np.zeros(len(pages), dtype=bool)
    at = np.searchsorted(among, pages)
    at[at == len(among)] = len(among) - 1
    found: npt.NDArray[np.bool_] = among[at] == pages
    return found


def merge_runs(runs: Runs) -> Runs:
    """Any (first, nr) rows as runs: sorted, overlaps and touching neighbours joined."""
    if len(runs) < 2:
        return runs
    ends = runs[:, 0] + runs[:, 1]
    if bool((runs[1:, 0] > ends[:-1]).all()):
        return runs
    in_order = bool((runs[1:, 0] >= runs[:-1, 0]).all())
    ordered = runs if in_order else runs[np.argsort(runs[:, 0], kind="stable")]
    ends = np.maximum.accumulate(ordered[:, 0] + ordered[:, 1])
    starts_new = np.concatenate((np.array([True]), ordered[1:, 0] > ends[:-1]))
    first = np.flatnonzero(starts_new)
    last = np.concatenate((first[1:] - 1, np.array([len(ordered) - 1])))
    out = np.empty((len(first), 2), dtype=np.uint64)
    out[:, 0] = ordered[first, 0]
    out[:, 1] = ends[last] - out[:, 0]
    return out


def intersect_runs(a: Runs, b: Runs) -> Runs:
    """The pages in both.  Linear: trackers do this while a target stands still."""
    if len(a) == 0 or len(b) == 0:
        return NO_RUNS
    if len(a) + len(b) <= _FEW_RUNS:
        return _array(_intersect_few(a.tolist(), b.tolist()))
    a_ends, b_ends = a[:, 0] + a[:, 1], b[:, 0] + b[:, 1]
    # the n-th run of `a` meets the runs of `b` from `first[n]` on, `nr[n]` of them
    first = np.searchsorted(b_ends, a[:, 0], side="right")
    nr = np.searchsorted(b[:, 0], a_ends, side="left") - first
    mine = np.repeat(np.arange(len(a)), nr)
    theirs = np.arange(len(mine)) + np.repeat(first - (np.cumsum(nr) - nr), nr)
    starts = np.maximum(a[mine, 0], b[theirs, 0])
    out: Runs = np.stack((starts, np.minimum(a_ends[mine], b_ends[theirs]) - starts), axis=1)
    return out


def subtract_runs(a: Runs, b: Runs) -> Runs:
    """The pages of `a` that are not in `b`."""
    if len(a) == 0 or len(b) == 0:
        return a
    if len(a) + len(b) <= _FEW_RUNS:
        return _array(_subtract_few(a.tolist(), b.tolist()))
    starts = np.concatenate((np.zeros(1, dtype=np.uint64), b[:, 0] + b[:, 1]))
    ends = np.concatenate((b[:, 0], np.full(1, _END_OF_PAGES)))
    gaps = np.stack((starts, ends - starts), axis=1)
    return intersect_runs(a, gaps[gaps[:, 1] != 0])


def are_within(a: Runs, b: Runs) -> bool:
    """Does each run of `a` lie in one of `b`?"""
    if len(a) == 0:
        return True
    if len(b) == 0:
        return False
    at = np.searchsorted(b[:, 0], a[:, 0], side="right") - 1
    return bool((at >= 0).all()) and bool((a[:, 0] + a[:, 1] <= b[at, 0] + b[at, 1]).all())


def _array(rows: list[tuple[int, int]]) -> Runs:
    return np.array(rows, dtype=np.uint64) if rows else NO_RUNS


def _intersect_few(a: list[list[int]], b: list[list[int]]) -> list[tuple[int, int]]:
    found = []
    n = m = 0
    while n < len(a) and m < len(b):
        (a_first, a_nr), (b_first, b_nr) = a[n], b[m]
        first, a_end, b_end = max(a_first, b_first), a_first + a_nr, b_first + b_nr
        end = min(a_end, b_end)
        if first < end:
            found.append((first, end - first))
        if a_end < b_end:
            n += 1
        else:
            m += 1
    return found


def _subtract_few(a: list[list[int]], b: list[list[int]]) -> list[tuple[int, int]]:
    found = []
    m = 0
    for first, nr in a:
        at, end = first, first + nr
        while m < len(b) and b[m][0] + b[m][1] <= at:
            m += 1
        k = m  # what reaches beyond this run may meet the next one too
        while k < len(b) and b[k][0] < end:
            if b[k][0] > at:
                found.append((at, b[k][0] - at))
            at = b[k][0] + b[k][1]
            k += 1
        if at < end:
            found.append((at, end - at))
    return found
