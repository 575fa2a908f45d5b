# SPDX-License-Identifier: Apache-2.0
"""State in: every kind of description but pipes and sockets, made in our own descriptor table.

Raises RestoreConflict.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import stat
import tempfile
from collections.abc import Iterable
from dataclasses import replace

from checkpointd.errors import RestoreConflict
from checkpointd.linux import fcntl as fdcalls
from checkpointd.linux import inotify as inotify_calls
from checkpointd.restore.files_changes import judge
from checkpointd.restore.files_maker import Maker, write_all
from checkpointd.restore.reopen import open_own, own_path, reopen, set_status
from checkpointd.state.files import (
    Device,
    Directory,
    EventFd,
    Inotify,
    InotifyWatch,
    Memfd,
    RegularFile,
    SharedMemory,
    SignalFd,
    TimerFd,
)

_MFD_CLOEXEC, _MFD_ALLOW_SEALING = 1, 2
_REALTIME_CLOCKS = (0, 8)  # CLOCK_REALTIME, CLOCK_REALTIME_ALARM
_WD_LIMIT = 1 << 20
_IN_DONT_FOLLOW = 0x0200_0000


def regular(maker: Maker, index: int, one: RegularFile) -> int:
    """Open a file at its path and go to its offset; a deleted one is written anew without a name."""
    what = f"{maker.name(index)} ({one.file.path})"
    if one.deleted:
        fd = reopen(_base_of_deleted(maker, index, one), one.flags, what=what)
    else:
        fd = open_regular(maker, one, what=what)
        if not one.flags & fdcalls.O_PATH:
            verdict = judge(one, os.fstat(fd), allow_changes=maker.options.changed == "allow")
            if verdict.conflict:
                os.close(fd)
                raise RestoreConflict(f"{maker.name(index)}: {verdict.conflict}", path=one.file.path)
            if verdict.note:
                maker.warnings.append(f"{maker.name(index)}: {verdict.note}")
    if not one.flags & fdcalls.O_PATH and one.offset:
        os.lseek(fd, one.offset, os.SEEK_SET)
    return fd


def open_regular(maker: Maker, one: RegularFile, *, what: str) -> int:
    """Open a file that has a name."""
    path = maker.path(one.file.path)
    recorded = replace(one.file, uid=one.uid, gid=one.gid, mode=one.mode)
    opener = maker.opener
    if one.pseudo:
        # their inodes are made as they are looked at; those of the process itself become its own with it
        recorded = replace(recorded, inode=-1)
        if maker.is_own(one.file.path):
            opener = replace(opener, theirs=None)
    return opener.open(path, one.flags, kind=stat.S_IFREG, recorded=recorded, what=what)


def _base_of_deleted(maker: Maker, index: int, one: RegularFile) -> int:
    """A descriptor (read and write) of the nameless file that stands for a deleted one."""
    if one.same_as is not None:
        return _shared_base(maker, one.same_as)
    directory = os.path.dirname(maker.path(one.file.path))
    wanted = directory
    while not os.path.isdir(directory):
        directory = os.path.dirname(directory)
    if directory != wanted:
        maker.warnings.append(
            f"{maker.name(index)}: {wanted} is gone; the deleted file now lies in {directory}"
        )
    base = _nameless_file(directory)
    maker.content_base[index] = maker.keep(base)
    _fill(maker, index, base, one.content, one.file.size_bytes)
    os.utime(base, ns=(one.file.mtime_ns, one.file.mtime_ns))
    _defer_mode(maker, base, one.mode, one.uid, one.gid)
    return base


def _shared_base(maker: Maker, index: int) -> int:
    if index not in maker.content_base:
        raise RestoreConflict(f"the image refers to the content of description {index}, which has none")
    return maker.content_base[index]


def _nameless_file(directory: str) -> int:
    try:
        return os.open(directory, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT):
            raise RestoreConflict(
                f"no file can be made in {directory} to stand for a deleted one: {error.strerror}",
                path=directory,
            ) from error
    fd, name = tempfile.mkstemp(prefix=".checkpoint-", dir=directory)
    os.unlink(name)
    return fd


def _fill(maker: Maker, index: int, fd: int, content: bytes | None, size_bytes: int) -> None:
    pieces: Iterable[bytes] = (content,) if content is not None else maker.context.content(index)
    os.ftruncate(fd, size_bytes)
    covered = write_all(fd, pieces)
    os.ftruncate(fd, size_bytes)  # the last of an image's pages reaches beyond the end
    if size_bytes and covered < size_bytes:
        raise RestoreConflict(
            f"{maker.name(index)}: the image holds {covered} of {size_bytes} bytes of a file without a name"
        )


def _defer_mode(maker: Maker, fd: int, mode: int, uid: int, gid: int) -> None:
    def apply() -> None:
        there = os.fstat(fd)
        if (there.st_uid, there.st_gid) != (uid, gid):
            with contextlib.suppress(PermissionError):
                os.fchown(fd, uid, gid)
        if stat.S_IMODE(there.st_mode) != mode:
            os.fchmod(fd, mode)

    maker.deferred.append(apply)


def directory(maker: Maker, index: int, one: Directory) -> int:
    what = f"{maker.name(index)} ({one.path})"
    fd = open_directory(maker, one, what=what)
    if one.offset and not one.flags & fdcalls.O_PATH:
        os.lseek(fd, one.offset, os.SEEK_SET)
    return fd


def open_directory(maker: Maker, one: Directory, *, what: str) -> int:
    opener = maker.opener
    if maker.is_own(one.path):
        opener = replace(opener, theirs=None)
    return opener.open(maker.path(one.path), one.flags, kind=stat.S_IFDIR, recorded=one.file, what=what)


def same_terminal(maker_same_boot: bool, one: Device, there: os.stat_result | None) -> bool:
    """Is the terminal at that path still the one of the dump, not another session's under its old name?"""
    return (
        there is not None
        and stat.S_ISCHR(there.st_mode)
        and (os.major(there.st_rdev), os.minor(there.st_rdev)) == one.device
        and there.st_uid == one.uid
        and maker_same_boot
        # pseudo-terminals are made anew; a console keeps its node over chown(2) at login
        and (there.st_ctime_ns == one.ctime_ns or not 136 <= one.device[0] < 144)
    )


def stat_or_none(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None


def device(maker: Maker, index: int, one: Device) -> int:
    path = maker.path(one.path)
    what = f"{maker.name(index)} ({one.path})"
    there = stat_or_none(path)
    if one.terminal and not same_terminal(maker.context.same_boot, one, there):
        if maker.options.tty != "null":
            raise RestoreConflict(
                f"{maker.name(index)}: the terminal {one.path} is gone or belongs to another session",
                hint="Restore with --tty null to put /dev/null in its place.",
                path=one.path,
            )
        maker.warnings.append(f"{maker.name(index)}: /dev/null stands for the terminal {one.path}")
        return open_own(maker.path("/dev/null"), one.flags, what=what, block=False)
    return maker.opener.open(
        path,
        one.flags,
        kind=stat.S_IFCHR,
        recorded=None,
        what=what,
        block=not one.terminal,
        device=one.device,
    )


def eventfd(one: EventFd) -> int:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK | (os.EFD_SEMAPHORE if one.semaphore else 0))
    if one.count:
        os.eventfd_write(fd, one.count)
    set_status(fd, one.flags)
    return fd


def epoll(flags: int) -> int:
    """An empty instance: its watches come when the target has all its descriptors."""
    with contextlib.closing(select.epoll()) as instance:
        fd = fcntl.fcntl(instance.fileno(), fcntl.F_DUPFD_CLOEXEC, 0)
    set_status(fd, flags)
    return fd


def timerfd(maker: Maker, index: int, one: TimerFd) -> int:
    """A timer with the time left; an absolute one keeps its point in time where that still means the same."""
    fd = fdcalls.timerfd_create(one.clock, os.O_CLOEXEC)
    set_time(maker, index, one, fd)
    set_status(fd, one.flags)
    return fd


def set_time(maker: Maker, index: int, one: TimerFd, fd: int) -> None:
    absolute = one.settime_flags & fdcalls.TFD_TIMER_ABSTIME
    if one.value_ns and absolute and (maker.context.same_boot or one.clock in _REALTIME_CLOCKS):
        deadline = one.captured_ns + one.value_ns
        fdcalls.timerfd_settime(fd, one.settime_flags, deadline, one.interval_ns)
    else:
        fdcalls.timerfd_settime(fd, 0, one.value_ns, one.interval_ns)
    if one.ticks:
        try:
            fdcalls.timerfd_set_ticks(fd, one.ticks)
        except OSError as error:
            if error.errno != errno.ENOTTY:
                raise
            # without CONFIG_CHECKPOINT_RESTORE an expiry has to be made
            fdcalls.timerfd_settime(fd, 0, 1, one.interval_ns)
            maker.warnings.append(f"{maker.name(index)} (timerfd): {one.ticks} expirations count as one")


def signalfd(one: SignalFd) -> int:
    fd = fdcalls.signalfd(one.mask, os.O_CLOEXEC)
    set_status(fd, one.flags)
    return fd


def pidfd(pid: int, flags: int) -> int:
    fd = os.pidfd_open(pid)
    if flags & os.O_NONBLOCK:
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_NONBLOCK)
    return fd


def inotify(maker: Maker, index: int, one: Inotify) -> int:
    """An instance whose watches have their numbers again."""
    fd = inotify_calls.init(os.O_CLOEXEC | os.O_NONBLOCK)
    done = False
    try:
        for watch in one.watches:
            path = maker.path(watch.path)
            _next_wd(fd, watch.wd)
            try:
                wd = _add_watch(maker, fd, path, watch)
            except OSError as error:
                raise RestoreConflict(
                    f"{maker.name(index)} (inotify): {watch.path} cannot be watched: {error.strerror}",
                    path=watch.path,
                ) from error
            if wd != watch.wd:
                raise RestoreConflict(
                    f"{maker.name(index)} (inotify): watch {watch.wd} of {watch.path} came back as {wd}; "
                    "two watched paths are one file now",
                    path=watch.path,
                )
        set_status(fd, one.flags)
        if one.unread_bytes:
            maker.warnings.append(
                f"{maker.name(index)} (inotify): {one.unread_bytes} bytes of unread events are lost"
            )
        done = True
        return fd
    finally:
        if not done:
            os.close(fd)


def _add_watch(maker: Maker, fd: int, path: str, watch: InotifyWatch) -> int:
    seen = maker.opener.look(path)
    try:
        maker.opener.prove(seen, path, watch.file, what=path)
        return inotify_calls.add_watch(fd, own_path(seen), watch.mask & ~_IN_DONT_FOLLOW)
    finally:
        os.close(seen)


def _next_wd(fd: int, wd: int) -> None:
    """Make `wd` the number of the next watch."""
    if inotify_calls.set_next_wd(fd, wd):
        return
    # numbers ascend: use up those before with a watch of our own
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as scratch:
        for _ in range(_WD_LIMIT):
            got = inotify_calls.add_watch(fd, scratch, inotify_calls.IN_ONESHOT | 1)
            inotify_calls.remove_watch(fd, got)
            with contextlib.suppress(BlockingIOError):
                os.read(fd, 4096)  # the IN_IGNORED of our own watch
            if got >= wd - 1:
                return


def shared_memory(maker: Maker, index: int, one: SharedMemory) -> int:
    """A description of a shared object that the memory room has made, and seals when all is open."""
    base = maker.context.object_fds.get(one.object)
    if base is None:
        raise RestoreConflict(f"{maker.name(index)}: the image has no shared memory object {one.object}")
    fd = reopen(base, one.flags, what=maker.name(index))
    if one.offset:
        os.lseek(fd, one.offset, os.SEEK_SET)
    return fd


def memfd(maker: Maker, index: int, one: Memfd) -> int:
    if one.same_as is not None:
        base = _shared_base(maker, one.same_as)
    else:
        sealing = 0 if one.seals == fdcalls.F_SEAL_SEAL else _MFD_ALLOW_SEALING
        base = maker.keep(os.memfd_create(one.name, _MFD_CLOEXEC | sealing))
        maker.content_base[index] = base
        _fill(maker, index, base, one.content, one.size_bytes)
        maker.deferred.append(lambda: os.fchmod(base, one.mode))
        maker.deferred.append(lambda: _seal(maker, index, base, one.seals))
    fd = reopen(base, one.flags, what=maker.name(index))
    if one.offset:
        os.lseek(fd, one.offset, os.SEEK_SET)
    return fd


def _seal(maker: Maker, index: int, fd: int, seals: int) -> None:
    missing = seals & ~fcntl.fcntl(fd, fdcalls.F_GET_SEALS)
    if not missing:
        return
    try:
        fcntl.fcntl(fd, fdcalls.F_ADD_SEALS, missing)
    except OSError as error:
        raise RestoreConflict(
            f"{maker.name(index)}: the seals {missing:#x} of a memfd cannot be set again: {error.strerror}"
        ) from error
