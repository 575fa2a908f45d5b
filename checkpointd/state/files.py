# SPDX-License-Identifier: Apache-2.0
"""Everything a process holds open: open file descriptions and the descriptors that point at them.

A *description* is what the kernel calls an open file description: two descriptors made by dup(2) share one, with
its offset and status flags.  Descriptors refer to descriptions by index, descriptions to each other (epoll
watches, socket pairs) likewise.  Sizes and offsets are bytes, times nanoseconds.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from checkpointd.state.memory import FileIdentity


@dataclass(frozen=True, slots=True)
class FilesOptions:
    """What the user allows, for dump and restore alike.

    Attributes:
        tcp: "refuse" a connected TCP socket at dump, or "close": it comes back as closed by its peer.
        external: what becomes of the end of a pipe (or a local socket) whose other side is outside the target.
            "refuse" it at dump; "keep": the same pipe, when some process still has it open at restore;
            "null": /dev/null, or a socket closed by its peer.
        tty: "keep" the same terminal, or "null".
        changed: "refuse" to restore when an open file changed since the dump in a way that matters, or "allow".
        root: where the paths of the image begin at restore.
    """

    tcp: Literal["refuse", "close"] = "refuse"
    external: Literal["refuse", "null", "keep"] = "keep"
    tty: Literal["null", "keep"] = "keep"
    changed: Literal["refuse", "allow"] = "refuse"
    root: str = "/"


@dataclass(frozen=True, slots=True)
class FileLock:
    """A lock held: `flock` and `ofd` belong to the description, `posix` to the process.

    `end` is the last byte locked, or -1 for the end of the file.
    """

    type: Literal["flock", "posix", "ofd"]
    write: bool
    start: int
    end: int


F_OWNER_TID = 0


@dataclass(frozen=True, slots=True)
class SignalOwner:
    """Who gets the signal of O_ASYNC or of a socket's urgent data (F_SETOWN_EX, F_SETSIG).

    `id` is 0 where only the signal was chosen so far.
    """

    type: int  # F_OWNER_TID, F_OWNER_PID 1, F_OWNER_PGRP 2
    id: int
    signal: int
    own_process: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What every open file description has.

    Attributes:
        flags: file status flags as F_GETFL gives them, access mode included, without O_CLOEXEC.
    """

    flags: int
    locks: tuple[FileLock, ...] = ()
    owner: SignalOwner | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RegularFile(Description):
    """A file of a file system.

    Attributes:
        deleted: its last name is gone (or it never had one); the content comes with the image.
        content: of a small deleted file.  None for a large one, which the image keeps as an object of pages.
        same_as: index of an earlier description of the same deleted file.
        pseudo: procfs, sysfs and their like, where size and time mean nothing.
    """

    kind: Literal["regular"] = "regular"
    file: FileIdentity
    offset: int
    deleted: bool = False
    content: bytes | None = None
    same_as: int | None = None
    mode: int = 0o600
    uid: int = 0
    gid: int = 0
    pseudo: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Directory(Description):
    """An open directory; `offset` is the file system's own cookie for getdents(2)."""

    kind: Literal["directory"] = "directory"
    path: str
    offset: int
    file: FileIdentity | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Device(Description):
    """A harmless character device (null, zero, full, random, urandom) or a terminal.

    Attributes:
        uid, ctime_ns: of a terminal, to notice that another session has it now.
    """

    kind: Literal["device"] = "device"
    path: str
    device: tuple[int, int]
    terminal: bool = False
    uid: int = 0
    ctime_ns: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PipeEnd(Description):
    """An end (or, by O_RDWR, both) of `FilesState.pipes[pipe]`."""

    kind: Literal["pipe"] = "pipe"
    pipe: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EventFd(Description):
    kind: Literal["eventfd"] = "eventfd"
    count: int
    semaphore: bool


EPOLL_PRIVATE_BITS = 1 << 31 | 1 << 30 | 1 << 29 | 1 << 28
"""EPOLLET, EPOLLONESHOT, EPOLLWAKEUP, EPOLLEXCLUSIVE: how to tell, not what."""


@dataclass(frozen=True, slots=True)
class EpollWatch:
    """One epoll_ctl(EPOLL_CTL_ADD): `fd` is the number it was added by."""

    fd: int
    events: int
    data: int

    @property
    def is_spent(self) -> bool:
        """Has it told what it was asked for (EPOLLONESHOT)?  It tells nothing more, not even errors.

        Source: Linux fs/eventpoll.c (ep_send_events, EP_PRIVATE_BITS).
        """
        return not self.events & ~EPOLL_PRIVATE_BITS


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoll(Description):
    kind: Literal["epoll"] = "epoll"
    watches: tuple[EpollWatch, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TimerFd(Description):
    """A timer.

    Attributes:
        settime_flags: TFD_TIMER_ABSTIME 1, TFD_TIMER_CANCEL_ON_SET 2.
        value_ns: time left at the freeze; 0 is disarmed (or expired and not read: see `ticks`).
        captured_ns: the timer's clock at the freeze.
        ticks: expirations not read yet.
    """

    kind: Literal["timerfd"] = "timerfd"
    clock: int
    settime_flags: int
    value_ns: int
    interval_ns: int
    captured_ns: int
    ticks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalFd(Description):
    """`mask` has bit n-1 set for signal n."""

    kind: Literal["signalfd"] = "signalfd"
    mask: int


@dataclass(frozen=True, slots=True)
class InotifyWatch:
    wd: int
    path: str
    mask: int
    file: FileIdentity | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Inotify(Description):
    """`unread_bytes` of events waited at the freeze; nobody can put them back."""

    kind: Literal["inotify"] = "inotify"
    watches: tuple[InotifyWatch, ...]
    unread_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedMemory(Description):
    """A descriptor of shared memory (memfd, tmpfs file) that the image keeps as `SharedObject` `object`."""

    kind: Literal["shared-memory"] = "shared-memory"
    object: int
    offset: int
    seals: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Memfd(Description):
    """A memfd that is not among the image's shared objects: its content lies here, as for `RegularFile`."""

    kind: Literal["memfd"] = "memfd"
    name: str
    offset: int
    size_bytes: int
    seals: int
    content: bytes | None = None
    same_as: int | None = None
    mode: int = 0o777


@dataclass(frozen=True, slots=True, kw_only=True)
class PidFd(Description):
    """A pidfd of the process itself."""

    kind: Literal["pidfd"] = "pidfd"


@dataclass(frozen=True, slots=True)
class SocketOption:
    level: int
    name: int
    value: bytes


@dataclass(frozen=True, slots=True)
class InetAddress:
    host: str
    port: int
    flow_info: int = 0
    scope_id: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Socket(Description):
    """What all sockets have: family, type and protocol as socket(2) takes them, and who made it."""

    family: int
    type: int
    protocol: int
    options: tuple[SocketOption, ...] = ()
    uid: int = 0
    gid: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class InetSocket(Socket):
    """TCP or UDP.

    Attributes:
        state: "listening", "idle" (not connected; bound when `local` is set) or "connected" (UDP only).
        pending: connections that waited to be accepted at the freeze; they are lost.
    """

    kind: Literal["inet"] = "inet"
    state: Literal["listening", "idle", "connected"]
    local: InetAddress | None
    peer: InetAddress | None = None
    backlog: int = 0
    pending: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedSocket(Socket):
    """A socket whose peer is outside the target: it comes back as closed by the peer.

    Attributes:
        inode: of the socket, by which a process that still holds it is found.
        peer: the other side, for people.
    """

    kind: Literal["closed-socket"] = "closed-socket"
    inode: int
    peer: str


@dataclass(frozen=True, slots=True)
class SocketFile:
    """The name of a UNIX socket in the file system.

    Attributes:
        path: as the program gave it, links and all, but absolute.
        directory: where that led to, free of links; "" in images of before it was kept.
        name: what it was bound to, where that was relative: the end of `path`.
    """

    path: str
    mode: int
    uid: int
    gid: int
    deleted: bool = False
    directory: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class PeerCredentials:
    """SO_PEERCRED: who made the pair, listened (for the end that connected) or connected (for the accepted end)."""

    pid: int
    uid: int
    gid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UnixSocket(Socket):
    """A UNIX socket that is listening, idle, or connected within the target (or, datagram, to a name).

    Attributes:
        abstract: its name without the leading zero byte, or None.
        file: its name in the file system, or None.
        peer: index of the description at the other end of a pair.
        peer_name: name a datagram socket is connected to (an abstract one begins with a zero byte).
        queue: what waits to be read: one piece for a stream, else one per packet.
        shutdown: bits RCV_SHUTDOWN 1, SEND_SHUTDOWN 2.
        hung_up: its peer is gone; end of file follows the queue.
        credentials: of its peer, as it shows them; None in images of before they were kept.
    """

    kind: Literal["unix"] = "unix"
    state: Literal["listening", "idle", "connected"]
    abstract: bytes | None = None
    file: SocketFile | None = None
    peer: int | None = None
    peer_name: bytes = b""
    backlog: int = 0
    pending: int = 0
    queue: tuple[bytes, ...] = ()
    shutdown: int = 0
    hung_up: bool = False
    credentials: PeerCredentials | None = None

    @property
    def name(self) -> bytes:
        """What it is bound to, b"" for nothing; an abstract name begins with a zero byte."""
        if self.abstract is not None:
            return b"\0" + self.abstract
        return os.fsencode(self.file.path) if self.file else b""


@dataclass(frozen=True, slots=True, kw_only=True)
class NetlinkSocket(Socket):
    """`port` is its netlink address, `groups` the multicast groups it joined."""

    kind: Literal["netlink"] = "netlink"
    port: int
    groups: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PipeState:
    """A pipe or FIFO.

    Attributes:
        inode: by which a process that still holds it is found, within one boot.
        path, file: of a FIFO, else "" and None.
        size_bytes: its capacity (F_GETPIPE_SZ).
        content: what waits to be read, one item per packet where the pipe is in packet mode.
        packets: it is (O_DIRECT).
        external: the side the target does not hold is held by somebody else.
        hung_up: the side the target does not hold is closed.
    """

    inode: int
    path: str
    size_bytes: int
    content: tuple[bytes, ...]
    external: bool
    hung_up: bool
    packets: bool = False
    uid: int = 0
    gid: int = 0
    file: FileIdentity | None = None


AnyDescription = (
    RegularFile
    | Directory
    | Device
    | PipeEnd
    | EventFd
    | Epoll
    | TimerFd
    | SignalFd
    | Inotify
    | SharedMemory
    | Memfd
    | PidFd
    | InetSocket
    | ClosedSocket
    | UnixSocket
    | NetlinkSocket
)


@dataclass(frozen=True, slots=True)
class Descriptor:
    """`fd` points at `FilesState.descriptions[description]`."""

    fd: int
    description: int
    cloexec: bool


@dataclass(frozen=True, slots=True)
class FilesState:
    """All open files of one process.  Inode numbers of pipes and sockets mean something within `boot_id` only."""

    descriptions: tuple[AnyDescription, ...] = ()
    descriptors: tuple[Descriptor, ...] = ()
    pipes: tuple[PipeState, ...] = ()
    boot_id: str = ""
    pid: int = 0
