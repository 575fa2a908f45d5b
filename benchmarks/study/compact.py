# SPDX-License-Identifier: Apache-2.0
"""The study's records as the repository keeps them: the same JSON lines without what docs/savings.md does not need.

A kept record is WHERE/NAME-REPEAT.jsonl.xz (`xzcat` shows it) of the format of docs/measuring.md.  Left out are the
lists of mappings, the heat maps, and what tells of the machine and of nothing else; every count, every size and
whatever was missed is there.  A program that could not be measured is a record of one line, of type "lacking".
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterable, Iterator
from pathlib import Path

from checkpointd.report import record

SUFFIX = ".jsonl.xz"
_EMPTIED = {
    "header": {"host": "", "pid": 0, "cmdline": ""},
    "epoch": {"mappings": [], "objects": [], "heat": [], "heat_pages": 0},
    "backend": {"mappings": []},
}


def compacted(found: record.Record) -> record.Record:
    """This line without the bulk; still one that `checkpointd.report.record` reads."""
    empty = _EMPTIED.get(found["type"], {})
    found = {key: empty.get(key, value) for key, value in found.items()}
    if found["type"] == "header":
        found["kernel"] = found["kernel"].split("-")[0]
    return found


def keep(made: Path, kept: Path) -> None:
    """Keep the record `made` as `kept`.

    Raises:
        ValueError: a line of it is no JSON.
    """
    write((json.loads(text) for text in made.read_text(encoding="utf-8").splitlines()), kept)


def write(lines: Iterable[record.Record], kept: Path) -> None:
    """Keep these lines, whole or not at all."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    part = kept.with_suffix(".part")
    text = "".join(record.line(compacted(found)) + "\n" for found in lines)
    part.write_bytes(lzma.compress(text.encode(), preset=9))
    part.rename(kept)


def read(kept: Path) -> list[record.Record]:
    """All lines of a kept record."""
    return [json.loads(text) for text in lzma.decompress(kept.read_bytes()).decode().splitlines()]


def cut_short(part: Path, why: str) -> Iterator[record.Record]:
    """What a measurement that was stopped leaves: its whole runs, and a word on those that are not.

    A run is whole when all its epochs were judged.  With no whole run it is one line of type "lacking".
    """
    lines: list[record.Record] = []
    for text in part.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break  # it was stopped in the middle of a line
    if lines:
        header = lines[0]
        last = {
            found["run"]
            for found in lines
            if found["type"] == "backend" and found["epoch"] == header["epochs"]
        }
        if last:
            for found in lines:
                if found.get("run", min(last)) in last:
                    yield found
            for number, names in enumerate(header["runs"]):
                if number not in last:
                    yield {"type": "skipped", "run": number, "backends": names, "why": why}
            yield {"type": "end", "reason": why}
            return
    yield {"type": "lacking", "why": why}
