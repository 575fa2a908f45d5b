# SPDX-License-Identifier: Apache-2.0
"""`checkpoint restore`."""

from __future__ import annotations

from typing import Any

import click

from checkpoint_cli.follow import follow
from checkpoint_cli.options import (
    BACKENDS,
    IMAGE_HELP,
    Session,
    complete_image,
    files_options,
    session_options,
    store_option,
)
from checkpoint_cli.output import counted, duration, short_id, tell

EPILOG = """\b
example:
  checkpoint restore latest
  checkpoint restore 3f2a --new-pid --tcp close
"""


@click.command(
    "restore",
    short_help="Bring an image back as a running process.",
    epilog=EPILOG,
    help=f"Bring an image back as a running process.\n\n{IMAGE_HELP}",
)
@click.argument("image", shell_complete=complete_image)
@click.option("--new-pid", is_flag=True, help="Take any free pid instead of the saved one.")
@files_options
@click.option(
    "--tty", type=click.Choice(["keep", "null"]), default="keep", help="The terminal it had, or none."
)
@click.option(
    "--changed",
    type=click.Choice(["refuse", "allow"]),
    default="refuse",
    help="Files that changed since the dump.",
)
@click.option(
    "--backend",
    "track_backend",
    type=click.Choice([*BACKENDS, "none"]),
    default="auto",
    help="How changes are found from now on; none leaves it untracked.",
)
@store_option
@session_options
def command(session: Session, image: str, **options: Any) -> None:
    with session.client() as client:
        summary = follow(session, client, client.restore(image, **options), f"restore of {image}")
    if session.json:
        return
    for warning in summary["warnings"]:
        tell(f"checkpoint: {warning}")
    if session.quiet:
        click.echo(str(summary["pid"]))
        return
    session.say(f"image {short_id(summary['image_id'])} runs as pid {summary['pid']}")
    tracked = f", tracked by {summary['tracking']}" if summary["tracking"] else ""
    session.say(
        f"  {counted(summary['nr_threads'], 'thread')}, {summary['pages_restored']} pages "
        f"in {duration(summary['total_time'])}{tracked}"
    )
