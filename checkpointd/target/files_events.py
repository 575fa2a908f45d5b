# SPDX-License-Identifier: Apache-2.0
"""State out: eventfd, epoll, timerfd, signalfd, inotify, pidfd.  Raises CannotSaveError."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from checkpointd.linux import fcntl as fdcalls
from checkpointd.linux import inotify as inotify_calls
from checkpointd.linux.kcmp import epoll_watches
from checkpointd.procfs import fdinfo
from checkpointd.state.files import (
    Epoll,
    EpollWatch,
    EventFd,
    Inotify,
    InotifyWatch,
    PidFd,
    SignalFd,
    TimerFd,
)
from checkpointd.state.memory import FileIdentity
from checkpointd.target.files_session import CannotSaveError, OpenFd, Session

_EPOLLET = 1 << 31
_SEARCH_LIMIT_ENTRIES = 300_000
_SEARCH_LIMIT_S = 3.0
_NSEC = 10**9


def eventfd(session: Session, one: OpenFd) -> EventFd:
    semaphore = one.info.fields.get("eventfd-semaphore")
    if semaphore is None:
        # fdinfo tells since Linux 6.5; see eventfd_show_fdinfo in fs/eventfd.c
        session.warnings.append(
            f"fd {one.fd}: this kernel does not tell whether the eventfd is a semaphore; taken as none"
        )
    count = int(one.info.fields["eventfd-count"], 16)
    return EventFd(flags=one.flags, count=min(count, 2**64 - 2), semaphore=semaphore == "1")


def signalfd(one: OpenFd) -> SignalFd:
    return SignalFd(flags=one.flags, mask=int(one.info.fields["sigmask"], 16))


def pidfd(session: Session, one: OpenFd) -> PidFd:
    watched = one.info.fields.get("Pid", "-1")
    if watched != str(session.pid):
        whose = "a process that exited" if watched in ("-1", "0") else f"process {watched}"
        raise CannotSaveError(
            f"fd {one.fd} is a pidfd of {whose}; only one of the program itself can be saved"
        )
    return PidFd(flags=one.flags)


def epoll(session: Session, one: OpenFd, by_fd: Mapping[int, OpenFd]) -> Epoll:
    """An epoll instance; each watched number must still be open on the watched file."""
    seen: dict[int, int] = {}
    for entry in one.info.epoll:
        nth = seen.get(entry.fd, 0)
        seen[entry.fd] = nth + 1
        if nth or not _still_watched(session, one.fd, entry, by_fd.get(entry.fd)):
            raise CannotSaveError(
                f"fd {one.fd} (epoll) still watches what was fd {entry.fd}: that number was closed or reused while "
                "the file lives on under another; remove it from the epoll set before closing it"
            )
    watches = (EpollWatch(entry.fd, entry.events, entry.data) for entry in one.info.epoll)
    return Epoll(flags=one.flags, watches=tuple(watches))


def _still_watched(session: Session, epoll_fd: int, entry: fdinfo.EpollEntry, there: OpenFd | None) -> bool:
    if there is None:
        return False
    if there.link.startswith("socket:["):
        return there.stat.st_ino == entry.inode  # a socket has but one description
    try:
        return epoll_watches(session.pid, there.fd, epoll_fd, entry.fd)
    except OSError as error:
        if error.errno == errno.ENOENT:  # the set changed under a running target
            return not session.final
        if error.errno in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
            return there.stat.st_ino == entry.inode
        raise


def edge_watched(fds: Sequence[OpenFd]) -> set[int]:
    """Descriptors that some epoll instance of the target watches edge-triggered."""
    return {entry.fd for one in fds for entry in one.info.epoll if entry.events & _EPOLLET}


def timerfd(session: Session, group: Sequence[OpenFd], edge: set[int]) -> TimerFd:
    """A timer with what is left and what was not read.

    A periodic timer that expired and was not read stands still and counts the missed expirations when somebody
    looks; looking (timerfd_gettime) loses nothing, but sets it going, so that an edge-triggered watcher would
    be woken once more.  There the missed ones are given up instead.
    """
    one = group[0]
    info = one.info
    if session.final and _stands_still(info) and not any(member.fd in edge for member in group):
        with session.borrow(one.fd) as fd:
            fdcalls.timerfd_gettime(fd)
        info = fdinfo.parse(fdinfo.read(session.pid, one.fd))
    clock = int(info.fields["clockid"])
    value_ns, interval_ns = (fdinfo.nanoseconds(info.fields[name]) for name in ("it_value", "it_interval"))
    if _stands_still(info):
        value_ns = interval_ns
        if session.final:
            session.warnings.append(
                f"fd {one.fd} (timerfd, watched edge-triggered): expirations since it was last read count as one"
            )
    return TimerFd(
        flags=one.flags,
        clock=clock,
        settime_flags=int(info.fields["settime flags"], 8),
        value_ns=value_ns,
        interval_ns=interval_ns,
        captured_ns=time.clock_gettime_ns(_READABLE.get(clock, clock)),
        ticks=int(info.fields["ticks"]),
    )


_READABLE = {8: time.CLOCK_REALTIME, 9: time.CLOCK_BOOTTIME}
"""Clocks that wake the machine tell the time of these; without a real-time clock they cannot be read themselves."""


def _stands_still(info: fdinfo.FdInfo) -> bool:
    fields = info.fields
    return (
        int(fields["ticks"]) > 0
        and fdinfo.nanoseconds(fields["it_value"]) == 0
        and fdinfo.nanoseconds(fields["it_interval"]) > 0
    )


def inotify(session: Session, one: OpenFd) -> Inotify:
    """Watches by path.  Each kernel keeps inodes only: paths are found by file handle, else by searching."""
    watches = []
    for entry in sorted(one.info.inotify, key=lambda entry: entry.wd):
        path = _watched_path(session, entry)
        if path is None:
            raise CannotSaveError(
                f"fd {one.fd} (inotify) watches inode {entry.inode} of device "
                f"{entry.device >> 20}:{entry.device & 0xFFFFF}, whose path cannot be found; remove that watch first"
            )
        there = session.stat(path)
        identity = FileIdentity.of(path, there) if there else None
        watches.append(InotifyWatch(entry.wd, path, entry.mask & inotify_calls.WATCH_BITS, identity))
    unread = 0
    if session.final:
        with session.borrow(one.fd) as fd:
            unread = fdcalls.unread_bytes(fd)
        if unread:
            session.warnings.append(
                f"fd {one.fd} (inotify): events waiting to be read ({unread} bytes) are lost"
            )
    return Inotify(flags=one.flags, watches=tuple(watches), unread_bytes=unread)


def _watched_path(session: Session, entry: fdinfo.InotifyEntry) -> str | None:
    key = (entry.device, entry.inode)
    known = session.inotify_paths.get(key)
    if known is not None and _leads_to(session, known, entry):
        return known
    path = _path_by_handle(session, entry)
    if path is None:
        path = _path_by_search(session, entry)
    if path is not None:
        session.inotify_paths[key] = path
    return path


def _leads_to(session: Session, path: str, entry: fdinfo.InotifyEntry) -> bool:
    there = session.stat(path)
    return there is not None and there.st_ino == entry.inode


def _path_by_handle(session: Session, entry: fdinfo.InotifyEntry) -> str | None:
    if not entry.handle:
        return None
    for mount in _mounts_of(session, entry.device):
        try:
            mount_fd = os.open(mount.mount_point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            found = fdcalls.open_by_handle_at(
                mount_fd, entry.handle_type, entry.handle, fdcalls.O_PATH | os.O_CLOEXEC
            )
        except OSError:
            continue
        finally:
            os.close(mount_fd)
        try:
            path = os.readlink(f"/proc/self/fd/{found}")
        finally:
            os.close(found)
        # a file whose name is not cached comes back without one ("/"): verify
        if _leads_to(session, path, entry):
            return path
    return None


def _mounts_of(session: Session, device: int) -> list[fdinfo.Mount]:
    session.file_system(-1)  # reads the mounts
    number = (device >> 20, device & 0xFFFFF)
    return [mount for mount in session.mounts.values() if mount.device == number]


def _path_by_search(session: Session, entry: fdinfo.InotifyEntry) -> str | None:
    """Look near what the program uses; before the freeze also through the whole file system, within limits."""
    near = [session.cwd()]
    near += [os.path.dirname(os.readlink(f"/proc/{session.pid}/exe"))]
    for fd in fdinfo.list_fds(session.pid):
        try:
            link = os.readlink(f"/proc/{session.pid}/fd/{fd}")
        except OSError:
            continue
        if link.startswith("/"):
            near += [link, os.path.dirname(link)]
    candidates = {str(parent) for path in near for parent in (Path(path), *Path(path).parents)}
    for path in sorted(candidates, key=len, reverse=True):
        if _leads_to(session, path, entry):
            return path
    if session.final:
        return None
    deadline = time.monotonic() + _SEARCH_LIMIT_S
    starts = [
        *sorted(set(near), key=len, reverse=True),
        *(mount.mount_point for mount in _mounts_of(session, entry.device)),
    ]
    budget = _SEARCH_LIMIT_ENTRIES
    for start in starts:
        for path, inode in _walk(session, start):
            budget -= 1
            if inode == entry.inode and _leads_to(session, path, entry):
                return path
            if budget <= 0 or time.monotonic() > deadline:
                return None
    return None


def _walk(session: Session, start: str) -> Iterator[tuple[str, int]]:
    """Paths below `start` on its own device, nearest first, with their inode numbers."""
    there = session.stat(start)
    if there is None:
        return
    queue = [start]
    for directory in queue:
        try:
            entries = list(os.scandir(directory))
        except OSError:
            continue
        for item in entries:
            path = os.path.join(directory, item.name)
            yield path, item.inode()
            try:
                if (
                    item.is_dir(follow_symlinks=False)
                    and item.stat(follow_symlinks=False).st_dev == there.st_dev
                ):
                    queue.append(path)
            except OSError:
                continue
