# SPDX-License-Identifier: Apache-2.0
"""The cases.  Each measures its limit in the same run, after warm-up rounds of both.

Why warm-up, and medians: where the hypervisor takes back free memory, the first touch of memory that lay free for
seconds costs a multiple; one cold round says nothing.  Before what takes fresh memory (full dumps, restores) free
memory is touched once; not before a stop, which takes none and would find its caches emptied.  Dumps go through the
command and the service, as a user's do.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import delta
from benchmarks.report import Report, Row, Series
from demo.command import Checkpoint

HERE = Path(__file__).parent


class Target:
    """A running target.c."""

    def __init__(self, program: Path, megabytes: int, pages: str = "4k") -> None:
        self.megabytes, self.pages = megabytes, pages
        self.directory = Path(tempfile.mkdtemp(prefix="bench-"))
        self._fds = []
        for name in ("cmd", "rep"):
            os.mkfifo(self.directory / name)
            self._fds.append(os.open(self.directory / name, os.O_RDWR | os.O_CLOEXEC))
        self._process = subprocess.Popen(
            [program, self.directory, str(megabytes), pages],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.pid = self._process.pid
        self.tell("ping")

    def tell(self, command: str) -> int:
        os.write(self._fds[0], command.encode() + b"\n")
        answer = b""
        while not answer.endswith(b"\n"):
            answer += os.read(self._fds[1], 64)
        return int(answer)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._process.wait()
        # a restored one is another's child: whoever that is collects it at leisure
        deadline = time.monotonic() + 20
        while os.path.exists(f"/proc/{self.pid}") and time.monotonic() < deadline:
            time.sleep(0.005)

    def close(self) -> None:
        self.kill()
        for fd in self._fds:
            os.close(fd)
        shutil.rmtree(self.directory, ignore_errors=True)


class Limit:
    """A running limits.c that measures one round when asked: limits and ours take turns."""

    def __init__(self, program: Path, *words: object) -> None:
        self._process = subprocess.Popen(
            [program, *map(str, words)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def round(self) -> list[float]:
        """The columns of one round, in ms."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("limits ended before its rounds were over")
        return [float(word) / 1000 for word in line.split()]

    def __enter__(self) -> Limit:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # what rounds are left run at once
        self._process.wait()


class Bench:
    """All cases of one run.

    Args:
        megabytes: size of the big target.
        rounds: measurements per case, after the warm-up.
    """

    def __init__(self, directory: Path, megabytes: int, rounds: int, report: Report) -> None:
        self.directory, self.megabytes, self.rounds, self.report = directory, megabytes, rounds, report
        self.checkpoint = Checkpoint(directory)
        self.program, self._limits = directory / "bench_target", directory / "limits"
        subprocess.run(["gcc", "-O2", "-o", self.program, HERE / "target.c"], check=True)
        subprocess.run(["gcc", "-O3", "-pthread", "-o", self._limits, HERE / "limits.c"], check=True)

    # -- the cases

    def incremental(self) -> None:
        """How long the target stands still for an incremental dump."""
        with self.target(self.megabytes) as target:
            self._dump(target)
            for permille, name in ((10, "1 %"), (100, "10 %"), (500, "50 %")):
                floors: list[float] = []
                modes: dict[str, list[dict[str, Any]]] = {"stopped": [], "auto": []}
                with self._limit("stop", self.megabytes, permille, self.rounds + 1) as limit:
                    for n in range(self.rounds + 1):
                        floors.append(limit.round()[2])
                        for mode, found in modes.items():
                            target.tell(f"dirty {permille} {n}")
                            found.append(self._dump(target, "--incremental", "--read-mode", mode))
                floor = Series(floors[1:])
                for mode, found in modes.items():
                    used = sorted({stats["read_mode"] for stats in found[1:]})
                    self.add(
                        Row(
                            f"incremental, {name} dirty, --read-mode {mode}: stop",
                            Series([(s["freezing_time"] + s["frozen_time"]) / 1000 for s in found[1:]]),
                            floor,
                            1.3 * floor.median + 2,
                            note=f"read {'/'.join(used)}; {found[1]['pages_dirty']} pages dirty, "
                            f"total {Series([s['total_time'] / 1000 for s in found[1:]])}; {_phases(found[1:])}",
                        )
                    )

    def full(self) -> None:
        """A full dump to a tmpfs, against two threads that read and write."""
        limits: list[float] = []
        modes: dict[str, list[dict[str, Any]]] = {"stopped": [], "auto": []}
        with (
            self.target(self.megabytes) as target,
            self._limit("copy", self.megabytes, self.rounds + 1, self.directory) as limit,
        ):
            for _ in range(self.rounds + 1):
                limits.append(limit.round()[0])
                for mode, found in modes.items():
                    found.append(self._dump_and_forget(target, "--read-mode", mode))
        bound = Series(limits[1:])
        for mode, found in modes.items():
            self.add(
                Row(
                    f"full dump to tmpfs, --read-mode {mode}: total",
                    Series([s["total_time"] / 1000 for s in found[1:]]),
                    bound,
                    bound.median / 0.8,
                    note=f"read {found[1]['read_mode']}, "
                    f"frozen {Series([s['frozen_time'] / 1000 for s in found[1:]])}; {_phases(found[1:])}",
                )
            )
        self._criu()

    def small(self) -> None:
        """The fixed cost: a program of 1 MiB."""
        with self.target(1) as target:
            found = [self._dump_and_forget(target) for _ in range(self.rounds + 2)][2:]
        frozen = Series([(s["freezing_time"] + s["frozen_time"]) / 1000 for s in found])
        self.add(Row("1 MiB program: frozen", frozen, goal=5, note=_phases(found)))

    def restore(self) -> None:
        """Restore, against the kernel filling fresh memory from a warm file."""
        for pages in ("4k", "thp"):
            one, two, checked, found = [], [], [], []
            with (
                self.target(self.megabytes, pages) as target,
                self._limit("fill", self.megabytes, self.rounds + 1, self.directory, pages) as limit,
            ):
                want = target.tell("sum")
                image = self._dump(target)["image_id"]
                for _ in range(self.rounds + 1):
                    took = limit.round()
                    one.append(took[0])
                    two.append(took[1])
                    checked.append(took[2])
                    found.append(self._restore(target, image))
                if target.tell("sum") != want:
                    raise RuntimeError("the restored target has other memory")
            ours = Series([s["restore_time"] / 1000 for s in found[1:]])
            note = f"total {Series([s['total_time'] / 1000 for s in found[1:]])}; {_phases(found[1:])}"
            for against, took, goal in (
                # what a restore with one thread sits on: a page fault after the other, and the copy
                ("the floor, one thread that fills", one, 1.0),
                ("two threads that fill", two, 1.1),
                ("two threads that check every byte and fill another process", checked, 1.1),
            ):
                limit_found = Series(took[1:])
                goal_ms = goal * limit_found.median
                case = f"restore, {pages} pages: in the new process, against {against}"
                self.add(Row(case, ours, limit_found, goal_ms, note=note))
                note = ""

    def depth(self) -> None:
        """Restore of the last generation of a chain of 1, 10 and 100."""
        with self.target(64) as target:
            images = [self._dump(target)["image_id"]]
            for n in range(99):
                target.tell(f"dirty 20 {n}")
                images.append(self._dump(target, "--incremental")["image_id"])
            first = None
            for depth in (1, 10, 100):
                restores = self._restores(target, images[depth - 1])
                found = Series([s["restore_time"] / 1000 for s in restores])
                first = first or found
                self.add(
                    Row(
                        f"restore at depth {depth}, 64 MiB: in the new process",
                        found,
                        first,
                        1.3 * first.median,
                        note=f"limit: depth 1; total {Series([s['total_time'] / 1000 for s in restores])}",
                    )
                )

    def cost(self) -> None:
        """The tracked program's own work: random writes over 256 MiB, with a dump before each measurement."""
        with self.target(256) as target:
            plain = [target.tell(f"work 500 {n}") / 500 for n in range(self.rounds + 1)][1:]
            self._dump(target)
            tracked, first_writes = [], []
            for n in range(self.rounds + 1):
                tracked.append(target.tell(f"work 500 {n}") / 500)
                self._dump(target, "--incremental")
                first_writes.append(target.tell(f"dirty 1000 {n}") / 65536)
                self._dump(target, "--incremental")
            self.checkpoint("untrack", "-p", str(target.pid))
            after = [target.tell(f"dirty 1000 {n}") / 65536 for n in range(self.rounds + 1)][1:]
        unit = "writes/us"
        self.add(
            Row(
                "random writes in the 500 ms after an incremental dump",
                Series([value / 1000 for value in tracked[1:]], unit),
                Series([value / 1000 for value in plain], unit),
                higher_is_better=True,
                note="limit: not tracked",
            )
        )
        self.add(
            Row(
                "first write to a page of an epoch",
                Series(first_writes[1:], "ns"),
                Series(after, "ns"),
                note="limit: after untrack",
            )
        )

    def memory(self) -> None:
        """Peak memory of the processes that serve one target, over a full and an incremental dump."""
        with self.target(self.megabytes) as target:
            for mode in ("stopped", "fork"):
                self._dump(target, "--read-mode", mode)
                target.tell("dirty 500 3")
                self._dump(target, "--incremental", "--read-mode", mode)
            self._add_memory(f"{self.megabytes} MiB target", 0)
        for what, words in (("", ()), (", a tenth of its pages deltas", ("--delta",))):
            with self.target(self.megabytes) as target:
                self.checkpoint.dump(target.pid)
                target.tell("dirty 100 4 512")
                image = self.checkpoint.dump(target.pid, "--incremental", *words)["image_id"]
                last = max(service_processes(self.checkpoint.socket))
                self._restore(target, image)
                self._add_memory(f"restore of {self.megabytes} MiB{what}", last)

    def _add_memory(self, what: str, last: int) -> None:
        """Of the processes of the service begun after the one with the id `last`; the first of all is the service."""
        for number, (pid, (words, peak_kib)) in enumerate(service_processes(self.checkpoint.socket).items()):
            if pid <= last:
                continue
            name = "service" if number == 0 else " ".join(words.split()[1:4])[:60]
            self.add(
                Row(
                    f"peak resident memory, {what}: {name}",
                    Series([peak_kib / 1024], "MiB"),
                    note=f"pid {pid}; shared buffers count in each process that maps them",
                )
            )

    def delta(self) -> None:
        """What `--delta` saves and costs; see delta.py."""
        delta.measure(self)

    # -- small things

    def _criu(self) -> None:
        if not shutil.which("criu"):
            self.report.facts["criu"] = "not installed"
            return
        times = []
        with self.target(self.megabytes) as target:
            for _ in range(self.rounds + 1):
                images = self.directory / "criu"
                images.mkdir()
                start = time.perf_counter()
                done = subprocess.run(
                    ["criu", "dump", "-t", str(target.pid), "-D", images, "--leave-running"],
                    capture_output=True,
                )
                times.append(1000 * (time.perf_counter() - start))
                shutil.rmtree(images)
                if done.returncode:
                    self.report.facts["criu"] = f"fails here: {done.stderr.decode()[-200:]}"
                    return
        self.add(Row("criu dump --leave-running to tmpfs: total", Series(times[1:])))

    @contextlib.contextmanager
    def target(self, megabytes: int, pages: str = "4k") -> Iterator[Target]:
        target = Target(self.program, megabytes, pages)
        try:
            yield target
        finally:
            target.close()
            self.forget()

    def _dump(self, target: Target, *words: str) -> dict[str, Any]:
        return self.checkpoint.dump(target.pid, "--compress", "none", *words)

    def _dump_and_forget(self, target: Target, *words: str) -> dict[str, Any]:
        """All images but the new one are removed: a page worker still holds its last one's files."""
        self.warm(target)
        stats = self._dump(target, *words)
        self.forget(but=stats["image_id"])
        return stats

    def forget(self, but: str = "") -> None:
        """Remove images: a tmpfs is memory."""
        found = self.checkpoint("ls")
        images = found.get("images", []) if isinstance(found, dict) else found
        if ids := [image["id"] for image in images if image["id"] != but]:
            self.checkpoint("rm", *ids)

    def _restore(self, target: Target, image: str) -> dict[str, Any]:
        target.kill()
        self.warm(target)
        return self.checkpoint.restore(image)

    def warm(self, target: Target) -> None:
        """Touch free memory, as the limits do: see limits.c."""
        subprocess.run([self._limits, "warm", str(target.megabytes), target.pages], check=True)

    def _restores(self, target: Target, image: str) -> list[dict[str, Any]]:
        return [self._restore(target, image) for _ in range(self.rounds + 1)][1:]

    def _limit(self, *words: object) -> Limit:
        return Limit(self._limits, *words)

    def add(self, row: Row) -> None:
        self.report.rows.append(row)
        ratio = f", {row.ratio:.2f} of the limit {row.limit}" if row.ratio is not None else ""
        print(f"{row.case}: {row.ours}{ratio} {row.verdict} {row.note}", flush=True)

    def close(self) -> None:
        self.checkpoint.close()


def _phases(found: list[dict[str, Any]]) -> str:
    """Medians of the phases, ms."""
    names = sorted({name for stats in found for name in stats["phases"]})
    medians = [
        f"{name} {statistics.median(stats['phases'].get(name, 0) for stats in found) / 1000:.1f}"
        for name in names
    ]
    return "phases: " + ", ".join(medians)


def service_processes(socket: str) -> dict[int, tuple[str, int]]:
    """The service at `socket` and all it started: pid -> (what it is, peak resident KiB)."""
    found: dict[int, tuple[str, int, int]] = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        with contextlib.suppress(OSError, KeyError):  # gone meanwhile, or a kernel thread
            fields = dict(
                line.split(":", 1)
                for line in Path("/proc", name, "status").read_text().splitlines()
                if ":" in line
            )
            words = Path("/proc", name, "cmdline").read_bytes().decode(errors="replace").split("\0")
            found[int(name)] = (" ".join(words), int(fields["VmHWM"].split()[0]), int(fields["PPid"]))
    family = {
        pid for pid, (words, _, _) in found.items() if socket in words and "bench" not in words.split()[0]
    }
    grew = True
    while grew:
        more = {pid for pid, (_, _, parent) in found.items() if parent in family} - family
        family |= more
        grew = bool(more)
    return {pid: (found[pid][0], found[pid][1]) for pid in sorted(family)}
