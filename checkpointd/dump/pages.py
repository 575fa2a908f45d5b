# SPDX-License-Identifier: Apache-2.0
"""The page worker, as the agent sees it: a process beside it that holds page buffers and writes the image.

Why a process of its own: an agent that owned a gigabyte would take tens of milliseconds to die, and its target
would stay frozen for that long.  The agent freezes, decides what to read and sends runs; the worker (page_server.py)
reads the frozen target's memory into a buffer prepared before the freeze, answers (the agent thaws), and only then
hashes, compresses and writes.

How the two talk is in child.py.  Raises what the worker raised (a CheckpointError), and CheckpointError when it died.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from checkpointd.dump.child import Child, Heard
from checkpointd.dump.page_buffer import MAX_BUFFER_BYTES
from checkpointd.dump.page_reading import CopyRequest
from checkpointd.dump.targets import KnownAlone
from checkpointd.errors import CheckpointError
from checkpointd.image.info import ImageInfo
from checkpointd.memory import Runs
from checkpointd.tracking.base import Ranges, Taken

_GONE = (
    "the page worker ended unexpectedly; nothing was committed",
    "look for an out-of-memory kill in the kernel log, then dump again",
)


class PageWorker:
    """The agent's end.

    A worker that was killed (out of memory) is replaced at the next `begin`.  One that somebody stopped while a target
    may stand still for it is killed.

    Args:
        buffer_bytes: what pages of a stopped target may take in memory.
    """

    def __init__(self, *, buffer_bytes: int = MAX_BUFFER_BYTES) -> None:
        self._buffer_bytes = buffer_bytes
        self._start()

    @property
    def pid(self) -> int:
        return self._child.pid

    def _start(self) -> None:
        self._child = Child("checkpointd.dump.page_server", str(self._buffer_bytes), gone=_GONE)
        self._walking = self._copying = False

    def _revive(self) -> None:
        if self._child.is_dead():
            self._child.close()
            self._start()

    def begin(
        self,
        *,
        pid: int,
        store: str,
        parent: str,
        compress: str,
        delta: bool,
        expected_pages: int,
        alone: KnownAlone | None = None,
    ) -> ImageInfo | None:
        """Open the store, load the parent's index and touch the buffer.  Before the freeze.

        When we die in the middle, the worker reaps what a forked copy leaves with the target `pid`.  With `delta`,
        `encode` and `read_and_encode` read the parent's pages too; `copy` never does.  `alone` is for `start_walk`.

        Returns:
            Facts of the parent.
        """
        self._revive()
        found: ImageInfo | None = self._ask(
            "begin", pid, store, parent, compress, delta, expected_pages, alone
        )
        return found

    def latest_of(self, store: str, pid: int, start_time: int, boot_id: str) -> str:
        """See `Store.latest_of`."""
        self._revive()
        found: str = self._ask("latest_of", store, pid, start_time, boot_id)
        return found

    def copy(self, requests: list[CopyRequest], heard: Heard | None = None) -> None:
        """Read pages into the buffer; returns when all of them are out of the target.

        Raises:
            TargetGone: it died while being read.
        """
        self._ask("copy", requests, heard=heard)

    def start_walk(self, ranges: Ranges, has_guard_category: bool, code: Runs, most: int) -> None:
        """Have `walks.take_written` made of the frozen target, and then all read that was written but for `code`.

        Not when that is more than `most` pages.  `finish_walk` and then `finish_copy` take the answers: these must be
        the next calls (or `abort`).
        """
        self._check_idle()
        self._walking = self._copying = True
        with self._asking():
            self._child.send("walk", ranges, has_guard_category, code, most)
            self._child.send("copy_written")

    @property
    def is_walking(self) -> bool:
        """Is it for `finish_walk` to be called?"""
        return self._walking

    def finish_walk(self) -> tuple[Taken, bool | None]:
        """What was written, of which `Taken.read` is being read; and is `alone` so still, if that was looked at.

        Raises:
            TargetGone: it died meanwhile.
        """
        if not self._walking:
            raise CheckpointError("the page worker did not look for what was written")
        self._walking = False
        found: tuple[Taken, bool | None] = self._child.receive()
        return found

    def start_copy(self, requests: list[CopyRequest]) -> None:
        """Like `copy`, but the answer is taken by `finish_copy`, which must be the next call (or `abort`)."""
        self._check_idle()
        self._copying = True
        with self._asking():
            self._child.send("copy", requests, True)

    def finish_copy(self, heard: Heard | None = None) -> None:
        """Return when all that `start_copy` asked for, if anything, is out of the target.

        Raises:
            TargetGone: it died while being read.
        """
        if self._walking:
            self.finish_walk()
        if self._copying:
            self._copying = False
            self._child.receive(heard)

    def inherit(self, runs: Runs) -> None:
        """Take private pages from the parent."""
        self._ask("inherit", runs)

    def encode(self, heard: Heard | None = None) -> None:
        """Hash, compress and write what `copy` brought; the buffer is free again."""
        self._ask("encode", heard=heard)

    def read_and_encode(
        self, requests: list[CopyRequest], heard: Heard | None = None, *, still: bool = False
    ) -> None:
        """Read from something that stays still (a forked copy) piece by piece, in bounded memory.

        Args:
            still: a target waits for it, so that limits are to be looked at often.
        """
        self._ask("read_and_encode", requests, still, heard=heard)

    def commit(self, meta: dict[str, Any], state: bytes) -> dict[str, Any]:
        """Make the image durable; its ImageInfo with pages_zero, pages_same, pages_written, nr_inherited."""
        found: dict[str, Any] = self._ask("commit", meta, state)
        return found

    def abort(self) -> None:
        """Leave no half image; harmless at any time."""
        if self._walking:
            with contextlib.suppress(CheckpointError):
                self.finish_walk()
        if self._copying:
            self._child.send("stop")
            with contextlib.suppress(CheckpointError):
                self.finish_copy()
        self._ask("abort")

    def _ask(self, operation: str, *args: Any, heard: Heard | None = None) -> Any:
        self._check_idle()
        return self._child.ask(operation, *args, heard=heard)

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        """Around requests whose answers are taken later: a worker that may not have got them is ended."""
        try:
            yield
        except BaseException:
            self._child.give_up()
            raise

    def _check_idle(self) -> None:
        """Two requests at once would take each other's answers: a page could be taken for read that is not."""
        if self._walking or self._copying:
            raise CheckpointError(
                "the page worker is asked for something while it reads; this is a defect of ours"
            )

    def close(self) -> None:
        """End the worker; an image not committed is aborted."""
        with contextlib.suppress(CheckpointError):  # it is dead
            self._child.send("leave")
        self._child.close()
