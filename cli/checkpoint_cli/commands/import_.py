# SPDX-License-Identifier: Apache-2.0
"""`checkpoint import`."""

from __future__ import annotations

import sys

import click

from checkpoint_cli.options import Session, session_options, store_option
from checkpoint_cli.output import print_document, short_id
from checkpointd.errors import UsageError


@click.command(
    "import",
    short_help="Take in an exported file.",
    epilog="\b\nexample:\n  checkpoint import redis.ckpt && checkpoint restore latest",
)
@click.argument("file", metavar="FILE")
@store_option
@session_options
def command(session: Session, file: str, store: str) -> None:
    """Take an exported file into the store as a new image ("-": from the standard input).

    Restoring an imported image runs the code in it with the credentials it names: import only files you trust.
    """
    try:
        source = sys.stdin.buffer if file == "-" else open(file, "rb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise UsageError(
            f"cannot read {file}: {error.strerror}", hint="name a file made by export"
        ) from error
    with source, session.client() as client:
        answer = client.import_file(source, store=store)
    image = answer["image"]
    if session.json:
        print_document(answer)
    elif session.quiet:
        click.echo(image["id"])
    else:
        session.say(
            f"image {short_id(image['id'])} imported ({image['name'] or 'unnamed'}, pid {image['pid']})"
        )
