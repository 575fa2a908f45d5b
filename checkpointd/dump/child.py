# SPDX-License-Identifier: Apache-2.0
"""A child process of the agent that works for it: the page worker, the reader of a measurement.

One request at a time over a `multiprocessing.connection.Connection`; both ends are ours, so messages are pickles.
Requests are (operation, arguments); answers are ("ok", value) or ("error", CheckpointError.to_dict()), and before
them any number of ("progress", (pages done, pages in all)).  ("stop", ()) is the one request that may come while
another is worked on: it has no answer of its own, the other one ends as soon as it can.

The target may stand still while an answer is awaited.  So a child that somebody stopped (SIGSTOP, a debugger) is
killed, and nothing is waited for when it is gone.

Raises what the child raised (a CheckpointError), and CheckpointError when the child has died.
"""

from __future__ import annotations

import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from multiprocessing.connection import Connection
from typing import Any

from checkpointd.errors import CheckpointError
from checkpointd.procfs.process import read_stat

_STOPPED_CHECK_S = 0.5
_SO_SNDBUFFORCE = 32
_BUFFER_BYTES = 4 << 20
_FITS_BYTES = 64 << 10  # a socket takes more than twice that without a reader

Heard = Callable[[int, int], None]
"""Gets (pages done, pages in all); what it raises stops the work."""


class Child:
    """The agent's end.

    Args:
        module: run as `python -m MODULE FD WORDS...`; FD is the child's end of the connection.
        gone: what is said when it died, a sentence and a hint.
    """

    def __init__(self, module: str, *words: str, gone: tuple[str, str]) -> None:
        self._gone_words = gone
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            _enlarge(end)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno()), *words],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._connection = Connection(ours.detach())
        self._broken = False

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_dead(self) -> bool:
        """Is another one needed?  Not to be asked while a target stands still: it may wait for one just killed."""
        if self._broken:  # its socket closes before its end can be waited for
            self._process.wait()
        return self._process.poll() is not None

    def ask(self, operation: str, *args: Any, heard: Heard | None = None) -> Any:
        self.send(operation, *args)
        return self.receive(heard)

    def send(self, operation: str, *args: Any) -> None:
        try:
            message = pickle.dumps((operation, args), protocol=pickle.HIGHEST_PROTOCOL)
            if len(message) <= _FITS_BYTES:
                self._connection.send_bytes(message)
            else:
                self._send_watched(message)
        except OSError as error:
            raise self._gone() from error
        except BaseException:
            self.give_up()  # nobody would take its answer
            raise

    def _send_watched(self, message: bytes) -> None:
        """More than the socket takes at once: it goes on only while the child reads."""
        with ThreadPoolExecutor(1) as sender:
            sending = sender.submit(self._connection.send_bytes, message)
            was_stopped = False
            try:
                while not wait([sending], _STOPPED_CHECK_S).done:
                    was_stopped = self._kill_if_stopped(was_stopped)
            except BaseException:
                self.give_up()  # it would be waited for otherwise
                raise
            sending.result()

    def receive(self, heard: Heard | None = None) -> Any:
        """The answer to what was sent."""
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
            self.give_up()  # its answer would be taken for that to the next question
            raise
        if stopped_by is not None:
            raise stopped_by
        kind, value = answer
        if kind == "error":
            raise CheckpointError.from_dict(value)
        return value

    def give_up(self) -> None:
        """End it at once: what has been asked and answered is not certain any more."""
        self._broken = True
        self._process.kill()

    def close(self) -> None:
        """End it: the closed connection tells it to."""
        self._connection.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _gone(self) -> CheckpointError:
        self.give_up()
        what, hint = self._gone_words
        return CheckpointError(what, hint=hint)

    def _next_answer(self) -> Any:
        was_stopped = False
        while not self._connection.poll(_STOPPED_CHECK_S):
            was_stopped = self._kill_if_stopped(was_stopped)
        return self._connection.recv()

    def _kill_if_stopped(self, was_stopped: bool) -> bool:
        """Kill it when it is found stopped twice in a row; is it stopped now?"""
        try:
            is_stopped = read_stat(self._process.pid).state in "tT"
        except (OSError, ValueError):
            return False
        if is_stopped and was_stopped:
            self._process.kill()
        return is_stopped


def _enlarge(end: socket.socket) -> None:
    """So that no answer has to wait for its reader: one of the page worker is as long as writes are scattered."""
    for option in (_SO_SNDBUFFORCE, socket.SO_SNDBUF):
        try:
            end.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
        except PermissionError:
            continue
        return
