# SPDX-License-Identifier: Apache-2.0
"""Reaps threads of a frozen target that die while the tracer thread is busy.

A traced thread that died stays until its tracer waits for it, and others wait for that: the report of the main
thread's death, and an execve in progress (which holds a lock that PTRACE_SEIZE wants, so the tracer itself may hang).
Any thread of a process may wait for the tracees of another, so one daemon thread looks after all freezes, ten times
a second, and sleeps when there are none.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Collection

from checkpointd.linux import ptrace

_PERIOD_S = 0.1


class _Undertaker:
    def __init__(self) -> None:
        self.pid = os.getpid()
        self._watched: dict[int, Collection[int]] = {}
        self._lock = threading.Lock()
        self._wanted = threading.Event()
        threading.Thread(target=self._run, name="undertaker", daemon=True).start()

    def watch(self, pid: int, tids: Collection[int]) -> None:
        with self._lock:
            self._watched[pid] = tids
        self._wanted.set()

    def forget(self, pid: int) -> None:
        with self._lock:
            self._watched.pop(pid, None)

    def _run(self) -> None:
        while True:
            self._wanted.wait()
            time.sleep(_PERIOD_S)
            with self._lock:
                tids = [tid for pid, held in self._watched.items() for tid in tuple(held) if tid != pid]
                if not self._watched:
                    self._wanted.clear()
            for tid in tids:
                ptrace.reap(tid)


_instance: _Undertaker | None = None


def get() -> _Undertaker:
    """The undertaker of this process (a fork has none of its parent's threads)."""
    global _instance  # noqa: PLW0603
    if _instance is None or _instance.pid != os.getpid():
        _instance = _Undertaker()
    return _instance
