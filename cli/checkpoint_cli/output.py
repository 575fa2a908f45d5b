# SPDX-License-Identifier: Apache-2.0
"""How results look: JSON, tables, sizes and times."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from typing import Any

import click


def print_document(value: Any) -> None:
    """One JSON document on stdout."""
    click.echo(as_json(value, indent=2))


def print_line(value: Any) -> None:
    """One line of JSON lines on stdout."""
    click.echo(as_json(value))


def tell(text: str) -> None:
    """A line on stderr.  One that cannot be written (a full disk) changes nothing of what is done."""
    with contextlib.suppress(OSError):
        click.echo(text, err=True)


def as_json(value: Any, indent: int | None = None) -> str:
    """JSON; names that are not UTF-8 (a lone surrogate for each byte) stay escaped, as no output could take them."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent)
    return text


def printable(text: str) -> str:
    """For people's eyes: what would steer a terminal, or cannot be written at all, is escaped.

    Names of processes, their arguments and tags are anybody's, and an image may come from anywhere.
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)


def printable_lines(text: str) -> str:
    """The same of a text of ours, whose line ends are meant."""
    return "\n".join(printable(line) for line in text.split("\n"))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> None:
    """Columns as wide as they need; those named in `right` are numbers."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[at]) for row in (header, *rows)) for at in range(len(header))]
    for row in (header, *rows):
        cells = [
            cell.rjust(width) if name in right else cell.ljust(width)
            for cell, width, name in zip(row, widths, header, strict=True)
        ]
        click.echo("  ".join(cells).rstrip())


def size(nr_bytes: int) -> str:
    """E.g. "512 B", "1.4 MiB"."""
    value = float(nr_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{int(value)} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def counted(number: int, word: str) -> str:
    """E.g. "1 image", "3 images"."""
    return f"{number} {word}{'' if number == 1 else 's'}"


def duration(microseconds: int) -> str:
    """E.g. "850 us", "3.1 ms", "2.4 s"."""
    if microseconds < 1000:
        return f"{microseconds} us"
    if microseconds < 1_000_000:
        return f"{microseconds / 1e3:.1f} ms"
    return f"{microseconds / 1e6:.1f} s"


def short_id(image_id: str) -> str:
    return image_id[:12]


def local_time(rfc3339: str | None) -> str:
    """In this user's time zone, to the second; "-" for none."""
    import datetime  # noqa: PLC0415 - 5 ms that most commands do not need

    if not rfc3339:
        return "-"
    when = datetime.datetime.fromisoformat(rfc3339)
    try:
        return when.astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, ValueError):  # at the first or the last day of the calendar
        return when.strftime("%Y-%m-%d %H:%M:%S")
