# SPDX-License-Identifier: Apache-2.0
"""Memory without a name comes back as the object it was: name, owner, permissions, seals, time."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from checkpointd.linux.fcntl import F_GET_SEALS
from checkpointd.restore.restorer import RestoreOptions
from checkpointd.state.files import FilesOptions
from tests.integration.test_restore_rights import UID
from tests.programs.restore_harness import Captured, capture, kill_and_reap, restore

pytestmark = pytest.mark.needs("root", "ptrace", "set_tid")
F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_WRITE, F_SEAL_FUTURE_WRITE, F_SEAL_EXEC = 1, 2, 4, 8, 16, 32
MEMFDS = (*range(30, 37), 38)
PROGRAM = """
import ctypes, fcntl, mmap, os, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def new(number, name, flags, content=b"x"):
    fd = libc.memfd_create(name, flags)
    assert fd >= 0, ctypes.get_errno()
    os.dup2(fd, number)
    os.close(fd)
    os.write(number, content)
def seal(number, seals):
    fcntl.fcntl(number, 1033, seals)
ALLOW, NOEXEC, EXEC, HUGETLB = 2, 8, 16, 4
new(30, b"owned", 0)
os.fchmod(30, 0o640)
os.fchown(30, 65534, 65533)
new(31, b"mapped", ALLOW, b"y" * 4096)
os.fchmod(31, 0o2600)
os.fchown(31, 65534, 65533)
os.fchmod(31, 0o2600)
shared = mmap.mmap(31, 4096)
new(32, b"noexec", NOEXEC)
os.fchmod(32, 0o600)
new(33, b"noexec and no more", NOEXEC)
seal(33, 1)
new(34, b"exec", ALLOW | EXEC)
os.fchmod(34, 0o711)
seal(34, 32)
new(35, b"", ALLOW)
new(36, b"/memfd:twice", ALLOW)
os.utime(36, ns=(10**18, 10**18 + 5))
shm = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.ftruncate(shm, 4096)
os.fchmod(shm, 0o604)
os.fchown(shm, 65534, 65533)
os.dup2(shm, 37)
os.unlink(sys.argv[1])
unlinked = mmap.mmap(37, 4096)
unlinked[:4] = b"deep"
huge = libc.memfd_create(b"huge", ALLOW | HUGETLB)
assert huge >= 0, ctypes.get_errno()
os.dup2(huge, 38)
os.fchmod(38, 0o600)
os.fchown(38, 65534, 65533)
seal(38, 2)
print("ready", flush=True)
time.sleep(1000)
"""


def _start(*args: str | Path) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", *args],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None and child.stderr is not None
    if child.stdout.readline() != "ready\n":
        child.kill()
        pytest.fail(child.stderr.read())
    return child


def _look(pid: int, fd: int) -> dict[str, object]:
    path = f"/proc/{pid}/fd/{fd}"
    there = os.stat(path)
    ours = os.open(path, os.O_RDONLY)
    try:
        seals = fcntl.fcntl(ours, F_GET_SEALS)
    finally:
        os.close(ours)
    return {
        "link": os.readlink(path), "mode": oct(there.st_mode), "uid": there.st_uid, "gid": there.st_gid,
        "size": there.st_size, "mtime": there.st_mtime_ns, "seals": seals,
    }  # fmt: skip


@pytest.fixture
def child() -> Iterator[subprocess.Popen[str]]:
    directory = Path(tempfile.mkdtemp(prefix="restore-memfds-", dir="/dev/shm"))
    try:
        with _start(PROGRAM, directory / "object") as found:
            yield found
            kill_and_reap(found if found.poll() is None else found.pid)
    finally:
        directory.rmdir()


def _restored(captured: Captured) -> int:
    files = FilesOptions(external="null")  # of the pipes to us
    return restore(captured, options=RestoreOptions(files=files, wait_for_ids_s=20)).pid


def _moved(child: subprocess.Popen[str]) -> tuple[Captured, int]:
    captured = capture(child.pid, kill=True)
    child.wait()
    return captured, _restored(captured)


def test_every_memfd_is_what_it_was(child: subprocess.Popen[str]) -> None:
    before = {fd: _look(child.pid, fd) for fd in MEMFDS}
    _, pid = _moved(child)
    after = {fd: _look(pid, fd) for fd in MEMFDS}
    assert after == before
    # or the program has not made what this is about
    assert before[31]["mode"] == oct(0o102600)
    assert before[34]["seals"] == 0x3E
    assert before[33]["seals"] == F_SEAL_SEAL | F_SEAL_EXEC


def test_again_from_what_was_restored(child: subprocess.Popen[str]) -> None:
    before = {fd: _look(child.pid, fd) for fd in MEMFDS}
    _, pid = _moved(child)
    captured = capture(pid, kill=True)
    kill_and_reap(pid)
    pid = _restored(captured)
    assert {fd: _look(pid, fd) for fd in MEMFDS} == before


def test_an_image_of_before_their_owners_were_kept(child: subprocess.Popen[str]) -> None:
    captured = capture(child.pid, kill=True)
    child.wait()
    space = captured.state.address_space
    objects = tuple(replace(one, mode=0o600, uid=0, gid=0, mtime_ns=None) for one in space.objects)
    old = replace(captured.state, address_space=replace(space, objects=objects))
    pid = _restored(replace(captured, state=old))
    after = {fd: _look(pid, fd) for fd in MEMFDS}
    assert (after[30]["mode"], after[30]["uid"]) == (oct(0o100777), 0)
    assert after[33]["seals"] == F_SEAL_SEAL | F_SEAL_EXEC
    assert after[36]["link"] == "/memfd:/memfd:twice (deleted)"


def test_an_unlinked_object_of_shared_memory(child: subprocess.Popen[str]) -> None:
    before = os.stat(f"/proc/{child.pid}/fd/37")
    assert (before.st_mode, before.st_uid) == (0o100604, UID)
    _, pid = _moved(child)
    after = os.stat(f"/proc/{pid}/fd/37")
    for name in ("st_mode", "st_uid", "st_gid", "st_size", "st_mtime_ns"):
        assert getattr(after, name) == getattr(before, name), name
    with open(f"/proc/{pid}/fd/37", "rb") as file:
        assert file.read(4) == b"deep"
