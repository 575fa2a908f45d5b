# SPDX-License-Identifier: Apache-2.0
"""Whoever else maps a target's shared memory is told of at the dump: it is not saved with it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpointd.dump.dump import Dumper, DumpOptions
from checkpointd.image.store import Store
from checkpointd.procfs import maps
from checkpointd.target import sharers
from checkpointd.target.sharers import sharing_warnings

pytestmark = pytest.mark.needs("root", "ptrace", "pagemap_scan")
MAP = """
import ctypes, mmap, os, sys, time
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
libc.shmat.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
def ready():
    print("ready", flush=True)
    sys.stdin.read()
"""
OWNERS = {
    "anonymous": "area = mmap.mmap(-1, 8192)",
    "memfd": "fd = os.memfd_create('box'); os.ftruncate(fd, 8192); area = mmap.mmap(fd, 8192)",
    "read only": "fd = os.memfd_create('box'); os.ftruncate(fd, 8192); area = mmap.mmap(fd, 8192, 1, 1)",
    "file": "fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT); os.ftruncate(fd, 8192); area = mmap.mmap(fd, 8192)",
    "unlinked": (
        "fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT); os.ftruncate(fd, 8192); area = mmap.mmap(fd, 8192); "
        "os.unlink(sys.argv[1])"
    ),
    "segment": (
        "segment = libc.shmget(int(sys.argv[2]), 8192, 0o1600); at = libc.shmat(segment, None, 0); "
        "libc.shmctl(segment, 0, None)"
    ),
}  # fmt: skip
OTHER = """
if sys.argv[1].isdigit():
    at = libc.shmat(int(sys.argv[1]), None, 0)
else:
    fd = os.open(sys.argv[1], os.O_RDWR)
    area = mmap.mmap(fd, 8192)
    os.close(fd)
"""


class Lab:
    def __init__(self, directory: Path) -> None:
        self.file = directory / "file"
        self._running: list[subprocess.Popen[str]] = []

    def start(self, source: str, *args: object) -> int:
        child = subprocess.Popen(
            [sys.executable, "-c", f"{MAP}\n{source}\nready()", *map(str, args)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._running.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        return child.pid

    def owner(self, what: str) -> int:
        return self.start(OWNERS[what], self.file, 0)

    def other(self, owner: int, what: str) -> int:
        """A stranger that maps the same."""
        names = {"file": str(self.file), "anonymous": "/dev/zero", "segment": "/SYSV"}
        name = names.get(what, "/memfd:box" if what != "unlinked" else str(self.file))
        (vma,) = [one for one in maps.read_maps(owner) if one.path.startswith(name)]
        by = vma.inode if what == "segment" else f"/proc/{owner}/map_files/{vma.start:x}-{vma.end:x}"
        if what == "read only":
            by = _memfd(owner)
        return self.start(OTHER, by)

    def end(self) -> None:
        for child in self._running:
            child.kill()
            child.communicate()


@pytest.fixture
def lab() -> Iterator[Lab]:
    with tempfile.TemporaryDirectory(prefix="sharers-", dir="/dev/shm") as directory:
        found = Lab(Path(directory))
        yield found
        found.end()


def _memfd(pid: int) -> str:
    paths = (f"/proc/{pid}/fd/{fd}" for fd in os.listdir(f"/proc/{pid}/fd"))
    return next(path for path in paths if "box" in os.readlink(path))


def _warnings(pid: int, **limits: float) -> list[str]:
    return sharing_warnings(pid, maps.read_smaps(pid), **limits)


@pytest.mark.parametrize("what", OWNERS)
def test_a_stranger_that_maps_the_same_is_named(lab: Lab, what: str) -> None:
    owner = lab.owner(what)
    assert _warnings(owner) == []
    other = lab.other(owner, what)
    (warning,) = _warnings(owner)
    assert f"with process {other} (python" in warning
    if what in ("file", "segment"):
        assert "put it back" in warning
    else:
        assert "a copy of its own" in warning


def test_the_dump_tells(lab: Lab, tmp_path: Path) -> None:
    Store.open(tmp_path / "store", create=True)
    owner = lab.owner("memfd")
    other = lab.other(owner, "memfd")
    dumper = Dumper(owner)
    try:
        stats = dumper.dump(DumpOptions(store=str(tmp_path / "store")))
    finally:
        dumper.close()
    assert [one for one in stats.warnings if f"process {other} " in one and "memfd:box" in one]


def test_relatives_count_and_many_are_told_as_one(lab: Lab) -> None:
    pid = lab.start(
        "area = mmap.mmap(-1, 8192)\nfor _ in range(6):\n    if not os.fork():\n        time.sleep(60)"
    )
    children = {int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    try:
        (warning,) = _warnings(pid)
        assert "and 3 more" in warning
    finally:
        for child in children:
            os.kill(child, 9)


def test_what_cannot_be_written_by_either_is_not_told(lab: Lab) -> None:
    owner = lab.owner("read only")
    lab.start(f"fd = os.open('{_memfd(owner)}', os.O_RDONLY); area = mmap.mmap(fd, 8192, 1, 1)")
    assert _warnings(owner) == []


def test_a_segment_of_somebody_we_may_not_look_into(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = lab.owner("segment")
    lab.other(owner, "segment")
    monkeypatch.setattr(sharers, "_processes", lambda near: [])
    (warning,) = _warnings(owner)
    assert "with another process" in warning


def test_a_look_that_takes_too_long_is_given_up_and_says_so(lab: Lab) -> None:
    owner = lab.owner("anonymous")
    assert ["too many" in one for one in _warnings(owner, limit_s=0)] == [True]


def test_nobody_is_looked_at_for_a_program_without_shared_memory(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = lab.start("area = mmap.mmap(-1, 8192, mmap.MAP_PRIVATE)")
    monkeypatch.setattr(sharers, "_processes", lambda near: pytest.fail("looked"))
    assert _warnings(pid) == []
