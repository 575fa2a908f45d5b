# SPDX-License-Identifier: Apache-2.0
"""Telling the service manager how we are.  Does nothing when there is none.

Source: sd_notify(3).
"""

from __future__ import annotations

import contextlib
import os
import socket


def notify(state: str) -> None:
    """Send e.g. "READY=1" to the socket named in $NOTIFY_SOCKET."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        with contextlib.suppress(OSError):  # a manager that went away must not stop us
            sock.sendto(state.encode(), address)
