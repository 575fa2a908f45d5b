# SPDX-License-Identifier: Apache-2.0
"""State in: UNIX sockets, their names and connections.  Raises RestoreConflict."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
import struct
from dataclasses import replace

from checkpointd.errors import RestoreConflict
from checkpointd.linux import socket as sockets
from checkpointd.restore import holders
from checkpointd.restore.files_maker import Maker
from checkpointd.restore.own_sockets import OwnSockets
from checkpointd.restore.reopen import in_directory, own_path
from checkpointd.restore.sockets import borrow, finish, listen, new_socket, set_options, tell_unset
from checkpointd.state.files import PeerCredentials, SocketFile, UnixSocket

_SUN_PATH_BYTES = 108
_QUEUE_BUFFER_BYTES = 8 << 20
_RCV_SHUTDOWN, _SEND_SHUTDOWN = 1, 2


def unix(maker: Maker, index: int, one: UnixSocket) -> None:
    """A UNIX socket; for a pair both ends are made when the first is met."""
    if index in maker.local:
        return
    other = _other_end(maker, index, one)
    if other is not None and one.peer is not None:
        _pair(maker, index, one, one.peer, other)
        return
    if one.hung_up:
        # a name is that of the listener, nearly always
        found = _connection(maker, one, index, one) if one.name else None
        peer, ours = found or _own(maker).pair(one.type, one.credentials)
        with ours, peer:
            tell_unset(maker, index, set_options(ours, one.options))
            _send_queue(peer, one.queue)
            peer.close()
            _judge_credentials(maker, index, ours, one)
            maker.local[index] = finish(maker, ours, one)
        return
    with new_socket(maker, index, one) as sock:
        _bind_unix(maker, index, sock, one)
        if one.state == "listening":
            if not sock.getsockname():
                sock.bind(
                    ""
                )  # its own is not to be had, and none listens without: one of the kernel's choice
            listen(maker, index, one, sock)
            if one.pending:
                maker.warnings.append(
                    f"{maker.name(index)}: {one.pending} connections waiting at the dump are lost"
                )
        maker.local[index] = finish(maker, sock, one)


def _other_end(maker: Maker, index: int, one: UnixSocket) -> UnixSocket | None:
    """The other end where both are made at once, as a pair or a connection."""
    other = maker.state.descriptions[one.peer] if one.peer not in (None, index) else None
    if not isinstance(other, UnixSocket) or other.peer != index:
        return None
    # datagram sockets that were connected to each other one by one have names, and no credentials
    has_names = all(end.name and not (end.file and end.file.deleted) for end in (one, other))
    if one.type == socket.SOCK_DGRAM and has_names and not (one.credentials or other.credentials):
        return None
    return other


def connections(maker: Maker) -> None:
    """Everything connected that has a name: a connection borrows that of its listener, before that takes it."""
    try:
        for index, one in enumerate(maker.state.descriptions):
            if isinstance(one, UnixSocket) and one.name and (one.peer is not None or one.hung_up):
                maker.current = index
                unix(maker, index, one)
    finally:
        _own(maker).close_listeners()


def connect_unix(maker: Maker, index: int, one: UnixSocket) -> None:
    """Connect a datagram socket to its named peer, once all names are bound."""
    name = one.peer_name
    if one.peer is not None and not name:
        other = maker.state.descriptions[one.peer]
        if not isinstance(other, UnixSocket) or _other_end(maker, index, one) is not None:
            return
        name = _bound_name(maker, other)
    if not name:
        return
    with borrow(maker.local[index]) as sock:
        try:
            if name.startswith(b"\0"):
                sock.connect(name)
            else:
                maker.opener.do(lambda: sock.connect(name))
        except OSError as error:
            shown = os.fsdecode(name.replace(b"\0", b"@"))
            maker.warnings.append(
                f"{maker.name(index)}: could not be connected to {shown} ({error.strerror})"
            )
        else:
            _shut(sock, one)


def _bound_name(maker: Maker, one: UnixSocket) -> bytes:
    if one.abstract is not None:
        return b"\0" + one.abstract
    return os.fsencode(maker.path(one.file.path)) if one.file else b""


def accepted_end(maker: Maker, index: int, one: UnixSocket) -> int | None:
    """Which end of a connection comes from accept(2): it shows the name of its listener without holding it.

    Where the listener is gone we cannot tell it from an end that was bound itself, which few programs do.
    """
    if one.peer is None or one.type == socket.SOCK_DGRAM:
        return None
    ends = {end: maker.state.descriptions[end] for end in sorted((index, one.peer))}
    named = [end for end, state in ends.items() if isinstance(state, UnixSocket) and state.name]
    for end in named:
        state = ends[end]
        if isinstance(state, UnixSocket) and maker.listener(state.type, state.name):
            return end
    return named[-1] if named else None


def _pair(maker: Maker, index: int, one: UnixSocket, peer_index: int, other: UnixSocket) -> None:
    first, second = _named_pair(maker, index, one, peer_index, other)
    with first, second:
        tell_unset(maker, index, set_options(first, one.options))
        tell_unset(maker, peer_index, set_options(second, other.options))
        _send_queue(second, one.queue)
        _send_queue(first, other.queue)
        for sock, state in ((first, one), (second, other)):
            _shut(sock, state)
        _judge_credentials(maker, index, first, one)
        _judge_credentials(maker, peer_index, second, other)
        maker.local[index] = finish(maker, first, one)
        maker.local[peer_index] = finish(maker, second, other)


def _named_pair(
    maker: Maker, index: int, one: UnixSocket, peer_index: int, other: UnixSocket
) -> tuple[socket.socket, socket.socket]:
    accepted = accepted_end(maker, index, one)
    if accepted == index:
        second, first = _named_pair(maker, peer_index, other, index, one)
        return first, second
    pair = _connection(maker, one, peer_index, other) if accepted is not None else None
    if pair is None:
        pair = _own(maker).pair(one.type, one.credentials)
    try:
        _bind_unix(maker, index, pair[0], one)
        if accepted is None:
            _bind_unix(maker, peer_index, pair[1], other)
    except BaseException:
        for sock in pair:
            sock.close()
        raise
    return pair


def _connection(
    maker: Maker, one: UnixSocket, accepted: int, other: UnixSocket
) -> tuple[socket.socket, socket.socket] | None:
    """The end that connected and the accepted one; None where the name cannot be had for a moment."""
    listener = maker.listener(other.type, other.name)
    file = listener.file if listener else other.file

    def bind(sock: socket.socket) -> bytes:
        if file is None:
            _bind_unix(maker, accepted, sock, other)
            return other.name
        path = maker.path(file.path)
        if file.deleted and os.path.lexists(path):
            raise RestoreConflict(f"{file.path} belongs to another socket now")
        _bind_file(maker, accepted, sock, replace(file, deleted=False))
        if file.deleted:
            there = os.lstat(path)
            _own(maker).afterwards.append(lambda: _remove(path, there))
        return os.fsencode(path)

    try:
        return _own(maker).connection(
            one.type, other.name, bind, listened=one.credentials, connected=other.credentials
        )
    except (OSError, RestoreConflict) as error:
        if other.name not in maker.told_names:
            maker.told_names.add(other.name)
            why = error.message if isinstance(error, RestoreConflict) else error.strerror
            shown = os.fsdecode(other.name.replace(b"\0", b"@"))
            maker.warnings.append(
                f"{maker.name(accepted)}: what was accepted at {shown} comes back without that name ({why})"
            )
        return None


def _remove(path: str, ours: os.stat_result) -> None:
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.lstat(path), ours):
            os.unlink(path)


def _shut(sock: socket.socket, one: UnixSocket) -> None:
    if one.shutdown & _SEND_SHUTDOWN:
        sock.shutdown(socket.SHUT_WR)
    if one.shutdown & _RCV_SHUTDOWN:
        sock.shutdown(socket.SHUT_RD)


def _own(maker: Maker) -> OwnSockets:
    assert maker.own_sockets is not None
    return maker.own_sockets


def _judge_credentials(maker: Maker, index: int, sock: socket.socket, one: UnixSocket) -> None:
    """Tell, once, when the peer's credentials are not what they were; of another process they never are."""
    if one.credentials is None or maker.told_credentials:
        return
    wanted = replace(one.credentials, pid=maker.pid)
    found = PeerCredentials(*struct.unpack("i2I", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)))
    if found != wanted:
        maker.told_credentials = True
        refused = _own(maker).refused
        maker.warnings.append(
            f"{maker.name(index)}: its peer shows as process {found.pid} of user {found.uid} and group {found.gid}, "
            f"not {wanted.pid} of {wanted.uid} and {wanted.gid} (SO_PEERCRED), as may those of other socket pairs"
            f"{f': {refused}' if refused else ''}"
        )


def _send_queue(sock: socket.socket, queue: tuple[bytes, ...]) -> None:
    """Send what the other end had not read.

    It fitted once, but may have come in pieces that took less room each: then there is more room for a moment.
    """
    before = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    widened = False
    for piece in queue:
        done = 0
        while done < len(piece):
            try:
                done += sock.send(piece[done:], socket.MSG_DONTWAIT)
            except BlockingIOError:
                if widened:
                    raise
                locks = sock.getsockopt(socket.SOL_SOCKET, sockets.SO_BUF_LOCK)
                sock.setsockopt(socket.SOL_SOCKET, sockets.SO_SNDBUFFORCE, _QUEUE_BUFFER_BYTES)
                widened = True
    if widened:
        sock.setsockopt(socket.SOL_SOCKET, sockets.SO_SNDBUFFORCE, before // 2)
        sock.setsockopt(socket.SOL_SOCKET, sockets.SO_BUF_LOCK, locks)


def _bind_unix(maker: Maker, index: int, sock: socket.socket, one: UnixSocket) -> None:
    if one.abstract is not None:
        try:
            sock.bind(b"\0" + one.abstract)
        except OSError as error:
            who = holders.unix_name_holder(b"\0" + one.abstract) or "another process"
            shown = os.fsdecode(one.abstract)
            raise RestoreConflict(
                f"{maker.name(index)}: the UNIX name @{shown} is in use by {who}",
                hint="stop that process, then restore again",
            ) from error
    elif one.file is not None:
        _bind_file(maker, index, sock, one.file)


def _bind_file(maker: Maker, index: int, sock: socket.socket, file: SocketFile) -> None:
    path = maker.path(file.path)
    if file.deleted and os.path.lexists(path):
        maker.warnings.append(
            f"{maker.name(index)}: {file.path} belongs to another socket now; left without name"
        )
        return
    if problem := socket_path_conflict(maker, file):
        raise RestoreConflict(f"{maker.name(index)}: {problem}", path=file.path)
    base = os.path.basename(path)
    directory = -1
    try:
        directory = _look_at_directory(maker, file)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(base, dir_fd=directory)
        if not (file.name and _bind_relative(sock, path, directory, file.name)):
            name = os.fsencode(path)
            if len(name) >= _SUN_PATH_BYTES:
                name = os.fsencode(f"{own_path(directory)}/{base}")
            sock.bind(name)
        _own_file(sock, directory, base, file)
        if file.deleted:
            os.unlink(base, dir_fd=directory)
    except OSError as error:
        raise RestoreConflict(
            f"{maker.name(index)}: the UNIX socket {file.path} cannot be bound: {error.strerror}",
            path=file.path,
        ) from error
    finally:
        if directory >= 0:
            os.close(directory)


def _bind_relative(sock: socket.socket, path: str, directory: int, name: str) -> bool:
    """Bind to the end of `path`, as getsockname(2) is to tell it; False where that is not allowed."""
    start = directory
    if "/" in name:
        start = os.open(path.removesuffix(name) or "/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        in_directory(start, lambda: sock.bind(name))
    except PermissionError:  # system call filters of containers deny unshare(2)
        return False
    finally:
        if start != directory:
            os.close(start)
    return True


def _look_at_directory(maker: Maker, file: SocketFile) -> int:
    """A descriptor (O_PATH) of the directory of a socket's name, which must be where it was.

    The name itself may have had links in it (/var/run).
    """
    named = os.path.dirname(maker.path(file.path))
    fd = os.open(named, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    if file.directory:
        there, wanted = os.fstat(fd), maker.opener.stat(maker.path(file.directory))
        if wanted is None or (there.st_dev, there.st_ino) != (wanted.st_dev, wanted.st_ino):
            os.close(fd)
            raise RestoreConflict(
                f"the directory of the UNIX socket {file.path} is not {file.directory} any more",
                path=file.path,
            )
    return fd


def _own_file(sock: socket.socket, directory: int, base: str, file: SocketFile) -> None:
    """Owner and permissions of the file that `sock` was just bound to, and of no other that took its name."""
    found = os.open(base, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        there = os.fstat(found)
        try:
            bound = fcntl.ioctl(sock, sockets.SIOCUNIXFILE)
        except OSError:  # then we have few rights, and may change our own files only
            is_ours = stat.S_ISSOCK(there.st_mode) and there.st_uid == os.geteuid() and there.st_nlink == 1
        else:
            try:
                is_ours = os.path.sameopenfile(bound, found)
            finally:
                os.close(bound)
        if not is_ours:
            raise RestoreConflict(
                f"the UNIX socket {file.path} was replaced while it was being bound", path=file.path
            )
        os.chmod(own_path(found), file.mode)
        with contextlib.suppress(PermissionError):
            os.chown(own_path(found), file.uid, file.gid)
    finally:
        os.close(found)


def socket_path_conflict(maker: Maker, file: SocketFile) -> str:
    """Why a socket cannot be bound at its name, "" if it can (over the dead socket of the old process, too).

    Raises:
        RestoreConflict: its directory is another one now.
    """
    try:
        directory = _look_at_directory(maker, file)
    except OSError:
        return f"the directory of the UNIX socket {file.path} is gone; make it again"
    try:
        there = os.stat(os.path.basename(file.path), dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return ""
    finally:
        os.close(directory)
    if not stat.S_ISSOCK(there.st_mode):
        return f"{file.path} is no socket any more; move it away"
    if who := holders.unix_file_holder(there):
        return f"the UNIX socket {file.path} is in use by {who}; stop it first"
    return ""
