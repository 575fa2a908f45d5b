# SPDX-License-Identifier: Apache-2.0
"""`checkpoint track`."""

from __future__ import annotations

import click

from checkpoint_cli.options import BACKENDS, Session, pid_option, precise_option, session_options
from checkpoint_cli.output import print_document


@click.command(
    "track",
    short_help="Begin to track which memory of a process changes.",
    epilog="\b\nexample:\n  checkpoint track -p 1234",
)
@pid_option
@click.option("--backend", type=click.Choice(BACKENDS), default="auto", help="How changes are found.")
@precise_option
@session_options
def command(session: Session, pid: int, backend: str, precise: bool) -> None:
    """Begin to track which memory of a process changes.

    A dump does so by itself; `untrack` ends it.
    """
    with session.client() as client:
        result = client.track(pid, backend=backend, precise=precise)
    if session.json:
        print_document(result)
    else:
        session.say(f"pid {pid} is tracked by {result['backend']}: {result['backend_reason']}")
