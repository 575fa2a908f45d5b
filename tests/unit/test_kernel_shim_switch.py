# SPDX-License-Identifier: Apache-2.0
"""The switch described for somebody else, the probe's report, and the warning about mappings."""

from __future__ import annotations

import errno
import json
import subprocess

import pytest
from kernel_shim import limits, probe, switch

ANSWER = {"works": True, "why": "seen"}
NO = {"works": False, "why": "not here"}


def report(**answers: dict[str, object]) -> str:
    return json.dumps(
        {"soft_dirty": ANSWER, "switch": NO, "barrier": NO, "keeps_writes": NO, "marks_moves": NO} | answers
    )


def test_calls_for_another_process_are_the_prctl_of_the_patch() -> None:
    assert switch.set_call(True) == (157, (0x50534454, 1, 0, 0, 0))
    assert switch.set_call(False) == (157, (0x50534454, 0, 0, 0, 0))
    assert switch.query_call() == (157, (0x50534455, 0, 0, 0, 0))


def test_result_of_an_injected_call_is_value_or_error() -> None:
    assert switch.check_result(1) == 1
    with pytest.raises(OSError) as caught:
        switch.check_result(-errno.EINVAL)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({"switch": ANSWER, "barrier": ANSWER}, probe.Precision.PATCHED),
        ({"barrier": ANSWER}, probe.Precision.EMULATED),
        ({}, probe.Precision.NEITHER),
        ({"soft_dirty": NO, "switch": ANSWER, "barrier": ANSWER}, probe.Precision.NEITHER),
    ],
)
def test_best_precision_follows_from_the_answers(
    answers: dict[str, dict[str, object]], expected: probe.Precision
) -> None:
    result = probe.parse(report(**answers))
    assert result.precision is expected
    assert result.why.startswith(expected.value)
    assert result.as_dict()["precision"] == expected.value


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"soft_dirty": 1}', '{"soft_dirty": {"works": 1}}'])
def test_a_broken_report_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a probe report"):
        probe.parse(text)


def test_a_probe_that_hangs_or_crashes_counts_as_no(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*args: object, **kwargs: object) -> None:
        raise subprocess.TimeoutExpired("probe", 1)

    monkeypatch.setattr(probe.subprocess, "run", hang)
    assert probe.probe_now(1).precision is probe.Precision.NEITHER
    crashed = subprocess.CompletedProcess([], -11, "", "Segmentation fault\n")
    monkeypatch.setattr(probe.subprocess, "run", lambda *args, **kwargs: crashed)
    result = probe.probe_now()
    assert not result.soft_dirty.works
    assert "Segmentation fault" in result.why


@pytest.mark.parametrize(
    ("nr_vmas", "near", "imprecise"), [(100, False, False), (760, True, False), (950, True, True)]
)
def test_warning_comes_before_the_limit_and_names_the_remedy(
    nr_vmas: int, near: bool, imprecise: bool
) -> None:
    headroom = limits.Headroom(nr_vmas, 1000)
    assert (headroom.near, headroom.imprecise) == (near, imprecise)
    assert (headroom.warning is not None) is near
    if headroom.warning:
        assert "vm.max_map_count=4000" in headroom.warning


def test_fallback_threshold_is_the_kernels() -> None:
    assert limits.fallback_threshold(65530) == 65530 - 4095


def test_a_probe_that_a_busy_machine_held_up_is_made_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it says is kept for good: it must not be that the time was up."""
    outcomes: list[str | None] = [None, report(soft_dirty=ANSWER)]
    patience: list[float] = []

    def run(words: list[str], *, timeout: float, **_: object) -> subprocess.CompletedProcess[str]:
        patience.append(timeout)
        outcome = outcomes.pop(0)
        if outcome is None:
            raise subprocess.TimeoutExpired(words, timeout)
        return subprocess.CompletedProcess(words, 0, outcome, "")

    monkeypatch.setattr(probe.subprocess, "run", run)
    asked = probe.probe.__wrapped__
    assert asked().soft_dirty.works
    assert patience[0] < patience[1]
    outcomes += [None, None]
    assert "did not end" in asked().soft_dirty.why
