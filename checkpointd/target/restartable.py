# SPDX-License-Identifier: Apache-2.0
"""System calls that a freeze interrupts.

Most go on by themselves: the kernel restarts them when the thread is let go (`-ERESTART*` in rax).  A few report
-EINTR to the program at any stop, also at one by SIGSTOP and SIGCONT (signal(7)).  For those whose arguments still
say everything, the freeze turns -EINTR into -ERESTARTNOHAND: without a signal the call goes on, with a handler to
run it fails with EINTR, exactly as if nobody had stopped it.

====================  =======================================  ==============================================
call                  turned when                              else
====================  =======================================  ==============================================
epoll_wait/_pwait     always; a finite timeout is cut by the   the full timeout again, when the time slept
                      time slept                               could not be sampled, or the code around the
                                                               call may use its register again
epoll_pwait2          timeout pointer is NULL                  EINTR: the timeout lies in the program's memory
rt_sigtimedwait       timeout pointer is NULL                  EINTR, likewise
semop, semtimedop     semtimedop: timeout pointer is NULL      EINTR, likewise
io_getevents          timeout pointer is NULL                  EINTR, likewise
io_uring_enter        without IORING_ENTER_EXT_ARG (EINTR      EINTR, likewise
                      says that it has submitted nothing)
====================  =======================================  ==============================================

Not turned: socket calls with SO_RCVTIMEO or SO_SNDTIMEO (the timeout would start anew at every freeze and might
never end) and connect (a second connect is EALREADY, not a restart): they report EINTR as signal(7) says.

A sleep with a restart block goes on as restart_syscall; where a seccomp filter would not have that, the call is made
anew instead, with its whole time (`begin_anew`).

Source: signal(7), Linux fs/eventpoll.c (ep_poll), kernel/signal.c, ipc/sem.c, fs/aio.c, io_uring/io_uring.c.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

from checkpointd.linux.process_vm import MemFile
from checkpointd.procfs import process
from checkpointd.target.registers import (
    ERESTART_RESTARTBLOCK,
    ERESTARTNOHAND,
    NR_RESTART_SYSCALL,
    UserRegs,
    word,
)
from checkpointd.target.seccomp_filter import Filters

_EINTR = 4
_SYSCALL = b"\x0f\x05"
NR_SEMOP = 65
NR_RT_SIGTIMEDWAIT = 128
NR_IO_GETEVENTS = 208
NR_SEMTIMEDOP = 220
NR_EPOLL_WAIT = 232
NR_EPOLL_PWAIT = 281
NR_IO_URING_ENTER = 426
NR_EPOLL_PWAIT2 = 441
_IORING_ENTER_EXT_ARG = 1 << 3

# the register that holds the pointer to a timeout: NULL waits for ever
_TIMEOUT_POINTER = {
    NR_RT_SIGTIMEDWAIT: "rdx",
    NR_IO_GETEVENTS: "r8",
    NR_SEMTIMEDOP: "r10",
    NR_EPOLL_PWAIT2: "r10",
}


@dataclass(frozen=True, slots=True)
class BlockedCall:
    """A system call a thread was found blocked in, before the freeze.

    Attributes:
        nr, args: the call.
        asleep_us: how long it had been asleep when sampled; None when the kernel does not tell.
        sampled_ns: when (CLOCK_MONOTONIC).
        nr_switches: voluntary context switches so far: tells whether it is still the same sleep.
        confirmed: was it still that sleep at the freeze?  None: not looked at yet (see `confirm`).
    """

    nr: int
    args: tuple[int, ...]
    asleep_us: int | None
    sampled_ns: int
    nr_switches: int
    confirmed: bool | None = None


@dataclass(slots=True)
class Switches:
    """Voluntary context switches of a thread whose call goes on as restart_syscall: do they tell of another sleep?

    Attributes:
        at_stop: so far when the freeze had stopped it, before anything was injected.
        at_release: when it was let go; None: it was not yet, or the kernel did not tell.
    """

    at_stop: int | None
    at_release: int | None = None

    def since(self, earlier: Switches | None) -> int | None:
        """How many from that release to this stop, which is one of them; None: not known.

        1: it has not slept in between (it got no CPU).  2: it slept once.  More: it slept, was woken and slept again,
        in the same call (somebody else stopped it) or in a new one.
        """
        if earlier is None or earlier.at_release is None or self.at_stop is None:
            return None
        return self.at_stop - earlier.at_release


_VOLUNTARY = re.compile(rb"^voluntary_ctxt_switches:\s*([0-9]+)$", re.MULTILINE)
_FILTERED = re.compile(rb"^Seccomp:\s*2$", re.MULTILINE)


def read_status(pid: int, tid: int) -> bytes:
    """/proc/PID/task/TID/status; empty when the thread is gone."""
    try:
        return process.slurp(f"/proc/{pid}/task/{tid}/status")
    except OSError:
        return b""


def nr_switches(status: bytes) -> int | None:
    """Voluntary context switches of a thread so far, by its status."""
    found = _VOLUNTARY.search(status)
    return int(found[1]) if found else None


def read_switches(pid: int, tid: int) -> int | None:
    return nr_switches(read_status(pid, tid))


def parse_syscall(text: str) -> tuple[int, tuple[int, ...]] | None:
    """/proc/PID/task/TID/syscall: number and arguments; None when not blocked in one."""
    parts = text.split()
    if len(parts) < 7 or parts[0] == "-1":
        return None
    return int(parts[0]), tuple(int(part, 16) for part in parts[1:7])


_SCHED_LINES = re.compile(r"^(se\.exec_start|nr_voluntary_switches)\s*:\s*([0-9.]+)$", re.MULTILINE)


def parse_sched(text: str) -> dict[str, float]:
    """/proc/PID/task/TID/sched: `se.exec_start` (milliseconds) and `nr_voluntary_switches`."""
    return {name: float(value) for name, value in _SCHED_LINES.findall(text)}


class _CpuClocks:
    """The scheduler's clock (that of se.exec_start) against CLOCK_MONOTONIC, per CPU.

    They differ by hundreds of milliseconds between CPUs of a virtual machine, so each is measured by running on that
    CPU for a moment.
    """

    def __init__(self) -> None:
        self._offset_ns: dict[int, int] = {}

    def offset_ns(self, cpu: int) -> int | None:
        if cpu not in self._offset_ns:
            allowed = os.sched_getaffinity(0)
            try:
                os.sched_setaffinity(0, {cpu})
                os.sched_yield()
                start = parse_sched(process.slurp("/proc/thread-self/sched").decode("ascii"))
                self._offset_ns[cpu] = time.monotonic_ns() - int(start["se.exec_start"] * 1e6)
            except (OSError, KeyError):
                return None
            finally:
                os.sched_setaffinity(0, allowed)
        return self._offset_ns[cpu]


def sample(pid: int, tids: Iterable[int], wanted: frozenset[int] | None = None) -> dict[int, BlockedCall]:
    """What the threads are blocked in, and since when.  Best effort, for use just before a freeze.

    Args:
        wanted: only these system calls; None: all.
    """
    clocks = _CpuClocks()
    found: dict[int, BlockedCall] = {}
    for tid in tids:
        where = f"/proc/{pid}/task/{tid}"
        try:
            call = parse_syscall(process.slurp(f"{where}/syscall").decode("ascii"))
            if call is None or (wanted is not None and call[0] not in wanted):
                continue
            sched = parse_sched(process.slurp(f"{where}/sched").decode("ascii", "replace"))
            stat = process.slurp(f"{where}/stat")
        except (OSError, ValueError):
            continue
        cpu = int(stat[stat.rindex(b")") + 2 :].split()[36])
        offset_ns = clocks.offset_ns(cpu)
        now_ns = time.monotonic_ns()
        asleep_us = None
        if offset_ns is not None and "se.exec_start" in sched:
            asleep_us = max(0, now_ns - offset_ns - int(sched["se.exec_start"] * 1e6)) // 1000
        found[tid] = BlockedCall(*call, asleep_us, now_ns, int(sched.get("nr_voluntary_switches", -1)))
    return found


EPOLL_CALLS = frozenset({NR_EPOLL_WAIT, NR_EPOLL_PWAIT})

TIMED_CALLS = EPOLL_CALLS | {7, 35, 202, 219, 230}
"""Calls whose remaining time cannot be read from registers: epoll_wait, epoll_pwait; poll, nanosleep, futex,
restart_syscall, clock_nanosleep."""


_WITH_RESTART_BLOCK = (7, 35, 202, 230)  # poll, nanosleep, futex, clock_nanosleep


def step_back_into_sleep(regs: UserRegs, mem: MemFile) -> bool:
    """Undo the first half of a sleep's going on; True when `regs` were changed.

    A thread that is let go in a sleep has its registers set for restart_syscall and is put before the system call
    instruction.  Stopped again before it got the CPU, it seems to run its own code; in another process, which has no
    restart block, that call would end with EINTR.  Behind the instruction, with the result that says so, it is seen to
    sleep, and the kernel takes both steps at the thaw.

    Args:
        regs: of a stopped thread.
        mem: its memory.
    """
    if regs.rax != NR_RESTART_SYSCALL:
        return False
    try:
        if mem.read(regs.rip, len(_SYSCALL)) != _SYSCALL:
            return False
    except (OSError, OverflowError):  # there is no code
        return False
    # otherwise it has not left the kernel yet, which still shows the call
    if regs.syscall_nr not in _WITH_RESTART_BLOCK:
        regs.orig_rax = NR_RESTART_SYSCALL
    regs.rax = word(-ERESTART_RESTARTBLOCK)
    regs.rip += len(_SYSCALL)
    return True


def as_let_go(regs: UserRegs) -> UserRegs:
    """The registers of a stopped thread for the thaw: a sleep is marked as one that has been seen.

    The kernel shows restart_syscall for it from then on.  A thread that gets no CPU before the next freeze would show
    the call itself, as one that has just begun.
    """
    if regs.syscall_nr < 0 or regs.result != -ERESTART_RESTARTBLOCK:
        return regs
    marked = regs.copy()
    marked.orig_rax = NR_RESTART_SYSCALL
    return marked


def begin_anew(regs: UserRegs, tid: int, status: bytes) -> bool:
    """Where a seccomp filter has no restart_syscall, let a sleep be made anew; True when `regs` were changed.

    The kernel would have that call fail, or kill the program, at any stop.  Its own call the filter has let through.
    The whole time again is late, never early.

    Args:
        regs: of a stopped thread in a call with a restart block.
        status: as in `read_status`.
    """
    if regs.syscall_nr not in _WITH_RESTART_BLOCK or not _FILTERED.search(status):
        return False
    args = (regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9)
    try:
        if Filters.of_thread(tid).allows(NR_RESTART_SYSCALL, args, regs.rip):
            return False
    except OSError:  # it may not be read: most filters know that call
        return False
    regs.rax = word(-ERESTARTNOHAND)
    return True


def fix_spurious_eintr(
    regs: UserRegs, pid: int, tid: int, blocked: BlockedCall | None, now_ns: int, mem: MemFile
) -> bool:
    """Make an interrupted call go on where that is right; True when `regs` were changed.

    Args:
        regs: of a thread at the stop we asked for.
        blocked: what `sample` found for the thread.
        now_ns: CLOCK_MONOTONIC at the stop.
        mem: its memory.
    """
    if regs.result != -_EINTR:
        return False
    nr = regs.syscall_nr
    if nr in _TIMEOUT_POINTER:
        if getattr(regs, _TIMEOUT_POINTER[nr]) != 0:
            return False
    elif nr in EPOLL_CALLS:
        if _sets_r10(mem, regs.rip - len(_SYSCALL)):
            _shorten_epoll(regs, pid, tid, blocked, now_ns)
    elif nr == NR_IO_URING_ENTER:
        if regs.r10 & _IORING_ENTER_EXT_ARG:
            return False
    elif nr != NR_SEMOP:
        return False
    regs.rax = word(-ERESTARTNOHAND)
    return True


_SETS_R10 = re.compile(
    rb"[\x41\x49](?:\xba|\xc7\xc2).{4}"  # mov $imm32, %r10d or %r10
    rb"|[\x41\x45\x49\x4d]\x89[\xc2\xca\xd2\xda\xe2\xea\xf2\xfa]"  # mov %reg, %r10
    rb"|[\x44\x45\x4c\x4d](?:\x8b|\x63)[\x10-\x17\x50-\x57\x90-\x97\xd0-\xd7]",  # mov or movslq reg or memory, %r10
    re.DOTALL,
)
_LOOK_BACK_BYTES = 40


def _sets_r10(mem: MemFile, call_at: int) -> bool:
    """Is r10 set right before the system call instruction, as C libraries do it?

    Only then may the register be changed for good.  A compiler that inlines the call may load it once, before a loop:
    all later timeouts would be as short.
    """
    try:
        return _SETS_R10.search(mem.read(call_at - _LOOK_BACK_BYTES, _LOOK_BACK_BYTES)) is not None
    except OSError:  # the first bytes of a mapping
        return False


def _shorten_epoll(regs: UserRegs, pid: int, tid: int, blocked: BlockedCall | None, now_ns: int) -> None:
    """Take the time already slept off a finite timeout (an int of milliseconds in r10)."""
    timeout_ms = regs.r10 & 0xFFFF_FFFF
    if timeout_ms == 0 or timeout_ms >= 1 << 31:  # does not wait, or for ever
        return
    same = (regs.rdi, regs.rsi, regs.rdx, regs.r10)
    if blocked is None or blocked.asleep_us is None or blocked.args[:4] != same:
        return
    if not same_sleep(pid, tid, blocked):
        return
    slept_us = blocked.asleep_us + (now_ns - blocked.sampled_ns) // 1000
    # rounded down what is taken off: a wait may be late by a millisecond, never early
    regs.r10 = max(0, timeout_ms - slept_us // 1000)


def same_sleep(pid: int, tid: int, blocked: BlockedCall) -> bool:
    """Is the stopped thread still in the sleep that was sampled?

    The stop itself is one voluntary context switch; another one means that it woke up in between.  Injection
    switches too, so this is answered before it and remembered (`confirm`).
    """
    if blocked.confirmed is not None:
        return blocked.confirmed
    try:
        sched = parse_sched(process.slurp(f"/proc/{pid}/task/{tid}/sched").decode("ascii", "replace"))
    except (OSError, ValueError):
        return False
    return blocked.nr_switches >= 0 and int(sched.get("nr_voluntary_switches", -9)) <= blocked.nr_switches + 1


def confirm(pid: int, tid: int, blocked: BlockedCall | None) -> BlockedCall | None:
    """The sample with `confirmed` settled, for a stopped thread not yet injected into."""
    if blocked is None or blocked.confirmed is not None:
        return blocked
    return replace(blocked, confirmed=same_sleep(pid, tid, blocked))
