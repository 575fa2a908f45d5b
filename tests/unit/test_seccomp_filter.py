# SPDX-License-Identifier: Apache-2.0
"""Classic BPF, evaluated: hand-made filters and their known answers."""

import struct

import pytest

from checkpointd.linux.seccomp import (
    RET_ALLOW,
    RET_ERRNO,
    RET_KILL_PROCESS,
    RET_KILL_THREAD,
    RET_LOG,
    RET_TRAP,
)
from checkpointd.target.seccomp_filter import Filter, FilterError, Filters

LD_ABS, LD_IMM, LD_MEM, LD_LEN, LDX_IMM = 0x20, 0x00, 0x60, 0x80, 0x01
ST, STX, JEQ, JGT, JGE, JSET, JA, RET_K, RET_A, TAX, TXA = (
    0x02,
    0x03,
    0x15,
    0x25,
    0x35,
    0x45,
    0x05,
    0x06,
    0x16,
    0x07,
    0x87,
)
ALU_K = {"+": 0x04, "-": 0x14, "*": 0x24, "/": 0x34, "|": 0x44, "&": 0x54, "<<": 0x64, ">>": 0x74, "^": 0xA4}
AT_NR, AT_ARCH, AT_IP, AT_ARG0 = 0, 4, 8, 16


def program(*lines):
    padded = [(*line, *[0] * (4 - len(line))) for line in lines]
    return Filter.from_bytes(b"".join(struct.pack("=HBBI", *line) for line in padded))


def deny(nr, action):
    """The classic shape: check the architecture, compare the number."""
    return program(
        (LD_ABS, 0, 0, AT_ARCH),
        (JEQ, 1, 0, 0xC000003E),
        (RET_K, 0, 0, RET_KILL_PROCESS),
        (LD_ABS, 0, 0, AT_NR),
        (JEQ, 0, 1, nr),
        (RET_K, 0, 0, action),
        (RET_K, 0, 0, RET_ALLOW),
    )


def test_number_is_compared():
    rule = deny(323, RET_ERRNO | 1)
    assert rule.evaluate(323, (), 0) == RET_ERRNO | 1
    assert rule.evaluate(39, (), 0) == RET_ALLOW
    assert rule.evaluate(39, (), 0, arch=0x40000003) == RET_KILL_PROCESS


def test_low_and_high_words_of_arguments():
    wants_high = program((LD_ABS, 0, 0, AT_ARG0 + 12), (RET_A,))
    wants_low = program((LD_ABS, 0, 0, AT_ARG0 + 8), (RET_A,))
    assert wants_high.evaluate(0, (0, 0x1122_3344_5566_7788), 0) == 0x1122_3344
    assert wants_low.evaluate(0, (0, 0x1122_3344_5566_7788), 0) == 0x5566_7788
    assert wants_high.evaluate(0, (0, -1), 0) == 0xFFFF_FFFF


def test_instruction_pointer_is_seen():
    assert program((LD_ABS, 0, 0, AT_IP), (RET_A,)).evaluate(0, (), 0x7F00_1234) == 0x7F00_1234


@pytest.mark.parametrize(
    ("sign", "k", "expected"),
    [
        ("+", 0xFFFF_FFFF, 99), ("-", 101, 0xFFFF_FFFF), ("*", 1 << 31, 0), ("/", 7, 14), ("|", 3, 103),
        ("&", 6, 4), ("<<", 30, 0), (">>", 2, 25), ("^", 0xFF, 155),
    ],
)  # fmt: skip
def test_arithmetic_wraps_at_32_bits(sign, k, expected):
    assert program((LD_IMM, 0, 0, 100), (ALU_K[sign], 0, 0, k), (RET_A,)).evaluate(0, (), 0) == expected


def test_memory_index_and_length():
    lines = [
        (LD_LEN,),
        (ST, 0, 0, 3),
        (LDX_IMM, 0, 0, 5),
        (STX, 0, 0, 4),
        (LD_MEM, 0, 0, 3),
        (TAX,),
        (LD_MEM, 0, 0, 4),
    ]
    assert program(*lines, (0x0C,), (RET_A,)).evaluate(0, (), 0) == 69  # A + X
    assert program((LDX_IMM, 0, 0, 8), (TXA,), (RET_A,)).evaluate(0, (), 0) == 8


@pytest.mark.parametrize(
    ("jump", "k", "taken"),
    [(JGT, 100, False), (JGE, 100, True), (JSET, 4, True), (JSET, 8, False), (JEQ, 100, True)],
)
def test_jumps(jump, k, taken):
    lines = [
        (LD_IMM, 0, 0, 100),
        (jump, 1, 0, k),
        (RET_K, 0, 0, 0),
        (JA, 0, 0, 1),
        (RET_K, 0, 0, 1),
        (RET_K, 0, 0, 2),
    ]
    assert program(*lines).evaluate(0, (), 0) == (2 if taken else 0)


@pytest.mark.parametrize(
    "lines",
    [[(LD_ABS, 0, 0, 62), (RET_A,)], [(LD_IMM, 0, 0, 1)], [(0xFFF0,), (RET_K,)], [(0x40, 0, 0, 0), (RET_K,)]],
)
def test_what_no_filter_may_do_is_refused(lines):
    rule = program(*lines)
    with pytest.raises(FilterError):
        rule.evaluate(0, (), 0)
    assert Filters([rule]).action(0) == RET_KILL_PROCESS
    assert not Filters([rule]).harmless(0)


def test_the_strictest_of_several_filters_wins():
    both = Filters([deny(1, RET_ERRNO | 5), deny(1, RET_TRAP), deny(2, RET_LOG), deny(3, RET_KILL_THREAD)])
    assert both.action(1) == RET_TRAP
    assert both.action(2) == RET_LOG
    assert both.action(3) == RET_KILL_THREAD
    assert both.action(4) == RET_ALLOW
    assert both.allows(2)
    assert not both.harmless(1)
    assert Filters([deny(1, RET_ERRNO)]).harmless(1)
    assert not Filters([deny(1, RET_ERRNO)]).allows(1)


def test_no_filter_allows_everything():
    assert Filters([]).allows(9)
