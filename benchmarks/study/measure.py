# SPDX-License-Identifier: Apache-2.0
"""One repetition of one workload: start it, measure it run by run, write the record.

    python -m benchmarks.study.measure NAME OUT [--epochs N] [--interval-ms N] [--backends LIST]

Every run gets the program started afresh, so that runs are equal.  Exit status 3: this machine lacks something, which
is written to OUT as a record of one line, so that nobody tries again.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.study.workloads import WORKLOADS, Probe, Skipped
from checkpointd import features
from checkpointd.errors import CheckpointError
from checkpointd.measure.engine import MeasureOptions, measure
from checkpointd.measure.plan import plan_runs
from checkpointd.procfs import clear_refs
from checkpointd.report import record

LACKS = 3


class Recorder:
    """Writes one record of several calls of `measure`, with the probe's samples and the times of clear_refs."""

    def __init__(self, out: Path) -> None:
        self._file = out.open("w", encoding="utf-8")
        self.probe: Probe | None = None
        self.clear_us: int | None = None
        self._has_header = False

    def write(self, found: dict[str, Any]) -> None:
        self._file.write(record.line(found) + "\n")
        self._file.flush()

    def emit(self, found: dict[str, Any]) -> None:
        kind = found["type"]
        if kind == "mark":
            if self.probe is not None:
                try:
                    value = self.probe()
                except Exception as error:
                    print(f"  the probe failed: {error}", file=sys.stderr)
                    return
                edge = {key: found[key] for key in ("run", "epoch", "edge", "t_us")}
                self.write({"type": "probe", **edge, "value": value})
            return
        if kind == "header":
            if self._has_header:
                return
            self._has_header = True
            found = {**found, "nr_cpus": os.cpu_count(), "load_before": os.getloadavg()[0]}
        if kind == "end":
            return
        if kind == "epoch" and self.clear_us is not None:
            found, self.clear_us = {**found, "clear_us": self.clear_us}, None
        self.write(found)

    def timed_clear(self) -> None:
        """Have the time of each clear_refs in the record of its epoch."""
        real = clear_refs.clear_soft_dirty

        def clear(pid: int) -> None:
            begun = time.monotonic_ns()
            try:
                real(pid)
            finally:
                self.clear_us = (time.monotonic_ns() - begun) // 1000

        clear_refs.clear_soft_dirty = clear

    def close(self) -> None:
        self._file.close()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study.measure")
    parser.add_argument("name", choices=sorted(WORKLOADS))
    parser.add_argument("out", type=Path)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--interval-ms", type=int, default=1000)
    parser.add_argument("--baseline-ms", type=int, default=3000)
    parser.add_argument("--backends", default="")
    args = parser.parse_args()
    workload = WORKLOADS[args.name]
    part = args.out.with_suffix(".part")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    recorder = Recorder(part)
    recorder.timed_clear()
    status = 0
    try:
        workload.check()
        wanted = tuple(name for name in args.backends.split(",") if name)
        nr_runs = len(plan_runs(wanted, features.probe()).runs)
        for number in range(nr_runs):
            options = MeasureOptions(
                interval_us=args.interval_ms * 1000,
                epochs=args.epochs,
                backends=wanted,
                run=number,
                baseline_us=args.baseline_ms * 1000,
            )
            with tempfile.TemporaryDirectory(prefix="study-") as name:
                with workload.run(Path(name)) as (pid, probe):
                    recorder.probe = probe
                    measure(pid, options, recorder.emit)
                os.chdir("/")
        recorder.write({"type": "end", "reason": "done"})
    except Skipped as error:
        recorder.write({"type": "lacking", "why": str(error)})
        status = LACKS
    except CheckpointError as error:
        print(f"{args.name}: {error} {error.hint}", file=sys.stderr)
        return 1
    finally:
        recorder.close()
    part.rename(args.out)
    return status


if __name__ == "__main__":
    sys.exit(main())
