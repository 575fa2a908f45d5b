# SPDX-License-Identifier: Apache-2.0
"""`checkpoint ls`."""

from __future__ import annotations

import click

from checkpoint_cli.options import Session, session_options, store_option
from checkpoint_cli.output import local_time, print_document, print_table, short_id, size

HEADER = ("ID", "PARENT", "CREATED", "PID", "NAME", "BACKEND", "PAGES", "DELTAS", "STORED", "TAG")


@click.command("ls", short_help="List images.", epilog="\b\nexample:\n  checkpoint ls")
@click.option("-p", "--pid", type=int, default=0, metavar="PID", help="Only images of that process.")
@click.option("--no-trunc", is_flag=True, help="Print ids whole.")
@store_option
@session_options
def command(session: Session, pid: int, no_trunc: bool, store: str) -> None:
    """List the images of a store, oldest first."""
    with session.client() as client:
        answer = client.list(store=store)
    if pid:
        answer["images"] = [image for image in answer["images"] if image["pid"] == pid]
    if session.json:
        print_document(answer)
        return
    if session.quiet:
        for image in answer["images"]:
            click.echo(image["id"])
        return
    if not answer["images"]:
        session.note(f"no images in {answer['store']}; `checkpoint dump -p PID` makes one")
        return
    name = str if no_trunc else short_id
    rows = [
        (
            name(image["id"]),
            name(image["parent_id"]) or "-",
            local_time(image["created_at"]),
            str(image["pid"] or "-"),
            image["name"] or "-",
            image["backend"] or "-",
            str(image["nr_pages"]),
            str(image["pages_delta"] or "-"),
            size(image["bytes_stored"]),
            image["tag"] or ("DAMAGED" if image["damaged"] else ""),
        )
        for image in answer["images"]
    ]
    print_table(HEADER, rows, right=("PID", "PAGES", "DELTAS", "STORED"))
