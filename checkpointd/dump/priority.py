# SPDX-License-Identifier: Apache-2.0
"""Going ahead of the machine's other work while a target stands still.

A stop is some milliseconds of work, handed to and fro between agent, page worker and target.  With ordinary priority
whoever is next may wait for a CPU for a time slice, which is as long as all of that work.  So those of our threads
that the target waits for take the lowest real-time priority, and give it back at the thaw.

Only threads of ordinary scheduling do: who runs the service as batch or idle work, or with a real-time priority, has
decided already.  Where it is not permitted (CAP_SYS_NICE, RLIMIT_RTPRIO; `RestrictRealtime=` of systemd), or limited in
time by a signal that would kill us (RLIMIT_RTTIME), all stays as it is.  What they start meanwhile has ordinary
priority (SCHED_RESET_ON_FORK): pages in any number are read by threads that do not go ahead of others.  The target's
own scheduling is never touched: our death would leave it so.

Source: sched(7), getrlimit(2).
"""

from __future__ import annotations

import contextlib
import os
import resource
from types import TracebackType

_PRIORITY = 1
_LEAST_CPUS = 2
"""With one, whom we wait for would have to wait for us."""


class AheadOfOthers:
    """A context in which threads go ahead; `end` is its early end.  Raises nothing.

    Args:
        tids: threads of ours, in this process or another.
    """

    def __init__(self, *tids: int) -> None:
        self._tids = tids
        self._raised: list[int] = []
        self._kept_off: list[tuple[int, set[int]]] = []  # and where they may run

    def __enter__(self) -> AheadOfOthers:
        if resource.getrlimit(resource.RLIMIT_RTTIME)[0] != resource.RLIM_INFINITY:
            return self
        if len(os.sched_getaffinity(0)) < _LEAST_CPUS:
            return self
        try:
            for tid in self._tids:
                with contextlib.suppress(OSError):
                    if os.sched_getscheduler(tid) & ~os.SCHED_RESET_ON_FORK == os.SCHED_OTHER:
                        self._raised.append(
                            tid
                        )  # first: an interruption right behind the call must not lose it
                        _schedule(tid, os.SCHED_RR | os.SCHED_RESET_ON_FORK, _PRIORITY)
        except BaseException:  # Ctrl-C
            self.end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def keep_off(self, tid: int, cpu: int) -> None:
        """Have one of the threads run elsewhere until the end: somebody of ordinary priority is to run on this CPU.

        The kernel moves him to another one that is free in milliseconds, not at once.
        """
        if tid not in self._raised:
            return
        with contextlib.suppress(OSError):
            allowed = os.sched_getaffinity(tid)
            if cpu in allowed and len(allowed) > 1:
                self._kept_off.append((tid, allowed))
                os.sched_setaffinity(tid, allowed - {cpu})

    def end(self) -> None:
        for tid, allowed in self._kept_off:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(tid, allowed)
        self._kept_off.clear()
        for tid in self._raised:
            with contextlib.suppress(OSError):
                try:
                    _schedule(tid, os.SCHED_OTHER, 0)
                except PermissionError:  # without rights the flag cannot be taken back
                    _schedule(tid, os.SCHED_OTHER | os.SCHED_RESET_ON_FORK, 0)
        self._raised.clear()


def _schedule(tid: int, policy: int, priority: int) -> None:
    os.sched_setscheduler(tid, policy, os.sched_param(priority))
