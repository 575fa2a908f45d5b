# SPDX-License-Identifier: Apache-2.0
"""A Python program with threads that counts rounds, as restore tests use it."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from tests.programs.restore_harness import kill_and_reap, wait_gone

PROGRAM = Path(__file__).with_name("restore_python_program.py")


class Program:
    """The Python program, whoever is its parent just now."""

    def __init__(self, directory: Path, python: str) -> None:
        self.progress = directory / "progress"
        self.errors = directory / "errors"
        with self.errors.open("wb") as errors:
            self.child = subprocess.Popen(
                [python, PROGRAM, self.progress],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
                cwd=directory,
            )
        self.pid = self.child.pid
        self.wait_rounds(3)

    def read(self) -> list[int]:
        try:
            return [int(word) for word in self.progress.read_text().split()]
        except OSError:
            return []

    def wait_rounds(self, nr: int, pid: int | None = None) -> list[int]:
        """Wait until it has made `nr` more rounds."""
        first = self.read()
        deadline = time.monotonic() + 60
        while True:
            now = self.read()
            if now and now[0] == (pid or self.pid) and now[1] >= (first[1] if first else 0) + nr:
                return now
            assert time.monotonic() < deadline, self.errors.read_text() or now
            time.sleep(0.005)

    def kill(self) -> None:
        kill_and_reap(self.child if self.child.poll() is None else self.pid)
        wait_gone(self.pid)
