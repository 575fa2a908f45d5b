# SPDX-License-Identifier: Apache-2.0
"""`checkpoint serve`."""

from __future__ import annotations

import os
import signal
import struct
import sys

import click

from checkpoint_cli.options import Session, session_options
from checkpoint_cli.output import print_document
from checkpointd.errors import CheckpointError, NotPermitted, ServiceUnreachable, UsageError

STOP_TIMEOUT_S = 30


@click.command(
    "serve",
    short_help="Run the service in the foreground, or stop it.",
    epilog="\b\nexample:\n  checkpoint serve -- --store /srv/images --idle-exit 600",
)
@click.option(
    "--stop", is_flag=True, help="End the service that runs; processes it tracks are let go and run on."
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[-- OPTIONS OF checkpointd]")
@session_options
def command(session: Session, stop: bool, arguments: tuple[str, ...]) -> None:
    """Run the service in the foreground, as `checkpointd` does.

    Not needed for everyday use: a command that finds no service starts one.
    """
    if stop:
        _stop(session)
        return
    given = ["--socket", session.socket] if session.socket else []
    os.execv(sys.executable, [sys.executable, "-m", "checkpointd.service.main", *given, *arguments])  # noqa: S606 - no shell is the point


def _stop(session: Session) -> None:
    if session.connect:
        raise UsageError(
            "--stop ends a service of this machine, not one that is reached with --connect",
            hint="run it on the service's machine, or leave --connect out",
        )
    with session.client(start=False) as client:
        pid = client.version()["pid"]
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            raise _not_here(pid) from None
        try:
            # with the process held, so that its number cannot be another's by now
            if _listener(client.where) != pid:
                raise _not_here(pid)
        except BaseException:
            os.close(fd)
            raise
    try:
        try:
            signal.pidfd_send_signal(fd, signal.SIGTERM)
        except ProcessLookupError:
            pass  # it ends already
        except PermissionError:
            raise NotPermitted(
                f"the service (pid {pid}) belongs to another user, and only that user or root may end it",
                hint="run this as that user or as root; `checkpoint untrack` lets go of a process",
                pid=pid,
            ) from None
        import select  # noqa: PLC0415

        ended = bool(select.select([fd], [], [], STOP_TIMEOUT_S)[0])
    finally:
        os.close(fd)
    if session.json:
        print_document({"pid": pid, "ended": ended})
    elif ended:
        session.say(f"the service (pid {pid}) has ended")
    if not ended:
        raise CheckpointError(
            f"the service (pid {pid}) was told to end and has not done so within {STOP_TIMEOUT_S} s",
            hint="it ends once its operations are cancelled; its log says what it waits for",
        )


def _listener(path: str) -> int:
    """Pid, as this pid namespace has it, of the process that listens at a socket; 0 when it has none here."""
    import socket  # noqa: PLC0415

    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError as error:
            raise ServiceUnreachable(
                f"no service listens at {path} any more: {error.strerror}",
                hint="look with `checkpoint status`",
            ) from None
        credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[0])


def _not_here(pid: int) -> CheckpointError:
    return UsageError(
        f"the service calls itself pid {pid}, which it is not here: it runs in another pid namespace",
        hint="run this where the service runs (in its container)",
        pid=pid,
    )
