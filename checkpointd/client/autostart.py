# SPDX-License-Identifier: Apache-2.0
"""Finding this user's service, and starting one when there is none.

Many clients may do so at once: every one tries, the service's own lock lets one through, and all connect to it.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from checkpointd.errors import Busy, NotPermitted, ServiceUnreachable, UsageError
from checkpointd.location import check_private_directory

IDLE_EXIT_S = 60.0
"""A service we started ends after that long with nothing to do."""

START_TIMEOUT_S = 20.0
POLL_S = 0.01
LOG_LIMIT_BYTES = 1 << 20


def is_listening(path: Path) -> bool:
    """Whether a service of ours (or root's) accepts connections at the socket.

    Raises:
        NotPermitted: we may not connect, or somebody else may have put the socket there.
    """
    try:
        check_private_directory(path.parent)
        owner = path.lstat().st_uid
        if owner not in (0, os.geteuid()):
            raise NotPermitted(
                f"the socket {path} belongs to user {owner}", hint="give a --socket of your own or of root"
            )
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
            probe.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError, ConnectionResetError):
        return False
    except (PermissionError, NotADirectoryError) as error:
        raise NotPermitted(
            f"the socket {path} is closed to this user: {error.strerror}",
            hint="become a member of the service's group, or use a service of your own: leave --socket out",
        ) from error
    return True


def ensure_service(path: Path, *, start: bool) -> subprocess.Popen[bytes] | None:
    """Return once somebody listens at the socket; start a service when nobody does and `start` is set.

    Returns the process we started, if any: it need not be the one that listens (see `drop_loser`).

    Raises:
        ServiceUnreachable: nobody listens and none was or could be started.
    """
    give_up = time.monotonic() + START_TIMEOUT_S
    service: subprocess.Popen[bytes] | None = None
    while not is_listening(path):
        if not start:
            raise ServiceUnreachable(
                f"no service listens at {path}", hint="start one: `checkpointd` or `checkpoint serve`"
            )
        status = service.poll() if service is not None else None
        if status not in (None, 0, Busy.exit_code):
            raise _did_not_start(path, f"it ended with status {status}")
        if service is None or status is not None:
            # Busy: another client's service holds the lock.  It will listen soon, or is just ending.
            service = _spawn(path)
        if time.monotonic() > give_up:
            raise _did_not_start(path, f"it did not listen within {START_TIMEOUT_S:.0f} s")
        time.sleep(POLL_S)
    return service


def drop_loser(service: subprocess.Popen[bytes] | None, winner_pid: int) -> None:
    """End the service we started when another one got the socket first.

    Left alone, one that starts slowly could take the socket later, after the winner's end, for nobody.
    """
    if service is not None and service.pid != winner_pid and service.poll() is None:
        service.terminate()
        service.wait()


def log_path(path: Path) -> Path:
    """Where a service that we start logs to."""
    return path.with_suffix(".log")


def _spawn(path: Path) -> subprocess.Popen[bytes]:
    try:
        path.parent.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.parent.mkdir(mode=0o750)
        except FileExistsError:
            check_private_directory(path.parent)
        log_fd = os.open(
            log_path(path), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )
    except OSError as error:
        raise NotPermitted(
            f"cannot use the socket directory {path.parent}: {error.strerror}",
            hint="give a --socket in a directory of your own",
        ) from error
    try:
        if os.fstat(log_fd).st_size > LOG_LIMIT_BYTES:
            os.ftruncate(log_fd, 0)
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "checkpointd.service.main"),
                *("--socket", str(path), "--idle-exit", str(IDLE_EXIT_S)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log_fd,
            stderr=log_fd,
            cwd="/",
            start_new_session=True,  # it outlives this command and its terminal
        )
    except OSError as error:
        raise UsageError(f"cannot start {sys.executable}: {error.strerror}") from error
    finally:
        os.close(log_fd)


def _did_not_start(path: Path, why: str) -> ServiceUnreachable:
    said = ""
    try:
        lines = log_path(path).read_text(errors="replace").splitlines()
        said = next((line for line in reversed(lines) if line.startswith("checkpointd: ")), "")
    except OSError:
        pass
    return ServiceUnreachable(
        f"the service for {path} did not start: {said.removeprefix('checkpointd: ') or why}",
        hint=f"its log is {log_path(path)}; `checkpoint serve` runs it in the foreground",
    )
