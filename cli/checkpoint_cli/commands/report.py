# SPDX-License-Identifier: Apache-2.0
"""`checkpoint report`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from checkpoint_cli.options import Session, session_options
from checkpoint_cli.output import print_document
from checkpointd.errors import UsageError
from checkpointd.report import record

FORMATS = ("table", "html", "csv", "jsonl")
_BY_ENDING = {".html": "html", ".htm": "html", ".csv": "csv", ".jsonl": "jsonl", ".txt": "table"}


@click.command(
    "report",
    short_help="Show a recorded measurement.",
    epilog="\b\nexample:\n  checkpoint report redis.jsonl -o redis.html",
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-o", "--output", default="-", metavar="FILE", help="Where to write it (default: here).")
@click.option(
    "--format", "form", type=click.Choice(FORMATS), default=None, help="How (default: by the name's end)."
)
@click.option("-f", "--force", is_flag=True, help="Replace an existing file.")
@session_options
def command(session: Session, file: Path, output: str, form: str | None, force: bool) -> None:
    """Show what `checkpoint measure -o FILE` recorded: as a table, or as a page with charts.

    Nothing is measured again, and no service is needed.
    """
    measurement = record.load(file)
    form = form or _BY_ENDING.get(os.path.splitext(output)[1].lower(), "table")
    if session.json:
        from dataclasses import asdict  # noqa: PLC0415

        from checkpointd.report.summary import summarise  # noqa: PLC0415

        print_document(asdict(summarise(measurement)))
        return
    if form == "html":
        from checkpointd.report.page import html  # noqa: PLC0415

        text = html(measurement)
    elif form == "jsonl":
        text = file.read_text(encoding="utf-8")
    else:
        from checkpointd.report.text import csv_text, table  # noqa: PLC0415

        text = csv_text(measurement) if form == "csv" else table(measurement)
    if output == "-":
        click.echo(text, nl=False)
        return
    try:
        # what a record says of a process is not everybody's business
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_TRUNC if force else os.O_EXCL)
        with os.fdopen(os.open(output, flags, 0o600), "w", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError:
        raise UsageError(f"{output} exists already", hint="choose another name, or give --force") from None
    except OSError as error:
        raise UsageError(f"cannot write {output}: {error.strerror}", hint="check the directory") from None
    session.say(f"{output} written")
