# SPDX-License-Identifier: Apache-2.0
"""Registers, restarts, samples and trace points: what needs no process."""

import subprocess
import sys

import pytest

from checkpointd import tracepoint
from checkpointd.target import restartable
from checkpointd.target.registers import NAMES, UserRegs, home_context, signed, word
from checkpointd.target.rendezvous import choose_signal
from checkpointd.target.restartable import BlockedCall, fix_spurious_eintr, parse_sched, parse_syscall


def regs(**fields):
    values = dict.fromkeys(NAMES, 0) | {"cs": 0x33, "rip": 0x1002}
    return UserRegs(**(values | {name: word(value) for name, value in fields.items()}))


def test_registers_survive_bytes():
    before = UserRegs(*range(1, 28))
    assert len(before.to_bytes()) == 216
    assert UserRegs.from_bytes(before.to_bytes()) == before
    assert before.r15 == 1
    assert before.gs == 27
    assert before.orig_rax == 16


@pytest.mark.parametrize("error", [512, 513, 514])
def test_going_home_repeats_the_call(error):
    home = home_context(regs(orig_rax=0, rax=-error))
    assert (home.rip, home.rax) == (0x1000, 0)


def test_going_home_from_a_sleep_uses_the_restart_block():
    home = home_context(regs(orig_rax=35, rax=-516))
    assert (home.rip, home.rax) == (0x1000, 219)


@pytest.mark.parametrize(
    "fields", [{"orig_rax": -1, "rax": -516}, {"orig_rax": 35, "rax": -4}, {"orig_rax": 1, "rax": 7}]
)
def test_going_home_from_elsewhere_changes_nothing(fields):
    assert home_context(regs(**fields)) == regs(**fields)


def test_signed_words():
    assert signed(word(-5)) == -5
    assert signed(5) == 5


EINTR = {"rax": -4}


@pytest.mark.parametrize(
    ("fields", "turned"),
    [
        ({"orig_rax": 232, "r10": 0xFFFFFFFF}, True),  # epoll_wait, for ever
        ({"orig_rax": 281, "r10": -1}, True),
        ({"orig_rax": 65}, True),  # semop
        ({"orig_rax": 128, "rdx": 0}, True),  # sigtimedwait without a timeout
        ({"orig_rax": 128, "rdx": 0x7000}, False),
        ({"orig_rax": 220, "r10": 0}, True),
        ({"orig_rax": 220, "r10": 0x7000}, False),
        ({"orig_rax": 441, "r10": 0x7000}, False),
        ({"orig_rax": 42}, False),  # connect
        ({"orig_rax": 45}, False),  # recvfrom with SO_RCVTIMEO
        ({"orig_rax": -1}, False),
    ],
)
def test_false_eintr_is_turned_where_the_arguments_say_all(fields, turned):
    before = regs(**EINTR, **fields)
    after = before.copy()
    assert fix_spurious_eintr(after, 1, 1, None, 0) is turned
    assert after.result == (-514 if turned else -4)
    assert after.r10 == before.r10


def test_a_finite_epoll_timeout_is_cut_by_the_time_slept(monkeypatch):
    monkeypatch.setattr(restartable, "same_sleep", lambda *args: True)
    args = (5, 0x7000, 1, 1000, 0, 0)
    waiting = regs(**EINTR, orig_rax=232, rdi=5, rsi=0x7000, rdx=1, r10=1000)
    fix_spurious_eintr(waiting, 1, 1, BlockedCall(232, args, 300_999, 0, 7), 2_000_000)
    assert waiting.r10 == 1000 - 302
    late = regs(**EINTR, orig_rax=232, rdi=5, rsi=0x7000, rdx=1, r10=1000)
    fix_spurious_eintr(late, 1, 1, BlockedCall(232, args, 9_000_000, 0, 7), 0)
    assert late.r10 == 0
    other = regs(**EINTR, orig_rax=232, rdi=6, rsi=0x7000, rdx=1, r10=1000)
    fix_spurious_eintr(other, 1, 1, BlockedCall(232, args, 300_000, 0, 7), 0)
    assert other.r10 == 1000, "another call than the one sampled keeps its timeout"


def test_parse_syscall():
    assert parse_syscall("35 0x7ffd 0x0 0x1 0x2 0x3 0x4 0x7ffc 0x7f00\n") == (35, (0x7FFD, 0, 1, 2, 3, 4))
    assert parse_syscall("running\n") is None
    assert parse_syscall("-1 0x7ffc 0x7f00\n") is None


def test_parse_sched():
    text = "sleep (1, #threads: 1)\n----\nse.exec_start   :  1234.567890\nnr_voluntary_switches : 3\n"
    assert parse_sched(text) == {"se.exec_start": 1234.56789, "nr_voluntary_switches": 3}


def status(**masks):
    return {name: f"{sum(1 << (signum - 1) for signum in signums):016x}" for name, signums in masks.items()}


def test_rendezvous_signal():
    assert choose_signal(status(), 0, is_go=lambda: False) == 23
    assert choose_signal(status(SigCgt={23}), 0, is_go=lambda: False) == 28
    assert choose_signal(status(SigCgt={23, 28}), 1 << 16, is_go=lambda: False) == 0
    assert choose_signal(status(SigCgt={23, 28}, SigIgn={13}), 1 << 16, is_go=lambda: False) == 13
    assert choose_signal(status(SigCgt={17, 23, 28}), 0, is_go=lambda: True) == 23
    assert choose_signal(status(SigCgt={17, 23, 28}, SigPnd={23}), 0, is_go=lambda: True) == 0
    assert choose_signal(status(ShdPnd={23}), 0, is_go=lambda: False) == 28
    assert choose_signal(status(SigCgt={17, 23, 28}, SigIgn={5, 18, 22}), 0, is_go=lambda: False) == 0


def test_tracepoint_rules():
    seen = []
    try:
        tracepoint.register("a.*", seen.append)
        tracepoint.register("b", seen.append, at=2)
        for name in ("a.x", "b", "c", "b", "b", "a.y"):
            tracepoint.hit(name)
    finally:
        tracepoint.clear()
    tracepoint.hit("a.x")
    assert seen == ["a.x", "b", "a.y"]


@pytest.mark.parametrize("text", ["a", "a=boom", "a=sleep:x", "a@x=kill"])
def test_bad_tracepoint_rules_are_loud(text):
    with pytest.raises(ValueError):
        tracepoint.parse(text)


def test_tracepoints_by_environment():
    code = "from checkpointd import tracepoint as t\nt.hit('x')\nprint('one', flush=True)\nt.hit('x')\nprint('two')"
    env = {"CHECKPOINTD_TRACEPOINT": "y=raise,x@2=kill", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == -9
    assert done.stdout == "one\n"
