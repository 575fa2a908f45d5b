# SPDX-License-Identifier: Apache-2.0
"""Bringing a process back: conducts the steps, in the one order that works.

::

    check            machine, rights, ids, files                          nothing exists yet
    spawn            stub with the pid, session, address space layout
    empty, map       all mappings; program parts, vdso; memory policies, by which the pages are placed
    fill             pages
    finish           protection, guards, locks; directory, umask, personality
    files            all descriptors (where some lead to threads in /proc, these are born first)
    threads          born stopped; each told what is its own; who they are
    signals, timers  queued while everything is blocked
    before_release   the caller's hook: arm tracking
    sleeps           interrupted calls get real restart blocks
    let go           work area away, registers, masks, detach, the leader last

Any failure on the way kills what was made: the process is either back or does not exist.  All of it happens on the
calling thread, which becomes the tracer.

Raises: RestoreConflict, Unsupported, NotPermitted, ImageDamaged, TargetGone, CheckpointError.
"""

from __future__ import annotations

import contextlib
import os
import signal as signals_of_python
import stat
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from checkpointd.errors import CheckpointError, RestoreConflict, Unsupported
from checkpointd.linux import keys, prctl, ptrace
from checkpointd.linux import signal as sig
from checkpointd.linux.arch import Nr, mmap_min_addr
from checkpointd.linux.hugetlb import read_pools
from checkpointd.memory import PAGE_SIZE, Runs
from checkpointd.procfs import maps, process
from checkpointd.restore import checks, plan, policies, pools
from checkpointd.restore import signals as signal_steps
from checkpointd.restore import threads as thread_steps
from checkpointd.restore.files import FilesContext, after_credentials, check_files, restore_files
from checkpointd.restore.files_maker import threads_led_to
from checkpointd.restore.fill import PageSource, fill
from checkpointd.restore.objects import Objects, open_file
from checkpointd.restore.plan import Step
from checkpointd.restore.reopen import Opener
from checkpointd.restore.spawn import ADDR_COMPAT_LAYOUT, Birth, has_time_offsets, members_of, spawn
from checkpointd.restore.stub import WORK_BYTES, StepFailedError, Stub
from checkpointd.restore.surroundings import (
    leave_session_keyring,
    link_user_keyring,
    schedule,
    set_autogroup,
    set_limits,
    set_program,
    set_surroundings,
)
from checkpointd.state.files import FilesOptions, SharedMemory
from checkpointd.state.process import ImageState, ProcessState
from checkpointd.state.threads import Credentials
from checkpointd.target.registers import UserRegs
from checkpointd.target.remote import Call
from checkpointd.target.restartable import Switches, read_switches
from checkpointd.target.threads import RememberedSleep, SleepMemory
from checkpointd.tracepoint import hit

_PUT_BACK = (
    "put back what is missing or changed (for packages: install the version of the dump), then restore again"
)
_DO_AS_TOLD = "that done, restore again; nothing was changed so far"
_WORK_PER_THREAD = 4 * PAGE_SIZE

Progress = Callable[[str, int, int], None]
"""(phase, done, total)"""


@dataclass(frozen=True, slots=True)
class RestoreOptions:
    """What the user allows.

    Attributes:
        files: about open files; `files.changed` also rules mapped ones.
        file_content: pieces of the content that the image keeps as pages for a file's description.
        wait_for_ids_s: how long to wait for a dead process that still has the ids to be reaped.
        before_release: called with the finished process (its `Remote`) before its first instruction.
    """

    files: FilesOptions = field(default_factory=FilesOptions)
    file_content: Callable[[int], Iterable[bytes]] = lambda index: ()
    wait_for_ids_s: float = 5.0
    before_release: Callable[[Stub], None] | None = None


@dataclass(frozen=True, slots=True)
class Restored:
    """A process that runs again (or is stopped, if it was).

    Attributes:
        tids: old to new thread ids.
        sleeps: what its sleeping threads are in, for the next dump of it.
        phases: microseconds of each phase.
        restore_time_us: from the birth of the stub to the last thread let go.
    """

    pid: int
    tids: dict[int, int]
    warnings: list[str]
    sleeps: SleepMemory
    pages_restored: int
    phases: dict[str, int]
    restore_time_us: int


def _no_progress(phase: str, done: int, total: int) -> None:
    """Nobody watches."""


def restore_process(
    image: PageSource,
    state: ImageState,
    *,
    new_pid: bool = False,
    options: RestoreOptions | None = None,
    progress: Progress | None = None,
) -> Restored:
    """Restore one process.

    Args:
        image: its pages.
        new_pid: take any free ids instead of those it had.

    Raises:
        RestoreConflict: an id is taken (by whom), a file changed or is gone (which); all at once.
        Unsupported, NotPermitted: not on this machine, not by this user.
        ImageDamaged: a page or the state is not what it was.
        TargetGone: somebody killed the new process.
    """
    return _Restorer(image, state, new_pid, options or RestoreOptions(), progress or _no_progress).run()


class _Restorer:
    def __init__(
        self, image: PageSource, state: ImageState, new_pid: bool, options: RestoreOptions, progress: Progress
    ) -> None:
        self.image = image
        self.process: ProcessState = state.process
        self.space = state.address_space
        self.files = state.files
        self.new_pid = new_pid
        self.options = options
        self.progress = progress
        self.warnings: list[str] = []
        self._has_own_keyring = False
        self.phases: dict[str, int] = {}
        self.ours: Credentials = checks.our_credentials()
        theirs = state.process.threads[0].credentials if state.process.threads else None
        self.opener = Opener(theirs=theirs, ours=self.ours)
        descriptions = self.files.descriptions if self.files is not None else ()
        opened_for_writing = frozenset(
            one.object
            for one in descriptions
            if isinstance(one, SharedMemory) and one.flags & os.O_ACCMODE != os.O_RDONLY
        )
        self.objects = Objects(self.space, self.opener, opened_for_writing)
        self.boot_id = process.boot_id()
        self.held: dict[int, Runs] = {}  # of pools of huge pages
        self.switches: dict[int, Switches] = {}  # of each sleeping thread when it was let go
        self._phase_started_ns = time.monotonic_ns()

    # ---- conducting

    def run(self) -> Restored:
        done = False
        try:
            self._check()
            exe_fd = self._open_exe()
            try:
                started_ns = time.monotonic_ns()
                stub = self._spawn(exe_fd)
                try:
                    self._mark("spawn")
                    nr_pages, tids = self._build(stub, exe_fd)
                    self._release(stub, tids)
                    done = True
                except ProcessLookupError as error:
                    raise stub.gone() from error
                except OSError as error:
                    raise CheckpointError(
                        f"process {stub.pid} could not be rebuilt: {error}",
                        hint="check free memory and limits; nothing was left behind",
                        pid=stub.pid,
                    ) from error
                finally:
                    if not done:
                        stub.destroy()
                    stub.close()
            finally:
                if exe_fd is not None:
                    os.close(exe_fd)
        finally:
            self.objects.close(failed=not done)
        return Restored(
            pid=stub.pid,
            tids=tids,
            warnings=self.warnings,
            sleeps=self._sleeps(tids),
            pages_restored=nr_pages,
            phases=self.phases,
            restore_time_us=(time.monotonic_ns() - started_ns) // 1000,
        )

    def _mark(self, phase: str) -> None:
        """The phase is over."""
        now = time.monotonic_ns()
        self.phases[phase] = self.phases.get(phase, 0) + (now - self._phase_started_ns) // 1000
        self._phase_started_ns = now
        hit(f"restore.{phase}")

    # ---- before anything exists

    def _check(self) -> None:
        state = self.process
        self.progress("checking", 0, 0)
        if not state.threads or state.threads[0].tid != state.pid:
            raise CheckpointError("the image has no main thread", hint="`checkpoint verify` the image")
        checks.check_machine(ImageState(state, self.space, self.files))
        checks.check_rights(state, self.ours, new_pid=self.new_pid)
        if not self.new_pid:
            checks.check_ids(state, wait_s=self.options.wait_for_ids_s)
        conflicts: list[str] = []
        for what, path in (("working directory", state.cwd), ("root directory", state.root)):
            try:
                there = self.opener.stat(path)
            except RestoreConflict as error:
                conflicts.append(error.message)
            else:
                if there is None or not stat.S_ISDIR(there.st_mode):
                    conflicts.append(f"its {what} {path} is gone")
        allow_changes = self.options.files.changed == "allow"
        conflicts += self.objects.check(plan.needs(self.space), allow_changes=allow_changes)
        self.held = pools.held_privately(self.space, self.image.pages)
        wanted = pools.wanted(self.space, self.held, self.image.pages, self.objects.exists)
        conflicts += pools.shortages(wanted, read_pools())
        if not allow_changes:
            conflicts += checks.file_conflicts(self.space, self.objects.fds)
        hint = _PUT_BACK if conflicts else _DO_AS_TOLD
        if self.files is not None:
            conflicts += check_files(
                self.files,
                self.options.files,
                pid=None if not self.new_pid else -1,
                same_boot=self.boot_id == state.host.boot_id,
                opener=self.opener,
                tids=[thread.tid for thread in state.threads],
            )
        if conflicts:
            raise RestoreConflict(
                conflicts[0] + (f" (and {len(conflicts) - 1} more)" if len(conflicts) > 1 else ""),
                hint=hint,
                conflicts=conflicts,
            )
        self.objects.make(plan.needs(self.space))
        self.warnings += [*state.warnings, *checks.cgroup_warnings(state.host)]
        self._mark("check")

    def _open_exe(self) -> int | None:
        state = self.process
        if state.exe_deleted:
            return None
        return open_file(self.opener, state.exe, writable=False)

    def _spawn(self, exe_fd: int | None) -> Stub:
        state = self.process
        sid, own_group = self._session()
        fds = sorted({*self.objects.fds.values(), *([] if exe_fd is None else [exe_fd])})
        birth = Birth(
            pid=0 if self.new_pid else state.pid,
            sid=sid,
            own_group=own_group,
            stack_limit=plan.stack_limit(self.space, state.layout.start_stack),
            personality=state.personality & ADDR_COMPAT_LAYOUT,
            fds=fds,
            time_offsets_ns=checks.wanted_time_offsets(state.host, self.boot_id),
        )
        wait_s = self.options.wait_for_ids_s
        try:
            stub = spawn(birth, wait_s=wait_s)
            wanted = birth.time_offsets_ns
            if wanted is not None and not has_time_offsets(stub.pid, wanted):
                stub.destroy()
                stub.close()
                self.warnings += checks.clock_warnings(state, self.boot_id)
                stub = spawn(replace(birth, time_offsets_ns=None), wait_s=wait_s)
        except OSError as error:
            raise CheckpointError(
                f"no process could be made: {error}", hint="check limits on processes (ulimit -u, pids.max)"
            ) from error
        return stub

    def _session(self) -> tuple[int, bool]:
        """(session to make again or 0 for an own one, in a group of its own there)."""
        state = self.process
        if self.new_pid or state.sid == state.pid:
            return 0, False
        if state.sid == 0:
            self.warnings.append(
                "its session was led from outside of its pid namespace: it leads its own now"
            )
            return 0, False
        if state.pgid not in (state.pid, state.sid):
            self.warnings.append(
                f"its process group {state.pgid} was another process's: it leads its own session"
            )
            return 0, False
        if os.path.exists(f"/proc/{state.sid}") or members_of(state.sid):
            self.warnings.append(
                f"its session {state.sid} is another process's: it leads its own session now"
            )
            return 0, False
        return state.sid, state.pgid == state.pid

    # ---- building

    def _build(self, stub: Stub, exe_fd: int | None) -> tuple[int, dict[int, int]]:
        state = self.process
        size = WORK_BYTES + len(state.threads) * _WORK_PER_THREAD
        nr_pending = len(state.signals.pending) + sum(len(thread.pending) for thread in state.threads)
        size += nr_pending * 2 * sig.SIGINFO_BYTES
        size = -(-size // PAGE_SIZE) * PAGE_SIZE
        hole = plan.find_hole(self.space, size + plan.scratch_bytes(self.space), mmap_min_addr())
        stub.open_work_area(hole, size)
        local = ptrace.get_regset(stub.pid, ptrace.NT_X86_XSTATE)
        self._check_features(local)
        stub.run([Step(Call(Nr.ALARM, (0,)), "alarm"), *plan.wipe_steps(stub.work)])
        stub.run(plan.mapping_steps(self.space, self.objects.fds, self.objects.shmids, hole + size))
        stub.run(thread_steps.tile_permission_steps(state))
        set_program(stub, state.layout, exe_fd, self.warnings)
        self._map_vdso(stub)
        self.warnings += policies.give_to_mappings(stub, self.space)
        self._mark("map")
        self._make_huge(stub)
        self._take_from_pools(stub)
        nr_pages = fill(
            stub, self.image, self.space, self.objects, self.progress, dumped_on=state.host.kernel
        )
        self.objects.close_views()
        self._mark("memory")
        self.progress("rebuilding", 0, 0)
        stub.run(plan.finishing_steps(self.space, stub))
        stub.reset()
        set_surroundings(stub, state)
        self._has_own_keyring = self._wants_keyring() and leave_session_keyring(stub, self.warnings)
        self._judge_directories(stub.pid)
        self._mark("finish")
        tids: dict[int, int] = {}
        if self.files is not None and threads_led_to(self.files, [thread.tid for thread in state.threads]):
            tids = thread_steps.create_threads(stub, state, new_ids=self.new_pid)
        if self.files is not None:
            context = FilesContext(
                options=self.options.files,
                object_fds=self.objects.object_fds,
                content=self.options.file_content,
                same_boot=self.boot_id == state.host.boot_id,
                opener=self.opener,
                tids=tids,
            )
            self.warnings += restore_files(stub, self.files, context)
            stub.reset()
        self.objects.seal()
        self.warnings += self.objects.warnings
        self._mark("files")
        tids = tids or thread_steps.create_threads(stub, state, new_ids=self.new_pid)
        if self.new_pid:
            self.warnings += thread_steps.renumber(stub, state, tids)
        self.warnings += policies.give_to_threads(stub, {tids[one.tid]: one for one in state.threads})
        for thread in state.threads:
            thread_steps.warm_tiles(stub, thread, tids[thread.tid])
        # all that needs privileges comes before the threads become who they were
        stub.run(self._signal_steps(stub, tids))
        set_limits(stub.pid, state, self.warnings)
        self._lock_future(stub)
        stub.run_all(
            {
                tids[thread.tid]: thread_steps.own_steps(stub, thread, tids[thread.tid], self.ours)
                for thread in state.threads
            }
        )
        self.warnings += thread_steps.own_warnings(state.threads, self.ours)
        self._last_words(stub)
        stub.reset()
        for thread in state.threads:
            schedule(tids[thread.tid], thread.scheduling, self.warnings)
        set_autogroup(stub.pid, state.autogroup_nice, self.warnings)
        self._mark("threads")
        if self.options.before_release is not None:
            self.options.before_release(stub)
            self._mark("tracking")
        return nr_pages, tids

    def _wants_keyring(self) -> bool:
        """Was its session keyring another one than ours?"""
        wanted = self.process.session_keyring
        if wanted is None:
            return False
        same_boot = self.boot_id == self.process.host.boot_id
        return (wanted.serial if same_boot or not wanted.serial else -1) != keys.own_session_keyring()

    def _lock_future(self, stub: Stub) -> None:
        """Have locked what is mapped from now on, but for what is there (MCL_CURRENT): that has its own locks."""
        flags = self.process.lock_future
        if flags and (failed := stub.batch([Call(Nr.MLOCKALL, (flags,))])[0]) < 0:
            self.warnings.append(
                f"what it maps from now on is not locked in memory (mlockall: {os.strerror(-failed)})"
            )

    def _judge_directories(self, pid: int) -> None:
        """Did the paths lead where they say, even if somebody made links of them since the check?"""
        for what, wanted in (("cwd", self.process.cwd), ("root", self.process.root)):
            found = os.readlink(f"/proc/{pid}/{what}")
            if found != wanted:
                raise RestoreConflict(f"the directory {wanted} leads to {found} now", path=wanted)

    def _check_features(self, local_xstate: bytes) -> None:
        from checkpointd.target.process import cpu_of  # noqa: PLC0415 - avoids a cycle at import

        found = checks.feature_blockers(self.process, cpu_of(local_xstate, len(local_xstate)).xfeatures)
        if found:
            raise Unsupported(
                f"this machine cannot restore the image: {found[0]}",
                hint="restore on a machine with the same kind of CPU",
                blockers=found,
            )
        thread_steps.check_components(self.process)
        self.local_xstate_bytes = len(local_xstate)

    def _make_huge(self, stub: Stub) -> None:
        steps = plan.huge_steps(self.space)
        if not steps:
            return
        results = stub.run(steps)
        failed = [step for step, result in zip(steps, results, strict=True) if result < 0]
        wanted = [
            size for _, size, advice in (step.call.args for step in failed) if advice == plan.MADV_COLLAPSE
        ]
        short = sum(size for size in wanted if isinstance(size, int))
        if short:
            self.warnings.append(f"up to {short >> 20} MiB that lay in huge pages came back in small ones")

    def _take_from_pools(self, stub: Stub) -> None:
        try:
            stub.run(plan.pool_steps(self.space, self.held))
        except StepFailedError as error:
            raise RestoreConflict(
                f"{error.what}: it has become empty since it was looked at",
                hint=pools.POOL_HINT,
                pid=stub.pid,
            ) from error

    def _map_vdso(self, stub: Stub) -> None:
        steps = plan.vdso_steps(self.space)
        if not steps:
            return
        stub.run(steps)
        # where the wanted place is taken the kernel maps it elsewhere and still succeeds
        missing = plan.layout_fits(self.space, [(vma.start, vma.end) for vma in maps.read_maps(stub.pid)])
        if missing:
            raise Unsupported(
                f"the kernel did not map {missing[0]} where it was", hint="report this", blockers=missing
            )

    def _signal_steps(self, stub: Stub, tids: dict[int, int]) -> list[Step]:
        signals = self.process.signals
        steps = signal_steps.action_steps(stub, signals)
        steps += signal_steps.shared_pending_steps(stub, signals, stub.pid)
        steps += signal_steps.timer_steps(stub, signals, tids, exact_ids=self._has_exact_timer_ids(stub))
        return steps

    def _has_exact_timer_ids(self, stub: Stub) -> bool:
        if not self.process.signals.posix_timers:
            return False
        return stub.batch([Call(Nr.PRCTL, (prctl.PR_TIMER_CREATE_RESTORE_IDS, 0, 0, 0, 0))])[0] == 0

    def _last_words(self, stub: Stub) -> None:
        """Calls of the leader with its final credentials."""
        # a change of user makes a process undumpable; 2 cannot be asked for and is what it then has already
        dumpable = self.process.dumpable
        if dumpable in (0, 1):
            stub.run([Step(Call(Nr.PRCTL, (prctl.PR_SET_DUMPABLE, dumpable, 0, 0, 0)), "dumpable")])
        keyring = self.process.session_keyring
        if self._has_own_keyring and keyring and (keyring.has_user_keyring or not keyring.serial):
            stub.batch([link_user_keyring()])
        if self.files is not None:
            stub.batch(after_credentials(self.files))

    # ---- letting go

    def _release(self, stub: Stub, tids: dict[int, int]) -> None:
        state = self.process
        finals = {}
        for thread in state.threads:
            tid = tids[thread.tid]
            xstate = thread_steps.checked_xstate(thread, self.local_xstate_bytes)
            finals[tid] = (thread_steps.final_registers(stub, thread, tid), xstate, thread.sigmask)
        trap_at = stub.put(signal_steps.trap_action(state.signals))
        self._alone(
            stub, Nr.RT_SIGACTION, (sig.SIGTRAP, trap_at, 0, sig.SIGSET_BYTES), "the action of SIGTRAP"
        )
        start, end = stub.work
        self._alone(stub, Nr.MUNMAP, (start, end - start), "unmapping the work area")
        stub.settle(stub.pid)
        for tid, (regs, xstate, sigmask) in finals.items():
            thread_steps.give_registers(tid, regs, xstate, sigmask)
        if state.stopped:
            os.kill(stub.pid, signals_of_python.SIGSTOP)
        hit("restore.releasing")
        sleepers = {tids[thread.tid] for thread in state.threads if thread.sleep is not None}
        for tid in sorted(finals, key=lambda one: one == stub.pid):  # the leader last
            if tid in sleepers:
                self.switches[tid] = Switches(None, read_switches(stub.pid, tid))
            with contextlib.suppress(ProcessLookupError):
                ptrace.detach(tid)
        self._mark("release")

    @staticmethod
    def _alone(stub: Stub, nr: int, args: tuple[int, ...], what: str) -> None:
        result = stub.single(stub.pid, nr, args)
        if result < 0:
            raise StepFailedError(stub.pid, what, -result)

    def _sleeps(self, tids: dict[int, int]) -> SleepMemory:
        now_ns = time.monotonic_ns()
        found = SleepMemory()
        for thread in self.process.threads:
            sleep = thread.sleep
            if sleep is not None and not sleep.lost:
                deadline = None if sleep.remaining_ns is None else now_ns + sleep.remaining_ns
                rip = UserRegs.from_bytes(thread.regs).rip
                tid = tids[thread.tid]
                switches = self.switches.get(tid)
                found.sleeps[tid] = RememberedSleep(sleep.nr, sleep.args, rip, deadline, switches)
        return found
