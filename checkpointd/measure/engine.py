# SPDX-License-Identifier: Apache-2.0
"""Conduct a measurement: runs of epochs on one target, each epoch ended by a freeze.

In each freeze, in this order: the reader looks at the mappings, every tracker of the run collects (which begins
its next epoch), the reader reads all memory, and the pages each tracker would have saved are read once more for
the time that takes.  Then the target goes on, and what was read is compared and judged.

Must run on one thread (ptrace).  However it ends (error, cancel, our death) the target runs on and nothing of ours
stays in it.
"""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from checkpointd import features, tracepoint
from checkpointd.dump.targets import written_beside
from checkpointd.errors import Cancelled, CheckpointError, KernelLacks, TargetExeced, TargetGone, UsageError
from checkpointd.linux import pagemap_scan as ps
from checkpointd.linux import pidfd
from checkpointd.measure.plan import PASSIVE, Plan, plan_runs
from checkpointd.measure.reader import BIT, ReaderProcess
from checkpointd.memory import NO_RUNS, nr_pages_in
from checkpointd.procfs import maps, process
from checkpointd.report import record
from checkpointd.target.freeze import Frozen, freeze
from checkpointd.tracking.base import Collection, Space, Tracker, TrackingLostError
from checkpointd.tracking.content import ContentTracker
from checkpointd.tracking.make import make_tracker, needs_switch_off, sight_of, switch_off
from checkpointd.version import VERSION

Emit = Callable[[dict[str, Any]], None]
_POLL_S = 0.05
_TICK_US = 1_000_000 // os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class MeasureOptions:
    """What to measure.

    Attributes:
        interval_us: how long the target runs between two freezes.
        epochs: how many, in each run.
        backends: names; empty: all that work here.
        run: number of the one run to make of those planned; -1: all, one after the other.
        baseline_us: how long the target is watched before it is tracked; 0: not at all.
        max_frozen_us: end the measurement rather than freeze the target for longer; 0: no limit.
    """

    interval_us: int = 1_000_000
    epochs: int = 20
    backends: tuple[str, ...] = ()
    run: int = -1
    baseline_us: int = 3_000_000
    max_frozen_us: int = 0


def measure(
    pid: int,
    options: MeasureOptions,
    emit: Emit,
    cancelled: Callable[[], bool] = lambda: False,
    between: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Measure; every record goes to `emit` as it is made.

    Args:
        between: called with the number of the coming epoch instead of waiting for the interval, by those who stage
            what happens in an epoch.

    Returns:
        The last record, of type "end": how many epochs were measured and pages missed, and why it ended.

    Raises:
        Cancelled: asked to stop; everything measured so far was emitted.
        TargetGone: the target ended before the first epoch.
    """
    found = features.probe()
    plan = plan_runs(options.backends, found)
    if options.run >= len(plan.runs):
        raise UsageError(f"there are {len(plan.runs)} runs, and no run {options.run + 1}")
    return _Measuring(pid, options, plan, found, emit, cancelled, between).work()


class _Measuring:
    def __init__(
        self,
        pid: int,
        options: MeasureOptions,
        plan: Plan,
        found: features.Features,
        emit: Emit,
        cancelled: Callable[[], bool],
        between: Callable[[int], None] | None,
    ) -> None:
        self.pid = pid
        self._options, self._plan, self._features = options, plan, found
        self._emit, self._cancelled, self._between = emit, cancelled, between
        try:
            self._identity = process.identity(pid)
            self._pidfd = pidfd.pidfd_open(pid)
        except (FileNotFoundError, ProcessLookupError) as error:
            raise TargetGone(f"no process with pid {pid}", hint="look it up with `ps`", pid=pid) from error
        self._began_ns = time.monotonic_ns()
        self._nr_epochs = self._nr_missed = 0
        self._turned_on = False

    def work(self) -> dict[str, Any]:
        reason = "done"
        try:
            self._emit(self._header())
            numbers = range(len(self._plan.runs)) if self._options.run < 0 else [self._options.run]
            for number in numbers:
                self._try(number, self._plan.runs[number])
        except (TargetGone, FileNotFoundError, ProcessLookupError) as error:
            # the files of /proc/PID vanish under whoever reads them when a process ends
            known = isinstance(error, TargetGone)
            gone = error if known else TargetGone(f"process {self.pid} has exited", pid=self.pid)
            if not self._nr_epochs:
                raise gone from None
            reason = f"target gone: {gone}"
        finally:
            os.close(self._pidfd)
        end = {
            "type": "end",
            "t_us": self._now_us(),
            "reason": reason,
            "epochs": self._nr_epochs,
            "pages_missed": self._nr_missed,
        }
        self._emit(end)
        return end

    def _header(self) -> dict[str, Any]:
        return {
            "type": "header",
            "format": record.FORMAT,
            "version": record.VERSION,
            "program": f"checkpointd {VERSION}",
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "host": platform.node(),
            "kernel": platform.release(),
            "page_bytes": 4096,
            "pid": self.pid,
            "comm": process.comm(self.pid),
            "cmdline": " ".join(process.cmdline(self.pid)),
            "interval_us": self._options.interval_us,
            "epochs": self._options.epochs,
            "runs": [list(names) for names in self._plan.runs],
            "unavailable": self._plan.unavailable,
            "monotonic_ns": self._began_ns,
        }

    def _now_us(self) -> int:
        return (time.monotonic_ns() - self._began_ns) // 1000

    # -- one run

    def _try(self, number: int, names: tuple[str, ...]) -> None:
        """A run, or what is left of it when this target does not allow a backend that nobody asked for by name."""
        try:
            self._run(number, names)
        except KernelLacks as error:
            if self._options.backends:
                raise
            self._emit({"type": "skipped", "run": number, "backends": list(names), "why": error.message})
            if PASSIVE in names and len(names) > 1:
                self._run(number, (PASSIVE,))

    def _run(self, number: int, names: tuple[str, ...]) -> None:
        trackers: dict[str, Tracker] = {}
        reader = ReaderProcess(self.pid)
        try:
            self._emit({"type": "run", "run": number, "t_us": self._now_us(), "backends": list(names)})
            if self._options.baseline_us:
                self._baseline(number)
            self._epoch(number, 0, names, trackers, reader, self._spent())
            for epoch in range(1, self._options.epochs + 1):
                spent = self._spent()
                self._mark(number, epoch, "begin")
                if self._between is None:
                    self._wait(self._options.interval_us)
                else:
                    self._between(epoch)
                self._mark(number, epoch, "end")
                self._epoch(number, epoch, names, trackers, reader, spent)
                self._nr_epochs += 1
        finally:
            for tracker in trackers.values():
                with contextlib.suppress(OSError):
                    tracker.disarm()
            reader.close()
            if self._turned_on:  # perhaps for a tracker that has lost its target since
                self._turned_on = False
                with contextlib.suppress(CheckpointError, OSError), freeze(self.pid) as frozen:
                    with frozen.inject() as remote:
                        switch_off(remote)

    def _mark(self, number: int, epoch: int, edge: str) -> None:
        """Tell that the target runs undisturbed from here, or to here; 0 is the time before it is tracked."""
        self._emit({"type": "mark", "run": number, "epoch": epoch, "edge": edge, "t_us": self._now_us()})

    def _baseline(self, number: int) -> None:
        """How the target does before anything of ours touches it."""
        before = self._spent()
        begun_us = self._now_us()
        self._mark(number, 0, "begin")
        self._wait(self._options.baseline_us)
        self._mark(number, 0, "end")
        after = self._spent()
        self._emit(
            {
                "type": "baseline",
                "run": number,
                "t_us": begun_us,
                "running_us": self._now_us() - begun_us,
                "cpu_us": after[0] - before[0],
                "minor_faults": after[1] - before[1],
            }
        )

    def _epoch(
        self,
        number: int,
        epoch: int,
        names: tuple[str, ...],
        trackers: dict[str, Tracker],
        reader: ReaderProcess,
        spent: tuple[int, int, int],
    ) -> None:
        reader.prepare()
        draft = maps.prepare_vmas(self.pid)
        # how the program did in this epoch, without what the freeze itself will cost
        cpu_us, faults, thawed_us = self._spent()
        facts: dict[str, Any] = {
            "type": "epoch",
            "run": number,
            "epoch": epoch,
            "t_us": thawed_us,
            "running_us": thawed_us - spent[2],
            "cpu_us": cpu_us - spent[0],
            "minor_faults": faults - spent[1],
        }
        with freeze(self.pid) as frozen:
            self._check_same_process()
            reports, times = self._frozen(frozen, epoch, names, trackers, reader, draft)
            facts["nr_threads"] = len(frozen.threads)
            facts["nr_vmas_after"] = times.pop("vmas")
            facts["freezing_us"] = frozen.freezing_time_us
            frozen.thaw()
            facts["frozen_us"] = (time.monotonic_ns() - frozen.frozen_at_ns) // 1000
        facts["truth_us"] = times.pop("truth")
        facts["thawed_us"] = self._now_us()
        tracepoint.hit("measure.thawed")
        for tracker in trackers.values():
            tracker.commit()
        found, verdicts = reader.settle(reports)
        self._emit({**facts, **found})
        for report, verdict in zip(reports, verdicts, strict=False):
            advisory = report["backend"].endswith(BIT)
            self._nr_missed += 0 if advisory else verdict["pages_missed"]
            self._emit(
                {
                    "type": "backend",
                    "run": number,
                    "epoch": epoch,
                    "backend": report["backend"],
                    "advisory": advisory,
                    "lost": report["lost"],
                    "kernel_reported": report["kernel_reported"],
                    "collect_us": times.get(f"collect {report['backend']}"),
                    "copy_us": times.get(f"copy {report['backend']}"),
                    **verdict,
                }
            )

    def _frozen(
        self,
        frozen: Frozen,
        epoch: int,
        names: tuple[str, ...],
        trackers: dict[str, Tracker],
        reader: ReaderProcess,
        draft: maps.MapsDraft,
    ) -> tuple[list[dict[str, Any]], dict[str, int]]:
        times: dict[str, int] = {}
        begun = time.monotonic_ns()
        # flags decide what soft-dirty bits mean, so those must be of this moment
        soft = any("soft-dirty" in name for name in names)
        reader.look(bits=soft and epoch > 0)
        truth_ns = time.monotonic_ns() - begun
        vmas = tuple(maps.read_smaps(self.pid)) if soft else maps.settled_vmas(self.pid, draft)
        if not vmas:
            raise TargetGone(f"process {self.pid} has no address space (it is exiting)", pid=self.pid)
        tracepoint.hit("measure.collect")
        missing = [name for name in names if name not in trackers]
        if missing:
            with frozen.inject() as remote:
                for name in missing:
                    trackers[name], _ = make_tracker(name, self.pid, remote, self._features)
                    self._turned_on |= needs_switch_off(trackers[name])
            vmas = tuple(maps.read_smaps(self.pid))
        pagemap = ps.open_pagemap(self.pid)
        reports: list[dict[str, Any]] = []
        try:
            suspect = written_beside(self.pid, vmas, kernel_workers=frozen.has_kernel_workers)
            space = Space(self.pid, pagemap, vmas, suspect)
            for name in names:
                begun = time.monotonic_ns()
                found, lost = _collect(trackers, name, space)
                times[f"collect {name}"] = (time.monotonic_ns() - begun) // 1000
                reports.append(
                    {
                        "backend": name,
                        "clean": found.clean,
                        "dirty": found.dirty,
                        "forced": found.forced,
                        "lost": lost,
                        "kernel_reported": found.nr_reported,
                    }
                )
                if "soft-dirty" in name:
                    bit = {"backend": name + BIT, "clean": NO_RUNS, "dirty": NO_RUNS, "forced": NO_RUNS}
                    reports.append({**bit, "lost": False, "kernel_reported": found.nr_reported})
        finally:
            os.close(pagemap)
        begun = time.monotonic_ns()
        limit_us = self._options.max_frozen_us
        deadline_ns = frozen.frozen_at_ns + limit_us * 1000 if limit_us else 0
        reader.read(deadline_ns)
        with open(f"/proc/{self.pid}/maps", "rb") as file:
            times["vmas"] = file.read().count(b"\n")  # clearing may have merged some
        times["truth"] = (truth_ns + time.monotonic_ns() - begun) // 1000
        if epoch:
            for report in reports:
                late = deadline_ns and time.monotonic_ns() > deadline_ns - limit_us * 500
                if report["backend"] != PASSIVE and nr_pages_in(report["dirty"]) and not late:
                    nr_us = reader.copy(report["dirty"])
                    if nr_us >= 0:
                        times[f"copy {report['backend']}"] = nr_us
                        times["truth"] += nr_us
        tracepoint.hit("measure.read")
        return reports, times

    # -- small things

    def _spent(self) -> tuple[int, int, int]:
        """(CPU time of all threads in us, minor faults, now in us).  Clock ticks: 10 ms steps."""
        try:
            fields = process.read_stat(self.pid).fields
        except (FileNotFoundError, ProcessLookupError) as error:
            raise TargetGone(f"process {self.pid} has exited", pid=self.pid) from error
        return (int(fields[11]) + int(fields[12])) * _TICK_US, int(fields[7]), self._now_us()

    def _wait(self, nr_us: int) -> None:
        end = time.monotonic() + nr_us / 1e6
        while (left := end - time.monotonic()) > 0:
            if self._cancelled():
                raise Cancelled(
                    f"the measurement of process {self.pid} was cancelled; the process runs on", pid=self.pid
                )
            if pidfd.has_exited(self._pidfd, timeout_s=min(left, _POLL_S)):
                raise TargetGone(f"process {self.pid} has exited", pid=self.pid)

    def _check_same_process(self) -> None:
        if process.identity(self.pid) != self._identity:
            raise TargetExeced(f"pid {self.pid} is another process now", pid=self.pid)


def _collect(trackers: dict[str, Tracker], name: str, space: Space) -> tuple[Collection, bool]:
    """The tracker's report; when it lost the target, a report that calls everything dirty, and a new one next time."""
    try:
        return trackers[name].collect(space), False
    except TrackingLostError:
        trackers.pop(name).disarm()
        everything = ContentTracker(sight_of(features.probe()))
        return everything.collect(space), True
