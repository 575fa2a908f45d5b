# SPDX-License-Identifier: Apache-2.0
"""`checkpoint status`."""

from __future__ import annotations

import click

from checkpoint_cli.options import Session, session_options
from checkpoint_cli.output import local_time, print_document, print_table, short_id


@click.command(
    "status",
    short_help="Show the service, what it tracks and does.",
    epilog="\b\nexample:\n  checkpoint status --json",
)
@session_options
def command(session: Session) -> None:
    """Show the service, the processes it tracks and its operations.  Starts no service."""
    with session.client(start=False) as client:
        answer = {"service": client.version(), **client.status()}
    if session.json:
        print_document(answer)
        return
    service = answer["service"]
    session.say(f"service {service['version']}, pid {service['pid']}, images in {service['store']}")
    if answer["targets"]:
        session.say()
        print_table(
            ("PID", "NAME", "BACKEND", "LAST IMAGE", "IN USE BY"),
            [
                (
                    str(t["pid"]),
                    t["name"],
                    t["backend"],
                    short_id(t["last_image_id"]) or "-",
                    t["operation_id"] or "-",
                )
                for t in answer["targets"]
            ],
            right=("PID",),
        )
    if answer["operations"]:
        session.say()
        print_table(
            ("OPERATION", "KIND", "OF", "STATE", "SINCE"),
            [
                (
                    operation["id"],
                    operation["kind"],
                    str(operation["pid"] or short_id(operation["image_id"]) or "-"),
                    operation["state"],
                    local_time(operation["started_at"]),
                )
                for operation in answer["operations"]
            ],
        )
