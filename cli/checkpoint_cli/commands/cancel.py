# SPDX-License-Identifier: Apache-2.0
"""`checkpoint cancel`."""

from __future__ import annotations

import click

from checkpoint_cli.options import Session, session_options
from checkpoint_cli.output import print_document


@click.command(
    "cancel", short_help="Cancel an operation.", epilog="\b\nexample:\n  checkpoint cancel op-1f2e"
)
@click.argument("operation")
@session_options
def command(session: Session, operation: str) -> None:
    """Cancel an operation and wait for its end.  The process of a cancelled dump runs on.

    OPERATION is its id, or a unique prefix of it; `checkpoint status` lists them.
    """
    with session.client(start=False) as client:
        answer = client.cancel(operation)
    if session.json:
        print_document(answer)
    else:
        session.say("cancelled" if answer["state"] == "failed" else f"it was {answer['state']} already")
