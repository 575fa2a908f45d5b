# SPDX-License-Identifier: Apache-2.0
"""State out: sockets, looked at through a borrowed descriptor.  Nothing is consumed.  Raises CannotSaveError."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import socket
import stat
import struct
from collections.abc import Mapping

from checkpointd.linux import inet_diag
from checkpointd.linux import socket as sockets
from checkpointd.state.files import (
    ClosedSocket,
    InetAddress,
    InetSocket,
    NetlinkSocket,
    PeerCredentials,
    SocketFile,
    SocketOption,
    UnixSocket,
)
from checkpointd.target.files_session import CannotSaveError, ConnectionOpenError, OpenFd, Session
from checkpointd.target.socket_options import changed_options, why_unsettable

_FAMILY_NAMES = {
    17: "packet", 29: "CAN", 30: "TIPC", 31: "Bluetooth", 38: "AF_ALG (kernel crypto)", 40: "vsock", 44: "XDP",
}  # fmt: skip
_NETLINK_PROTOCOLS = {0: "route", 4: "sock_diag", 15: "kobject uevents", 16: "generic"}
_IPPROTO_MPTCP = 262
_BOTH_SHUT = 3


def one_socket(
    session: Session, one: OpenFd, index_by_inode: Mapping[int, int]
) -> InetSocket | ClosedSocket | UnixSocket | NetlinkSocket:
    """A socket.

    Args:
        index_by_inode: description index of each socket of the target.
    """
    if known := session.closed_sockets.get(one.stat.st_ino):
        return dataclasses.replace(known, flags=one.flags)
    if session.foreign_network():
        raise CannotSaveError(
            f"fd {one.fd} is a socket in another network namespace than checkpointd's; run it there"
        )
    with session.borrow(one.fd) as fd:
        sock = socket.socket(fileno=fd)
        try:
            return _classify(session, one, sock, index_by_inode)
        finally:
            sock.detach()  # the borrowed descriptor is the session's to close


def _classify(
    session: Session, one: OpenFd, sock: socket.socket, index_by_inode: Mapping[int, int]
) -> InetSocket | ClosedSocket | UnixSocket | NetlinkSocket:
    family = sock.getsockopt(socket.SOL_SOCKET, sockets.SO_DOMAIN)
    try:
        sockets.classic_filter(sock.fileno())
    except PermissionError as error:
        raise CannotSaveError(
            f"fd {one.fd} is a socket with an eBPF filter attached, which cannot be read back; detach it first"
        ) from error
    if family in (socket.AF_INET, socket.AF_INET6):
        if sock.type == socket.SOCK_STREAM and sock.proto in (0, socket.IPPROTO_TCP):
            return _tcp(session, one, sock)
        if sock.type == socket.SOCK_DGRAM and sock.proto in (0, socket.IPPROTO_UDP):
            return _udp(session, one, sock)
        kind = (
            "MPTCP"
            if sock.proto == _IPPROTO_MPTCP
            else "raw"
            if sock.type == socket.SOCK_RAW
            else f"protocol {sock.proto}"
        )
        raise CannotSaveError(
            f"fd {one.fd} is an internet socket of kind {kind}, which cannot be saved; only TCP and UDP"
        )
    if family == socket.AF_UNIX:
        return _unix(session, one, sock, index_by_inode)
    if family == socket.AF_NETLINK and sock.proto in _NETLINK_PROTOCOLS:
        return _netlink(session, one, sock)
    name = "netlink" if family == socket.AF_NETLINK else _FAMILY_NAMES.get(family, f"family {family}")
    raise CannotSaveError(
        f"fd {one.fd} is a {name} socket (protocol {sock.proto}), which cannot be saved; close it first"
    )


def _options(one: OpenFd, sock: socket.socket) -> tuple[SocketOption, ...]:
    options = changed_options(sock)
    for option in options:
        if what := why_unsettable(option):
            raise CannotSaveError(f"fd {one.fd} is a socket {what}, which cannot be saved; close it first")
    return options


def _tcp(session: Session, one: OpenFd, sock: socket.socket) -> InetSocket | ClosedSocket:
    info = sockets.tcp_info(sock)
    local = _address(sock.getsockname())
    if info.state not in (sockets.TCP_LISTEN, sockets.TCP_CLOSE) or (
        info.state == sockets.TCP_CLOSE and info.segments_out
    ):
        peer = _peer(sock)
        if info.state != sockets.TCP_CLOSE and session.options.tcp != "close":
            other = f" with {show(peer)}" if peer else ""
            raise ConnectionOpenError(
                f"fd {one.fd} is a TCP connection of {show(local)}{other}; it cannot be kept: "
                "allow it to come back closed with --tcp close"
            )
        return _closed(session, one, sock, show(peer) if peer else "")
    if sockets.has_tcp_ao_keys(sock):
        raise CannotSaveError(
            f"fd {one.fd} is a TCP socket with keys of the authentication option (TCP-AO), which cannot be saved; "
            "close it first"
        )
    listening = info.state == sockets.TCP_LISTEN
    options = _options(one, sock)
    if not listening:
        # TCP_MAXSEG of a closed socket that nobody limited is what its last connection came to
        last = SocketOption(int(socket.IPPROTO_TCP), socket.TCP_MAXSEG, struct.pack("=i", info.segment_bytes))
        options = tuple(option for option in options if option != last)
    if listening:
        keys = session.md5_keys(sock.family, local.host, local.port, one.stat.st_ino)
        options += tuple(
            SocketOption(int(socket.IPPROTO_TCP), inet_diag.TCP_MD5SIG_EXT, key.option(sock.family))
            for key in keys
        )
    if listening and info.pending and session.final:
        session.warnings.append(
            f"fd {one.fd}: {info.pending} connections waiting to be accepted at {show(local)} are not in the image"
        )
    return InetSocket(
        flags=one.flags,
        family=int(sock.family),
        type=int(socket.SOCK_STREAM),
        protocol=int(socket.IPPROTO_TCP),
        options=options,
        uid=one.stat.st_uid,
        gid=one.stat.st_gid,
        state="listening" if listening else "idle",
        local=local if local.port else None,
        backlog=info.backlog if listening else 0,
        pending=info.pending if listening else 0,
    )


_EVERYBODY = {
    bytes([224, 0, 0, 1]),
    bytes.fromhex("ff01" + "0" * 27 + "1"),
    bytes.fromhex("ff02" + "0" * 27 + "1"),
}


def _memberships(session: Session, one: OpenFd, sock: socket.socket) -> tuple[SocketOption, ...]:
    """Multicast groups the socket joined; a socket is asked about each group known on the machine."""
    found = []
    levels = {socket.AF_INET: socket.IPPROTO_IP}
    if sock.family == socket.AF_INET6:
        levels[socket.AF_INET6] = socket.IPPROTO_IPV6  # it may receive for both
    for family, level in levels.items():
        for interface, group in session.multicast_groups(family):
            if group in _EVERYBODY:
                continue
            joined = sockets.is_plain_member(sock, family, interface, group)
            if joined is None:
                address = socket.inet_ntop(family, group)
                raise CannotSaveError(
                    f"fd {one.fd} is in the multicast group {address} for some sources only, which cannot be saved"
                )
            if joined:
                value = sockets.group_request(family, interface, group)
                found.append(SocketOption(int(level), sockets.MCAST_JOIN_GROUP, value))
    return tuple(found)


def _udp(session: Session, one: OpenFd, sock: socket.socket) -> InetSocket:
    local, peer = _address(sock.getsockname()), _peer(sock)
    if session.final and _unread(sock):
        session.warnings.append(f"fd {one.fd}: UDP datagrams waiting at {show(local)} are not in the image")
    return InetSocket(
        flags=one.flags,
        family=int(sock.family),
        type=int(socket.SOCK_DGRAM),
        protocol=int(socket.IPPROTO_UDP),
        options=_options(one, sock) + _memberships(session, one, sock),
        uid=one.stat.st_uid,
        gid=one.stat.st_gid,
        state="connected" if peer else "idle",
        local=local if local.port else None,
        peer=peer,
    )


def _closed(session: Session, one: OpenFd, sock: socket.socket, peer: str) -> ClosedSocket:
    closed = ClosedSocket(
        flags=one.flags,
        family=int(sock.family),
        type=int(sock.type),
        protocol=sock.proto,
        uid=one.stat.st_uid,
        gid=one.stat.st_gid,
        inode=one.stat.st_ino,
        peer=peer,
    )
    session.closed_sockets[closed.inode] = closed
    return closed


def _unix(
    session: Session, one: OpenFd, sock: socket.socket, index_by_inode: Mapping[int, int]
) -> UnixSocket | ClosedSocket:
    try:
        with sockets.UnixDiag() as diag:
            info = diag.query(one.stat.st_ino)
    except OSError as error:
        raise CannotSaveError(
            f"fd {one.fd} is a UNIX socket, and this kernel does not tell about those ({error.strerror}); "
            "load the module unix_diag"
        ) from error
    abstract = info.name[1:] if info.name.startswith(b"\0") else None
    file = _socket_file(session, info) if info.name and abstract is None else None
    connected = info.state == sockets.TCP_ESTABLISHED or bool(info.peer)
    packets = sock.type == socket.SOCK_DGRAM
    peer, peer_name, hung_up = None, b"", False
    if info.state != sockets.TCP_LISTEN and connected:
        peer = index_by_inode.get(info.peer) if info.peer else None
        # a peer that nobody accepted yet has no inode; one that is gone has shut both directions
        waiting = not info.peer and not packets and info.shutdown != _BOTH_SHUT
        if waiting or (peer is None and info.peer):
            peer_name = _raw_name(sock.getpeername())
            if not (packets and peer_name):
                return _outside(session, one, sock, peer_name)
            if not peer_name.startswith((b"\0", b"/")):
                peer_name = os.fsencode(os.path.join(session.cwd(), os.fsdecode(peer_name)))
        hung_up = peer is None and not peer_name
        if hung_up and packets:
            connected = False  # the kernel lets go of a dead datagram peer at the next send
    listening = info.state == sockets.TCP_LISTEN
    if listening and info.receive_queue and session.final:
        session.warnings.append(
            f"fd {one.fd}: {info.receive_queue} connections waiting to be accepted are lost"
        )
    return UnixSocket(
        flags=one.flags,
        family=int(socket.AF_UNIX),
        type=int(sock.type),
        protocol=0,
        options=_options(one, sock),
        uid=one.stat.st_uid,
        gid=one.stat.st_gid,
        state="listening" if listening else "connected" if connected else "idle",
        abstract=abstract,
        file=file,
        peer=peer,
        peer_name=peer_name,
        backlog=info.send_queue if listening else 0,
        pending=info.receive_queue if listening else 0,
        queue=_queue(one, sock, info) if session.final and not listening else (),
        shutdown=info.shutdown if connected else 0,
        hung_up=hung_up and not packets,
        credentials=_credentials(session, one, sock) if connected and not peer_name else None,
    )


def _credentials(session: Session, one: OpenFd, sock: socket.socket) -> PeerCredentials | None:
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    found = PeerCredentials(*struct.unpack("i2I", raw))
    if not found.pid:
        return None  # datagram sockets that were connected one by one have none
    if found.pid != session.pid and session.final and not session.foreign_pairs:
        session.foreign_pairs = True
        session.warnings.append(
            f"fd {one.fd}: a UNIX socket pair that process {found.pid} made shows that as its peer (SO_PEERCRED), "
            "and will show the restored process instead, as will all such pairs"
        )
    return found


def _outside(session: Session, one: OpenFd, sock: socket.socket, peer_name: bytes) -> ClosedSocket:
    """A connection with somebody else: what becomes of it is the user's choice at restore."""
    shown = os.fsdecode(peer_name.replace(b"\0", b"@")) or _raw_name(sock.getsockname()).replace(
        b"\0", b"@"
    ).decode("utf-8", "replace")
    if session.options.external == "refuse":
        raise CannotSaveError(
            f"fd {one.fd} is a UNIX socket connected to another process{f' ({shown})' if shown else ''}; "
            "allow it to come back closed with --external null"
        )
    return _closed(session, one, sock, shown)


def _socket_file(session: Session, info: sockets.UnixInfo) -> SocketFile:
    name = os.fsdecode(info.name)
    root = os.readlink(f"/proc/{session.pid}/root")
    if root != "/" and name.startswith("/"):
        raise CannotSaveError(
            f"a UNIX socket is bound to {name} within the root directory {root}, "
            "which cannot be done again from outside"
        )
    path = os.path.join(session.cwd(), name)
    there = session.stat(path)
    directory = os.path.realpath(os.path.dirname(path))
    relative = "" if name.startswith("/") else name
    if there is None or not stat.S_ISSOCK(there.st_mode) or (info.file and there.st_ino != info.file[1]):
        return SocketFile(path, 0o755, 0, 0, deleted=True, directory=directory, name=relative)
    mode = stat.S_IMODE(there.st_mode)
    return SocketFile(path, mode, there.st_uid, there.st_gid, directory=directory, name=relative)


def _queue(one: OpenFd, sock: socket.socket, info: sockets.UnixInfo) -> tuple[bytes, ...]:
    """What waits to be read, by peeking."""
    waiting = info.receive_queue
    if not waiting:
        return ()
    if sock.type == socket.SOCK_DGRAM:
        # only the first datagram can be peeked at without a setting that the program would see
        raise CannotSaveError(
            f"fd {one.fd} is a datagram socket with unread messages, which cannot be saved; try again"
        )
    if sock.getsockopt(socket.SOL_SOCKET, sockets.SO_PEEK_OFF) >= 0:
        # peeking would move the offset, and the program peeks from there
        raise CannotSaveError(
            f"fd {one.fd} is a UNIX socket with unread messages and a peek offset (SO_PEEK_OFF), "
            "which cannot be saved; try again"
        )
    data, _, flags, _ = sock.recvmsg(waiting, 0, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    if flags & socket.MSG_CTRUNC:
        raise CannotSaveError(
            f"fd {one.fd} is a UNIX socket with descriptors or credentials under way, which cannot be saved; try again"
        )
    if len(data) != waiting:
        raise CannotSaveError(
            f"fd {one.fd} is a UNIX socket with several unread messages, which cannot be saved; try again"
        )
    return (data,)


def _netlink(session: Session, one: OpenFd, sock: socket.socket) -> NetlinkSocket:
    port, _ = sock.getsockname()
    if session.final and _unread(sock):
        session.warnings.append(f"fd {one.fd}: netlink messages waiting to be read are not in the image")
    return NetlinkSocket(
        flags=one.flags,
        family=int(socket.AF_NETLINK),
        type=int(sock.type),
        protocol=sock.proto,
        options=_options(one, sock),
        port=port,
        groups=sockets.netlink_groups(sock),
    )


def _unread(sock: socket.socket) -> int:
    try:
        return int(struct.unpack("i", fcntl.ioctl(sock, 0x541B, bytes(4)))[0])
    except OSError:  # netlink has no FIONREAD
        try:
            return len(sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except OSError:
            return 0


def _raw_name(name: str | bytes | None) -> bytes:
    return os.fsencode(name) if isinstance(name, str) else name or b""


def _address(name: tuple[str, int] | tuple[str, int, int, int]) -> InetAddress:
    return InetAddress(*name)


def _peer(sock: socket.socket) -> InetAddress | None:
    try:
        return _address(sock.getpeername())
    except OSError:
        return None


def show(address: InetAddress) -> str:
    host = f"[{address.host}]" if ":" in address.host else address.host
    return f"{host}:{address.port}"
