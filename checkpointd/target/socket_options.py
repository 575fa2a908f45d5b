# SPDX-License-Identifier: Apache-2.0
"""The options of a socket that differ from those of a fresh one.  Only getsockopt(2).

Not seen: TCP MD5 and AO keys, IP options; no call reads them back in full.
Source: socket(7), ip(7), ipv6(7), tcp(7), udp(7), include/uapi/asm-generic/socket.h.
"""

from __future__ import annotations

import errno
import functools
import socket
import struct

from checkpointd.linux import socket as sockets
from checkpointd.state.files import SocketOption

_SNDBUF_LOCKED, _RCVBUF_LOCKED = 1, 2
_VALUE_BYTES = 64

# SO_REUSEADDR, DONTROUTE, BROADCAST, KEEPALIVE, OOBINLINE, PRIORITY, LINGER, REUSEPORT, PASSCRED, RCVLOWAT,
# RCVTIMEO, SNDTIMEO, BINDTODEVICE, TIMESTAMP, PASSSEC, MARK, RXQ_OVFL, PEEK_OFF, BUSY_POLL, ZEROCOPY, PASSPIDFD
_SOL_SOCKET = (2, 5, 6, 9, 10, 12, 13, 15, 16, 18, 20, 21, 25, 29, 34, 36, 40, 42, 46, 60, 76)
# IP_TOS, TTL, RECVOPTS, RETOPTS, PKTINFO, MTU_DISCOVER, RECVERR, RECVTTL, RECVTOS, FREEBIND, TRANSPARENT,
# RECVORIGDSTADDR, MINTTL, BIND_ADDRESS_NO_PORT, MULTICAST_IF, MULTICAST_TTL, MULTICAST_LOOP, MULTICAST_ALL
_SOL_IP = (1, 2, 6, 7, 8, 10, 11, 12, 13, 15, 19, 20, 21, 24, 32, 33, 34, 49)
# IPV6_UNICAST_HOPS, MULTICAST_IF, MULTICAST_HOPS, MULTICAST_LOOP, MTU_DISCOVER, RECVERR, V6ONLY, MULTICAST_ALL,
# RECVPKTINFO, RECVHOPLIMIT, DONTFRAG, RECVTCLASS, TCLASS, AUTOFLOWLABEL, TRANSPARENT, FREEBIND
_SOL_IPV6 = (16, 17, 18, 19, 23, 25, 26, 29, 49, 51, 62, 66, 67, 70, 75, 78)
# TCP_NODELAY, CORK, KEEPIDLE, KEEPINTVL, KEEPCNT, SYNCNT, LINGER2, DEFER_ACCEPT, CONGESTION, USER_TIMEOUT,
# FASTOPEN, NOTSENT_LOWAT, FASTOPEN_CONNECT
_SOL_TCP = (1, 3, 4, 5, 6, 7, 8, 9, 13, 18, 23, 25, 30)
_SOL_UDP = (1, 101, 102, 103, 104)  # UDP_CORK, NO_CHECK6_TX, NO_CHECK6_RX, SEGMENT, GRO
_SO_PRIORITY = (socket.SOL_SOCKET, 12)
_ABSENT = (
    errno.ENOPROTOOPT,
    errno.EOPNOTSUPP,
    errno.EINVAL,
    errno.ENOTCONN,
    errno.ENODEV,
    errno.EADDRNOTAVAIL,
    errno.ENODATA,
)


def changed_options(sock: socket.socket) -> tuple[SocketOption, ...]:
    """Options to set on a fresh socket of the same family, type and protocol to make it like this one.

    A classic BPF filter is told as SO_ATTACH_FILTER with its instructions.
    SO_SNDBUF and SO_RCVBUF are told only where the program set them: setting them ends autotuning.
    """
    fresh = _fresh_options(sock.family, int(sock.type), sock.proto)
    found = [
        SocketOption(level, name, value)
        for level, name, value in _read(sock)
        if fresh.get((level, name)) != value and (level, name) != _SO_PRIORITY
    ]
    priority = _get(sock, *_SO_PRIORITY)
    tos_set = any((option.level, option.name) in ((0, 1), (41, 67)) for option in found)
    if priority is not None and priority != fresh.get(_SO_PRIORITY) and not tos_set:
        found.append(SocketOption(*_SO_PRIORITY, priority))  # IP_TOS sets it too, above what we may set
    locked = _get(sock, socket.SOL_SOCKET, sockets.SO_BUF_LOCK)
    if locked is not None:
        bits = struct.unpack("i", locked)[0]
        for bit, name in ((_SNDBUF_LOCKED, socket.SO_SNDBUF), (_RCVBUF_LOCKED, socket.SO_RCVBUF)):
            if bits & bit:
                found.append(
                    SocketOption(socket.SOL_SOCKET, name, sock.getsockopt(socket.SOL_SOCKET, name, 4))
                )
    if instructions := sockets.classic_filter(sock.fileno()):
        found.append(SocketOption(socket.SOL_SOCKET, sockets.SO_ATTACH_FILTER, instructions))
    return tuple(found)


def _names(family: int, kind: int, protocol: int) -> list[tuple[int, int]]:
    names = [(socket.SOL_SOCKET, name) for name in _SOL_SOCKET]
    if family in (socket.AF_INET, socket.AF_INET6):
        names += [(socket.IPPROTO_IP, name) for name in _SOL_IP]
        if family == socket.AF_INET6:
            names += [(socket.IPPROTO_IPV6, name) for name in _SOL_IPV6]
        if kind == socket.SOCK_STREAM:
            names += [(socket.IPPROTO_TCP, name) for name in _SOL_TCP]
        elif protocol in (0, socket.IPPROTO_UDP):
            names += [(socket.IPPROTO_UDP, name) for name in _SOL_UDP]
    return names


def _read(sock: socket.socket) -> list[tuple[int, int, bytes]]:
    found = []
    for level, name in _names(sock.family, int(sock.type), sock.proto):
        value = _get(sock, level, name)
        if value is not None:
            found.append((level, name, value))
    return found


def _get(sock: socket.socket, level: int, name: int) -> bytes | None:
    try:
        return sock.getsockopt(level, name, _VALUE_BYTES)
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise


@functools.cache
def _fresh_options(family: int, kind: int, protocol: int) -> dict[tuple[int, int], bytes]:
    with socket.socket(family, kind, protocol) as fresh:
        return {(level, name): value for level, name, value in _read(fresh)}
