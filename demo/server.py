# SPDX-License-Identifier: Apache-2.0
"""The program that is saved: a real redis-server, or `sqlite_server` where there is none."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from demo.resp import Connection

VALUE_BYTES = 4096
START_SECONDS = 30


class Server:
    """A running server on a loopback port, which may die and come back as another child of nobody's."""

    def __init__(self, kind: str, directory: Path) -> None:
        self.kind = kind
        self.port = _free_port()
        self.directory = directory / "server"
        self.directory.mkdir(mode=0o700)
        log = open(self.directory / "log", "ab")  # noqa: SIM115 (handed over)
        with log:
            self._process = subprocess.Popen(
                self._words(),
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LC_ALL": "C"},
            )
        self.pid = self._process.pid
        self._wait()

    def _words(self) -> list[str]:
        if self.kind == "redis":
            return [
                "redis-server",
                *("--port", str(self.port)),
                *("--bind", "127.0.0.1"),
                *("--save", ""),
                *("--appendonly", "no"),
                *("--dir", str(self.directory)),
                *("--daemonize", "no"),
            ]
        return [sys.executable, str(Path(__file__).with_name("sqlite_server.py")), str(self.port)]

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                with Connection(self.port) as connection:
                    connection("PING")
                return
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    log = (self.directory / "log").read_text(errors="replace")
                    raise RuntimeError(f"{self.kind} did not start: {log[-2000:]}") from None
                time.sleep(0.02)

    def rss_bytes(self) -> int:
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * 4096

    def kill(self) -> None:
        """kill -9, and wait until the process is gone."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        if self._process.pid == self.pid:
            self._process.wait()
        deadline = time.monotonic() + START_SECONDS
        while Path(f"/proc/{self.pid}").exists():
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, os.WNOHANG)
            if _is_zombie(self.pid) or time.monotonic() > deadline:
                return  # whoever restored it has yet to wait for it
            time.sleep(0.01)


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return False


def have_redis() -> bool:
    return shutil.which("redis-server") is not None


def filler(number: int) -> bytes:
    """The value of ballast key `number`: random, so that compression does not do the work of the dump."""
    return random.Random(number).randbytes(VALUE_BYTES)  # noqa: S311 (ballast, no secret)


def fill(port: int, size_bytes: int) -> int:
    """Store ballast; how many keys."""
    nr_keys = size_bytes // VALUE_BYTES
    with Connection(port) as connection:
        for start in range(0, nr_keys, 256):
            connection.pipeline(
                [("SET", f"ballast:{n}", filler(n)) for n in range(start, min(start + 256, nr_keys))]
            )
    return nr_keys


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
