# SPDX-License-Identifier: Apache-2.0
"""What a process answers about itself, where this machine's processes cannot be brought to say so."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from checkpointd.linux import prctl
from checkpointd.linux.arch import ARCH_GET_CPUID, Nr
from checkpointd.restore.threads import own_steps, own_warnings
from checkpointd.target.asked import ask
from checkpointd.target.remote import Call
from tests.unit.test_process_state import Scratch, thread

ENOKEY = 126


class Answering(Scratch):
    """A process that answers calls by number and first argument; 1 to all others."""

    def __init__(self, answers: dict[tuple[int, int], int]) -> None:
        super().__init__()
        self.answers = answers

    def batch(self, calls: Sequence[Call], *, undo: object = (), tid: int | None = None) -> list[int]:  # type: ignore[override]
        return [self.answers.get((int(call.nr), int(call.args[0])), 1) for call in calls]  # type: ignore[arg-type]


@pytest.mark.parametrize(("cpuid", "refused"), [(0, True), (1, False), (-22, False)])
def test_forbidden_cpuid_is_refused(cpuid: int, refused: bool) -> None:
    answers = {
        (Nr.ARCH_PRCTL, ARCH_GET_CPUID): cpuid,
        (Nr.PRCTL, prctl.PR_GET_MDWE): 0,
        (Nr.KEYCTL, 0): -ENOKEY,
    }
    found = ask(Answering(answers)).blockers  # type: ignore[arg-type]
    assert ["cpuid" in one for one in found] == ([True] if refused else [])


DEFAULT, OFF, FORCED = 3, 5, 9  # with PR_SPEC_PRCTL


@pytest.mark.parametrize(
    ("wanted", "ours", "set_to", "lost"),
    [
        ((DEFAULT, DEFAULT, 8), (DEFAULT, DEFAULT, 8), [], 0),
        ((OFF, FORCED, 8), (DEFAULT, DEFAULT, 8), [(0, 4), (1, 8)], 0),
        ((DEFAULT, 17, 3), (OFF, DEFAULT, 0), [(0, 2), (1, 16)], 0),
        ((OFF, FORCED, 3), (2, 0, 8), [], 2),
        ((DEFAULT, DEFAULT, 8), (FORCED, 2, 8), [], 1),
        ((), (DEFAULT, DEFAULT, 8), [], 0),
        ((2, 2, 8), (OFF, OFF, 8), [], 0),
    ],
)
def test_speculation_controls_are_set_or_told(
    monkeypatch: pytest.MonkeyPatch,
    wanted: tuple[int, ...],
    ours: tuple[int, ...],
    set_to: list[tuple[int, int]],
    lost: int,
) -> None:
    monkeypatch.setattr(prctl, "own_speculation", lambda: ours)
    one = thread(speculation=wanted, pending=())
    calls = [step.call for step in own_steps(Scratch(), one, 7, one.credentials)]  # type: ignore[arg-type]
    controls = [call.args[1:3] for call in calls if call.args[0] == prctl.PR_SET_SPECULATION_CTRL]
    assert controls == set_to
    assert len(own_warnings([one], one.credentials)) == lost
