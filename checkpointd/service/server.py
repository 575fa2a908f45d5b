# SPDX-License-Identifier: Apache-2.0
"""The gRPC server around the servicer: sockets, their permissions, TLS, health, reflection, and the end.

One service per socket: it holds a lock beside it for as long as it lives, so that of two that start at once
one goes on and the other says so, and so that a socket left behind is known to be nobody's.
"""

from __future__ import annotations

import contextlib
import fcntl
import grp
import logging
import os
import shutil
import signal
import socket
import stat
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from checkpointd.api.v1 import checkpoint_pb2, checkpoint_pb2_grpc
from checkpointd.errors import Busy, Cancelled, NotPermitted, UsageError
from checkpointd.location import check_private_directory, checked_address
from checkpointd.service.agents import DEFAULT_COMMAND, Watchdog
from checkpointd.service.images import Stores
from checkpointd.service.interceptors import ActivityInterceptor, ErrorInterceptor
from checkpointd.service.notify import notify
from checkpointd.service.operations import OperationTable
from checkpointd.service.servicer import Servicer
from checkpointd.service.targets import TargetTable
from checkpointd.tls import Pems, read_files

log = logging.getLogger(__name__)

SERVICE_NAME = checkpoint_pb2.DESCRIPTOR.services_by_name["CheckpointService"].full_name

MAX_MESSAGE_BYTES = 64 << 20  # a manifest of very many VMAs; page data travels in chunks of 1 MiB
OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 64 << 10),
    ("grpc.so_reuseport", 0),  # two services on one TCP port would share its clients between them
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
]

MAX_CALLS = 128  # at once; one that follows an operation holds its thread, further ones wait
SOCKET_UMASK = 0o117  # 0660
DRAIN_S = 5.0
IDLE_POLL_S = 0.25


@dataclass(frozen=True)
class TlsFiles:
    """Mutual TLS: our certificate and key, and the authority that signed the clients'."""

    certificate: Path
    key: Path
    client_ca: Path


@dataclass(frozen=True)
class ServerConfig:
    """How to serve.

    Attributes:
        group: who besides the owner may use the socket (its group); "" leaves the group alone.
        listen: "HOST:PORT", "" for none; needs `tls`.
        idle_exit_s: end after that long without targets, operations and calls; None: never.
    """

    socket: Path
    store: Path
    group: str = ""
    listen: str = ""
    tls: TlsFiles | None = None
    idle_exit_s: float | None = None
    agent_command: Sequence[str] = DEFAULT_COMMAND


class Server:
    """A running service; `run` returns when it was asked to stop or has been idle long enough."""

    def __init__(self, config: ServerConfig) -> None:
        if config.listen and config.tls is None:
            raise UsageError(
                "TCP is served with mutual TLS only",
                hint="give --tls-cert, --tls-key and --tls-client-ca, or leave --listen out",
            )
        if config.tls is not None and not config.listen:
            raise UsageError(
                "certificates are for TCP, which is not served without --listen",
                hint="give --listen HOST:PORT too, or leave the --tls-... options out",
            )
        if config.listen:
            checked_address(config.listen, "--listen", lowest_port=0)
        files = config.tls
        pems = read_files(files.certificate, files.key, files.client_ca) if files is not None else None
        self.config = config
        self._stop = threading.Event()
        self._lock_fd = _claim(config.socket, config.group)
        self._targets = TargetTable(config.agent_command)
        self._operations = OperationTable()
        self._activity = ActivityInterceptor()
        self._health = health.HealthServicer()
        self._server = grpc.server(
            ThreadPoolExecutor(max_workers=MAX_CALLS, thread_name_prefix="call"),
            interceptors=[self._activity, ErrorInterceptor()],
            options=OPTIONS,
        )
        checkpoint_pb2_grpc.add_CheckpointServiceServicer_to_server(  # type: ignore[no-untyped-call]
            Servicer(self._targets, self._operations, Stores(config.store)), self._server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        self._bind_socket()
        self.port = self._bind_tcp(pems) if pems is not None else 0
        self._watchdog = Watchdog(self._targets.agents)

    def run(self) -> None:
        """Serve until `stop`, the idle time, SIGTERM or SIGINT (where the main thread runs this)."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: self._stop.set())
        self._server.start()
        self._set_health(health_pb2.HealthCheckResponse.SERVING)
        log.info("serving at %s, images in %s", self.config.socket, self.config.store)
        if self.port:
            log.info("serving at %s, port %d, with mutual TLS", self.config.listen, self.port)
        notify("READY=1")
        while not self._stop.wait(IDLE_POLL_S):
            if self._is_idle():
                log.info("idle: ending")
                break
        self._end()

    def stop(self) -> None:
        self._stop.set()

    def _is_idle(self) -> bool:
        limit_s = self.config.idle_exit_s
        return (
            limit_s is not None
            and self._activity.idle_s() >= limit_s
            and not self._targets.targets()
            and not self._operations.running()
        )

    def _end(self) -> None:
        """Cancel what runs, let every target go, then close."""
        notify("STOPPING=1")
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        stopped = self._server.stop(DRAIN_S)  # no new calls from here on
        running = self._operations.running()
        for operation in running:
            error = Cancelled(f"the {operation} was cancelled: the service is ending", hint="try again")
            threading.Thread(target=operation.cancel, args=(error,), daemon=True).start()
        for operation in running:
            operation.wait(DRAIN_S)
        self._watchdog.stop()
        self._targets.close()
        stopped.wait(DRAIN_S)
        with contextlib.suppress(OSError):
            if self.config.socket.is_socket():  # it could have been replaced
                self.config.socket.unlink()
        os.close(self._lock_fd)
        log.info("ended")

    def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in ("", SERVICE_NAME):
            self._health.set(name, status)

    def _bind_socket(self) -> None:
        path = self.config.socket
        with contextlib.suppress(FileNotFoundError):
            path.unlink()  # a socket nobody listens at (`_claim`), and we hold the lock: whoever made it is gone
        before = os.umask(SOCKET_UMASK)
        try:
            self._server.add_insecure_port(f"unix:{path}")
        except RuntimeError as error:
            raise NotPermitted(
                f"cannot listen at {path}: {error}", hint="give another path with --socket"
            ) from error
        finally:
            os.umask(before)
        if self.config.group:
            try:
                shutil.chown(path, group=self.config.group)
            except PermissionError as error:
                raise NotPermitted(
                    f"{path} cannot be given to group {self.config.group}: {error.strerror}",
                    hint="name a group that the service's user is a member of, or run it as root",
                ) from error
        if stat.S_IMODE(path.stat().st_mode) & 0o117:
            raise NotPermitted(
                f"{path} got the mode {stat.S_IMODE(path.stat().st_mode):o}, not 660",
                hint="give a --socket on a file system that keeps modes",
            )

    def _bind_tcp(self, pems: Pems) -> int:
        credentials = grpc.ssl_server_credentials(
            [(pems.key, pems.certificate)], root_certificates=pems.authority, require_client_auth=True
        )
        hint = "give --listen HOST:PORT of a free port of this machine"
        try:
            _try_to_bind(*checked_address(self.config.listen, "--listen", lowest_port=0))
            port = self._server.add_secure_port(self.config.listen, credentials)
        except OSError as error:
            raise UsageError(f"cannot listen at {self.config.listen}: {error.strerror}", hint=hint) from error
        except RuntimeError as error:
            raise UsageError(f"cannot listen at {self.config.listen}: {error}", hint=hint) from error
        if port == 0:
            raise UsageError(f"cannot listen at {self.config.listen}", hint=hint)
        return int(port)


def _try_to_bind(host: str, port: int) -> None:
    """gRPC has no error for what is wrong with an address, and writes lines of its own to stderr.

    Raises:
        OSError: none of the host's addresses can be bound.
    """
    failure: OSError | None = None
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
            return
        except OSError as error:
            failure = error
    if failure is not None:
        raise failure


def _claim(socket_path: Path, group: str) -> int:
    """Make the socket's directory (0750) when there is none, and lock the socket's name.

    Raises:
        Busy: another service has it, or another program listens there.
        UsageError: something else than a socket is there.
        NotPermitted: the directory is not ours to trust, or `group` cannot be let into it.
    """
    directory = socket_path.parent
    _refuse_what_is_no_socket(socket_path)
    if group:
        try:
            grp.getgrnam(group)
        except KeyError:
            raise UsageError(
                f"there is no group {group!r}", hint=f"create it: groupadd --system {group}"
            ) from None
    try:
        made = _make_directory(directory)
        check_private_directory(directory)
        if group:
            _let_in(socket_path, group, made)
        fd = os.open(f"{socket_path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise NotPermitted(
            f"cannot use the socket directory {directory}: {error.strerror}",
            hint="give a --socket in a directory of your own",
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise Busy(
            f"another service is listening at {socket_path}", hint="use it, or give another --socket"
        ) from None
    if _is_listened_at(socket_path):
        os.close(fd)
        raise Busy(
            f"another program, not a checkpointd, is listening at {socket_path}", hint="give another --socket"
        )
    return fd


def _refuse_what_is_no_socket(path: Path) -> None:
    """The name is going to be unlinked: a file, a directory or a device (/dev/null) must not be lost by that."""
    try:
        mode = path.lstat().st_mode
    except OSError:
        return
    if not stat.S_ISSOCK(mode):
        raise UsageError(
            f"{path} is there and is not a socket: nothing was changed",
            hint="give another --socket, or remove it first",
        )


def _is_listened_at(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except BlockingIOError:  # its queue is full
            return True
        except OSError:
            return False
    return True


def _make_directory(directory: Path) -> bool:
    """Make it (0750) and what is missing above it (0755), whatever the umask; was it missing?"""
    for parent in reversed(directory.parents):
        with contextlib.suppress(FileExistsError):
            parent.mkdir()
            parent.chmod(0o755)
    try:
        directory.mkdir(mode=0o750)
    except FileExistsError:
        return False
    directory.chmod(0o750)
    return True


def _let_in(socket_path: Path, group: str, made: bool) -> None:
    """Let members of `group` pass through the socket's directory.

    One that was there is given to the group only if it holds nothing but this socket and what goes with it: whatever
    else lies in it is not for us to open.

    Raises:
        NotPermitted: that cannot be done, or a directory above is closed to them.
    """
    directory, gid = socket_path.parent, grp.getgrnam(group).gr_gid
    if made or not _passable(directory, gid):
        by_hand = f"chgrp {group} {directory} && chmod 750 {directory}, or give a --socket in a directory of its own"
        own = {
            socket_path.name,
            f"{socket_path.name}.lock",
            socket_path.with_suffix(".log").name,
        }  # the last one is autostart's
        strangers = sorted({path.name for path in directory.iterdir()} - own)
        if strangers:
            raise NotPermitted(
                f"group {group} may not enter {directory}, which holds other things too, such as {strangers[0]}",
                hint=by_hand,
            )
        try:
            os.chown(directory, -1, gid)
            directory.chmod(0o750)
        except PermissionError as error:
            raise NotPermitted(
                f"{directory} cannot be given to group {group}: {error.strerror}", hint=f"as root: {by_hand}"
            ) from error
    for parent in directory.parents:
        if not _passable(parent, gid):
            raise NotPermitted(
                f"group {group} may not pass through {parent} to the socket",
                hint=f"give a --socket elsewhere, e.g. in /run, or let the group pass: chmod o+x {parent}",
            )


def _passable(directory: Path, gid: int) -> bool:
    """May members of the group go through?  (They may also be let through by an ACL: its mask is the group's bits.)"""
    found = directory.stat()
    if found.st_mode & stat.S_IXOTH and found.st_gid != gid:
        return True
    if not found.st_mode & stat.S_IXGRP:
        return False
    return found.st_gid == gid or _has_acl(directory)


def _has_acl(directory: Path) -> bool:
    try:
        return "system.posix_acl_access" in os.listxattr(directory)
    except OSError:  # a file system without
        return False
