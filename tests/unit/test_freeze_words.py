# SPDX-License-Identifier: Apache-2.0
"""Registers, restarts, samples and trace points: what needs no process."""

import ctypes
import re
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
CALL_AT = 0x1000
"""What is before the `rip` of `regs`."""


class Code:
    """Memory that holds `code` right before a system call instruction."""

    def __init__(self, code: bytes = b"", call_at: int = CALL_AT) -> None:
        self.code, self.start = bytes(64) + code, call_at - 64 - len(code)

    def read(self, address: int, nr_bytes: int) -> bytes:
        if address < self.start:
            raise OSError
        return self.code[address - self.start :][:nr_bytes]


LIKE_GLIBC = Code(bytes.fromhex("448b5424184189c0488b7424108b7c240cb8e8000000"))
"""mov 0x18(%rsp),%r10d, and other registers."""
LIKE_MUSL = Code(bytes.fromhex("4c63d14863ffb8190100004531c0"))
LIKE_GO = Code(bytes.fromhex("4989f24889fa4889ce4889df"))
INLINED = Code(bytes.fromhex("b8e80000004889ef4889de4489e2"))
"""Everything but r10, which was set before a loop."""


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
        ({"orig_rax": 426, "r10": 1}, True),  # io_uring_enter
        ({"orig_rax": 426, "r10": 1 | 8}, False),  # a timeout may be in memory
        ({"orig_rax": 42}, False),  # connect
        ({"orig_rax": 45}, False),  # recvfrom with SO_RCVTIMEO
        ({"orig_rax": -1}, False),
    ],
)
def test_false_eintr_is_turned_where_the_arguments_say_all(fields, turned):
    before = regs(**EINTR, **fields)
    after = before.copy()
    assert fix_spurious_eintr(after, 1, 1, None, 0, LIKE_GLIBC) is turned
    assert after.result == (-514 if turned else -4)
    assert after.r10 == before.r10


ARGS = (5, 0x7000, 1, 1000, 0, 0)
WAITING = {**EINTR, "orig_rax": 232, "rdi": 5, "rsi": 0x7000, "rdx": 1, "r10": 1000}


@pytest.mark.parametrize("code", [LIKE_GLIBC, LIKE_MUSL, LIKE_GO])
def test_a_finite_epoll_timeout_is_cut_by_the_time_slept(code, monkeypatch):
    monkeypatch.setattr(restartable, "same_sleep", lambda *args: True)
    waiting = regs(**WAITING)
    fix_spurious_eintr(waiting, 1, 1, BlockedCall(232, ARGS, 300_999, 0, 7), 2_000_000, code)
    assert waiting.r10 == 1000 - 302
    late = regs(**WAITING)
    fix_spurious_eintr(late, 1, 1, BlockedCall(232, ARGS, 9_000_000, 0, 7), 0, code)
    assert late.r10 == 0
    other = regs(**(WAITING | {"rdi": 6}))
    fix_spurious_eintr(other, 1, 1, BlockedCall(232, ARGS, 300_000, 0, 7), 0, code)
    assert other.r10 == 1000, "another call than the one sampled keeps its timeout"


@pytest.mark.parametrize("code", [INLINED, Code(call_at=CALL_AT + 0x10000)])
def test_a_register_the_program_may_use_again_is_left_alone(code, monkeypatch):
    monkeypatch.setattr(restartable, "same_sleep", lambda *args: True)
    waiting = regs(**WAITING)
    assert fix_spurious_eintr(waiting, 1, 1, BlockedCall(232, ARGS, 300_999, 0, 7), 2_000_000, code)
    assert (waiting.r10, waiting.result) == (1000, -514)


@pytest.mark.parametrize("name", ["epoll_wait", "epoll_pwait"])
def test_the_code_of_the_c_library_is_known(name):
    at = ctypes.cast(getattr(ctypes.CDLL(None), name), ctypes.c_void_p).value
    code = ctypes.string_at(at, 160)
    calls = [found.start() for found in re.finditer(b"\x0f\x05", code)]
    assert calls
    for call in calls:
        waiting = regs(**WAITING, rip=at + call + 2)
        memory = Code(code[:call], at + call)
        assert restartable._sets_r10(memory, waiting.rip - 2)


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
