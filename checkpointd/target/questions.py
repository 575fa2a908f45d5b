# SPDX-License-Identifier: Apache-2.0
"""Questions that only a process itself can answer, of whatever kinds, asked in one batch of calls.

A batch takes the target there and back and costs some 0.2 ms, for which it stands still: so those who ask add their
calls first, and look at the answers when all have been asked.

Raises what `Remote.batch` raises; ValueError when more room is wanted than was taken.
"""

from __future__ import annotations

from collections.abc import Sequence

from checkpointd.target.remote import Call, Remote


class Questions:
    """Calls to be made in one thread, and zeroed room for what they write.

    Args:
        room_bytes: how much of it.
        tid: the thread; None is the leader.
    """

    def __init__(self, remote: Remote, room_bytes: int, tid: int | None = None) -> None:
        self.remote = remote
        self._tid = tid
        self._start = self._next = remote.alloc(room_bytes)
        self._room_bytes = room_bytes
        self._calls: list[Call] = []
        self._results: list[int] = []
        self._written = b""

    def begin_anew(self, tid: int) -> None:
        """For another thread, in the same room, which is not zeroed again."""
        self._tid, self._next = tid, self._start
        self._calls.clear()

    def room(self, size_bytes: int) -> int:
        """The address of so many bytes, 16-byte aligned."""
        at = self._next
        if at + size_bytes > self._start + self._room_bytes:
            raise ValueError(f"{size_bytes} bytes more than the {self._room_bytes} there is room for")
        self._next = at + -(-size_bytes // 16) * 16
        return at

    def add(self, calls: Sequence[Call]) -> slice:
        """Where their results will be; see `results`.  A `Result` in them may not be used."""
        first = len(self._calls)
        self._calls += calls
        return slice(first, len(self._calls))

    def ask(self) -> None:
        """Make all calls."""
        self._results = self.remote.batch(self._calls, tid=self._tid)
        self._written = self.remote.read(self._start, self._next - self._start)

    def results(self, which: slice) -> list[int]:
        return self._results[which]

    def written(self, address: int, size_bytes: int) -> bytes:
        """What the calls wrote into room."""
        at = address - self._start
        return self._written[at : at + size_bytes]
