# SPDX-License-Identifier: Apache-2.0
"""What a process would have undone at its end: System V semaphores operated with SEM_UNDO.

The kernel shows nobody the adjustments.  It tells whether a process has a list of them (kcmp(2)): one with a single
thread has it since its first such operation, one with several since it had them.  There the last operator of a
semaphore is the best sign: who holds a lock made of one is that.

Source: semop(2), kcmp(2); Linux ipc/sem.c (copy_semundo, get_undo_list).
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys

from checkpointd.linux import kcmp, sysv
from checkpointd.procfs import process

_MAX_SEMAPHORES = 10_000
"""As many are looked at before a dump, some 20 ms; anybody may make more."""


def _at_most(sets: dict[int, int], nr_semaphores: int) -> dict[int, int]:
    kept = {}
    for semid, nr in sets.items():
        nr_semaphores -= nr
        if nr_semaphores < 0:
            break
        kept[semid] = nr
    return kept


def undo_warnings(pid: int) -> list[str]:
    """Of a process in our ipc namespace.

    Raises:
        OSError: it is gone.
    """
    sets = sysv.operated_semaphores()
    if not sets:
        return []
    if len(process.thread_ids(pid)) == 1:
        if not _has_undo_list(pid):
            return []
        return [
            "it has operated System V semaphores with SEM_UNDO: what was left to undo is undone when it ends, and "
            "is not restored"
        ]
    mine = [
        semid for semid, nr in _at_most(sets, _MAX_SEMAPHORES).items() if _is_last_operator(pid, semid, nr)
    ]
    if not mine:
        return []
    return [
        f"it was the last to operate System V semaphore set {', '.join(map(str, mine[:5]))}: if that was with "
        "SEM_UNDO, it is undone when it ends, and is not restored"
    ]


def _has_undo_list(pid: int) -> bool:
    # a new process has none, alive or dead; we have, as all processes that ever had two threads
    try:
        empty = os.posix_spawn(sys.executable, [sys.executable, "-c", ""], {})
    except OSError:
        return False
    try:
        os.kill(empty, signal.SIGKILL)
        return kcmp.differ_in_undo_lists(pid, empty)
    except OSError:
        return False  # no CONFIG_KCMP, or it may not be compared
    finally:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(empty, 0)


def _is_last_operator(pid: int, semid: int, nr: int) -> bool:
    with contextlib.suppress(OSError):  # removed meanwhile, or not ours to read
        return any(sysv.last_operator(semid, number) == pid for number in range(nr))
    return False
