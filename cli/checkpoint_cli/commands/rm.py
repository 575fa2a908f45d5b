# SPDX-License-Identifier: Apache-2.0
"""`checkpoint rm`."""

from __future__ import annotations

import click

from checkpoint_cli.options import IMAGE_HELP, Session, complete_image, session_options, store_option
from checkpoint_cli.output import print_document, short_id


@click.command(
    "rm",
    short_help="Remove images; others stay whole.",
    epilog="\b\nexample:\n  checkpoint rm 3f2a latest~5",
    help=f"Remove images.  Images that had one of them as parent stay whole.\n\n{IMAGE_HELP}\n\n"
    "All names are looked up before the first image is removed.",
)
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...", shell_complete=complete_image)
@store_option
@session_options
def command(session: Session, images: tuple[str, ...], store: str) -> None:
    with session.client() as client:
        answer = client.delete(images, store=store)
    if session.json:
        print_document(answer)
    for image_id in answer["image_ids"]:
        session.say(f"removed {short_id(image_id)}")
