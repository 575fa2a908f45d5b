# SPDX-License-Identifier: Apache-2.0
"""State in: all open files of a process.

`check_files` (restore/files_check.py) says beforehand what stands in the way.  `restore_files` makes every
description in our own table, installs them in the target by pidfd_getfd(2) and dup3(2) in few batches, then adds
epoll watches and POSIX locks, which belong to the target's own table.

The target must hold no descriptor at a wanted number, its highest ones must be free, and it must still have the
credentials to take descriptors from us.  Events of the target's own file watches that restoring causes are kept
few by making inotify instances last.

Raises: RestoreConflict (nothing of ours stays behind; the target is to be thrown away), TargetGone.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
from collections.abc import Callable

from checkpointd.errors import RestoreConflict
from checkpointd.linux import fcntl as fdcalls
from checkpointd.linux._libc import syscall
from checkpointd.linux.pidfd import NR_PIDFD_GETFD, NR_PIDFD_OPEN
from checkpointd.restore import files_kinds as kinds
from checkpointd.restore import pipes, sockets, unix_sockets
from checkpointd.restore.files_check import check_files
from checkpointd.restore.files_maker import BATCH_CALLS, FilesContext, Maker, run_exactly
from checkpointd.restore.own_sockets import OwnSockets
from checkpointd.restore.watches import add_watches
from checkpointd.state import files as state_of
from checkpointd.state.files import Epoll, FileLock, FilesState, UnixSocket
from checkpointd.target.remote import Call, Remote, Result

__all__ = ["FilesContext", "after_credentials", "check_files", "restore_files"]

_F_DUPFD_CLOEXEC = 1030
_NR_PRCTL, _PR_SET_PTRACER = 157, 0x59616D61
_FLOCK = {False: fcntl.LOCK_SH, True: fcntl.LOCK_EX}


def restore_files(remote: Remote, state: FilesState, context: FilesContext) -> list[str]:
    """Give the target all its open files.

    Returns:
        Warnings: what came back differently, one sentence each.

    Raises:
        RestoreConflict: a file is gone, an address in use, ...
        TargetGone: the process is no more.
    """
    maker = Maker(state, context, remote.pid, own_sockets=OwnSockets(remote))
    _room_for(os.getpid(), len(state.descriptions) + len(state.pipes) * 2 + 64)
    try:
        try:
            _make_all(maker)
        except OSError as error:
            raise RestoreConflict(
                f"{maker.name(maker.current)} cannot be made again: {error.strerror or error}",
                hint="The image is sound; see what the system lacks.",
            ) from error
        _install(remote, maker)
        add_watches(remote, maker)
        for action in maker.after_watches:
            action()
        _lock_and_own(remote, maker)
    finally:
        maker.close()
    return maker.all_warnings()


def after_credentials(state: FilesState) -> list[Call]:
    """Calls for the target once it has its final credentials.

    A listening UNIX socket tells its clients (SO_PEERCRED) who called listen(2) last.
    """
    return [
        Call(fdcalls.NR_LISTEN, (_first_fd(state, index), one.backlog))
        for index, one in enumerate(state.descriptions)
        if isinstance(one, UnixSocket) and one.state == "listening"
    ]


def _first_fd(state: FilesState, index: int) -> int:
    return next(one.fd for one in state.descriptors if one.description == index)


def _room_for(pid: int, nr_fds: int) -> None:
    """Raise the soft limit of open files, as far as the hard one goes."""
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < nr_fds:
        wanted = nr_fds if hard == resource.RLIM_INFINITY else min(nr_fds, hard)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (wanted, hard))
        if wanted < nr_fds:
            raise RestoreConflict(
                f"{nr_fds} open files are needed, but the limit is {hard}",
                hint="Raise the limit of checkpointd.",
            )


def _make_all(maker: Maker) -> None:
    state = maker.state
    sources: dict[int, pipes.Source] = {}
    for index, one in enumerate(state.descriptions):
        if isinstance(one, state_of.PipeEnd) and one.pipe not in sources:
            maker.current = index
            sources[one.pipe] = pipes.prepare(maker, index, state.pipes[one.pipe])
    unix_sockets.connections(maker)
    for index, one in enumerate(state.descriptions):
        maker.current = index
        if isinstance(one, UnixSocket):
            unix_sockets.unix(maker, index, one)
        elif not isinstance(one, state_of.Inotify):
            maker.local[index] = _make(maker, index, one, sources)
    for index, one in enumerate(state.descriptions):
        maker.current = index
        if isinstance(one, UnixSocket):
            unix_sockets.connect_unix(maker, index, one)
        for lock in one.locks:
            _take_description_lock(maker, index, lock)
    for action in maker.deferred:
        action()
    maker.close_bases()
    for index, one in enumerate(state.descriptions):
        if isinstance(one, state_of.Inotify):
            maker.local[index] = kinds.inotify(maker, index, one)


def _make(maker: Maker, index: int, one: state_of.AnyDescription, sources: dict[int, pipes.Source]) -> int:
    match one:
        case state_of.RegularFile():
            return kinds.regular(maker, index, one)
        case state_of.Directory():
            return kinds.directory(maker, index, one)
        case state_of.Device():
            return kinds.device(maker, index, one)
        case state_of.PipeEnd():
            return pipes.end(maker, index, one, sources[one.pipe])
        case state_of.EventFd():
            return kinds.eventfd(one)
        case Epoll():
            return kinds.epoll(one.flags)
        case state_of.TimerFd():
            return kinds.timerfd(maker, index, one)
        case state_of.SignalFd():
            return kinds.signalfd(one)
        case state_of.PidFd():
            return kinds.pidfd(maker.pid, one.flags)
        case state_of.SharedMemory():
            return kinds.shared_memory(maker, index, one)
        case state_of.Memfd():
            return kinds.memfd(maker, index, one)
        case state_of.InetSocket():
            return sockets.inet(maker, index, one)
        case state_of.ClosedSocket():
            return sockets.closed(maker, index, one)
        case state_of.NetlinkSocket():
            return sockets.netlink(maker, index, one)
        case _:
            raise AssertionError(f"no maker for {one.kind}")


def _take_description_lock(maker: Maker, index: int, lock: FileLock) -> None:
    fd = maker.local[index]
    try:
        if lock.type == "flock":
            fcntl.flock(fd, _FLOCK[lock.write] | fcntl.LOCK_NB)
        elif lock.type == "ofd":
            fcntl.fcntl(fd, fdcalls.F_OFD_SETLK, fdcalls.pack_lock(lock.write, lock.start, lock.end))
    except BlockingIOError as error:
        raise _locked(maker, index) from error


def _locked(maker: Maker, index: int) -> RestoreConflict:
    path = os.readlink(f"/proc/self/fd/{maker.local[index]}")
    return RestoreConflict(
        f"{maker.name(index)}: the lock on {path} is held by another process now",
        hint="stop that process, then restore again",
        path=path,
    )


def _install(remote: Remote, maker: Maker) -> None:
    """Move our descriptors into the target, each to its numbers."""
    state = maker.state
    highest = max((one.fd for one in state.descriptors), default=-1)
    ours, temporary = highest + 1, highest + 2
    _room_for(remote.pid, temporary + 2)
    # where Yama restricts ptrace(2), the target may take descriptors from us only if we say so
    _suppress_oserror(lambda: syscall(_NR_PRCTL, _PR_SET_PTRACER, remote.pid, 0, 0, 0, name="prctl"))
    run_exactly(
        remote,
        [
            (Call(NR_PIDFD_OPEN, (os.getpid(), 0)), None),
            (Call(fdcalls.NR_FCNTL, (Result(0), _F_DUPFD_CLOEXEC, ours)), ours),
            (Call(fdcalls.NR_CLOSE, (Result(0),)), 0),
        ],
        "the descriptors",
    )
    batch: list[tuple[Call, int | None]] = []
    for index in range(len(state.descriptions)):
        start = len(batch)
        batch += [
            (Call(NR_PIDFD_GETFD, (ours, maker.local[index], 0)), None),
            (Call(fdcalls.NR_FCNTL, (Result(start), _F_DUPFD_CLOEXEC, temporary)), temporary),
            (Call(fdcalls.NR_CLOSE, (Result(start),)), 0),
        ]
        for one in maker.descriptors(index):
            flags = os.O_CLOEXEC if one.cloexec else 0
            batch.append((Call(fdcalls.NR_DUP3, (temporary, one.fd, flags)), one.fd))
        batch.append((Call(fdcalls.NR_CLOSE, (temporary,)), 0))
        if len(batch) >= BATCH_CALLS:
            run_exactly(remote, batch, "the descriptors")
            batch = []
    batch.append((Call(fdcalls.NR_CLOSE, (ours,)), 0))
    run_exactly(remote, batch, "the descriptors")


def _lock_and_own(remote: Remote, maker: Maker) -> None:
    """POSIX locks, O_ASYNC and owners: they hang on the target's own table and identity."""
    for index, one in enumerate(maker.state.descriptions):
        fd = maker.descriptors(index)[0].fd
        for lock in one.locks:
            if lock.type != "posix":
                continue
            address = remote.put(fdcalls.pack_lock(lock.write, lock.start, lock.end))
            try:
                remote.call(fdcalls.NR_FCNTL, fd, fcntl.F_SETLK, address)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    raise _locked(maker, index) from error
                raise
        if one.owner is not None:
            owner = one.owner
            number = maker.pid if owner.own_process else owner.id
            if owner.type == state_of.F_OWNER_TID:
                number = maker.ids.get(owner.id, owner.id)
            try:
                fdcalls.set_owner(maker.local[index], owner.type, number, owner.signal)
            except OSError:
                maker.warnings.append(f"{maker.name(index)}: the owner {owner.id} of its signals is gone")
        if one.flags & fdcalls.FASYNC:
            remote.call(fdcalls.NR_FCNTL, fd, fcntl.F_SETFL, one.flags)


def _suppress_oserror(action: Callable[[], object]) -> None:
    try:
        action()
    except OSError:
        pass
