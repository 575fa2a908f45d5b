# SPDX-License-Identifier: Apache-2.0
"""May this process be attached to, and if not, why: asked before the freeze and after a refusal."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path

from checkpointd.errors import Busy, CheckpointError, NotPermitted, TargetGone, Unsupported, UsageError
from checkpointd.linux import capability
from checkpointd.procfs import process

_YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")
_FIRST_USER_NAMESPACE = "user:[4026531837]"  # PROC_USER_INIT_INO, include/linux/proc_ns.h
_DEAD = frozenset("ZXx")
_NR_LOOKS = 20
_SIGKILL_BIT = 1 << (9 - 1)


def gone(pid: int) -> TargetGone:
    return TargetGone(f"process {pid} is gone", hint="check the pid with ps", pid=pid)


def exited(pid: int) -> TargetGone | Unsupported:
    """What to say of a process whose main thread is dead: that it has exited, unless other threads live on."""
    if not any(lives(pid, tid) for tid in thread_ids(pid) if tid != pid):
        try:
            stat = process.read_stat(pid)
        except OSError:
            return gone(pid)
        return TargetGone(
            f"process {pid} ({stat.comm}) has exited and waits for its parent, process {stat.ppid}",
            hint="nothing of it can be saved any more; start it anew or restore an earlier image",
            pid=pid,
        )
    return Unsupported(
        f"the main thread of process {pid} has exited (zombie)",
        hint="a program whose main thread ended before its others is not supported",
        pid=pid,
        blockers=[f"the main thread of process {pid} has exited (zombie)"],
    )


def nr_threads(pid: int) -> int:
    """See `process.nr_threads`.

    Raises:
        TargetGone: no such process.
    """
    try:
        return process.nr_threads(pid)
    except (OSError, ValueError, IndexError) as error:
        raise gone(pid) from error


def not_listed(pid: int) -> Busy:
    return Busy(
        f"the threads of process {pid} end faster than they can be listed, so it cannot be stopped now",
        hint="try again",
        pid=pid,
    )


def thread_ids(pid: int) -> list[int]:
    """Those of a process that is gone: none."""
    try:
        return process.thread_ids(pid)
    except OSError:
        return []


def lives(pid: int, tid: int) -> bool:
    """Will the thread run on, as far as can be seen?  One that is exiting, or was killed, will not."""
    try:
        stat, status = process.read_stat(pid, tid), process.read_status(pid, tid)
    except (OSError, ValueError):
        return False
    pending = int(status.get("SigPnd", "0"), 16) | int(status.get("ShdPnd", "0"), 16)
    return not (stat.state in _DEAD or stat.flags & process.PF_EXITING or pending & _SIGKILL_BIT)


def comes_to_life(pid: int) -> bool:
    """Is the main thread alive, or soon again?  It is dead for a moment where another thread calls execve(2)."""
    for _ in range(_NR_LOOKS):
        if lives(pid, pid):
            return True
        time.sleep(0.001)
    return False


def check_attachable(pid: int) -> None:
    """Refuse what can be known to fail without touching it.

    Raises:
        UsageError: our own process, or a thread id.
        TargetGone: no such process.
        Unsupported: kernel thread, zombie.
        Busy: another tracer is attached.
    """
    if pid == os.getpid():
        raise UsageError(
            f"process {pid} is this program itself", hint="give the pid of another process", pid=pid
        )
    if pid <= 0:
        raise UsageError(f"{pid} is no process id", hint="process ids are positive numbers")
    try:
        stat = process.read_stat(pid)
        status = process.read_status(pid)
    except OSError as error:
        raise gone(pid) from error
    if int(status.get("Tgid", pid)) != pid:
        raise UsageError(
            f"{pid} is a thread of process {status['Tgid']}", hint=f"use pid {status['Tgid']}", pid=pid
        )
    if stat.flags & process.PF_KTHREAD:
        raise Unsupported(
            f"process {pid} ({stat.comm}) is a kernel thread",
            hint="kernel threads have no memory of their own to save",
            pid=pid,
            blockers=[f"process {pid} is a kernel thread"],
        )
    if stat.state in _DEAD and not comes_to_life(pid):
        raise exited(pid)
    _check_tracer(pid, status)


def _check_tracer(pid: int, status: dict[str, str]) -> None:
    tracer = int(status.get("TracerPid", "0"))
    if tracer:
        try:
            name = f"{tracer} ({process.comm(tracer)})"
        except OSError:
            name = str(tracer)
        raise Busy(
            f"process {pid} is already traced by process {name}",
            hint="end the debugger, strace or other checkpoint that is attached to it",
            pid=pid,
            tracer_pid=tracer,
        )


def is_dead_thread(pid: int, tid: int) -> bool:
    """Has the thread exited (or gone)?"""
    try:
        return process.read_stat(pid, tid).state in _DEAD
    except (OSError, ValueError):
        return True


def explain_refusal(pid: int, tid: int) -> CheckpointError | None:
    """Why PTRACE_SEIZE said EPERM; None when the thread is just exiting."""
    try:
        status = process.read_status(pid, tid)
    except OSError:
        return None
    if status.get("State", "?")[0] in _DEAD:
        return exited(pid) if tid == pid else None
    try:
        _check_tracer(pid, status)
    except Busy as busy:
        return busy
    return NotPermitted(
        f"not permitted to trace process {pid}", hint=permission_hint(status), pid=pid, tid=tid
    )


def permission_hint(status: Mapping[str, str]) -> str:
    """What forbids to trace a process of this status, as far as it can be seen, and what to do."""
    uid, ours = int(status.get("Uid", "0").split()[0]), os.geteuid()
    if ours not in (0, uid):
        return f"the process belongs to uid {uid}, you are {ours}: run as that user or with CAP_SYS_PTRACE"
    try:
        scope = int(_YAMA.read_text(encoding="ascii"))
    except (OSError, ValueError):
        scope = 0
    if scope == 3:
        return "kernel.yama.ptrace_scope is 3: nobody may trace until the next boot"
    if scope:
        return f"kernel.yama.ptrace_scope is {scope}: run with CAP_SYS_PTRACE, or set it to 0"
    if ours:
        return "the process is not dumpable (set-user-id, or PR_SET_DUMPABLE): run with CAP_SYS_PTRACE"
    if not capability.has(capability.effective(), capability.CAP_SYS_PTRACE):
        return (
            "CAP_SYS_PTRACE is withheld from this root, by a container or a bounding set: grant it (docker run "
            "--cap-add SYS_PTRACE)"
        )
    if os.readlink("/proc/self/ns/user") != _FIRST_USER_NAMESPACE:
        return (
            "it may be a process of the host, seen from a user namespace below: run checkpointd on the host"
        )
    return (
        "a security module of this kernel (Landlock, SELinux, AppArmor, a BPF program) forbids it: run checkpointd "
        "where it does not, or choose another process"
    )


def wait_until_interruptible(pid: int, tids: list[int], deadline: float) -> set[int]:
    """Wait until every thread was seen out of uninterruptible sleep (vfork, disk).

    A thread attached to while in such a sleep could not be let go before it ends, so it is not attached to at all.

    Args:
        deadline: time.monotonic() at which to give up.

    Returns:
        Those that are the kernel's own workers (see `is_kernel_worker`).

    Raises:
        Busy: a thread stays in it.
    """
    workers = set()
    for tid in tids:
        while True:
            try:
                stat = process.read_stat(pid, tid)
            except (OSError, ValueError):
                break
            if stat.state != "D":
                if process.is_kernel_worker(stat):
                    workers.add(tid)
                break
            if time.monotonic() >= deadline:
                raise not_stopped(pid, [tid])
            time.sleep(0.001)
    return workers


def is_kernel_worker(pid: int, tid: int) -> bool:
    """Is the task a worker of the kernel (io_uring, vhost) that only borrows the process's memory?  Gone: no."""
    try:
        return process.is_kernel_worker(process.read_stat(pid, tid))
    except (OSError, ValueError):
        return False


_CGROUP_MOUNTS = ("/sys/fs/cgroup", "/sys/fs/cgroup/unified")


def is_in_frozen_cgroup(pid: int) -> bool:
    """Does a frozen cgroup (version 2) hold the process?  It stops for us then, but runs nothing.

    Best effort: where the hierarchy cannot be seen the answer is no.

    Source: Documentation/admin-guide/cgroup-v2.rst (cgroup.events).
    """
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return False
    path = next((line[3:] for line in lines if line.startswith("0::")), "/")
    for mount in _CGROUP_MOUNTS if path != "/" else ():
        try:
            return "frozen 1" in Path(f"{mount}{path}/cgroup.events").read_text(encoding="ascii")
        except OSError:
            continue
    return False


def in_frozen_cgroup(pid: int) -> Busy:
    return Busy(
        f"process {pid} is in a frozen cgroup and runs nothing, not even for us",
        hint="thaw the cgroup first (docker unpause, or 0 into its cgroup.freeze)",
        pid=pid,
    )


def not_stopped(pid: int, tids: list[int], **details: list[int]) -> Busy:
    """The error for threads that did not stop in time.  One that only waits for a CPU is no uninterruptible sleep."""
    states = {}
    for tid in tids:
        with contextlib.suppress(OSError, ValueError):
            states[tid] = process.read_stat(pid, tid).state
    # the one to name: one that sleeps, if any does
    tid = next((tid for tid in tids if states.get(tid) != "R"), tids[0])
    if states.get(tid) == "R":
        what = "could not be stopped in time: it got no CPU, or is long busy in the kernel"
        hint = "try again, when less is running on this machine"
    else:
        what = "is in an uninterruptible sleep and cannot be stopped now"
        hint = "it waits for a vfork child or for a device; try again when that is over"
    return Busy(
        f"thread {tid} of process {pid} {what}",
        hint=hint,
        pid=pid,
        tids=tids,
        **details,
    )
