# SPDX-License-Identifier: Apache-2.0
"""Stopping all threads of a process, and letting them go as if nothing had happened.

`freeze(pid)` gives a `Frozen`; its `thaw` (or leaving the `with` block) lets go.  Everything must happen on
one thread of ours: ptrace belongs to threads.  Our death at any instant thaws: no option or state is used that
outlives us.  A target that was stopped (SIGSTOP) is stopped again after the thaw, by the kernel.

Order: every thread is seized, leader first, and interrupted; the list of threads is read again until it shows nothing
new while all are stopped, and as many as the kernel counts; threads that stand in code a dead agent left are let run
home first; then registers, masks and rseq are read.  A thread inside an rseq critical section is moved to its abort
address at once, as the kernel would do; a system call that would report a false EINTR is made to go on, and a sleep
that is about to go on is put back into its call (`restartable`).

The kernel's own workers (of an io_uring, of vhost) stand among a process's threads but run none of its code.  They
are not touched: a stop would end the call they are busy with in EINTR, and nothing can be injected into them.  An idle
one stays for seconds after its ring is closed.  The freeze waits until they are idle, so that what they wrote is there.

No other thread of this process may wait for the target meanwhile (waitpid, also of -1, takes ptrace stops whatever
its options): a target that is our own child must be left alone between `freeze` and `thaw`.

Times are microseconds; `frozen_at_ns` is CLOCK_MONOTONIC.

Raises: TargetGone, TargetExeced, NotPermitted, Busy, Unsupported, UsageError, each with all threads let go.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType

from checkpointd.errors import Busy, CheckpointError, TargetExeced, TargetGone, Unsupported
from checkpointd.linux import ptrace
from checkpointd.linux.process_vm import MemFile
from checkpointd.linux.ptrace import RseqConfig
from checkpointd.procfs import maps, process
from checkpointd.target import attachable, restartable, undertaker
from checkpointd.target.fork import ForkedCopy, fork_copy, reap_copy
from checkpointd.target.inject import Injection, NotHomeError, injection
from checkpointd.target.registers import CS_64BIT, ERESTART_RESTARTBLOCK, NR_RESTART_SYSCALL, UserRegs
from checkpointd.target.release import is_traced_by_us, release
from checkpointd.target.restartable import BlockedCall, Switches, read_switches
from checkpointd.target.restartable_sequence import abort_critical_section
from checkpointd.target.slot import SLOT_SIZE, LeftBehind, SlotPlace, exe_identity, find_places, is_go_program
from checkpointd.tracepoint import hit

__all__ = ["Frozen", "FrozenThread", "RseqConfig", "freeze", "left_attached"]

# TRACESYSGOOD: without it our death at a system call stop would send SIGTRAP.  Never EXITKILL.
_OPTIONS = ptrace.O_TRACESYSGOOD | ptrace.O_TRACEEXEC
_SIGTRAP = 5
_LINGER_S = 60.0
_MAX_WAYS_HOME = 200
_NR_PLACES = 2
_SEIZE_TRIES = 10
_MANY_LISTS = 100
_VDSO_LINE = re.compile(rb"^.*\[vdso\]$", re.MULTILINE)
_WORD = 8
_attached: set[int] = set()


@dataclass(slots=True)
class FrozenThread:
    """One stopped thread.

    Attributes:
        regs: registers as they will be at the thaw (`restartable.as_let_go`).
        sigmask: blocked signals (the saved mask inside ppoll, pselect, sigsuspend).
        group_stopped: SIGSTOP or the like holds it besides us.
        rseq: its rseq registration.
        blocked: the call it was found asleep in just before the freeze, with the time slept.
        switches: of a thread that will go on with restart_syscall.
    """

    tid: int
    regs: UserRegs
    sigmask: int
    group_stopped: bool
    rseq: RseqConfig | None
    blocked: BlockedCall | None = None
    switches: Switches | None = None


@dataclass
class Frozen:
    """A process all of whose threads are stopped by us."""

    pid: int
    threads: dict[int, FrozenThread] = field(default_factory=dict)
    freezing_time_us: int = 0
    frozen_at_ns: int = 0
    call_timeout_s: float = 10.0
    """How long an injected call may take; far longer than any does, even on a busy machine."""
    strayed: set[int] = field(default_factory=set)
    """Threads that an injection left somewhere on their way; the thaw lets them go home."""
    _held: dict[int, bool] = field(default_factory=dict)  # seized threads: stopped by a group stop?
    _cannot_run: bool = False
    _known: set[int] = field(default_factory=set)  # threads known to be the process's own
    _workers: set[int] = field(default_factory=set)  # the kernel's, never seized
    _regs: dict[int, UserRegs] = field(default_factory=dict)  # as the stop found them
    _mem: MemFile | None = None
    _places: list[SlotPlace] | None = None
    _leader_has_place: bool = False
    _injecting: bool = False
    _interrupted: bool = False

    @property
    def has_kernel_workers(self) -> bool:
        """Were workers of the kernel (io_uring's) among the threads?  They are not stopped."""
        return bool(self._workers)

    @property
    def leader(self) -> FrozenThread:
        return self.threads[self.pid]

    # ---- for those who work on the frozen target

    @property
    def mem(self) -> MemFile:
        """/proc/PID/mem of the frozen address space, for reading and writing."""
        if self._mem is None:
            self._mem = MemFile(self.pid, writable=True)
        return self._mem

    def inject(self, *, scratch_bytes: int | None = None) -> AbstractContextManager[Injection]:
        """System calls inside the target: `with frozen.inject() as remote: ...`.

        One at a time.  An exception inside the block runs the last batch's undo table on the way out.

        Args:
            scratch_bytes: room for `put` and `alloc`; it grows by itself when that is too little.

        Raises:
            Unsupported: this target cannot be injected into; says why.
            TargetGone: it died.
            Busy: a frozen cgroup holds it.
            FrozenTooLong: a call did not return within `call_timeout_s`.
        """
        return self._one_injection(scratch_bytes)

    @contextlib.contextmanager
    def _one_injection(self, scratch_bytes: int | None) -> Iterator[Injection]:
        if self._injecting:
            raise RuntimeError("an injection is open already: one at a time")
        if self._interrupted or self.strayed:
            raise RuntimeError("an earlier injection was interrupted: thaw, and freeze again")
        if self._cannot_run:
            raise attachable.in_frozen_cgroup(self.pid)
        # until it has ended in good order the thread is somewhere on its way; a thaw sends it home from anywhere
        self._injecting = self._interrupted = True
        try:
            with injection(self, scratch_bytes) as remote:
                yield remote
            self._interrupted = False
        except NotHomeError as error:
            raise error.cause from None
        except BaseException:
            self._interrupted = False
            raise
        finally:
            self._injecting = False
            self._leader_has_place = False

    def child_fork(self, remote: Injection | None = None) -> ForkedCopy:
        """A frozen copy of the target's memory: a forked child that never runs.  See `fork.fork_copy`."""
        if remote is not None:
            return fork_copy(remote)
        with self.inject() as own:
            return fork_copy(own)

    def reap_copy(self, copy: ForkedCopy, remote: Injection | None = None) -> bool:
        """Take the closed copy's remains out of the target's list of children; False when there are none."""
        if remote is not None:
            return reap_copy(remote, copy)
        with self.inject() as own:
            return reap_copy(own, copy)

    # ---- for the injection

    def is_go(self) -> bool:
        """Is the main program written in Go?"""
        return is_go_program(self.mem, maps.read_maps(self.pid), exe_identity(self.pid))

    def free_place(self) -> SlotPlace | None:
        """A place for a slot that no injection of this freeze holds: the leader's, or that of all others in turn."""
        if self._places is None:
            self._places = self._look_for_places()
        first, self._leader_has_place = not self._leader_has_place, True
        if first:
            return self._places[0] if self._places else None
        return self._places[1] if len(self._places) > 1 else None

    def _look_for_places(self) -> list[SlotPlace]:
        regs = [thread.regs for thread in self.threads.values()]
        # the vdso nearly always has room, and finding it takes one line of maps
        with open(f"/proc/{self.pid}/maps", "rb") as file:
            text = file.read()
        line = _VDSO_LINE.search(text)
        vdso = list(maps.parse_maps(line[0])) if line else []
        places = find_places(self.mem, vdso, regs, None, _NR_PLACES)
        if len(places) < _NR_PLACES:
            places = find_places(
                self.mem, list(maps.parse_maps(text)), regs, exe_identity(self.pid), _NR_PLACES
            )
        for place in places:
            if place.stale:
                self.force_write(place.address, bytes(SLOT_SIZE))
        return places

    def force_write(self, address: int, data: bytes) -> None:
        """Write past page protection; by ptrace where the kernel forbids it to /proc/PID/mem."""
        try:
            self.mem.write(address, data)
        except OSError:
            padded = data + self.mem.read(address + len(data), -len(data) % _WORD)
            ptrace.poke(self.pid, address, padded)

    # ---- letting go

    def thaw(self) -> None:
        """Let every thread go; does nothing the second time.  Dead threads are reaped.

        Raises:
            Busy: threads that are inside the kernel and cannot be woken are still attached to (`details` has
                `stragglers`): they stop when they come out, so the calling process must end to let them go.
        """
        hit("thaw.begin")
        undertaker.get().forget(self.pid)
        # the leader last: its death is reported only after all others are reaped
        order = sorted(self._held, key=lambda tid: tid == self.pid)
        failure: BaseException | None = None
        stragglers: list[int] = []
        for tid in (*order, *order):  # twice: an exception (Ctrl-C) must leave no thread behind
            if tid not in self._held:
                continue
            try:
                self._note_switches(tid)
                if not release(self.pid, tid, time.monotonic() + _LINGER_S):
                    stragglers.append(tid)
                del self._held[tid]
                hit("thaw.released")
            except BaseException as error:
                failure = error
        if self._mem is not None:
            self._mem.close()
            self._mem = None
        hit("thaw.done")
        if failure is not None:
            raise failure
        if stragglers:
            raise _still_attached(self.pid, stragglers)

    def _note_switches(self, tid: int) -> None:
        """Those of the injection are among them, and none is to come before the thread runs."""
        thread = self.threads.get(tid)
        if thread is not None and thread.switches is not None:
            thread.switches.at_release = read_switches(self.pid, tid)

    def __del__(self) -> None:
        # an exception between the return of `freeze` and the `with` that wanted it
        if self._held:
            with contextlib.suppress(Exception):
                self.thaw()

    def __enter__(self) -> Frozen:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.thaw()


def freeze(pid: int, *, timeout_s: float = 5.0) -> Frozen:
    """Stop all threads of a process.

    Args:
        timeout_s: how long to try; then everything is let go again.

    Raises:
        TargetGone, TargetExeced: it ended, or replaced its program, meanwhile.
        NotPermitted: ptrace access is refused; the hint says by what.
        Busy: somebody else traces it, or a thread cannot be stopped now.  When `details` has `stragglers`, those
            threads could not be detached from either: the calling process must end to let them go.
        Unsupported: kernel thread, zombie, 32-bit code.
        UsageError: our own process, or not a process id.
    """
    attachable.check_attachable(pid)
    deadline = time.monotonic() + timeout_s
    tids = _list_threads(pid)
    workers = attachable.wait_until_interruptible(pid, tids, deadline)
    blocked = restartable.sample(pid, tids, restartable.TIMED_CALLS)
    frozen = Frozen(pid, _known=set(tids) - workers, _cannot_run=attachable.is_in_frozen_cgroup(pid))
    try:
        started_ns = time.monotonic_ns()
        _stop_all(frozen, deadline)
        frozen.frozen_at_ns = time.monotonic_ns()
        frozen.freezing_time_us = (frozen.frozen_at_ns - started_ns) // 1000
        _read_threads(frozen, blocked)
        hit("freeze.done")
    except BaseException as error:
        _let_go(frozen)
        if isinstance(error, ProcessLookupError | ChildProcessError | TargetGone):
            # on the way through an execve of another thread what is left of the old program looks dead or gone
            if attachable.comes_to_life(pid):
                raise _replaced(pid) from error
            if not isinstance(error, TargetGone):
                raise attachable.gone(pid) from error
        raise
    return frozen


def _let_go(frozen: Frozen) -> None:
    """Thaw, and let go also of a thread that an execve has given another one's id since it was seized.

    Those that could not be let go in all the time there is are left to the end of this process.

    Raises:
        Busy: see `Frozen.thaw`.
    """
    frozen.thaw()
    pid, deadline = frozen.pid, time.monotonic() + _LINGER_S
    while strays := [
        tid
        for tid in attachable.thread_ids(pid)
        if tid not in _attached and attachable.lives(pid, tid) and is_traced_by_us(pid, tid)
    ]:
        released = [release(pid, tid, deadline) for tid in strays]
        if not all(released):
            raise _still_attached(pid, strays)


def _stop_all(frozen: Frozen, deadline: float) -> None:
    pid = frozen.pid
    undertaker.get().watch(pid, frozen._held)
    ways_home = 0
    listed: list[int] = []
    nr_unsure, has_workers = 0, False
    while True:
        nr_alive, before = attachable.nr_threads(pid), listed
        listed = _list_threads(pid)
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


def _list_threads(pid: int) -> list[int]:
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
        raise _replaced(frozen.pid)
    # a signal on its way: deliver it, never keep it (it would be in no image and lost if we died)
    with contextlib.suppress(ProcessLookupError):
        hit("freeze.signal")
        ptrace.cont(tid, status.signal if status.code != ptrace.SYSCALL_STOP else 0)
        hit("freeze.signal_passed")
        ptrace.interrupt(tid)
    return False


def _replaced(pid: int) -> TargetExeced:
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
        if not release(frozen.pid, tid, deadline=time.monotonic() + _LINGER_S):
            stragglers.append(tid)
        frozen._held.pop(tid, None)
    error = attachable.not_stopped(frozen.pid, sorted(pending))
    linger_until = time.monotonic() + _LINGER_S
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
        raise _still_attached(frozen.pid, stragglers)
    raise error


def _still_attached(pid: int, tids: list[int]) -> Busy:
    _attached.update(tids)
    return attachable.not_stopped(pid, tids, stragglers=tids)


def left_attached() -> frozenset[int]:
    """Threads this process could not detach from, whoever has caught the error: it must end to let them go."""
    return frozenset(_attached)


def _read_threads(frozen: Frozen, blocked: dict[int, BlockedCall]) -> None:
    hit("freeze.all_stopped")
    for tid, group_stopped in sorted(frozen._held.items()):
        regs = frozen._regs[tid]
        if regs.cs != CS_64BIT:
            raise Unsupported(
                f"thread {tid} of process {frozen.pid} runs 32-bit code",
                hint="only 64-bit programs can be saved",
                pid=frozen.pid,
                blockers=[f"thread {tid} of process {frozen.pid} runs 32-bit code"],
            )
        rseq = ptrace.get_rseq(tid)
        changed = restartable.step_back_into_sleep(regs, frozen.mem)
        asleep = blocked.get(tid) if regs.syscall_nr >= 0 else None
        changed |= restartable.fix_spurious_eintr(
            regs, frozen.pid, tid, asleep, frozen.frozen_at_ns, frozen.mem
        )
        switches = None
        if regs.syscall_nr >= 0 and regs.result == -ERESTART_RESTARTBLOCK:
            status = restartable.read_status(frozen.pid, tid)
            switches = Switches(restartable.nr_switches(status))
            changed |= restartable.begin_anew(regs, tid, status) or regs.syscall_nr != NR_RESTART_SYSCALL
        if rseq is not None and abort_critical_section(frozen.mem, rseq, regs):
            changed = True
        if changed:
            ptrace.set_regs(tid, restartable.as_let_go(regs).to_bytes())
            hit("freeze.registers_fixed")
        sigmask = ptrace.get_sigmask(tid)
        frozen.threads[tid] = FrozenThread(tid, regs, sigmask, group_stopped, rseq, asleep, switches)
