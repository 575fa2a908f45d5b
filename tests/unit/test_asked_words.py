# SPDX-License-Identifier: Apache-2.0
"""What a process answers about itself, where this machine's processes cannot be brought to say so."""

from __future__ import annotations

import errno
from collections.abc import Sequence

import pytest

from checkpointd.linux import prctl
from checkpointd.linux.arch import ARCH_GET_CPUID, MCL_FUTURE, MCL_ONFAULT, Nr
from checkpointd.restore.threads import own_steps, own_warnings
from checkpointd.target.asked import ASKED_ROOM_BYTES, Asked, ask
from checkpointd.target.questions import Questions
from checkpointd.target.remote import Call, Result
from tests.unit.test_process_state import Scratch, thread

ENOKEY = 126


class Answering(Scratch):
    """A process that answers calls by number and first argument; 1 to all others."""

    def __init__(self, answers: dict[tuple[int, int], int]) -> None:
        super().__init__()
        self.answers = answers
        self.in_core = 0
        self.batches: list[tuple[list[int], list[int]]] = []

    def batch(self, calls: Sequence[Call], *, undo: Sequence[Call] = (), tid: int | None = None) -> list[int]:  # type: ignore[override]
        self.batches.append(([call.nr for call in calls], [call.nr for call in undo]))
        for call in calls:
            if call.nr == Nr.MINCORE:
                self.memory[int(call.args[2])] = bytes([self.in_core])  # type: ignore[arg-type]
        return [self.answers.get(_key(call), 1) for call in calls]


def _asked(process: Answering) -> Asked:
    questions = Questions(process, ASKED_ROOM_BYTES)
    answer = ask(questions)
    questions.ask()
    return answer()


def _key(call: Call) -> tuple[int, int]:
    """Advice is for the page of whatever was put in scratch."""
    first = call.args[0]
    if isinstance(first, Result):
        return int(call.nr), -1
    return int(call.nr), 0 if call.nr == Nr.MADVISE else first


@pytest.mark.parametrize(("cpuid", "refused"), [(0, True), (1, False), (-22, False)])
def test_forbidden_cpuid_is_refused(cpuid: int, refused: bool) -> None:
    answers = {
        (Nr.ARCH_PRCTL, ARCH_GET_CPUID): cpuid,
        (Nr.PRCTL, prctl.PR_GET_MDWE): 0,
        (Nr.KEYCTL, 0): -ENOKEY,
    }
    found = _asked(Answering(answers)).blockers
    assert ["cpuid" in one for one in found] == ([True] if refused else [])


@pytest.mark.parametrize(
    ("mapped", "in_core", "flags"),
    [(0x7000, 0, MCL_FUTURE | MCL_ONFAULT), (0x7000, 1, MCL_FUTURE), (-11, 0, MCL_FUTURE)],
)
def test_page_mapped_to_ask_is_unmapped_once(mapped: int, in_core: int, flags: int) -> None:
    """What is undone if we die must not be in the same batch: another thread may have mapped something there since."""
    process = Answering(
        {
            (Nr.MMAP, 0): mapped,
            (Nr.MADVISE, 0): -errno.EINVAL,
            (Nr.MINCORE, -1): 0,
            (Nr.KEYCTL, 0): -ENOKEY,
        }
    )
    process.in_core = in_core
    assert _asked(process).lock_future == flags
    for work, undo in process.batches:
        assert not (Nr.MUNMAP in work and Nr.MUNMAP in undo)
    assert sum(Nr.MUNMAP in work for work, _ in process.batches) == (mapped > 0)


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
