# SPDX-License-Identifier: Apache-2.0
"""A service with fake agents and the real command, for tests of the service, the client and the command."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from checkpointd.client import connect
from checkpointd.client.autostart import is_listening
from tests import abilities

FAKE_AGENT = Path(__file__).parent / "programs" / "fake_agent_program.py"
# a guest of the lab is emulated
PATIENCE_S = 300.0 if os.environ.get("CHECKPOINTD_VM_KERNEL") else 60.0


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    """Poll for something another process does without telling us."""
    give_up = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < give_up, f"waited in vain for {what}"
        time.sleep(0.02)
    return found


class House:
    """A directory with a socket, a store and the fake agents' log; services and commands that use them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.socket = directory / "run" / "s.sock"
        self.store = directory / "store"
        self.agent_log = directory / "agent.log"
        self.service_log = directory / "service.log"
        self.service: subprocess.Popen[bytes] | None = None
        self.environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith("CHECKPOINT")},
            "CHECKPOINT_SOCKET": str(self.socket),
            "CHECKPOINT_STORE": str(self.store),
            "CHECKPOINTD_AGENT": shlex.join([sys.executable, str(FAKE_AGENT)]),
            "FAKE_AGENT_LOG": str(self.agent_log),
            "PYTHONPATH": str(Path(__file__).parent.parent),
        }

    def serve(self, *options: str, **environ: str) -> subprocess.Popen[bytes]:
        """Start a service and wait until it listens."""
        with self.service_log.open("ab") as log:
            self.service = subprocess.Popen(
                [sys.executable, "-m", "checkpointd.service.main", "-v", *options],
                env={**self.environ, **environ},
                stdout=log,
                stderr=log,
            )
        wait_until(self._listens, "the service")
        return self.service

    def _listens(self) -> bool:
        assert self.service is not None
        assert self.service.poll() is None, self.service_log.read_text()
        return is_listening(self.socket)

    def client(self, **options: Any) -> Any:
        return connect(self.socket, start=False, **options)

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "checkpoint_cli", *words]

    def checkpoint(self, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run the command to its end."""
        return subprocess.run(
            self.command(*words),
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            **options,
        )

    def checkpoint_json(self, *words: str) -> Any:
        """Run a command that must succeed; its one JSON document."""
        done = self.checkpoint(*words, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def begin(self, *words: str) -> subprocess.Popen[str]:
        """Start a command and leave it running."""
        return subprocess.Popen(
            self.command(*words), env=self.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def agent_notes(self) -> list[str]:
        return self.agent_log.read_text().splitlines() if self.agent_log.exists() else []

    def agent_pid(self) -> int:
        """Pid of the agent started last."""
        return int([note for note in self.agent_notes() if note.startswith("start ")][-1].split()[1])

    def wait_for_note(self, note: str) -> None:
        wait_until(lambda: note in self.agent_notes(), f"an agent's {note!r}")

    def close(self) -> None:
        if self.service is not None and self.service.poll() is None:
            self.service.terminate()
            self.service.wait(PATIENCE_S)
        elif self.socket.exists():  # one that a command started
            with contextlib.suppress(Exception), self.client() as client:
                os.kill(client.version()["pid"], signal.SIGTERM)
            wait_until(lambda: not self.socket.exists() or not is_listening(self.socket), "the service's end")


@contextlib.contextmanager
def house_of_real_agents(directory: Path) -> Iterator[House]:
    """A house whose service starts real agents."""
    abilities.require("ptrace")
    found = House(directory)
    del found.environ["CHECKPOINTD_AGENT"]
    found.serve()
    try:
        checked = found.checkpoint("check", "--json")
        assert checked.returncode == 0, checked.stdout + checked.stderr
        yield found
    finally:
        found.close()


@contextlib.contextmanager
def sleeping_target() -> Iterator[int]:
    """A process to be named as target; fake agents do not touch it."""
    with subprocess.Popen(["sleep", "1000"]) as process:
        try:
            yield process.pid
        finally:
            process.kill()


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def events_until(
    process: subprocess.Popen[str], wanted: Callable[[dict[str, Any]], bool]
) -> list[dict[str, Any]]:
    """Read JSON lines of a running command up to the wanted one."""
    assert process.stdout is not None
    found = []
    for line in process.stdout:
        found.append(json.loads(line))
        if wanted(found[-1]):
            return found
    raise AssertionError(f"the command ended: {process.stderr.read() if process.stderr else ''}")
