# SPDX-License-Identifier: Apache-2.0
"""What all readers of open files share: the descriptors as /proc shows them, and a way to borrow one.

Nothing here changes the target.  A borrowed descriptor shares offset and flags with the target's: whoever
borrows it neither reads, seeks nor sets flags through it (peeking, polling and getsockopt are fine).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from checkpointd.linux.inet_diag import ListenerDiag, Md5Key
from checkpointd.linux.kcmp import compare_files
from checkpointd.linux.pidfd import pidfd_getfd, pidfd_open
from checkpointd.procfs import fdinfo
from checkpointd.state.files import ClosedSocket, FilesOptions
from checkpointd.target.shared_objects import ObjectKey

SMALL_CONTENT_BYTES = 1 << 20
"""Content up to here is kept with the image's state, more of it as pages."""

_TOLD_ONE_BY_ONE = 3
# a kernel without inet_diag or without sock_diag, a system call filter or a security module
_NO_DIAGNOSTICS = (errno.ENOENT, errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT, errno.EPERM, errno.EACCES)

FdKey = tuple[int, int, int]
"""A descriptor with device and inode of what it leads to: another one under its number has another key."""

ObjectIds = Mapping[ObjectKey, int]
"""((major, minor), inode) to the id of a shared object of the image."""


class CannotSaveError(Exception):
    """One sentence: which fd, what it is, what to do."""


class ConnectionOpenError(CannotSaveError):
    """A TCP connection that the user did not allow to be closed; a server may have thousands."""


@dataclass(frozen=True, slots=True)
class OpenFd:
    """One descriptor.  `raw` is fdinfo as read, which is equal for two descriptors of one description but for
    the close-on-exec bit."""

    fd: int
    link: str
    stat: os.stat_result
    info: fdinfo.FdInfo
    raw: bytes

    @property
    def device(self) -> tuple[int, int]:
        return (os.major(self.stat.st_dev), os.minor(self.stat.st_dev))

    @property
    def key(self) -> FdKey:
        return (self.fd, self.stat.st_dev, self.stat.st_ino)

    @property
    def flags(self) -> int:
        return self.info.flags & ~os.O_CLOEXEC

    @property
    def access(self) -> int:
        return self.info.flags & os.O_ACCMODE


@dataclass(frozen=True, slots=True)
class ExtraContent:
    """Content too large for the state: of description `description`.

    `read(offset, length)` works from a descriptor of our own; the bytes are those of the freeze only when they
    are read before the thaw.  `close` when done.
    """

    description: int
    size_bytes: int
    fd: int

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self.fd, length, offset)

    def close(self) -> None:
        os.close(self.fd)


@dataclass
class Session:
    """One look at the open files of one process.

    Attributes:
        final: the target is frozen and the content is wanted; else only blockers are looked for.
        connections: fd and sentence of each TCP connection that forbids the dump.
        inotify_paths: (kernel device, inode) to path, found before the freeze.
        closed_sockets: by inode, connections that will come back closed; so they stay whatever happens to them.
        ownerless: descriptors whose signals have neither owner nor number, found before the freeze.
        foreign_pairs: it was told that another process made a pair.
    """

    pid: int
    options: FilesOptions
    final: bool
    objects: ObjectIds = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    connections: list[tuple[int, str]] = field(default_factory=list)
    extra: list[ExtraContent] = field(default_factory=list)
    inotify_paths: dict[tuple[int, int], str] = field(default_factory=dict)
    mounts: dict[int, fdinfo.Mount] = field(default_factory=dict)
    closed_sockets: dict[int, ClosedSocket] = field(default_factory=dict)
    ownerless: set[FdKey] = field(default_factory=set)
    foreign_pairs: bool = False
    _pidfd: int = -1
    _foreign_network: bool | None = None
    _listeners: ListenerDiag | None = None
    _multicast: dict[int, list[tuple[int, bytes]]] = field(default_factory=dict)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        if self._listeners is not None:
            self._listeners.close()
            self._listeners = None

    def all_problems(self) -> list[str]:
        """Every reason, with many connections told as one."""
        fds = [fd for fd, _ in self.connections]
        if len(fds) <= _TOLD_ONE_BY_ONE:
            return self.problems + [sentence for _, sentence in self.connections]
        shown = ", ".join(map(str, fds[:_TOLD_ONE_BY_ONE]))
        return [
            *self.problems,
            f"fd {shown} and {len(fds) - _TOLD_ONE_BY_ONE} more are TCP connections; they cannot be kept: "
            "allow them to come back closed with --tcp close",
        ]

    @contextlib.contextmanager
    def borrow(self, fd: int) -> Iterator[int]:
        """A descriptor of ours for the target's description behind `fd`."""
        if self._pidfd < 0:
            self._pidfd = pidfd_open(self.pid)
        ours = pidfd_getfd(self._pidfd, fd)
        try:
            yield ours
        finally:
            os.close(ours)

    def reopen(self, fd: int) -> int:
        """Our own read-only description of the file behind `fd`, with an offset of its own."""
        path = f"/proc/{self.pid}/fd/{fd}"
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOATIME)
        except PermissionError:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def stat(self, path: str) -> os.stat_result | None:
        """Of a path as /proc shows it, from our root whatever the target's is; None when it leads nowhere."""
        try:
            return os.stat(path)
        except OSError:
            return None

    def file_system(self, mount_id: int) -> str:
        """Type of the file system, "" for one mounted nowhere (memfd, pipes, anonymous inodes)."""
        if mount_id not in self.mounts:
            self.mounts.update(read_mounts(os.getpid()))  # the same mounts, from our root
        mount = self.mounts.get(mount_id)
        return mount.fs_type if mount else ""

    def foreign_network(self) -> bool:
        """Does the target live in another network namespace than we do?"""
        if self._foreign_network is None:
            theirs, ours = (os.stat(f"/proc/{who}/ns/net").st_ino for who in (self.pid, "self"))
            self._foreign_network = theirs != ours
        return self._foreign_network

    def md5_keys(self, family: int, host: str, port: int, inode: int) -> tuple[Md5Key, ...]:
        """TCP MD5 keys of a listener, as far as we may see them."""
        try:
            if self._listeners is None:
                self._listeners = ListenerDiag()
            return self._listeners.md5_keys(family, host, port, inode)
        except OSError as error:
            if error.errno not in _NO_DIAGNOSTICS:
                raise
            return ()

    def multicast_groups(self, family: int) -> list[tuple[int, bytes]]:
        """(interface, group) of everything joined by anybody in the target's network namespace."""
        if family not in self._multicast:
            name, parse = (
                ("igmp", fdinfo.parse_igmp) if family == socket.AF_INET else ("igmp6", fdinfo.parse_igmp6)
            )
            try:
                self._multicast[family] = parse(Path(f"/proc/{self.pid}/net/{name}").read_bytes())
            except FileNotFoundError:  # a kernel without multicast or IPv6
                self._multicast[family] = []
        return self._multicast[family]

    def cwd(self) -> str:
        return os.readlink(f"/proc/{self.pid}/cwd")


def read_mounts(pid: int) -> dict[int, fdinfo.Mount]:
    return fdinfo.parse_mounts(Path(f"/proc/{pid}/mountinfo").read_bytes())


def read_open_fds(pid: int) -> list[OpenFd]:
    """All descriptors, ascending; those closed while we look are left out."""
    found = []
    for fd in fdinfo.list_fds(pid):
        try:
            path = f"/proc/{pid}/fd/{fd}"
            link = os.readlink(path)
            raw = fdinfo.read(pid, fd)
            found.append(OpenFd(fd, link, os.stat(path), fdinfo.parse(raw), raw))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESRCH, errno.EBADF):
                raise
    return found


def group_by_description(
    pid: int, fds: list[OpenFd], compare: Callable[[int, int, int], int] = compare_files
) -> list[list[OpenFd]]:
    """Descriptors of one description together, ordered by their lowest.

    Only descriptors that look alike in everything /proc shows are compared; a socket has one description only.

    Raises:
        OSError: kcmp(2) does not work here and two descriptors look alike.
    """
    alike: dict[tuple[object, ...], list[OpenFd]] = {}
    for one in fds:
        looks = b"\n".join(line for line in one.raw.splitlines() if not line.startswith(b"flags:"))
        alike.setdefault((one.stat.st_dev, one.stat.st_ino, one.link, one.flags, looks), []).append(one)
    groups = []
    for members in alike.values():
        if len(members) == 1 or members[0].link.startswith("socket:["):
            groups.append(members)
            continue
        # kcmp orders descriptions, so equal ones become neighbours
        members.sort(key=functools.cmp_to_key(lambda one, other: compare(pid, one.fd, other.fd)))
        run = [members[0]]
        for one in members[1:]:
            if compare(pid, run[0].fd, one.fd) == 0:
                run.append(one)
            else:
                groups.append(run)
                run = [one]
        groups.append(run)
    for group in groups:
        group.sort(key=lambda one: one.fd)
    return sorted(groups, key=lambda group: group[0].fd)
