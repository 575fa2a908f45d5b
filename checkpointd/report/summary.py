# SPDX-License-Identifier: Apache-2.0
"""A measurement in figures: per backend, per mapping, and what it cost the program.

`None` stands for what was not measured.  Averages are arithmetic means over epochs; a `Spread` keeps the lowest and
the highest beside it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from checkpointd.report.record import Measurement, Record, Run

CAUSES = ("written", "new", "new_zero", "forced", "merged", "huge", "silent")


@dataclass(frozen=True, slots=True)
class Spread:
    mean: float
    low: float
    high: float

    @staticmethod
    def of(values: Iterable[float | None]) -> Spread | None:
        known = [value for value in values if value is not None]
        return Spread(sum(known) / len(known), min(known), max(known)) if known else None


@dataclass(frozen=True, slots=True)
class MappingShare:
    """What one mapping added, pages per epoch on average."""

    name: str
    reported: float
    changed: float
    over_reported: float
    missed: int


@dataclass(frozen=True, slots=True)
class BackendSummary:
    """One backend over all its epochs; pages and bytes are per epoch."""

    name: str
    run: int
    advisory: bool
    nr_epochs: int
    read: Spread
    reported: Spread
    changed: Spread
    over_reported: Spread
    silent: Spread
    missed: int
    bytes_raw: Spread
    bytes_packed: Spread
    bytes_stored: Spread
    collect_us: Spread | None
    copy_us: Spread | None
    frozen_us: Spread | None
    """Freeze without the full read, with the copy of what is reported: what a dump would have had."""
    causes: dict[str, float]
    mappings: list[MappingShare]

    @property
    def over_ratio(self) -> float | None:
        """Pages over-reported for each page that changed."""
        return self.over_reported.mean / self.changed.mean if self.changed.mean else None


@dataclass(frozen=True, slots=True)
class RunSummary:
    """The program itself during one run."""

    run: int
    backends: list[str]
    nr_epochs: int
    held: Spread
    changed: Spread
    vmas: Spread
    vmas_after: Spread | None
    first_vmas: int
    last_vmas: int
    freezing_us: Spread
    lines: float
    written: float
    bytes_lines: float
    bytes_xor: float
    bytes_written_stored: float
    cpu: float | None
    """CPU seconds a second of running, and the same before it was tracked."""
    cpu_before: float | None
    faults: float | None
    faults_before: float | None
    throughput: Spread | None
    throughput_before: float | None


@dataclass(frozen=True, slots=True)
class Summary:
    title: str
    backends: list[BackendSummary]
    runs: list[RunSummary]
    missed: list[tuple[str, int, str, str]] = field(default_factory=list)
    """(backend, epoch, page and mapping, why)"""
    notes: list[str] = field(default_factory=list)


def summarise(measurement: Measurement) -> Summary:
    header = measurement.header
    backends = [_backend(name, run) for name, run in measurement.backends()]
    missed = [
        (name, epoch, found["page"], found["why"])
        for run in measurement.runs
        for name, records in run.backends.items()
        for epoch, judged in sorted(records.items())
        for found in judged["missed"]
    ]
    notes = [f"{name} was not measured: {why}" for name, why in header.get("unavailable", {}).items()]
    notes += [f"{' + '.join(r['backends'])} was not measured: {r['why']}" for r in measurement.skipped]
    if measurement.end is None:
        notes.append("the record has no end: the measuring was killed")
    elif measurement.end["reason"] != "done":
        notes.append(f"it ended early: {measurement.end['reason']}")
    unreadable = max(
        (e["pages_unreadable"] for run in measurement.runs for e in run.epochs.values()), default=0
    )
    if unreadable:
        notes.append(f"{unreadable} pages could not be read and are left out")
    title = f"{header['comm']} (pid {header['pid']}) on {header['host']}, Linux {header['kernel']}"
    runs = [_run(run) for run in measurement.runs if _judged(run)]
    return Summary(title, backends, runs, missed, notes)


def mapping_name(row: Sequence[object]) -> str:
    """A short name for a row `[place, start, end, prot, path, ...]`."""
    place, start, _end, prot, path = row[:5]
    text = str(path)
    if isinstance(place, int) and place < 0:
        return f"shared {text or 'anonymous'}"
    if not text:
        return f"anonymous {start:x}"
    if text.startswith("["):
        return text
    return f"{text.rsplit('/', 1)[-1]} {str(prot)[:3]}"


def _judged(run: Run) -> list[Record]:
    """Truths of epochs that were judged, in order."""
    return [epoch for number, epoch in sorted(run.epochs.items()) if number > 0]


def _spread(records: Sequence[Record], key: str) -> Spread:
    found = Spread.of(record[key] for record in records)
    assert found is not None
    return found


def _backend(name: str, run: Run) -> BackendSummary:
    records = [record for _, record in sorted(run.backends[name].items())]
    frozen = []
    for number, record in sorted(run.backends[name].items()):
        epoch = run.epochs.get(number)
        if epoch is not None and record["copy_us"] is not None:
            others = sum(o[number]["collect_us"] or 0 for key, o in run.backends.items() if key != name)
            frozen.append(epoch["frozen_us"] - epoch["truth_us"] - others + record["copy_us"])
    return BackendSummary(
        name=name,
        run=run.number,
        advisory=bool(records[0].get("advisory")),
        nr_epochs=len(records),
        read=_spread(records, "pages_read"),
        reported=_spread(records, "pages_reported"),
        changed=_spread(records, "pages_changed"),
        over_reported=_spread(records, "pages_over_reported"),
        silent=_spread(records, "pages_silent"),
        missed=sum(record["pages_missed"] for record in records),
        bytes_raw=_spread(records, "bytes_raw"),
        bytes_packed=_spread(records, "bytes_packed"),
        bytes_stored=_spread(records, "bytes_stored"),
        collect_us=Spread.of(record["collect_us"] for record in records),
        copy_us=Spread.of(record["copy_us"] for record in records),
        frozen_us=Spread.of(frozen),
        causes={c: sum(r["causes"][c] for r in records) / len(records) for c in CAUSES},
        mappings=_shares(name, run),
    )


def _shares(name: str, run: Run) -> list[MappingShare]:
    total: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    records = run.backends[name]
    for number, record in records.items():
        rows = {row[0]: row for row in run.epochs[number]["mappings"]} if number in run.epochs else {}
        for place, *counts in record["mappings"]:
            label = mapping_name(rows[place]) if place in rows else "mappings not listed"
            for n, count in enumerate(counts):
                total[label][n] += count
    nr = len(records)
    shares = [MappingShare(k, v[0] / nr, v[1] / nr, v[2] / nr, v[3]) for k, v in total.items()]
    return sorted(shares, key=lambda share: (-share.missed, -share.reported))


def _run(run: Run) -> RunSummary:
    epochs = _judged(run)
    running = sum(epoch["running_us"] for epoch in epochs)
    base = run.baseline
    rates = {number: _rate(run, number) for number in run.epochs}

    def mean(key: str) -> float:
        return sum(float(epoch[key]) for epoch in epochs) / len(epochs)

    return RunSummary(
        run=run.number,
        backends=run.start["backends"],
        nr_epochs=len(epochs),
        held=_spread(epochs, "pages_held"),
        changed=_spread(epochs, "pages_changed"),
        vmas=_spread(epochs, "nr_vmas"),
        vmas_after=Spread.of(epoch.get("nr_vmas_after") for epoch in epochs),
        first_vmas=run.epochs[0]["nr_vmas"] if 0 in run.epochs else epochs[0]["nr_vmas"],
        last_vmas=epochs[-1]["nr_vmas"],
        freezing_us=_spread(epochs, "freezing_us"),
        lines=mean("lines_changed"),
        written=mean("pages_written"),
        bytes_lines=mean("bytes_lines"),
        bytes_xor=mean("bytes_xor"),
        bytes_written_stored=mean("bytes_written_stored"),
        cpu=sum(epoch["cpu_us"] for epoch in epochs) / running if running else None,
        cpu_before=base["cpu_us"] / base["running_us"] if base else None,
        faults=sum(epoch["minor_faults"] for epoch in epochs) * 1e6 / running if running else None,
        faults_before=base["minor_faults"] * 1e6 / base["running_us"] if base else None,
        throughput=Spread.of(rate for number, rate in rates.items() if number > 0),
        throughput_before=rates.get(0),
    )


def _rate(run: Run, number: int) -> float | None:
    begin, end = run.probes.get((number, "begin")), run.probes.get((number, "end"))
    if begin is None or end is None or end["t_us"] <= begin["t_us"]:
        return None
    return float((end["value"] - begin["value"]) * 1e6 / (end["t_us"] - begin["t_us"]))
