# SPDX-License-Identifier: Apache-2.0
"""What soft-dirty tracking is decided by: pagemap words, smaps, KSM's counters, the kernel's answers."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest
from kernel_shim import probe

from checkpointd.agent import check
from checkpointd.agent.__main__ import Agent
from checkpointd.agent.protocol import Channel, DumpArgs, TrackArgs
from checkpointd.errors import KernelLacks, UsageError
from checkpointd.features import Features
from checkpointd.linux import pagemap_scan as ps
from checkpointd.procfs import ksm, maps
from checkpointd.tracking.presence_words import MAYBE_ZERO, regions_of
from checkpointd.tracking.select import select_backend

PRESENT, SWAP, FILE = ps.PM_PRESENT, ps.PM_SWAP, ps.PM_FILE
SOFT, ALONE = ps.PM_SOFT_DIRTY, ps.PM_MMAP_EXCLUSIVE
ZERO = 77


def regions(words: list[int], zero: int = ZERO, *, soft_dirty: bool = True) -> list[tuple[int, int, int]]:
    found = regions_of(np.array(words, dtype=np.uint64), 16, zero, soft_dirty=soft_dirty)
    return [(start >> 12, end >> 12, categories) for start, end, categories in found.tolist()]


def test_words_become_runs_of_equal_categories() -> None:
    words = [0, PRESENT | 5, PRESENT | 6, PRESENT | SOFT | 9, 0, SWAP | 3, PRESENT | FILE | 8]
    assert regions(words) == [
        (17, 19, ps.PAGE_IS_PRESENT),
        (19, 20, ps.PAGE_IS_PRESENT | ps.PAGE_IS_SOFT_DIRTY),
        (21, 22, ps.PAGE_IS_SWAPPED),
        (22, 23, ps.PAGE_IS_PRESENT | ps.PAGE_IS_FILE),
    ]
    assert len(regions(words, soft_dirty=False)) == 3


def test_page_of_zeroes_is_told_by_its_frame_or_suspected_where_frames_are_hidden() -> None:
    assert regions([PRESENT | ZERO]) == [(16, 17, ps.PAGE_IS_PRESENT | ps.PAGE_IS_PFNZERO)]
    assert regions([PRESENT, PRESENT | ALONE], zero=0) == [
        (16, 17, ps.PAGE_IS_PRESENT | MAYBE_ZERO),
        (17, 18, ps.PAGE_IS_PRESENT),
    ]
    assert regions([0, 0]) == []


def test_mappings_that_hold_nothing_are_left_out() -> None:
    def vma(start: int, *lines: str) -> str:
        return f"{start:x}000-{start + 1:x}000 rw-p 00000000 00:00 0 \n" + "".join(
            f"{line}\n" for line in lines
        )

    text = (
        vma(1, "Rss:                   0 kB", "Swap:                  0 kB", "VmFlags: rd wr")
        + vma(2, "Rss:                   8 kB", "Swap:                  0 kB", "VmFlags: rd wr")
        + vma(3, "Rss:                   0 kB", "Swap:                  4 kB", "VmFlags: rd wr")
        + vma(4, "Rss:                   0 kB", "Swap:                  0 kB", "VmFlags: rd wr ht")
    )
    found = [start >> 12 for start, _ in maps.parse_populated(text.encode())]
    assert found == [2, 3, 4]


@pytest.mark.parametrize(
    ("before", "now", "idle"),
    [
        ((0, (3, 100), 5), (0, (3, 100), 5), True),  # off all the time
        ((1, (3, 100), 5), (1, (3, 100), 5), True),  # on, and it looked at nothing
        ((1, (3, 100), 5), (1, (3, 101), 5), False),
        ((0, (3, 100), 5), (0, (4, 900), 0), False),  # on and off in between
        ((1, (3, -1), 5), (1, (3, -1), 5), False),  # Linux before 6.6: cannot be told
        ((1, (3, -1), 0), (1, (3, -1), 0), True),
        ((0, (-1, -1), 0), (0, (-1, -1), 0), True),  # no KSM
    ],
)
def test_ksm_is_idle_only_when_that_can_be_told(before, now, idle) -> None:  # type: ignore[no-untyped-def]
    first, second = (ksm.KsmActivity(bool(running), work, merged) for running, work, merged in (before, now))
    assert ksm.was_idle(first, second) is idle


def test_counters_are_read_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("1\n")
    (tmp_path / "full_scans").write_text("12\n")
    (tmp_path / "pages_shared").write_text("3\n")
    assert ksm.read_activity(tmp_path) == ksm.KsmActivity(True, (12, -1), 3)


def features(*, scan: bool = True, uffd: bool = False, **works: bool) -> Features:
    findings = {
        name: probe.Finding(works.get(name, False), f"{name} {'works' if works.get(name) else 'is missing'}")
        for name in ("soft_dirty", "switch", "barrier", "keeps_writes", "marks_moves")
    }
    return Features(
        scan, False, uffd, False, works.get("soft_dirty", False), (), probe.ProbeResult(**findings)
    )


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (features(uffd=True, soft_dirty=True, switch=True, barrier=True), "uffd-wp"),
        (features(soft_dirty=True, switch=True, barrier=True), "precise-soft-dirty"),
        (features(scan=False, soft_dirty=True, barrier=True), "barrier-soft-dirty"),
        (features(scan=False, soft_dirty=True, keeps_writes=True), "soft-dirty"),
        (features(scan=False, soft_dirty=True), "content"),
        (features(scan=False), "content"),
    ],
)
def test_auto_takes_the_best_and_says_why(found: Features, expected: str) -> None:
    choice = select_backend("auto", found)
    assert choice.backend == expected
    assert choice.reason


def test_precise_is_patched_or_emulated_or_refused_with_the_reason() -> None:
    everything = features(uffd=True, soft_dirty=True, switch=True, barrier=True)
    assert select_backend("auto", everything, precise=True).backend == "precise-soft-dirty"
    no_switch = select_backend("auto", everything, precise=True, switch_refused="a filter forbids prctl")
    assert no_switch.backend == "barrier-soft-dirty"
    assert "a filter forbids prctl" in no_switch.reason
    with pytest.raises(KernelLacks, match="soft_dirty is missing"):
        select_backend("auto", features(uffd=True), precise=True)
    with pytest.raises(UsageError, match="does not go with"):
        select_backend("uffd-wp", everything, precise=True)


def test_a_backend_the_kernel_lacks_is_refused_with_the_way_out() -> None:
    with pytest.raises(
        KernelLacks, match="the soft-dirty backend cannot be used: soft_dirty is missing"
    ) as caught:
        select_backend("soft-dirty", features(uffd=True))
    assert caught.value.hint == "use --backend auto"


def test_an_agent_refuses_such_a_backend_before_it_looks_at_a_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def touched(*_: object, **__: object) -> None:
        raise AssertionError("the target was touched")

    monkeypatch.setattr(check.features, "probe", lambda: features())
    monkeypatch.setattr(check, "refuse_blockers", lambda *_: None)
    agent = Agent(Channel(socket.socketpair()[0]))
    monkeypatch.setattr(agent, "_target", touched)
    for op, args in (
        ("dump", DumpArgs(pid=1, store="/nowhere", backend="soft-dirty")),
        ("track", TrackArgs(pid=1, backend="soft-dirty")),
        ("track", TrackArgs(pid=1, precise=True)),
    ):
        with pytest.raises(KernelLacks):
            agent._operate(1, op, args.to_dict())


def test_plain_soft_dirty_asked_for_says_what_it_is_worth() -> None:
    assert "all content is compared" in select_backend("soft-dirty", features(soft_dirty=True)).reason
