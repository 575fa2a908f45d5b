# SPDX-License-Identifier: Apache-2.0
"""Asking a tracker what changed, while the target stands still; the page worker makes walks for it beside all else.

Raises TrackingLostError (see `Tracker.collect`), OSError (ESRCH: the process is gone), and what the page worker raised.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial

from kernel_shim.limits import Headroom

from checkpointd.dump.division import code_of, joined
from checkpointd.dump.pages import PageWorker
from checkpointd.dump.targets import written_beside
from checkpointd.dump.work import Work
from checkpointd.linux import pagemap_scan as ps
from checkpointd.memory import NO_RUNS, Vma, merge_runs
from checkpointd.procfs import process
from checkpointd.tracking.base import Collection, Ranges, Space, Taken, Tracker, Walk
from checkpointd.tracking.uffd_wp import UffdWpTracker


def collect(tracker: Tracker, vmas: tuple[Vma, ...], work: Work) -> Collection:
    with _space(tracker, vmas, work) as space:
        return tracker.collect(space)


def begin_walks(
    tracker: UffdWpTracker, worker: PageWorker, vmas: tuple[Vma, ...], work: Work, most: int
) -> bool:
    """Begin to collect; `tracker.finish` must follow before the thaw.

    Args:
        most: how many pages the page worker may read of what it finds written.

    Returns:
        The page worker is at work; see `UffdWpTracker.begin`.
    """
    pid, code = work.stats.pid, code_of(vmas)

    def walk(ranges: Ranges, has_guard_category: bool) -> Callable[[], Taken]:
        # the target's thread makes our calls meanwhile
        work.ahead.keep_off(worker.pid, process.read_stat(pid).processor)
        worker.start_walk(ranges, has_guard_category, code, most)
        return partial(take_walk, worker, work)

    with _space(tracker, vmas, work, walk) as space:
        return tracker.begin(space)


def take_walk(worker: PageWorker, work: Work) -> Taken:
    """What the page worker found written; notes what of it is being read."""
    taken, is_alone = worker.finish_walk()
    if is_alone is not None:
        work.still_alone = work.alone.runs if work.alone and is_alone else NO_RUNS
    work.early = taken.read
    return taken


@contextlib.contextmanager
def _space(tracker: Tracker, vmas: tuple[Vma, ...], work: Work, walk: Walk | None = None) -> Iterator[Space]:
    pid = work.stats.pid
    pagemap = ps.open_pagemap(pid)
    try:
        suspect = written_beside(pid, vmas, kernel_workers=work.kernel_workers)
        if len(work.early):
            # for a tracker that was lost since, and not armed by this one: it is read once more next time
            suspect = merge_runs(joined(suspect, work.early))
        yield Space(pid, pagemap, vmas, suspect, walk)
    finally:
        os.close(pagemap)
    if tracker.name != "content":
        # every tracker but content keeps mappings apart that would have been one
        warning = Headroom(len(vmas), work.max_map_count).warning
        work.stats.warnings += [warning] if warning else []
