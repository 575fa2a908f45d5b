# SPDX-License-Identifier: Apache-2.0
"""`checkpoint serve`."""

from __future__ import annotations

import contextlib
import os
import signal
import sys

import click

from checkpoint_cli.options import Session, session_options


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

        with contextlib.suppress(KeyboardInterrupt):
            select.select([fd], [], [], 30)
    finally:
        os.close(fd)
    session.say(f"the service (pid {pid}) has ended")
