# SPDX-License-Identifier: Apache-2.0
"""State in: connected UNIX sockets, made by the process that is being restored.

The kernel notes who made a pair, who listened and who connected (SO_PEERCRED), and nobody can change that later.  So
the process does it itself, for a moment under the ids that were noted, and we fetch the sockets from it.  Where that
is not allowed the sockets are ours, and `OwnSockets.refused` is set.

Raises: StepFailedError (the process could not get its ids back), OSError.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from checkpointd.errors import RestoreConflict
from checkpointd.linux import fcntl as fdcalls
from checkpointd.linux import prctl
from checkpointd.linux.arch import Nr
from checkpointd.linux.pidfd import pidfd_getfd
from checkpointd.restore.stub import StepFailedError
from checkpointd.state.files import PeerCredentials
from checkpointd.target.remote import Call, Remote

_NR_SOCKET, _NR_CONNECT, _NR_SOCKETPAIR = 41, 42, 53
_KEEP = 0xFFFF_FFFF_FFFF_FFFF  # an id that is to stay
_TRIES = 16

Pair = tuple[socket.socket, socket.socket]


class OwnSockets:
    """Makes sockets in the process and hands them to us.  It uses the scratch of `remote`, and forgets it.

    Attributes:
        refused: why a socket was not made by the process, "" so far.
        afterwards: what is to be done when the listeners are gone.
    """

    def __init__(self, remote: Remote) -> None:
        self._remote = remote
        self._ids: tuple[int, int] | None = None
        self._listeners: dict[tuple[int, bytes], tuple[int, socket.socket, bytes]] = {}
        self._not_had: dict[tuple[int, bytes], OSError | RestoreConflict] = {}
        self.refused = ""
        self.afterwards: list[Callable[[], None]] = []

    def pair(self, kind: int, by: PeerCredentials | None) -> Pair:
        """socketpair(2)."""
        self._remote.reset()
        address = self._remote.alloc(8)
        (result,) = self._as(
            by, [Call(_NR_SOCKETPAIR, (socket.AF_UNIX, kind | socket.SOCK_CLOEXEC, 0, address))]
        )
        if result < 0:
            return self._ours(kind, -result)
        raw = self._remote.read(address, 8)
        first, second = (int.from_bytes(raw[at : at + 4], "little") for at in (0, 4))
        try:
            ours = self._fetch(first)
            try:
                return ours, self._fetch(second)
            except BaseException:
                ours.close()
                raise
        except PermissionError as error:
            return self._ours(kind, error.errno or errno.EPERM)
        finally:
            self._close(first, second)

    def connection(
        self,
        kind: int,
        name: bytes,
        bind: Callable[[socket.socket], bytes],
        *,
        listened: PeerCredentials | None,
        connected: PeerCredentials | None,
    ) -> Pair:
        """The connecting and the accepted end of a connection.  Those of one name have one listener.

        Args:
            bind: gives the listener its name and returns it as connect(2) takes it.
            listened, connected: who did.

        Raises:
            OSError: the name cannot be connected to.
            OSError, RestoreConflict: what `bind` raised, for this connection or for another one of that name.
        """
        self._remote.reset()
        if (kind, name) in self._not_had:
            raise self._not_had[kind, name]
        if (kind, name) not in self._listeners:
            try:
                self._listeners[kind, name] = self._listener(kind, bind)
            except (OSError, RestoreConflict) as error:
                self._not_had[kind, name] = error
                raise
        listener, ours, address = self._listeners[kind, name]
        (client,) = self._remote.batch([_new_socket(kind)])
        try:
            _checked(*self._as(listened, [Call(fdcalls.NR_LISTEN, (listener, 0))]))
            connect = Call(_NR_CONNECT, (_checked(client), self._remote.put(address), len(address)))
            for _ in range(_TRIES):
                (result,) = self._as(connected, [connect])
                if result == 0:
                    # first this: who made the name lead elsewhere meanwhile gets nothing through it
                    accepted = self._accept(ours)
                    try:
                        return self._fetch(client), accepted
                    except BaseException:
                        accepted.close()
                        raise
                if result != -errno.EAGAIN:
                    _checked(result)
                ours.accept()[0].close()
            raise OSError(errno.EAGAIN, "others keep connecting to it")
        finally:
            self._close(client)

    def _listener(
        self, kind: int, bind: Callable[[socket.socket], bytes]
    ) -> tuple[int, socket.socket, bytes]:
        """Its descriptor in the process, ours, and its address."""
        (listener,) = self._remote.batch([_new_socket(kind)])
        ours = None
        try:
            ours = self._fetch(_checked(listener))
            name = bind(ours)
        except BaseException:
            if ours is not None:
                ours.close()
            self._close(listener)
            raise
        ending = b"" if name.startswith(b"\0") else b"\0"
        return listener, ours, socket.AF_UNIX.to_bytes(2, "little") + name + ending

    def close_listeners(self) -> None:
        """All connections are made: give the names back to those whose they are."""
        theirs = []
        try:
            while self._listeners:
                _, (listener, ours, _) = self._listeners.popitem()
                ours.close()
                theirs.append(listener)
            self._close(*theirs)
        finally:  # whatever became of the process
            while self.afterwards:
                self.afterwards.pop()()

    def _accept(self, listener: socket.socket) -> socket.socket:
        """The first connection of the process; others had found the name before."""
        while True:
            accepted, _ = listener.accept()
            pid = accepted.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 4)
            if int.from_bytes(pid, "little") == self._remote.pid:
                return accepted
            accepted.close()

    def _ours(self, kind: int, number: int) -> Pair:
        self.refused = os.strerror(number)
        return socket.socketpair(socket.AF_UNIX, kind)

    def _as(self, who: PeerCredentials | None, calls: Sequence[Call]) -> list[int]:
        """Results of calls made under these effective ids, or under those there are if they may not be taken."""
        uid, gid = self._now()
        if who is None or (who.uid, who.gid) == (uid, gid):
            return self._remote.batch(calls)
        if who.uid == 0 and uid:
            # capabilities(7): who leaves user 0 with all his ids loses every capability
            self.refused = "only a process of root can be root for a moment"
            return self._remote.batch(calls)
        there = [
            Call(Nr.SETRESGID, (_KEEP, who.gid, _KEEP)),
            Call(Nr.SETRESUID, (_KEEP, who.uid, _KEEP)),
            # SO_PEERCRED tells the effective ids; names are looked for with those of files, which stay its own
            Call(Nr.SETFSGID, (gid,)),
            Call(Nr.SETFSUID, (uid,)),
        ]
        back = [Call(Nr.SETRESUID, (_KEEP, uid, _KEEP)), Call(Nr.SETRESGID, (_KEEP, gid, _KEEP))]
        # a change of ids makes a process undumpable, and then only root gets at it
        dumpable = [Call(Nr.PRCTL, (prctl.PR_SET_DUMPABLE, 1, 0, 0, 0))]
        results = self._remote.batch([*there, *calls, *back, *dumpable])
        for result in results[:2]:
            if result < 0:
                self.refused = os.strerror(-result)
        for result in results[len(there) + len(calls) :][:2]:
            if result < 0:
                raise StepFailedError(self._remote.pid, "going back to its own ids", -result)
        return results[len(there) : len(there) + len(calls)]

    def _now(self) -> tuple[int, int]:
        """Effective uid and gid of the process."""
        if self._ids is None:
            status = Path(f"/proc/{self._remote.pid}/status").read_text(errors="replace")
            lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
            self._ids = int(lines["Uid"].split()[1]), int(lines["Gid"].split()[1])
        return self._ids

    def _fetch(self, fd: int) -> socket.socket:
        pidfd = os.pidfd_open(self._remote.pid)
        try:
            return socket.socket(fileno=pidfd_getfd(pidfd, fd))
        finally:
            os.close(pidfd)

    def _close(self, *fds: int) -> None:
        self._remote.batch([Call(fdcalls.NR_CLOSE, (fd,)) for fd in fds if fd >= 0])


def _new_socket(kind: int) -> Call:
    # what does not block is not held up by strangers who know the name
    return Call(_NR_SOCKET, (socket.AF_UNIX, kind | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, 0))


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result
