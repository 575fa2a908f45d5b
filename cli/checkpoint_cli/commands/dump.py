# SPDX-License-Identifier: Apache-2.0
"""`checkpoint dump`."""

from __future__ import annotations

from typing import Any

import click

from checkpoint_cli.follow import follow
from checkpoint_cli.options import (
    BACKENDS,
    DURATION,
    Session,
    files_options,
    pid_option,
    session_options,
    store_option,
)
from checkpoint_cli.output import duration, short_id, size, tell

EPILOG = """\b
example:
  checkpoint dump -p 1234 --tag before-upgrade
  checkpoint dump -p 1234 --incremental --max-frozen 200ms
"""


@click.command("dump", short_help="Save a running process as a new image.", epilog=EPILOG)
@pid_option
@click.option("-i", "--incremental", is_flag=True, help="Save only what changed since the parent image.")
@click.option(
    "--parent", default="", metavar="IMAGE", help="Parent of --incremental (default: the last image)."
)
@click.option("--delta", is_flag=True, help="Store changed pages of --incremental as differences.")
@click.option("--backend", type=click.Choice(BACKENDS), default="auto", help="How changes are found.")
@click.option("--kill", is_flag=True, help="Kill the process once the image is safe.")
@click.option(
    "--max-frozen", type=DURATION, default=0, help="Give up rather than freeze it longer, e.g. 200ms."
)
@click.option("--compress", default="", metavar="HOW", help="zstd, zstd:LEVEL or none.")
@click.option(
    "--tag",
    default="",
    metavar="NAME",
    help="Name for the image; tag:NAME finds it. Letters, digits and ._:+@/-.",
)
@click.option(
    "--read-mode", type=click.Choice(["auto", "stopped", "fork"]), default="auto", help="How memory is read."
)
@files_options
@store_option
@session_options
def command(session: Session, pid: int, max_frozen: int, **options: Any) -> None:
    """Save a running process as a new image.

    The process runs on unless --kill is given, and stays tracked so that a later `dump --incremental` saves
    only what changed; `untrack` ends that.  Ctrl-C cancels the dump: the process runs on and no image is made.
    """
    if options["parent"] and not options["incremental"]:
        raise click.UsageError("--parent goes with --incremental")
    if options["delta"] and not options["incremental"]:
        raise click.UsageError("--delta goes with --incremental")
    with session.client() as client:
        events = client.dump(pid, max_frozen_us=max_frozen, **options)
        summary = follow(session, client, events, f"dump of {pid}")
    if not session.json:
        _show(session, summary, killed=options["kill"])


def _show(session: Session, summary: dict[str, Any], *, killed: bool) -> None:
    for warning in summary["warnings"]:
        tell(f"checkpoint: {warning}")
    if session.quiet:
        click.echo(summary["image_id"])
        return
    kind = f"incremental, parent {short_id(summary['parent_id'])}" if summary["parent_id"] else "full"
    fate = ", which was killed" if killed else ""
    session.say(f"image {short_id(summary['image_id'])} ({kind}) of pid {summary['pid']}{fate}")
    if summary["backend_reason"]:
        session.say(f"  changes  found by {summary['backend']}: {summary['backend_reason']}")
    session.say(
        f"  pages    {summary['pages_scanned']} scanned: {summary['pages_written']} written, "
        f"{summary['pages_skipped_parent']} in the parent, {summary['pages_same']} the same, "
        f"{summary['pages_zero']} zero"
    )
    if summary["pages_delta"]:
        session.say(f"  deltas   {summary['pages_delta']} of the written pages are stored as differences")
    elif summary["delta_reason"]:
        session.say(f"  deltas   none: {summary['delta_reason']}")
    all_bytes = summary["pages_scanned"] * 4096
    saved = f", saves {100 - 100 * summary['bytes_stored'] / all_bytes:.1f} %" if all_bytes else ""
    session.say(
        f"  size     {size(summary['bytes_raw'])}, {size(summary['bytes_stored'])} stored "
        f"of {size(all_bytes)}{saved}"
    )
    session.say(
        f"  time     frozen {duration(summary['frozen_time'])} (freezing {duration(summary['freezing_time'])}), "
        f"{duration(summary['total_time'])} in all"
    )
