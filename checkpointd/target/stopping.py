# SPDX-License-Identifier: Apache-2.0
"""How a freeze brings all threads of a process to a stop, and what becomes of those that do not come.

Part of `freeze`, which has the order of things and the errors; `Frozen` is its object, whose threads these fill in.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING

from checkpointd.errors import Busy, CheckpointError, TargetExeced
from checkpointd.linux import ptrace
from checkpointd.procfs import process
from checkpointd.target import attachable, undertaker
from checkpointd.target.registers import UserRegs
from checkpointd.target.release import is_traced_by_us, release
from checkpointd.target.slot import LeftBehind
from checkpointd.tracepoint import hit

if TYPE_CHECKING:
    from checkpointd.target.freeze import Frozen

# TRACESYSGOOD: without it our death at a system call stop would send SIGTRAP.  Never EXITKILL.
_OPTIONS = ptrace.O_TRACESYSGOOD | ptrace.O_TRACEEXEC
_SIGTRAP = 5
LINGER_S = 60.0
_MAX_WAYS_HOME = 200
_SEIZE_TRIES = 10
_MANY_LISTS = 100
_attached: set[int] = set()


def let_go(frozen: Frozen) -> None:
    """Thaw, and let go also of a thread that an execve has given another one's id since it was seized.

    Those that could not be let go in all the time there is are left to the end of this process.

    Raises:
        Busy: see `Frozen.thaw`.
    """
    frozen.thaw()
    pid, deadline = frozen.pid, time.monotonic() + LINGER_S
    while strays := [
        tid
        for tid in attachable.thread_ids(pid)
        if tid not in _attached and attachable.lives(pid, tid) and is_traced_by_us(pid, tid)
    ]:
        released = [release(pid, tid, deadline) for tid in strays]
        if not all(released):
            raise still_attached(pid, strays)


def stop_all(frozen: Frozen, deadline: float) -> None:
    pid = frozen.pid
    undertaker.get().watch(pid, frozen._held)
    ways_home = 0
    listed: list[int] = []
    nr_unsure, has_workers = 0, False
    while True:
        nr_alive, before = attachable.nr_threads(pid), listed
        listed = list_threads(pid)
        pending = _seize_new(frozen, listed)
        has_workers |= frozen.has_kernel_workers
        if pending:
            nr_unsure = 0
            _wait_stopped(frozen, pending, deadline)
            continue
        if pid not in frozen._held:
            raise attachable.gone(pid)
        # The kernel ends the list early when a thread dies just as it is listed, and the rest seem not to be there.
        # Those listed twice were all alive when they were counted in between, so the count tells of any other.
        if listed != before or len(listed) != nr_alive:
            if time.monotonic() > deadline:
                raise attachable.not_listed(pid)
            # workers of the kernel may come and go for ever; that so many lists hide one of its own threads cannot be
            nr_unsure += 1
            if not has_workers or nr_unsure < _MANY_LISTS:
                continue
        at_large = _in_left_behind(frozen)
        if not at_large:
            _wait_idle(frozen, deadline)
            return
        ways_home += 1
        if ways_home > _MAX_WAYS_HOME or time.monotonic() > deadline:
            # it is stuck there (a call that blocks): an ordinary place to stand, the next slot goes elsewhere
            return
        for tid in at_large:
            ptrace.cont(tid)
        time.sleep(0.0002)
        for tid in at_large:
            ptrace.interrupt(tid)
        _wait_stopped(frozen, set(at_large), deadline)


def _wait_idle(frozen: Frozen, deadline: float) -> None:
    """Wait until no worker of the kernel is in the midst of a disk read or write for the target.

    All threads that could give it work stand still.  One that polls (SQPOLL) or waits for a pipe is left to that, and
    `has_kernel_workers` tells of it: what it may write meanwhile is not for a tracker to call clean.

    Raises:
        Busy: it does not end in time.
    """
    for tid in frozen._workers:
        while True:
            try:
                state = process.read_stat(frozen.pid, tid).state
            except (OSError, ValueError):
                break
            if state != "D":
                break
            if time.monotonic() >= deadline:
                raise attachable.not_stopped(frozen.pid, [tid])
            time.sleep(0.0002)


def _in_left_behind(frozen: Frozen) -> list[int]:
    """Threads on their way home through a dead agent's slot or runner."""
    left_behind = LeftBehind(frozen.mem)
    frozen._regs = {tid: UserRegs.from_bytes(ptrace.get_regs(tid)) for tid in frozen._held}
    return [tid for tid, regs in frozen._regs.items() if left_behind.holds(regs.rip)]


def list_threads(pid: int) -> list[int]:
    try:
        return process.thread_ids(pid)
    except OSError as error:
        raise attachable.gone(pid) from error


def _seize_new(frozen: Frozen, tids: list[int]) -> set[int]:
    """Seize and interrupt those of the threads that are not held yet; those now on their way to a stop."""
    pid = frozen.pid
    new = [tid for tid in tids if tid not in frozen._held]
    new.sort(key=lambda tid: tid != pid)
    pending = set()
    frozen._workers.clear()
    for tid in new:
        if tid not in frozen._known:
            if attachable.is_kernel_worker(pid, tid):  # asked every time: the id of a dead one is used again
                frozen._workers.add(tid)
                continue
            frozen._known.add(tid)
        try:
            hit("freeze.seize")
            # held before it is seized: an interruption (Ctrl-C) right behind the call must not lose it
            frozen._held[tid] = False
            if not _seize(pid, tid):
                del frozen._held[tid]
                continue  # it is just exiting
            hit("freeze.seized")
        except (ProcessLookupError, CheckpointError) as error:
            del frozen._held[tid]
            if isinstance(error, CheckpointError):
                raise
            continue
        try:
            ptrace.interrupt(tid)
            hit("freeze.interrupted")
        except ProcessLookupError:
            pass  # exiting: the wait will tell
        pending.add(tid)
    return pending


def _seize(pid: int, tid: int) -> bool:
    """PTRACE_SEIZE; False for a thread that is exiting.

    Raises:
        ProcessLookupError: it is gone.
        NotPermitted, Busy, TargetGone: it may not be traced.
    """
    for left in reversed(range(_SEIZE_TRIES)):
        try:
            ptrace.seize(tid, _OPTIONS)
            return True
        except PermissionError as error:
            reason = attachable.explain_refusal(pid, tid)
            if reason is None:
                return False
            # again: on the way through an execve a thread cannot be seized
            if not left:
                raise reason from error
            time.sleep(0.001)
    return False


def _wait_stopped(frozen: Frozen, pending: set[int], deadline: float) -> None:
    """Wait for the EVENT_STOP of every thread in `pending` (emptied on the way)."""
    pid = frozen.pid
    # those that a tracer ahead of others (dump/priority.py) waits for may need its CPU, which yielding gives to none
    is_ahead = os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK != os.SCHED_OTHER
    nr_spins = 10 if is_ahead else 50
    nr_idle = 0
    while pending:
        progress = False
        for tid in [min(pending)] if is_ahead else tuple(pending):
            try:
                status = ptrace.peek_wait(tid, block=False)
            except ChildProcessError:  # reaped by the undertaker, or gone in an execve
                status = ptrace.WaitStatus(True, 0)
            if status is not None and _settled(frozen, tid, status):
                pending.discard(tid)
                progress = True
        if progress:
            nr_idle = 0
            continue
        nr_idle += 1
        if nr_idle < nr_spins:
            os.sched_yield()
            continue
        time.sleep(0.00005 if nr_idle < 100 else 0.001)
        if time.monotonic() > deadline:
            _give_up(frozen, pending)
        if nr_idle % 100:
            continue
        # our own child is waited for in vain when an execve of another thread has put that in the place of one of ours
        for tid in [one for one in pending if not is_traced_by_us(pid, one)]:
            _settled(frozen, tid, ptrace.WaitStatus(True, 0))
            pending.discard(tid)
        if attachable.is_dead_thread(pid, pid) and not attachable.comes_to_life(pid):
            raise attachable.explain_refusal(pid, pid) or attachable.gone(pid)


def _settled(frozen: Frozen, tid: int, status: ptrace.WaitStatus) -> bool:
    """Act on what the wait saw; True when nothing more is awaited of the thread."""
    if status.exited:
        if tid == frozen.pid:
            raise attachable.gone(frozen.pid)
        ptrace.reap(tid)
        frozen._held.pop(tid, None)
        return True
    if status.event == ptrace.EVENT_STOP:
        ptrace.take_stop(tid)
        frozen._held[tid] = status.signal != _SIGTRAP
        hit("freeze.stopped")
        return True
    if status.event == ptrace.EVENT_EXEC:
        ptrace.take_stop(tid)
        raise replaced(frozen.pid)
    # a signal on its way: deliver it, never keep it (it would be in no image and lost if we died)
    with contextlib.suppress(ProcessLookupError):
        hit("freeze.signal")
        ptrace.cont(tid, status.signal if status.code != ptrace.SYSCALL_STOP else 0)
        hit("freeze.signal_passed")
        ptrace.interrupt(tid)
    return False


def replaced(pid: int) -> TargetExeced:
    return TargetExeced(
        f"process {pid} replaced its program (execve) while it was being stopped",
        hint="try again: it is another program now",
        pid=pid,
    )


def _give_up(frozen: Frozen, pending: set[int]) -> None:
    """The deadline has passed: let the stopped ones go at once, the others as soon as they can be.

    A thread that is not stopped cannot be detached from.  It would stop for us the moment its sleep ends, so we
    stay until then.
    """
    stopped = [tid for tid in frozen._held if tid not in pending]
    stragglers = []
    for tid in stopped:
        if not release(frozen.pid, tid, deadline=time.monotonic() + LINGER_S):
            stragglers.append(tid)
        frozen._held.pop(tid, None)
    error = attachable.not_stopped(frozen.pid, sorted(pending))
    linger_until = time.monotonic() + LINGER_S
    while frozen._held and time.monotonic() < linger_until:
        for tid in tuple(frozen._held):
            try:
                status = ptrace.peek_wait(tid, block=False)
            except ChildProcessError:
                status = ptrace.WaitStatus(True, 0)
            if status is not None and release(frozen.pid, tid, linger_until):
                frozen._held.pop(tid, None)
        time.sleep(0.001)
    if frozen._held or stragglers:
        stragglers = sorted([*frozen._held, *stragglers])
        frozen._held.clear()
        raise still_attached(frozen.pid, stragglers)
    raise error


def still_attached(pid: int, tids: list[int]) -> Busy:
    _attached.update(tids)
    return attachable.not_stopped(pid, tids, stragglers=tids)


def left_attached() -> frozenset[int]:
    """Threads this process could not detach from, whoever has caught the error: it must end to let them go."""
    return frozenset(_attached)
