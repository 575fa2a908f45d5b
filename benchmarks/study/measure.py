# SPDX-License-Identifier: Apache-2.0
"""One repetition of one workload: start it, measure it run by run, write the record.

    python -m benchmarks.study.measure NAME OUT [--epochs N] [--interval-ms N] [--backends LIST] [--pairs N]

Every run gets the program started afresh, so that runs are equal.  With --pairs, what tracking costs the program is
measured instead: intervals without tracking and with it take turns, N times, each a record of type "pair" with what the
program did in a second, `untracked` and `tracked`, and the CPU time it took for one of that, `untracked_cpu_ns` and
`tracked_cpu_ns`, behind a record of type "cost" that tells of the machine.
Exit status 3: this machine lacks something, which is written to OUT as a record of one line, so that nobody tries
again.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.study.workloads import WORKLOADS, Probe, Skipped
from checkpointd import features
from checkpointd.errors import CheckpointError, TargetGone
from checkpointd.measure.engine import MeasureOptions, measure
from checkpointd.measure.plan import PASSIVE, plan_runs
from checkpointd.procfs import clear_refs
from checkpointd.report import record

LACKS = 3
SETTLING_S = 0.5


class Recorder:
    """Writes one record of several calls of `measure`, with the times of clear_refs."""

    def __init__(self, out: Path) -> None:
        self._file = out.open("w", encoding="utf-8")
        self.clear_us: int | None = None
        self._has_header = False

    def write(self, found: dict[str, Any]) -> None:
        self._file.write(record.line(found) + "\n")
        self._file.flush()

    def emit(self, found: dict[str, Any]) -> None:
        kind = found["type"]
        if kind == "header":
            if self._has_header:
                return
            self._has_header = True
            found = {**found, "nr_cpus": os.cpu_count(), "load_before": os.getloadavg()[0]}
        if kind in ("mark", "end"):
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


def pairs(pid: int, options: MeasureOptions, probe: Probe, number: int) -> Iterator[dict[str, Any]]:
    """What the program does without and with tracking, and in which CPU time, intervals taking turns.

    Load of others changes by the second: a tracked interval is held against the mean of the untracked ones before and
    after it.  Both are epochs of a measurement, the untracked one with nothing but reads, so that what goes before
    and after is the same.  CPU time for one thing done hardly depends on load, the rate does.

    Yields fewer than asked for when the program ends or does not answer the probe.
    """
    seen: list[tuple[float, float]] = []  # (done a second, CPU time of one in ns)

    def interval(_: int) -> None:
        time.sleep(SETTLING_S)
        before, begun, spent = probe(), time.monotonic(), cpu_ns(pid)
        time.sleep(options.interval_us / 1e6)
        done, seconds, spent = probe() - before, time.monotonic() - begun, cpu_ns(pid) - spent
        if done <= 0:
            raise ValueError("the program did nothing")
        seen.append((done / seconds, spent / done))

    def one(wanted: MeasureOptions) -> tuple[float, float]:
        # nothing of this goes into the record: these are other intervals than those before
        measure(pid, replace(wanted, epochs=1), lambda _: None, between=interval)
        return seen[-1]

    without = replace(options, backends=(PASSIVE,), run=0)
    try:
        before = one(without)
        for pair in range(number):
            tracked, after = one(options), one(without)
            yield {
                **{"type": "pair", "run": options.run, "pair": pair, "load": os.getloadavg()[0]},
                **{"untracked": (before[0] + after[0]) / 2, "tracked": tracked[0]},
                **{"untracked_cpu_ns": (before[1] + after[1]) / 2, "tracked_cpu_ns": tracked[1]},
            }
            before = after
    except (TargetGone, OSError, ValueError, TypeError, subprocess.SubprocessError) as error:
        print(f"  no more pairs: {error}", file=sys.stderr)


def cpu_ns(pid: int) -> int:
    """CPU time of a process, threads that have ended included; exact where /proc/PID/stat counts steps of 10 ms.

    Source: clock_getcpuclockid(3); include/linux/posix-timers_types.h has how a pid becomes the number of a clock.
    """
    return time.clock_gettime_ns((~pid << 3) | 2)


def end_in_order() -> None:
    """Let SIGTERM end the program that is measured and its load too; they are sessions of their own."""

    def leave(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study.measure")
    parser.add_argument("name", choices=sorted(WORKLOADS))
    parser.add_argument("out", type=Path)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--interval-ms", type=int, default=1000)
    parser.add_argument("--backends", default="")
    parser.add_argument("--pairs", type=int, default=0)
    args = parser.parse_args()
    end_in_order()
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
                baseline_us=0,
            )
            with tempfile.TemporaryDirectory(prefix="study-") as name:
                with workload.run(Path(name)) as (pid, probe):
                    if not args.pairs:
                        measure(pid, options, recorder.emit)
                        continue
                    if probe is None:
                        raise Skipped("it cannot tell how much it has done")
                    recorder.write({"type": "cost", "nr_cpus": os.cpu_count()})
                    for found in pairs(pid, options, probe, args.pairs):
                        recorder.write(found)
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
