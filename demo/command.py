# SPDX-License-Identifier: Apache-2.0
"""The command `checkpoint`, as a user calls it, with a service and a store of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


class CommandFailed(Exception):
    """The command said no.

    Attributes:
        code: its exit status.
        reason: the name of the error (`UNSUPPORTED`, ...), empty when it gave none.
    """

    def __init__(self, words: list[str], code: int, stderr: str) -> None:
        self.code = code
        self.reason = ""
        text = stderr.strip()
        for line in reversed(text.splitlines()):
            try:
                error = json.loads(line)
            except ValueError:
                continue
            if isinstance(error, dict) and error.get("message_type") == "error":
                self.reason = str(error.get("reason", ""))
                text = f"{error.get('message')} ({error.get('hint')}) {error.get('details') or ''}"
                break
        super().__init__(f"checkpoint {' '.join(words)}: exit {code}: {text}")


class Checkpoint:
    """A service of its own at `directory`; ends with `close`."""

    def __init__(self, directory: Path) -> None:
        self.store = directory / "store"
        run = directory / "run"
        run.mkdir(mode=0o700)
        self._program = str(Path(sys.executable).parent / "checkpoint")
        self._environ = dict(os.environ)
        self.socket = str(run / "checkpointd.sock")
        self._environ["CHECKPOINT_SOCKET"] = self.socket
        self._environ["CHECKPOINT_STORE"] = str(self.store)

    def __call__(self, *words: str, timeout: float = 300) -> dict[str, Any]:
        """One command with --json; the last document it printed (of a long one: the summary).

        Raises:
            CommandFailed: its exit status was not 0.
        """
        done = subprocess.run(
            [self._program, *words, "--json"],
            env=self._environ,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        if done.returncode != 0:
            raise CommandFailed(list(words), done.returncode, done.stderr)
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        try:
            found: dict[str, Any] = json.loads(lines[-1])
        except (IndexError, ValueError):
            found = json.loads(done.stdout or "{}")
        return found

    def dump(self, pid: int, *words: str) -> dict[str, Any]:
        return self("dump", "-p", str(pid), *words)

    def restore(self, image: str, *words: str) -> dict[str, Any]:
        return self("restore", image, *words)

    def close(self) -> None:
        try:
            self("serve", "--stop", timeout=30)
        except (CommandFailed, subprocess.TimeoutExpired):
            pass
