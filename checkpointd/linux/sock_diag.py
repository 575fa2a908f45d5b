# SPDX-License-Identifier: Apache-2.0
"""A netlink socket that asks the kernel about sockets of our network namespace: requests out, answers in.

Raises OSError: ENOENT (no such socket, or this kernel has no diagnostics for its family), EPERM, EPROTONOSUPPORT.

Source: sock_diag(7), netlink(7), include/uapi/linux/{netlink,sock_diag}.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from typing import Self

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST, _NLM_F_DUMP, _NLMSG_ERROR, _NLMSG_DONE = 1, 0x300, 2, 3
# struct nlmsghdr: len, type, flags, seq, pid
_HEADER = struct.Struct("=IHHII")


class SockDiag:
    """The base of those that ask about one family."""

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG
        )

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, request: bytes, *, every: bool) -> None:
        """Ask about one socket, or about every one that fits."""
        flags = _NLM_F_REQUEST | (_NLM_F_DUMP if every else 0)
        header = _HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, flags, 1, 0)
        self._socket.send(header + request)

    def _answers(self) -> Iterator[bytes]:
        """The answers without their netlink headers: one, or all up to the last."""
        while True:
            answer = self._socket.recv(1 << 17)
            at = 0
            while at + _HEADER.size <= len(answer):
                size, kind, *_ = _HEADER.unpack_from(answer, at)
                body = answer[at + _HEADER.size : at + size]
                if kind == _NLMSG_DONE:
                    return
                if kind == _NLMSG_ERROR:
                    code = -struct.unpack_from("=i", body)[0] or errno.EIO
                    raise OSError(code, os.strerror(code))
                yield body
                at += max((size + 3) & ~3, _HEADER.size)
