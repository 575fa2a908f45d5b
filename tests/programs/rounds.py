# SPDX-License-Identifier: Apache-2.0
"""A CPython target that checks its memory round after round, and says so in a file.

It is given the file's path as its last argument, and writes there "ROUND OK [MORE...]", all of them numbers.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from tests.programs.restore_harness import kill_and_reap


class RoundsTarget:
    def __init__(self, program: str, directory: Path, *words: str) -> None:
        self.out = directory / "out"
        self.child = subprocess.Popen(
            [sys.executable, "-c", program, *words, self.out],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(directory / "err").open("wb"),
            start_new_session=True,
        )
        self.pid = self.child.pid
        self.wait_rounds(1)

    def read(self) -> list[int]:
        """What it wrote last; [] while it writes."""
        try:
            return [int(word) for word in self.out.read_text().split()]
        except OSError:
            return []

    def wait_rounds(self, nr: int) -> None:
        first = (self.read() or [0])[0]
        deadline = time.monotonic() + 60
        while True:
            now = self.read()
            if len(now) > 1 and now[0] >= first + nr:
                assert now[1] == 1, "the memory differs"
                return
            assert time.monotonic() < deadline, self.out.with_name("err").read_text()
            time.sleep(0.01)

    def kill(self) -> None:
        kill_and_reap(self.child if self.child.poll() is None else self.pid)
