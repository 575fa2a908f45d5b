# SPDX-License-Identifier: Apache-2.0
"""CRIU and us on the same program under the same writes, incrementally: pages written and bytes stored.

    python -m benchmarks.against_criu [--cycles 5] [--backends auto,...] [--programs pattern,redis]

CRIU runs `pre-dump --track-mem` once, then once a cycle with `--prev-images-dir`; we dump once, then incrementally.
Each tool has a run of the program of its own, since both clear the same bits. Pages of CRIU are those in its
pages-*.img (a pre-dump holds memory alone), its bytes all files of the directory, and besides what zstd (level 1, as
we use it) makes of each of them; ours are `pages_written` and `bytes_stored`, index and state included. Counts and
bytes, so an emulated machine will do; no time is taken.

CRIU has to run here: the lab's 6.1 kernels with Debian's criu are known to work.  Exit status 2 when it does not.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import zstandard

from benchmarks.precision import running
from checkpointd.dump.dump import DumpOptions, dumper
from checkpointd.image.store import Store
from tests.oracle.target import OracleTarget

PAGE = 4096
KEYS = 20_000


@dataclass
class Dump:
    """One dump of one tool."""

    pages: int
    nr_bytes: int
    note: str = ""
    packed_bytes: int = 0  # of CRIU's files, each compressed


class Criu:
    """CRIU by its command."""

    def __init__(self, directory: Path) -> None:
        self.program = shutil.which("criu") or "/usr/sbin/criu"
        self._directory, self._nr = directory, 0

    def dump(self, pid: int) -> Dump:
        """One pre-dump.

        Raises:
            RuntimeError: CRIU failed; the end of its log is the message.
        """
        where = self._directory / str(self._nr)
        where.mkdir(parents=True)
        words = [
            self.program,
            "pre-dump",
            "--track-mem",
            "-t",
            str(pid),
            "-D",
            str(where),
            "-o",
            "log",
            "-v4",
        ]
        if self._nr:
            words += ["--prev-images-dir", f"../{self._nr - 1}"]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        log = (where / "log").read_text(errors="replace") if (where / "log").exists() else done.stderr
        if done.returncode:
            raise RuntimeError("\n".join(log.splitlines()[-8:]) or done.stderr)
        self._nr += 1
        files = [
            path
            for path in where.iterdir()
            if path.name != "log" and path.is_file() and not path.is_symlink()
        ]
        pages = sum(path.stat().st_size for path in files if path.name.startswith("pages-")) // PAGE
        packed = sum(len(zstandard.compress(path.read_bytes(), 1)) for path in files)
        return Dump(pages, sum(path.stat().st_size for path in files), packed_bytes=packed)


class Ours:
    """Our dump loop, in this process."""

    def __init__(self, directory: Path, backend: str, compress: str) -> None:
        Store.open(str(directory), create=True)
        self._directory, self._backend, self._compress = str(directory), backend, compress
        self._stack = contextlib.ExitStack()
        self._dumper: object = None

    def dump(self, pid: int) -> Dump:
        if self._dumper is None:
            self._dumper = self._stack.enter_context(dumper(pid))
        options = DumpOptions(
            store=self._directory,
            incremental=True,
            backend=self._backend,
            compress=self._compress,
            read_mode="stopped",
        )
        stats = self._dumper.dump(options)  # type: ignore[attr-defined]
        return Dump(stats.pages_written, stats.bytes_stored, stats.backend)

    def close(self) -> None:
        self._stack.close()


Work = tuple[int, Callable[[int], None]]
"""(pid, what cycle n does)"""


@contextlib.contextmanager
def pattern() -> Iterator[Work]:
    """The thread's pattern: pages of a large old mapping are written, new memory appears beside it."""
    with OracleTarget() as target:
        target.play("map 0 anon 0 60")
        target.play("write 0 fill 0 60 100")
        target.play("unmap 0 part 20 40")
        target.play("brk 0 by 60 0 7")
        target.settle()

        def cycle(n: int) -> None:
            target.play(f"write 0 byte {3 * n} 1 {n + 1}")
            target.play(f"over {n + 1} anon {20 + 6 * n} 6 0 0")
            target.play(f"write {n + 1} fill 0 6 {n + 1}")
            target.play(f"brk 0 by 3 0 {n + 1}")
            target.settle()

        yield target.pid, cycle


@contextlib.contextmanager
def redis() -> Iterator[Work]:
    """20,000 keys, then 500 new ones a cycle."""
    directory = tempfile.mkdtemp(prefix="against-criu-")
    path = Path(directory) / "s"
    argv = ["redis-server", "--port", "0", "--unixsocket", str(path), "--save", "", "--dir", directory]

    def fill(first: int, count: int) -> None:
        text = "".join(f"SET key:{n} {'x' * 100}{n}\n" for n in range(first, first + count))
        client = ["redis-cli", "-s", str(path)]
        subprocess.run(client, input=text, text=True, stdout=subprocess.DEVNULL, check=True)

    try:
        with running(argv) as server:
            while subprocess.run(
                ["redis-cli", "-s", str(path), "ping"], capture_output=True, check=False
            ).returncode:
                pass
            fill(0, KEYS)
            yield server.pid, lambda n: fill(KEYS + 500 * n, 500)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


PROGRAMS = {"pattern": pattern, "redis": redis}


def series(program: str, dump: Callable[[int], Dump], cycles: int) -> list[Dump]:
    """The first dump and one after each cycle."""
    with PROGRAMS[program]() as (pid, cycle):
        found = [dump(pid)]
        for n in range(cycles):
            cycle(n)
            found.append(dump(pid))
    return found


def line(program: str, tool: str, found: Sequence[Dump]) -> str:
    first, later = found[0], found[1:]
    cells = (
        program, tool, first.pages, first.nr_bytes, sum(d.pages for d in later), sum(d.nr_bytes for d in later),
        " ".join(str(d.pages) for d in later),
    )  # fmt: skip
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.against_criu", description="Beside CRIU.")
    parser.add_argument("--cycles", type=int, default=5)
    parser.add_argument("--backends", default="auto")
    parser.add_argument("--programs", default=",".join(PROGRAMS))
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="against-criu-", dir="/dev/shm"))
    failed = False
    try:
        print("| program | tool | first: pages | bytes | later: pages | bytes | pages of each |")
        print("|---|---|---|---|---|---|---|", flush=True)
        for program in args.programs.split(","):
            criu = Criu(root / f"criu-{program}")
            try:
                found = series(program, criu.dump, args.cycles)
                print(line(program, "criu", found), flush=True)
                packed = [replace(one, nr_bytes=one.packed_bytes) for one in found]
                print(line(program, "criu, files packed by zstd", packed), flush=True)
            except (RuntimeError, OSError) as error:
                failed = True
                print(f"| {program} | criu | cannot: {error} |", flush=True)
            for backend in args.backends.split(","):
                for compress in ("none", ""):
                    ours = Ours(root / f"{program}-{backend}-{compress}", backend, compress)
                    try:
                        found = series(program, ours.dump, args.cycles)
                    finally:
                        ours.close()
                    name = f"{found[-1].note}, {'uncompressed' if compress else 'zstd'}"
                    print(line(program, name, found), flush=True)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
