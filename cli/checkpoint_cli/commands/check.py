# SPDX-License-Identifier: Apache-2.0
"""`checkpoint check`."""

from __future__ import annotations

import click

from checkpoint_cli.options import Session, session_options
from checkpoint_cli.output import print_document


@click.command(
    "check",
    short_help="Say what the kernel, the user and a process allow.",
    epilog="\b\nexample:\n  checkpoint check -p 1234",
)
@click.option(
    "-p", "--pid", type=click.IntRange(min=1), default=None, metavar="PID", help="Look at a process too."
)
@session_options
def command(session: Session, pid: int | None) -> int:
    """Say what this kernel, this user and a process allow.  Nothing is frozen.

    Exits with 0 when all that is required is there, with 6 when the kernel or the user lacks something and
    with 7 when the process holds state that cannot be saved.
    """
    with session.client() as client:
        result = client.check(pid)
    failed = [item for item in result["items"] if not item["ok"] and item["category"] != "optional"]
    if session.json:
        print_document(result)
    else:
        for item in result["items"]:
            mark = "ok     " if item["ok"] else "missing" if item["category"] == "optional" else "PROBLEM"
            session.say(f"{mark} {item['name']}: {item['detail']}")
            if not item["ok"] and item["hint"]:
                session.say(f"        {item['hint']}")
        if result["backend"]:
            session.say(f"Changes will be found by {result['backend']}: {result['backend_reason']}.")
        session.say("Looks good." if not failed else f"{len(failed)} of these must be solved first.")
    if not failed:
        return 0
    return 7 if all(item["category"] == "target" for item in failed) else 6
