# SPDX-License-Identifier: Apache-2.0
"""State in: pipes and FIFOs, filled as they were, in our own descriptor table.  Raises RestoreConflict."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from dataclasses import dataclass

from checkpointd.errors import RestoreConflict
from checkpointd.linux import fcntl as fdcalls
from checkpointd.restore.files_maker import Maker
from checkpointd.restore.holders import describe
from checkpointd.restore.reopen import open_own, own_path, reopen, set_status
from checkpointd.state.files import PipeEnd, PipeState


@dataclass(frozen=True, slots=True)
class Source:
    """Where the ends of one pipe are opened from: a path, or our two descriptors of a new pipe.

    `null` stands in for the end that nobody reads.
    """

    path: str = ""
    read_fd: int = -1
    write_fd: int = -1
    null: bool = False


def prepare(maker: Maker, index: int, pipe: PipeState) -> Source:
    """The pipe itself, with what is in it.

    Args:
        index: a description of it, for messages.
    """
    if pipe.path:
        return _fifo(maker, index, pipe)
    if pipe.external and maker.options.external != "null":
        holder = maker.holder(f"pipe:[{pipe.inode}]") if maker.options.external == "keep" else None
        if holder is None:
            raise RestoreConflict(
                f"{maker.name(index)} is a pipe to another process, which no process has open any more",
                hint="Restore with --external null to put /dev/null in its place.",
            )
        maker.warnings.append(
            f"{maker.name(index)}: joined again to the pipe that {describe(holder.pid)} has open"
        )
        return Source(path=holder.path)
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    maker.keep(read_fd)
    maker.keep(write_fd)
    _resize(maker, index, write_fd, pipe)
    _fill(write_fd, pipe)
    if pipe.external:
        maker.warnings.append(f"{maker.name(index)}: the pipe to another process ends in nothing now")
    maker.deferred.append(lambda: _own(write_fd, pipe))
    return Source(read_fd=read_fd, write_fd=write_fd, null=pipe.external)


def end(maker: Maker, index: int, one: PipeEnd, source: Source) -> int:
    """One description of a prepared pipe."""
    what = f"{maker.name(index)} (pipe)"
    if source.path:
        return open_own(source.path, one.flags & ~os.O_NOFOLLOW, what=what, block=False)
    access = one.flags & os.O_ACCMODE
    if source.null and access == os.O_WRONLY:
        return open_own(maker.path("/dev/null"), one.flags & ~os.O_DIRECT, what=what)
    base = source.read_fd if access == os.O_RDONLY else source.write_fd
    return reopen(base, one.flags, what=what, block=False)


def _fifo(maker: Maker, index: int, pipe: PipeState) -> Source:
    path = maker.path(pipe.path)
    what = f"{maker.name(index)} ({pipe.path})"
    # open for both sides: waits for nobody, and both sides exist while the ends are opened
    opened = maker.opener.open(path, os.O_RDWR, kind=stat.S_IFIFO, recorded=pipe.file, what=what, block=False)
    base = maker.keep(opened)
    if not fdcalls.unread_bytes(base):  # else others use it
        _resize(maker, index, base, pipe)
        fcntl.fcntl(base, fcntl.F_SETFL, os.O_NONBLOCK)
        _fill(base, pipe)
    return Source(path=own_path(base))


def _resize(maker: Maker, index: int, fd: int, pipe: PipeState) -> None:
    if fcntl.fcntl(fd, fdcalls.F_GETPIPE_SZ) == pipe.size_bytes:
        return
    try:
        fcntl.fcntl(fd, fdcalls.F_SETPIPE_SZ, pipe.size_bytes)
    except OSError as error:
        if sum(map(len, pipe.content)) > fcntl.fcntl(fd, fdcalls.F_GETPIPE_SZ):
            raise RestoreConflict(
                f"{maker.name(index)}: a pipe of {pipe.size_bytes} bytes cannot be made: {error.strerror}",
                hint="Raise fs.pipe-max-size.",
            ) from error
        maker.warnings.append(
            f"{maker.name(index)}: the pipe has the default size, not {pipe.size_bytes} bytes"
        )


def _fill(fd: int, pipe: PipeState) -> None:
    for piece in pipe.content:
        if pipe.packets:
            fcntl.fcntl(fd, fcntl.F_SETFL, os.O_DIRECT | os.O_NONBLOCK)
        done = 0
        while done < len(piece):
            done += os.write(fd, piece[done:])
    set_status(fd, os.O_NONBLOCK)


def _own(fd: int, pipe: PipeState) -> None:
    there = os.fstat(fd)
    if (there.st_uid, there.st_gid) != (pipe.uid, pipe.gid):
        with contextlib.suppress(PermissionError):
            os.fchown(fd, pipe.uid, pipe.gid)
