# SPDX-License-Identifier: Apache-2.0
"""The process while it is being built: a traced stub that runs tables of system calls.

It dies with us (PTRACE_O_EXITKILL, and before that an alarm), so nothing half-made ever stays.  Its signals are
all blocked; a table ends in int3, whose SIGTRAP is ours.  Must be used on one thread, the tracer.

Raises: TargetGone (somebody killed it), StepFailedError (a call failed), OSError.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Mapping, Sequence

from checkpointd.errors import CheckpointError, TargetGone
from checkpointd.linux import clone, ptrace
from checkpointd.linux import signal as sig
from checkpointd.linux.process_vm import MemFile
from checkpointd.memory import PAGE_SIZE
from checkpointd.restore.blobs import RUNNER, RUNNER_AMX, RUNNER_ONE, STUB_SYSCALL
from checkpointd.restore.plan import Step
from checkpointd.target.registers import UserRegs, word
from checkpointd.target.remote import Call, Result

_WALL = 0x4000_0000
_OPTIONS = ptrace.O_TRACESYSGOOD | ptrace.O_EXITKILL
_TABLE_BYTES = 256 << 10
_MAX_ENTRIES = _TABLE_BYTES // clone.ENTRY_BYTES
_DATA_BYTES = 1 << 20
_ALIGN = 16
_CRASHES = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE})
WORK_BYTES = PAGE_SIZE + _TABLE_BYTES + _DATA_BYTES
PROT_RWX = 7


class StepFailedError(CheckpointError):
    """A system call of the process being restored failed."""

    reason = "RESTORE_FAILED"

    def __init__(self, pid: int, what: str, number: int) -> None:
        super().__init__(
            f"process {pid} could not be rebuilt: {what}: {os.strerror(number)}",
            hint="nothing was left behind; `checkpoint verify` tells whether the image is sound",
            pid=pid,
            errno=errno.errorcode.get(number, str(number)),
        )
        self.number = number
        self.what = what


class Stub:
    """A `Remote` that is being made into a process.

    Attributes:
        pid: its id.
        work: (start, end) of the work area: code, table, scratch.
        tids: its threads, the leader first.
        in_table_code: threads whose registers say where they are (not yet given their own).
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.tids = [pid]
        self.work = (0, 0)
        self._regs: dict[int, UserRegs] = {}
        self._mem: MemFile | None = None
        self._table = 0
        self._data = 0
        self._data_at = 0

    # ---- attaching and leaving

    @staticmethod
    def attach(pid: int) -> Stub:
        """Become the tracer of a stub that waits in its only loop."""
        stub = Stub(pid)
        ptrace.seize(pid, _OPTIONS)
        ptrace.interrupt(pid)
        stub._wait_event_stop(pid)
        stub._regs[pid] = UserRegs.from_bytes(ptrace.get_regs(pid))
        stub._mem = MemFile(pid, writable=True)
        return stub

    @property
    def mem(self) -> MemFile:
        if self._mem is None:
            raise TargetGone(f"process {self.pid} is gone", pid=self.pid)
        return self._mem

    def open_work_area(self, start: int, size_bytes: int) -> None:
        """Map the work area and put the code there; the stub's own `syscall` instruction does it."""
        self._set_syscall(self.pid, STUB_SYSCALL, 9, (start, size_bytes, PROT_RWX, 0x100022, -1, 0))
        result = self._to_syscall_exit(self.pid)
        if result != start:
            raise StepFailedError(self.pid, "mapping the work area", -result if result < 0 else errno.EEXIST)
        self._stop_in_signal_code(self.pid)
        self.work = (start, start + size_bytes)
        self._table = start + PAGE_SIZE
        self._data = self._table + _TABLE_BYTES
        self._data_at = self._data
        self.mem.write(start, RUNNER)
        ptrace.set_sigmask(self.pid, sig.ALL_SIGNALS)

    def adopt_threads(self, tids: Sequence[int]) -> None:
        """Take the threads that were born traced (CLONE_PTRACE), stopped before their first instruction."""
        for tid in tids:
            self.tids.append(tid)
            self._wait_event_stop(tid)
            self._regs[tid] = UserRegs.from_bytes(ptrace.get_regs(tid))

    def destroy(self) -> None:
        """Kill it and wait until it is gone."""
        if self._mem is not None:
            self._mem.close()
            self._mem = None
        try:
            os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        for tid in sorted(self.tids, key=lambda one: one == self.pid):  # the leader's death is reported last
            try:
                while not _is_death(os.waitpid(tid, _WALL)[1]):
                    pass
            except ChildProcessError:
                continue

    def close(self) -> None:
        if self._mem is not None:
            self._mem.close()
            self._mem = None

    # ---- Remote

    def batch(self, calls: Sequence[Call], *, undo: Sequence[Call] = (), tid: int | None = None) -> list[int]:
        """See `Remote.batch`; `undo` is not needed: the stub dies with us."""
        results: list[int] = []
        for first in range(0, len(calls), _MAX_ENTRIES):
            part = calls[first : first + _MAX_ENTRIES]
            results += self._run_table(
                tid or self.pid, self._encode(part, results, first, self._table), self._table
            )
        return results

    def call(self, nr: int, *args: int) -> int:
        result = self.batch([Call(nr, args)])[0]
        if -4096 < result < 0:
            raise OSError(-result, f"system call {nr} in process {self.pid}: {os.strerror(-result)}")
        return result

    def put(self, data: bytes) -> int:
        at = self.alloc(len(data))
        self.mem.write(at, data)
        return at

    def alloc(self, size_bytes: int) -> int:
        at = -(-self._data_at // _ALIGN) * _ALIGN
        if at + size_bytes > self.work[1]:
            raise CheckpointError(f"the work area of process {self.pid} is full", pid=self.pid)
        self._data_at = at + size_bytes
        return at

    def read(self, address: int, size_bytes: int) -> bytes:
        return self.mem.read(address, size_bytes)

    def reset(self) -> None:
        """Forget all scratch, and zero it."""
        if self._data_at > self._data:
            self.mem.write(self._data, bytes(self._data_at - self._data))
        self._data_at = self._data

    # ---- steps

    def run(self, steps: Sequence[Step], tid: int | None = None) -> list[int]:
        """Run steps in order.

        Raises:
            StepFailedError: the first that failed; none behind it was made.
        """
        results: list[int] = []
        for first in range(0, len(steps), _MAX_ENTRIES):
            part = steps[first : first + _MAX_ENTRIES]
            table = b"".join(_entry(step) for step in part)
            found = self._run_table(tid or self.pid, table, self._table)
            self._check(part, found)
            results += found
        return results

    def run_all(self, tables: Mapping[int, Sequence[Step]]) -> None:
        """Run each thread's own steps, all threads at the same time.

        Raises:
            StepFailedError: one failed; the others ran.
        """
        waiting: dict[int, Sequence[Step]] = {}
        places: dict[int, int] = {}
        at = self._table
        queue = [(tid, steps) for tid, steps in tables.items() if steps]
        while queue or waiting:
            while queue and at + len(queue[0][1]) * clone.ENTRY_BYTES <= self._table + _TABLE_BYTES:
                tid, steps = queue.pop(0)
                self.mem.write(at, b"".join(_entry(step) for step in steps))
                self._start(tid, at, len(steps))
                waiting[tid], places[tid] = steps, at
                at += len(steps) * clone.ENTRY_BYTES
            if not waiting:
                raise CheckpointError(f"a table of process {self.pid} is too long", pid=self.pid)
            for tid in waiting:
                self._wait_int3(tid)
            for tid, steps in waiting.items():
                self._check(steps, self._results(places[tid], len(steps)))
            waiting.clear()
            at = self._table

    def single(self, tid: int, nr: int, args: Sequence[int]) -> int:
        """One call without int3 (which would undo the disposition of SIGTRAP); ends at the system call's exit."""
        self._set_syscall(tid, self.work[0] + RUNNER_ONE, nr, args)
        return self._to_syscall_exit(tid)

    def settle(self, tid: int) -> None:
        """From a system call's exit to where the kernel honours registers that ask for a restart."""
        self._stop_in_signal_code(tid)

    def interrupted_call(self, tid: int, nr: int, args: Sequence[int]) -> int:
        """Make a call and interrupt it at once: the kernel keeps its restart block for the thread."""
        self._set_syscall(tid, self.work[0] + RUNNER_ONE, nr, args)
        ptrace.cont_to_syscall(tid)
        self._wait_syscall_stop(tid)
        ptrace.interrupt(tid)
        ptrace.cont(tid)
        self._wait_event_stop(tid)
        return UserRegs.from_bytes(ptrace.get_regs(tid)).result

    def use_tile_registers(self, tid: int, config_at: int) -> None:
        """Execute an AMX instruction, for which the kernel enlarges the thread's register save area."""
        regs = self._regs[tid].copy()
        regs.rbx, regs.rip = config_at, self.work[0] + RUNNER_AMX
        regs.leave_syscall()
        ptrace.set_regs(tid, regs.to_bytes())
        ptrace.cont(tid)
        self._wait_int3(tid)

    # ---- below

    def _encode(self, calls: Sequence[Call], known: Sequence[int], nr_before: int, base: int) -> bytes:
        parts = []
        for call in calls:
            nr, args = int(call.nr), list(call.args)
            if args and isinstance(args[0], Result):
                index = args[0].index
                if index < nr_before:
                    args[0] = known[index]
                else:
                    nr |= clone.FIRST_ARG_IS_ADDRESS
                    args[0] = base + (index - nr_before) * clone.ENTRY_BYTES + clone.ENTRY_RESULT_AT
            plain = [arg for arg in args if isinstance(arg, int)]
            if len(plain) != len(args):
                raise ValueError("a Result may stand only as the first argument")
            parts.append(clone.pack_entry(nr, plain, may_fail=True))
        return b"".join(parts)

    def _run_table(self, tid: int, table: bytes, at: int) -> list[int]:
        nr = len(table) // clone.ENTRY_BYTES
        if not nr:
            return []
        self.mem.write(at, table)
        self._start(tid, at, nr)
        self._wait_int3(tid)
        return self._results(at, nr)

    def _results(self, at: int, nr: int) -> list[int]:
        table = self.mem.read(at, nr * clone.ENTRY_BYTES)
        return [clone.entry_result(table, n) for n in range(nr)]

    def _check(self, steps: Sequence[Step], results: Sequence[int]) -> None:
        for step, result in zip(steps, results, strict=True):
            if -4096 < result < 0 and not step.may_fail:
                raise StepFailedError(self.pid, step.what, -result)

    def _start(self, tid: int, table: int, nr: int) -> None:
        regs = self._regs[tid].copy()
        regs.rbx, regs.r12, regs.rip = table, nr, self.work[0]
        regs.leave_syscall()
        ptrace.set_regs(tid, regs.to_bytes())
        ptrace.cont(tid)

    def _set_syscall(self, tid: int, rip: int, nr: int, args: Sequence[int]) -> None:
        regs = self._regs[tid].copy()
        words = [word(arg) for arg in args] + [0] * (6 - len(args))
        regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9 = words
        regs.rax, regs.rip = nr, rip
        regs.leave_syscall()
        ptrace.set_regs(tid, regs.to_bytes())

    def _to_syscall_exit(self, tid: int) -> int:
        ptrace.cont_to_syscall(tid)
        self._wait_syscall_stop(tid)
        ptrace.cont_to_syscall(tid)
        self._wait_syscall_stop(tid)
        return UserRegs.from_bytes(ptrace.get_regs(tid)).result

    def _stop_in_signal_code(self, tid: int) -> None:
        ptrace.interrupt(tid)
        ptrace.cont(tid)
        self._wait_event_stop(tid)

    def _wait(self, tid: int) -> int:
        """The next stop's code: signal | event << 8."""
        try:
            _, status = os.waitpid(tid, _WALL)
        except ChildProcessError as error:
            raise self.gone() from error
        if _is_death(status):
            raise self.gone()
        code = status >> 8
        if code in _CRASHES:
            regs = UserRegs.from_bytes(ptrace.get_regs(tid))
            raise CheckpointError(
                f"process {self.pid} crashed while it was being rebuilt (signal {code} at {regs.rip:#x})",
                hint="this is a defect of checkpointd; nothing was left behind",
                pid=self.pid,
            )
        return code

    def gone(self) -> TargetGone:
        """The error for a process that somebody killed meanwhile."""
        return TargetGone(
            f"process {self.pid} was killed while it was being restored",
            hint="look for the OOM killer in the kernel's log, then try again",
            pid=self.pid,
        )

    def _wait_event_stop(self, tid: int) -> None:
        while self._wait(tid) >> 8 != ptrace.EVENT_STOP:
            ptrace.cont(tid)

    def _wait_syscall_stop(self, tid: int) -> None:
        while self._wait(tid) != ptrace.SYSCALL_STOP:
            ptrace.cont_to_syscall(tid)

    def _wait_int3(self, tid: int) -> None:
        while self._wait(tid) != signal.SIGTRAP:
            ptrace.cont(tid)


def _entry(step: Step) -> bytes:
    args = [arg for arg in step.call.args if isinstance(arg, int)]
    return clone.pack_entry(int(step.call.nr), args, may_fail=step.may_fail)


def _is_death(status: int) -> bool:
    return os.WIFEXITED(status) or os.WIFSIGNALED(status)
