# SPDX-License-Identifier: Apache-2.0
"""What the userfaultfd tracker makes of writers that do not stand still, and of pages the kernel is moving.

The target is an area of this very process, so that a write can be staged between any two steps of a collection.
"""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from checkpointd import features, tracepoint
from checkpointd.linux import pagemap_scan as ps
from checkpointd.linux import userfaultfd as uffd
from checkpointd.linux._libc import syscall
from checkpointd.memory import NO_RUNS, PAGE_SIZE, Runs, Vma, VmaKind, pages_of
from checkpointd.procfs import maps
from checkpointd.tracking import uffd_wp
from checkpointd.tracking.base import Collection, Ranges, Space, Taken, Walk
from checkpointd.tracking.presence import holding_data
from checkpointd.tracking.walks import take_written

pytestmark = pytest.mark.needs("pagemap_scan", "uffd_wp")
NR_PAGES = 1024
MANY, FEW = 40, 20  # dirty runs: armed by one walk, or one by one


def new_uffd() -> int:
    fd = syscall(uffd.NR_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK | uffd.UFFD_USER_MODE_ONLY)
    uffd.handshake(fd, uffd_wp.FEATURES)
    return fd


class Area:
    """Anonymous memory of ours, every page written."""

    def __init__(self) -> None:
        # holes around it: it must be a mapping of its own
        self._map = mmap.mmap(-1, (NR_PAGES + 2) * PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._map.madvise(mmap.MADV_NOHUGEPAGE)
        self.bytes = np.frombuffer(self._map, dtype=np.uint8)[PAGE_SIZE:-PAGE_SIZE]
        self.start = int(self.bytes.ctypes.data)
        self.end = self.start + NR_PAGES * PAGE_SIZE
        self.bytes[::PAGE_SIZE] = 1
        self.pagemap = ps.open_pagemap(os.getpid())
        self.walk: Walk | None = None

    def discard(self, page: int) -> None:
        self._map.madvise(mmap.MADV_DONTNEED, (page + 1) * PAGE_SIZE, PAGE_SIZE)

    def guard(self, page: int) -> None:
        self._map.madvise(102, (page + 1) * PAGE_SIZE, PAGE_SIZE)  # MADV_GUARD_INSTALL

    def space(self) -> Space:
        vmas = [v for v in maps.read_smaps(os.getpid()) if v.start < self.end and v.end > self.start]
        cut = [dataclasses.replace(v, start=max(v.start, self.start), end=min(v.end, self.end)) for v in vmas]
        return Space(os.getpid(), self.pagemap, tuple(cut), walk=self.walk)

    def pages(self, runs: np.ndarray) -> set[int]:
        return {page - (self.start >> 12) for page in pages_of(runs).tolist()}


@pytest.fixture
def area() -> Iterator[Area]:
    made = Area()
    yield made
    os.close(made.pagemap)


@pytest.fixture(params=["by itself", "by another, at once", "by another, late"])
def tracker(request: pytest.FixtureRequest, area: Area) -> Iterator[uffd_wp.UffdWpTracker]:
    """The first walk is made by the tracker, or by somebody else in the middle of all it does."""

    def at_once(ranges: Ranges, has_guard_category: bool) -> Callable[[], Taken]:
        taken = take_written(area.pagemap, ranges, has_guard_category=has_guard_category)
        return lambda: taken

    def late(ranges: Ranges, has_guard_category: bool) -> Callable[[], Taken]:
        return lambda: take_written(area.pagemap, ranges, has_guard_category=has_guard_category)

    walks: dict[str, Walk] = {"by another, at once": at_once, "by another, late": late}
    area.walk = walks.get(request.param)
    known = features.probe()
    made = uffd_wp.UffdWpTracker(
        new_uffd(), has_guard_category=known.guard_category, holes_are_written=known.holes_are_written
    )
    yield made
    made.disarm()
    tracepoint.clear()


STEPS = ["track.scanned", "track.registered", "track.written", "track.lifted", "track.armed"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("nr_runs", [FEW, MANY])
@pytest.mark.parametrize("was_empty", [False, True])
def test_write_between_the_steps_is_reported_now_or_next_time(
    area: Area, tracker: uffd_wp.UffdWpTracker, step: str, nr_runs: int, was_empty: bool
) -> None:
    victim = 5
    if was_empty:
        area.discard(victim)
    tracker.collect(area.space())
    tracker.commit()
    area.bytes[: nr_runs * 8 * PAGE_SIZE : 8 * PAGE_SIZE] = 2

    def write(_: str) -> None:
        area.bytes[victim * PAGE_SIZE] = 77

    tracepoint.register(step, write, at=1)
    found: list[Collection] = []
    for _ in range(2):
        found.append(tracker.collect(area.space()))
        tracker.commit()
    dirty = [area.pages(one.dirty) for one in found]
    assert victim in dirty[0] | dirty[1]
    # content is copied after the collection: a page reported dirty in the first is right in it
    if victim not in dirty[0]:
        assert victim in dirty[1]
    assert dirty[0] - {victim} == set(range(0, nr_runs * 8, 8))
    assert area.pages(found[1].clean) | dirty[1] == set(range(NR_PAGES))


@pytest.mark.needs("holes_are_written")  # elsewhere nothing is known before everything has been looked at
def test_pages_told_early_are_dirty_and_armed(area: Area, tracker: uffd_wp.UffdWpTracker) -> None:
    """They may be read from then on: a later write to one is the next epoch's, and reported there."""
    tracker.collect(area.space())
    tracker.commit()
    area.bytes[: FEW * 8 * PAGE_SIZE : 8 * PAGE_SIZE] = 2
    area.discard(3)
    told: list[set[int]] = []

    def read_and_write(ranges: Ranges, has_guard_category: bool) -> Callable[[], Taken]:
        taken = take_written(area.pagemap, ranges, has_guard_category=has_guard_category)
        told.append(area.pages(taken.runs))
        area.bytes[16 * PAGE_SIZE] = 9
        area.discard(24)  # as the kernel does to MADV_FREE memory at any time
        return lambda: dataclasses.replace(taken, read=taken.runs)

    first = tracker.collect(dataclasses.replace(area.space(), walk=read_and_write))
    assert first.unread is not None
    assert area.pages(first.unread) & set(range(NR_PAGES)) == set()
    tracker.commit()
    second = tracker.collect(area.space())
    assert told == [set(range(0, FEW * 8, 8))]
    assert area.pages(first.dirty) == told[0]
    assert area.pages(first.clean) == set(range(NR_PAGES)) - told[0] - {3}
    assert area.pages(second.dirty) == {16}
    assert 24 not in area.pages(second.clean)


@pytest.mark.needs("holes_are_written")
@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_what_the_target_need_not_wait_for_is_worked_out_afterwards(
    area: Area, tracker: uffd_wp.UffdWpTracker, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    worked_out: list[set[int]] = []
    unchanged = uffd_wp._unchanged

    def counted(*args: Any) -> Runs:
        worked_out.append(area.pages(unchanged(*args)))
        return unchanged(*args)

    monkeypatch.setattr(uffd_wp, "_unchanged", counted)
    tracker.collect(area.space())
    tracker.commit()
    worked_out.clear()
    written = set(range(0, FEW * 8, 8))
    area.bytes[: FEW * 8 * PAGE_SIZE : 8 * PAGE_SIZE] = 2
    found = tracker.collect(area.space())
    assert worked_out == []
    assert found.unread is not None
    assert area.pages(found.unread) == written
    getattr(tracker, end)()
    assert worked_out == [set(range(NR_PAGES)) - written]
    assert (area.pages(found.dirty), area.pages(found.clean)) == (written, worked_out[0])
    again = tracker.collect(area.space())
    if end == "commit":
        assert again.unread is not None
        assert area.pages(again.clean) == set(range(NR_PAGES))
    else:  # what a failed dump reported is not among what was written since: all is worked out at once
        assert again.unread is None
        assert area.pages(again.dirty) == written


@pytest.mark.needs("holes_are_written", "guard")
def test_guard_pages_do_not_make_the_target_wait(area: Area, tracker: uffd_wp.UffdWpTracker) -> None:
    area.guard(5)
    for _ in range(3):
        found = tracker.collect(area.space())
        tracker.commit()
        assert area.pages(found.guards) == {5}
        assert 5 not in area.pages(found.clean) | area.pages(found.dirty)
    assert found.unread is not None
    area.bytes[8 * PAGE_SIZE] = 2
    assert area.pages(tracker.collect(area.space()).dirty) == {8}


@pytest.mark.needs("holes_are_written")
def test_what_cannot_be_worked_out_afterwards_makes_nothing_clean(
    area: Area, tracker: uffd_wp.UffdWpTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker.collect(area.space())
    tracker.commit()
    area.bytes[8 * PAGE_SIZE] = 2

    def no_memory(*_: Any) -> Runs:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(uffd_wp, "_unchanged", no_memory)
        found = tracker.collect(area.space())
        with pytest.raises(MemoryError):
            _ = found.clean
        tracker.rollback()  # of the dump that fails for it
    again = tracker.collect(area.space())
    assert len(again.clean) == 0
    assert area.pages(again.dirty) == set(range(NR_PAGES))


@pytest.mark.needs("guard")
@pytest.mark.parametrize("shows_swap_types", [True, False])
def test_guard_pages_that_were_written_before_hold_nothing(
    area: Area, tracker: uffd_wp.UffdWpTracker, monkeypatch: pytest.MonkeyPatch, shows_swap_types: bool
) -> None:
    """The kernel shows callers without CAP_SYS_ADMIN no type of a marker, only that it is one."""
    words = ps.read_words

    def hidden(*args: Any) -> Any:
        return words(*args) & ~np.uint64(ps.PM_FRAME)

    if not shows_swap_types:
        monkeypatch.setattr(ps, "read_words", hidden)
    tracker.collect(area.space())
    tracker.commit()
    area.guard(5)
    assert ps.swapped_data(area.pagemap, (area.start >> 12) + 5, 1, file_backed=False).tolist() == [False]
    area.bytes[8 * PAGE_SIZE] = 2
    for _ in range(2):
        found = tracker.collect(area.space())
        tracker.commit()
        assert area.pages(found.guards) == {5}
        assert 5 not in area.pages(found.clean) | area.pages(found.dirty)


def test_what_was_begun_and_not_finished_is_not_finished_later(
    area: Area, tracker: uffd_wp.UffdWpTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target runs on by then: other memory may lie where mappings were, which must not be registered or armed."""
    tracker.collect(area.space())
    tracker.commit()
    area.bytes[8 * PAGE_SIZE] = 2
    tracker.begin(area.space())
    with monkeypatch.context() as patch:
        for module, name in ((uffd, "register_wp"), (ps, "write_protect"), (ps, "scan")):
            patch.setattr(module, name, lambda *_, **__: pytest.fail("a running target was touched"))
        tracker.rollback()
    again = tracker.collect(area.space())
    assert len(again.clean) == 0
    assert area.pages(again.dirty) == set(range(NR_PAGES))
    tracker.commit()
    assert area.pages(tracker.collect(area.space()).clean) == set(range(NR_PAGES))


@pytest.mark.needs("holes_are_written")
def test_a_collection_that_nobody_decides_is_rolled_back(area: Area, tracker: uffd_wp.UffdWpTracker) -> None:
    tracker.collect(area.space())
    tracker.commit()
    area.bytes[8 * PAGE_SIZE] = 2
    tracker.collect(area.space())
    assert 8 in area.pages(tracker.collect(area.space()).dirty)


@pytest.mark.parametrize("by_writing", [True, False])
def test_an_emptied_page_that_somebody_fills_between_the_steps_is_not_the_parents(
    area: Area, tracker: uffd_wp.UffdWpTracker, by_writing: bool
) -> None:
    tracker.collect(area.space())
    tracker.commit()
    for step in STEPS:
        area.bytes[0] = 3
        area.discard(5)

        def fill(_: str) -> None:
            if by_writing:
                area.bytes[5 * PAGE_SIZE] = 77
            else:
                assert area.bytes[5 * PAGE_SIZE] == 0

        tracepoint.register(step, fill, at=1)
        found = tracker.collect(area.space())
        tracker.commit()
        tracepoint.clear()
        assert 5 not in area.pages(found.clean), step
        area.bytes[5 * PAGE_SIZE] = 1
        assert 5 in area.pages(tracker.collect(area.space()).dirty), step
        tracker.commit()


@pytest.mark.parametrize("nr_runs", [FEW, MANY])
def test_own_write_protection_of_the_target_is_left_alone(
    area: Area, tracker: uffd_wp.UffdWpTracker, nr_runs: int
) -> None:
    own = new_uffd()
    try:
        uffd.register_wp(own, area.start, area.end)
        ps.write_protect(area.pagemap, area.start, area.end)
        written = set(range(0, nr_runs * 8, 8))
        for page in written:
            area.bytes[page * PAGE_SIZE] = 3
        for _ in range(2):
            found = tracker.collect(area.space())
            tracker.commit()
            assert area.pages(found.dirty) == set(range(NR_PAGES))
        regions = ps.scan(
            area.pagemap, area.start, area.end, mask=ps.PAGE_IS_WRITTEN, returned=ps.PAGE_IS_WRITTEN
        )
        starts = {(int(at) - area.start) // PAGE_SIZE for at in regions[:, 0]}
        assert starts == written
    finally:
        os.close(own)


@pytest.mark.parametrize("kind", [VmaKind.ANON, VmaKind.FILE_PRIVATE])
def test_page_that_was_on_its_way_when_it_was_scanned_holds_data(
    area: Area, kind: VmaKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A migration entry reads SWAPPED; a moment later its page is present again."""
    marker = (1 << 62) | (1 << 57) | (1 << 5) | ps.SWP_PTE_MARKER
    words = [(1 << 63) | 0x61234A, (1 << 62) | (77 << 5) | 3, marker, (1 << 63) | (1 << 61) | 0x61234B]
    monkeypatch.setattr(ps, "read_words", lambda fd, first, nr: np.array(words, dtype=np.uint64)[:nr])
    first = area.start >> 12
    vma = Vma(area.start, area.end, 3, False, 0, (0, 0), 0, "", False, kind)
    regions = np.array([[area.start, area.start + 4 * PAGE_SIZE, ps.PAGE_IS_SWAPPED]], dtype=np.uint64)
    found = pages_of(holding_data(area.pagemap, regions, [vma]).runs) - np.uint64(first)
    assert found.tolist() == ([0, 1, 3] if kind is VmaKind.ANON else [0, 1])


@pytest.mark.parametrize("nr_regions", [16383, 16384, 16385, 32768])
def test_scan_tells_every_region_once(nr_regions: int) -> None:
    """The kernel's walk_end is stale when the last region of all just fills the vector."""
    area = mmap.mmap(-1, nr_regions * 2 * PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_NOHUGEPAGE)
    content = np.frombuffer(area, dtype=np.uint8)
    content[:: 2 * PAGE_SIZE] = 1
    start = int(content.ctypes.data)
    pagemap = ps.open_pagemap(os.getpid())
    try:
        found = ps.scan(
            pagemap, start, start + len(content), anyof=ps.PAGE_IS_PRESENT, returned=ps.PAGE_IS_PRESENT
        )
    finally:
        os.close(pagemap)
    assert len(found) == nr_regions
    assert (np.diff(found[:, 0].astype(np.int64)) > 0).all()


def test_memory_pinned_at_one_collection_is_read_at_the_next(
    area: Area, tracker: uffd_wp.UffdWpTracker
) -> None:
    """A device may write between the two, and the pin be gone at the second: no page table tells of it."""
    pinned = np.array([[(area.start >> 12) + 5, 2]], dtype=np.uint64)
    found = []
    for suspect in (pinned, NO_RUNS, NO_RUNS):
        found.append(tracker.collect(dataclasses.replace(area.space(), always_dirty=suspect)))
        tracker.commit()
    assert area.pages(found[1].dirty) == {5, 6}
    assert area.pages(found[2].clean) == set(range(NR_PAGES))


@pytest.mark.parametrize("nr_pages", [8, 64])
@pytest.mark.parametrize("holes_are_written", [False, True])
def test_what_another_one_armed_and_let_go_is_not_taken_for_armed_by_us(
    area: Area, nr_pages: int, *, holes_are_written: bool
) -> None:
    """It lets go after our look at the pages, and before the registration that its own had refused until then."""
    guards = features.probe().guard_category
    ours, other = (
        uffd_wp.UffdWpTracker(new_uffd(), has_guard_category=guards, holes_are_written=holes_are_written)
        for _ in range(2)
    )
    space = area.space()
    end = area.start + nr_pages * PAGE_SIZE
    space = dataclasses.replace(space, vmas=(dataclasses.replace(space.vmas[0], end=end),))
    try:
        for one in (other, ours):
            one.collect(space)
            one.commit()
        area.bytes[2 * PAGE_SIZE] = 77
        other.collect(space)
        other.commit()
        tracepoint.register("track.scanned", lambda _: other.disarm(), at=1)
        found = ours.collect(space)
        assert 2 in area.pages(found.dirty)
    finally:
        tracepoint.clear()
        ours.disarm()
        other.disarm()


MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2


def test_a_collection_that_fails_leaves_no_page_that_nobody_watches() -> None:
    """mremap(2) next to an armed mapping drops the registration of both, and leaves pages marked: they are registered
    again by the collection that fails, and look armed to the next."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mremap.restype = ctypes.c_void_p
    libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
    held = mmap.mmap(-1, 64 * PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
    held.madvise(mmap.MADV_NOHUGEPAGE)
    start = int(np.frombuffer(held, dtype=np.uint8).ctypes.data)
    writable = mmap.PROT_READ | mmap.PROT_WRITE
    for first, nr in ((8, 8), (40, 1)):
        size = ctypes.c_size_t(nr * PAGE_SIZE)
        assert libc.mprotect(ctypes.c_void_p(start + first * PAGE_SIZE), size, writable) == 0

    def write(page: int, value: int) -> None:
        ctypes.memset(start + page * PAGE_SIZE, value, 1)

    pagemap = ps.open_pagemap(os.getpid())

    def space() -> Space:
        vmas = [
            v
            for v in maps.read_smaps(os.getpid())
            if start <= v.start and v.end <= start + 64 * PAGE_SIZE and v.prot & mmap.PROT_WRITE
        ]
        return Space(os.getpid(), pagemap, tuple(vmas))

    known = features.probe()
    tracker = uffd_wp.UffdWpTracker(
        new_uffd(), has_guard_category=known.guard_category, holes_are_written=known.holes_are_written
    )

    def fail(_: str) -> None:
        raise RuntimeError("the page worker died")

    try:
        for page in range(
            8, 16
        ):  # and not the one that moves: what holds pages merges with nothing elsewhere
            write(page, 1)
        tracker.collect(space())
        tracker.commit()
        moved = libc.mremap(
            start + 40 * PAGE_SIZE,
            PAGE_SIZE,
            PAGE_SIZE,
            MREMAP_MAYMOVE | MREMAP_FIXED,
            start + 16 * PAGE_SIZE,
        )
        assert moved == start + 16 * PAGE_SIZE
        write(10, 2)
        tracepoint.register("track.registered", fail, at=1)
        with pytest.raises(RuntimeError):
            tracker.collect(space())
        for value in (3, 4):
            write(10, value)
            found = tracker.collect(space())
            tracker.commit()
            assert (start >> 12) + 10 in pages_of(found.dirty).tolist()
    finally:
        tracepoint.clear()
        tracker.disarm()
        os.close(pagemap)
