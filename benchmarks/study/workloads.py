# SPDX-License-Identifier: Apache-2.0
"""The programs of the study, each with a load generator of its own kind.

A workload is a context manager of (pid of the process to measure, probe); the probe returns how much was done so
far, or is None where a program cannot tell.  Everything it starts is ended with it; everything it needs comes
from Debian, or from the project's virtual environment, and is named in `needs`.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PATIENCE_S = 240.0
PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
SMALL = os.environ.get("STUDY_SMALL") == "1"
"""In an emulated guest: less data, gentler load."""

Probe = Callable[[], float]


class Skipped(Exception):
    """This machine lacks something; the text names the Debian package."""


@dataclass(frozen=True)
class Workload:
    """One program and its load."""

    name: str
    what: str
    run: Callable[[Path], contextlib.AbstractContextManager[tuple[int, Probe | None]]]
    needs: tuple[tuple[str, str], ...] = ()  # (program, Debian package)

    def missing(self) -> list[tuple[str, str]]:
        """Of what it needs."""
        return [
            (program, package)
            for program, package in self.needs
            if not (Path(program).exists() if "/" in program else shutil.which(program, path=PATH))
        ]

    def check(self) -> None:
        for program, package in self.missing():
            raise Skipped(f"{program} is missing: apt install {package}")


class Processes:
    """Started processes; all are ended, in reverse order."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._all: list[subprocess.Popen[Any]] = []

    def start(self, words: Sequence[object], **options: Any) -> subprocess.Popen[Any]:
        options.setdefault("stdout", subprocess.DEVNULL)
        options.setdefault("stderr", subprocess.DEVNULL)
        options.setdefault("stdin", subprocess.DEVNULL)
        child = subprocess.Popen(
            [str(word) for word in words],
            cwd=options.pop("cwd", self.directory),
            env={**os.environ, "PATH": PATH, **options.pop("environ", {})},
            start_new_session=True,
            **options,
        )
        self._all.append(child)
        return child

    def end(self) -> None:
        for child in reversed(self._all):
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, number)
                try:
                    child.wait(20)
                    break
                except subprocess.TimeoutExpired:
                    continue


@contextlib.contextmanager
def processes(directory: Path) -> Iterator[Processes]:
    made = Processes(directory)
    try:
        yield made
    finally:
        made.end()


def until(condition: Callable[[], Any], what: str) -> Any:
    give_up = time.monotonic() + PATIENCE_S
    while True:
        with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError, struct.error):
            if found := condition():
                return found
        if time.monotonic() > give_up:
            raise RuntimeError(f"waited in vain for {what}")
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def listening(port: int) -> bool:
    with socket.create_connection(("127.0.0.1", port), 1):
        return True


def counter_of(path: Path) -> Probe:
    """The first word of a shared file, as our own programs keep it."""
    return lambda: float(struct.unpack("Q", path.read_bytes()[:8])[0])


def compiled(directory: Path, name: str) -> Path:
    program = directory / name
    subprocess.run(["gcc", "-O2", "-w", "-o", program, HERE / f"{name}.c"], check=True)
    return program


# -- servers


@contextlib.contextmanager
def redis(directory: Path) -> Iterator[tuple[int, Probe | None]]:
    port = free_port()
    with processes(directory) as started:
        server = started.start(["redis-server", "--port", port, "--save", "", "--dir", directory])
        until(lambda: listening(port), "redis")
        keys = 20_000 if SMALL else 300_000
        bench = ["redis-benchmark", "-p", port, "-q"]
        subprocess.run(
            [*map(str, bench), "-t", "set", "-r", str(keys), "-n", str(keys), "-d", "200", "-P", "32"],
            stdout=subprocess.DEVNULL,
            check=True,
        )
        started.start([*bench, "-t", "set,incr,hset", "-r", keys, "-n", 10**9, "-d", 200, "-c", 4])

        def done() -> float:
            with socket.create_connection(("127.0.0.1", port), 10) as sock:
                sock.sendall(b"INFO stats\r\n")
                text = sock.recv(1 << 16)
            return float(re.search(rb"total_commands_processed:(\d+)", text)[1])

        yield server.pid, done


@contextlib.contextmanager
def memcached(directory: Path) -> Iterator[tuple[int, Probe | None]]:
    port = free_port()
    with processes(directory) as started:
        server = started.start(
            ["memcached", "-p", port, "-U", 0, "-u", "nobody", "-m", 64, "-l", "127.0.0.1"]
        )
        until(lambda: listening(port), "memcached")
        once = f"memcslap --servers=127.0.0.1:{port} --concurrency=2 --execute-number=2000"
        slap = f"while :; do {once} --test={{}}; done"
        started.start(["sh", "-c", slap.format("set")])
        started.start(["sh", "-c", slap.format("get")])

        def done() -> float:
            with socket.create_connection(("127.0.0.1", port), 10) as sock:
                sock.sendall(b"stats\r\n")
                text = b""
                while b"END\r\n" not in text:
                    text += sock.recv(1 << 16)
            return sum(float(x) for x in re.findall(rb"cmd_(?:get|set) (\d+)", text))

        yield server.pid, done


@contextlib.contextmanager
def postgres(directory: Path) -> Iterator[tuple[int, Probe | None]]:
    """The backend process that serves pgbench's one client; its shared buffers are shared memory."""
    where = max(Path("/usr/lib/postgresql").glob("*/bin"), default=Path("/nowhere"))
    if not (where / "postgres").exists():
        raise Skipped("postgres is missing: apt install postgresql")
    user, port, data = pwd.getpwnam("postgres"), free_port(), directory / "pg"
    data.mkdir(mode=0o700)
    for path in (directory, data):
        os.chown(path, user.pw_uid, user.pw_gid)
        path.chmod(0o755 if path == directory else 0o700)
    with processes(directory) as started:

        def asked(*words: object) -> str:
            return subprocess.run(
                [str(word) for word in words],
                **{"user": "postgres", "group": "postgres", "cwd": directory, "text": True, "check": True},
                capture_output=True,
                extra_groups=[],
            ).stdout

        asked(where / "initdb", "-D", data, "-A", "trust", "--no-sync")
        options = {"user": "postgres", "group": "postgres", "extra_groups": []}
        server = started.start(
            [where / "postgres", "-D", data, "-p", port, "-k", directory, "-c", "fsync=off"], **options
        )
        psql = ("psql", "-h", directory, "-p", port, "-Atc")
        until(lambda: asked(*psql, "select 1"), "postgres")
        asked("pgbench", "-h", directory, "-p", port, "-i", "-s", 1 if SMALL else 5, "-q", "postgres")
        load = ["pgbench", "-h", directory, "-p", port, "-c", 1, "-T", 100_000, "-n", "postgres"]
        started.start(load, **options)
        # pgbench's first connection only asks for the scale: take one that has been there for a while
        query = "select pid from pg_stat_activity where application_name='pgbench' and now() - backend_start > '1 s'"
        pid = int(until(lambda: asked(*psql, query).strip(), "pgbench"))
        assert server.poll() is None
        yield pid, lambda: float(asked(*psql, "select count(*) from pgbench_history"))


@contextlib.contextmanager
def nginx(directory: Path) -> Iterator[tuple[int, Probe | None]]:
    port = free_port()
    site = directory / "site"
    site.mkdir()
    for path in (directory, site):
        path.chmod(0o755)
    for n in range(200):
        (site / f"{n}.html").write_bytes(os.urandom(500 + n * 40))
    (directory / "nginx.conf").write_text(f"""
daemon off; master_process on; worker_processes 1; error_log /dev/null; pid {directory}/nginx.pid;
events {{ worker_connections 256; }}
http {{ access_log {directory}/access.log; gzip on; gzip_types text/html; open_file_cache max=1000;
  server {{ listen 127.0.0.1:{port}; root {site}; location /status {{ stub_status; }} }} }}
""")
    (directory / "load.lua").write_text(
        'request = function() return wrk.format("GET", "/" .. math.random(0, 199) .. ".html") end\n'
    )
    with processes(directory) as started:
        server = started.start(["nginx", "-c", directory / "nginx.conf", "-e", "/dev/null", "-p", directory])
        until(lambda: listening(port), "nginx")
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children")
        worker = int(until(children.read_text, "nginx's worker").split()[0])
        _wrk(started, directory, f"http://127.0.0.1:{port}/", "-s", directory / "load.lua")

        def done() -> float:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/status", timeout=20) as answer:
                return float(answer.read().split()[9])

        yield worker, done


def _wrk(started: Processes, directory: Path, url: str, *more: object) -> None:
    started.start(["wrk", "-t", 1, "-c", 4, "-d", "100000s", "--timeout", "60s", *more, url])


# -- languages and their run times


@contextlib.contextmanager
def python_web(directory: Path) -> Iterator[tuple[int, Probe | None]]:
    with _http(directory, [sys.executable, HERE / "web.py"]) as found:
        yield found


@contextlib.contextmanager
def node(directory: Path) -> Iterator[tuple[int, Probe | None]]:
    with _http(directory, ["node", HERE / "web.js"]) as found:
        yield found


@contextlib.contextmanager
def java(directory: Path) -> Iterator[tuple[int, Probe | None]]:
    subprocess.run(["javac", "-d", directory, HERE / "Web.java"], check=True)
    with _http(directory, ["java", "-Xmx256m", "-cp", directory, "Web"]) as found:
        yield found


@contextlib.contextmanager
def _http(directory: Path, words: Sequence[object]) -> Iterator[tuple[int, Probe | None]]:
    """A server of three paths (/put?k=, /get?k=, /count) under wrk."""
    port = free_port()
    (directory / "load.lua").write_text(
        "request = function() local k = math.random(0, 19999)\n"
        '  return wrk.format("GET", (math.random() < 0.3 and "/put?k=" or "/get?k=") .. k) end\n'
    )
    with processes(directory) as started:
        server = started.start([*words, port])
        until(lambda: listening(port), str(words[0]))
        _wrk(started, directory, f"http://127.0.0.1:{port}/", "-s", directory / "load.lua")
        time.sleep(2)

        def done() -> float:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/count", timeout=20) as answer:
                return float(answer.read())

        yield server.pid, done


@contextlib.contextmanager
def numpy(directory: Path) -> Iterator[tuple[int, Probe | None]]:
    counter = directory / "counter"
    with processes(directory) as started:
        child = started.start([sys.executable, HERE / "train.py", counter, 1 if SMALL else 4])
        until(lambda: counter.exists() and counter_of(counter)() > 2, "the training")
        yield child.pid, counter_of(counter)


@contextlib.contextmanager
def sqlite(directory: Path) -> Iterator[tuple[int, Probe | None]]:
    """The sqlite3 shell, fed with statements through a pipe."""
    done = [0]
    with processes(directory) as started:
        shell = started.start(["sqlite3", "-batch", ":memory:"], stdin=subprocess.PIPE)
        pipe, ending = shell.stdin, threading.Event()
        assert pipe is not None

        def feed() -> None:
            import random

            rng, number = random.Random(1), 0
            with contextlib.suppress(OSError):
                pipe.write(
                    b"create table t(id integer primary key, a int, b text); create index i on t(a);\n"
                )
                while not ending.is_set():
                    rows = [
                        f"insert into t(a,b) values({rng.randrange(10**6)},'{rng.random()}');"
                        for _ in range(40)
                    ]
                    rows += [
                        f"update t set a={number} where id={rng.randrange(1, number + 2)};" for _ in range(40)
                    ]
                    if number > 50_000:
                        rows.append(
                            f"delete from t where id between {number - 50_000} and {number - 49_960};"
                        )
                    pipe.write(("begin;" + "\n".join(rows) + "commit;\n").encode())
                    pipe.flush()
                    number += 40
                    done[0] += 80
                    time.sleep(0.002)

        thread = threading.Thread(target=feed, daemon=True)
        thread.start()
        time.sleep(4 if SMALL else 2)
        try:
            yield shell.pid, lambda: float(done[0])
        finally:
            ending.set()


# -- batch programs


@contextlib.contextmanager
def gcc(directory: Path) -> Iterator[tuple[int, Probe | None]]:
    """cc1 over a file of many functions, begun again whenever it ends; the first one is measured."""
    nr = 400 if SMALL else 4000
    body = "\n".join(
        f"static double f{n}(double *x, int n) {{ double s = {n}; for (int i = 0; i < n; i++) {{ if (x[i] > {n}) "
        f"s += x[i] * x[(i + {n % 7}) % n]; else s -= x[i] / ({n} + i); }} switch (n % 5) {{ case 0: s *= 2; break; "
        f"case 1: s -= x[0]; break; case 2: s += x[n - 1]; default: s /= 3; }} return s; }}\n"
        f"double g{n}(double *x, int n) {{ return f{n}(x, n) + f{n}(x + 1, n - 1) * {n}.5; }}"
        for n in range(nr)
    )
    (directory / "many.c").write_text(body)
    cc1 = subprocess.run(
        ["gcc", "-print-prog-name=cc1"], capture_output=True, text=True, check=True
    ).stdout.strip()
    with processes(directory) as started:
        child = started.start([cc1, "-quiet", "-O2", "many.c", "-o", "/dev/null"])
        time.sleep(2)
        yield child.pid, None


@contextlib.contextmanager
def xz(directory: Path) -> Iterator[tuple[int, Probe | None]]:
    """xz -6 over text that does not end."""
    with processes(directory) as started:
        source = (
            "import random\nr = random.Random(2)\nwhile True: print(r.random(), r.choice(['alpha', 'beta']))"
        )
        feed = started.start([sys.executable, "-c", source], stdout=subprocess.PIPE)
        child = started.start(["xz", "-6", "-c"], stdin=feed.stdout)
        time.sleep(2)
        yield child.pid, None


def churn(preload: str = "") -> Callable[[Path], contextlib.AbstractContextManager[tuple[int, Probe | None]]]:
    @contextlib.contextmanager
    def run(directory: Path) -> Iterator[tuple[int, Probe | None]]:
        counter = directory / "counter"
        with processes(directory) as started:
            environ = {"LD_PRELOAD": preload} if preload else {}
            child = started.start([compiled(directory, "churn"), 500, counter], environ=environ)
            until(lambda: counter.exists() and counter_of(counter)() > 10, "churn")
            yield child.pid, counter_of(counter)

    return run


def pattern(kind: str) -> Callable[[Path], contextlib.AbstractContextManager[tuple[int, Probe | None]]]:
    @contextlib.contextmanager
    def run(directory: Path) -> Iterator[tuple[int, Probe | None]]:
        counter = directory / "counter"
        with processes(directory) as started:
            child = started.start([compiled(directory, "patterns"), kind, 50, counter])
            until(lambda: counter.exists() and counter_of(counter)() > 1, "patterns")
            yield child.pid, counter_of(counter)

    return run


JEMALLOC = "/usr/lib/x86_64-linux-gnu/libjemalloc.so.2"
GCC = (("gcc", "gcc"),)

WORKLOADS = {
    one.name: one
    for one in (
        Workload(
            "redis",
            "redis-server, redis-benchmark: set, incr, hset",
            redis,
            (("redis-server", "redis-server"),),
        ),
        Workload(
            "memcached",
            "memcached, memcslap: set and get",
            memcached,
            (("memcached", "memcached"), ("memcslap", "libmemcached-tools")),
        ),
        Workload(
            "postgresql",
            "a PostgreSQL backend, pgbench",
            postgres,
            (("pgbench", "postgresql-contrib"), ("/usr/lib/postgresql", "postgresql")),
        ),
        Workload(
            "nginx", "an nginx worker with gzip, wrk", nginx, (("nginx", "nginx-light"), ("wrk", "wrk"))
        ),
        Workload("sqlite", "the sqlite3 shell, inserts, updates, deletes", sqlite, (("sqlite3", "sqlite3"),)),
        Workload("numpy", "CPython with numpy, training a small network", numpy),
        Workload("python-web", "CPython, a threaded web server, wrk", python_web, (("wrk", "wrk"),)),
        Workload("node", "Node.js, a web server, wrk", node, (("node", "nodejs"), ("wrk", "wrk"))),
        Workload(
            "java", "OpenJDK, a web server, wrk", java, (("javac", "default-jdk-headless"), ("wrk", "wrk"))
        ),
        Workload("gcc", "cc1 -O2 on a file of 8,000 functions", gcc, GCC),
        Workload("xz", "xz -6 on text that does not end", xz, (("xz", "xz-utils"),)),
        Workload("malloc-glibc", "a malloc and free program with glibc's allocator", churn(), GCC),
        Workload(
            "malloc-jemalloc", "the same with jemalloc", churn(JEMALLOC), (*GCC, (JEMALLOC, "libjemalloc2"))
        ),
        Workload("pattern-pair", "[!SD][SD]: new mappings behind clean ones", pattern("pair"), GCC),
        Workload("pattern-triple", "[!SD][SD][!SD]: new ones between clean ones", pattern("triple"), GCC),
        Workload("pattern-chain", "[!SD][SD][SD]...: a chain of new ones", pattern("chain"), GCC),
        Workload("pattern-heap", "brk: the heap grows by a little", pattern("heap"), GCC),
    )
}
