# SPDX-License-Identifier: Apache-2.0
"""Reports as text: tables for a terminal, and CSV with one line per epoch and backend."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence

from checkpointd.report.record import Measurement
from checkpointd.report.summary import CAUSES, RunSummary, Spread, Summary, summarise

MISSING = "-"
_PAGE = 4096
_TOP = 8

CSV_COLUMNS = (
    *("run", "epoch", "backend", "t_us", "running_us", "cpu_us", "minor_faults"),
    *("freezing_us", "frozen_us", "truth_us", "collect_us", "copy_us", "nr_vmas", "nr_threads"),
    *("pages_held", "pages_changed_truth", "pages_read", "pages_reported", "pages_changed"),
    *("pages_over_reported", "pages_silent", "pages_missed"),
    *(f"cause_{name}" for name in CAUSES),
    *("bytes_raw", "bytes_packed", "bytes_stored", "lines_changed", "bytes_lines", "bytes_xor"),
    "bytes_written_stored",
)


def size(nr_bytes: float) -> str:
    """E.g. "512 B", "1.4 MiB"."""
    value = float(nr_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def time(microseconds: float) -> str:
    """E.g. "850 us", "3.1 ms"."""
    if microseconds < 1000:
        return f"{microseconds:.0f} us"
    return f"{microseconds / 1e3:.1f} ms" if microseconds < 1e6 else f"{microseconds / 1e6:.2f} s"


def count(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"


def _mean(spread: Spread | None, form: object = count) -> str:
    return form(spread.mean) if spread is not None and callable(form) else MISSING


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """First column left, all others right."""
    widths = [max(len(row[n]) for row in (header, *rows)) for n in range(len(header))]
    for row in (header, *rows):
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        yield "  ".join(cells).rstrip()


def table(measurement: Measurement) -> str:
    """The whole report for a terminal."""
    return "\n".join(_lines(summarise(measurement))) + "\n"


def _lines(found: Summary) -> Iterator[str]:
    yield found.title
    for run in found.runs:
        yield (
            f"run {run.run + 1}: {' + '.join(run.backends)}, {run.nr_epochs} epochs; "
            f"{size(run.held.mean * _PAGE)} held, {size(run.changed.mean * _PAGE)} changed an epoch"
        )
    if not found.backends:
        yield "nothing was measured"
        yield from (f"note: {note}" for note in found.notes)
        return
    yield ""
    yield "pages per epoch"
    yield from _table(
        ("backend", "read", "reported", "changed", "over", "over/changed", "silent", "missed"),
        [
            (
                b.name,
                _mean(b.read),
                _mean(b.reported),
                _mean(b.changed),
                _mean(b.over_reported),
                MISSING if b.over_ratio is None else f"{100 * b.over_ratio:.1f} %",
                _mean(b.silent),
                str(b.missed),
            )
            for b in found.backends
        ],
    )
    yield ""
    yield "what it is made of (pages per epoch)"
    yield from _table(
        ("backend", *CAUSES),
        [(b.name, *(count(b.causes[cause]) for cause in CAUSES)) for b in found.backends],
    )
    yield ""
    yield "sizes and times per epoch"
    yield from _table(
        ("backend", "raw", "packed", "stored", "collecting", "copying", "frozen"),
        [
            (
                b.name,
                _mean(b.bytes_raw, size),
                _mean(b.bytes_packed, size),
                _mean(b.bytes_stored, size),
                _mean(b.collect_us, time),
                _mean(b.copy_us, time),
                _mean(b.frozen_us, time),
            )
            for b in found.backends
        ],
    )
    for b in found.backends:
        yield ""
        yield f"mappings by {b.name} (pages per epoch)"
        yield from _table(
            ("mapping", "reported", "changed", "over"),
            [
                (m.name, count(m.reported), count(m.changed), count(m.over_reported))
                for m in b.mappings[:_TOP]
            ],
        )
        if len(b.mappings) > _TOP:
            yield f"... and {len(b.mappings) - _TOP} more"
    for run in found.runs:
        yield ""
        yield from _program(run)
    if found.missed:
        yield ""
        yield "MISSED PAGES"
        for backend, epoch, page, why in found.missed:
            yield f"  epoch {epoch}, {backend}: {page}: {why}"
    yield from (f"note: {note}" for note in found.notes)


def _program(run: RunSummary) -> Iterator[str]:
    yield f"the program in run {run.run + 1}"
    yield f"  VMAs        {run.first_vmas} at the beginning, {run.last_vmas} at the end, {count(run.vmas.high)} at most"
    yield f"  freezing    {time(run.freezing_us.mean)}, {time(run.freezing_us.high)} at most"
    if run.cpu is not None and run.cpu_before is not None:
        yield f"  CPU         {100 * run.cpu_before:.1f} % untracked, {100 * run.cpu:.1f} % tracked"
    if run.faults is not None and run.faults_before is not None:
        yield f"  faults      {count(run.faults_before)}/s untracked, {count(run.faults)}/s tracked"
    if run.throughput is not None and run.throughput_before is not None:
        lost = 100 - 100 * run.throughput.mean / run.throughput_before if run.throughput_before else 0.0
        yield (
            f"  throughput  {count(run.throughput_before)}/s untracked, {count(run.throughput.mean)}/s tracked "
            f"({count(run.throughput.low)} to {count(run.throughput.high)}), {lost:+.1f} % lost while running"
        )
    if run.written:
        yield (
            f"  within pages: {run.lines / run.written:.1f} of 64 lines differ in a written page; as lines "
            f"{size(run.bytes_lines)}, XORed and packed {size(run.bytes_xor)}, whole and packed "
            f"{size(run.bytes_written_stored)} an epoch"
        )


def csv_text(measurement: Measurement) -> str:
    """One line per epoch and backend, after a line of column names."""
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV_COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for run in measurement.runs:
        for name, records in run.backends.items():
            for number, judged in sorted(records.items()):
                epoch = run.epochs.get(number, {})
                causes = {f"cause_{cause}": nr for cause, nr in judged["causes"].items()}
                truth = {"pages_changed_truth": epoch.get("pages_changed")}
                writer.writerow({**epoch, **truth, **judged, **causes, "backend": name})
    return out.getvalue()
