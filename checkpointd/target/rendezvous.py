# SPDX-License-Identifier: Apache-2.0
"""Meeting a running thread of the target at an agreed instruction, without harm if we do not come.

The thread sends itself a signal whose delivery does nothing.  While it is traced even an ignored signal stops
it and is shown to the tracer; without a tracer the kernel drops it.  Other stops on the way (group stops, a
SIGSTOP) are passed on.  No wait is without end: a thread that is late is stopped wherever it is, and the call it
sleeps in fails with EINTR (`CallTimeoutError`).  Signal stops are only looked at, never taken: see `ptrace.peek_wait`.

The kernel tells a tracer of a stop by SIGCHLD.  Where that is blocked, in all threads as agents have it, it is waited
for: our CPU is free for the thread that we wait for, and we are back at once.  Elsewhere we look again and again.

Source: Linux kernel/signal.c (sig_ignored, ptrace_signal), facts measured on 6.18.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable, Mapping

from checkpointd.errors import TargetExeced
from checkpointd.linux import ptrace
from checkpointd.target.attachable import gone
from checkpointd.target.registers import UserRegs, word

_ENOSYS = 38
_IGNORED_BY_DEFAULT = (int(signal.SIGURG), int(signal.SIGWINCH), int(signal.SIGCHLD))
_UNFIT = frozenset(
    # cannot be ignored, are raised by instructions, have effects when sent (job control), or belong to libc
    {4, 5, 7, 8, 9, 11, 18, 19, 20, 21, 22, 31, 32, 33}
)

_NR_SPINS, _NR_SHORT = 20, 300
_SHORT_S, _LONG_S = 0.00005, 0.001
_STOP_TIMEOUT_S = 1.0
_STOPS = (signal.SIGCHLD,)


class CallTimeoutError(Exception):
    """A thread did not come to a rendezvous.

    Attributes:
        stopped: the thread is stopped and can be led home; False: it cannot be reached at present.
    """

    def __init__(self, tid: int, timeout_s: float, *, stopped: bool) -> None:
        super().__init__(f"thread {tid} did not come back from a system call within {timeout_s:g} s")
        self.tid = tid
        self.stopped = stopped


def choose_signal(status: Mapping[str, str], sigmask: int, *, is_go: Callable[[], bool]) -> int:
    """The rendezvous signal for a thread; 0 when no signal is safe.

    Args:
        status: /proc/PID/task/TID/status.
        sigmask: the thread's blocked signals.
        is_go: is it a Go program?  Go's runtime catches every signal, but its SIGURG handler bears strays (it is
            sent them for preemption) and runs on a stack of its own.
    """
    taken = sigmask | int(status.get("SigPnd", "0"), 16) | int(status.get("ShdPnd", "0"), 16)
    caught = int(status.get("SigCgt", "0"), 16)
    ignored = int(status.get("SigIgn", "0"), 16)

    def has(mask: int, signum: int) -> bool:
        return bool(mask >> (signum - 1) & 1)

    for signum in _IGNORED_BY_DEFAULT:
        if not has(caught, signum) and not has(taken, signum):
            return signum
    for signum in range(1, 65):
        if signum not in _UNFIT and has(ignored, signum) and not has(taken, signum):
            return signum
    if not has(taken, signal.SIGURG) and is_go():
        return int(signal.SIGURG)
    return 0


def _wait(pid: int, tid: int, deadline: float) -> ptrace.WaitStatus | None:
    """The next stop, left unreported; None when the deadline has passed."""
    nr_idle = 0
    hears = signal.SIGCHLD in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    while True:
        try:
            status = ptrace.peek_wait(tid, block=False)
        except ChildProcessError as error:
            raise gone(pid) from error
        if status is not None:
            if status.exited:
                raise gone(pid)
            return status
        nr_idle += 1
        if hears:
            if time.monotonic() >= deadline:
                return None
            signal.sigtimedwait(_STOPS, _LONG_S)  # not longer: it may have come before, for another stop
            continue
        # Most calls take microseconds: a sleep would cost more than all of them.  But a thread on the CPU of a tracer
        # that goes ahead of it (dump/priority.py) runs only once that sleeps.
        if nr_idle < _NR_SPINS:
            os.sched_yield()
        elif time.monotonic() < deadline:
            time.sleep(_SHORT_S if nr_idle < _NR_SHORT else _LONG_S)
        else:
            return None


def run_to(pid: int, tid: int, rip: int, signum: int, timeout_s: float) -> UserRegs:
    """Let the stopped thread run to the rendezvous at `rip`; its registers there.

    Args:
        signum: the signal it sends; 0: it makes the call with 0, and is stopped at every system call.

    Raises:
        TargetGone: the process died.
        CallTimeoutError: it did not come in time.  When it was asleep in a call, that call has been ended with
            EINTR and the thread is stopped, ready to run on.
    """
    resume = ptrace.cont if signum else ptrace.cont_to_syscall
    deadline = time.monotonic() + timeout_s
    deliver = 0
    try:
        while True:
            resume(tid, deliver)
            status = _wait(pid, tid, deadline)
            if status is None:
                raise CallTimeoutError(tid, timeout_s, stopped=_end_call(pid, tid))
            deliver = 0
            if status.event == ptrace.EVENT_STOP:
                ptrace.take_stop(tid)
            elif status.event:
                raise TargetExeced(f"process {pid} replaced its program", pid=pid)
            elif status.code == ptrace.SYSCALL_STOP:
                regs = UserRegs.from_bytes(ptrace.get_regs(tid))
                if regs.rip == rip and regs.result != -_ENOSYS:  # the exit: at the entry rax is -ENOSYS
                    return regs
            else:
                if status.code == signum:
                    regs = UserRegs.from_bytes(ptrace.get_regs(tid))
                    if regs.rip == rip:
                        return regs
                deliver = status.signal
    except ProcessLookupError as error:
        raise gone(pid) from error


def _end_call(pid: int, tid: int) -> bool:
    """Stop a thread that is late; a call it is asleep in fails with EINTR.  False: it cannot be stopped now."""
    ptrace.interrupt(tid)
    status = _wait(pid, tid, time.monotonic() + _STOP_TIMEOUT_S)
    if status is None:
        return False
    if status.event == ptrace.EVENT_STOP:
        ptrace.take_stop(tid)
    # else it came in this very moment, or shows the end of its call first: the stop asked for is still to come
    regs = UserRegs.from_bytes(ptrace.get_regs(tid))
    if regs.will_restart:
        regs.rax = word(-errno.EINTR)
        regs.leave_syscall()
        ptrace.set_regs(tid, regs.to_bytes())
    return True


def stop_in_signal_code(pid: int, tid: int, timeout_s: float) -> None:
    """From a system call stop to an EVENT_STOP, where the kernel honours a pending restart.

    Raises:
        TargetGone: the process died.
        CallTimeoutError: it did not stop in time.
    """
    deadline = time.monotonic() + timeout_s
    deliver = 0
    try:
        ptrace.interrupt(tid)
        while True:
            ptrace.cont(tid, deliver)
            status = _wait(pid, tid, deadline)
            if status is None:
                raise CallTimeoutError(tid, timeout_s, stopped=False)
            if status.event == ptrace.EVENT_STOP:
                ptrace.take_stop(tid)
                return
            deliver = status.signal if status.code != ptrace.SYSCALL_STOP else 0
            ptrace.interrupt(tid)
    except ProcessLookupError as error:
        raise gone(pid) from error
