# SPDX-License-Identifier: Apache-2.0
"""Detaching from one thread, whatever state it is in: stopped, running (we were interrupted half-way), or dead."""

from __future__ import annotations

import os
import threading
import time

from checkpointd.linux import ptrace
from checkpointd.procfs import process


def release(pid: int, tid: int, deadline: float) -> bool:
    """Detach from one thread, whatever state it is in.

    Args:
        deadline: time.monotonic() at which to give up on a thread that is inside the kernel and does not wake.

    Returns:
        False: it is still attached to, and will stop when it comes out.
    """
    try:
        ptrace.detach(tid)
        return True
    except ProcessLookupError:
        pass
    # not stopped: dead, or running (we were interrupted half-way)
    nr_tries = 0
    while True:
        try:
            status = ptrace.peek_wait(tid, block=False)
        except ChildProcessError:
            return True
        try:
            nr_tries += 1
            if nr_tries > 20:
                time.sleep(0.0005)
                if time.monotonic() > deadline:
                    return False
            if status is None:
                ptrace.interrupt(tid)
            elif status.exited:
                _bury(pid, tid)
                return True
            else:
                if status.event == ptrace.EVENT_EXEC:
                    # Of an execve by another thread than the main one: the kernel refuses every request until its
                    # new id was waited for.  Source: Linux kernel/ptrace.c (looks_like_a_spurious_pid), v5.13.
                    ptrace.take_stop(tid)
                plain = not status.event and status.code != ptrace.SYSCALL_STOP
                ptrace.detach(tid, status.signal if plain else 0)
                return True
        except ProcessLookupError:
            if status is None and not is_traced_by_us(pid, tid):
                return True


def is_traced_by_us(pid: int, tid: int) -> bool:
    """By this thread of ours; False for one that is gone."""
    try:
        return int(process.read_status(pid, tid)["TracerPid"]) == threading.get_native_id()
    except (OSError, KeyError, ValueError):
        return False


def _bury(pid: int, tid: int) -> None:
    """Reap a dead thread, but leave a process that is our own child to whoever started it."""
    if tid == pid:
        try:
            if process.read_stat(pid).ppid == os.getpid():
                return
        except (OSError, ValueError):
            return
    ptrace.reap(tid)
