# SPDX-License-Identifier: Apache-2.0
"""Talking to a checkpointd service from Python::

    from checkpointd.client import connect

    with connect() as service:
        for event in service.dump(pid=1234):
            print(event)

Results are plain dicts with JSON types, named as in checkpointd.api.v1; errors are those of
checkpointd/errors.py, just as the service raised them.  gRPC is imported when a connection is made.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from checkpointd.client.connection import Client, ClientTls

__all__ = ["connect"]


def connect(
    socket: str | Path | None = None,
    *,
    start: bool = True,
    address: str = "",
    tls: ClientTls | None = None,
    timeout_s: float | None = None,
) -> Client:
    """Connect to a service, and start one for this user when none listens at the socket.

    Args:
        socket: the service's unix socket; None for this user's default.
        start: False never starts a service.
        address: "HOST:PORT" of a service on TCP instead; needs `tls`.
        timeout_s: deadline of every call made.

    Raises:
        ServiceUnreachable: nobody answers, or no service could be started.
        VersionMismatch: it is of another version.
        NotPermitted: the socket is closed to us, or lies where others could have put it.
    """
    from checkpointd.client.connection import connect_to_address, connect_to_socket  # noqa: PLC0415 - gRPC is heavy

    if address:
        return connect_to_address(address, tls, timeout_s)
    return connect_to_socket(socket, start=start, timeout_s=timeout_s)
