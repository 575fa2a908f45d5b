# SPDX-License-Identifier: Apache-2.0
"""The record of a measurement: JSON lines, one object a line, told apart by "type" (docs/measuring.md).

The first line is the header and carries the version.  Readers skip types and keys they do not know; a file that
ends in the middle of a line (the machine went down) is read up to there.

Times are microseconds, sizes bytes, `pages_*` count 4 KiB pages, `t_us` counts from the header.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpointd.errors import UsageError

FORMAT = "checkpointd-measurement"
VERSION = 1
TYPES = ("header", "run", "skipped", "baseline", "epoch", "backend", "probe", "end")

Record = dict[str, Any]


@dataclass
class Run:
    """Trackers that ran side by side over one stretch of the target's life.

    Attributes:
        epochs: the records of type "epoch" by their number; number 0 is the full read that began the first epoch.
        backends: backend name -> its records by number of the epoch.
        probes: what the throughput probe said, "begin" and "end" of each epoch; epoch 0 is the baseline.
    """

    number: int
    start: Record
    baseline: Record | None = None
    epochs: dict[int, Record] = field(default_factory=dict)
    backends: dict[str, dict[int, Record]] = field(default_factory=dict)
    probes: dict[tuple[int, str], Record] = field(default_factory=dict)


@dataclass
class Measurement:
    """A record, read."""

    header: Record
    runs: list[Run]
    skipped: list[Record] = field(default_factory=list)
    end: Record | None = None

    @property
    def nr_missed(self) -> int:
        """Over all backends but those that only show what the kernel's bits would have said."""
        return sum(
            record["pages_missed"]
            for run in self.runs
            for records in run.backends.values()
            for record in records.values()
            if not record.get("advisory")
        )

    def backends(self) -> list[tuple[str, Run]]:
        """Every backend once, with the first run it was judged in."""
        found: dict[str, Run] = {}
        for run in self.runs:
            for name in run.backends:
                found.setdefault(name, run)
        return list(found.items())


def line(record: Record) -> str:
    """One record as a line, without its newline."""
    return json.dumps(record, separators=(",", ":"), ensure_ascii=False)


def parse(lines: Iterable[str], where: str = "the record") -> Measurement:
    """The measurement in these lines.

    Raises:
        UsageError: no header, another version, or a line in the middle that is no JSON object.
    """
    measurement: Measurement | None = None
    broken = 0
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        if broken:
            raise UsageError(f"{where}: line {broken} is not a JSON object", hint="the file is damaged")
        try:
            found = json.loads(text)
        except ValueError:
            broken = number  # forgiven at the end of the file only
            continue
        if not isinstance(found, dict):
            broken = number
            continue
        if measurement is None:
            measurement = Measurement(_header(found, where), [])
        else:
            _add(measurement, found)
    if measurement is None:
        raise UsageError(f"{where} holds no measurement", hint="`checkpoint measure -o FILE` makes one")
    return measurement


def load(path: Path) -> Measurement:
    """Read a file.

    Raises:
        UsageError: see `parse`; or it cannot be opened.
    """
    try:
        with path.open(encoding="utf-8") as file:
            return parse(file, str(path))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", hint="check the name") from None
    except UnicodeDecodeError:
        raise UsageError(
            f"{path} is no record of a measurement", hint="give the file of `measure -o`"
        ) from None


def _header(found: Record, where: str) -> Record:
    if found.get("type") != "header" or found.get("format") != FORMAT:
        raise UsageError(f"{where} is no record of a measurement", hint="give the file of `measure -o`")
    if found.get("version") != VERSION:
        raise UsageError(
            f"{where} is a record of version {found.get('version')}; this program reads version {VERSION}",
            hint="use the checkpoint command that made it, or a newer one",
        )
    return found


def _add(measurement: Measurement, found: Record) -> None:
    kind = found.get("type")
    if kind == "end":
        measurement.end = found
        return
    if kind not in TYPES or kind == "header":
        return
    if kind == "skipped":
        measurement.skipped.append(found)
        return
    if kind == "run":
        measurement.runs.append(Run(int(found["run"]), found))
        return
    run = next((run for run in reversed(measurement.runs) if run.number == found["run"]), None)
    if run is None:
        return
    if kind == "baseline":
        run.baseline = found
    elif kind == "epoch":
        run.epochs[int(found["epoch"])] = found
    elif kind == "backend":
        run.backends.setdefault(str(found["backend"]), {})[int(found["epoch"])] = found
    elif kind == "probe":
        run.probes[int(found["epoch"]), str(found["edge"])] = found
