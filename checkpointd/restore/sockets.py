# SPDX-License-Identifier: Apache-2.0
"""State in: sockets, made in our own descriptor table; unix_sockets.py has those of UNIX.  Raises RestoreConflict."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Iterator

from checkpointd.errors import RestoreConflict
from checkpointd.linux import socket as sockets
from checkpointd.linux.pidfd import pidfd_getfd
from checkpointd.restore import holders
from checkpointd.restore.files_maker import Maker
from checkpointd.restore.reopen import open_own, set_status
from checkpointd.state.files import (
    ClosedSocket,
    InetAddress,
    InetSocket,
    NetlinkSocket,
    Socket,
    SocketOption,
    UnixSocket,
)

_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = sockets.SO_SNDBUFFORCE, sockets.SO_RCVBUFFORCE
_FORCED = {socket.SO_SNDBUF: _SO_SNDBUFFORCE, socket.SO_RCVBUF: _SO_RCVBUFFORCE}


def sockaddr(family: int, address: InetAddress) -> tuple[str, int] | tuple[str, int, int, int]:
    if family == socket.AF_INET6:
        return address.host, address.port, address.flow_info, address.scope_id
    return address.host, address.port


def set_options(sock: socket.socket, options: tuple[SocketOption, ...]) -> list[str]:
    """Set what differs from a fresh socket; the options that could not be set."""
    failed = []
    for option in options:
        try:
            if option.level == socket.SOL_SOCKET and option.name in _FORCED:
                _set_buffer(sock, option)
            elif (option.level, option.name) == (socket.SOL_SOCKET, sockets.SO_ATTACH_FILTER):
                sockets.attach_filter(sock.fileno(), option.value)
            else:
                sock.setsockopt(option.level, option.name, option.value)
        except OSError as error:
            failed.append(f"option {option.level}:{option.name} ({error.strerror})")
    return failed


def _set_buffer(sock: socket.socket, option: SocketOption) -> None:
    size_bytes = struct.unpack("i", option.value)[0] // 2  # the kernel doubles what it is given
    try:
        sock.setsockopt(socket.SOL_SOCKET, _FORCED[option.name], size_bytes)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, option.name, size_bytes)


def new_socket(maker: Maker, index: int, one: Socket) -> socket.socket:
    try:
        sock = socket.socket(one.family, one.type | socket.SOCK_CLOEXEC, one.protocol)
    except OSError as error:
        raise RestoreConflict(
            f"{maker.name(index)}: no socket of family {one.family} can be made: {error.strerror}"
        ) from error
    tell_unset(maker, index, set_options(sock, one.options))
    return sock


def tell_unset(maker: Maker, index: int, failed: list[str]) -> None:
    maker.warnings.extend(f"{maker.name(index)}: socket {what} could not be set" for what in failed)


def finish(maker: Maker, sock: socket.socket, one: Socket) -> int:
    """Owner and status flags; the descriptor.

    Sockets that share a port (SO_REUSEPORT) must have one owner when they are bound: it changes when all are made.
    """
    there = os.fstat(sock.fileno())
    set_status(sock.fileno(), one.flags)
    fd = sock.detach()
    if (there.st_uid, there.st_gid) != (one.uid, one.gid):
        maker.deferred.append(lambda: _give(fd, one.uid, one.gid))
    return fd


def _give(fd: int, uid: int, gid: int) -> None:
    with contextlib.suppress(PermissionError):
        os.fchown(fd, uid, gid)


def inet(maker: Maker, index: int, one: InetSocket) -> int:
    """TCP listening or idle, UDP bound or connected."""
    with new_socket(maker, index, one) as sock:
        if one.local:
            bind_inet(maker.name(index), sock, one)
        if one.state == "listening":
            listen(maker, index, one, sock)
        elif one.state == "connected" and one.peer:
            try:
                sock.connect(sockaddr(one.family, one.peer))
            except OSError as error:
                there = holders.sockaddr_text(one.peer.host, one.peer.port)
                maker.warnings.append(
                    f"{maker.name(index)}: the UDP socket could not be connected to {there} ({error.strerror})"
                )
        if one.pending:
            maker.warnings.append(
                f"{maker.name(index)}: {one.pending} connections waiting at the dump are lost"
            )
        return finish(maker, sock, one)


@contextlib.contextmanager
def borrow(fd: int) -> Iterator[socket.socket]:
    """A descriptor as a socket, which does not close it."""
    sock = socket.socket(fileno=fd)
    try:
        yield sock
    finally:
        sock.detach()


def listen(maker: Maker, index: int, one: InetSocket | UnixSocket, sock: socket.socket) -> None:
    if index in maker.spent:
        # one that does not listen yet is ready (EPOLLHUP), which a watch that was spent needs
        maker.after_watches.append(lambda: _listen_at_last(maker, index, one))
    else:
        _begin_to_listen(maker, index, one, sock)


def _listen_at_last(maker: Maker, index: int, one: InetSocket | UnixSocket) -> None:
    with borrow(maker.local[index]) as sock:
        _begin_to_listen(maker, index, one, sock)


def _begin_to_listen(maker: Maker, index: int, one: InetSocket | UnixSocket, sock: socket.socket) -> None:
    try:
        sock.listen(one.backlog)
    except OSError as error:
        if isinstance(one, InetSocket):
            raise _in_use(maker.name(index), one, error) from error
        raise RestoreConflict(f"{maker.name(index)}: it cannot listen again: {error.strerror}") from error


def bind_inet(name: str, sock: socket.socket, one: InetSocket) -> None:
    """Bind to the address of the image, past connections of the old process that linger.

    Raises:
        RestoreConflict: the address is taken (by whom) or not of this machine.
    """
    assert one.local is not None
    reuse = sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
    if one.type == socket.SOCK_STREAM:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(sockaddr(one.family, one.local))
    except OSError as error:
        raise _in_use(name, one, error) from error
    finally:
        if one.type == socket.SOCK_STREAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)


def _in_use(name: str, one: InetSocket, error: OSError) -> RestoreConflict:
    assert one.local is not None
    kind = "TCP" if one.type == socket.SOCK_STREAM else "UDP"
    what = f"{name}: {kind} address {holders.sockaddr_text(one.local.host, one.local.port)}"
    if error.errno == errno.EADDRINUSE:
        return RestoreConflict(
            f"{what} is in use by {holders.port_holder(one.type, one.local.port)}",
            hint="stop that process, then restore again",
            port=one.local.port,
        )
    return RestoreConflict(
        f"{what} cannot be bound: {error.strerror}", hint="give this machine that address, then restore again"
    )


def closed(maker: Maker, index: int, one: ClosedSocket) -> int:
    """A socket as its program finds it when the peer hung up: end of file, then a broken pipe."""
    if one.family == socket.AF_UNIX and maker.options.external == "keep" and maker.options.tcp != "close":
        return _kept(maker, index, one)
    if one.family == socket.AF_UNIX and maker.descriptors(index)[0].fd <= 2:
        # a standard stream that breaks at the first word would end the program
        maker.warnings.append(f"{maker.name(index)}: /dev/null stands for the connection {one.peer}".rstrip())
        return open_own(
            maker.path("/dev/null"), os.O_RDWR | one.flags & os.O_NONBLOCK, what=maker.name(index)
        )
    if one.family == socket.AF_UNIX:
        ours, peer = socket.socketpair(socket.AF_UNIX, one.type)
    else:
        ours, peer = _tcp_pair(one.family)
    with ours, peer:
        tell_unset(maker, index, set_options(ours, one.options))
        maker.closed.append((index, one.peer))
        return finish(maker, ours, one)


def _kept(maker: Maker, index: int, one: ClosedSocket) -> int:
    holder = maker.holder(f"socket:[{one.inode}]")
    if holder is None:
        raise RestoreConflict(
            f"{maker.name(index)} is a UNIX socket connected to another process"
            f"{f' ({one.peer})' if one.peer else ''}, and nobody holds that connection any more",
            hint="Restore with --external null to have it come back closed.",
        )
    pidfd = os.pidfd_open(holder.pid)
    try:
        return pidfd_getfd(pidfd, holder.fd)
    except OSError as error:
        raise RestoreConflict(
            f"{maker.name(index)}: the connection cannot be taken from {holders.describe(holder.pid)}: {error.strerror}"
        ) from error
    finally:
        os.close(pidfd)


def _tcp_pair(family: int) -> tuple[socket.socket, socket.socket]:
    """Two ends of a TCP connection over the loopback: nothing of it leaves the machine."""
    host = "127.0.0.1"
    if family == socket.AF_INET6:
        host = "::1"
    try:
        return _connect_pair(family, host)
    except OSError:
        if family != socket.AF_INET6:
            raise
        return _connect_pair(family, "::ffff:127.0.0.1")


def _connect_pair(family: int, host: str) -> tuple[socket.socket, socket.socket]:
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind((host, 0))
        listener.listen(8)
        ours = socket.socket(family, socket.SOCK_STREAM)
        try:
            ours.connect(listener.getsockname())
            while True:
                peer, address = listener.accept()
                if address[:2] == ours.getsockname()[:2]:
                    return ours, peer
                peer.close()  # some stranger was quicker
        except BaseException:
            ours.close()
            raise


def netlink(maker: Maker, index: int, one: NetlinkSocket) -> int:
    with new_socket(maker, index, one) as sock:
        if one.port or one.groups:
            try:
                sock.bind((one.port, 0))
            except OSError:
                sock.bind((0, 0))
                maker.warnings.append(
                    f"{maker.name(index)}: netlink address {one.port} is taken; given another"
                )
        for group in one.groups:
            try:
                sock.setsockopt(sockets.SOL_NETLINK, sockets.NETLINK_ADD_MEMBERSHIP, group)
            except OSError as error:
                maker.warnings.append(
                    f"{maker.name(index)}: netlink group {group} not joined ({error.strerror})"
                )
        fcntl.fcntl(sock, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
        set_status(sock.fileno(), one.flags)
        return sock.detach()
