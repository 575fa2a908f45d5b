# SPDX-License-Identifier: Apache-2.0
"""What the service and an agent say to each other, over a socketpair.

Framing: 4 bytes little-endian length, then that many bytes of JSON (one object, UTF-8, at most `MAX_MESSAGE`).

Service to agent::

    {"id": n, "op": "check|track|untrack|dump|restore|measure|status|cancel|shutdown", "args": {...}}

Agent to service, any number of `phase`, `progress` and (of a measurement) `record`, then exactly one `result`
or `error` per request::

    {"id": n, "event": "phase", "phase": "freezing"}
    {"id": n, "event": "progress", "done": 1, "total": 2, "unit": "bytes"}
    {"id": n, "event": "record", "json": "..."}
    {"id": n, "event": "result", "value": {...}}
    {"id": n, "event": "error", "error": CheckpointError.to_dict()}

and unasked, with id 0::

    {"id": 0, "event": "hello", "protocol": 1, "version": "0.1.0", "pid": 7}     first of all
    {"id": 0, "event": "target-exited", "pid": 1234}

One request at a time, except `cancel` (args `{"request": n}`: that request then ends with an error of reason
CANCELLED, or with its result when it was done already) and `status`, which are answered at once.  End of file
on the socket, or `shutdown`, means: let the target go, leave nothing of ours in it, and exit.

Values of results: `check` gives `CheckResult`, `track` gives `TrackResult`, `dump` and `restore` give
`DumpStats.to_dict()` and `RestoreStats.to_dict()`, `measure` the record's end,
`status` gives `AgentStatus`, the others `{}`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from checkpointd.version import VERSION

PROTOCOL = 1
MAX_MESSAGE = 16 << 20

_LENGTH = struct.Struct("<I")


class ProtocolError(Exception):
    """The other side sent what this protocol does not know, or a message too long to send."""


class Channel:
    """Messages over a connected stream socket.

    `send` may be called from many threads, `recv` from one at a time.  The channel owns the socket.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._send_lock = threading.Lock()

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, message: Mapping[str, Any]) -> None:
        """Send one message whole.

        Raises:
            ProtocolError: it is longer than `MAX_MESSAGE`; nothing was sent.
            OSError: the other side is gone (EPIPE, ECONNRESET), or the channel was closed (EBADF).
        """
        body = json.dumps(message, separators=(",", ":")).encode()
        if len(body) > MAX_MESSAGE:
            raise ProtocolError(f"a message of {len(body)} bytes is over the limit of {MAX_MESSAGE}")
        with self._send_lock:
            self._sock.sendall(_LENGTH.pack(len(body)) + body)

    def recv(self) -> dict[str, Any] | None:
        """Wait for the next message; None at end of file, also one in the middle of a message.

        Raises:
            ProtocolError: too long a message, or not a JSON object.
        """
        head = self._recv_exactly(_LENGTH.size)
        if head is None:
            return None
        (size,) = _LENGTH.unpack(head)
        if size > MAX_MESSAGE:
            raise ProtocolError(f"the other side announced {size} bytes; the limit is {MAX_MESSAGE}")
        body = self._recv_exactly(size)
        if body is None:
            return None
        try:
            message = json.loads(body)
        except ValueError as error:
            raise ProtocolError(f"the other side sent something that is not JSON: {error}") from None
        if not isinstance(message, dict):
            raise ProtocolError("the other side sent JSON that is not an object")
        return message

    def _recv_exactly(self, size: int) -> bytearray | None:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            try:
                nr_bytes = self._sock.recv_into(view)
            except OSError:
                # ECONNRESET (closed with our message unread) and EBADF (closed by us) mean the same: no more
                return None
            if nr_bytes == 0:
                return None
            view = view[nr_bytes:]
        return data

    def close(self) -> None:
        """Close the socket; a `recv` waiting in another thread returns None."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


class _Args:
    """Dataclasses that cross the wire as JSON objects."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload, no-any-return]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The value `to_dict` described.

        Keys this version does not know are refused: an option that is not understood must not be ignored.

        Raises:
            ProtocolError: an unknown or a missing key.
        """
        names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(data) - names)
        if unknown:
            raise ProtocolError(f"{cls.__name__} has no {', '.join(unknown)}")
        try:
            return cls(**data)
        except TypeError as error:
            raise ProtocolError(str(error)) from None


@dataclass(frozen=True)
class CheckArgs(_Args):
    """`pid` None: the kernel and the user only."""

    pid: int | None = None


@dataclass(frozen=True)
class TrackArgs(_Args):
    pid: int
    backend: str = "auto"
    precise: bool = False


@dataclass(frozen=True)
class DumpArgs(_Args):
    """How to dump.

    Attributes:
        store: absolute path of the store directory, which exists.
        compress: "zstd", "zstd:LEVEL" or "none"; "" for the default.
        parent: full id of the parent image; "" for the last image of this target.
        read_mode: "auto", "stopped" or "fork".
        delta: store changed pages as differences from the parent's where these are smaller.
        tcp: "refuse" (or "") established connections, "close" saves them to come back closed.
        external: one word for pipes and local sockets to the outside: "keep" (or none), "null", "refuse".
        deadline_s: seconds left when the request was sent; None: no limit.
    """

    pid: int
    store: str
    incremental: bool = False
    backend: str = "auto"
    kill: bool = False
    max_frozen_us: int = 0
    compress: str = ""
    tag: str = ""
    parent: str = ""
    read_mode: str = "auto"
    delta: bool = False
    tcp: str = ""
    external: list[str] = field(default_factory=list)
    deadline_s: float | None = None


@dataclass(frozen=True)
class RestoreArgs(_Args):
    """How to restore.

    Attributes:
        image: full id.
        tcp, external: as in DumpArgs.
        tty: "keep" (or "") the saved terminal, "null": /dev/null in its place.
        changed: "refuse" files that changed since the dump in a way that matters, or "allow".
        track_backend: as in TrackArgs; "none" leaves the process untracked.
    """

    store: str
    image: str
    new_pid: bool = False
    tcp: str = ""
    external: list[str] = field(default_factory=list)
    tty: str = ""
    changed: str = "refuse"
    track_backend: str = "auto"
    deadline_s: float | None = None


@dataclass(frozen=True)
class MeasureArgs(_Args):
    """How to measure; see `checkpointd.measure.engine.MeasureOptions`."""

    pid: int
    interval_us: int
    epochs: int
    backends: list[str] = field(default_factory=list)
    run: int = -1
    baseline_us: int = 0
    max_frozen_us: int = 0


@dataclass(frozen=True)
class CheckItem(_Args):
    """One finding: `category` is "required", "optional" or "target"."""

    name: str
    category: str
    ok: bool
    detail: str
    hint: str = ""


@dataclass(frozen=True)
class CheckResult(_Args):
    """Everything found at once; `backend` is what `auto` would take."""

    items: list[dict[str, Any]]
    backend: str = ""
    backend_reason: str = ""


@dataclass(frozen=True)
class TrackResult(_Args):
    pid: int
    backend: str
    backend_reason: str = ""


@dataclass(frozen=True)
class AgentStatus(_Args):
    """`backend` is "" while nothing is tracked."""

    pid: int = 0
    backend: str = ""
    last_image_id: str = ""
    busy: str = ""  # op being worked on


def hello(agent_pid: int) -> dict[str, Any]:
    """The first message of an agent."""
    return {"id": 0, "event": "hello", "protocol": PROTOCOL, "version": VERSION, "pid": agent_pid}
