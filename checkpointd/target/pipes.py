# SPDX-License-Identifier: Apache-2.0
"""State out: pipes and FIFOs with what is in them.  Nothing is consumed.  Raises CannotSaveError."""

from __future__ import annotations

import fcntl
import os
import select
import stat
from collections.abc import Sequence

from checkpointd.linux import fcntl as fdcalls
from checkpointd.state.files import PipeState
from checkpointd.state.memory import FileIdentity
from checkpointd.target.files_regular import placed_path
from checkpointd.target.files_session import CannotSaveError, OpenFd, Session


def pipe(session: Session, ends: Sequence[OpenFd]) -> PipeState:
    """One pipe, of which the target has these descriptions open."""
    one = ends[0]
    named = not one.link.startswith("pipe:[")
    path = ""
    if named:
        path, deleted = placed_path(session, one, session.file_system(one.info.mount_id))
        if deleted:
            raise CannotSaveError(
                f"fd {one.fd} is the FIFO {path}, which was deleted; make it again or close it"
            )
    readers = [end for end in ends if end.access in (os.O_RDONLY, os.O_RDWR)]
    writers = [end for end in ends if end.access in (os.O_WRONLY, os.O_RDWR)]
    with session.borrow(one.fd) as fd:
        size_bytes = fcntl.fcntl(fd, fdcalls.F_GETPIPE_SZ)
        half = not (readers and writers)
        hung_up = half and _hung_up(fd)
    external = half and not hung_up
    if external and not named and session.options.external == "refuse":
        side = "writing" if not writers else "reading"
        raise CannotSaveError(
            f"fd {one.fd} is a pipe whose {side} end is held outside the process; "
            "say what it shall be at restore with --external keep or --external null"
        )
    content: tuple[bytes, ...] = ()
    packets = any(end.flags & os.O_DIRECT for end in ends)  # pipe2(O_DIRECT) marks both ends
    if readers and session.final:
        with session.borrow(readers[0].fd) as fd:
            content = _peek(fd, readers[0].fd, size_bytes, packets)
    return PipeState(
        inode=one.stat.st_ino,
        path=path,
        size_bytes=size_bytes,
        content=content,
        external=external,
        hung_up=hung_up,
        packets=packets,
        uid=one.stat.st_uid,
        gid=one.stat.st_gid,
        file=FileIdentity.of(path, one.stat) if path else None,
    )


def is_pipe(one: OpenFd) -> bool:
    return stat.S_ISFIFO(one.stat.st_mode)


def _hung_up(fd: int) -> bool:
    """Is nobody on the other side?  A reader sees POLLHUP without writers, a writer POLLERR without readers."""
    poll = select.poll()
    poll.register(fd, select.POLLIN | select.POLLOUT)
    return any(events & (select.POLLHUP | select.POLLERR) for _, events in poll.poll(0))


def _peek(source: int, target_fd: int, size_bytes: int, packets: bool) -> tuple[bytes, ...]:
    unread = fdcalls.unread_bytes(source)
    if not unread:
        return ()
    ours, copy = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        try:
            fcntl.fcntl(copy, fdcalls.F_SETPIPE_SZ, size_bytes)
        except PermissionError as error:
            raise CannotSaveError(
                f"fd {target_fd} is a pipe of {size_bytes} bytes, more than fs.pipe-max-size allows us; raise it"
            ) from error
        fdcalls.tee(source, copy, size_bytes)
        pieces = []
        while True:
            try:
                piece = os.read(ours, size_bytes)
            except BlockingIOError:
                break
            pieces.append(piece)
    finally:
        os.close(ours)
        os.close(copy)
    if sum(map(len, pieces)) != unread:
        raise CannotSaveError(
            f"fd {target_fd} is a pipe being read by another process at this moment; try again"
        )
    return tuple(pieces) if packets else (b"".join(pieces),)
