# SPDX-License-Identifier: Apache-2.0
"""Running system calls inside another process: the interface, apart from who provides it.

Two providers exist: the kill-safe injection into a live target (`target/inject.py`) and the stub of a process
being restored (`restore/stub.py`).  Code that saves or brings back one kind of state is written against
`Remote` alone.

Arguments of a call are ints (negative ones as two's complement), or `Result(i)`: the result of entry
`i` of the same batch, only as the first argument (the runner's bit 30).  Pointers are addresses in
the remote's scratch memory: `put` copies bytes there and returns their address, `alloc` reserves zeroed room,
`read` reads any memory of the process.  Scratch lives until the next `reset`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


@dataclass(frozen=True, slots=True)
class Result:
    """The result of entry `index` of the same batch, as a first argument."""

    index: int


class Call(NamedTuple):
    """One system call: its number and up to six arguments."""

    nr: int
    args: tuple[int | Result, ...] = ()


class Remote(Protocol):
    """System calls in one thread of one process (its leader unless `tid` says otherwise)."""

    pid: int
    """The process id in our own pid namespace."""

    def batch(self, calls: Sequence[Call], *, undo: Sequence[Call] = (), tid: int | None = None) -> list[int]:
        """Run the calls in order and return their raw results (-errno on failure, all calls are made).

        Args:
            undo: calls the target makes by itself if we die after this batch (close what it opened, unmap
                what it mapped).  `Result(i)` refers to entry i of `calls`.  A provider that takes the
                process down with us may ignore it.
            tid: the thread to run in; None is the leader.

        Raises:
            TargetGone: the process is no more.
        """

    def call(self, nr: int, *args: int) -> int:
        """One call; its result.

        Raises:
            OSError: the call failed in the target.
        """

    def put(self, data: bytes) -> int:
        """Copy `data` to scratch, 16-byte aligned; its address."""

    def alloc(self, size_bytes: int) -> int:
        """Zeroed scratch, 16-byte aligned; its address."""

    def read(self, address: int, size_bytes: int) -> bytes:
        """Memory of the process (any VMA that ptrace may read).

        Raises:
            OSError: the range is not all readable.
        """

    def reset(self) -> None:
        """Forget all scratch."""
