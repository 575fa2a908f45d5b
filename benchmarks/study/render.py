# SPDX-License-Identifier: Apache-2.0
"""docs/savings.md from the records of the study, and from nothing else: no figure is written here by hand.

"(a to b)" are the lowest and the highest of a program's repeats; one measured once has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.study.answer import answer
from benchmarks.study.seen import (
    CALM,
    COST,
    NATIVE,
    Cost,
    Study,
    Value,
    most_vmas,
    over,
    packed,
    packed_of_stored,
    raw,
    stored,
    xor_share,
)
from benchmarks.study.workloads import WORKLOADS
from checkpointd.report.summary import Spread
from checkpointd.report.text import count, size, time

PAGE = 4096
MISSING = "-"
PLAIN, BARRIER, PRECISE, UFFD_WP = "soft-dirty", "barrier-soft-dirty", "precise-soft-dirty", "uffd-wp"
BIT = " bit"
ROWS = (PLAIN + BIT, PRECISE + BIT, BARRIER + BIT, PLAIN, PRECISE, BARRIER, UFFD_WP)


def cell(spread: Spread | None, form: Callable[[float], str]) -> str:
    if spread is None:
        return MISSING
    low, high = form(spread.low), form(spread.high)
    return form(spread.mean) if low == high else f"{form(spread.mean)} ({low} to {high})"


def percent(value: float) -> str:
    return f"{value:.0f} %" if abs(value) >= 10 else f"{value:.1f} %"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows that are shorter than the header are filled up."""
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield "| " + " | ".join([*row, *[""] * (len(header) - len(row))]) + " |"
    yield ""


def render(directory: Path) -> str:
    return "\n".join(_lines(Study(directory))) + "\n"


def _lines(study: Study) -> Iterator[str]:
    yield "# What exact tracking saves, on real programs"
    yield ""
    yield "<!-- made by `make study` from its records; change benchmarks/study/render.py, not this file -->"
    yield ""
    if not study.seen:
        yield "Nothing was measured yet."
        return
    yield from _how(study)
    yield from _beside(study)
    for where in study.places:
        yield from _native(study) if where == NATIVE else _guest(study, where)
    yield from _missed(study)
    yield from _within(study)
    yield "## The answer"
    yield ""
    yield from answer(study, percent)
    yield ""


def _how(study: Study) -> Iterator[str]:
    yield "## How it was measured"
    yield ""
    repeats = max(len(seen) for by in study.seen.values() for b in by.values() for seen in b.values())
    where = ", ".join(
        f"{name} (Linux {study.kernels[name]}, {len(study.programs(name))} of {len(WORKLOADS)} programs)"
        for name in study.places
    )
    epochs = sorted({h["epochs"] for h in study.headers})
    yield (
        f"Each program ran under a load generator of its own kind: {where}. One repeat is "
        f"{' or '.join(map(str, epochs))} intervals of {study.headers[0]['interval_us'] // 1000} ms; at most "
        f"{repeats} repeats of a program, each from a fresh start. docs/measuring.md says what the words mean. The "
        "truth is a byte comparison of two full reads. Guests are emulated and run smaller data: pages and bytes there "
        "mean something, seconds do not, and a program does less between two freezes than natively. A figure with a "
        "range is the mean of the repeats, with their lowest and highest; one without was measured once, or came out "
        "the same. The records are in benchmarks/study/records, and `make study` measures what is not there."
    )
    yield ""


def _beside(study: Study) -> Iterator[str]:
    """Ratios within one run only: no two runs do the same work to the page."""
    stock, precise = study.place("stock"), study.place("precise")
    if not stock and not precise:
        return
    sides = (
        ("soft-dirty", stock, PLAIN + BIT),
        ("precise (the patch)", precise, PRECISE + BIT),
        ("emulated (merge barrier)", stock, BARRIER + BIT),
        ("uffd-wp", stock, UFFD_WP),
    )
    yield "## Side by side"
    yield ""
    names = [name for name in WORKLOADS if any(name in study.seen.get(w, {}) for w in (stock, precise))]

    def rows(value: Value, form: Callable[[float], str]) -> list[tuple[str, ...]]:
        return [
            (name, *(cell(study.spread(where, name, backend, value), form) for _, where, backend in sides))
            for name in names
        ]

    heads = ("program", *(head for head, _, _ in sides))
    yield "Pages over-reported, for each page that changed:"
    yield ""
    yield from table(heads, rows(over, percent))
    yield "Size of a dump that writes what is reported; 1.00 is one that holds only what changed:"
    yield ""
    yield from table(heads, rows(packed_of_stored, lambda value: f"{value:.2f}"))
    yield (
        "Under 1.00: some pages compress better with others in one block. "
        "The soft-dirty columns are the kernel's bits believed as they are, which is what the patch is about; both "
        f"kernels are of one version ({stock or '-'}, {precise or '-'}). What this project makes of the bits is below."
    )
    yield ""


def _native(study: Study) -> Iterator[str]:
    yield "## Natively: uffd-wp beside content"
    yield ""
    rows: list[tuple[str, ...]] = []
    for name in WORKLOADS:

        def of(value: Value, form: Callable[[float], str], backend: str = UFFD_WP, name: str = name) -> str:
            return cell(study.spread(NATIVE, name, backend, value), form)

        title = f"{name}: {WORKLOADS[name].what}"
        if name not in study.seen[NATIVE]:
            rows.append((title, f"not measured: {study.why_not(NATIVE, name)}"))
            continue
        rows.append(
            (
                title,
                of(lambda s: s.run.held.mean * PAGE, size),
                of(lambda s: s.run.changed.mean * PAGE, size),
                of(over, percent),
                of(lambda s: 100 * s.backend.silent.mean / max(1.0, s.backend.reported.mean), percent),
                of(lambda s: 100 * s.backend.causes["forced"] / max(1.0, s.backend.reported.mean), percent),
                of(raw, size),
                of(packed, size),
                of(stored, size),
                of(lambda s: float(s.backend.missed), count),
            )
        )
    yield from table(
        (
            *("program", "held", "changed an interval", "over-reported / changed", "silent of reported"),
            *("forced of reported", "raw", "packed", "stored", "missed"),
        ),
        rows,
    )
    yield (
        "*silent*: pages written with the bytes they held. *forced*: copied-on-write pages of program files, which are "
        "not tracked. A tool that writes what its tracker reports pays *packed*; one that compares pays *stored*."
    )
    yield ""
    yield from _cost(study)


def _cost(study: Study) -> Iterator[str]:
    """VMAs and throughput of the native runs."""
    costs = {name: study.cost(name) for name in study.programs(NATIVE)}
    calm = any(costs.values())
    heads = ["program", "VMAs when armed", "VMAs at most"]
    if calm:
        heads += [
            "CPU time for one, untracked",
            "more when tracked",
            "half of the pairs",
            "throughput lost",
            "pairs",
        ]
    rows = []
    for name, cost in costs.items():
        row = [name]
        row += [cell(study.spread(NATIVE, name, UFFD_WP, lambda s: float(s.run.first_vmas)), count)]
        row += [cell(study.spread(NATIVE, name, UFFD_WP, most_vmas), count)]
        if calm:
            row += _cost_cells(cost) if cost else [f"not measured: {study.why_not(COST, name)}"]
        rows.append(row)
    yield "What tracking by uffd-wp costs the program while it runs, freezes left out:"
    yield ""
    yield from table(heads, rows)
    if calm:
        yield (
            "*one*: what the program's load counts, such as a request or a step. Intervals without and with tracking "
            "took turns, each in an epoch of a measurement, and each tracked one is held against the mean of its two "
            "neighbours: medians, and where the middle half of these pairs lies; where that half spans 0, the cost is "
            f"less than the noise. The load was {min(study.loads[True]):.1f} to {max(study.loads[True]):.1f}."
        )
        yield ""
    yield from _busy(study)


def _busy(study: Study) -> Iterator[str]:
    if loads := study.loads[False]:
        costs = {name: study.cost(name, calm=False) for name in study.programs(NATIVE)}
        less = {name: cost.more_cpu for name, cost in costs.items() if cost and cost.more_cpu.high < 0}
        yield (
            f"Cost in time counts only at a load of at most {CALM:.0f} for each processor. {len(loads)} pairs of "
            f"intervals without and with tracking are left out: others kept the machine at a load of {min(loads):.1f} "
            f"to {max(loads):.1f}."
            + "".join(
                f" There {name} took {-middle.median:.0f} % less CPU time for the same work when tracked, which "
                "tracking cannot do: others on the machine, or the method, are not understood, and no figure of it is "
                "claimed."
                for name, middle in less.items()
            )
        )
        yield ""


def _cost_cells(cost: Cost) -> list[str]:
    more = cost.more_cpu
    return [
        time(cost.cpu_ns / 1000),
        percent(more.median),
        f"{percent(more.low)} to {percent(more.high)}",
        percent(cost.lost.median),
        str(more.nr_pairs),
    ]


def _guest(study: Study, where: str) -> Iterator[str]:
    yield f"## In the {where} guest"
    yield ""
    rows: list[tuple[str, ...]] = []
    for name in WORKLOADS:
        if name not in study.seen[where]:
            rows.append((name, MISSING, f"not measured: {study.why_not(where, name)}"))
            continue
        for backend in ROWS:

            def of(
                value: Value, form: Callable[[float], str], name: str = name, backend: str = backend
            ) -> str:
                return cell(study.spread(where, name, backend, value), form)

            if backend not in study.seen[where][name]:
                if why := study.skipped[where][name].get(backend):
                    rows.append((name, backend, f"not measured: {why}"))
                continue
            rows.append(
                (
                    name,
                    backend,
                    of(lambda s: s.backend.reported.mean, count),
                    of(lambda s: s.backend.changed.mean, count),
                    of(over, percent),
                    of(lambda s: s.backend.causes["merged"], count),
                    of(raw, size),
                    of(packed, size),
                    of(stored, size),
                    of(lambda s: float(s.backend.missed), count),
                    of(most_vmas, count),
                    of(lambda s: None if s.run.vmas_after is None else s.run.vmas_after.mean, count),
                    of(lambda s: s.clear_us, count),
                )
            )
    yield from table(
        (
            *("program", "reporter", "reported", "changed", "over / changed", "merged"),
            *("raw", "packed", "stored", "missed", "VMAs at most", "VMAs after the clear", "clear_refs, us"),
        ),
        rows,
    )
    yield (
        "A *bit* is the kernel's soft-dirty bit believed as it is; the backend of that name is what this project makes "
        "of it. Each backend's run had the program started afresh. VMAs are counted before the trackers collect and "
        "after: what is less after the clear has been merged again. Times are of an emulated machine."
    )
    yield ""


def _missed(study: Study) -> Iterator[str]:
    lost = [
        (where, name, backend, sum(s.backend.missed for s in seen))
        for where, programs in study.seen.items()
        for name, backends in programs.items()
        for backend, seen in backends.items()
        if sum(s.backend.missed for s in seen)
    ]
    yield "## Missed pages"
    yield ""
    if not lost:
        yield "No reporter missed a page that changed, not even the bits believed as they are."
        yield ""
        return
    yield from table(
        ("where", "program", "reporter", "pages missed"),
        [(where, name, backend, str(nr)) for where, name, backend, nr in lost],
    )


def _within(study: Study) -> Iterator[str]:
    where = study.places[0]
    yield "## Within pages"
    yield ""
    rows = []
    for name in study.programs(where):
        backend = next(iter(study.seen[where][name]))
        pairs: tuple[tuple[Value, Callable[[float], str]], ...] = (
            (lambda s: s.run.lines / s.run.written if s.run.written else None, lambda v: f"{v:.1f}"),
            (lambda s: s.run.bytes_written_stored, size),
            (lambda s: s.run.bytes_xor, size),
            (lambda s: s.run.bytes_lines, size),
            (xor_share, percent),
        )
        rows.append((name, *(cell(study.spread(where, name, backend, value), form) for value, form in pairs)))
    yield from table(
        (
            "program",
            "lines of 64 that differ",
            "whole pages, packed",
            "XORed, packed",
            "as lines",
            "XORed / whole",
        ),
        rows,
    )
    yield (
        f"Of written pages, per interval ({where}): how many of the 64 lines of a page differ, and what these pages "
        "take whole, as differences from what they held, and as the lines alone (not compressed)."
    )
    yield ""
