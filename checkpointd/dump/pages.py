# SPDX-License-Identifier: Apache-2.0
"""The page worker, as the agent sees it: a process beside it that holds page buffers and writes the image.

Why a process of its own: an agent that owned a gigabyte would take tens of milliseconds to die, and its target
would stay frozen for that long.  The agent freezes, decides what to read and sends runs; the worker (page_server.py)
reads the frozen target's memory into a buffer prepared before the freeze, answers (the agent thaws), and only then
hashes, compresses and writes.

One request at a time over a `multiprocessing.connection.Connection`; both ends are ours, so messages are
pickles.  Requests are (operation, arguments); answers are ("ok", value) or ("error", CheckpointError.to_dict()),
and before them any number of ("progress", (pages done, pages in all)).  ("stop", ()) is the one request that may
come while another is worked on: it has no answer of its own, the other one ends as soon as it can.

Raises what the worker raised (a CheckpointError), and CheckpointError when the worker has died.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from checkpointd.dump.page_buffer import MAX_BUFFER_BYTES
from checkpointd.dump.page_reading import CopyRequest
from checkpointd.errors import CheckpointError
from checkpointd.memory import Runs
from checkpointd.procfs.process import read_stat

_STOPPED_CHECK_S = 0.5

Heard = Callable[[int, int], None]
"""Gets (pages done, pages in all); what it raises stops the work."""


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

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "checkpointd.dump.page_server",
                    str(theirs.fileno()),
                    str(self._buffer_bytes),
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._connection = Connection(ours.detach())
        self._copying = False
        self._broken = False

    def _revive(self) -> None:
        if self._broken:  # its socket closes before its end can be waited for
            self._process.wait()
        if self._process.poll() is not None:
            self._connection.close()
            self._start()

    def _gone(self) -> CheckpointError:
        """Nothing is waited for here: the target may still stand still."""
        self._broken = True
        self._process.kill()
        return CheckpointError(
            "the page worker ended unexpectedly; nothing was committed",
            hint="look for an out-of-memory kill in the kernel log, then dump again",
        )

    def begin(self, *, store: str, parent: str, compress: str, expected_pages: int) -> None:
        """Open the store, load the parent's index and touch the buffer.  Before the freeze."""
        self._revive()
        self._ask("begin", store, parent, compress, expected_pages)

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

    def start_copy(self, requests: list[CopyRequest]) -> None:
        """Like `copy`, but the answer is taken by `finish_copy`, which must be the next call (or `abort`)."""
        self._send("copy", requests)
        self._copying = True

    def finish_copy(self, heard: Heard | None = None) -> None:
        """Return when all that `start_copy` asked for, if anything, is out of the target.

        Raises:
            TargetGone: it died while being read.
        """
        if self._copying:
            self._copying = False
            self._receive(heard)

    def inherit(self, runs: Runs) -> None:
        """Take private pages from the parent."""
        self._ask("inherit", runs)

    def encode(self, heard: Heard | None = None) -> None:
        """Hash, compress and write what `copy` brought; the buffer is free again."""
        self._ask("encode", heard=heard)

    def read_and_encode(self, requests: list[CopyRequest], heard: Heard | None = None) -> None:
        """Read from something that stays still (a forked copy) piece by piece, in bounded memory."""
        self._ask("read_and_encode", requests, heard=heard)

    def commit(self, meta: dict[str, Any], state: bytes) -> dict[str, Any]:
        """Make the image durable; its ImageInfo with pages_zero, pages_same, pages_written, nr_inherited."""
        found: dict[str, Any] = self._ask("commit", meta, state)
        return found

    def abort(self) -> None:
        """Leave no half image; harmless at any time."""
        if self._copying:
            self._send("stop")
            with contextlib.suppress(CheckpointError):
                self.finish_copy()
        self._ask("abort")

    def close(self) -> None:
        """End the worker; an image not committed is aborted."""
        self._connection.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(self, operation: str, *args: Any, heard: Heard | None = None) -> Any:
        self._send(operation, *args)
        return self._receive(heard)

    def _send(self, operation: str, *args: Any) -> None:
        try:
            self._connection.send((operation, args))
        except OSError as error:
            raise self._gone() from error

    def _receive(self, heard: Heard | None) -> Any:
        stopped_by: BaseException | None = None
        try:
            while (answer := self._next_answer())[0] == "progress":
                if heard is None or stopped_by is not None:
                    continue
                try:
                    heard(*answer[1])
                except CheckpointError as error:
                    stopped_by = error
                    self._connection.send(("stop", ()))
        except (EOFError, OSError) as error:
            raise self._gone() from error
        except BaseException:
            self._gone()  # its answer would be taken for that to the next question
            raise
        if stopped_by is not None:
            raise stopped_by
        kind, value = answer
        if kind == "error":
            raise CheckpointError.from_dict(value)
        return value

    def _next_answer(self) -> Any:
        was_stopped = False
        while not self._connection.poll(_STOPPED_CHECK_S):
            is_stopped = self._is_stopped()
            if is_stopped and was_stopped:
                self._process.kill()
            was_stopped = is_stopped
        return self._connection.recv()

    def _is_stopped(self) -> bool:
        """SIGSTOP or a debugger holds it, and with it perhaps a frozen target."""
        try:
            return read_stat(self._process.pid).state in "tT"
        except (OSError, ValueError):
            return False
