# SPDX-License-Identifier: Apache-2.0
"""The options of a socket that differ from those of a fresh one.  Only getsockopt(2).

No call reads back: the interface of IP_MULTICAST_IF where it was given by number (its address is), IPV6_MTU,
IPV6_PKTINFO, IPV6_JOIN_ANYCAST, leases of flow labels, IP_XFRM_POLICY and IPV6_XFRM_POLICY, SO_BUSY_POLL_BUDGET, and
programs of SO_ATTACH_REUSEPORT_CBPF and _EBPF.
Source: socket(7), ip(7), ipv6(7), tcp(7), udp(7), netlink(7), include/uapi/asm-generic/socket.h,
include/uapi/linux/{in,in6,tcp,udp,netlink}.h, and what sk_getsockopt() and its like answer in Linux 6.12.
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
_HEADER_BYTES = 1024

# They are set in this order: of the ways to ask for timestamps a later one may undo an earlier.

# SO_DEBUG, REUSEADDR, DONTROUTE, BROADCAST, KEEPALIVE, OOBINLINE, NO_CHECK, PRIORITY, LINGER, REUSEPORT, PASSCRED,
# RCVLOWAT, RCVTIMEO, SNDTIMEO, BINDTODEVICE, TIMESTAMP, PASSSEC, TIMESTAMPNS, MARK, TIMESTAMPING, RXQ_OVFL,
# WIFI_STATUS, PEEK_OFF, NOFCS, SELECT_ERR_QUEUE, BUSY_POLL, MAX_PACING_RATE, INCOMING_CPU, ZEROCOPY, TXTIME,
# TIMESTAMP_NEW, TIMESTAMPNS_NEW, TIMESTAMPING_NEW, PREFER_BUSY_POLL, RESERVE_MEM, TXREHASH, RCVMARK, PASSPIDFD,
# RCVPRIORITY
_SOL_SOCKET = (
    1, 2, 5, 6, 9, 10, 11, 12, 13, 15, 16, 18, 20, 21, 25, 29, 34, 35, 36, 37, 40, 41, 42, 43, 45, 46, 47, 49, 60, 61,
    63, 64, 65, 69, 73, 74, 75, 76, 82,
)  # fmt: skip
# What of those means something to a UNIX socket (programs have many), and PASSRIGHTS, INQ
_SOL_SOCKET_UNIX = (2, 5, 6, 9, 10, 12, 13, 16, 18, 20, 21, 25, 29, 34, 35, 36, 37, 40, 42, 76, 83, 84)
# IP_TOS, TTL, OPTIONS, RECVOPTS, RETOPTS, PKTINFO, MTU_DISCOVER, RECVERR, RECVTTL, RECVTOS, FREEBIND, PASSSEC,
# TRANSPARENT, RECVORIGDSTADDR, MINTTL, CHECKSUM, BIND_ADDRESS_NO_PORT, RECVFRAGSIZE, RECVERR_RFC4884, MULTICAST_IF,
# MULTICAST_TTL, MULTICAST_LOOP, MULTICAST_ALL, UNICAST_IF, LOCAL_PORT_RANGE
_SOL_IP = (
    1, 2, 4, 6, 7, 8, 10, 11, 12, 13, 15, 18, 19, 20, 21, 23, 24, 25, 26, 32, 33, 34, 49, 50, 51,
)  # fmt: skip
# IPV6_2292PKTINFO, 2292HOPOPTS, 2292DSTOPTS, 2292RTHDR, 2292HOPLIMIT, FLOWINFO, UNICAST_HOPS, MULTICAST_IF,
# MULTICAST_HOPS, MULTICAST_LOOP, MTU_DISCOVER, RECVERR, V6ONLY, MULTICAST_ALL, RECVERR_RFC4884, FLOWINFO_SEND,
# RECVPKTINFO, RECVHOPLIMIT, RECVHOPOPTS, RECVRTHDR, RECVDSTOPTS, RECVPATHMTU, DONTFRAG, RECVTCLASS, TCLASS,
# AUTOFLOWLABEL, ADDR_PREFERENCES, MINHOPCOUNT, RECVORIGDSTADDR, TRANSPARENT, UNICAST_IF, RECVFRAGSIZE, FREEBIND
_SOL_IPV6 = (
    2, 3, 4, 5, 8, 11, 16, 17, 18, 19, 23, 25, 26, 29, 31, 33, 49, 51, 53, 56, 58, 60, 62, 66, 67, 70, 72, 73, 74, 75,
    76, 77, 78,
)  # fmt: skip
_IPV6_HEADERS = (54, 55, 57, 59)  # IPV6_HOPOPTS, RTHDRDSTOPTS, RTHDR, DSTOPTS: put into every packet
# TCP_NODELAY, MAXSEG, CORK, KEEPIDLE, KEEPINTVL, KEEPCNT, SYNCNT, LINGER2, DEFER_ACCEPT, WINDOW_CLAMP, QUICKACK,
# CONGESTION, THIN_LINEAR_TIMEOUTS, USER_TIMEOUT, REPAIR, FASTOPEN, NOTSENT_LOWAT, SAVE_SYN, FASTOPEN_CONNECT, ULP,
# FASTOPEN_KEY, FASTOPEN_NO_COOKIE, INQ, TX_DELAY, RTO_MAX_MS, RTO_MIN_US, DELACK_MAX_US
_SOL_TCP = (
    1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 16, 18, 19, 23, 25, 27, 30, 31, 33, 34, 36, 37, 44, 45, 46,
)  # fmt: skip
# UDP_CORK, ENCAP, NO_CHECK6_TX, NO_CHECK6_RX, SEGMENT, GRO
_SOL_UDP = (1, 100, 101, 102, 103, 104)
# NETLINK_PKTINFO, BROADCAST_ERROR, NO_ENOBUFS, LISTEN_ALL_NSID, CAP_ACK, EXT_ACK, GET_STRICT_CHK
_SOL_NETLINK = (3, 4, 5, 8, 10, 11, 12)
_SO_PRIORITY = (socket.SOL_SOCKET, 12)
_SETTING_PRIORITY = ((0, 1), (41, 67))  # IP_TOS, IPV6_TCLASS; it may be above what we may set
_SO_LOCK_FILTER = 44
_TCP_REPAIR, _TCP_ULP = (6, 19), (6, 31)
_UDP_ENCAP, _UDP_ENCAP_ESPINUDP = (17, 100), 2
_NOT_OF_THIS_KERNEL = (errno.ENOPROTOOPT, errno.EOPNOTSUPP)
_ABSENT = (
    *_NOT_OF_THIS_KERNEL,
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
    found = []
    for level, name, room, usual in _fresh_options(sock.family, int(sock.type), sock.proto):
        value = _get(sock, level, name, room)
        if value is not None and value != usual:
            found.append(SocketOption(level, name, value))
    if any((one.level, one.name) in _SETTING_PRIORITY for one in found):
        found = [one for one in found if (one.level, one.name) != _SO_PRIORITY]
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
    # last: nothing can be attached after it
    filter_locked = _get(sock, socket.SOL_SOCKET, _SO_LOCK_FILTER)
    if filter_locked is not None and any(filter_locked):
        found.append(SocketOption(socket.SOL_SOCKET, _SO_LOCK_FILTER, filter_locked))
    return tuple(found)


def why_unsettable(option: SocketOption) -> str:
    """What a socket with this option is that no new one can be made to be; "" for all others."""
    match (option.level, option.name):
        case sockopt if sockopt == _TCP_REPAIR:
            return "in repair mode (TCP_REPAIR)"
        case sockopt if sockopt == _TCP_ULP:
            name = option.value.rstrip(b"\0").decode("ascii", "replace")
            return f"with the upper layer protocol {name} (TCP_ULP)"
        case sockopt if sockopt == _UDP_ENCAP and option.value != struct.pack("i", _UDP_ENCAP_ESPINUDP):
            return "that is an end of a kernel tunnel (UDP_ENCAP)"
        case (socket.IPPROTO_IPV6, name) if name in _IPV6_HEADERS:
            # struct ipv6_opt_hdr: next header, length in units of 8 bytes without the first
            if len(option.value) < (option.value[1] + 1) * 8:
                return f"with an IPv6 extension header of more than {_HEADER_BYTES} bytes"
    return ""


def _names(family: int, kind: int, protocol: int) -> list[tuple[int, int, int]]:
    """Level, name, and room for the value."""
    if family == socket.AF_UNIX:
        return [(socket.SOL_SOCKET, name, _VALUE_BYTES) for name in _SOL_SOCKET_UNIX]
    names = [(socket.SOL_SOCKET, name, _VALUE_BYTES) for name in _SOL_SOCKET]
    if family in (socket.AF_INET, socket.AF_INET6):
        names += [(socket.IPPROTO_IP, name, _VALUE_BYTES) for name in _SOL_IP]
        if family == socket.AF_INET6:
            names += [(socket.IPPROTO_IPV6, name, _VALUE_BYTES) for name in _SOL_IPV6]
            names += [(socket.IPPROTO_IPV6, name, _HEADER_BYTES) for name in _IPV6_HEADERS]
        if kind == socket.SOCK_STREAM:
            names += [(socket.IPPROTO_TCP, name, _VALUE_BYTES) for name in _SOL_TCP]
        elif protocol in (0, socket.IPPROTO_UDP):
            names += [(socket.IPPROTO_UDP, name, _VALUE_BYTES) for name in _SOL_UDP]
    elif family == socket.AF_NETLINK:
        names += [(sockets.SOL_NETLINK, name, _VALUE_BYTES) for name in _SOL_NETLINK]
    return names


def _get(sock: socket.socket, level: int, name: int, room: int = _VALUE_BYTES) -> bytes | None:
    try:
        return sock.getsockopt(level, name, room)
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise


@functools.cache
def _fresh_options(family: int, kind: int, protocol: int) -> tuple[tuple[int, int, int, bytes | None], ...]:
    """Level, name, room and value of every option that this kernel has for such sockets."""
    options: list[tuple[int, int, int, bytes | None]] = []
    with socket.socket(family, kind, protocol) as fresh:
        for level, name, room in _names(family, kind, protocol):
            try:
                value = fresh.getsockopt(level, name, room)
            except OSError as error:
                if error.errno in _NOT_OF_THIS_KERNEL:
                    continue  # to ask again of each socket would only cost time in the freeze
                if error.errno not in _ABSENT:
                    raise
                options.append((level, name, room, None))
            else:
                options.append((level, name, room, value))
    return tuple(options)
