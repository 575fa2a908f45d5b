# SPDX-License-Identifier: Apache-2.0
"""What surrounds a process: what /proc shows of its program, directories, limits, scheduling.

What the user's rights do not allow is left out with a warning where the program can live without it.

Source: prctl(2) PR_SET_MM, prlimit(2), sched(7), proc(5).
"""

from __future__ import annotations

import os
from pathlib import Path

from checkpointd.linux import keys, prctl, prlimit, sched
from checkpointd.linux.arch import Nr
from checkpointd.procfs import process
from checkpointd.restore.plan import Step
from checkpointd.restore.stub import StepFailedError, Stub
from checkpointd.state.process import MemoryLayout, ProcessState
from checkpointd.state.threads import Scheduling
from checkpointd.target.remote import Call

_EPERM = 1
# what a kernel without clamps shows; and what one with them shows of threads that never asked
_NO_CLAMPS, _FREE_CLAMPS, _REAL_TIME_CLAMPS = (0, 0), (0, 1024), (1024, 1024)


def set_program(stub: Stub, layout: MemoryLayout, exe_fd: int | None, warnings: list[str]) -> None:
    """What /proc shows of the program, and where brk goes on; then no inherited descriptor is needed."""
    values = (
        layout.start_code, layout.end_code, layout.start_data, layout.end_data, layout.start_brk, layout.brk,
        layout.start_stack, layout.arg_start, layout.arg_end, layout.env_start, layout.env_end,
    )  # fmt: skip
    auxv_at = stub.put(layout.auxv)

    def step(fd: int | None) -> Step:
        at = stub.put(prctl.pack_mm_map(values, auxv_at, len(layout.auxv), fd))
        args = (prctl.PR_SET_MM, prctl.PR_SET_MM_MAP, at, prctl.MM_MAP_SIZE, 0)
        return Step(Call(Nr.PRCTL, args), "describing the program (PR_SET_MM_MAP)")

    try:
        stub.run([step(exe_fd)])
    except StepFailedError as error:
        if exe_fd is None or error.number != _EPERM:
            raise
        stub.run([step(None)])
        warnings.append("/proc/PID/exe does not show the program: that needs CAP_CHECKPOINT_RESTORE")
    stub.run([Step(Call(Nr.CLOSE_RANGE, (0, 0xFFFF_FFFF, 0)), "closing descriptors")])
    stub.reset()


def set_surroundings(stub: Stub, state: ProcessState) -> None:
    """Directory, root, umask, personality, and switches of the whole process."""
    steps = [Step(Call(Nr.CHDIR, (_path(stub, state.cwd),)), f"changing to directory {state.cwd}")]
    if state.root != "/":
        steps.append(Step(Call(Nr.CHROOT, (_path(stub, state.root),)), f"changing root to {state.root}"))
    steps += [
        Step(Call(Nr.UMASK, (state.umask,)), "umask"),
        Step(Call(Nr.PERSONALITY, (state.personality,)), "personality"),
    ]
    if state.child_subreaper:
        steps.append(Step(Call(Nr.PRCTL, (prctl.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)), "child subreaper"))
    if state.thp_disable:
        args = (prctl.PR_SET_THP_DISABLE, state.thp_disable & 1, state.thp_disable & ~1, 0, 0)
        steps.append(Step(Call(Nr.PRCTL, args), "THP switch", may_fail=True))
    if state.memory_merge:
        steps.append(
            Step(Call(Nr.PRCTL, (prctl.PR_SET_MEMORY_MERGE, 1, 0, 0, 0)), "KSM switch", may_fail=True)
        )
    steps += [
        Step(Call(Nr.MEMBARRIER, (1 << bit, 0, 0)), "membarrier registration")
        for bit in range(16)
        if state.membarrier >> bit & 1
    ]
    stub.run(steps)
    stub.reset()


def leave_session_keyring(stub: Stub, warnings: list[str]) -> bool:
    """Give it an empty one in place of ours, whose keys it must not have; its threads are born with it.

    Returns:
        Whether it has that.
    """
    (result,) = stub.batch([Call(Nr.KEYCTL, (keys.KEYCTL_JOIN_SESSION_KEYRING, 0))])
    if result < 0:
        warnings.append(f"it has the session keyring of who restored it ({os.strerror(-result)})")
    return result >= 0


def link_user_keyring() -> Call:
    """To be made by the user that the process is in the end."""
    return Call(Nr.KEYCTL, (keys.KEYCTL_LINK, keys.KEY_SPEC_USER_KEYRING, keys.KEY_SPEC_SESSION_KEYRING))


def _path(stub: Stub, path: str) -> int:
    return stub.put(os.fsencode(path) + b"\0")


def set_limits(pid: int, state: ProcessState, warnings: list[str]) -> None:
    """Limits and the like, set by us while it is still our user's (prlimit(2))."""
    for limit in state.limits:
        try:
            prlimit.set_limit(pid, limit.resource, limit.soft, limit.hard)
        except PermissionError:
            hard = min(limit.hard, prlimit.get_limit(pid, limit.resource)[1])
            prlimit.set_limit(pid, limit.resource, min(limit.soft, hard), hard)
            warnings.append(
                f"its hard limit of {prlimit.NAMES[limit.resource]} is {hard} now: raising it to {limit.hard} "
                "needs CAP_SYS_RESOURCE"
            )
    _write_proc(pid, "oom_score_adj", str(state.oom_score_adj), warnings)
    if state.coredump_filter is not None:
        _write_proc(pid, "coredump_filter", hex(state.coredump_filter), warnings)


def set_autogroup(pid: int, nice: int | None, warnings: list[str]) -> None:
    """Weigh its session against others as the old one was."""
    name, now = process.autogroup(pid)
    if nice is None or now is None or now == nice:
        return
    if name == process.autogroup(os.getpid())[0]:
        warnings.append(
            f"its session is another's, whose autogroup keeps its nice value of {now}, not {nice}"
        )
        return
    _write_proc(pid, "autogroup", str(nice), warnings)


def _write_proc(pid: int, name: str, value: str, warnings: list[str]) -> None:
    path = Path(f"/proc/{pid}/{name}")
    try:
        path.write_text(value, encoding="ascii")
    except OSError as error:
        warnings.append(f"its {name} could not be set to {value}: {error.strerror}")


def schedule(tid: int, wanted: Scheduling, warnings: list[str]) -> None:
    """Give a thread its CPUs, policy and priorities, from outside."""
    try:
        if wanted.cpus:
            here = set(wanted.cpus) & set(range(os.cpu_count() or 1))
            if here:
                os.sched_setaffinity(tid, here)
            else:
                warnings.append(f"thread {tid}: none of its CPUs {wanted.cpus} is here")
        elif os.sched_getaffinity(tid) != (everywhere := set(range(os.cpu_count() or 1))):
            os.sched_setaffinity(tid, everywhere)
        attr = sched.SchedAttr(
            wanted.policy, wanted.flags, wanted.nice, wanted.priority,
            wanted.runtime_ns, wanted.deadline_ns, wanted.period_ns, 0, 0,
        )  # fmt: skip
        if sched.get_attr(tid)[:7] != attr[:7]:
            sched.set_attr(tid, attr)
        if sched.get_ioprio(tid) != wanted.ioprio:
            sched.set_ioprio(tid, wanted.ioprio)
        now = sched.get_attr(tid)[7:]
        unsaid = (_FREE_CLAMPS, _REAL_TIME_CLAMPS) if now == _NO_CLAMPS else (now,)
        if wanted.clamps is not None and wanted.clamps not in (_NO_CLAMPS, *unsaid):
            sched.set_clamps(tid, *wanted.clamps)
    except OSError as error:
        warnings.append(f"thread {tid}: its scheduling could not be given back: {error}")
