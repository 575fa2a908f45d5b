# SPDX-License-Identifier: Apache-2.0
"""Making the empty process that a restore fills: the wanted pid, session and group, and a parent that is not us.

We make a helper (clone3 with CLONE_VM | CLONE_VFORK, so that nothing of a large process is copied), the helper makes
the stub (likewise, but by fork where it gets a time namespace), and exits: the stub's parent is then init, or the
nearest child subreaper, who reaps it one day.  Both run tables of system calls out of our memory while we stand still;
neither runs any Python.  The stub executes a tiny ELF program, which gives it an address space of its own, laid out so
that later mappings of the program go where they went before (`plan.stack_limit`).

Until we trace it an alarm of 30 s is what ends a stub whose maker died.

Raises: RestoreConflict (the pid is in use, by whom), NotPermitted, OSError.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from checkpointd.errors import NotPermitted, RestoreConflict
from checkpointd.linux import clone, prlimit
from checkpointd.linux import signal as sig
from checkpointd.linux._libc import address_of
from checkpointd.linux.arch import Nr
from checkpointd.procfs import process
from checkpointd.restore.blobs import SPAWN, STUB_ELF
from checkpointd.restore.stub import Stub

ADDR_NO_RANDOMIZE = 0x40000
ADDR_COMPAT_LAYOUT = 0x200000
_AT_EMPTY_PATH, _AT_FDCWD = 0x1000, -100
_CLONE_NEWTIME = 0x80
_NS_PER_S = 1_000_000_000
_CLOSE_RANGE_CLOEXEC = 4
_F_SETFD = 2
_SIGALRM, _SIGCHLD = 14, 17
_SIG_SETMASK = 2
_ALARM_S = 30
_WALL = 0x4000_0000
_PR_SET_PTRACER = 0x59616D61
_EEXIST, _EPERM = 17, 1
_PF_EXITING = 0x4
_RETRY_S = 0.002


@dataclass(frozen=True, slots=True)
class Birth:
    """How the stub is to be born.

    Attributes:
        pid: wanted id, 0 for any.
        sid: 0: a session of its own; else the id of a session whose leader is gone, to be made again.
        own_group: within such a session, a process group of its own.
        stack_limit: RLIMIT_STACK at its exec; None leaves ours.
        personality: flags besides ADDR_NO_RANDOMIZE.
        fds: descriptors of ours that it shall have under the same numbers.
        time_offsets_ns: for CLOCK_MONOTONIC and CLOCK_BOOTTIME, in a time namespace of its own; None: in ours.
            Best effort: needs CAP_SYS_ADMIN and CAP_SYS_TIME.
    """

    pid: int
    sid: int
    own_group: bool
    stack_limit: int | None
    personality: int
    fds: Sequence[int]
    time_offsets_ns: tuple[int, int] | None = None


class _Tables:
    """Everything the two children point at, in memory that a child with an address space of its own shares with us."""

    def __init__(self) -> None:
        self._kept: dict[int, mmap.mmap] = {}

    def put(self, data: bytes) -> int:
        kept = mmap.mmap(-1, len(data))
        kept[:] = data
        address = address_of(kept)
        self._kept[address] = kept
        return address

    def get(self, address: int) -> bytes:
        return self._kept[address][:]


def spawn(birth: Birth, *, wait_s: float = 5.0) -> Stub:
    """The stub, traced by us and stopped.

    Args:
        wait_s: how long to wait for a dead process that still has the pid to be reaped.

    Raises:
        RestoreConflict: a pid or session id is in use.
        NotPermitted: ids may not be chosen.
        OSError: EAGAIN and the like.
    """
    deadline = time.monotonic() + wait_s
    while True:
        try:
            return _spawn_once(birth)
        except FileExistsError as error:
            wanted = birth.pid
            if wanted and not is_dying(wanted) and Path(f"/proc/{wanted}").exists():
                raise pid_in_use(wanted) from error
            if time.monotonic() > deadline:
                raise pid_in_use(wanted or birth.sid) from error
            time.sleep(_RETRY_S)


def pid_in_use(pid: int) -> RestoreConflict:
    """Says who has it."""
    return RestoreConflict(
        f"pid {pid} is in use{holder_of(pid)}",
        hint="end what has it, or restore with --new-pid",
        pid=pid,
    )


def holder_of(pid: int) -> str:
    """Who has an id, as the end of a sentence."""
    try:
        tgid = int(process.read_status(pid)["Tgid"])
        if process.read_stat(tgid).state in "ZX":
            return f" by process {tgid} ({process.comm(tgid)}), dead but not yet reaped by its parent"
        words = _words_of(tgid)
        return f" by process {tgid} ({words})" if tgid == pid else f" by a thread of process {tgid} ({words})"
    except (OSError, KeyError, ValueError):
        members = members_of(pid)
        if not members:
            return " as a process group or session"
        first = members[0]
        more = f" and {len(members) - 1} more" if members[1:] else ""
        return f" as the session or process group of process {first} ({_words_of(first)}){more}"


def members_of(number: int) -> list[int]:
    """The processes whose session or process group it is; its leader may be long gone."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                stat = process.read_stat(int(name))
            except (OSError, ValueError):
                continue
            if number in (stat.session, stat.pgrp):
                found.append(int(name))
    return sorted(found)


def _words_of(pid: int) -> str:
    """The beginning of a command line, which may hold anything, line ends and escapes too."""
    try:
        line = " ".join(" ".join(process.cmdline(pid)).split())
        return "".join(filter(str.isprintable, line))[:60] or process.comm(pid)
    except (OSError, ValueError):
        return "gone now"


def is_dying(pid: int) -> bool:
    """Has it been killed (SIGKILL is pending), is it exiting, or is it a zombie?"""
    try:
        stat, status = process.read_stat(pid), process.read_status(pid)
    except (OSError, ValueError):
        return True  # gone between two looks
    pending = int(status.get("SigPnd", "0"), 16) | int(status.get("ShdPnd", "0"), 16)
    return stat.state in "ZX" or bool(stat.flags & _PF_EXITING) or bool(pending >> (signal.SIGKILL - 1) & 1)


def _spawn_once(birth: Birth) -> Stub:
    memfd = clone.executable_memfd("checkpointd-restore", STUB_ELF)
    try:
        tables = _Tables()
        # Linux kernel commit 2b5f9dad32ed ("fs/exec: switch timens when a task gets a new mm") (in v6.3) lets a child
        # that shares memory enter a time namespace, at its exec; before, such a clone3 fails with EINVAL
        sharing = clone.CLONE_VM if birth.time_offsets_ns is None else 0
        stub_args = clone.pack_clone_args(
            sharing | clone.CLONE_VFORK | clone.CLONE_CLEAR_SIGHAND,
            exit_signal=_SIGCHLD,
            set_tid_at=tables.put(struct.pack("=i", birth.pid)) if birth.pid else 0,
        )
        helper_args = clone.pack_clone_args(
            clone.CLONE_VM | clone.CLONE_VFORK | clone.CLONE_CLEAR_SIGHAND,
            set_tid_at=tables.put(struct.pack("=i", birth.sid)) if birth.sid else 0,
        )
        helper_calls = [clone.pack_entry(Nr.SETSID, ())] if birth.sid else []
        if birth.time_offsets_ns is not None:
            helper_calls += _time_calls(birth, tables)
        helper_calls.append(
            clone.pack_entry(Nr.CLONE3, (tables.put(stub_args), clone.CLONE_ARGS_BYTES), result=0)
        )
        helper_at = tables.put(b"".join(helper_calls))
        stub_calls = _stub_calls(birth, memfd, tables)
        stub_at = tables.put(b"".join(stub_calls))
        code = clone.NativeCode(SPAWN)
        helper = code(
            tables.put(helper_args),
            clone.CLONE_ARGS_BYTES,
            helper_at,
            len(helper_calls),
            stub_at,
            len(stub_calls),
        )
        if helper < 0:
            _raise(-helper, birth.sid)
        os.waitpid(helper, _WALL)
        pid = clone.entry_result(tables.get(helper_at), len(helper_calls) - 1)
        if pid < 0:
            _raise(-pid, birth.pid)
        _check_table(tables.get(stub_at))
    finally:
        os.close(memfd)
    try:
        return Stub.attach(pid)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 9)
        raise


def _check_table(table: bytes) -> None:
    """Raise for the entry at which the stub gave up."""
    for index in range(len(table) // clone.ENTRY_BYTES):
        nr, may_fail = struct.unpack_from("=II", table, index * clone.ENTRY_BYTES)
        result = clone.entry_result(table, index)
        if result < 0 and not may_fail:
            raise OSError(-result, f"{Nr(nr).name.lower()} of a new process: {os.strerror(-result)}")


def _time_calls(birth: Birth, tables: _Tables) -> list[bytes]:
    """Of the helper, whose descriptors are its own: a time namespace for its child.

    Number 0 is freed first, so that the file that is opened next has it.
    """
    if 0 in birth.fds:
        return []
    names = zip(("monotonic", "boottime"), birth.time_offsets_ns or (), strict=True)
    text = "".join(f"{name} {ns // _NS_PER_S} {ns % _NS_PER_S}\n" for name, ns in names).encode()
    return [
        clone.pack_entry(Nr.CLOSE, (0,), may_fail=True),
        clone.pack_entry(Nr.UNSHARE, (_CLONE_NEWTIME,), may_fail=True),
        clone.pack_entry(
            Nr.OPENAT, (_AT_FDCWD, tables.put(b"/proc/self/timens_offsets\0"), os.O_WRONLY, 0), may_fail=True
        ),
        clone.pack_entry(Nr.WRITE, (0, tables.put(text), len(text)), may_fail=True),
    ]


def has_time_offsets(pid: int, wanted: tuple[int, int]) -> bool:
    """Has the process these offsets, and will its children have the same?"""
    where = f"/proc/{pid}/ns/time"
    return process.time_offsets(pid) == wanted and os.readlink(where) == os.readlink(f"{where}_for_children")


def _stub_calls(birth: Birth, memfd: int, tables: _Tables) -> list[bytes]:
    """The stub's table; the exec is its last entry."""
    mask = sig.ALL_SIGNALS & ~sig.bit(_SIGALRM)
    calls = [
        clone.pack_entry(Nr.RT_SIGPROCMASK, (_SIG_SETMASK, tables.put(struct.pack("=Q", mask)), 0, 8)),
        clone.pack_entry(Nr.RT_SIGACTION, (_SIGALRM, tables.put(bytes(32)), 0, 8)),
        clone.pack_entry(Nr.ALARM, (_ALARM_S,)),
        clone.pack_entry(Nr.PRCTL, (_PR_SET_PTRACER, os.getpid()), may_fail=True),
    ]
    if not birth.sid:
        calls.append(clone.pack_entry(Nr.SETSID, ()))
    elif birth.own_group:
        calls.append(clone.pack_entry(Nr.SETPGID, (0, 0)))
    if birth.stack_limit is not None:
        hard = prlimit.get_limit(0, prlimit.RLIMIT_STACK)[1]
        limit = tables.put(struct.pack("=QQ", min(birth.stack_limit, hard), hard))
        calls.append(clone.pack_entry(Nr.PRLIMIT64, (0, prlimit.RLIMIT_STACK, limit, 0), may_fail=True))
    calls.append(clone.pack_entry(Nr.PERSONALITY, (birth.personality | ADDR_NO_RANDOMIZE,)))
    calls.append(clone.pack_entry(Nr.CLOSE_RANGE, (0, 0xFFFF_FFFF, _CLOSE_RANGE_CLOEXEC)))
    calls += [clone.pack_entry(Nr.FCNTL, (fd, _F_SETFD, 0)) for fd in birth.fds]
    name = tables.put(b"checkpointd-restore\0")
    empty = tables.put(b"\0")
    argv = tables.put(struct.pack("=QQ", name, 0))
    envp = tables.put(struct.pack("=Q", 0))
    calls.append(clone.pack_entry(Nr.EXECVEAT, (memfd, empty, argv, envp, _AT_EMPTY_PATH)))
    return calls


def _raise(number: int, wanted: int) -> None:
    if number == _EPERM and wanted:
        raise NotPermitted(
            f"process id {wanted} may not be chosen",
            hint="run as root or with CAP_CHECKPOINT_RESTORE, or restore with --new-pid",
        )
    raise OSError(number, f"clone3: {os.strerror(number)}")
