# SPDX-License-Identifier: Apache-2.0
"""Which pages are read when, and from whom: beside an injection, after it, or from a forked copy.

Raises OSError (ESRCH: the process is gone), and what `check_complete` says.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from checkpointd.dump.page_reading import CopyRequest
from checkpointd.linux import pagemap_scan as ps
from checkpointd.memory import (
    NO_RUNS,
    PAGE_SHIFT,
    PAGE_SIZE,
    PRIVATE_OBJECT,
    Runs,
    Vma,
    VmaKind,
    are_within,
    intersect_runs,
    merge_runs,
    subtract_runs,
)
from checkpointd.state.memory import AddressSpace
from checkpointd.target.memory import SharedSource

_LEAST_PAGES = 16_384  # 64 MiB: less is never worth a second process
# What docs/performance.md ("What tracking costs") reckons with: 105 ms a GiB read from a stopped target by two threads;
# 2 ms, and 12 ms a GiB present, for a fork.
_COPY_PAGE_NS = 400
_FORK_NS, _FORK_PAGE_NS = 2_000_000, 46


def most_read_stopped(nr_present: int) -> int:
    """How many dirty pages may be read from the stopped target itself before a forked copy pays.

    That is, before it would stop the target for clearly less time: the target pays for the copy at its next write to
    every page.
    """
    fork_ns = _FORK_NS + _FORK_PAGE_NS * nr_present
    return max(_LEAST_PAGES - 1, 2 * fork_ns // _COPY_PAGE_NS)


def code_of(vmas: Sequence[Vma]) -> Runs:
    """The pages of code: an injection's way lies there, so they cannot be read beside it."""
    rows = [(vma.first_page, vma.nr_pages) for vma in vmas if vma.prot & mmap.PROT_EXEC]
    return merge_runs(np.array(rows, dtype=np.uint64).reshape(-1, 2))


def joined(a: Runs, b: Runs) -> Runs:
    joined: Runs = np.concatenate((a, b))
    return joined


def runs_of_range(start: int, end: int) -> Runs:
    first, last = start >> PAGE_SHIFT, (end + PAGE_SIZE - 1) >> PAGE_SHIFT
    return np.array([[first, last - first]], dtype=np.uint64)


def private_requests(pid: int, dirty: Runs, alone: Runs, vmas: Sequence[Vma]) -> list[CopyRequest]:
    """How the target's own pages are to be read.

    Those of a hugetlb pool by /proc/PID/mem alone: process_vm_readv(2) pins, and one pinned that a forked relative maps
    too is copied first, into another page of the pool.

    Args:
        alone: pages known to be mapped by nobody else.
    """
    rows = [(vma.first_page, vma.nr_pages) for vma in vmas if vma.kind is VmaKind.HUGETLB]
    pool = merge_runs(np.array(rows, dtype=np.uint64).reshape(-1, 2))
    rest = subtract_runs(dirty, pool)
    if are_within(rest, alone):
        found = [CopyRequest(pid, PRIVATE_OBJECT, rest, through_mem=False, alone=True)]
    else:
        alone = intersect_runs(rest, alone)
        others = subtract_runs(rest, alone) if len(alone) else rest
        found = [
            CopyRequest(pid, PRIVATE_OBJECT, alone, through_mem=False, alone=True),
            CopyRequest(pid, PRIVATE_OBJECT, others, through_mem=False),
        ]
    if len(pool):
        found.append(CopyRequest(pid, PRIVATE_OBJECT, intersect_runs(dirty, pool)))
    return found


def object_requests(pid: int, source: SharedSource, runs: Runs) -> list[CopyRequest]:
    """How pages of a shared object are to be read: its last one, if it ends within that, where it is mapped."""
    obj, behind = source.object.id, NO_RUNS
    if source.last_page_at:
        last = source.object.size_bytes // PAGE_SIZE
        behind = intersect_runs(runs, np.array([[last, 1]], dtype=np.uint64))
    if len(behind) == 0:
        return [CopyRequest(pid, obj, runs, source=source.path)]
    shift = source.last_page_at // PAGE_SIZE - last
    return [
        CopyRequest(pid, obj, subtract_runs(runs, behind), source=source.path),
        CopyRequest(pid, obj, behind, source=f"/proc/{pid}/mem", shift=shift),
    ]


def split_by_code(
    copies: list[CopyRequest], vmas: Sequence[Vma]
) -> tuple[list[CopyRequest], list[CopyRequest]]:
    """(what can be read while something is injected, what only afterwards)."""
    code = code_of(vmas)
    early, later = [], []
    for request in copies:
        private = request.obj == PRIVATE_OBJECT and not request.source
        in_code = intersect_runs(request.runs, code) if private else NO_RUNS
        if len(in_code) == 0:
            early.append(request)
            continue
        early.append(replace(request, runs=subtract_runs(request.runs, in_code)))
        later.append(replace(request, runs=in_code))
    return early, later


def split_for_fork(
    copies: list[CopyRequest], copy_pid: int, vmas: Sequence[Vma]
) -> tuple[list[CopyRequest], list[CopyRequest]]:
    """(what must be read from the stopped target, what the forked copy holds).

    A forked copy lacks MADV_DONTFORK memory, reads zeroes in MADV_WIPEONFORK memory, keeps sharing what is
    shared, and holds the injection's own bytes in one page of a file mapping.  The advice may be newer than the
    flags known: see `check_complete`.
    """
    unsafe_runs = NO_RUNS
    for vma in vmas:
        if vma.flags & {"dc", "wf"} or vma.kind is VmaKind.FILE_PRIVATE:
            unsafe_runs = merge_runs(joined(unsafe_runs, runs_of_range(vma.start, vma.end)))
    stopped, later = [], []
    for request in copies:
        if request.obj != PRIVATE_OBJECT or request.source:
            stopped.append(request)
            continue
        now = intersect_runs(request.runs, unsafe_runs)
        if len(now):
            stopped.append(replace(request, runs=now))
        later.append(
            replace(request, runs=subtract_runs(request.runs, unsafe_runs), pid=copy_pid, through_mem=True)
        )
    return stopped, later


class CopyLacksPagesError(Exception):
    """The forked copy lacks pages of the target: they were advised (MADV_DONTFORK) just before the freeze."""


def check_complete(request: CopyRequest) -> None:
    """Does the forked copy hold every page it is to be read for?  It has no say in it any more: no hurry.

    Raises:
        CopyLacksPagesError: it would be read as zeroes.
    """
    if len(request.runs) == 0:
        return
    held = ps.PAGE_IS_PRESENT | ps.PAGE_IS_SWAPPED
    first, last = int(request.runs[0, 0]), int(request.runs[-1].sum())
    pagemap = ps.open_pagemap(request.pid)
    try:
        found = ps.scan(pagemap, first << PAGE_SHIFT, last << PAGE_SHIFT, anyof=held, returned=held)
    finally:
        os.close(pagemap)
    present = found[:, :2] >> np.uint64(PAGE_SHIFT)  # start and end
    present[:, 1] -= present[:, 0]
    if len(subtract_runs(request.runs, merge_runs(present))):
        raise CopyLacksPagesError


def with_guards(space: AddressSpace, guards: Runs) -> AddressSpace:
    """The address space with its guard regions, known only after the scan."""
    if len(guards) == 0:
        return space
    marked = []
    for state in space.vmas:
        inside = intersect_runs(guards, runs_of_range(state.start, state.end))
        ranges = tuple((first << PAGE_SHIFT, (first + nr) << PAGE_SHIFT) for first, nr in inside.tolist())
        marked.append(replace(state, guards=ranges) if ranges else state)
    return replace(space, vmas=tuple(marked))
