# SPDX-License-Identifier: Apache-2.0
"""Numbers of a run: medians with best and worst, and their ratio to a limit of the same run.  Times are ms."""

from __future__ import annotations

import dataclasses
import os
import platform
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Series:
    """Repeated measurements of one thing, in ms (or `unit`)."""

    values: list[float]
    unit: str = "ms"

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        return f"{self.median:.2f} {self.unit} [{min(self.values):.2f} to {max(self.values):.2f}]"


@dataclass
class Row:
    """One case.

    Attributes:
        limit: measured in the same run; None where nothing bounds it.
        goal: the median that is promised, in the unit of `ours`; None where a number is only reported.
        higher_is_better: for rates.
    """

    case: str
    ours: Series
    limit: Series | None = None
    goal: float | None = None
    higher_is_better: bool = False
    note: str = ""

    @property
    def ratio(self) -> float | None:
        return self.ours.median / self.limit.median if self.limit and self.limit.median else None

    @property
    def verdict(self) -> str:
        if self.goal is None:
            return ""
        met = self.ours.median >= self.goal if self.higher_is_better else self.ours.median <= self.goal
        return f"{'met' if met else 'MISSED'} ({'at least' if self.higher_is_better else 'at most'} {self.goal:.1f})"


@dataclass
class Report:
    rows: list[Row] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "facts": self.facts,
            "rows": [
                {
                    **dataclasses.asdict(row),
                    "median": row.ours.median,
                    "ratio": row.ratio,
                    "verdict": row.verdict,
                }
                for row in self.rows
            ],
        }

    def markdown(self) -> str:
        lines = [f"* {name}: {value}" for name, value in self.facts.items()]
        lines += ["", "| case | ours: median [best to worst] | limit of the same run | ratio | goal | note |"]
        lines += ["|---|---|---|---|---|---|"]
        for row in self.rows:
            ratio = f"{row.ratio:.2f}" if row.ratio is not None else ""
            lines.append(
                f"| {row.case} | {row.ours} | {row.limit or ''} | {ratio} | {row.verdict} | {row.note} |"
            )
        return "\n".join(lines) + "\n"


def machine() -> dict[str, Any]:
    """Where it was measured: numbers of different machines, or of a busy one, do not compare."""
    load = Path("/proc/loadavg").read_text().split()[0]
    cpus = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "kernel": platform.release(),
        "cpu": f"{len(cpus)} x {cpus[0] if cpus else platform.machine()}",
        "load at the start": load,
        "CPU pressure at the start": _pressure(),
        "scheduling": {os.SCHED_OTHER: "normal", os.SCHED_RR: "real time (round robin)"}.get(
            os.sched_getscheduler(0), "other"
        ),
        "python": platform.python_version(),
    }


def _pressure() -> str:
    """How much of the last ten seconds something waited for a CPU: above a few percent times are worth little."""
    try:
        return Path("/proc/pressure/cpu").read_text().split()[1].removeprefix("avg10=") + " %"
    except (OSError, IndexError):
        return "not known"
