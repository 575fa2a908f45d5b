# SPDX-License-Identifier: Apache-2.0
"""Bytes behind the end of what is mapped, in its last page: a program sees them, so they come back."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from checkpointd.dump.division import object_requests
from checkpointd.dump.dump import Dumper, DumpOptions
from checkpointd.dump.page_reading import read
from checkpointd.image.store import Store
from checkpointd.memory import NO_RUNS, PAGE_SIZE
from checkpointd.procfs import maps
from checkpointd.restore.restorer import RestoreOptions, restore_process
from checkpointd.state import codec
from checkpointd.state.files import FilesOptions
from checkpointd.state.process import ImageState
from checkpointd.target.memory import capture_address_space
from tests.files_lab import driven
from tests.programs.restore_harness import kill_and_reap

pytestmark = pytest.mark.needs("root", "ptrace", "pagemap_scan", "set_tid")
PROGRAM = r"""
import ctypes, os, sys, time
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = libc.mmap.restype = ctypes.c_void_p
libc.shmat.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
END, SIZE = 5000, 8192
def mapped(fd, flags=1, prot=3):
    os.ftruncate(fd, END)
    at = libc.mmap(None, SIZE, prot, flags, fd, 0)
    assert at != 2**64 - 1
    return at
def opened(path):
    return os.open(path, os.O_RDWR | os.O_CREAT)
segment = libc.shmget(0, END, 0o1600)
areas = [
    libc.shmat(segment, None, 0),
    mapped(os.memfd_create("tail")),
    mapped(opened(sys.argv[1] + "/named")),
    mapped(opened(sys.argv[1] + "/unlinked")),
    mapped(opened(sys.argv[2] + "/private"), flags=2),
]
os.unlink(sys.argv[1] + "/unlinked")
libc.shmctl(segment, 0, None)
for number, at in enumerate(areas):
    ctypes.memset(at, 0x41 + number, SIZE)
    ctypes.memset(at + END + 1000, 0, SIZE - END - 1000)
# behind the end and nowhere else, and one whose last page is not mapped
areas.append(mapped(os.memfd_create("end only")))
ctypes.memset(areas[5] + END, 0x46, 1000)
part = os.memfd_create("part")
os.write(part, b"p" * END)
first = libc.mmap(None, 4096, 3, 1, part, 0)
def wanted(number):
    size = END if number < 5 else 0
    return bytes([0x41 + number]) * (size + 1000) if size else bytes(END) + b"F" * 1000
def check():
    for number, at in enumerate(areas):
        found = ctypes.string_at(at, SIZE)
        if found != wanted(number).ljust(SIZE, b"\0"):
            return f"area {number} is not what it was: {found[END - 4:END + 4]}"
    return "good" if os.pread(part, 9999, 0) == b"p" * END else "the rest of the file"
assert check() == "good", check()
out = os.open(sys.argv[2] + "/said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
while True:
    os.write(out, (check() + "\n").encode())
    time.sleep(0.01)
"""


class Lab:
    def __init__(self, directory: Path, on_tmpfs: Path) -> None:
        self.store = directory / "store"
        self.said = directory / "said"
        self.child = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, on_tmpfs, directory], cwd="/", start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=(directory / "errors").open("wb"),
        )  # fmt: skip
        self.wait()

    def lines(self) -> list[str]:
        return self.said.read_text().splitlines() if self.said.exists() else []

    def wait(self) -> list[str]:
        """What it says in its next rounds."""
        before = len(self.lines())
        deadline = time.monotonic() + 20
        while len(self.lines()) < before + 3:
            assert time.monotonic() < deadline, self.said.with_name("errors").read_text()
            time.sleep(0.01)
        return self.lines()[before:]


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with tempfile.TemporaryDirectory(prefix="shared-tails-", dir="/dev/shm") as on_tmpfs:
        found = Lab(tmp_path, Path(on_tmpfs))
        yield found
        kill_and_reap(found.child if found.child.poll() is None else found.child.pid)


@pytest.mark.parametrize("is_there", [True, False], ids=["over what is there", "anew"])
def test_bytes_behind_the_end_come_back(lab: Lab, is_there: bool, tmp_path: Path) -> None:
    Store.open(lab.store, create=True)
    dumper = Dumper(lab.child.pid)
    try:
        image_id = dumper.dump(DumpOptions(store=str(lab.store))).image_id
        image_id = dumper.dump(DumpOptions(store=str(lab.store), incremental=True, kill=True)).image_id
    finally:
        dumper.close()
    lab.child.wait()
    image = Store.open(lab.store).load(image_id)
    state = codec.decode(ImageState, json.loads(image.state))
    (named,) = [Path(one.name) for one in state.address_space.objects if one.name.endswith("named")]
    if not is_there:
        named.unlink()
    files = FilesOptions(changed="allow")
    restored = restore_process(image, state, options=RestoreOptions(files=files, wait_for_ids_s=20))
    try:
        assert set(lab.wait()) == {"good"}
    finally:
        kill_and_reap(restored.pid)


def test_an_object_that_a_relative_cuts_before_its_end_is_read() -> None:
    with driven() as target:
        target.do(
            "import mmap; fd = os.memfd_create('cut'); os.ftruncate(fd, 5000); area = mmap.mmap(fd, 5000)"
        )
        target.do("area[:] = b'x' * 5000")
        (vma,) = [one for one in maps.read_maps(target.pid) if one.path.startswith("/memfd:cut")]
        (source,) = capture_address_space(target.pid, [vma], NO_RUNS).sources
        assert source.last_page_at == vma.start + PAGE_SIZE
        requests = object_requests(target.pid, source, np.array([[0, 2]], dtype=np.uint64))
        assert [request.runs.tolist() for request in requests] == [[[0, 1]], [[1, 1]]]
        found = np.full(PAGE_SIZE, 7, dtype=np.uint8)
        read(requests[1], requests[1].runs, found, 0)
        assert found.tobytes() == (b"x" * (5000 - PAGE_SIZE)).ljust(PAGE_SIZE, b"\0")
        target.do("os.ftruncate(fd, 0)")
        read(requests[1], requests[1].runs, found, 0)
        assert not found.any()
