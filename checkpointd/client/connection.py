# SPDX-License-Identifier: Apache-2.0
"""A connection to a service and its calls."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # failures reach us as errors, not as lines on stderr

import grpc

from checkpointd import location
from checkpointd.api.v1 import checkpoint_pb2 as pb
from checkpointd.api.v1 import checkpoint_pb2_grpc
from checkpointd.client.autostart import drop_loser, ensure_service
from checkpointd.client.wire import error_of, event, plain
from checkpointd.errors import ServiceUnreachable, UsageError, VersionMismatch
from checkpointd.version import VERSION

CHUNK_BYTES = 1 << 20
CONNECT_TIMEOUT_S = 10.0
CONNECT_ATTEMPTS = 5
MAX_MESSAGE_BYTES = 64 << 20

_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 64 << 10),
]
_SOCKET_OPTIONS = [*_OPTIONS, ("grpc.default_authority", "localhost")]
_TCP_OPTIONS = [*_OPTIONS, ("grpc.keepalive_time_ms", 30_000), ("grpc.keepalive_timeout_ms", 20_000)]


class Readable(Protocol):
    """What a portable file is read from."""

    def read(self, nr_bytes: int, /) -> bytes: ...


@dataclass(frozen=True)
class ClientTls:
    """Mutual TLS: our certificate and key, and the authority that signed the service's."""

    certificate: Path
    key: Path
    ca: Path


def connect_to_socket(
    socket: str | Path | None, *, start: bool = True, timeout_s: float | None = None
) -> Client:
    """See `checkpointd.client.connect`."""
    path = location.checked_socket_path(socket) if socket else location.default_socket()

    def attempt() -> grpc.Channel:
        started = ensure_service(path, start=start)
        channel = grpc.insecure_channel(f"unix:{path}", options=_SOCKET_OPTIONS)
        try:
            drop_loser(started, _checked_version(channel, str(path))["pid"])
        except BaseException:
            channel.close()
            raise
        return channel

    def open_channel() -> grpc.Channel:
        # an idle service may end between our knock and our first call: then another one is started
        for _ in range(CONNECT_ATTEMPTS - 1):
            try:
                return attempt()
            except VersionMismatch:
                raise
            except ServiceUnreachable:
                if not start:
                    raise
        return attempt()

    return Client(open_channel, str(path), timeout_s)


def connect_to_address(address: str, tls: ClientTls | None, timeout_s: float | None = None) -> Client:
    """See `checkpointd.client.connect`."""
    if tls is None:
        raise UsageError(
            "a service on TCP is reached with mutual TLS only", hint="give --tls-cert, --tls-key and --tls-ca"
        )
    location.checked_address(address, "--connect")
    from checkpointd.client.handshake import explain  # noqa: PLC0415 - TLS is heavy
    from checkpointd.tls import read_files  # noqa: PLC0415

    pems = read_files(tls.certificate, tls.key, tls.ca)
    credentials = grpc.ssl_channel_credentials(
        root_certificates=pems.authority, private_key=pems.key, certificate_chain=pems.certificate
    )

    def open_channel() -> grpc.Channel:
        channel = grpc.secure_channel(address, credentials, options=_TCP_OPTIONS)
        try:
            _checked_version(channel, address)
        except BaseException as error:
            channel.close()
            if isinstance(error, ServiceUnreachable) and not isinstance(error, VersionMismatch):
                raise explain(address, pems, tls.certificate, tls.ca) or error from None
            raise
        return channel

    return Client(open_channel, address, timeout_s)


def _checked_version(channel: grpc.Channel, where: str) -> dict[str, Any]:
    """The answer to GetVersion.

    Raises:
        VersionMismatch: major or minor version differ from ours.
    """
    stub: Any = checkpoint_pb2_grpc.CheckpointServiceStub(channel)  # type: ignore[no-untyped-call]
    try:
        answer = plain(stub.GetVersion(pb.GetVersionRequest(), timeout=CONNECT_TIMEOUT_S))
    except grpc.RpcError as failure:
        raise error_of(failure, where) from None
    if answer["version"].split(".")[:2] != VERSION.split(".")[:2]:
        raise VersionMismatch(
            f"the service at {where} is version {answer['version']}, this command is {VERSION}",
            hint=f"restart the service (its pid is {answer['pid']}; targets run on when it ends)",
        )
    return answer


class Client:
    """Calls to one service; each raises the service's errors.  Use it as a context manager.

    A call that finds the service gone before it has answered anything is made once more, to the service that
    `open_channel` then finds or starts: an idle one may end at any time.
    """

    def __init__(self, open_channel: Callable[[], grpc.Channel], where: str, timeout_s: float | None) -> None:
        self.where = where
        self.timeout_s = timeout_s
        self._open_channel = open_channel
        self._use(open_channel())

    def _use(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self._stub: Any = checkpoint_pb2_grpc.CheckpointServiceStub(channel)  # type: ignore[no-untyped-call]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def version(self) -> dict[str, Any]:
        """The service's version, pid and store."""
        return self._unary("GetVersion", pb.GetVersionRequest())

    def status(self) -> dict[str, Any]:
        return self._unary("GetStatus", pb.GetStatusRequest())

    def check(self, pid: int | None = None) -> dict[str, Any]:
        return self._unary("Check", pb.CheckRequest(pid=pid or 0))

    def track(self, pid: int, *, backend: str = "", precise: bool = False) -> dict[str, Any]:
        return self._unary("Track", pb.TrackRequest(pid=pid, backend=backend, precise=precise))

    def untrack(self, pid: int) -> dict[str, Any]:
        return self._unary("Untrack", pb.UntrackRequest(pid=pid))

    def dump(self, pid: int, **options: Any) -> Iterator[dict[str, Any]]:
        """Events of a dump; `options` are the fields of DumpRequest.  The last one is the summary."""
        return self._events("Dump", pb.DumpRequest(pid=pid, **options))

    def restore(self, image: str, **options: Any) -> Iterator[dict[str, Any]]:
        """Events of a restore; `options` are the fields of RestoreRequest.  The last one is the summary."""
        return self._events("Restore", pb.RestoreRequest(image=image, **options))

    def verify(self, image: str = "", *, store: str = "") -> Iterator[dict[str, Any]]:
        """Events of a verify; with no image, of all of them."""
        return self._events("Verify", pb.VerifyRequest(image=image, store=store))

    def measure(self, pid: int, **options: Any) -> Iterator[dict[str, Any]]:
        """Events of a measurement; `options` are the fields of MeasureRequest.  The last one is the summary."""
        return self._events("Measure", pb.MeasureRequest(pid=pid, **options))

    def watch(self, operation_id: str) -> Iterator[dict[str, Any]]:
        """All events of an operation from its start."""
        for message in self._stream("WatchOperation", pb.WatchOperationRequest(operation_id=operation_id)):
            kind = message.WhichOneof("event")
            yield {"operation": kind, **event(getattr(message, kind))}

    def cancel(self, operation_id: str) -> dict[str, Any]:
        """Cancel an operation; returns when it has ended."""
        return self._unary("CancelOperation", pb.CancelOperationRequest(operation_id=operation_id))

    def list(self, *, store: str = "") -> dict[str, Any]:
        return self._unary("List", pb.ListRequest(store=store))

    def get(self, image: str, *, store: str = "") -> dict[str, Any]:
        """An image with its manifest (a dict)."""
        answer = self._unary("Get", pb.GetRequest(image=image, store=store))
        return {"image": answer["image"], **json.loads(answer["manifest_json"] or "{}")}

    def delete(self, images: Iterable[str], *, store: str = "") -> dict[str, Any]:
        return self._unary("Delete", pb.DeleteRequest(images=[*images], store=store))

    def export(self, image: str, *, store: str = "") -> Iterator[bytes]:
        """The image's id (as ASCII) first, then the bytes of the portable file."""
        for message in self._stream("Export", pb.ExportRequest(image=image, store=store)):
            yield message.data or message.image_id.encode("ascii")

    def import_file(self, source: Readable, *, store: str = "") -> dict[str, Any]:
        """Send a portable file; returns the new image."""

        def requests() -> Iterator[pb.ImportRequest]:
            yield pb.ImportRequest(header=pb.ImportHeader(store=store))
            while chunk := source.read(CHUNK_BYTES):
                yield pb.ImportRequest(data=chunk)

        with self._errors():
            return plain(self._stub.Import(requests(), timeout=self.timeout_s))

    def _unary(self, name: str, request: Any) -> dict[str, Any]:
        for may_repeat in (True, False):
            try:
                with self._errors():
                    return plain(getattr(self._stub, name)(request, timeout=self.timeout_s))
            except ServiceUnreachable as error:
                self._reconnect(error, may_repeat)
        raise AssertionError("unreachable")

    def _events(self, name: str, request: Any) -> Iterator[dict[str, Any]]:
        return map(event, self._stream(name, request))

    def _stream(self, name: str, request: Any) -> Iterator[Any]:
        answered = False
        for may_repeat in (True, False):
            try:
                with self._errors():
                    for message in getattr(self._stub, name)(request, timeout=self.timeout_s):
                        answered = True
                        yield message
                return
            except ServiceUnreachable as error:
                self._reconnect(error, may_repeat and not answered)

    def _reconnect(self, error: ServiceUnreachable, may_repeat: bool) -> None:
        if not may_repeat or isinstance(error, VersionMismatch):
            raise error
        self._channel.close()
        self._use(self._open_channel())

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as failure:
            raise error_of(failure, self.where) from None
