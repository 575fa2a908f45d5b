# SPDX-License-Identifier: Apache-2.0
"""`checkpoint show`."""

from __future__ import annotations

from typing import Any

import click

from checkpoint_cli.options import IMAGE_HELP, Session, complete_image, session_options, store_option
from checkpoint_cli.output import local_time, print_document, printable, size

PROT = ((1, "r"), (2, "w"), (4, "x"))


@click.command(
    "show",
    short_help="Look into an image.",
    epilog="\b\nexample:\n  checkpoint show latest --vmas",
    help=f"Look into an image.\n\n{IMAGE_HELP}",
)
@click.argument("image", shell_complete=complete_image)
@click.option("--vmas", is_flag=True, help="List the mappings too.")
@store_option
@session_options
def command(session: Session, image: str, vmas: bool, store: str) -> None:
    with session.client() as client:
        answer = client.get(image, store=store)
    if session.json:
        print_document(answer)
        return
    found = answer["image"]
    facts = [
        ("id", found["id"]),
        ("parent", found["parent_id"] or "none: a full image"),
        ("tag", found["tag"]),
        ("created", local_time(found["created_at"])),
        ("process", f"{found['pid']} ({found['name']})"),
        ("command", " ".join(found["cmdline"].split())),
        ("host", found["host"]),
        ("backend", found["backend"]),
        ("memory", f"{found['nr_pages']} pages, {size(found['nr_pages'] * 4096)}"),
        ("written", size(found["bytes_raw"])),
        ("deltas", f"{found['pages_delta']} pages" if found["pages_delta"] else ""),
        ("stored", size(found["bytes_stored"])),
        ("format", str(found["format_version"])),
    ]
    for name, value in facts:
        if value:
            click.echo(f"{name:9}{printable(value)}")
    state = answer.get("state")
    if problem := answer.get("state_problem"):
        click.echo(f"restore  not possible: {printable(problem)}")
    if isinstance(state, dict):
        _print_counts(state)
        if vmas:
            _print_vmas(state.get("address_space") or {})


def _print_counts(state: dict[str, Any]) -> None:
    for name, room, key in (
        ("threads", "process", "threads"),
        ("mappings", "address_space", "vmas"),
        ("shared", "address_space", "objects"),
        ("files", "files", "descriptors"),
    ):
        found = (state.get(room) or {}).get(key)
        if found:
            click.echo(f"{name:9}{len(found)}")


def _print_vmas(space: dict[str, Any]) -> None:
    for vma in space.get("vmas", ()):
        prot = "".join(letter if vma["prot"] & bit else "-" for bit, letter in PROT)
        click.echo(
            f"{vma['start']:012x}-{vma['end']:012x} {prot}{'s' if vma['shared'] else 'p'} "
            f"{(vma['end'] - vma['start']) >> 12:>8} {vma['kind']:12} {printable(vma['path'])}".rstrip()
        )
