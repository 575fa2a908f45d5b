# SPDX-License-Identifier: Apache-2.0
"""Descriptors that lead to threads of their own process in /proc go on leading there, whatever its ids are."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpointd.linux.pidfd import pidfd_getfd
from tests.integration.test_restore_rights import UID, _python, wait_for
from tests.programs.restore_harness import Captured, capture, kill_and_reap, restore

pytestmark = pytest.mark.needs("root", "ptrace", "set_tid")
PROGRAM = """
import fcntl, os, signal, struct, sys, threading, time
def at(number, path, flags=os.O_RDONLY):
    fd = os.open(path, flags)
    os.dup2(fd, number)
    os.close(fd)
def other():
    at(30, "/proc/thread-self")
    at(31, "/proc/thread-self/comm", os.O_RDWR)
    at(32, f"/proc/{threading.get_native_id()}/stat")
    at(33, "/proc/thread-self/fd")
    at(41, sys.argv[1])
    fcntl.fcntl(41, 15, struct.pack("2i", 0, threading.get_native_id()))  # F_SETOWN_EX, F_OWNER_TID
    ready.set()
    time.sleep(1000)
ready = threading.Event()
threading.Thread(target=other).start()
ready.wait()
at(35, "/proc/self/task")
at(36, f"/proc/self/task/{os.getpid()}")
at(37, f"/proc/self/task/{os.getpid()}/status")
at(38, "/proc/self/fd")
at(40, "/proc/self/task/%d/status" % threading.enumerate()[1].native_id)
for number in range(100):
    at(50 + number, "/dev/null")
os.mkdir(sys.argv[1] + ".ready")
while True:
    time.sleep(1000)
"""


@pytest.fixture(params=["root", "user"])
def child(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[bytes]]:
    ids = {"user": UID, "group": UID, "extra_groups": []} if request.param == "user" else {}
    base = Path(tempfile.mkdtemp(prefix="thread-files-"))
    base.chmod(0o777)
    (base / "data").write_bytes(b"")
    found = subprocess.Popen(
        [_python(), "-c", PROGRAM, base / "data"], start_new_session=True, cwd="/",
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **ids,
    )  # fmt: skip
    try:
        wait_for(lambda: (base / "data.ready").exists())
        yield found
    finally:
        kill_and_reap(found if found.poll() is None else found.pid)
        shutil.rmtree(base)


def _links(pid: int) -> dict[int, str]:
    return {fd: os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (*range(30, 34), 35, 36, 37, 38, 40)}


def _wanted(pid: int, tid: int) -> dict[int, str]:
    task = f"/proc/{pid}/task"
    return {
        30: f"{task}/{tid}", 31: f"{task}/{tid}/comm", 32: f"/proc/{tid}/stat", 33: f"{task}/{tid}/fd",
        35: task, 36: f"{task}/{pid}", 37: f"{task}/{pid}/status", 38: f"/proc/{pid}/fd", 40: f"{task}/{tid}/status",
    }  # fmt: skip


@pytest.mark.parametrize("new_pid", [False, True])
def test_they_lead_to_the_same_threads(child: subprocess.Popen[bytes], new_pid: bool) -> None:
    other = max(int(tid) for tid in os.listdir(f"/proc/{child.pid}/task"))
    assert _links(child.pid) == _wanted(child.pid, other)
    captured: Captured = capture(child.pid, kill=True)
    child.wait()
    found = restore(captured, new_pid=new_pid)
    try:
        assert not [one for one in found.warnings if one.startswith("fd ")]
        tid = found.tids[other]
        assert (found.pid == child.pid) is not new_pid
        assert _links(found.pid) == _wanted(found.pid, tid)
        with open(f"/proc/{found.pid}/fd/32", "rb") as stat:
            assert stat.read().startswith(f"{tid} ".encode())
        # the owner of signals is a thread: seen by asking through a descriptor of ours
        pidfd = os.pidfd_open(found.pid)
        ours = pidfd_getfd(pidfd, 41)
        try:
            assert struct.unpack("2i", fcntl.fcntl(ours, 16, bytes(8))) == (0, tid)
        finally:
            os.close(ours)
            os.close(pidfd)
    finally:
        kill_and_reap(found.pid)
