# SPDX-License-Identifier: Apache-2.0
"""The oracle itself: it is silent about an engine that is right, and sees every mistake planted in one."""

from __future__ import annotations

import numpy as np
import pytest

from tests.oracle import history
from tests.oracle.campaign import play, shrink
from tests.oracle.judge import target_unharmed
from tests.oracle.planted import MISTAKES, NaiveEngine
from tests.oracle.target import OracleTarget
from tests.oracle.truth import PAGE, Truth, take

pytestmark = pytest.mark.needs("root", "gcc")

MAX_HISTORIES = 25


def test_naive_engine_is_right_for_many_histories() -> None:
    for seed in range(1, 11):
        verdict = play(history.generate(seed), NaiveEngine)
        assert not verdict.findings, f"seed {seed}, line {verdict.at}: {verdict.findings}"
        assert verdict.nr_generations >= 6


def test_heap_shrinks_without_taking_the_memory_of_the_c_library() -> None:
    """The first thread makes malloc extend the heap; a target that gave that back died at the next thread."""
    storm, shrink_heap = ["stormfreeze 21 8"], ["brk 0 by -15 0 1"]
    lines = [
        "brk 0 by 60 0 1",
        *storm,
        *shrink_heap * 6,
        *storm,
        "brk 0 by 3 0 1",
        *shrink_heap * 3,
        *storm,
        "freeze",
    ]
    verdict = play(lines, NaiveEngine)
    assert not verdict.findings
    with OracleTarget() as target:
        assert target.tell("brk 0 by 20 0 1") == 0
        assert target.tell(shrink_heap[0]) == 0
        assert target.tell(shrink_heap[0]) < 0


@pytest.mark.needs("transparent_huge")
def test_huge_page_the_kernel_makes_between_two_truths_is_no_change_of_the_target() -> None:
    with OracleTarget() as target:
        for line in (
            "map 0 thp 0 1",
            "advise 0 nohugepage 0 512",
            "write 0 fill 0 4 5",
            "advise 0 hugepage 0 512",
        ):
            assert target.tell(line) >= 0
        slot = target.tell("where 0")

        def changed(one: Truth, other: Truth) -> list[str]:
            """What is said of the slot; the target's own stack and data change with every command."""
            return [finding for finding in target_unharmed(one, other) if f": {slot:x}-" in finding]

        def look() -> Truth:
            target.settle()
            return take(target.pid)

        before = look()
        assert target.tell("advise 0 collapse 0 512") >= 0
        collapsed = look()
        filled = np.setdiff1d(collapsed.private.pages, before.private.pages)
        assert np.count_nonzero(filled // 512 == slot // (512 * PAGE)) == 508
        assert changed(before, collapsed) == changed(collapsed, before) == []
        assert target.tell("write 0 byte 9 1 7") >= 0  # in it
        assert any(f"page {slot + 9 * PAGE:#x} " in finding for finding in changed(before, look()))
        assert target.tell("write 0 zero 515 1 0") >= 0  # in the small pages behind it
        assert any(f"page {slot + 515 * PAGE:#x} " in finding for finding in changed(before, look()))


@pytest.mark.parametrize("mistake", sorted(MISTAKES))
def test_planted_mistake_is_seen(mistake: str) -> None:
    for seed in range(1, MAX_HISTORIES + 1):
        if play(history.generate(seed), lambda: NaiveEngine(mistake)).findings:
            return
    pytest.fail(f"{mistake} was not seen in {MAX_HISTORIES} histories")


def test_failing_history_is_shrunk_to_what_matters() -> None:
    lines = ["map 0 anon 0 8", "map 1 anon 0 8", "write 1 fill 0 8 5", "write 0 fill 0 8 7", "freeze"]
    lines += ["advise 0 dontneed 2 1", "write 1 fill 0 1 9", "freeze", "write 1 fill 2 1 10", "freeze"]

    def fails(shorter: list[str]) -> bool:
        return bool(play(shorter, lambda: NaiveEngine("inherit_vanished")).findings)

    assert fails(lines)
    short = shrink(lines, fails, seconds=60)
    assert fails(short)
    assert short == [
        "map 0 anon 0 8",
        "write 0 fill 0 8 7",
        "freeze",
        "advise 0 dontneed 2 1",
        "freeze",
    ]


def test_history_is_the_same_for_the_same_seed(tmp_path: pytest.TempPathFactory) -> None:
    lines = history.generate(42)
    assert lines == history.generate(42) != history.generate(43)
    path = tmp_path / "history.txt"  # type: ignore[operator]
    history.save(path, lines, "about\nit")
    assert history.load(path) == lines
