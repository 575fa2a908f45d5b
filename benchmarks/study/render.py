# SPDX-License-Identifier: Apache-2.0
"""docs/savings.md from the records of the study, and from nothing else: no figure is written here by hand.

A figure is the mean over the repeats of a program's mean over its epochs; "(a to b)" are the lowest and the highest of
these, and a program measured once has none.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.study.workloads import WORKLOADS
from checkpointd.report import record
from checkpointd.report.record import Measurement
from checkpointd.report.summary import BackendSummary, RunSummary, Spread, summarise
from checkpointd.report.text import count, size

NATIVE = "native"
PAGE = 4096
_VMA_LIMIT = 65_530  # vm.max_map_count
MISSING = "-"

Value = Callable[["Seen"], float | None]


class Seen:
    """One backend of one program in one repeat."""

    def __init__(self, backend: BackendSummary, run: RunSummary, epochs: Sequence[record.Record]) -> None:
        self.backend, self.run, self.epochs = backend, run, epochs

    @property
    def clear_us(self) -> float | None:
        times = sorted(epoch["clear_us"] for epoch in self.epochs if "clear_us" in epoch)
        return times[len(times) // 2] if times else None


class Study:
    """where -> program -> backend -> its repeats."""

    def __init__(self, directory: Path) -> None:
        self.seen: dict[str, dict[str, dict[str, list[Seen]]]] = {}
        self.lacking: dict[str, dict[str, str]] = defaultdict(dict)
        self.kernels: dict[str, str] = {}
        self.headers: list[record.Record] = []
        self.busy = False
        for path in sorted(directory.glob("*/*.jsonl")):
            where, name = path.parent.name, path.stem.rsplit("-", 1)[0]
            first = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
            if first["type"] == "lacking":
                self.lacking[where][name] = first["why"]
                continue
            self._add(where, name, record.load(path))

    def _add(self, where: str, name: str, found: Measurement) -> None:
        self.kernels[where] = found.header["kernel"].split("-")[0]
        self.headers.append(found.header)
        # as many others as processors, or not known: rates then say more about them than about tracking
        self.busy |= where == NATIVE and found.header.get("load_before", 1e9) > found.header.get("nr_cpus", 1)
        summary = summarise(found)
        runs = {run.run: run for run in summary.runs}
        records = {run.number: [e for n, e in sorted(run.epochs.items()) if n > 0] for run in found.runs}
        backends = self.seen.setdefault(where, {}).setdefault(name, defaultdict(list))
        for backend in summary.backends:
            backends[backend.name].append(Seen(backend, runs[backend.run], records[backend.run]))

    def spread(self, where: str, name: str, backend: str, value: Value) -> Spread | None:
        return Spread.of(value(seen) for seen in self.seen.get(where, {}).get(name, {}).get(backend, ()))

    def programs(self, where: str) -> list[str]:
        return [name for name in WORKLOADS if name in self.seen.get(where, {})]


def over(seen: Seen) -> float | None:
    ratio = seen.backend.over_ratio
    return None if ratio is None else 100 * ratio


def raw(seen: Seen) -> float:
    return seen.backend.bytes_raw.mean


def packed(seen: Seen) -> float:
    return seen.backend.bytes_packed.mean


def cell(spread: Spread | None, form: Callable[[float], str]) -> str:
    if spread is None:
        return MISSING
    low, high = form(spread.low), form(spread.high)
    return form(spread.mean) if low == high else f"{form(spread.mean)} ({low} to {high})"


def percent(value: float) -> str:
    return f"{value:.0f} %" if value >= 10 else f"{value:.1f} %"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
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
    if NATIVE in study.seen:
        yield from _native(study)
    for where in study.seen:
        if where != NATIVE:
            yield from _guest(study, where)
    yield from _bit(study)
    yield from _within(study)
    yield from _answer(study)


def _how(study: Study) -> Iterator[str]:
    yield "## How it was measured"
    yield ""
    repeats = max(len(seen) for by in study.seen.values() for b in by.values() for seen in b.values())
    where = ", ".join(f"{name} (Linux {study.kernels[name]})" for name in study.seen)
    epochs = sorted({h["epochs"] for h in study.headers})
    yield (
        f"Each program ran under a load generator of its own kind: {where}. One repeat is "
        f"{' or '.join(map(str, epochs))} intervals of {study.headers[0]['interval_us'] // 1000} ms; at most "
        f"{repeats} repeats of a program, each from a fresh start. docs/measuring.md says what the words mean. The "
        "truth is a byte comparison of two full reads. Guests are emulated and run smaller data: pages and bytes there "
        "mean something, seconds do not, and a program does less between two freezes than natively. A figure with a "
        "range is the mean of the repeats, with their lowest and highest; one without was measured once, or came out "
        "the same."
    )
    yield ""
    for name, why in study.lacking.items():
        yield (
            "Not measured "
            + name
            + ": "
            + "; ".join(f"{program} ({text})" for program, text in why.items())
            + "."
        )
        yield ""


def _native(study: Study) -> Iterator[str]:
    yield "## Natively: uffd-wp beside content"
    yield ""
    rows = []
    for name in study.programs(NATIVE):

        def of(value: Value, form: Callable[[float], str], backend: str = "uffd-wp", name: str = name) -> str:
            return cell(study.spread(NATIVE, name, backend, value), form)

        rows.append(
            (
                f"{name}: {WORKLOADS[name].what}",
                of(lambda s: s.run.held.mean * PAGE, size),
                of(lambda s: s.run.changed.mean * PAGE, size),
                of(over, percent),
                of(lambda s: 100 * s.backend.silent.mean / max(1.0, s.backend.reported.mean), percent),
                of(lambda s: 100 * s.backend.causes["forced"] / max(1.0, s.backend.reported.mean), percent),
                of(raw, size),
                of(packed, size),
                of(lambda s: s.backend.bytes_stored.mean, size),
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
    rows = []
    for name in study.programs(NATIVE):
        pairs: list[tuple[Value, Callable[[float], str]]] = [
            (lambda s: float(s.run.first_vmas), count),
            (lambda s: s.run.vmas.high, count),
        ]
        rates: list[tuple[Value, Callable[[float], str]]] = [
            (lambda s: s.run.throughput_before, count),
            (lambda s: None if s.run.throughput is None else s.run.throughput.mean, count),
            (_lost, percent),
        ]
        pairs += [] if study.busy else rates
        rows.append(
            (name, *(cell(study.spread(NATIVE, name, "uffd-wp", value), form) for value, form in pairs))
        )
    yield "What tracking by uffd-wp costs the program while it runs, freezes left out:"
    yield ""
    rates = () if study.busy else ("throughput/s untracked", "tracked", "lost")
    yield from table(("program", "VMAs when armed", "VMAs at most", *rates), rows)
    if study.busy:
        yield (
            "Throughput is not shown: the machine was busy with other work during the study (a load above its number "
            "of processors), and rates then tell more about that than about tracking."
        )
        yield ""


def _lost(seen: Seen) -> float | None:
    run = seen.run
    if run.throughput is None or not run.throughput_before:
        return None
    return 100 - 100 * run.throughput.mean / run.throughput_before


def _guest(study: Study, where: str) -> Iterator[str]:
    yield f"## In the {where} guest"
    yield ""
    names = [
        *("soft-dirty bit", "precise-soft-dirty bit", "barrier-soft-dirty bit"),
        *("soft-dirty", "precise-soft-dirty", "barrier-soft-dirty", "uffd-wp"),
    ]
    rows = []
    for name in study.programs(where):
        for backend in names:

            def of(
                value: Value, form: Callable[[float], str], name: str = name, backend: str = backend
            ) -> str:
                return cell(study.spread(where, name, backend, value), form)

            if backend not in study.seen[where][name]:
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
                    of(lambda s: float(s.backend.missed), count),
                    of(lambda s: s.run.vmas.high, count),
                    of(lambda s: None if s.run.vmas_after is None else s.run.vmas_after.mean, count),
                    of(lambda s: s.clear_us, count),
                )
            )
    yield from table(
        (
            *("program", "reporter", "reported", "changed", "over / changed", "merged"),
            *("raw", "packed", "missed", "VMAs at most", "VMAs after the clear", "clear_refs, us"),
        ),
        rows,
    )
    yield (
        "A *bit* is the kernel's soft-dirty bit believed as it is; the backend of that name is what this project makes "
        "of it. Each reporter's run had the program started afresh. VMAs are counted before the trackers collect and "
        "after: what is less after the clear has been merged again. Times are of an emulated machine."
    )
    yield ""


def _bit(study: Study) -> Iterator[str]:
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
    where = NATIVE if NATIVE in study.seen else next(iter(study.seen))
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
            (_xor_share, percent),
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
        "Of written pages, per interval: how many of the 64 lines of a page differ, and what these pages take whole, "
        "as differences from what they held, and as the lines alone (not compressed)."
    )
    yield ""


def _xor_share(seen: Seen) -> float | None:
    whole = seen.run.bytes_written_stored
    return 100 * seen.run.bytes_xor / whole if whole else None


def _answer(study: Study) -> Iterator[str]:
    yield "## The answer"
    yield ""
    yield from _who_gains(study)
    yield from _who_pays(study)
    yield from _own_dumps(study)
    if NATIVE in study.seen:
        ratios = _means(study, NATIVE, "uffd-wp", over)
        xor = _means(study, NATIVE, "uffd-wp", _xor_share)
        if ratios:
            worst = max(ratios, key=lambda name: ratios[name])
            best = min(ratios, key=lambda name: ratios[name])
            yield (
                f"* **Exact to the page is not exact to the byte.** uffd-wp over-reported from {percent(ratios[best])} "
                f"({best}) to {percent(ratios[worst])} ({worst}) of what changed: silent writes, and file pages nobody "
                "tracks. Comparing contents after the read takes that out of the image, whatever the tracker."
            )
        if xor:
            few = [name for name, share in xor.items() if share < 50]
            yield (
                f"* **Differences within pages.** XORed with what they held, written pages took "
                f"{percent(min(xor.values()))} to {percent(max(xor.values()))} of their packed size; less than half "
                f"for {len(few)} of {len(xor)} programs{': ' + ', '.join(few) if few else ''}. "
                "`dump --delta` stores those that get smaller so."
            )
    yield ""


def _own_dumps(study: Study) -> Iterator[str]:
    """What precision is worth to dumps that compare what they read."""
    for where, backend in (
        (next((w for w in study.seen if "stock" in w), ""), "soft-dirty bit"),
        (NATIVE, "uffd-wp"),
    ):
        reported = _means(study, where, backend, raw)
        wrote = _means(study, where, backend, packed)
        stored = _means(study, where, backend, lambda s: s.backend.bytes_stored.mean)
        extra = {name: wrote[name] - stored[name] for name in wrote}
        if not extra:
            continue
        name = max(extra, key=lambda n: extra[n])
        yield (
            f"* **What `checkpoint dump` pays for over-reports** by {backend} ({where}): no space, because it compares "
            f"what it reads with the parent; it reads and hashes up to {size(max(reported.values()))} an interval. "
            f"A tool that writes what is reported would store up to {size(extra[name])} more an interval ({name})."
        )


def _who_gains(study: Study) -> Iterator[str]:
    """Within one run, not between two: no two runs do the same work to the page."""
    stock = next((w for w in study.seen if "stock" in w), "")
    precise = next((w for w in study.seen if "precise" in w), "")
    merged = _means(study, stock, "soft-dirty bit", _merged_share)
    if not merged:
        yield "* Plain soft-dirty was not measured."
        return
    gain = sorted((name for name in merged if merged[name] >= 1), key=lambda name: -merged[name])
    rest = [name for name in merged if merged[name] < 1]
    yield (
        "* **Who gains.** Of the pages plain soft-dirty reported, these were there only because their mapping had "
        "merged with a new one: "
        + (", ".join(f"{name} {percent(merged[name])}" for name in gain) or "none in any program")
        + (f"; under 1 %: {', '.join(rest)}" if rest else "")
        + ". That is what exact tracking takes away."
    )
    plain = _means(study, stock, "soft-dirty bit", over)
    for label, where, backend in (
        ("The patch", precise, "precise-soft-dirty bit"),
        ("The merge barrier on the stock kernel", stock, "barrier-soft-dirty bit"),
    ):
        exact = _means(study, where, backend, over)
        both = [f"{name} {percent(plain[name])} to {percent(exact[name])}" for name in plain if name in exact]
        if both:
            yield (
                f"* **{label}** took the over-report, for each page that changed, from "
                + ", ".join(both)
                + "."
            )
        else:
            yield f"* {label} was not measured beside plain soft-dirty."


def _merged_share(seen: Seen) -> float | None:
    reported = seen.backend.reported.mean
    return 100 * seen.backend.causes["merged"] / reported if reported else None


def _who_pays(study: Study) -> Iterator[str]:
    found = False
    for where, backend in (
        ("precise", "precise-soft-dirty"),
        ("stock", "barrier-soft-dirty"),
        (NATIVE, "uffd-wp"),
    ):
        place = next((w for w in study.seen if where in w), "")
        most = _means(study, place, backend, lambda s: s.run.vmas.high)
        plain = _means(study, place, "soft-dirty", lambda s: s.run.vmas.high) or _means(
            study, place, backend, lambda s: float(s.run.first_vmas)
        )
        growth = {name: most[name] - plain[name] for name in most if name in plain}
        if growth:
            found = True
            name = max(growth, key=lambda n: growth[n])
            limit = max(most.values())
            beside = "the run with plain soft-dirty"
            if place == NATIVE:
                beside = "what there was when tracking began; the program's own growth is in it"
            yield (
                f"* **VMAs with {backend}** ({place}): at most {growth[name]:+.0f} ({name}, {most[name]:.0f} against "
                f"{plain[name]:.0f}: {beside}); the most VMAs any program had is {limit:.0f}, "
                f"{100 * limit / 65530:.1f} % of the default limit of 65,530."
            )
    if not found:
        yield "* VMA growth was not measured."
    place = next((w for w in study.seen if "precise" in w), "")
    seen = _means(study, place, "precise-soft-dirty", lambda s: s.run.vmas.high)
    many = [name for name, most in seen.items() if most > _VMA_LIMIT / 2]
    if seen:
        left = len(WORKLOADS) - len(seen)
        yield (
            f"* **A program that should not use it**: {', '.join(many) or 'none'} of the {len(seen)} measured on the "
            f"patched kernel ({', '.join(seen)}) came near the limit on VMAs. {left} of the study's programs were not "
            "measured there, so this says nothing of them."
        )


def _means(study: Study, where: str, backend: str, value: Value) -> dict[str, float]:
    found = {name: study.spread(where, name, backend, value) for name in study.programs(where)}
    return {name: spread.mean for name, spread in found.items() if spread is not None}
