# SPDX-License-Identifier: Apache-2.0
"""An ordinary user saves and restores a process of his own: all by the command, without any capability."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
UID = 65534
WAIT_S = 90
pytestmark = pytest.mark.needs("root", "ptrace")


def _may_read(path: Path) -> bool:
    """May somebody else look into it?"""
    return all(one.stat().st_mode & 0o005 == 0o005 for one in (path, *path.resolve().parents) if one.is_dir())


def _interpreter() -> str:
    """One of our version that anybody may run."""
    for path in (Path(os.path.realpath(sys.executable)), Path("/usr/bin/python3")):
        if path.exists() and _may_read(path.parent):
            asked = [path, "-c", "import sys; print(sys.version_info[:2])"]
            if subprocess.run(asked, capture_output=True, text=True).stdout.strip() == str(
                sys.version_info[:2]
            ):
                return str(path)
    pytest.skip(f"no Python {sys.version_info[:2]} that another user may run")


def _documents(text: str) -> list[dict[str, Any]]:
    """One JSON document, or one in each line."""
    try:
        return [json.loads(text)]
    except ValueError:
        return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


class User:
    """Somebody without rights, with a home and a service."""

    def __init__(self, home: Path) -> None:
        import numpy as np

        self.python = _interpreter()
        site = Path(np.__file__).parents[1]
        if not _may_read(ROOT) or not _may_read(site):
            pytest.skip("another user may not read the code under test")
        self.home = home
        run = home / "run"
        run.mkdir(mode=0o700)
        for path in (home, run):
            os.chown(path, UID, UID)
        self.environ = {
            "PATH": "/usr/bin:/bin",
            "HOME": str(home),
            "PYTHONPATH": ":".join(str(one) for one in (ROOT, ROOT / "cli", ROOT / "kernel-shim", site)),
            "PYTHONDONTWRITEBYTECODE": "1",
            "CHECKPOINT_STORE": str(home / "store"),
            "CHECKPOINT_SOCKET": str(run / "checkpointd.sock"),
        }
        self._who: dict[str, Any] = {
            "user": UID,
            "group": UID,
            "extra_groups": [],
            "cwd": home,
            "env": self.environ,
        }

    def start(self, *words: str | Path) -> subprocess.Popen[bytes]:
        null = subprocess.DEVNULL
        return subprocess.Popen(
            [self.python, *words], stdin=null, stdout=null, stderr=null, start_new_session=True, **self._who
        )

    def checkpoint(self, *words: str) -> tuple[int, list[dict[str, Any]]]:
        """(exit status, what it said) of one command with --json; errors too."""
        done = subprocess.run(
            [self.python, "-m", "checkpoint_cli", *words, "--json"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, **self._who,
        )  # fmt: skip
        return done.returncode, [*_documents(done.stdout), *_documents(done.stderr)]

    def ok(self, *words: str) -> dict[str, Any]:
        code, said = self.checkpoint(*words)
        assert code == 0, said
        return next(one for one in said if one.get("message_type", "summary") == "summary")


@pytest.fixture
def user() -> Iterator[User]:
    home = Path(tempfile.mkdtemp(prefix="checkpointd-user-"))  # tmp_path is root's alone
    found = User(home)
    yield found
    found.checkpoint("serve", "--stop")
    shutil.rmtree(home)


def _rounds(progress: Path, pid: int, nr: int) -> None:
    """Wait until the process has made `nr` more rounds."""
    first, deadline = -1, time.monotonic() + WAIT_S
    while True:
        try:
            words = [int(word) for word in progress.read_text().split()]
        except OSError:
            words = []
        if words[:1] == [pid]:
            first = words[1] if first < 0 else first
            if words[1] >= first + nr:
                return
        assert time.monotonic() < deadline, words
        time.sleep(0.01)


def test_own_process_is_saved_and_restored_with_a_new_pid(user: User) -> None:
    progress = user.home / "progress"
    child = user.start(ROOT / "tests/programs/restore_python_program.py", progress)
    new = 0
    try:
        _rounds(progress, child.pid, 3)
        assert int(Path(f"/proc/{child.pid}/status").read_text().split("CapEff:")[1].split()[0], 16) == 0
        first = user.ok("dump", "-p", str(child.pid))
        second = user.ok("dump", "--incremental", "-p", str(child.pid), "--kill")
        assert second["parent_id"] == first["image_id"]
        child.wait()

        code, said = user.checkpoint("restore", "latest")  # a pid cannot be chosen
        assert code == 5
        assert any("CAP_CHECKPOINT_RESTORE" in one.get("message", "") for one in said)

        restored = user.ok("restore", "latest", "--new-pid")
        new = restored["pid"]
        assert os.stat(f"/proc/{new}").st_uid == UID
        assert any("/proc/PID/exe" in warning for warning in restored["warnings"])
        _rounds(progress, new, 12)  # it makes threads, joins them and forks
        again = user.ok("dump", "--incremental", "-p", str(new))
        assert again["parent_id"] == second["image_id"]
        _rounds(progress, new, 3)
    finally:
        child.kill()
        child.wait()
        if new:
            os.kill(new, signal.SIGKILL)


def test_check_says_what_is_missing_and_others_are_out_of_reach(user: User) -> None:
    mine = user.start("-c", "import time; time.sleep(600)")
    roots = subprocess.Popen(["sleep", "600"])
    try:
        time.sleep(0.2)
        code, said = user.checkpoint("check", "-p", str(mine.pid))
        text = json.dumps(said)
        assert code == 0
        for name in ("CAP_SYS_PTRACE", "CAP_CHECKPOINT_RESTORE", "restoring with the same pid"):
            assert name in text
        code, said = user.checkpoint("dump", "-p", str(roots.pid))
        assert code == 5
        assert any(f"process {roots.pid} belongs to uid 0" in one.get("message", "") for one in said)
        assert Path(f"/proc/{roots.pid}/stat").read_text().split()[2] == "S"
    finally:
        for child in (mine, roots):
            child.kill()
            child.wait()
