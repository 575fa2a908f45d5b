# SPDX-License-Identifier: Apache-2.0
"""/proc/PID/fd and /proc/PID/fdinfo: parsers take bytes and raise ValueError, readers raise OSError.

Source: proc_pid_fdinfo(5); the show_fdinfo functions of Linux fs/{eventfd,eventpoll,timerfd,signalfd}.c,
fs/notify/fdinfo.c and fs/locks.c.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class EpollEntry:
    """`device` is the kernel's own number of the watched file's superblock (major << 20 | minor)."""

    fd: int
    events: int
    data: int
    inode: int
    device: int


@dataclass(frozen=True, slots=True)
class InotifyEntry:
    wd: int
    inode: int
    device: int
    mask: int
    handle_type: int
    handle: bytes


@dataclass(frozen=True, slots=True)
class LockEntry:
    """`kind` is FLOCK, POSIX, OFDLCK, LEASE or DELEG; `end` is the last byte or -1."""

    kind: str
    write: bool
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class FdInfo:
    """One file.  `flags` holds O_CLOEXEC of the descriptor besides the description's status flags.

    Attributes:
        fields: all other `name: value` lines as printed.
    """

    position: int
    flags: int
    mount_id: int
    locks: tuple[LockEntry, ...] = ()
    epoll: tuple[EpollEntry, ...] = ()
    inotify: tuple[InotifyEntry, ...] = ()
    fields: dict[str, str] = field(default_factory=dict)

    @property
    def cloexec(self) -> bool:
        return bool(self.flags & os.O_CLOEXEC)


_PLAIN = re.compile(
    rb"pos:\t(\d+)\nflags:\t([0-7]+)\nmnt_id:\t(\d+)\nino:\t\d+\n"
)  # nothing else to tell: most files
_EPOLL = re.compile(
    rb"tfd:\s*(\d+)\s+events:\s*([0-9a-f]+)\s+data:\s*([0-9a-f]+)(?:\s+pos:\s*-?\d+\s+ino:\s*([0-9a-f]+)\s+sdev:\s*([0-9a-f]+))?"
)
_INOTIFY = re.compile(
    rb"inotify wd:([0-9a-f]+) ino:([0-9a-f]+) sdev:([0-9a-f]+) mask:([0-9a-f]+)"
    rb"(?: ignored_mask:[0-9a-f]+)?(?: fhandle-bytes:[0-9a-f]+ fhandle-type:([0-9a-f]+) f_handle:([0-9a-f]*))?"
)
_LOCK = re.compile(rb"lock:\s*\d+:\s+(\S+)\s+\S+\s+(\S+)\s+-?\d+\s+\S+\s+(\d+)\s+(\d+|EOF)")


def parse(text: bytes) -> FdInfo:
    """One fdinfo file.

    Raises:
        ValueError: a line this kernel should print is missing or of another shape.
    """
    if match := _PLAIN.fullmatch(text):
        position, flags, mount_id = match.groups()
        return FdInfo(int(position), int(flags, 8), int(mount_id))
    fields: dict[str, str] = {}
    locks: list[LockEntry] = []
    epoll: list[EpollEntry] = []
    inotify: list[InotifyEntry] = []
    for line in text.splitlines():
        if line.startswith(b"tfd:"):
            epoll.append(_epoll_entry(line))
        elif line.startswith(b"inotify "):
            inotify.append(_inotify_entry(line))
        elif line.startswith(b"lock:"):
            locks.append(_lock_entry(line))
        else:
            name, colon, value = line.partition(b":")
            if colon:
                fields[name.decode("ascii", "replace")] = value.strip().decode("utf-8", "surrogateescape")
    try:
        return FdInfo(
            position=int(fields.pop("pos")),
            flags=int(fields.pop("flags"), 8),
            mount_id=int(fields.pop("mnt_id", "-1")),
            locks=tuple(locks),
            epoll=tuple(epoll),
            inotify=tuple(inotify),
            fields=fields,
        )
    except KeyError as error:
        raise ValueError(f"fdinfo has no line {error}") from error


def _epoll_entry(line: bytes) -> EpollEntry:
    if not (match := _EPOLL.match(line)):
        raise ValueError(f"fdinfo: not an epoll line: {line!r}")
    fd, events, data, inode, device = match.groups()
    return EpollEntry(
        int(fd), int(events, 16), int(data, 16), int(inode or b"0", 16), int(device or b"0", 16)
    )


def _inotify_entry(line: bytes) -> InotifyEntry:
    if not (match := _INOTIFY.match(line)):
        raise ValueError(f"fdinfo: not an inotify line: {line!r}")
    wd, inode, device, mask, handle_type, handle = match.groups()
    return InotifyEntry(
        int(wd, 16),
        int(inode, 16),
        int(device, 16),
        int(mask, 16),
        int(handle_type or b"0", 16),
        bytes.fromhex((handle or b"").decode("ascii")),
    )


def _lock_entry(line: bytes) -> LockEntry:
    if not (match := _LOCK.match(line)):
        raise ValueError(f"fdinfo: not a lock line: {line!r}")
    kind, mode, start, end = match.groups()
    return LockEntry(kind.decode("ascii"), mode == b"WRITE", int(start), -1 if end == b"EOF" else int(end))


_TIMER_PAIR = re.compile(r"\(\s*(\d+),\s*(\d+)\)")


def nanoseconds(pair: str) -> int:
    """`(seconds, nanoseconds)` of a timerfd line, in ns."""
    if not (match := _TIMER_PAIR.fullmatch(pair.strip())):
        raise ValueError(f"fdinfo: not a time: {pair!r}")
    return int(match[1]) * 10**9 + int(match[2])


_READ_BYTES = 1 << 16


def read(pid: int, fd: int) -> bytes:
    """The raw fdinfo file; ENOENT when the descriptor is closed."""
    handle = os.open(f"/proc/{pid}/fdinfo/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        chunks = []
        while chunk := os.read(handle, _READ_BYTES):
            chunks.append(chunk)
            if len(chunk) < _READ_BYTES:  # the kernel makes the whole file at once: a short read is the end
                break
        return b"".join(chunks)
    finally:
        os.close(handle)


def list_fds(pid: int) -> list[int]:
    """Open descriptors, ascending."""
    return sorted(map(int, os.listdir(f"/proc/{pid}/fd")))


def parse_igmp(text: bytes) -> list[tuple[int, bytes]]:
    """/proc/net/igmp: (interface index, group, 4 bytes) of all memberships of the network namespace."""
    groups: list[tuple[int, bytes]] = []
    interface = 0
    for line in text.splitlines()[1:]:
        words = line.split()
        if not words:
            continue
        if line[:1] not in b" \t":
            interface = int(words[0])
        else:
            groups.append((interface, int(words[0], 16).to_bytes(4, sys.byteorder)))
    return groups


def parse_igmp6(text: bytes) -> list[tuple[int, bytes]]:
    """/proc/net/igmp6: (interface index, group, 16 bytes)."""
    lines = (line.split() for line in text.splitlines())
    return [(int(words[0]), bytes.fromhex(words[2].decode("ascii"))) for words in lines if len(words) > 2]


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo, as far as file descriptors need it."""

    id: int
    device: tuple[int, int]
    mount_point: str
    fs_type: str


_OCTAL = re.compile(r"\\([0-7]{3})")


def parse_mounts(text: bytes) -> dict[int, Mount]:
    """/proc/PID/mountinfo by mount id.  Source: proc_pid_mountinfo(5)."""
    mounts: dict[int, Mount] = {}
    for line in text.decode("utf-8", "surrogateescape").splitlines():
        left, _, right = line.partition(" - ")
        words = left.split(" ")
        if len(words) < 5 or not right:
            raise ValueError(f"mountinfo: not a mount: {line!r}")
        major, _, minor = words[2].partition(":")
        point = _OCTAL.sub(lambda match: chr(int(match[1], 8)), words[4])
        mounts[int(words[0])] = Mount(int(words[0]), (int(major), int(minor)), point, right.split(" ")[0])
    return mounts
