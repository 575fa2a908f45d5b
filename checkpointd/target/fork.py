# SPDX-License-Identifier: Apache-2.0
"""The forked copy: the target's memory as it was, held by a child that never runs, while the target goes on.

The child is made by clone(2) inside the target with

* CLONE_PTRACE: it is born stopped and traced by us, and dies with us (PTRACE_O_EXITKILL, set on it alone);
* CLONE_FILES and CLONE_FS: it shares the table of descriptors, so it keeps no pipe, lock or socket open;
* no exit signal: the target gets no SIGCHLD, and its plain waits do not see the child.

What to know: its memory is charged to the target's cgroup as the target writes (oom_score_adj 1000 makes the OOM killer
take the copy first: the dump then fails, the target does not); MADV_DONTFORK and shared memory are not in it;
read it by /proc/PID/mem only (process_vm_readv un-shares every page).  `close` ends it; its remains are a zombie of
the target until `Frozen.reap_copy`, or `reap_strays` where its maker died: the next dump's, or the page worker's that
outlived its agent.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from checkpointd.errors import CheckpointError, Unsupported
from checkpointd.linux import ptrace
from checkpointd.procfs import process
from checkpointd.target.attachable import gone, lives
from checkpointd.target.remote import Call
from checkpointd.tracepoint import hit

if TYPE_CHECKING:
    from checkpointd.target.inject import Injection

_CLONE_FS, _CLONE_FILES, _CLONE_PTRACE = 0x200, 0x400, 0x2000
_NR_WAIT4 = 61
_WNOHANG, _WALL = 1, 0x4000_0000
_RELEASED_EXIT = 99  # see blobs/runner.S
_BORN_TIMEOUT_S = 5.0
_MARK = 1000  # oom_score_adj: the OOM killer takes it first, and we know it again


class ForkedCopy:
    """A stopped child with the target's memory; close it on the thread that made it, or by ending that thread.

    Attributes:
        pid: in our pid namespace.
        pid_inside: in the target's.
        parent: the target.
    """

    def __init__(self, pid: int, pid_inside: int, parent: int) -> None:
        self.pid, self.pid_inside, self.parent = pid, pid_inside, parent
        self._open = True

    def close(self) -> None:
        """Kill it and wait until its memory is free.  Any thread may do so."""
        if not self._open:
            return
        self._open = False
        hit("fork.close")
        try:
            os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        ptrace.reap(self.pid, block=True)
        hit("fork.closed")

    def check_alive(self) -> None:
        """Is there still memory to read?

        Raises:
            TargetGone: its target is gone too.
            CheckpointError: it was killed; the target runs on.
        """
        if lives(self.pid, self.pid):
            return
        if not lives(self.parent, self.parent):
            raise gone(self.parent)
        raise CheckpointError(
            f"the forked copy of process {self.parent} was killed before it was read; nothing was saved",
            hint="look for an out-of-memory kill in the kernel log; `--read-mode stopped` needs no copy",
            pid=self.parent,
        )

    def __enter__(self) -> ForkedCopy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def fork_copy(remote: Injection) -> ForkedCopy:
    """Fork the target inside an injection.

    Raises:
        Unsupported: it may not fork (limits, memory, seccomp); nothing has happened.
    """
    before = _children(remote.pid)
    hit("fork.begin")
    inside = remote.fork(_CLONE_PTRACE | _CLONE_FILES | _CLONE_FS)
    hit("fork.forked")
    if inside < 0:
        name = errno.errorcode.get(-inside, str(-inside))
        raise Unsupported(
            f"process {remote.pid} cannot be forked ({name})",
            hint="its limits on processes or memory are reached; dump it stopped instead",
            pid=remote.pid,
            blockers=[f"fork inside process {remote.pid} failed with {name}"],
        )
    child = _child_here(remote.pid, inside, before)
    copy = ForkedCopy(child, inside, remote.pid)
    try:
        _wait_born(child)
        hit("fork.born")
        ptrace.set_options(child, ptrace.O_TRACESYSGOOD | ptrace.O_EXITKILL)
        hit("fork.exitkill")
        Path(f"/proc/{child}/oom_score_adj").write_text(str(_MARK), encoding="ascii")
        hit("fork.done")
    except BaseException:
        copy.close()
        raise
    return copy


def reap_copy(remote: Injection, copy: ForkedCopy) -> bool:
    """wait4 for the dead copy inside the target; True when it was there."""
    result = remote.batch([Call(_NR_WAIT4, (copy.pid_inside, 0, _WALL | _WNOHANG, 0))])[0]
    return result == copy.pid_inside


def strays(pid: int, children: Iterable[int], *, surely: bool = True) -> list[int]:
    """Which of these children of a target are copies that dead agents left as its zombies.

    They are told from children of the program's own by what no other child combines: no exit signal, killed without
    ever having run (not one page fault), and our mark, an oom_score_adj of 1000 where the target has another one.

    Args:
        surely: else the mark is not asked for, and one ended by the runner's own exit code is a stray too: a copy whose
            maker was killed in the microseconds before it could be marked.  A program's own may be among these.
    """
    if surely and _oom_score_adj(pid) == _MARK:
        return []  # it may have given the mark to children of its own
    return [child for child in children if _is_stray(child, surely=surely)]


def reap_strays(remote: Injection, *, surely: bool = True) -> int:
    """Reap what dead agents left; how many."""
    found = strays(remote.pid, process.children(remote.pid), surely=surely)
    if not found:
        return 0
    inside = [int(process.read_status(child)["NSpid"].split()[-1]) for child in found]
    results = remote.batch([Call(_NR_WAIT4, (child, 0, _WALL | _WNOHANG, 0)) for child in inside])
    return sum(1 for result in results if result > 0)


def reap_after_death(pid: int, timeout_s: float) -> int:
    """Reap what an agent that has just died left with a target that nobody else holds; how many.

    Its copy is killed with it, but dies a moment later: the larger the longer.

    Raises:
        CheckpointError: the target cannot be stopped, or is gone.
        OSError: it is gone.
    """
    from checkpointd.target.freeze import freeze  # noqa: PLC0415 - it knows this module

    if _oom_score_adj(pid) == _MARK:
        return 0
    deadline = time.monotonic() + timeout_s
    while any(_looks_like_copy(child) for child in process.children(pid)) and time.monotonic() < deadline:
        time.sleep(0.01)
    if not strays(pid, process.children(pid)):
        return 0
    with freeze(pid) as frozen, frozen.inject() as remote:
        return reap_strays(remote)


def _oom_score_adj(pid: int) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text(encoding="ascii"))


def _looks_like_copy(child: int) -> bool:
    """Alive: without exit signal, marked, and it never ran."""
    try:
        fields = process.read_stat(child).fields
        return (
            fields[0] != "Z"
            and fields[35] == fields[7] == fields[9] == "0"
            and _oom_score_adj(child) == _MARK
        )
    except (OSError, ValueError):
        return False


def _is_stray(child: int, *, surely: bool) -> bool:
    try:
        fields = process.read_stat(child).fields
        is_marked = _oom_score_adj(child) == _MARK
    except (OSError, ValueError):
        return False
    # proc_pid_stat(5): state 3, minflt 10, majflt 12, exit_signal 38, exit_code 52
    state, minflt, majflt, exit_signal = fields[0], int(fields[7]), int(fields[9]), int(fields[35])
    if state != "Z" or exit_signal or majflt:
        return False
    exit_code = int(fields[49])
    if exit_code == signal.SIGKILL and minflt == 0:
        return is_marked or not surely
    return not surely and exit_code == _RELEASED_EXIT << 8 and minflt <= 4


def _children(pid: int) -> set[int]:
    """Children of the leader, in our namespace; empty where the kernel has no list."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    except OSError:
        return set()
    return {int(part) for part in text.split()}


def _child_here(parent: int, inside: int, before: set[int]) -> int:
    """The child's pid in our pid namespace, given that in the target's."""
    if len(process.read_status(parent)["NSpid"].split()) == 1:
        return inside
    for child in _children(parent) - before:
        if int(process.read_status(child)["NSpid"].split()[-1]) == inside:
            return child
    raise CheckpointError(
        f"the forked copy of process {parent} was not found",
        hint="its pid namespace cannot be translated on this kernel (CONFIG_PROC_CHILDREN)",
        pid=parent,
    )


def _wait_born(child: int) -> None:
    deadline = time.monotonic() + _BORN_TIMEOUT_S
    while True:
        status = ptrace.peek_wait(child, block=False)
        if status is not None:
            if status.exited:
                raise CheckpointError(f"the forked copy {child} was killed at once", pid=child)
            ptrace.take_stop(child)
            return
        if time.monotonic() > deadline:
            raise CheckpointError(f"the forked copy {child} did not stop", pid=child)
        time.sleep(0.00005)
