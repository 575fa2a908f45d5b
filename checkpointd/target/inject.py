# SPDX-License-Identifier: Apache-2.0
"""System calls inside a frozen target, such that our death at any instant harms nobody.

How (each line is one step; after any of them the tracer may be killed, and the target goes on by itself)::

    write the slot            nobody points there yet
    set registers             rip = slot.entry, arguments of mmap: from here home is guaranteed
    block all signals         but the rendezvous signal
    run -> rendezvous A       write the runner and an empty table; set registers: mprotect
    run -> rendezvous R       a batch: write both tables into the idle bank; set registers: bank, rip = run;
                              run -> rendezvous R; read the results                              (repeated)
    run -> rendezvous B       the undo table (empty after success), munmap
    mask, registers           what they were before
    zero the slot

A *rendezvous* is a signal that the target ignores, sent by its thread to itself: a live tracer sees the stop, a
dead one is not missed.  Where there is no such signal, number 0 is sent and the thread driven from one system call
stop to the next; slower, the same otherwise.  No single step, no breakpoint, nothing on the target's stack.

Two *banks* of tables take turns: registers and bank change in one step, so that at any instant exactly one undo table
is in force, that of the last batch made or the one being made.

Other threads than the leader run single calls from a slot of their own, without a mapping.

No call is waited for without end (`Frozen.call_timeout_s`).  One that sleeps too long is made to fail with EINTR, the
rest of its batch and the undo table run, and the thread goes home in good order; one that cannot be woken is left to
the way home by itself when the target is thawed.

Raises TargetGone when the process dies meanwhile, Unsupported when injection is not possible, FrozenTooLong when a
call does not return in time.
"""

from __future__ import annotations

import errno
import os
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from checkpointd.errors import FrozenTooLong, TargetGone, Unsupported
from checkpointd.linux import ptrace
from checkpointd.linux.seccomp import MODE_FILTER, MODE_STRICT
from checkpointd.memory import PAGE_SIZE
from checkpointd.procfs.process import slurp
from checkpointd.target import rendezvous, restartable
from checkpointd.target.attachable import gone, lives
from checkpointd.target.blobs import RUNNER, RUNNER_RDV, RUNNER_RUN
from checkpointd.target.registers import UserRegs, home_context, signed, word
from checkpointd.target.remote import Call, Result
from checkpointd.target.rendezvous import CallTimeoutError
from checkpointd.target.seccomp_filter import Filters, action_name
from checkpointd.target.slot import SLOT_SIZE, SlotPlace, slot_bytes
from checkpointd.tracepoint import hit

if TYPE_CHECKING:
    from checkpointd.target.freeze import Frozen, FrozenThread

NR_MMAP, NR_MPROTECT, NR_MUNMAP = 9, 10, 11
NR_RT_SIGPROCMASK, NR_TGKILL = 14, 234
_PROT_RW, _PROT_RX = 3, 5
_MAP_PRIVATE_ANON = 0x22

_HEADER = struct.Struct("=IIQQIIIIQQQ")  # padded to one entry
_ENTRY = struct.Struct("=Q6Qq")
_RESULT = struct.Struct("=56xq")
_ENTRY_SIZE = 64
_ZEROES = tuple((0,) * (6 - nr) for nr in range(7))
_WORD = (1 << 64) - 1
_RESULT_AT = 56  # in an entry
_ARG0_IS_ADDRESS = 1 << 30
_IS_FORK = 1 << 29

_BANK_SIZE = 2 * PAGE_SIZE
_NR_ENTRIES = _BANK_SIZE // _ENTRY_SIZE - 1
_MAX_UNDO = 48
_TABLES_SIZE = PAGE_SIZE + 2 * _BANK_SIZE
_DEFAULT_SCRATCH = 3 * PAGE_SIZE
_STATUS_LINES = re.compile(rb"^(Seccomp|NStgid|NSpid|S[ih][gd]\w+):\t(.*)$", re.MULTILINE)
_SOME_ADDRESS = 0x7F00_0000_0000
_HOME_TIMEOUT_S = 2.0  # for the rest of the way once a call was late


class _Way:
    """One thread's way through a slot and home again."""

    def __init__(
        self, frozen: Frozen, thread: FrozenThread, place: SlotPlace, signum: int, ids: tuple[int, int]
    ) -> None:
        self.frozen = frozen
        self.thread = thread
        self.place = place
        self.signum = signum
        self.regs = thread.regs.copy()
        self.ids = ids
        self._timeout_s = frozen.call_timeout_s
        self._late: CallTimeoutError | None = None  # it cannot be reached

    def start(self, nr: int, args: Sequence[int], map_size: int) -> UserRegs:
        """Make the first call; registers at rendezvous A (the result is in r12)."""
        home = home_context(self.thread.regs)
        slot = slot_bytes(home, self.thread.sigmask, map_size, self.ids, self.signum)
        hit("inject.begin")
        self.frozen.force_write(self.place.address, slot)
        hit("inject.slot_written")
        self.set_call(nr, args, self.place.entry)
        hit("inject.slot_entered")
        all_but = (1 << 64) - 1
        if self.signum:
            all_but ^= 1 << (self.signum - 1)
        ptrace.set_sigmask(self.thread.tid, all_but)
        hit("inject.signals_blocked")
        return self.run_to(self.place.rendezvous_a)

    def set_call(self, nr: int, args: Sequence[int], rip: int, r15: int | None = None) -> None:
        """Registers for a system call at `rip`."""
        regs = self.regs
        regs.rax = nr
        words = [word(arg) for arg in args] + [0] * (6 - len(args))
        regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9 = words
        if r15 is not None:
            regs.r15 = r15
        regs.rip = rip
        regs.leave_syscall()
        ptrace.set_regs(self.thread.tid, regs.to_bytes())

    def run_to(self, rip: int) -> UserRegs:
        """Let the thread run until it meets us at `rip`."""
        hit("inject.run")
        with self._bounded():
            regs = rendezvous.run_to(self.frozen.pid, self.thread.tid, rip, self.signum, self._timeout_s)
        hit("inject.met")
        return regs

    @contextmanager
    def _bounded(self) -> Iterator[None]:
        if self._late is not None:
            raise self._late
        try:
            yield
        except CallTimeoutError as error:
            self._timeout_s = min(self._timeout_s, _HOME_TIMEOUT_S)
            if not error.stopped:
                self._late = error
            raise

    def finish(self) -> None:
        """From anywhere on the way: to rendezvous B, then back to the registers of the freeze."""
        tid = self.thread.tid
        self.run_to(self.place.rendezvous_b)
        if not self.signum:
            # the kernel looks at the restart of the interrupted call only inside its signal code
            with self._bounded():
                rendezvous.stop_in_signal_code(self.frozen.pid, tid, self._timeout_s)
            hit("inject.in_signal_code")
        ptrace.set_sigmask(tid, self.thread.sigmask)
        hit("inject.mask_restored")
        ptrace.set_regs(tid, restartable.as_let_go(self.thread.regs).to_bytes())
        hit("inject.registers_restored")
        self.frozen.force_write(self.place.address, bytes(SLOT_SIZE))
        hit("inject.slot_zeroed")


class Injection:
    """A `Remote` in a frozen target; made by `Frozen.inject`."""

    def __init__(self, frozen: Frozen, scratch_bytes: int | None) -> None:
        self.pid = frozen.pid
        self._frozen = frozen
        self._filters: dict[int, Filters] = {}
        self._standing_undo: list[Call] = []  # frees what the injection itself took
        self._asked_undo: list[Call] = []  # of the last batch, with its results put in
        wanted = _DEFAULT_SCRATCH if scratch_bytes is None else max(scratch_bytes, PAGE_SIZE)
        self._scratch_size = -(-wanted // PAGE_SIZE) * PAGE_SIZE
        self._map_size = _TABLES_SIZE + self._scratch_size
        self._way = self._way_of(frozen.pid)
        self._enter()

    # ---- entering and leaving

    def _way_of(self, tid: int) -> _Way:
        """Everything that can be refused is refused here, before the thread is touched."""
        frozen = self._frozen
        thread = frozen.threads[tid]
        blockers: list[str] = []
        place = frozen.free_place()
        if place is None:
            blockers.append("no executable mapping has unused room for the way home")
        if ptrace.get_syscall_dispatch_mode(tid):
            blockers.append("it dispatches its own system calls (PR_SET_SYSCALL_USER_DISPATCH)")
        status = read_status(frozen.pid, tid)
        ids = int(status["NStgid"].split()[-1]), int(status["NSpid"].split()[-1])
        mode = int(status.get("Seccomp", "0"))
        if mode == MODE_STRICT:
            blockers.append("it runs under strict seccomp")
        elif mode == MODE_FILTER and place is not None:
            blockers += self._read_filters(tid, place, ids)
        if blockers or place is None:
            raise self._refuse(tid, blockers)
        # our rendezvous are context switches too: afterwards this could not be told any more
        thread.blocked = restartable.confirm(frozen.pid, tid, thread.blocked)
        signum = rendezvous.choose_signal(status, thread.sigmask, is_go=frozen.is_go)
        return _Way(frozen, thread, place, signum, ids)

    def _refuse(self, tid: int, blockers: list[str]) -> Unsupported:
        return Unsupported(
            f"no system call can be made inside thread {tid} of process {self.pid}: {blockers[0]}",
            hint="the content backend needs no calls inside the target",
            pid=self.pid,
            blockers=blockers,
        )

    def _read_filters(self, tid: int, place: SlotPlace, ids: tuple[int, int]) -> list[str]:
        try:
            filters = self._filters[tid] = Filters.of_thread(tid)
        except OSError as error:
            name = errno.errorcode.get(error.errno or 0, "?")
            return [f"it has a seccomp filter that cannot be read ({name}; CAP_SYS_ADMIN is needed)"]
        infrastructure = [
            (
                "mmap",
                NR_MMAP,
                (0, self._map_size, _PROT_RX, _MAP_PRIVATE_ANON, (1 << 64) - 1, 0),
                place.entry + 2,
            ),
            ("mprotect", NR_MPROTECT, (_SOME_ADDRESS, self._map_size, _PROT_RW), _SOME_ADDRESS + 2),
            ("munmap", NR_MUNMAP, (_SOME_ADDRESS, self._map_size), place.address + 0x37),
            ("tgkill", NR_TGKILL, (*ids, 0), place.rendezvous_a),
            ("tgkill", NR_TGKILL, (*ids, 23), place.rendezvous_b),
            ("tgkill", NR_TGKILL, (*ids, 23), _SOME_ADDRESS + RUNNER_RDV),
            ("rt_sigprocmask", NR_RT_SIGPROCMASK, (0, place.address + 440, 0, 8), place.address + 0x68),
            ("rt_sigprocmask", NR_RT_SIGPROCMASK, (2, place.address + 408, 0, 8), place.address + 0x95),
        ]
        return [
            f"its seccomp filter answers {action_name(filters.action(nr, args, ip))} to {name}"
            for name, nr, args, ip in infrastructure
            if not filters.allows(nr, args, ip)
        ]

    def _enter(self) -> None:
        way = self._way
        mmap_args = (0, self._map_size, _PROT_RX, _MAP_PRIVATE_ANON, -1, 0)
        base = signed(way.start(NR_MMAP, mmap_args, self._map_size).r12)
        if -4096 < base < 0:
            way.finish()
            raise self._refuse(
                way.thread.tid, [f"mapping memory failed there ({errno.errorcode.get(-base)})"]
            )
        self._base = base
        self._banks = (base + PAGE_SIZE, base + PAGE_SIZE + _BANK_SIZE)
        self._bank = 0
        self._scratch = [(base + _TABLES_SIZE, base + self._map_size)]
        self._scratch_at = self._scratch[0][0]
        # code, and the header of bank 0 (no work, no undo), in one write
        first_page = RUNNER + bytes(PAGE_SIZE - len(RUNNER))
        self._frozen.force_write(base, first_page + self._header(0, 0, 0))
        hit("inject.runner_written")
        way.set_call(
            NR_MPROTECT, (self._banks[0], self._map_size - PAGE_SIZE, _PROT_RW), base, r15=self._banks[0]
        )
        hit("inject.runner_entered")
        failed = signed(way.run_to(base + RUNNER_RDV).r14)
        if failed:
            way.finish()
            raise self._refuse(
                way.thread.tid, [f"making memory writable failed there ({errno.errorcode.get(-failed)})"]
            )
        hit("inject.ready")

    def leave(self, *, undo: bool) -> None:
        """Go home; with `undo` the last batch's undo table is run on the way, as if we had died."""
        way = self._way
        if undo:
            way.finish()
            return
        hit("inject.leave")
        # an empty work table whose undo table frees what the injection itself has taken
        bank = 1 - self._bank
        at = self._banks[bank]
        standing = [self._encode(call, None, 0, -1, bank) for call in self._standing_undo]
        self._frozen.mem.write(at, self._header(0, len(standing), at + _ENTRY_SIZE) + b"".join(standing))
        hit("inject.leave_written")
        way.set_call(0, (), self._base + RUNNER_RDV, r15=at)
        hit("inject.leaving")
        way.finish()
        hit("inject.left")

    def _header(self, nr_work: int, nr_undo: int, undo_at: int) -> bytes:
        pid, tid = self._way.ids
        return _HEADER.pack(
            nr_work, nr_undo, undo_at, self._way.place.undo, pid, tid, self._way.signum, 0, 0, 0, 0
        )

    # ---- system calls

    def batch(self, calls: Sequence[Call], *, undo: Sequence[Call] = (), tid: int | None = None) -> list[int]:
        """See `Remote.batch`.  `undo` holds until the next batch, or until the injection ends well.

        Raises:
            TargetGone: the process died.
            Unsupported: a seccomp filter of the target would do harm at one of the calls.
            ValueError: too many undo calls, or a `Result` where none may be.
        """
        if tid is not None and tid != self.pid:
            return self._single_calls(calls, undo, tid)
        asked = tuple(undo)
        undo = [*asked, *self._standing_undo]
        if len(undo) > _MAX_UNDO:
            raise ValueError(f"at most {_MAX_UNDO} undo calls, not {len(undo)}")
        self._refuse_harmful([*calls, *undo], self.pid)
        room = _NR_ENTRIES - len(undo)
        results: list[int] = []
        for first in range(0, max(len(calls), 1), room):
            part = calls[first : first + room]
            results += self._run_part(part, undo, results, nr_before=first)
        self._asked_undo = [_with_results(call, results) for call in asked]
        return results

    def _run_part(
        self, part: Sequence[Call], undo: Sequence[Call], known: Sequence[int], nr_before: int, flags: int = 0
    ) -> list[int]:
        """Run calls that fit into one bank.

        Args:
            known: results of the calls before this part, `nr_before` in number.
        """
        bank = 1 - self._bank
        at = self._banks[bank]
        nr_after = nr_before + len(part)
        work = [
            self._encode(call, known, nr_before, nr_before + n, bank, flags) for n, call in enumerate(part)
        ]
        undo_entries = [
            self._encode(call, known, nr_before, nr_after, bank)
            for call in undo
            if not _refers_beyond(call, nr_after)
        ]
        undo_at = at + (1 + len(work)) * _ENTRY_SIZE
        table = self._header(len(work), len(undo_entries), undo_at) + b"".join(work) + b"".join(undo_entries)
        hit("inject.batch")
        self._frozen.mem.write(at, table)  # the idle bank: nobody reads it yet
        hit("inject.batch_written")
        self._way.set_call(0, (), self._base + RUNNER_RUN, r15=at)
        self._bank = bank
        hit("inject.batch_entered")
        self._way.run_to(self._base + RUNNER_RDV)
        hit("inject.batch_done")
        answer = self._frozen.mem.read(at + _ENTRY_SIZE, len(work) * _ENTRY_SIZE)
        return [result for (result,) in _RESULT.iter_unpack(answer)]

    def _encode(
        self,
        call: Call,
        known: Sequence[int] | None,
        nr_before: int,
        nr_after: int,
        bank: int,
        flags: int = 0,
    ) -> bytes:
        """One table entry; a `Result` of this part becomes the address of that entry's result."""
        nr, args = call.nr | flags, call.args
        words = [arg & _WORD for arg in args if not isinstance(arg, Result)]
        if len(words) == len(args):  # nearly always
            return _ENTRY.pack(nr, *words, *_ZEROES[len(words)], -1)
        words.clear()
        for position, arg in enumerate(args):
            if not isinstance(arg, Result):
                words.append(word(arg))
            elif position or known is None or not 0 <= arg.index < nr_after:
                raise ValueError("Result may only be a first argument and name an earlier call")
            elif arg.index < nr_before:
                words.append(word(known[arg.index]))
            else:
                nr |= _ARG0_IS_ADDRESS
                words.append(self._banks[bank] + (1 + arg.index - nr_before) * _ENTRY_SIZE + _RESULT_AT)
        return _ENTRY.pack(nr, *words, *_ZEROES[len(words)], -1)

    def _single_calls(self, calls: Sequence[Call], undo: Sequence[Call], tid: int) -> list[int]:
        """Calls in another thread, one stop each, from a slot only."""
        if undo:
            raise ValueError("undo is only possible in the leader")
        if tid not in self._frozen.threads:
            raise ValueError(f"{tid} is no thread of process {self.pid}")
        if not calls:
            return []
        way = self._way_of(tid)
        self._refuse_harmful(calls, tid)
        self._frozen.strayed.add(tid)  # until it is home: only a thaw brings it there from anywhere
        try:
            results = self._walk(way, calls)
        except CallTimeoutError:
            way.finish()
            self._frozen.strayed.discard(tid)
            raise
        self._frozen.strayed.discard(tid)
        return results

    def _walk(self, way: _Way, calls: Sequence[Call]) -> list[int]:
        results: list[int] = []
        for call in calls:
            args = [results[arg.index] if isinstance(arg, Result) else arg for arg in call.args]
            if not results:
                # an unmap of length 0 fails with EINVAL: nothing is undone on the way home
                regs = way.start(call.nr, args, 0)
            else:
                way.set_call(call.nr, args, way.place.entry)
                regs = way.run_to(way.place.rendezvous_a)
            results.append(signed(regs.r12))
        way.finish()
        return results

    def call(self, nr: int, *args: int) -> int:
        """See `Remote.call`."""
        result = self.batch([Call(nr, args)])[0]
        if -4096 < result < 0:
            raise OSError(-result, f"system call {nr} in process {self.pid}: {os.strerror(-result)}")
        return result

    def fork(self, flags: int) -> int:
        """clone(2) whose child never runs a single instruction of the target's; its result.

        The child is born stopped and traced by us (`flags` holds CLONE_PTRACE); if nobody holds it, it exits.
        """
        call = Call(56, (flags, 0, 0, 0, 0))
        self._refuse_harmful([call], self.pid)
        return self._run_part([call], [*self._asked_undo, *self._standing_undo], (), 0, flags=_IS_FORK)[0]

    # ---- seccomp

    def seccomp_ok(self, calls: Sequence[Call], tid: int | None = None) -> bool:
        """May these calls be made without harm?  (They may still fail: a filter's ERRNO is harmless.)"""
        return not self._harmful(calls, tid or self.pid)

    def _harmful(self, calls: Sequence[Call], tid: int) -> list[str]:
        filters = self._filters.get(tid)
        if filters is None:
            return []
        bad = []
        for call in calls:
            args = [_SOME_ADDRESS if isinstance(arg, Result) else arg for arg in call.args]
            if not filters.harmless(call.nr, args, _SOME_ADDRESS):
                name = action_name(filters.action(call.nr, args, _SOME_ADDRESS))
                bad.append(f"its seccomp filter answers {name} to system call {call.nr}")
        return bad

    def _refuse_harmful(self, calls: Sequence[Call], tid: int) -> None:
        bad = self._harmful(calls, tid)
        if bad:
            raise self._refuse(tid, bad)

    # ---- memory

    def put(self, data: bytes) -> int:
        """See `Remote.put`."""
        address = self._take(len(data))
        self._frozen.mem.write(address, data)
        return address

    def alloc(self, size_bytes: int) -> int:
        """See `Remote.alloc`."""
        address = self._take(size_bytes)
        self._frozen.mem.write(address, bytes(size_bytes))
        return address

    def read(self, address: int, size_bytes: int) -> bytes:
        """See `Remote.read`."""
        return self._frozen.mem.read(address, size_bytes)

    def reset(self) -> None:
        """See `Remote.reset`."""
        self._scratch_at = self._scratch[-1][0]

    def _take(self, size_bytes: int) -> int:
        at = -(-self._scratch_at // 16) * 16
        if at + size_bytes > self._scratch[-1][1]:
            self._grow(size_bytes)
            at = self._scratch_at
        self._scratch_at = at + size_bytes
        return at

    def _grow(self, size_bytes: int) -> None:
        """Another scratch mapping, unmapped with the rest."""
        size = max(2 * (self._scratch[-1][1] - self._scratch[-1][0]), -(-size_bytes // PAGE_SIZE) * PAGE_SIZE)
        call = Call(NR_MMAP, (0, size, _PROT_RW, _MAP_PRIVATE_ANON, -1, 0))
        self._refuse_harmful([call, Call(NR_MUNMAP, (0, size))], self.pid)
        # the caller's undo table stays in force
        undo = [*self._asked_undo, *self._standing_undo, Call(NR_MUNMAP, (Result(0), size))]
        base = self._run_part([call], undo, (), 0)[0]
        if base < 0:
            raise self._refuse(
                self.pid, [f"mapping {size} bytes failed there ({errno.errorcode.get(-base)})"]
            )
        self._standing_undo.append(Call(NR_MUNMAP, (base, size)))
        self._scratch.append((base, base + size))
        self._scratch_at = base


def read_status(pid: int, tid: int) -> dict[str, str]:
    """The lines of /proc/PID/task/TID/status that an injection needs (all of them would take ten times longer)."""
    text = slurp(f"/proc/{pid}/task/{tid}/status")
    return {key.decode(): value.decode() for key, value in _STATUS_LINES.findall(text)}


def _with_results(call: Call, results: Sequence[int]) -> Call:
    """The call with every `Result` replaced by what it became."""
    return Call(call.nr, tuple(results[arg.index] if isinstance(arg, Result) else arg for arg in call.args))


def _refers_beyond(call: Call, nr_after: int) -> bool:
    """Does the call use a result that does not exist yet?"""
    return any(isinstance(arg, Result) and arg.index >= nr_after for arg in call.args)


class NotHomeError(Exception):
    """Carries an error that left the thread on its way: only a thaw brings it home."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.cause = cause


@contextmanager
def injection(frozen: Frozen, scratch_bytes: int | None) -> Iterator[Injection]:
    """Enter, hand out, leave; see `Frozen.inject`.

    Raises:
        NotHomeError: around whatever interrupted entering or leaving.
    """
    with _coming_home(frozen):
        remote = Injection(frozen, scratch_bytes)
    try:
        yield remote
    except CallTimeoutError as error:
        with _coming_home(frozen):
            remote.leave(undo=True)
        raise _too_long(frozen.pid, error) from error
    except BaseException as error:
        if isinstance(error, OSError | TargetGone) and not lives(frozen.pid, frozen.pid):
            raise gone(frozen.pid) from error
        with _coming_home(frozen):
            remote.leave(undo=True)
        raise
    with _coming_home(frozen):
        remote.leave(undo=False)


@contextmanager
def _coming_home(frozen: Frozen) -> Iterator[None]:
    try:
        yield
    except Unsupported:
        raise  # refused in good order
    except CallTimeoutError as error:
        raise NotHomeError(_too_long(frozen.pid, error)) from error
    except OSError as error:
        if not lives(frozen.pid, frozen.pid):
            raise gone(frozen.pid) from error
        raise NotHomeError(error) from error
    except BaseException as error:
        raise NotHomeError(error) from error


def _too_long(pid: int, error: CallTimeoutError) -> FrozenTooLong:
    return FrozenTooLong(
        f"a system call made inside process {pid} did not return; the process runs on ({error})",
        hint="is its cgroup frozen, or does a userfaultfd wait for another program? try again when that is over",
        pid=pid,
        tid=error.tid,
    )
