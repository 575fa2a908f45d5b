# SPDX-License-Identifier: Apache-2.0
"""`checkpoint serve`."""

from __future__ import annotations

import os
import signal
import sys

import click

from checkpoint_cli.options import Session, session_options
from checkpoint_cli.output import print_document
from checkpointd.errors import CheckpointError

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
    with session.client(start=False) as client:
        pid = client.version()["pid"]
    fd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(fd, signal.SIGTERM)
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
