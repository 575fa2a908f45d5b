# SPDX-License-Identifier: Apache-2.0
"""Every generation, flattened, is what a naive reader saw at its freeze: for each backend and way of reading.

More of the same for hours: ``python -m tests.oracle --seconds 3600 --backend uffd-wp``.  The seeds are fixed
here, so that a failure is the same for everybody; the finding names seed and line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Iterator

import numpy as np
import pytest

from checkpointd.memory import NO_PAGES, PageNumbers, pages_of, runs_of
from checkpointd.tracking.base import Collection, Found, Space
from checkpointd.tracking.uffd_wp import UffdWpTracker
from tests import abilities
from tests.huge_pool import NoPagesError, pool_pages
from tests.oracle import history, truth
from tests.oracle.binding import CheckpointdEngine
from tests.oracle.campaign import play
from tests.oracle.judge import judge
from tests.oracle.target import OracleTarget

tracepoint = pytest.importorskip("checkpointd.tracepoint")

pytestmark = pytest.mark.needs("root", "ptrace", "gcc", "pagemap_scan")

BACKENDS = ["uffd-wp", "content"]
NEEDED = {"uffd-wp": "uffd_wp", "soft-dirty": "soft_dirty", "precise-soft-dirty": "precise"}
HISTORIES_PER_TEST = 8


@pytest.fixture(autouse=True)
def huge_pages() -> Iterator[bool]:
    """A pool for hugetlb slots, where one can be had; without, such commands fail and nothing comes of them."""
    with contextlib.ExitStack() as pool:
        has_pool = False
        with contextlib.suppress(NoPagesError):
            pool.enter_context(pool_pages(24, wait_s=0))
            has_pool = True
        yield has_pool


def _engine(backend: str, read_mode: str = "auto", *, delta: bool = False) -> CheckpointdEngine:
    if backend in NEEDED:
        abilities.require(NEEDED[backend])
    return CheckpointdEngine(backend, read_mode, delta=delta)


def _play_seeds(seeds: range, backend: str, read_mode: str, *, delta: bool = False) -> None:
    nr_generations = 0
    engines: list[CheckpointdEngine] = []

    def engine() -> CheckpointdEngine:
        engines.append(_engine(backend, read_mode, delta=delta))
        return engines[-1]

    for seed in seeds:
        lines = history.generate(seed)
        verdict = play(lines, engine)
        assert not verdict.findings, "\n".join([f"seed {seed}, line {verdict.at}:", *verdict.findings])
        # tracking does not outlive a new program: the dump after an exec compares content
        nr_execs = sum(line.startswith("exec") for line in lines)
        nr_others = verdict.nr_generations - verdict.backends[backend]
        assert nr_others <= nr_execs, f"seed {seed}: {verdict.backends}, {nr_execs} execs"
        nr_generations += verdict.nr_generations
    assert nr_generations >= 6 * len(seeds)
    nr_deltas = sum(one.nr_deltas for one in engines)
    assert nr_deltas >= 10 * len(seeds) if delta else nr_deltas == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("part", range(4))
def test_every_generation_is_true(backend: str, part: int) -> None:
    first = 1000 + part * HISTORIES_PER_TEST
    _play_seeds(range(first, first + HISTORIES_PER_TEST), backend, "stopped")


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_generation_read_from_a_forked_copy_is_true(backend: str) -> None:
    _play_seeds(range(2000, 2000 + HISTORIES_PER_TEST), backend, "fork")


@pytest.mark.parametrize("read_mode", ["stopped", "fork"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_generation_of_differences_is_true(backend: str, read_mode: str) -> None:
    _play_seeds(range(3000, 3000 + HISTORIES_PER_TEST), backend, read_mode, delta=True)


@pytest.mark.slow
@pytest.mark.parametrize("read_mode", ["stopped", "fork"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("part", range(10))
def test_many_more_generations_are_true(backend: str, read_mode: str, part: int) -> None:
    _play_seeds(range(10_000 + 20 * part, 10_020 + 20 * part), backend, read_mode)


@pytest.mark.needs("set_tid")
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_restored_memory_is_what_it_was_at_the_freeze(backend: str, delta: bool) -> None:
    """Killed and restored in the midst, last and earlier generations; every later generation is true again."""
    nr_restores = 0
    for seed in range(7000, 7003):
        verdict = play(history.with_restores(seed), lambda: _engine(backend, "stopped", delta=delta))
        assert not verdict.findings, "\n".join([f"seed {seed}, line {verdict.at}:", *verdict.findings])
        nr_restores += verdict.nr_restores
    assert nr_restores >= 3


@pytest.mark.needs("set_tid")
def test_segment_mapped_longer_than_it_is_comes_back() -> None:
    """mremap(2) may grow a System V mapping beyond the end of its segment."""
    lines = ["map 0 sysv 0 9", "write 0 fill 0 9 5", "remap 0 resize 0 30", "freeze", "restore 0"]
    assert not play(lines, lambda: _engine("content")).findings


@pytest.mark.needs("set_tid", "hugetlb")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("read_mode", ["stopped", "fork"])
@pytest.mark.parametrize("kind", ["hugetlb", "huge-shared", "huge-memfd", "huge-sysv"])
def test_pages_of_the_hugetlb_pool_are_true_and_come_back(
    huge_pages: bool, backend: str, read_mode: str, kind: str
) -> None:
    if not huge_pages:
        abilities.lacking("hugetlb", why="no pages, or another test has the pool")
    lines = [
        *(f"map 0 {kind} 0 1", "map 1 anon 0 40", "write 0 fill 500 30 5", "write 1 fill 0 40 70", "freeze"),
        *("write 0 byte 510 4 9", "relate 0", "freeze"),
        *("write 0 zero 500 30 0", "advise 0 dontneed 600 1", "freeze", "restore 0"),
        *("write 0 fill 600 3 800", "protect 0 none 0 9", "freeze", "restore 0", "restore 2", "freeze"),
    ]
    verdict = play(lines, lambda: _engine(backend, read_mode))
    assert not verdict.findings, verdict
    assert (verdict.nr_generations, verdict.nr_restores) == (5, 3)
    assert verdict.nr_pages > 3 * 1024  # the pool's were among them


@pytest.mark.parametrize("share", [1.0, 0.01])
def test_tracker_that_forgets_dirty_pages_is_seen(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """The real dump loop with a mistake in its tracker: the oracle does not take its word for anything."""
    abilities.require("uffd_wp")
    dice = random.Random(1)
    seen: dict[UffdWpTracker, PageNumbers] = {}  # by the last collection
    before: dict[UffdWpTracker, PageNumbers] = {}  # by the last one of which an image was made
    begin, finish, commit = UffdWpTracker.begin, UffdWpTracker.finish, UffdWpTracker.commit

    def alone(self: UffdWpTracker, space: Space) -> bool:
        # what the page worker finds is read all the same, and the image refuses a page that is dirty and clean at once
        return begin(self, dataclasses.replace(space, walk=None))

    def forgetful(self: UffdWpTracker) -> Collection:
        found = finish(self)
        dirty = pages_of(found.dirty)
        lost = np.array([dice.random() < share for _ in dirty], dtype=bool)
        lost &= np.isin(dirty, before.get(self, NO_PAGES))  # a page that is new cannot be inherited
        seen[self] = np.union1d(pages_of(found.clean), dirty)
        clean = np.sort(np.concatenate((pages_of(found.clean), dirty[lost])))
        told = Found(runs_of(clean), runs_of(dirty[~lost]), found.nr_reported)
        return Collection(told, guards=found.guards, forced=found.forced)

    def committed(self: UffdWpTracker) -> None:
        commit(self)
        if self in seen:
            before[self] = seen[self]

    monkeypatch.setattr(UffdWpTracker, "begin", alone)
    monkeypatch.setattr(UffdWpTracker, "finish", forgetful)
    monkeypatch.setattr(UffdWpTracker, "commit", committed)
    for seed in range(1, 30):
        before.clear()
        if play(history.generate(seed), lambda: _engine("uffd-wp", "stopped")).findings:
            return
    pytest.fail("nothing was noticed")


@pytest.fixture
def target() -> Iterator[OracleTarget]:
    with OracleTarget() as made:
        for line in (
            "map 0 anon 0 60",
            "write 0 fill 0 60 100",
            "map 1 shared 0 20",
            "write 1 fill 0 20 500",
            "file 0 memfd 0 30",
            "map 2 file 0 30",
            "write 2 fill 0 15 900",
            "map 3 private-file 0 10",
            "write 3 byte 0 5 77",
        ):
            assert made.play(line) >= 0, line
        yield made


def _freeze(target: OracleTarget, engine: CheckpointdEngine, *, incremental: bool) -> None:
    target.settle()
    before = truth.take(target.pid)
    image = engine.dump(target.pid, incremental=incremental)
    target.settle()
    assert judge(before, truth.take(target.pid), image) == []


POINTS = ("dump.freeze", "dump.collect", "dump.collected", "dump.copied", "dump.thawed", "dump.commit")


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_shared_write_of_a_relative_during_the_dump_is_in_the_next_generation(
    target: OracleTarget, backend: str, point: str
) -> None:
    """A relative is not frozen: it writes shared memory between any two steps of the dump."""
    engine = _engine(backend)
    assert target.play("relate 0") > 0
    try:
        _freeze(target, engine, incremental=False)
        tracepoint.register(point, lambda name: target.play("@1 write 1 fill 3 4 7000"))
        tracepoint.register(point, lambda name: target.play("@1 change 0 write 5 9 8000"))
        try:
            engine.dump(target.pid, incremental=True)
        finally:
            tracepoint.clear()
        _freeze(target, engine, incremental=True)
    finally:
        engine.close()


@pytest.mark.parametrize("point", ["dump.thawed", "dump.commit"])
@pytest.mark.parametrize("read_mode", ["stopped", "fork"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_write_right_after_the_thaw_is_in_the_next_generation_alone(
    target: OracleTarget, backend: str, read_mode: str, point: str
) -> None:
    engine = _engine(backend, read_mode)
    try:
        _freeze(target, engine, incremental=False)
        target.play("write 0 fill 10 5 3000")
        target.settle()
        before = truth.take(target.pid)
        tracepoint.register(point, lambda name: target.play("write 0 fill 12 9 4000"))
        try:
            image = engine.dump(target.pid, incremental=True)
        finally:
            tracepoint.clear()
        assert judge(before, before, image) == []
        _freeze(target, engine, incremental=True)
    finally:
        engine.close()


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_failed_dump_loses_no_dirty_page(target: OracleTarget, backend: str, delta: bool) -> None:
    engine = _engine(backend, delta=delta)
    try:
        _freeze(target, engine, incremental=False)
        for value in (3000, 4000, 5000):
            target.play(f"write 0 stride {value // 100} 25 {value}")
            assert engine.fail(target.pid)
        _freeze(target, engine, incremental=True)
    finally:
        engine.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_new_program_between_two_dumps_is_not_mistaken_for_the_old(
    target: OracleTarget, backend: str
) -> None:
    engine = _engine(backend)
    try:
        _freeze(target, engine, incremental=False)
        assert target.play("exec 0") == 0
        target.play("map 0 anon 0 30")
        target.play("write 0 fill 0 30 60")
        _freeze(target, engine, incremental=True)
        target.play("write 0 fill 4 3 90")
        _freeze(target, engine, incremental=True)
    finally:
        engine.close()


@pytest.mark.parametrize("read_mode", ["stopped", "fork"])
def test_reading_does_not_unshare_pages_of_relatives(target: OracleTarget, read_mode: str) -> None:
    """The frames a relative shares with the target are the same ones afterwards."""
    engine = _engine("content", read_mode)
    relative = target.play("relate 0")
    try:
        start = target.tell("where 0") // truth.PAGE
        pages = range(start, start + 60)

        def nr_shared() -> int:
            ours, theirs = truth.take(target.pid).frames, truth.take(relative).frames
            return sum(ours[page] == theirs[page] for page in pages)

        assert nr_shared() == 60
        engine.dump(target.pid, incremental=False)
        assert nr_shared() == 60
    finally:
        engine.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_unchanged_memory_costs_nothing_in_the_next_generation(target: OracleTarget, backend: str) -> None:
    """Not only true but small: what the target did not touch is not stored again."""
    engine = _engine(backend)
    try:
        engine.dump(target.pid, incremental=False)
        target.play("write 0 fill 10 5 3000")
        image = engine.dump(target.pid, incremental=True)
        # five pages of the range, and the few a program touches by running (stack, buffers, libc's data)
        assert image.stats["pages_written"] <= 5 + 8
        if backend == "uffd-wp":
            assert image.stats["pages_skipped_parent"] >= 50
    finally:
        engine.close()


@pytest.mark.needs("io_uring")
def test_kernel_worker_of_a_closed_ring_is_no_thread_of_the_target(target: OracleTarget) -> None:
    """io_uring's workers stay among the tasks for seconds after the ring is closed; nothing can be injected there."""
    engine = _engine("content")
    try:
        for line in ("ring 0 open 3", "ring 0 disk 0 1 5", "ring 0 close"):
            assert target.play(line) >= 0, line
        _freeze(target, engine, incremental=False)
        for line in ("ring 0 open 3", "ring 0 disk 0 1 6", "ring 0 close"):
            assert target.play(line) >= 0, line
        _freeze(target, engine, incremental=True)
    finally:
        engine.close()
