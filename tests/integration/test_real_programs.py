# SPDX-License-Identifier: Apache-2.0
"""Real programs, through the command: dump, dump incrementally, kill, restore, work on, dump again.

The last generation is brought back, and then an earlier one.
Each program keeps a table that follows a rule (`Model`), so that every answer it gives after a restore can be told
right or wrong, and goes on from where that generation was, not from where it died.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from demo.command import Checkpoint
from demo.resp import Connection

pytestmark = pytest.mark.needs("root", "ptrace", "set_tid")

PROGRAMS = Path(__file__).parents[1] / "programs"
NR_ENTRIES = 1 << 18
MASK = (1 << 64) - 1
START_SECONDS = 60


class Model:
    """The rule of the workloads."""

    def __init__(self) -> None:
        self.count, self.x = 0, 1
        self.table: dict[int, int] = {}

    def step(self, n: int) -> None:
        for _ in range(n):
            self.x = (self.x * 6364136223846793005 + 1442695040888963407) & MASK
            at = (self.x >> 33) % NR_ENTRIES
            self.table[at] = (self.table.get(at, 0) + self.x) & MASK
            self.count += 1

    def copy(self) -> Model:
        other = Model()
        other.count, other.x, other.table = self.count, self.x, dict(self.table)
        return other

    def __str__(self) -> str:
        total = sum(value * (at + 1) for at, value in self.table.items()) & MASK
        return f"{self.count} {self.x} {total} 0"


class Program:
    """One running program.  `pid` stays the same over a restore."""

    def __init__(self, directory: Path, words: Callable[[int, Path], list[str]]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.directory = directory
        log = open(directory / "log", "ab")  # noqa: SIM115 (handed over)
        with log:
            self._process = subprocess.Popen(
                words(self.port, directory),
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={"PATH": os.environ["PATH"] + ":/usr/sbin", "HOME": str(directory), "LC_ALL": "C"},
            )
        self.pid = self._process.pid
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=5).close()
                return
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self.kill()
                    raise RuntimeError((directory / "log").read_text(errors="replace")[-2000:]) from None
                time.sleep(0.05)

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            text: str = answer.read().decode()
            return text

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._process.wait()
        deadline = time.monotonic() + 20
        while self.state() not in ("", "Z") and time.monotonic() < deadline:
            time.sleep(0.01)

    def state(self) -> str:
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return ""


@pytest.fixture(scope="module")
def checkpoint() -> Iterator[Checkpoint]:
    directory = Path(tempfile.mkdtemp(prefix="checkpointd-real-"))
    command = Checkpoint(directory)
    yield command
    command.close()
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    programs: list[Program] = []

    def start(words: Callable[[int, Path], list[str]]) -> Program:
        programs.append(Program(tmp_path, words))
        return programs[-1]

    yield start
    for program in programs:
        program.kill()


def _python(port: int, directory: Path) -> list[str]:
    return [sys.executable, str(PROGRAMS / "workload_python.py"), str(port)]


def _node(port: int, directory: Path) -> list[str]:
    return ["node", str(PROGRAMS / "workload_node.js"), str(port)]


def _go(port: int, directory: Path) -> list[str]:
    program = directory / "workload_go"
    environ = {**os.environ, "GOCACHE": str(directory / "cache"), "GO111MODULE": "off", "CGO_ENABLED": "0"}
    subprocess.run(["go", "build", "-o", program, PROGRAMS / "workload_go.go"], check=True, env=environ)
    return [str(program), str(port)]


def _java(port: int, directory: Path) -> list[str]:
    source = directory / "WorkloadJava.java"
    shutil.copy(PROGRAMS / "workload_java.java", source)
    subprocess.run(["javac", "-d", directory, source], check=True)
    return ["java", "-Xmx128m", "-cp", str(directory), "WorkloadJava", str(port)]


WORKLOADS = [
    pytest.param(_python, id="cpython"),
    pytest.param(_node, id="node", marks=pytest.mark.needs("node")),
    pytest.param(_go, id="go", marks=pytest.mark.needs("go")),
    pytest.param(_java, id="java", marks=pytest.mark.needs("java")),
]


@pytest.mark.parametrize("words", WORKLOADS)
def test_program_goes_on_from_any_generation(
    checkpoint: Checkpoint,
    started: Callable[..., Program],
    words: Callable[[int, Path], list[str]],
) -> None:
    program = started(words)
    model = Model()

    def step(n: int) -> None:
        model.step(n)
        assert program.get(f"/step?n={n}") == str(model)

    step(3000)
    generations = []
    for n, options in enumerate([(), ("--incremental",), ("--incremental",)]):
        stats = checkpoint.dump(program.pid, "--tcp", "close", *options)
        assert bool(stats["parent_id"]) == (n > 0), stats
        generations.append((stats["image_id"], model.copy()))
        step(200)

    for generation in (2, 1):
        program.kill()
        image_id, model = generations[generation]
        assert checkpoint.restore(image_id, "--tcp", "close")["pid"] == program.pid
        assert program.get("/state") == str(model)
        step(150)
        stats = checkpoint.dump(program.pid, "--tcp", "close", "--incremental")
        assert stats["parent_id"] == image_id
        # tracked from its first instruction on; how much it rewrote since is its own affair (a collector may move much)
        assert stats["pages_skipped_parent"] > 100, stats
        step(50)


@pytest.mark.needs("redis")
def test_redis_goes_on_from_any_generation(checkpoint: Checkpoint, started: Callable[..., Program]) -> None:
    program = started(
        lambda port, directory: [
            *("redis-server", "--port", str(port), "--bind", "127.0.0.1"),
            *("--save", "", "--appendonly", "no", "--dir", str(directory)),
        ]
    )
    generations = []
    for n in range(3):
        with Connection(program.port) as redis:
            redis.pipeline([("SET", f"key:{i}", f"{n}:{i}" * 50) for i in range(n, 20_000, 1 + 9 * n)])
            redis("INCR", "generation")
        stats = checkpoint.dump(program.pid, *(("--incremental",) if n else ()))
        generations.append(stats["image_id"])
    with Connection(program.port) as redis:
        redis("FLUSHALL")
    for generation in (2, 0, 1):
        program.kill()
        checkpoint.restore(generations[generation])
        with Connection(program.port) as redis:
            assert redis("GET", "generation") == b"%d" % (generation + 1)
            for i in range(0, 20_000, 7):
                writer = max(n for n in range(generation + 1) if i >= n and (i - n) % (1 + 9 * n) == 0)
                assert redis("GET", f"key:{i}") == f"{writer}:{i}".encode() * 50
            assert redis("SET", "after", "x" * 100_000) == "OK"
            assert redis("DBSIZE") == 20_002


@pytest.mark.needs("memcached")
def test_memcached_goes_on_from_any_generation(
    checkpoint: Checkpoint, started: Callable[..., Program]
) -> None:
    program = started(
        lambda port, directory: ["memcached", "-u", "root", "-l", "127.0.0.1", "-p", str(port), "-m", "64"]
    )

    def ask(text: str, end: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", program.port), timeout=30) as connection:
            connection.sendall(text.encode())
            data = b""
            while not data.endswith(end):
                part = connection.recv(65536)
                assert part, f"closed after {data!r}"
                data += part
            return data

    generations = []
    for n in range(3):
        for i in range(0, 300, 1 + n):
            value = f"{n}:{i}" * 100
            assert ask(f"set key{i} 0 0 {len(value)}\r\n{value}\r\n", b"\r\n") == b"STORED\r\n"
        stats = checkpoint.dump(program.pid, "--tcp", "close", *(("--incremental",) if n else ()))
        generations.append(stats["image_id"])
    for generation in (2, 0, 1):
        program.kill()
        checkpoint.restore(generations[generation], "--tcp", "close")
        for i in range(0, 300, 5):
            writer = max(n for n in range(generation + 1) if i % (1 + n) == 0)
            value = f"{writer}:{i}" * 100
            assert (
                ask(f"get key{i}\r\n", b"END\r\n")
                == f"VALUE key{i} 0 {len(value)}\r\n{value}\r\nEND\r\n".encode()
            )
        assert ask("set new 0 0 3\r\nyes\r\n", b"\r\n") == b"STORED\r\n"


@pytest.mark.needs("nginx")
def test_nginx_goes_on(checkpoint: Checkpoint, started: Callable[..., Program]) -> None:
    def words(port: int, directory: Path) -> list[str]:
        (directory / "index.html").write_text("served by nginx\n" * 1000)
        paths = "".join(
            f"{kind}_temp_path {directory}/{kind}; "
            for kind in ("proxy", "fastcgi", "uwsgi", "scgi", "client_body")
        )
        (directory / "nginx.conf").write_text(
            f"daemon off; master_process off; pid {directory}/pid; error_log {directory}/error.log;\n"
            "events { worker_connections 64; }\n"
            f"http {{ {paths} access_log {directory}/access.log;\n"
            f"server {{ listen 127.0.0.1:{port}; root {directory}; }} }}\n"
        )
        return ["nginx", "-c", str(directory / "nginx.conf"), "-p", str(directory)]

    program = started(words)
    body = (program.directory / "index.html").read_text()
    log = program.directory / "access.log"

    def wait_logged(nr: int) -> None:
        """nginx writes a request's line when the answer is already out."""
        deadline = time.monotonic() + 60
        while log.read_bytes().count(b"\n") < nr:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.01)

    # A request that is answered but not yet logged when its generation is taken is logged once in every life that
    # goes on from there, and one that is not logged when the process is killed never: so each life is at rest when
    # it is saved or killed, and then every request is logged once.
    generations = []
    for n in range(3):
        assert all(program.get("/index.html") == body for _ in range(20))
        wait_logged((n + 1) * 20)
        stats = checkpoint.dump(program.pid, "--tcp", "close", *(("--incremental",) if n else ()))
        generations.append(stats["image_id"])
    for n, image in enumerate((generations[2], generations[0])):
        program.kill()
        checkpoint.restore(image, "--tcp", "close")
        assert all(program.get("/index.html") == body for _ in range(50))
        (program.directory / "new.html").write_text("new")
        assert program.get("/new.html") == "new"
        wait_logged(3 * 20 + (n + 1) * 51)
    paths = [line.split('"')[1] for line in log.read_text().splitlines()]
    page, new = "GET /index.html HTTP/1.1", "GET /new.html HTTP/1.1"
    assert paths == [page] * (3 * 20) + ([page] * 50 + [new]) * 2
