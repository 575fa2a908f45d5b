# SPDX-License-Identifier: Apache-2.0
"""A process with another root directory (chroot) comes back in it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from checkpointd.errors import Unsupported
from tests.programs.restore_harness import capture, kill_and_reap, restore

pytestmark = pytest.mark.needs("root", "ptrace", "set_tid")
PROGRAM = """
import os, sys, time
os.chroot(sys.argv[1])
os.chdir("/inner")
held = os.open("/inner/held", os.O_RDWR | os.O_CREAT | os.O_APPEND)
os.write(held, b"0123456789")
os.lseek(held, 4, os.SEEK_SET)
number = 0
while True:
    number += 1
    with open("/new", "w") as file:
        content = os.pread(held, 3, os.lseek(held, 0, os.SEEK_CUR)).decode()
        file.write(f"{number} {os.getcwd()} {os.path.exists('/usr')} {content}")
    os.rename("/new", "/progress")
    time.sleep(0.01)
"""


def test_root_and_directory_within_it_come_back(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    progress = tmp_path / "progress"

    def wait_more() -> None:
        first, deadline = -1, time.monotonic() + 60
        while True:
            if progress.exists():
                number, directory, sees_all, held = progress.read_text().split()
                assert (directory, sees_all, held) == ("/inner", "False", "456")
                first = int(number) if first < 0 else first
                if int(number) >= first + 10:
                    return
            assert time.monotonic() < deadline
            time.sleep(0.01)

    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, tmp_path],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        wait_more()
        captured = capture(child.pid, kill=True)
        kill_and_reap(child)
        progress.unlink()
        restore(captured)
        assert os.readlink(f"/proc/{child.pid}/root") == str(tmp_path)
        wait_more()
    finally:
        kill_and_reap(child.pid if child.poll() is not None else child)


BOUND = """
import os, socket, sys, time
os.chroot(sys.argv[1])
server = socket.socket(socket.AF_UNIX)
server.bind("/bound")
server.listen()
os.mkdir("/done")
time.sleep(1000)
"""


def test_a_socket_bound_within_it_is_refused_and_the_process_goes_on(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", BOUND, tmp_path],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "done").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(Unsupported, match=r"a UNIX socket is bound to /bound within the root directory"):
            capture(child.pid)
        while Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
            assert time.monotonic() < deadline  # on its way into its sleep again
            time.sleep(0.01)
    finally:
        kill_and_reap(child)
