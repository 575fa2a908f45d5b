# SPDX-License-Identifier: Apache-2.0
"""State out: the process as a whole, and the reasons why one cannot be saved.

The way: `prepare_process` (running target: all blockers that can be known, what never changes), then, frozen,
`capture_process`.

Raises: TargetGone, NotPermitted, Unsupported (all reasons at once).

Source: proc_pid_stat(5), proc_pid_status(5), prctl(2), membarrier(2), kernel sources as cited.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from checkpointd.errors import CheckpointError, NotPermitted, Unsupported
from checkpointd.linux import kcmp, prlimit, sched, timer
from checkpointd.linux.arch import cpu_flags
from checkpointd.memory import TASK_SIZE, Vma, VmaKind
from checkpointd.procfs import maps, process
from checkpointd.state.memory import FileIdentity
from checkpointd.state.process import Cpu, Host, Limit, MemoryLayout, ProcessState
from checkpointd.target.asked import ASKED_ROOM_BYTES, ask, landlock_warnings
from checkpointd.target.attachable import check_attachable, gone
from checkpointd.target.fork import strays
from checkpointd.target.freeze import Frozen
from checkpointd.target.policies import NO_POLICIES, Policies, prepare_policies
from checkpointd.target.questions import Questions
from checkpointd.target.remote import Remote
from checkpointd.target.semaphores import undo_warnings
from checkpointd.target.shared_objects import pool_device
from checkpointd.target.sharers import sharing_warnings
from checkpointd.target.signals import ask_signals, read_timers, signals_room_bytes
from checkpointd.target.threads import (
    THREAD_ROOM_BYTES,
    SleepMemory,
    ask_leader,
    capture_threads,
    prepare_sleeps,
)

__all__ = [
    "ProcessDraft",
    "SleepMemory",
    "capture_process",
    "prepare_process",
    "process_blockers",
    "vma_blockers",
]

_NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "time", "time_for_children", "user", "uts")
_MUST_BE_OURS = ("ipc", "mnt", "net", "pid", "user", "uts")
_XSTATE_MASK_AT = 464  # sw_reserved bytes of the legacy area: XCR0 (Linux arch/x86/kernel/fpu/regset.c)
_EI_CLASS, _ELFCLASS64 = 4, 2
_DELETED = " (deleted)"
_NAMED_ONE_BY_ONE = 3
_ALL_ONES = "0xffffffffffffffff"


@dataclass
class ProcessDraft:
    """What was found before the freeze; pass it to `capture_process`.

    Attributes:
        blockers: reasons why the process cannot be saved, one sentence each.
        warnings: what will not come back.
        policies: memory policies of its mappings.
        task_flags: of stat, by thread.
        strays: what dead agents left among its children: see `fork.reap_strays`.
    """

    pid: int
    blockers: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    exe: FileIdentity = field(default_factory=lambda: FileIdentity("", (0, 0), 0, 0, 0))
    exe_deleted: bool = False
    cmdline: tuple[str, ...] = ()
    namespaces: dict[str, str] = field(default_factory=dict)
    boot_id: str = ""
    cgroups: tuple[str, ...] = ()
    sleep_calls: dict[int, int] = field(default_factory=dict)
    policies: Policies = NO_POLICIES
    task_flags: dict[int, int] = field(default_factory=dict)
    autogroup_nice: int | None = None
    strays: list[int] = field(default_factory=list)


def prepare_process(pid: int, vmas: Sequence[Vma] | None = None) -> ProcessDraft:
    """Look at a running process.

    Args:
        vmas: its mappings with their flags, when they were just read (smaps takes long).

    Raises:
        TargetGone, NotPermitted, Busy, UsageError, Unsupported: it cannot be attached to at all.
    """
    check_attachable(pid)
    draft = ProcessDraft(pid)
    try:
        vmas = vmas or maps.read_smaps(pid)
        _fill(draft, vmas)
        draft.warnings += sharing_warnings(pid, vmas)
    except OSError as error:
        raise _meaning(pid, error) from error
    return draft


def process_blockers(pid: int) -> list[str]:
    """All reasons, found without stopping it, why the process itself cannot be saved."""
    try:
        return prepare_process(pid).blockers
    except Unsupported as error:
        return list(error.details.get("blockers", [error.message]))


def _meaning(pid: int, error: OSError) -> CheckpointError:
    if error.errno in (errno.ENOENT, errno.ESRCH):
        return gone(pid)
    if error.errno in (errno.EACCES, errno.EPERM):
        return NotPermitted(
            f"process {pid} may not be examined ({error})",
            hint="run as the user of the process, or as root",
            pid=pid,
        )
    return CheckpointError(f"process {pid} could not be examined: {error}", pid=pid)


def _fill(draft: ProcessDraft, vmas: Sequence[Vma]) -> None:
    pid = draft.pid
    status = process.read_status(pid)
    draft.exe, draft.exe_deleted, is_64bit = _exe(pid)
    draft.cmdline = tuple(process.cmdline(pid))
    draft.namespaces = {kind: os.readlink(f"/proc/{pid}/ns/{kind}") for kind in _NAMESPACES if _has_ns(kind)}
    draft.boot_id, draft.cgroups = process.boot_id(), process.cgroups(pid)
    draft.sleep_calls = prepare_sleeps(pid)
    draft.policies = prepare_policies(pid, vmas)
    draft.task_flags = _task_flags(pid)
    if not is_64bit:
        draft.blockers.append("it is a 32-bit program; only x86-64 programs can be saved")
    if draft.exe_deleted:
        draft.warnings.append(
            f"its program file {draft.exe.path} was deleted: /proc/PID/exe will not be restored"
        )
    if draft.namespaces.get("ipc") == os.readlink("/proc/self/ns/ipc"):
        draft.warnings += undo_warnings(pid)
    draft.autogroup_nice = process.autogroup(pid)[1]
    for kind in _MUST_BE_OURS:
        if kind in draft.namespaces and draft.namespaces[kind] != os.readlink(f"/proc/self/ns/{kind}"):
            draft.blockers.append(
                f"it is in another {kind} namespace ({draft.namespaces[kind]}) than checkpointd; "
                "run checkpointd inside it"
            )
    draft.blockers += _thread_namespace_blockers(pid)
    if draft.namespaces.get("time") != draft.namespaces.get("time_for_children"):
        draft.blockers.append(
            "it has made a time namespace for its children (unshare), which is not restored"
        )
    draft.blockers += _seccomp_blockers(pid)
    draft.blockers += vma_blockers(vmas)
    draft.blockers += _feature_blockers(status)
    draft.blockers += _directory_blockers(pid)
    children = process.children(pid)
    draft.strays = strays(pid, children)
    children = [child for child in children if child not in draft.strays]
    if children:
        draft.warnings.append(
            f"it has {len(children)} child process(es) ({', '.join(map(str, children[:5]))}): they are not saved, "
            "and it will come back believing that they live: a server may accept connections and answer none until it "
            "is told to start others (nginx, under its old pid: kill -HUP); those that are dumped too will not be its "
            "children"
        )
    if any(sched.core_cookie(tid) for tid in draft.task_flags):
        draft.warnings.append(
            "it shares cores only with whom it chose (PR_SCHED_CORE), which is not restored"
        )


def _has_ns(kind: str) -> bool:
    return os.path.lexists(f"/proc/self/ns/{kind}")


def _exe(pid: int) -> tuple[FileIdentity, bool, bool]:
    """(identity, deleted, is it a 64-bit program) of /proc/PID/exe."""
    link = f"/proc/{pid}/exe"
    path = os.readlink(link)
    fd = os.open(link, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        head = os.pread(fd, 16, 0)
    finally:
        os.close(fd)
    deleted = found.st_nlink == 0 and path.endswith(_DELETED)
    identity = FileIdentity.of(path.removesuffix(_DELETED) if deleted else path, found)
    return identity, deleted, len(head) > _EI_CLASS and head[_EI_CLASS] == _ELFCLASS64


def _task_flags(pid: int) -> dict[int, int]:
    found = {}
    for tid in process.thread_ids(pid):
        with contextlib.suppress(OSError):  # it just ended
            found[tid] = process.read_stat(pid, tid).flags
    return found


_OF_THREADS = ("cgroup", "ipc", "mnt", "net", "pid_for_children", "uts")


def _thread_namespace_blockers(pid: int) -> list[str]:
    """Namespaces a thread has to itself (setns(2), unshare(2)), or has made for its children."""
    found: dict[str, set[str]] = {}
    for tid in process.thread_ids(pid):
        for kind in _OF_THREADS:
            with contextlib.suppress(OSError):  # it just ended, or made one in which there is no process yet
                here = os.readlink(f"/proc/{pid}/task/{tid}/ns/{kind}")
                found.setdefault(kind.removesuffix("_for_children"), set()).add(here)
    with contextlib.suppress(OSError):
        found.setdefault("pid", set()).add(os.readlink(f"/proc/{pid}/ns/pid"))
    return [
        f"its threads are in different {kind} namespaces, or it made one for its children, which is not restored"
        for kind, links in found.items()
        if len(links) > 1
    ]


def _seccomp_blockers(pid: int) -> list[str]:
    modes = set()
    for tid in process.thread_ids(pid):
        with contextlib.suppress(OSError):  # it just ended
            modes.add(process.read_status(pid, tid).get("Seccomp", "0"))
    if "2" in modes:
        return ["it has seccomp filters, without which it may not come back"]
    if "1" in modes:
        return ["it runs under strict seccomp, without which it may not come back"]
    return []


def _feature_blockers(status: Mapping[str, str]) -> list[str]:
    found = []
    if "shstk" in status.get("x86_Thread_features", ""):
        found.append("it runs with shadow stacks (CET), which are not restored")
    if int(status.get("untag_mask", _ALL_ONES), 16) != int(_ALL_ONES, 16):
        found.append("it runs with tagged addresses (LAM), which are not restored")
    return found


def _directory_blockers(pid: int) -> list[str]:
    found = []
    for name, what in (("cwd", "working directory"), ("root", "root directory")):
        path = os.readlink(f"/proc/{pid}/{name}")
        if path.endswith(_DELETED) and not os.path.exists(path):
            found.append(f"its {what} {path.removesuffix(_DELETED)} was removed")
    return found


def _sharers_of_memory(pid: int, ppid: int) -> list[str]:
    """Relatives in the same address space: nobody stops them while it is read.

    Looked for in the freeze: a vfork child in flight holds its parent in a sleep that no freeze ends.
    """
    found = []
    for other in (*process.children(pid), ppid):
        with contextlib.suppress(OSError):  # it just ended, or may not be compared
            if other > 1 and kcmp.shares_memory(pid, other):
                found.append(
                    f"process {other} runs in the same memory (CLONE_VM), and would go on writing to it"
                )
    return found


def vma_blockers(vmas: Iterable[Vma]) -> list[str]:
    """Mappings that cannot be saved.  With flags (smaps) it sees more: device memory, shadow stacks."""
    vmas = list(vmas)
    found = _secret_blockers([vma for vma in vmas if vma.kind is VmaKind.SECRETMEM])
    for vma in vmas:
        if vma.path.startswith("/[aio]"):
            found.append(
                f"mapping {vma} is the ring of an AIO context (io_setup), whose requests live in the kernel"
            )
        elif "io_uring" in vma.path:
            found.append(f"mapping {vma} is the ring of an io_uring, whose requests live in the kernel")
        elif vma.kind is VmaKind.DEVICE:
            found.append(f"mapping {vma} is device memory")
        elif "ss" in vma.flags:
            found.append(f"mapping {vma} is a shadow stack")
        elif vma.kind is VmaKind.HUGETLB:
            found += _pool_blockers(vma)
        if vma.protection_key:
            found.append(
                f"mapping {vma} has protection key {vma.protection_key} (pkeys), which is not restored"
            )
        if vma.end > TASK_SIZE and vma.kind is not VmaKind.VSYSCALL:
            found.append(f"mapping {vma} lies above the 47-bit address space")
    return found


def _secret_blockers(vmas: Sequence[Vma]) -> list[str]:
    if not vmas:
        return []
    places = ", ".join(f"{vma.start:x}-{vma.end:x}" for vma in vmas[:_NAMED_ONE_BY_ONE])
    if len(vmas) > _NAMED_ONE_BY_ONE:
        places += f" and {len(vmas) - _NAMED_ONE_BY_ONE} more"
    which = f"mappings {places} are" if len(vmas) > 1 else f"mapping {places} is"
    return [
        f"{which} secret memory (memfd_secret), which nobody but the program can read; have it unmap that, or turn "
        "its use of secret memory off, before the dump"
    ]


def _pool_blockers(vma: Vma) -> list[str]:
    if os.makedev(*vma.dev) != pool_device(vma.pool_page_bytes):
        return [
            f"mapping {vma} is of a file on a mounted hugetlbfs, which is not saved; memory made with MAP_HUGETLB or "
            "memfd_create(2) is"
        ]
    return []


def capture_process(
    frozen: Frozen,
    remote: Remote,
    memory: SleepMemory | None = None,
    draft: ProcessDraft | None = None,
) -> ProcessState:
    """Everything but memory and files.

    Args:
        memory: what earlier freezes of this target knew of its sleeping threads; brought up to date.
        draft: what `prepare_process` found; without it the look is taken now, while the target is frozen.

    Raises:
        Unsupported: state that cannot be restored was found; the target is as it was.
        TargetGone: it died.
    """
    pid = frozen.pid
    try:
        if draft is None or draft.pid != pid:
            draft = ProcessDraft(pid)
            _fill(draft, maps.read_smaps(pid))
        stat, timers = process.read_stat(pid), read_timers(pid)
        room_bytes = ASKED_ROOM_BYTES + THREAD_ROOM_BYTES + signals_room_bytes(timers)
        questions = Questions(remote, room_bytes)
        of_process, of_leader = ask(questions), ask_leader(questions, pid)
        of_signals = ask_signals(questions, pid, timers)
        questions.ask()
        asked, told, signals = of_process(), of_leader(), of_signals()
        blockers = [*draft.blockers, *asked.blockers, *_sharers_of_memory(pid, stat.ppid)]
        if blockers:
            raise Unsupported(
                f"process {pid} cannot be saved: {blockers[0]}"
                + (f" (and {len(blockers) - 1} more reasons)" if len(blockers) > 1 else ""),
                hint="`checkpoint check` lists all reasons",
                pid=pid,
                blockers=blockers,
            )
        threads, warnings = capture_threads(
            frozen,
            remote,
            told=told,
            memory=memory,
            sleep_calls=draft.sleep_calls,
            with_policies=draft.policies.matter,
            task_flags={**draft.task_flags, pid: stat.flags},
        )
        if len(threads) > 1 and any(one.clock == timer.THREAD_CLOCK for one in signals.posix_timers):
            warnings.append("its timers on the CPU time of a thread will count the main thread's")
        warnings += landlock_warnings(threads[0].credentials, asked.look_at_us)
        return ProcessState(
            pid=pid,
            ppid=stat.ppid,
            pgid=stat.pgrp,
            sid=stat.session,
            start_time=stat.starttime,
            exe=draft.exe,
            exe_deleted=draft.exe_deleted,
            comm=stat.comm,
            cmdline=draft.cmdline,
            layout=_layout(pid, stat, asked.brk),
            cwd=os.readlink(f"/proc/{pid}/cwd"),
            root=os.readlink(f"/proc/{pid}/root"),
            umask=process.umask(pid),
            limits=parse_limits(process.slurp(f"/proc/{pid}/limits").decode("ascii")),
            dumpable=asked.dumpable,
            personality=int(process.slurp(f"/proc/{pid}/personality"), 16),
            oom_score_adj=int(process.slurp(f"/proc/{pid}/oom_score_adj")),
            coredump_filter=_coredump_filter(pid),
            child_subreaper=asked.child_subreaper,
            thp_disable=asked.thp_disable,
            memory_merge=asked.memory_merge,
            membarrier=asked.membarrier,
            autogroup_nice=draft.autogroup_nice,
            session_keyring=asked.session_keyring,
            lock_future=asked.lock_future,
            namespaces=draft.namespaces,
            cpu=cpu_of(threads[0].xstate, threads[0].xstate_size_bytes, asked.xcomp_permitted),
            host=host(pid, draft.boot_id or process.boot_id(), draft.cgroups),
            stopped=any(thread.group_stopped for thread in frozen.threads.values()),
            threads=threads,
            signals=signals,
            warnings=(*draft.warnings, *asked.warnings, *warnings),
        )
    except OSError as error:
        raise _meaning(pid, error) from error


def cpu_of(xstate: bytes, xstate_size_bytes: int, xcomp_permitted: int = 0) -> Cpu:
    """The CPU by an image of its extended registers."""
    mask = int.from_bytes(xstate[_XSTATE_MASK_AT : _XSTATE_MASK_AT + 8].ljust(8, b"\0"), "little")
    return Cpu(mask, xstate_size_bytes, cpu_flags(), xcomp_permitted)


def host(pid: int, boot_id: str, cgroups: tuple[str, ...] = ()) -> Host:
    """Here and now, by the clocks of the process."""
    name = os.uname()
    offsets, ours = process.time_offsets(pid), _own_time_offsets()
    return Host(
        hostname=socket.gethostname(),
        kernel=f"{name.release} {name.version}",
        boot_id=boot_id,
        realtime_ns=time.time_ns(),
        monotonic_ns=time.monotonic_ns() + offsets[0] - ours[0],
        boottime_ns=time.clock_gettime_ns(time.CLOCK_BOOTTIME) + offsets[1] - ours[1],
        time_offsets_ns=offsets,
        cgroups=cgroups,
    )


@functools.cache
def _own_time_offsets() -> tuple[int, int]:
    """Kept: a process of several threads, as ours is, cannot change its time namespace (setns(2))."""
    return process.time_offsets(os.getpid())


def parse_limits(text: str) -> tuple[Limit, ...]:
    """/proc/PID/limits, whose lines are in the order of RLIMIT_* (prlimit(2) would want CAP_SYS_RESOURCE)."""
    found = []
    for resource, line in enumerate(text.splitlines()[1 : 1 + prlimit.NR_LIMITS]):
        soft, hard = (
            prlimit.RLIM_INFINITY if word == "unlimited" else int(word) for word in line[26:].split()[:2]
        )
        found.append(Limit(resource, soft, hard))
    return tuple(found)


def _coredump_filter(pid: int) -> int | None:
    try:
        return int(process.slurp(f"/proc/{pid}/coredump_filter"), 16)
    except (OSError, ValueError):
        return None


def _layout(pid: int, stat: process.Stat, brk: int) -> MemoryLayout:
    def of(field_number: int) -> int:  # numbers as in proc_pid_stat(5)
        return int(stat.fields[field_number - 3])

    return MemoryLayout(
        start_code=of(26),
        end_code=of(27),
        start_data=of(45),
        end_data=of(46),
        start_brk=of(47),
        brk=brk,
        start_stack=of(28),
        arg_start=of(48),
        arg_end=of(49),
        env_start=of(50),
        env_end=of(51),
        auxv=process.slurp(f"/proc/{pid}/auxv"),
    )
