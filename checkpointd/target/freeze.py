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
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType

from checkpointd.errors import TargetGone, Unsupported
from checkpointd.linux import ptrace
from checkpointd.linux.process_vm import MemFile
from checkpointd.linux.ptrace import RseqConfig
from checkpointd.memory import Vma, VmaKind
from checkpointd.procfs import maps
from checkpointd.procfs.process import slurp
from checkpointd.target import attachable, restartable, stopping, undertaker
from checkpointd.target.fork import ForkedCopy, fork_copy, reap_copy
from checkpointd.target.inject import Injection, NotHomeError, injection
from checkpointd.target.registers import CS_64BIT, ERESTART_RESTARTBLOCK, NR_RESTART_SYSCALL, UserRegs
from checkpointd.target.release import release
from checkpointd.target.restartable import BlockedCall, Switches, read_switches
from checkpointd.target.restartable_sequence import abort_critical_section
from checkpointd.target.slot import SLOT_SIZE, SlotPlace, exe_identity, find_places, is_go_program
from checkpointd.target.stopping import left_attached
from checkpointd.tracepoint import hit

__all__ = ["Frozen", "FrozenThread", "RseqConfig", "freeze", "left_attached"]

_NR_PLACES = 2
_VDSO_LINE = re.compile(rb"^.*\[vdso\]$", re.MULTILINE)
_WORD = 8


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
    vmas: Sequence[Vma] = ()
    """Its mappings, for whoever has read them in this freeze, before any injection, to tell."""
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
        # the vdso nearly always has room
        vdso = [vma for vma in self.vmas if vma.kind is VmaKind.VDSO]
        if not vdso:
            line = _VDSO_LINE.search(slurp(f"/proc/{self.pid}/maps"))
            vdso = list(maps.parse_maps(line[0])) if line else []
        places = find_places(self.mem, vdso, regs, None, _NR_PLACES)
        if len(places) < _NR_PLACES:
            vmas = list(maps.read_maps(self.pid))
            places = find_places(self.mem, vmas, regs, exe_identity(self.pid), _NR_PLACES)
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
                if not release(self.pid, tid, time.monotonic() + stopping.LINGER_S):
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
            raise stopping.still_attached(self.pid, stragglers)

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
    tids = stopping.list_threads(pid)
    workers = attachable.wait_until_interruptible(pid, tids, deadline)
    blocked = restartable.sample(pid, tids, restartable.TIMED_CALLS)
    frozen = Frozen(pid, _known=set(tids) - workers, _cannot_run=attachable.is_in_frozen_cgroup(pid))
    try:
        started_ns = time.monotonic_ns()
        stopping.stop_all(frozen, deadline)
        frozen.frozen_at_ns = time.monotonic_ns()
        frozen.freezing_time_us = (frozen.frozen_at_ns - started_ns) // 1000
        _read_threads(frozen, blocked)
        hit("freeze.done")
    except BaseException as error:
        stopping.let_go(frozen)
        if isinstance(error, ProcessLookupError | ChildProcessError | TargetGone):
            # on the way through an execve of another thread what is left of the old program looks dead or gone
            if attachable.comes_to_life(pid):
                raise stopping.replaced(pid) from error
            if not isinstance(error, TargetGone):
                raise attachable.gone(pid) from error
        raise
    return frozen


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
