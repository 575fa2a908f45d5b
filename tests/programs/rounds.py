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

    def _read(self) -> list[int]:
        """What it wrote last; nothing while it writes."""
        try:
            return [int(word) for word in self.out.read_text().split()]
        except OSError:
            return []

    def wait_rounds(self, nr: int) -> list[int]:
        """Wait until it has checked its memory as often; its numbers."""
        deadline = time.monotonic() + 60
        first = None
        while True:
            now = self._read()
            if len(now) > 1:
                first = now[0] if first is None else first
                assert now[1] == 1, "the memory differs"
                if now[0] >= first + nr:
                    return now
            assert time.monotonic() < deadline, self.out.with_name("err").read_text()
            time.sleep(0.01)

    def kill(self) -> None:
        kill_and_reap(self.child if self.child.poll() is None else self.pid)
