# SPDX-License-Identifier: Apache-2.0
"""`checkpoint untrack`."""

from __future__ import annotations

import click

from checkpoint_cli.options import Session, pid_option, session_options
from checkpoint_cli.output import print_document


@click.command(
    "untrack",
    short_help="End the tracking of a process; it runs on.",
    epilog="\b\nexample:\n  checkpoint untrack -p 1234",
)
@pid_option
@session_options
def command(session: Session, pid: int) -> None:
    """End the tracking of a process and take everything of ours out of it.  It runs on."""
    with session.client() as client:
        result = client.untrack(pid)
    if session.json:
        print_document(result)
    else:
        session.say(f"pid {pid} is no longer tracked")
