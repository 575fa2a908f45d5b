# SPDX-License-Identifier: Apache-2.0
"""A client of the redis protocol (RESP2): commands out, replies in."""

from __future__ import annotations

import socket
from typing import Any


class ServerError(Exception):
    """The server answered with an error."""


class Connection:
    """One TCP connection.  Not for several threads at once.

    Raises (all methods):
        OSError: the connection could not be made or broke.
    """

    def __init__(self, port: int, *, timeout: float = 30) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=timeout)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._in = self._socket.makefile("rb")

    def __call__(self, *words: str | bytes | int) -> Any:
        """One command and its reply."""
        self._socket.sendall(encode(words))
        return self._reply()

    def pipeline(self, commands: list[tuple[str | bytes | int, ...]]) -> list[Any]:
        """All commands at once, then all replies; the first error is raised after all were read."""
        self._socket.sendall(b"".join(encode(words) for words in commands))
        replies: list[Any] = []
        error = None
        for _ in commands:
            try:
                replies.append(self._reply())
            except ServerError as one:
                error = error or one
        if error:
            raise error
        return replies

    def close(self) -> None:
        self._in.close()
        self._socket.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _reply(self) -> Any:
        line = self._in.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionResetError("the server closed the connection")
        kind, rest = line[:1], line[1:-2]
        if kind == b"+":
            return rest.decode()
        if kind == b"-":
            raise ServerError(rest.decode())
        if kind == b":":
            return int(rest)
        if kind == b"$":
            size = int(rest)
            return None if size < 0 else self._exactly(size + 2)[:-2]
        if kind == b"*":
            return [self._reply() for _ in range(int(rest))]
        raise ServerError(f"not a reply: {line!r}")

    def _exactly(self, size: int) -> bytes:
        data = self._in.read(size)
        if data is None or len(data) != size:
            raise ConnectionResetError("the server closed the connection")
        return data


def encode(words: tuple[str | bytes | int, ...]) -> bytes:
    """A command as an array of bulk strings."""
    parts = [b"*%d\r\n" % len(words)]
    for word in words:
        data = word if isinstance(word, bytes) else str(word).encode()
        parts.append(b"$%d\r\n%s\r\n" % (len(data), data))
    return b"".join(parts)
