# SPDX-License-Identifier: Apache-2.0
"""What sock_diag(7) tells about TCP listeners and getsockopt(2) does not: the keys of TCP_MD5SIG.

The kernel shows them to CAP_NET_ADMIN; to others a listener looks as if it had none.  `ListenerDiag` raises OSError
(ENOENT: the kernel has no inet_diag, or there is no such listener); parsers raise ValueError on bytes that are no such
message.

Source: sock_diag(7), tcp(7), include/uapi/linux/{inet_diag,tcp}.h, net/ipv4/tcp_diag.c.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from checkpointd.linux.sock_diag import SockDiag
from checkpointd.linux.socket import TCP_LISTEN

TCP_MD5SIG_EXT = 32
_MD5SIG = 18  # INET_DIAG_MD5SIG, which comes with INET_DIAG_INFO
_ASK_FOR_INFO = 1 << (2 - 1)
_MD5SIG_FLAG_PREFIX = 1
_STATES = 1 << TCP_LISTEN
_NO_COOKIE = b"\xff" * 8
# struct inet_diag_req_v2: family, protocol, ext, pad, states, struct inet_diag_sockid
_REQUEST = struct.Struct("=BBBxI48s")
# struct inet_diag_sockid: source port, destination port (network order), source, destination, interface, cookie
_SOCKID = struct.Struct("!2s2x16s16x")
# struct inet_diag_msg: family, state, timer, retrans, sockid, expires, rqueue, wqueue, uid, inode
_MESSAGE = struct.Struct("=BBBB48s5I")
# struct tcp_diag_md5sig: family, prefix length, key length, address, key
_DIAG_KEY = struct.Struct("=BBH16s80s")
# struct tcp_md5sig: address (sockaddr_storage), flags, prefix length, key length, interface, key
_OPTION_KEY = struct.Struct("=128sBBHi80s")


@dataclass(frozen=True, slots=True)
class Md5Key:
    """A key of TCP_MD5SIG for the peers of one prefix; `address` has 4 or 16 bytes."""

    family: int
    address: bytes
    prefix_length: int
    key: bytes

    def option(self, socket_family: int) -> bytes:
        """struct tcp_md5sig, the value of TCP_MD5SIG_EXT for a socket of that family."""
        address = self.address
        if socket_family == socket.AF_INET:
            peer = struct.pack("=HH4s", socket.AF_INET, 0, address)
        else:
            # a socket of IPv6 knows peers of IPv4 by mapped addresses, but counts their prefix from 32
            mapped = bytes(10) + b"\xff\xff" + address if self.family == socket.AF_INET else address
            peer = struct.pack("=HHI16sI", socket.AF_INET6, 0, 0, mapped, 0)
        return _OPTION_KEY.pack(peer, _MD5SIG_FLAG_PREFIX, self.prefix_length, len(self.key), 0, self.key)


@dataclass(frozen=True, slots=True)
class ListenerInfo:
    inode: int
    md5_keys: tuple[Md5Key, ...]


def parse_inet_diag(message: bytes) -> ListenerInfo:
    """The answer without its netlink header."""
    if len(message) < _MESSAGE.size:
        raise ValueError("inet_diag message is cut short")
    *_, inode = _MESSAGE.unpack_from(message)
    keys: list[Md5Key] = []
    at = _MESSAGE.size
    while at + 4 <= len(message):
        size, attribute = struct.unpack_from("=HH", message, at)
        if size < 4 or at + size > len(message):
            raise ValueError("inet_diag attribute is cut short")
        if attribute == _MD5SIG:
            keys += _keys(message[at + 4 : at + size])
        at += (size + 3) & ~3
    return ListenerInfo(inode, tuple(keys))


def _keys(value: bytes) -> Iterator[Md5Key]:
    if len(value) % _DIAG_KEY.size:
        raise ValueError("INET_DIAG_MD5SIG is cut short")
    for family, prefix_length, key_length, address, key in _DIAG_KEY.iter_unpack(value):
        if key_length > len(key):
            raise ValueError(f"a TCP MD5 key of {key_length} bytes")
        yield Md5Key(
            family, address[: 4 if family == socket.AF_INET else 16], prefix_length, key[:key_length]
        )


class ListenerDiag(SockDiag):
    """Asks the kernel about TCP listeners of our network namespace, one at a time (about 10 us each).

    All of a family, as they are when the first of them is asked about that shares its address, are asked for once.
    """

    def __init__(self) -> None:
        super().__init__()
        self._all: dict[int, dict[int, tuple[Md5Key, ...]]] = {}

    def md5_keys(self, family: int, host: str, port: int, inode: int) -> tuple[Md5Key, ...]:
        """Keys of the listener with this inode at that address.

        Raises:
            OSError: ENOENT, there is none, or the kernel does not tell.
        """
        request = _request(family, port, socket.inet_pton(family, host))
        try:
            # by its address: one of several that share it, or one of an interface, may not be the one
            self._send(request, every=False)
            found = parse_inet_diag(next(self._answers()))
            if found.inode == inode:
                return found.md5_keys
        except FileNotFoundError:
            pass
        if family not in self._all:
            self._send(_request(family, 0, bytes(16)), every=True)
            told = map(parse_inet_diag, self._answers())
            self._all[family] = {one.inode: one.md5_keys for one in told}
        if inode not in self._all[family]:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return self._all[family][inode]


def _request(family: int, port: int, source: bytes) -> bytes:
    sockid = _SOCKID.pack(struct.pack("!H", port), source) + bytes(4) + _NO_COOKIE
    return _REQUEST.pack(family, socket.IPPROTO_TCP, _ASK_FOR_INFO, _STATES, sockid)
