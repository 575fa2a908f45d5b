# SPDX-License-Identifier: Apache-2.0
"""`checkpoint watch`."""

from __future__ import annotations

import click

from checkpoint_cli.options import Session, session_options
from checkpoint_cli.output import print_line, short_id


@click.command(
    "watch",
    short_help="Follow an operation begun elsewhere.",
    epilog="\b\nexample:\n  checkpoint watch op-1f2e3d4c5b6a",
)
@click.argument("operation")
@session_options
def command(session: Session, operation: str) -> None:
    """Follow an operation that another command began, from its start to its end.

    OPERATION is its id, or a unique prefix of it; `checkpoint status` lists them.  Ctrl-C ends the watching only.
    """
    with session.client(start=False) as client:
        for event in client.watch(operation):
            if session.json:
                print_line(event)
            elif event["message_type"] == "phase":
                session.say(event["phase"])
            elif event["message_type"] == "progress" and session.verbose:
                session.say(f"{event['done']} of {event['total']} {event['unit']}")
            elif event["message_type"] == "summary":
                ids = [event["image_id"]] if event.get("image_id") else event.get("image_ids", ())
                session.say(f"done: {event['operation']} of image {', '.join(map(short_id, ids))}")
