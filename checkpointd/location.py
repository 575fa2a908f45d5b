# SPDX-License-Identifier: Apache-2.0
"""Where a user's service listens and where its images go, when nothing else is said.

Both sides, service and client, must agree on these without talking.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from checkpointd.errors import NotPermitted, UsageError

SOCKET_NAME = "checkpointd.sock"
MAX_SOCKET_PATH = 107  # sun_path of unix(7), less the final NUL
MAX_PORT = 65535


def runtime_directory(environ: Mapping[str, str] = os.environ, uid: int | None = None) -> Path:
    """/run/checkpointd for root, $XDG_RUNTIME_DIR/checkpointd for others, else /tmp/checkpointd-UID."""
    uid = os.geteuid() if uid is None else uid
    if uid == 0:
        return Path("/run/checkpointd")
    base = environ.get("XDG_RUNTIME_DIR", "")
    if base.startswith("/"):
        return Path(base, "checkpointd")
    return Path(f"/tmp/checkpointd-{uid}")  # noqa: S108 - checked by `check_private_directory` before use


def default_socket(environ: Mapping[str, str] = os.environ) -> Path:
    """$CHECKPOINT_SOCKET, else the socket in the runtime directory."""
    given = environ.get("CHECKPOINT_SOCKET", "")
    return checked_socket_path(given) if given else runtime_directory(environ) / SOCKET_NAME


def default_store(environ: Mapping[str, str] = os.environ, uid: int | None = None) -> Path:
    """$CHECKPOINT_STORE, else /var/lib/checkpointd for root, $XDG_STATE_HOME/checkpointd for others."""
    given = environ.get("CHECKPOINT_STORE", "")
    if given:
        return Path(given).absolute()
    uid = os.geteuid() if uid is None else uid
    if uid == 0:
        return Path("/var/lib/checkpointd")
    base = environ.get("XDG_STATE_HOME", "")
    return Path(base if base.startswith("/") else Path.home() / ".local/state") / "checkpointd"


def checked_socket_path(path: str | Path) -> Path:
    """The absolute path of a socket.

    Raises:
        UsageError: longer than the kernel takes.
    """
    full = Path(path).absolute()
    size_bytes = len(os.fsencode(full))
    if size_bytes > MAX_SOCKET_PATH:
        raise UsageError(
            f"the socket path {full} has {size_bytes} bytes; the kernel takes at most {MAX_SOCKET_PATH}",
            hint="give a shorter path with --socket",
        )
    return full


def checked_address(address: str, option: str, *, lowest_port: int = 1) -> tuple[str, int]:
    """Host and port of "HOST:PORT", as given with `option`; brackets around a host of IPv6 are taken off.

    Raises:
        UsageError: it is not of that form, or there is no such port.
    """
    host, colon, port = address.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    in_brackets = len(host) - len(bare) == 2
    try:
        bare.encode("idna")
    except UnicodeError:  # an empty label, or one that is too long
        bare = ""
    if not (colon and bare and port.isascii() and port.isdigit()) or (":" in bare) != in_brackets:
        raise UsageError(
            f"{address} is not HOST:PORT", hint=f"e.g. {option} host.example:7777, or [::1]:7777 for IPv6"
        )
    if len(port) > len(str(MAX_PORT)) or not lowest_port <= int(port) <= MAX_PORT:
        raise UsageError(
            f"there is no port {port}: ports are {lowest_port} to {MAX_PORT}",
            hint=f"give another with {option}",
        )
    return bare, int(port)


def check_private_directory(directory: Path) -> None:
    """Refuse a directory in which somebody else could have put, or could replace, our socket.

    Raises:
        NotPermitted: it is a symbolic link, belongs to another user (root may own it), or others may write.
        FileNotFoundError: there is none.
    """
    found = os.lstat(directory)
    if not stat.S_ISDIR(found.st_mode):
        raise NotPermitted(f"{directory} is not a directory", hint="remove it, or give another --socket")
    if found.st_uid not in (0, os.geteuid()):
        raise NotPermitted(
            f"{directory} belongs to user {found.st_uid}, who could listen in",
            hint="give a --socket in a directory of your own",
        )
    if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
        raise NotPermitted(
            f"everybody may write to {directory}, and so replace the socket",
            hint=f"chmod o-w {directory}, or give a --socket elsewhere",
        )
