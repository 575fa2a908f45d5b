# SPDX-License-Identifier: Apache-2.0
"""Exact soft-dirty by the patch, by emulation and not at all, on the same traces, beside uffd-wp where it works.

    python -m benchmarks.precision [--backends soft-dirty,barrier-soft-dirty,...] [--only NAME,...]
                                   [--seeds 3] [--cycles 6] [--repeats 3]

A trace is a list of commands for tests/programs/oracle_target.c: the pattern of the mailing-list thread (new memory
beside old), a heap that grows, holes that are filled one by one, mappings moved over the seam between old and new,
memory with a userfaultfd of the target's own, asked for before it is tracked or while it is, and seeds of the
oracle's random generator. Real programs, CPython and redis, do the same work in each run. A figure is the median of
the repeats, with the range where they differ. At every cycle the target is frozen, the tracker collects, and an
independent reader reads all anonymous memory: *changed* differs from the cycle before, *missed* changed and was not
called dirty (must be 0), *over* was called dirty and did not. *kernel* is what the kernel's own bits said, of all
private memory; *unmarked* changed while the soft-dirty bit called it clean: a tracker that believes the bits loses
it. VMAs are those of the target at the end, *failed* the commands of the trace that failed; what fails under a
tracker and not untracked is its side effect.

Counts, so an emulated machine will do; the time to collect is printed for what it is worth.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from checkpointd import features
from checkpointd.errors import CheckpointError
from checkpointd.linux import pagemap_scan as ps
from checkpointd.memory import PageNumbers, Runs, Vma, VmaKind, intersect_runs, merge_runs, pages_of, runs_of
from checkpointd.procfs import maps
from checkpointd.target.freeze import freeze
from checkpointd.tracking.base import Collection, Space, Tracker, TrackingLostError
from checkpointd.tracking.make import make_tracker
from tests.oracle import history, truth
from tests.oracle.target import OracleTarget

BACKENDS = ("soft-dirty", "precise-soft-dirty", "barrier-soft-dirty", "uffd-wp")
PYTHON = """
import sys
table = {i: [i] * 20 for i in range(20000)}
n = len(table)
print("ready", flush=True)
for line in sys.stdin:
    for i in range(n, n + 1000):
        table[i] = [i] * 20
    n += 1000
    for i in range(0, n, 997):
        table[i][3] = n
    print("done", flush=True)
"""


@dataclass
class Row:
    """One backend on one trace; pages summed over all cycles but the first."""

    trace: str
    backend: str
    changed: int = 0
    kernel: int = 0
    unmarked: int = 0
    missed: int = 0
    over: int = 0
    nr_vmas: int = 0
    failed: int = 0
    collect_us: list[int] = field(default_factory=list)

    @property
    def median_us(self) -> int:
        return int(np.median(self.collect_us)) if self.collect_us else 0


def cells(rows: Sequence[Row]) -> list[str]:
    """One line of the table, of repeated runs."""
    # bits that no such tracker is asked about say nothing
    silent = () if "soft-dirty" in rows[0].backend else ("unmarked",)
    figures = ("changed", "missed", "over", "kernel", "unmarked", "nr_vmas", "failed", "median_us")
    return [
        rows[0].trace,
        rows[0].backend,
        *("" if name in silent else _spread([getattr(row, name) for row in rows]) for name in figures),
    ]


def _spread(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    median = str(int(np.median(values)))
    return median if low == high else f"{median} ({low} to {high})"


class Observer:
    """Freezes one target with one tracker and keeps what was read before."""

    def __init__(self, pid: int, row: Row) -> None:
        self.pid, self.row = pid, row
        self._tracker: Tracker | None = None
        self._before: truth.Contents | None = None

    def look(self) -> None:
        """One cycle."""
        with freeze(self.pid) as frozen:
            if self._tracker is None:
                with frozen.inject() as remote:
                    self._tracker, _ = make_tracker(self.row.backend, self.pid, remote, features.probe())
            vmas = tuple(maps.read_smaps(self.pid))
            anonymous = [(vma.first_page, vma.nr_pages) for vma in vmas if vma.kind is VmaKind.ANON]
            # the tracker clears the bits
            marked = marked_pages(self.pid, anonymous) if "soft-dirty" in self.row.backend else None
            found = self._collect(vmas)
            seen = truth.take(self.pid).private
        if self._before is not None and found is not None:
            runs = np.array(anonymous, dtype=np.uint64).reshape(-1, 2)
            judge(self.row, found, self._before, seen, runs, marked)
        self._before = seen
        self.row.nr_vmas = len(maps.read_maps(self.pid))

    def _collect(self, vmas: tuple[Vma, ...]) -> Collection | None:
        assert self._tracker is not None
        pagemap = ps.open_pagemap(self.pid)
        try:
            began = time.monotonic_ns()
            found = self._tracker.collect(Space(self.pid, pagemap, vmas))
            if self._before is not None:
                self.row.collect_us.append((time.monotonic_ns() - began) // 1000)
        except TrackingLostError:
            return None
        finally:
            os.close(pagemap)
        self._tracker.commit()
        return found

    def close(self) -> None:
        if self._tracker is not None:
            self._tracker.disarm()


def marked_pages(pid: int, runs: Sequence[tuple[int, int]]) -> PageNumbers:
    """The pages in `runs` that the kernel's own soft-dirty bit calls written, sorted."""
    found = []
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
        for first, nr_pages in runs:
            words = np.frombuffer(os.pread(pagemap.fileno(), nr_pages * 8, first * 8), dtype=np.uint64)
            found.append(
                np.flatnonzero(words & np.uint64(ps.PM_SOFT_DIRTY)).astype(np.uint64) + np.uint64(first)
            )
    return np.concatenate(found) if found else np.zeros(0, dtype=np.uint64)


def judge(
    row: Row,
    found: Collection,
    before: truth.Contents,
    seen: truth.Contents,
    anonymous: Runs,
    marked: PageNumbers | None = None,
) -> None:
    """Add to `row` what a tracker found beside what differs, of anonymous memory alone.

    Pages of private mappings of files are read each time, whatever the tracker.

    Args:
        marked: pages the kernel's soft-dirty bits call written; None where there are none.
    """
    dirty = pages_of(intersect_runs(merge_runs(found.dirty), anonymous))
    at = np.searchsorted(before.pages, seen.pages)
    at[at == len(before.pages)] = 0
    same = np.zeros(len(seen.pages), dtype=bool)
    if len(before.pages):
        known = before.pages[at] == seen.pages
        same[known] = (before.data[at[known]] == seen.data[known]).all(axis=1)
    changed = pages_of(intersect_runs(runs_of(seen.pages[~same]), anonymous))
    row.changed += len(changed)
    row.kernel += found.nr_reported
    # called clean, or not named at all
    row.missed += int((~np.isin(changed, dirty)).sum())
    row.over += int((~np.isin(dirty, changed)).sum())
    if marked is not None:
        row.unmarked += int((~np.isin(changed, marked)).sum())


def trace_neighbour(cycles: int) -> list[str]:
    """The thread's pattern: a page written, a mapping made beside clean memory."""
    lines = ["map 0 anon 0 60", "write 0 fill 0 60 100", "unmap 0 part 20 40", "freeze"]
    for n in range(cycles):
        k, at = n % 18 + 1, 20 + 6 * n
        lines += [
            f"write 0 byte {3 * n} 1 {n}",
            f"over {k} anon {at} 6 0 0",
            f"write {k} fill 0 6 {n}",
            "freeze",
        ]
    return lines


def trace_heap(cycles: int) -> list[str]:
    """brk grows a little each cycle."""
    lines = ["brk 0 by 60 0 7", "freeze"]
    for n in range(cycles):
        lines += [f"brk 0 by 3 0 {n}", "freeze"]
    return lines


def trace_holes(cycles: int) -> list[str]:
    """Every other page is a hole; each cycle fills some of them."""
    lines = ["map 0 anon 0 60", "write 0 fill 0 60 100"]
    lines += [f"unmap 0 part {n} 1" for n in range(1, 60, 2)]
    lines += ["freeze"]
    for n in range(cycles):
        for hole in range(1 + 2 * n, 60, 2 * cycles):
            lines += [f"over {1 + hole % 18} anon {hole} 1 0 0", f"write {1 + hole % 18} fill 0 1 {n}"]
        lines += ["freeze"]
    return lines


def trace_seam(cycles: int) -> list[str]:
    """New memory behind old, then both moved together: one mapping for the program, maybe two for the kernel.

    Each cycle has old memory of its own: what was moved lies at an offset that no new mapping merges with.
    """
    lines = [line for n in range(cycles) for line in (f"map {n} anon 0 12", f"write {n} fill 0 12 100")]
    lines += [f"unmap {n} part 6 6" for n in range(cycles)]
    lines += ["freeze"]
    for n in range(cycles):
        k = cycles + n
        lines += [f"over {k} anon 6 6 0 {n}", f"write {k} fill 0 6 {n}", f"remap {n} move 0 0", "freeze"]
    return lines


def trace_own_userfaultfd(cycles: int) -> list[str]:
    """The target watches some of its memory itself; there is new memory behind it and behind what it does not watch."""
    lines = [line for slot in (0, 1) for line in (f"map {slot} anon 0 30", f"write {slot} fill 0 30 100")]
    lines += [f"unmap {slot} part 15 15" for slot in (0, 1)]
    lines += ["uffd 1 on 0 1 0", "freeze"]
    for n in range(cycles):
        for slot in (0, 1):
            k, at = 2 + (2 * n + slot) % 16, 15 + 2 * n
            lines += [
                f"write {slot} byte {2 * n} 1 {n}",
                f"over {k} anon {at} 2 0 {slot}",
                f"write {k} fill 0 2 {n}",
            ]
        lines += ["freeze"]
    return [*lines, "uffd 1 off 0 1 0"]


def trace_late_userfaultfd(cycles: int) -> list[str]:
    """The target asks for a userfaultfd on memory that is tracked already, once a cycle."""
    lines = ["map 0 anon 0 30", "write 0 fill 0 30 100", "freeze"]
    for n in range(cycles):
        lines += [f"write 0 byte {3 * n} 1 {n}", "uffd 0 on 0 1 0", "freeze"]
    return lines


def play(name: str, lines: Sequence[str], backend: str) -> Row:
    """One trace under one backend; "" is untracked and only counts failures."""
    row = Row(name, backend)
    with OracleTarget() as target:
        observer = Observer(target.pid, row)
        try:
            for line in lines:
                if line.split()[0].endswith("freeze"):
                    target.settle()
                    if backend:
                        observer.look()
                elif target.play(line) < 0:
                    row.failed += 1
        finally:
            observer.close()
    return row


@contextlib.contextmanager
def running(argv: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    # standard error of a guest is a device, which no dump takes
    with subprocess.Popen(
        argv, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as child:
        try:
            yield child
        finally:
            child.kill()


def program_python(backend: str, cycles: int) -> Row:
    """A dict that grows by 1,000 lists a cycle."""
    row = Row("CPython", backend)
    with running([sys.executable, "-c", PYTHON]) as child:
        assert child.stdin and child.stdout
        child.stdout.readline()
        observer = Observer(child.pid, row)
        observer.look()
        for _ in range(cycles):
            child.stdin.write("go\n")
            child.stdin.flush()
            child.stdout.readline()
            observer.look()
        observer.close()
    return row


def program_redis(backend: str, cycles: int) -> Row:
    """500 new keys a cycle, beside 5,000."""
    row = Row("redis", backend)
    directory = tempfile.mkdtemp(prefix="precision-")
    path = Path(directory) / "s"
    argv = ["redis-server", "--port", "0", "--unixsocket", str(path), "--save", "", "--dir", directory]
    done = 0

    def fill(count: int) -> None:
        nonlocal done
        text = "".join(f"SET key:{n} {'x' * 100}{n}\n" for n in range(done, done + count))
        done += count
        subprocess.run(
            ["redis-cli", "-s", str(path)], input=text, text=True, stdout=subprocess.DEVNULL, check=True
        )

    try:
        with running(argv) as server:
            while not path.exists():
                time.sleep(0.05)
            fill(5000)
            observer = Observer(server.pid, row)
            observer.look()
            for _ in range(cycles):
                fill(500)
                observer.look()
            observer.close()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return row


TRACES = (
    trace_neighbour,
    trace_heap,
    trace_holes,
    trace_seam,
    trace_own_userfaultfd,
    trace_late_userfaultfd,
)
PROGRAMS = {"CPython": program_python, "redis": program_redis}


def traces_of(cycles: int, nr_seeds: int) -> dict[str, list[str]]:
    """The commands of each trace, by its name in the table."""
    found = {make.__name__.removeprefix("trace_").replace("_", " "): make(cycles) for make in TRACES}
    for seed in range(1, nr_seeds + 1):
        lines = history.generate(seed, nr_freezes=cycles, ops_per_freeze=30)
        found[f"random {seed}"] = [
            line for line in lines if line.split()[0] not in ("ring", "uffd", "stormfreeze")
        ]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.precision", description="Page sets side by side."
    )
    parser.add_argument("--backends", default=",".join(BACKENDS))
    parser.add_argument("--seeds", type=int, default=3, help="histories of the random generator")
    parser.add_argument("--cycles", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=1, help="runs of each trace and program")
    parser.add_argument(
        "--only", default="", help="these traces and programs alone, by their names in the table"
    )
    args = parser.parse_args()
    traces = traces_of(args.cycles, args.seeds)
    names = args.only.split(",") if args.only else [*traces, *PROGRAMS]
    if unknown := set(names) - {*traces, *PROGRAMS}:
        parser.error(f"no such trace or program: {', '.join(sorted(unknown))}")
    print(f"kernel {os.uname().release}")
    print("| trace | backend | changed | missed | over | kernel | unmarked | VMAs | failed | collect us |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    missed = 0
    for name in names:
        if name in traces:
            job = functools.partial(play, name, traces[name])
            print(f"| {name} | untracked | | | | | | | {job('').failed} | |", flush=True)
        elif name == "redis" and not shutil.which("redis-server"):
            print("| redis | not installed |", flush=True)
            continue
        else:
            job = functools.partial(PROGRAMS[name], cycles=args.cycles)
        for backend in args.backends.split(","):
            try:
                rows = [job(backend) for _ in range(args.repeats)]
            except CheckpointError as error:
                print(f"| {name} | {backend} | {error.message} |", flush=True)
                continue
            missed += sum(row.missed for row in rows)
            print("| " + " | ".join(cells(rows)) + " |", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
