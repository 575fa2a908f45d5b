# SPDX-License-Identifier: Apache-2.0
"""Scheduling as the kernel takes it, and clamps of utilisation, which few kernels have."""

from __future__ import annotations

import dataclasses
import errno
import os
import struct

import pytest

from checkpointd.linux import sched
from checkpointd.linux.arch import Nr
from checkpointd.restore.surroundings import schedule
from checkpointd.target.threads import read_scheduling

ATTR = struct.Struct("=IIQiIQQQII")


class Clamping:
    """A kernel with clamps, for one thread."""

    def __init__(self, clamps: tuple[int, int]) -> None:
        self.clamps = clamps
        self.real = sched.syscall

    def __call__(self, nr: int, *args: object, name: str = "") -> int:
        if nr == Nr.SCHED_SETATTR:
            attr = ATTR.unpack(args[1])  # type: ignore[arg-type]
            if self.clamps == (0, 0) and attr[2] & 0x60:
                raise OSError(errno.EOPNOTSUPP, name)
            assert attr[2] == 0x78  # the clamps alone
            self.clamps = attr[8:]
            return 0
        result = self.real(nr, *args, name=name)
        if nr == Nr.SCHED_GETATTR:
            ATTR.pack_into(args[1], 0, *ATTR.unpack(args[1])[:8], *self.clamps)  # type: ignore[arg-type, call-overload]
        return result


@pytest.mark.parametrize(
    ("there", "wanted", "after", "told"),
    [
        ((0, 1024), (100, 512), (100, 512), 0),
        ((0, 1024), (0, 1024), (0, 1024), 0),
        ((0, 1024), None, (0, 1024), 0),
        ((0, 1024), (0, 0), (0, 1024), 0),
        ((0, 0), (0, 1024), (0, 0), 0),
        ((0, 0), (100, 512), (0, 0), 1),
    ],
)
def test_clamps_are_given_back_where_there_are_some(
    monkeypatch: pytest.MonkeyPatch,
    there: tuple[int, int],
    wanted: tuple[int, int] | None,
    after: tuple[int, int],
    told: int,
) -> None:
    kernel = Clamping(there)
    monkeypatch.setattr(sched, "syscall", kernel)
    now = read_scheduling(os.getpid())
    assert now.clamps == there
    warnings: list[str] = []
    schedule(os.getpid(), dataclasses.replace(now, clamps=wanted), warnings)
    assert kernel.clamps == after
    assert len(warnings) == told
