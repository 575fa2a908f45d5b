# SPDX-License-Identifier: Apache-2.0
"""The cases.  Each measures its limit in the same run, after warm-up rounds of both.

Why warm-up, and medians: where the hypervisor takes back free memory, the first touch of memory that lay free for
seconds costs a multiple; one cold round says nothing.  Dumps go through the command and the service, as a user's do.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.report import Report, Row, Series
from demo.command import Checkpoint

HERE = Path(__file__).parent


class Target:
    """A running target.c."""

    def __init__(self, program: Path, megabytes: int, pages: str = "4k") -> None:
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
        stat = Path(f"/proc/{self.pid}/stat")
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                if stat.read_text().rpartition(")")[2].split()[0] == "Z":
                    break
            except OSError:
                break
            time.sleep(0.005)

    def close(self) -> None:
        self.kill()
        for fd in self._fds:
            os.close(fd)
        shutil.rmtree(self.directory, ignore_errors=True)


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
        with self._target(self.megabytes) as target:
            self._dump(target)
            for permille, name in ((10, "1 %"), (100, "10 %"), (500, "50 %")):
                floor = Series([row[2] for row in self._limit("stop", self.megabytes, permille, self.rounds)])
                modes: dict[str, list[dict[str, Any]]] = {"stopped": [], "auto": []}
                for n in range(self.rounds + 1):
                    for mode, found in modes.items():
                        target.tell(f"dirty {permille} {n}")
                        stats = self._dump(target, "--incremental", "--read-mode", mode)
                        if n:
                            found.append(stats)
                goal = 1.3 * floor.median + 2
                for mode, found in modes.items():
                    used = sorted({stats["read_mode"] for stats in found})
                    self._add(
                        Row(
                            f"incremental, {name} dirty, --read-mode {mode}: stop",
                            Series([(s["freezing_time"] + s["frozen_time"]) / 1000 for s in found]),
                            floor,
                            goal,
                            note=f"read {'/'.join(used)}; {found[0]['pages_dirty']} pages dirty, "
                            f"total {Series([s['total_time'] / 1000 for s in found])}",
                        )
                    )

    def full(self) -> None:
        """A full dump to a tmpfs, against two threads that read and write."""
        limit = Series([row[0] for row in self._limit("copy", self.megabytes, self.rounds, self.directory)])
        with self._target(self.megabytes) as target:
            found = [self._dump_and_forget(target, "--read-mode", "stopped") for _ in range(self.rounds + 1)][
                1:
            ]
            forked = [self._dump_and_forget(target) for _ in range(self.rounds + 1)][1:]
        self._add(
            Row(
                "full dump to tmpfs, read stopped: total",
                Series([s["total_time"] / 1000 for s in found]),
                limit,
                limit.median / 0.8,
                note=f"frozen {Series([s['frozen_time'] / 1000 for s in found])}",
            )
        )
        self._add(
            Row(
                "full dump to tmpfs, as chosen by itself: total",
                Series([s["total_time"] / 1000 for s in forked]),
                limit,
                note=f"read {forked[0]['read_mode']}, frozen {Series([s['frozen_time'] / 1000 for s in forked])}",
            )
        )
        self._criu()

    def small(self) -> None:
        """The fixed cost: a program of 1 MiB."""
        with self._target(1) as target:
            found = [self._dump_and_forget(target) for _ in range(self.rounds + 2)][2:]
        frozen = Series([(s["freezing_time"] + s["frozen_time"]) / 1000 for s in found])
        phases = {name: round(value / 1000, 2) for name, value in found[-1]["phases"].items()}
        self._add(Row("1 MiB program: frozen", frozen, goal=5, note=f"last round by phase, ms: {phases}"))

    def restore(self) -> None:
        """Restore, against the kernel filling fresh memory from a warm file."""
        for pages in ("4k", "thp"):
            rows = self._limit("fill", self.megabytes, self.rounds, self.directory, pages)
            one, two = Series([row[0] for row in rows]), Series([row[1] for row in rows])
            with self._target(self.megabytes, pages) as target:
                want = target.tell("sum")
                image = self._dump(target)["image_id"]
                found = self._restores(target, image)
                if target.tell("sum") != want:
                    raise RuntimeError("the restored target has other memory")
            self._add(
                Row(
                    f"restore, {pages} pages: in the new process",
                    Series([s["restore_time"] / 1000 for s in found]),
                    two,
                    two.median * 1.1,
                    note=f"limit with one thread {one}; total {Series([s['total_time'] / 1000 for s in found])}",
                )
            )

    def depth(self) -> None:
        """Restore of the last generation of a chain of 1, 10 and 100."""
        with self._target(64) as target:
            images = [self._dump(target)["image_id"]]
            for n in range(99):
                target.tell(f"dirty 20 {n}")
                images.append(self._dump(target, "--incremental")["image_id"])
            first = None
            for depth in (1, 10, 100):
                found = Series([s["total_time"] / 1000 for s in self._restores(target, images[depth - 1])])
                first = first or found
                self._add(Row(f"restore at depth {depth}, 64 MiB", found, first, 1.3 * first.median))

    def cost(self) -> None:
        """The tracked program's own work: random writes over 256 MiB, with a dump before each measurement."""
        with self._target(256) as target:
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
        self._add(
            Row(
                "random writes in the 500 ms after an incremental dump",
                Series([value / 1000 for value in tracked[1:]], unit),
                Series([value / 1000 for value in plain], unit),
                higher_is_better=True,
                note="limit: not tracked",
            )
        )
        self._add(
            Row(
                "first write to a page of an epoch",
                Series(first_writes[1:], "ns"),
                Series(after, "ns"),
                note="limit: after untrack",
            )
        )

    def memory(self) -> None:
        """Peak memory of the processes that serve one target, over a full and an incremental dump."""
        with self._target(self.megabytes) as target:
            for mode in ("stopped", "fork"):
                self._dump(target, "--read-mode", mode)
                target.tell("dirty 500 3")
                self._dump(target, "--incremental", "--read-mode", mode)
            found = service_processes(self.checkpoint.socket)
        for number, (pid, (words, peak_kib)) in enumerate(sorted(found.items())):
            name = "service" if number == 0 else " ".join(words.split()[1:4])[:60]
            self._add(
                Row(
                    f"peak resident memory, {self.megabytes} MiB target: {name}",
                    Series([peak_kib / 1024], "MiB"),
                    note=f"pid {pid}; shared buffers count in each process that maps them",
                )
            )

    # -- small things

    def _criu(self) -> None:
        if not shutil.which("criu"):
            self.report.facts["criu"] = "not installed"
            return
        times = []
        with self._target(self.megabytes) as target:
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
        self._add(Row("criu dump --leave-running to tmpfs: total", Series(times[1:])))

    @contextlib.contextmanager
    def _target(self, megabytes: int, pages: str = "4k") -> Iterator[Target]:
        target = Target(self.program, megabytes, pages)
        try:
            yield target
        finally:
            target.close()
            self._forget()

    def _dump(self, target: Target, *words: str) -> dict[str, Any]:
        return self.checkpoint.dump(target.pid, "--compress", "none", *words)

    def _dump_and_forget(self, target: Target, *words: str) -> dict[str, Any]:
        stats = self._dump(target, *words)
        self._forget()
        return stats

    def _forget(self) -> None:
        """Remove all images: a tmpfs is memory."""
        found = self.checkpoint("ls")
        images = found.get("images", []) if isinstance(found, dict) else found
        if images:
            self.checkpoint("rm", *[image["id"] for image in images])

    def _restores(self, target: Target, image: str) -> list[dict[str, Any]]:
        found = []
        for _ in range(self.rounds + 1):
            target.kill()
            found.append(self.checkpoint.restore(image))
        return found[1:]

    def _limit(self, *words: object) -> list[list[float]]:
        """Rounds of a limit, ms."""
        done = subprocess.run(
            [str(self._limits), *map(str, words)], check=True, capture_output=True, text=True
        ).stdout
        return [[float(word) / 1000 for word in line.split()] for line in done.splitlines()]

    def _add(self, row: Row) -> None:
        self.report.rows.append(row)
        ratio = f", {row.ratio:.2f} of the limit {row.limit}" if row.ratio is not None else ""
        print(f"{row.case}: {row.ours}{ratio} {row.verdict} {row.note}", flush=True)

    def close(self) -> None:
        self.checkpoint.close()


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
