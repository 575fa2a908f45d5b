# SPDX-License-Identifier: Apache-2.0
"""Children are not saved: a warning says so, and the process that comes back finds that it has none.

Those that live on keep its pid taken, as that of their session: the refusal names them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from checkpointd.errors import RestoreConflict
from checkpointd.restore.restorer import RestoreOptions
from tests.programs.restore_harness import capture, kill_and_reap, restore, wait_gone

pytestmark = pytest.mark.needs("root", "ptrace", "set_tid")
PROGRAM = """
import os, sys, time
child = os.fork()
if child == 0:
    time.sleep(600)
    os._exit(0)
while True:
    try:
        found = 1 if os.waitpid(child, os.WNOHANG) == (0, 0) else 2
    except ChildProcessError:
        found = 3
    os.utime(sys.argv[1], ns=(child, found))  # one call, which holds nothing open that a dump could meet
    time.sleep(0.01)
"""


_RUNNING, _NONE = 1, 3


def test_children_are_named_and_missing_afterwards(tmp_path: Path) -> None:
    told = tmp_path / "told"
    told.touch()

    def wait_for(answer: int) -> int:
        deadline = time.monotonic() + 60
        while True:
            found = told.stat()
            if found.st_mtime_ns == answer:
                return found.st_atime_ns
            assert time.monotonic() < deadline
            time.sleep(0.01)

    parent = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, told],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    child = 0
    try:
        child = wait_for(_RUNNING)
        captured = capture(parent.pid, kill=True)
        (warning,) = captured.state.process.warnings
        assert warning.startswith(
            f"it has 1 child process(es) ({child}): they are not saved, and it will come back"
        )
        assert "believing that they live" in warning
        assert "told to start others" in warning
        kill_and_reap(parent)
        assert Path(f"/proc/{child}").exists()  # nobody did anything to it
        with pytest.raises(RestoreConflict, match=rf"as the session or process group of process {child} [(]"):
            restore(captured, options=RestoreOptions(wait_for_ids_s=0.2))
        os.kill(child, signal.SIGKILL)
        wait_gone(child)
        child = 0
        restored = restore(captured)
        assert any("child process(es)" in warning for warning in restored.warnings)
        wait_for(_NONE)
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
        kill_and_reap(parent.pid if parent.poll() is not None else parent)
