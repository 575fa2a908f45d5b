# SPDX-License-Identifier: Apache-2.0
"""Kills a tracer that is itself stopped while it holds a target frozen.

Nothing inside a stopped process can help (SIGSTOP, a debugger, swapped out), so the watchdog is a process of its
own: tiny, in a session of its own, holding a pidfd of its parent and one end of a pipe.  The parent arms it with a
deadline before a freeze and disarms it after the thaw.  At the deadline it sends SIGKILL to the parent; the kernel
then lets every target go, and injected code goes home by itself.

`arm` and `disarm` are one write to a pipe each, of a few microseconds.  When the watchdog died it is started again.
It ends by itself when its parent does.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

# Reads lines "SECONDS" (a CLOCK_MONOTONIC deadline; 0: disarmed) from stdin; the pidfd is taken before the first
# answer, while the parent certainly lives.
_PROGRAM = """
import os, select, signal, sys, time
parent = os.pidfd_open(int(sys.argv[1]))
os.write(1, b"+")
os.close(1)
deadline, text = 0.0, b""
while True:
    wait = max(0.0, deadline - time.monotonic()) if deadline else None
    ready = select.select([0], [], [], wait)[0]
    if ready:
        part = os.read(0, 4096)
        if not part:
            break
        *lines, text = (text + part).split(b"\\n")
        if lines:
            deadline = float(lines[-1])
    elif deadline:
        signal.pidfd_send_signal(parent, signal.SIGKILL)
        break
"""


class Watchdog:
    """One for a process; thread-safe.  The latest `arm` counts."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._start()

    def _start(self) -> None:
        # -I: nothing of ours or of the user's is imported; close_fds: none of our descriptors live on in it
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-E", "-c", _PROGRAM, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            close_fds=True,
            start_new_session=True,
            cwd="/",
        )
        assert self._process.stdout is not None
        self._process.stdout.read(1)
        self._process.stdout.close()

    def _say(self, deadline: float) -> None:
        line = b"%.6f\n" % deadline
        with self._lock:
            for attempt in (1, 2):
                assert self._process is not None and self._process.stdin is not None
                try:
                    self._process.stdin.write(line)
                    self._process.stdin.flush()
                    return
                except (BrokenPipeError, ValueError):
                    if attempt == 2:
                        raise
                    self._end()
                    self._start()

    def arm(self, deadline_s: float) -> None:
        """Kill this process if it does not disarm within `deadline_s` seconds from now."""
        self._say(time.monotonic() + deadline_s)

    def disarm(self) -> None:
        self._say(0)

    @contextlib.contextmanager
    def armed(self, deadline_s: float) -> Iterator[None]:
        """Armed inside the `with` block."""
        self.arm(deadline_s)
        try:
            yield
        finally:
            self.disarm()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def close(self) -> None:
        """End it."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        if self._process is None:
            return
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        try:
            self._process.wait(1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
