# SPDX-License-Identifier: Apache-2.0
"""What stands in the way of restoring a process's files, found before anything is made.

Nothing is changed: addresses are tried by binding a socket of ours for a moment.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterable
from pathlib import Path

from checkpointd.errors import RestoreConflict
from checkpointd.restore import holders
from checkpointd.restore.files_changes import judge
from checkpointd.restore.files_kinds import open_directory, open_regular, same_terminal, stat_or_none
from checkpointd.restore.files_maker import FilesContext, Maker
from checkpointd.restore.reopen import Opener
from checkpointd.restore.sockets import bind_inet, set_options
from checkpointd.restore.unix_sockets import accepted_end, socket_path_conflict
from checkpointd.state import files as state_of
from checkpointd.state.files import FilesOptions, FilesState, RegularFile

_LOCK_KINDS = {"flock": "FLOCK", "posix": "POSIX", "ofd": "OFDLCK"}


def check_files(
    state: FilesState,
    options: FilesOptions | None = None,
    *,
    pid: int | None = None,
    same_boot: bool = True,
    opener: Opener | None = None,
    tids: Iterable[int] = (),
) -> list[str]:
    """Every conflict, one sentence each with what to do.

    Args:
        pid: of the process as it will be; the one of the dump if None.
        opener: opens paths for the process; by default as if it had our own rights.
        tids: of its threads at the dump.
    """
    context = FilesContext(
        options or FilesOptions(),
        same_boot=same_boot,
        opener=opener or Opener(),
        tids={tid: tid for tid in tids},
    )
    maker = Maker(state, context, state.pid if pid is None else pid)
    conflicts: list[str] = []
    for index, one in enumerate(state.descriptions):
        try:
            found = _check(maker, index, one)
        except RestoreConflict as conflict:
            found = [_told(conflict)]
        conflicts += [f"{maker.name(index)}: {problem}" for problem in found]
    return conflicts


def _check(maker: Maker, index: int, one: state_of.AnyDescription) -> list[str]:
    match one:
        case RegularFile() if not one.deleted:
            return _check_regular(maker, one)
        case state_of.Directory() if maker.is_own(one.path):
            return []  # the process is not there yet
        case state_of.Directory():
            there = maker.opener.stat(maker.path(one.path))
            if there is None:
                return [f"the directory {one.path} is gone; make it again"]
            os.close(open_directory(maker, one, what=one.path))
            return []
        case state_of.Device():
            return _check_device(maker, one)
        case state_of.PipeEnd():
            return _check_pipe(maker, maker.state.pipes[one.pipe])
        case state_of.Inotify():
            return [
                f"the watched path {watch.path} is gone; make it again"
                for watch in one.watches
                if maker.opener.stat(maker.path(watch.path)) is None
            ]
        case state_of.InetSocket() if one.local:
            return _check_inet(one)
        case state_of.ClosedSocket() if one.family == socket.AF_UNIX:
            return _check_closed(maker, one)
        case state_of.UnixSocket():
            return _check_unix(maker, index, one)
        case _:
            return []


def _told(conflict: RestoreConflict) -> str:
    """In one sentence, with what to do before the restore is tried again."""
    return "; ".join(filter(None, (conflict.message, conflict.hint.removesuffix(", then restore again"))))


def _check_regular(maker: Maker, one: RegularFile) -> list[str]:
    path = maker.path(one.file.path)
    if one.pseudo and maker.is_own(one.file.path):
        return []  # the process is not there yet
    there = maker.opener.stat(path)
    verdict = judge(one, there, allow_changes=maker.options.changed == "allow")
    conflicts = [verdict.conflict] if verdict.conflict else []
    if there is not None and stat.S_ISREG(there.st_mode):
        try:
            os.close(open_regular(maker, one, what=one.file.path))
        except RestoreConflict as conflict:
            conflicts.append(_told(conflict))
    for lock in one.locks:
        device = (os.major(there.st_dev), os.minor(there.st_dev)) if there else (0, 0)
        table = Path("/proc/locks").read_bytes()
        pid = holders.lock_holder(table, device, there.st_ino if there else 0, _LOCK_KINDS[lock.type])
        if pid is not None and lock.write:
            who = holders.describe(pid) if pid > 0 else "another process"
            conflicts.append(f"the lock on {one.file.path} is held by {who}; stop it first")
    return conflicts


def _check_device(maker: Maker, one: state_of.Device) -> list[str]:
    there = stat_or_none(maker.path(one.path))
    if one.terminal:
        if maker.options.tty == "null" or same_terminal(maker.context.same_boot, one, there):
            return []
        return [
            f"the terminal {one.path} is gone or belongs to another session; "
            "restore with --tty null to put /dev/null in its place"
        ]
    if there is None or (os.major(there.st_rdev), os.minor(there.st_rdev)) != one.device:
        return [f"{one.path} is not the device {one.device[0]}:{one.device[1]} it was at the dump"]
    return []


def _check_pipe(maker: Maker, pipe: state_of.PipeState) -> list[str]:
    if pipe.path:
        there = maker.opener.stat(maker.path(pipe.path))
        if there is None or not stat.S_ISFIFO(there.st_mode):
            return [f"the FIFO {pipe.path} is gone; make it again with mkfifo"]
        return []
    if not pipe.external or maker.options.external == "null":
        return []
    if maker.options.external == "keep" and maker.holder(f"pipe:[{pipe.inode}]"):
        return []
    return [
        "its pipe led to another process, and no process has it open any more; "
        "restore with --external null to put /dev/null in its place"
    ]


def _check_closed(maker: Maker, one: state_of.ClosedSocket) -> list[str]:
    if maker.options.external == "null" or maker.options.tcp == "close":
        return []
    if maker.options.external == "keep" and maker.holder(f"socket:[{one.inode}]"):
        return []
    peer = f" ({one.peer})" if one.peer else ""
    return [
        f"its UNIX socket was connected to another process{peer}; "
        "restore with --external null to have it come back closed"
    ]


def _check_inet(one: state_of.InetSocket) -> list[str]:
    try:
        with socket.socket(one.family, one.type, one.protocol) as sock:
            set_options(sock, one.options)
            bind_inet("", sock, one)
    except RestoreConflict as conflict:
        return [_told(conflict).removeprefix(": ")]
    except OSError as error:
        return [f"no such socket can be made here: {error.strerror}"]
    return []


def _check_unix(maker: Maker, index: int, one: state_of.UnixSocket) -> list[str]:
    if one.hung_up or accepted_end(maker, index, one) == index:
        return []  # its name is not its own
    if one.abstract is not None:
        if who := holders.unix_name_holder(b"\0" + one.abstract):
            return [f"the UNIX name @{os.fsdecode(one.abstract)} is in use by {who}; stop it first"]
    elif one.file is not None and not one.file.deleted:
        problem = socket_path_conflict(maker, one.file)
        return [problem] if problem else []
    return []
