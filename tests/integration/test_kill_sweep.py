# SPDX-License-Identifier: Apache-2.0
"""Agents are killed at every trace point of freeze and injection, and at random instants: no target may notice.

Well over 500 kills; `make soak` runs ten thousand.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.soak import lab

pytestmark = pytest.mark.needs("ptrace", "gcc")

# what is killed, in which target; each session is killed once at every one of its points
SWEEPS = [
    *(("dynamic", mode, "inject") for mode in ("regs", "nanosleep", "futex", "read", "altstack", "clock")),
    *(("dynamic", mode, "copy") for mode in ("ppoll", "forks")),
    ("dynamic", "signals", "twice"),
    ("dynamic", "rseq", "inject"),
    ("dynamic", "threads9", "plain"),
    ("dynamic", "births", "inject"),
    ("static", "nanosleep", "inject"),
    ("static", "regs", "fail"),
    ("nolibc", "", "inject"),
    ("go", "", "inject"),
]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return lab.build(tmp_path_factory.mktemp("programs"))


def _sweep(programs, tmp_path, program, mode, session, *, nr_random=10, every=1, **how) -> lab.Tally:
    if program not in programs:
        pytest.skip(f"no {program} compiler here")
    tally = lab.Tally()
    rng = random.Random(f"{program}{mode}{session}")
    with lab.Zygote() as zygote:
        target = lab.Target(programs, program, mode, tmp_path)
        try:
            names = lab.dry_run(zygote, target, session, **how)
            for at, name in list(enumerate(names, 1))[::every]:
                lab.kill_at(zygote, target, session, at, tally, name, **how)
            for _ in range(nr_random):
                lab.kill_after(zygote, target, session, rng.randrange(6000), tally, **how)
            lab.finish(zygote, target, **how)
            target.stop()
        finally:
            target.kill()
    return tally


@pytest.mark.parametrize(("program", "mode", "session"), SWEEPS)
def test_no_kill_harms_the_target(programs, tmp_path, program, mode, session):
    tally = _sweep(programs, tmp_path, program, mode, session)
    assert tally.kills >= 30


@pytest.mark.parametrize("mode", ["regs", "nanosleep"])
def test_no_kill_harms_a_target_without_a_signal_to_meet_by(programs, tmp_path, mode):
    """Driven from system call stop to system call stop."""
    assert _sweep(programs, tmp_path, "dynamic", mode, "inject", sig0=True).kills >= 30


@pytest.mark.parametrize("program", ["dynamic", "static", "nolibc", "go"])
def test_no_kill_harms_a_target_entered_through_its_own_text(programs, tmp_path, program):
    """Where the vdso has no room, as on Linux 6.1."""
    mode = "regs" if program in ("dynamic", "static") else ""
    assert _sweep(programs, tmp_path, program, mode, "inject", no_vdso=True).kills >= 30


def test_no_kill_harms_64_threads(programs, tmp_path):
    assert _sweep(programs, tmp_path, "dynamic", "threads64", "inject", every=7).kills >= 30


def _state(pid: int) -> set[str]:
    states = set()
    for tid in os.listdir(f"/proc/{pid}/task"):
        states.add(Path(f"/proc/{pid}/task/{tid}/stat").read_text().rsplit(")", 1)[1].split()[0])
    return states


def _wait_for_state(pid: int, wanted: set[str]) -> None:
    until = time.monotonic() + 10
    while _state(pid) != wanted:
        assert time.monotonic() < until, f"process {pid} is {_state(pid)}, not {wanted}"
        time.sleep(0.001)


def test_a_stopped_target_stays_stopped_and_goes_home_when_continued(programs, tmp_path):
    """SIGSTOP, then two agents killed one after the other in the middle: both ways home are walked at SIGCONT."""
    with lab.Zygote() as zygote:
        target = lab.Target(programs, "dynamic", "nanosleep", tmp_path)
        try:
            names = lab.dry_run(zygote, target, "inject")
            for at in range(1, len(names) + 1):
                os.kill(target.pid, signal.SIGSTOP)
                _wait_for_state(target.pid, {"T"})
                for point in (at, (at * 7) % len(names) + 1):
                    answer = zygote.run("inject", target.pid, at=point)
                    assert answer["killed"], answer["error"]
                    _wait_for_state(target.pid, {"T"})
                os.kill(target.pid, signal.SIGCONT)
                target.judge()
            os.kill(target.pid, signal.SIGSTOP)
            _wait_for_state(target.pid, {"T"})
            assert zygote.run("inject", target.pid)["error"] == ""
            _wait_for_state(target.pid, {"T"})
            os.kill(target.pid, signal.SIGCONT)
            lab.finish(zygote, target)
            target.stop()
        finally:
            target.kill()
