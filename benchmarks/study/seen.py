# SPDX-License-Identifier: Apache-2.0
"""What the kept records say, by place, program and backend.

A figure is the mean over the repeats of a program's mean over its epochs; its lowest and highest are those of the
repeats.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.study import compact
from benchmarks.study.workloads import WORKLOADS
from checkpointd.report import record
from checkpointd.report.record import Measurement
from checkpointd.report.summary import BackendSummary, RunSummary, Spread, summarise

NATIVE = "native"
COST = "cost"
RECORDS = Path(__file__).parent / "records"
CALM = 2.0
"""Load for each processor above which times say more of others than of tracking."""

Value = Callable[["Seen"], float | None]


class Seen:
    """One backend of one program in one repeat."""

    def __init__(self, backend: BackendSummary, run: RunSummary, epochs: Sequence[record.Record]) -> None:
        self.backend, self.run, self.epochs = backend, run, epochs

    @property
    def clear_us(self) -> float | None:
        times = [epoch["clear_us"] for epoch in self.epochs if "clear_us" in epoch]
        return median(times) if times else None


@dataclass(frozen=True)
class Middle:
    """Per cent of change in pairs: the median, and between which half of the pairs lay."""

    median: float
    low: float
    high: float
    nr_pairs: int

    @staticmethod
    def of(values: Sequence[float]) -> Middle | None:
        ordered = sorted(values)
        cut = len(ordered) // 4
        return Middle(median(ordered), ordered[cut], ordered[-1 - cut], len(ordered)) if ordered else None


@dataclass(frozen=True)
class Cost:
    """A program in pairs of intervals, without and with tracking.

    Attributes:
        cpu_ns: CPU time for one thing done, untracked; median.
        more_cpu: how much more it took when tracked.
        lost: what was done less when tracked.
    """

    cpu_ns: float
    more_cpu: Middle
    lost: Middle


class Study:
    """where -> program -> backend -> its repeats, and why something is not there."""

    def __init__(self, directory: Path) -> None:
        self.seen: dict[str, dict[str, dict[str, list[Seen]]]] = {}
        self.lacking: dict[str, dict[str, str]] = defaultdict(dict)
        self.skipped: dict[str, dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
        self.kernels: dict[str, str] = {}
        self.headers: list[record.Record] = []
        self._pairs: dict[str, list[record.Record]] = defaultdict(list)
        self.loads: dict[bool, list[float]] = {True: [], False: []}  # by whether the machine was calm
        for path in sorted(directory.glob(f"*/*{compact.SUFFIX}")):
            where, name = path.parent.name, path.name.removesuffix(compact.SUFFIX).rsplit("-", 1)[0]
            found = compact.read(path)
            if found[0]["type"] == "lacking":
                self.lacking[where][name] = found[0]["why"]
                continue
            if where == COST:
                self._pair(name, found)
                continue
            self._add(where, name, record.parse(map(json.dumps, found), str(path)))
        self.places = sorted(self.seen, key=lambda where: (where != NATIVE, where))

    def _add(self, where: str, name: str, found: Measurement) -> None:
        self.kernels[where] = found.header["kernel"]
        self.headers.append(found.header)
        for skipped in found.skipped:
            self.skipped[where][name] |= dict.fromkeys(skipped["backends"], skipped["why"])
        summary = summarise(found)
        runs = {run.run: run for run in summary.runs}
        records = {run.number: [e for n, e in sorted(run.epochs.items()) if n > 0] for run in found.runs}
        backends = self.seen.setdefault(where, {}).setdefault(name, defaultdict(list))
        for backend in summary.backends:
            backends[backend.name].append(Seen(backend, runs[backend.run], records[backend.run]))

    def _pair(self, name: str, found: list[record.Record]) -> None:
        for pair in found:
            if pair["type"] == "pair":
                calm = pair["load"] <= CALM * found[0]["nr_cpus"]
                self._pairs[name].append({**pair, "calm": calm})
                self.loads[calm].append(pair["load"])

    def spread(self, where: str, name: str, backend: str, value: Value) -> Spread | None:
        return Spread.of(value(seen) for seen in self.seen.get(where, {}).get(name, {}).get(backend, ()))

    def means(self, where: str, backend: str, value: Value) -> dict[str, float]:
        found = {name: self.spread(where, name, backend, value) for name in self.programs(where)}
        return {name: spread.mean for name, spread in found.items() if spread is not None}

    def programs(self, where: str) -> list[str]:
        return [name for name in WORKLOADS if name in self.seen.get(where, {})]

    def place(self, kind: str) -> str:
        """The guest of this kind ("stock", "precise") in which most programs were measured; "" if there is none."""
        found = [where for where in self.seen if where.endswith(kind)]
        return max(found, key=lambda where: len(self.seen[where]), default="")

    def why_not(self, where: str, name: str) -> str:
        """Why a program is not among those of a place."""
        return self.lacking.get(where, {}).get(name, "no record yet; `make study` goes on here")

    def cost(self, name: str, calm: bool = True) -> Cost | None:
        """What tracking took from a program natively, by the pairs of a calm machine, or by those of a busy one."""
        pairs = [pair for pair in self._pairs[name] if pair["calm"] == calm]
        more = Middle.of([100 * pair["tracked_cpu_ns"] / pair["untracked_cpu_ns"] - 100 for pair in pairs])
        lost = Middle.of([100 - 100 * pair["tracked"] / pair["untracked"] for pair in pairs])
        if more is None or lost is None:
            return None
        return Cost(median([pair["untracked_cpu_ns"] for pair in pairs]), more, lost)


def all_busy(kept: Path) -> bool:
    """Whether no pair of this record counts."""
    found = compact.read(kept)
    pairs = [line for line in found if line["type"] == "pair"]
    return bool(pairs) and all(pair["load"] > CALM * found[0]["nr_cpus"] for pair in pairs)


def median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def over(seen: Seen) -> float | None:
    ratio = seen.backend.over_ratio
    return None if ratio is None else 100 * ratio


def raw(seen: Seen) -> float:
    return seen.backend.bytes_raw.mean


def packed(seen: Seen) -> float:
    return seen.backend.bytes_packed.mean


def stored(seen: Seen) -> float:
    return seen.backend.bytes_stored.mean


def packed_of_stored(seen: Seen) -> float | None:
    return packed(seen) / stored(seen) if stored(seen) else None


def merged_share(seen: Seen) -> float | None:
    reported = seen.backend.reported.mean
    return 100 * seen.backend.causes["merged"] / reported if reported else None


def merged_of_changed(seen: Seen) -> float | None:
    changed = seen.backend.changed.mean
    return 100 * seen.backend.causes["merged"] / changed if changed else None


def xor_share(seen: Seen) -> float | None:
    whole = seen.run.bytes_written_stored
    return 100 * seen.run.bytes_xor / whole if whole else None


def most_vmas(seen: Seen) -> float:
    return seen.run.vmas.high


def vmas_taken_back(seen: Seen) -> float | None:
    """VMAs that are gone after the trackers have collected, on average."""
    return None if seen.run.vmas_after is None else seen.run.vmas.mean - seen.run.vmas_after.mean
