# SPDX-License-Identifier: Apache-2.0
"""What the kernel tells about sockets beyond Python's socket module: TCP_INFO and UNIX socket diagnostics.

`UnixDiag` raises OSError (EPERM, EPROTONOSUPPORT without CONFIG_UNIX_DIAG); parsers raise ValueError on bytes
that are no such message.

Source: tcp(7), unix(7), sock_diag(7), include/uapi/linux/{tcp,unix_diag,netlink}.h.
"""

from __future__ import annotations

import errno
import functools
import socket
import struct
from dataclasses import dataclass

from checkpointd.linux._libc import address_of, syscall
from checkpointd.linux.sock_diag import SockDiag

SOL_NETLINK = 270
NETLINK_LIST_MEMBERSHIPS = 9
NETLINK_ADD_MEMBERSHIP = 1

SO_ATTACH_FILTER = 26  # SO_GET_FILTER when read
SO_RCVBUFFORCE, SO_SNDBUFFORCE = 33, 32
SO_PROTOCOL, SO_DOMAIN = 38, 39
SO_PEEK_OFF = 42
SIOCUNIXFILE = 0x89E0  # a descriptor (O_PATH) of the file a socket is bound to; Linux 4.10, CAP_NET_ADMIN
SO_BUF_LOCK = 72  # since Linux 5.15: which of SO_SNDBUF (1) and SO_RCVBUF (2) the program set

TCP_ESTABLISHED, TCP_SYN_SENT, TCP_CLOSE, TCP_LISTEN = 1, 2, 7, 10

_NR_SETSOCKOPT, _NR_GETSOCKOPT = 54, 55
# UDIAG_SHOW_NAME, _VFS, _PEER, _RQLEN (bits 0, 1, 2, 4); the shutdown attribute always comes
_SHOW = 0x01 | 0x02 | 0x04 | 0x10
# struct unix_diag_req: family, protocol, pad, states, ino, show, cookie[2]
_REQUEST = struct.Struct("=BBHIII2I")
# struct unix_diag_msg: family, type, state, pad, ino, cookie[2]
_MESSAGE = struct.Struct("=BBBBI2I")
_NAME, _VFS, _PEER, _RQLEN, _SHUTDOWN = 0, 1, 2, 4, 6


@dataclass(frozen=True, slots=True)
class TcpInfo:
    """Of struct tcp_info: the state; for a listener the connections waiting and the backlog; segments sent and the size
    of one."""

    state: int
    pending: int
    backlog: int
    segments_out: int
    segment_bytes: int = 0


def parse_tcp_info(raw: bytes) -> TcpInfo:
    # tcpi_state is byte 0; a listener shows its queue in tcpi_unacked (24) and tcpi_sacked (28); tcpi_segs_out
    # is at 136 (in v4.2)
    if len(raw) < 32:
        raise ValueError("struct tcp_info is cut short")
    unacked, sacked = struct.unpack_from("=2I", raw, 24)
    segments = struct.unpack_from("=I", raw, 136)[0] if len(raw) >= 140 else 0
    return TcpInfo(raw[0], unacked, sacked, segments, struct.unpack_from("=I", raw, 16)[0])


def tcp_info(sock: socket.socket) -> TcpInfo:
    return parse_tcp_info(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256))


_TCP_AO_GET_KEYS = 41
# struct tcp_ao_getsockopt (in v6.7): address, algorithm, key, nkeys, (bits: current, rnext, get_all), 6 bytes,
# ifindex, good and bad packets
_AO_KEYS = struct.Struct("=128x64x80xIH6xi2Q")
_AO_GET_ALL = 4


def has_tcp_ao_keys(sock: socket.socket) -> bool:
    """Has the socket, closed or listening, keys of the TCP authentication option?"""
    return _knows_tcp_ao() and _tcp_ao_error(sock) == 0


@functools.cache
def _knows_tcp_ao() -> bool:
    with socket.socket() as fresh:
        return _tcp_ao_error(fresh) == errno.ENOENT


def _tcp_ao_error(sock: socket.socket) -> int:
    """errno of asking how many keys there are: ENOENT for none, ENOPROTOOPT without CONFIG_TCP_AO."""
    value = bytearray(_AO_KEYS.pack(0, _AO_GET_ALL, 0, 0, 0))
    size = bytearray(struct.pack("=I", len(value)))
    try:
        syscall(
            _NR_GETSOCKOPT,
            sock.fileno(),
            socket.IPPROTO_TCP,
            _TCP_AO_GET_KEYS,
            value,
            size,
            name="getsockopt",
        )
    except OSError as error:
        return error.errno or errno.EIO
    return 0


@dataclass(frozen=True, slots=True)
class UnixInfo:
    """One UNIX socket.

    Attributes:
        state: TCP_ESTABLISHED, TCP_LISTEN or TCP_CLOSE.
        name: as bound; an abstract one begins with a zero byte.
        file: (device, inode) of its name in the file system, the device as the kernel counts it.
        peer: inode of the other end, 0 for none.
        receive_queue, send_queue: of a listener, connections waiting and backlog; else bytes.
    """

    inode: int
    type: int
    state: int
    name: bytes
    file: tuple[int, int] | None
    peer: int
    receive_queue: int
    send_queue: int
    shutdown: int


def parse_unix_diag(message: bytes) -> UnixInfo:
    """The answer without its netlink header."""
    if len(message) < _MESSAGE.size:
        raise ValueError("unix_diag message is cut short")
    _, kind, state, _, inode, _, _ = _MESSAGE.unpack_from(message)
    name, file, peer, queues, shutdown = b"", None, 0, (0, 0), 0
    at = _MESSAGE.size
    while at + 4 <= len(message):
        size, attribute = struct.unpack_from("=HH", message, at)
        if size < 4 or at + size > len(message):
            raise ValueError("unix_diag attribute is cut short")
        value = message[at + 4 : at + size]
        if attribute == _NAME:
            name = value
        elif attribute == _VFS:
            file_inode, device = struct.unpack("=2I", value)
            file = (device, file_inode)
        elif attribute == _PEER:
            (peer,) = struct.unpack("=I", value)
        elif attribute == _RQLEN:
            queues = struct.unpack("=2I", value)
        elif attribute == _SHUTDOWN:
            shutdown = value[0]
        at += (size + 3) & ~3
    if not name.startswith(b"\0"):
        name = name.rstrip(b"\0")
    return UnixInfo(inode, kind, state, name, file, peer, queues[0], queues[1], shutdown)


class UnixDiag(SockDiag):
    """Asks the kernel about UNIX sockets of our network namespace, one at a time (about 5 us each)."""

    def query(self, inode: int) -> UnixInfo:
        """The socket with this inode; ENOENT when there is none."""
        self._send(_request(inode), every=False)
        return parse_unix_diag(next(self._answers()))

    def dump(self) -> list[UnixInfo]:
        """All UNIX sockets."""
        self._send(_request(0), every=True)
        return [parse_unix_diag(answer) for answer in self._answers()]


def _request(inode: int) -> bytes:
    every = 0xFFFF_FFFF
    return _REQUEST.pack(socket.AF_UNIX, 0, 0, every, inode, _SHOW, every, every)


def classic_filter(fd: int) -> bytes:
    """Instructions (struct sock_filter, 8 bytes each) of the attached classic BPF filter, b"" without one.

    EACCES for an eBPF program, which cannot be read back.
    """
    # the kernel counts in instructions: asked with room for none it only tells how many there are
    length = bytearray(4)
    syscall(_NR_GETSOCKOPT, fd, socket.SOL_SOCKET, SO_ATTACH_FILTER, 0, length, name="getsockopt")
    (count,) = struct.unpack("=I", length)
    if not count:
        return b""
    room = bytearray(count * 8)
    syscall(_NR_GETSOCKOPT, fd, socket.SOL_SOCKET, SO_ATTACH_FILTER, room, length, name="getsockopt")
    return bytes(room)


def attach_filter(fd: int, instructions: bytes) -> None:
    # struct sock_fprog: unsigned short len, struct sock_filter *filter
    program = struct.pack("@HP", len(instructions) // 8, address_of(instructions))
    syscall(_NR_SETSOCKOPT, fd, socket.SOL_SOCKET, SO_ATTACH_FILTER, program, len(program), name="setsockopt")


MCAST_JOIN_GROUP = 42
_MCAST_MSFILTER, _MCAST_EXCLUDE = 48, 0
# struct group_req: __u32 gr_interface, (4 bytes hole,) struct sockaddr_storage gr_group (128 bytes)
_GROUP_REQ = struct.Struct("=I4x128s")
# struct group_filter: as group_req, then __u32 gf_fmode, __u32 gf_numsrc, sources
_GROUP_FILTER = struct.Struct("=I4x128sII")


def group_request(family: int, interface: int, group: bytes) -> bytes:
    """struct group_req, the value of MCAST_JOIN_GROUP.

    Args:
        group: the packed address, 4 or 16 bytes.
    """
    # struct sockaddr_in: family, port, address; struct sockaddr_in6: family, port, flow info, address, scope
    hole = b"" if family == socket.AF_INET else bytes(4)
    return _GROUP_REQ.pack(interface, struct.pack("=HH", family, 0) + hole + group)


def is_plain_member(sock: socket.socket, family: int, interface: int, group: bytes) -> bool | None:
    """Did the socket join the group?  None: it did, but only for some sources.

    Args:
        family: of the group; a socket of AF_INET6 can be in groups of both.
    """
    request = group_request(family, interface, group)
    value = bytearray(_GROUP_FILTER.pack(*_GROUP_REQ.unpack(request), 0, 0))
    level = socket.IPPROTO_IP if family == socket.AF_INET else socket.IPPROTO_IPV6
    size = bytearray(struct.pack("=I", len(value)))
    try:
        syscall(_NR_GETSOCKOPT, sock.fileno(), level, _MCAST_MSFILTER, value, size, name="getsockopt")
    except OSError as error:
        if error.errno in (errno.EADDRNOTAVAIL, errno.ENODEV, errno.EINVAL):
            return False
        raise
    _, _, mode, nr_sources = _GROUP_FILTER.unpack(value)
    return True if mode == _MCAST_EXCLUDE and not nr_sources else None


def netlink_groups(sock: socket.socket) -> tuple[int, ...]:
    """Multicast groups the netlink socket is in."""
    words = sock.getsockopt(SOL_NETLINK, NETLINK_LIST_MEMBERSHIPS, 128)
    return tuple(bit + 1 for bit in range(len(words) * 8) if words[bit // 8] >> (bit % 8) & 1)
