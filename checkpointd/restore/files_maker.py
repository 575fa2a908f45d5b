# SPDX-License-Identifier: Apache-2.0
"""What all makers of open files share while a process's descriptions are built in our own table.

Every description is made here first and installed in the target afterwards, so that a failure costs the target
nothing.  Ours are closed at the end, whatever happens.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from checkpointd.errors import RestoreConflict
from checkpointd.restore.holders import Holder, find_holders
from checkpointd.restore.own_sockets import OwnSockets
from checkpointd.restore.reopen import Opener
from checkpointd.state import files as state_of
from checkpointd.state.files import (
    F_OWNER_TID,
    ClosedSocket,
    Directory,
    Epoll,
    FilesOptions,
    FilesState,
    PipeEnd,
    RegularFile,
    UnixSocket,
)
from checkpointd.target.remote import Call, Remote

_TOLD_ONE_BY_ONE = 3
BATCH_CALLS = 200


@dataclass(frozen=True)
class FilesContext:
    """What a restore of files needs from outside.

    Attributes:
        object_fds: our descriptor (read and write) of each shared memory object of the image, by id.
        content: pieces, in order, of the content that the image keeps as pages for description `index`;
            it may go beyond the end of the file, and is to have zeros for holes.
        same_boot: inode numbers of pipes and sockets and the monotonic clock still mean what they meant.
        opener: opens paths for the process; its root is that of the options.
        tids: old to new ids of its threads, where descriptors lead to them (`threads_led_to`).
    """

    options: FilesOptions = field(default_factory=FilesOptions)
    object_fds: Mapping[int, int] = field(default_factory=dict)
    content: Callable[[int], Iterable[bytes]] = lambda index: ()
    same_boot: bool = True
    opener: Opener = field(default_factory=Opener)
    tids: Mapping[int, int] = field(default_factory=dict)


@dataclass
class Maker:
    """The state of one restore of files.

    Attributes:
        pid: of the process as it will be.
        local: our descriptor of each description made so far.
        content_base: descriptor of the file that holds the content of description `index`.
        bases: descriptors that keep something alive until all is made (unlinked files, pipe ends).
        closed: descriptions that came back as connections closed by their peer, and who that was.
        current: the description at work, for messages.
        deferred: what must wait until all is open (modes, owners, seals).
        after_watches: what must wait until the target has its watches.
        own_sockets: has the process make its pairs; None while only looking.
        told_credentials: it was told that those of a socket's peer are others now.
        told_names: of UNIX listeners whose connections come back without; it was told.
    """

    state: FilesState
    context: FilesContext
    pid: int
    local: dict[int, int] = field(default_factory=dict)
    bases: list[int] = field(default_factory=list)
    content_base: dict[int, int] = field(default_factory=dict)
    deferred: list[Callable[[], None]] = field(default_factory=list)
    after_watches: list[Callable[[], None]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    closed: list[tuple[int, str]] = field(default_factory=list)
    current: int = 0
    own_sockets: OwnSockets | None = None
    told_credentials: bool = False
    told_names: set[bytes] = field(default_factory=set)
    _holders: dict[str, Holder] | None = None
    _numbers: dict[int, list[state_of.Descriptor]] | None = None
    _listeners: dict[tuple[int, bytes], UnixSocket] | None = None

    @property
    def options(self) -> FilesOptions:
        return self.context.options

    def name(self, index: int) -> str:
        """The description as the user knows it: by its lowest descriptor."""
        descriptors = self.descriptors(index)
        return f"fd {descriptors[0].fd}" if descriptors else f"description {index}"

    def descriptors(self, index: int) -> list[state_of.Descriptor]:
        """The descriptors of a description, ascending."""
        if self._numbers is None:
            self._numbers = {}
            for one in sorted(self.state.descriptors, key=lambda one: one.fd):
                self._numbers.setdefault(one.description, []).append(one)
        return self._numbers.get(index, [])

    def listener(self, kind: int, name: bytes) -> UnixSocket | None:
        """The UNIX socket of the process that listens under this name."""
        if self._listeners is None:
            self._listeners = {
                (one.type, one.name): one
                for one in self.state.descriptions
                if isinstance(one, UnixSocket) and one.state == "listening"
            }
        return self._listeners.get((kind, name))

    def path(self, path: str) -> str:
        """A path of the image as we reach it."""
        return rooted(self.options.root, own_proc_path(path, self.ids))

    def is_own(self, path: str) -> bool:
        """Does a path of the image lead to the process itself in /proc?  It is not there before the restore."""
        return leads_to_own(path, self.ids)

    @property
    def ids(self) -> Mapping[int, int]:
        """Old to new, of the process and those of its threads that matter."""
        return {**self.context.tids, self.state.pid: self.pid}

    @property
    def opener(self) -> Opener:
        return replace(self.context.opener, root=self.options.root)

    def all_warnings(self) -> list[str]:
        """The warnings, with many closed connections told as one."""
        some = self.closed if len(self.closed) <= _TOLD_ONE_BY_ONE else self.closed[:1]
        told = [
            f"{self.name(index)}: the connection {f'with {peer} ' if peer else ''}comes back closed"
            for index, peer in some
        ]
        if len(some) < len(self.closed):
            told[0] += f", and so do {len(self.closed) - 1} more connections"
        return self.warnings + told

    @functools.cached_property
    def spent(self) -> frozenset[int]:
        """Descriptions that a watch with EPOLLONESHOT has told of."""
        numbers = {
            watch.fd
            for one in self.state.descriptions
            if isinstance(one, Epoll)
            for watch in one.watches
            if watch.is_spent
        }
        return frozenset(one.description for one in self.state.descriptors if one.fd in numbers)

    def keep(self, fd: int) -> int:
        self.bases.append(fd)
        return fd

    def close_bases(self) -> None:
        while self.bases:
            os.close(self.bases.pop())

    def close(self) -> None:
        self.close_bases()
        while self.local:
            os.close(self.local.popitem()[1])

    def holder(self, link: str) -> Holder | None:
        """A process that still has the pipe or socket `link` open."""
        if not self.context.same_boot:
            return None
        if self._holders is None:
            self._holders = find_holders(external_links(self.state), not_in={self.pid, os.getpid()})
        return self._holders.get(link)


def external_links(state: FilesState) -> set[str]:
    """`/proc/PID/fd` links of everything that was shared with other processes."""
    links = set()
    for one in state.descriptions:
        if isinstance(one, PipeEnd) and state.pipes[one.pipe].external and not state.pipes[one.pipe].path:
            links.add(f"pipe:[{state.pipes[one.pipe].inode}]")
        elif isinstance(one, ClosedSocket):
            links.add(f"socket:[{one.inode}]")
    return links


def rooted(root: str, path: str) -> str:
    return path if root == "/" else os.path.join(root, path.lstrip("/"))


def own_proc_path(path: str, ids: Mapping[int, int]) -> str:
    """A path below the directories of the process and its threads in /proc follows them.

    Args:
        ids: old to new, of the process and its threads.
    """
    parts = path.split("/")
    if not leads_to_own(path, ids):
        return path
    places = [2, 4] if parts[3:4] == ["task"] else [2]
    for place in places:
        if len(parts) > place and parts[place].isdecimal():
            parts[place] = str(ids.get(int(parts[place]), parts[place]))
    return "/".join(parts)


def leads_to_own(path: str, ids: Iterable[int]) -> bool:
    """Does a path of the image lead to the process's own part of /proc, or a thread's of its own?"""
    parts = path.split("/")
    return parts[:2] == ["", "proc"] and len(parts) > 2 and parts[2].isdecimal() and int(parts[2]) in set(ids)


def threads_led_to(state: FilesState, tids: Iterable[int]) -> set[int]:
    """Threads of its own (of `tids`) that descriptors lead to or signal: they must be there first."""
    found = set()
    for one in state.descriptions:
        path = (
            one.file.path if isinstance(one, RegularFile) else one.path if isinstance(one, Directory) else ""
        )
        if leads_to_own(path, tids):
            found |= {int(part) for part in path.split("/")[2:5:2] if part.isdecimal()}
        if one.owner is not None and one.owner.type == F_OWNER_TID:
            found.add(one.owner.id)
    return found & set(tids) - {state.pid}


def run_exactly(remote: Remote, expected: list[tuple[Call, int | None]], what: str) -> None:
    """Run calls that must give these results (None: anything but an error)."""
    results = remote.batch([call for call, _ in expected])
    for (call, wanted), got in zip(expected, results, strict=True):
        if got < 0 or (wanted is not None and got != wanted):
            text = os.strerror(-got) if got < 0 else f"gave {got}, not {wanted}"
            raise RestoreConflict(
                f"{what} cannot be restored in process {remote.pid}: system call {call.nr}: {text}"
            )


def write_all(fd: int, pieces: Iterable[bytes]) -> int:
    """Write from offset 0, leaving zero pieces as holes; the number of bytes covered."""
    at = 0
    for piece in pieces:
        if piece.count(0) != len(piece):
            view = memoryview(piece)
            done = 0
            while done < len(view):
                done += os.pwrite(fd, view[done:], at + done)
        at += len(piece)
    return at
