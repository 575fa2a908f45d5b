# SPDX-License-Identifier: Apache-2.0
"""`checkpoint verify`."""

from __future__ import annotations

import click

from checkpoint_cli.follow import follow
from checkpoint_cli.options import IMAGE_HELP, Session, complete_image, session_options, store_option
from checkpoint_cli.output import counted, short_id, size
from checkpointd.errors import ImageDamaged


@click.command(
    "verify",
    short_help="Check every byte of images.",
    epilog="\b\nexample:\n  checkpoint verify latest",
    help="Read images whole and check every byte of them (all images when none is named).\n\n"
    f"{IMAGE_HELP}\n\nExits with 12 when damage is found.",
)
@click.argument("images", nargs=-1, metavar="[IMAGE]...", shell_complete=complete_image)
@store_option
@session_options
def command(session: Session, images: tuple[str, ...], store: str) -> None:
    failures: list[ImageDamaged] = []
    with session.client() as client:
        for image in images or ("",):
            what = f"verify of {image or 'all images'}"
            try:
                summary = follow(session, client, client.verify(image, store=store), what)
            except ImageDamaged as error:
                for image_id in error.details.get("whole", ()):
                    session.say(f"image {short_id(image_id)} is whole")
                failures.append(error)  # the other ones are looked at all the same
                continue
            session.say(
                f"{counted(len(summary['image_ids']), 'image')} whole, "
                f"{size(summary['bytes_checked'])} checked"
            )
    if len(failures) > 1:
        raise ImageDamaged(
            f"{len(failures)} of {len(images)} images are damaged",
            hint=failures[0].hint,
            problems=[error.message for error in failures],
        )
    if failures:
        raise failures[0]
