# SPDX-License-Identifier: Apache-2.0
"""Objects of shared memory that look alike are kept apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpointd.dump.dump import Dumper, DumpOptions
from checkpointd.image.store import Store
from checkpointd.measure.truth import _data_pages
from checkpointd.memory import PAGE_SIZE, PageNumbers, pages_of
from checkpointd.state import codec
from checkpointd.state.memory import AddressSpace
from checkpointd.target import extents
from checkpointd.target.extents import all_data_extents, data_extents
from tests import abilities

pytestmark = pytest.mark.needs("root", "ptrace", "pagemap_scan")

# The number of the next segment can be chosen (CONFIG_CHECKPOINT_RESTORE).
TWINS = """
import ctypes, mmap, os, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
fd = os.memfd_create("twin")
os.ftruncate(fd, 4096)
open("/proc/sys/kernel/shm_next_id", "w").write(str(os.fstat(fd).st_ino))
segment = libc.shmget(0, 4096, 0o1600)
assert segment == os.fstat(fd).st_ino, (segment, os.fstat(fd).st_ino)
at = libc.shmat(segment, None, 0)
libc.shmctl(segment, 0, None)
ctypes.memset(at, 0x53, 4096)
area = mmap.mmap(fd, 4096)
area[:] = b"M" * 4096
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def twins():
    process = subprocess.Popen(
        [sys.executable, "-c", TWINS],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    if process.stdout.readline() != "ready\n":
        error = process.stderr.read()
        process.wait()
        pytest.skip(f"no segment with a chosen number here: {error[-200:]}")
    yield process
    process.kill()
    process.communicate()


def test_a_segment_whose_number_is_a_memfds_inode_is_another_object(twins, tmp_path):
    abilities.require("root")
    store = Store.open(tmp_path / "store", create=True)
    dumper = Dumper(twins.pid)
    try:
        stats = dumper.dump(DumpOptions(store=str(tmp_path / "store")))
    finally:
        dumper.close()
    image = store.load(stats.image_id)
    space = codec.decode(AddressSpace, json.loads(image.state)["address_space"])
    content = {}
    for one in space.objects:
        pages = image.pages(one.id)
        content[one.flavour] = image.read(one.id, pages).tobytes()
    assert content == {"sysv": b"S" * PAGE_SIZE, "memfd": b"M" * PAGE_SIZE}
    assert len({one.inode for one in space.objects}) == 1  # or this shows nothing
    users = {vma.path.split(":")[0]: vma.object for vma in space.vmas if vma.object}
    assert len(set(users.values())) == 2


@pytest.mark.parametrize("moved", [0, 3, 6, 9])
def test_a_page_that_looked_like_a_hole_while_it_was_moved_is_found(monkeypatch, moved):
    """Staged: the first time lseek passes over that page it does not see it."""
    fd = os.memfd_create("moving")
    os.ftruncate(fd, 12 * PAGE_SIZE)
    for page in (0, 3, 6, 9):
        os.pwrite(fd, b"x", page * PAGE_SIZE)
    real, unseen = os.lseek, [moved]

    def lseek(fd, at, whence):
        found = real(fd, at, whence)
        if whence == os.SEEK_DATA and unseen and found == moved * PAGE_SIZE:
            unseen.clear()
            return real(fd, found + PAGE_SIZE, os.SEEK_DATA)
        return found

    monkeypatch.setattr(os, "lseek", lseek)
    assert pages_of(data_extents(fd, 12 * PAGE_SIZE)).tolist() == [0, 3, 6, 9]
    assert not unseen
    assert data_extents(fd, 2 * PAGE_SIZE).tolist() == [[0, 1]]
    os.ftruncate(fd, 0)
    assert data_extents(fd, 0).tolist() == []
    os.close(fd)


@pytest.mark.parametrize("pages_of_data", [lambda fd, size: pages_of(data_extents(fd, size)), _data_pages])
def test_an_object_that_a_relative_cuts_while_it_is_looked_at(
    pages_of_data: Callable[[int, int], PageNumbers], monkeypatch: pytest.MonkeyPatch
) -> None:
    fd = os.memfd_create("cut")
    for page in (0, 4, 8):
        os.pwrite(fd, b"x", page * PAGE_SIZE)
    seek = os.lseek

    def cut_before_the_second_hole(fd: int, at: int, how: int) -> int:
        if how == os.SEEK_HOLE and at >= 4 * PAGE_SIZE:
            os.ftruncate(fd, PAGE_SIZE)
        return seek(fd, at, how)

    monkeypatch.setattr(os, "lseek", cut_before_the_second_hole)
    assert pages_of_data(fd, 9 * PAGE_SIZE).tolist() == [0]
    os.close(fd)


def test_a_page_that_stays_on_its_way_for_long_is_looked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Staged: the kernel was interrupted while it moved page 6, and three looks do not see it."""
    fd = os.memfd_create("moving")
    for page in (0, 6, 9):
        os.pwrite(fd, b"x", page * PAGE_SIZE)
    seek, unseen = os.lseek, [None] * 3

    def lseek(fd: int, at: int, how: int) -> int:
        found = seek(fd, at, how)
        if how == os.SEEK_DATA and found == 6 * PAGE_SIZE and unseen:
            unseen.pop()
            return seek(fd, found + PAGE_SIZE, os.SEEK_DATA)
        return found

    monkeypatch.setattr(os, "lseek", lseek)
    (found,) = all_data_extents([(f"/proc/self/fd/{fd}", 10 * PAGE_SIZE)])
    assert pages_of(found).tolist() == [0, 6, 9]
    assert not unseen
    os.close(fd)


def test_pages_that_were_only_allocated_cost_three_pauses_however_many_objects_have_some(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fds = [os.memfd_create("allocated") for _ in range(20)]
    for fd in fds:
        os.posix_fallocate(fd, 0, 8 * PAGE_SIZE)
        os.pwrite(fd, b"x", 2 * PAGE_SIZE)
    on_disk = tmp_path / "file"
    with on_disk.open("wb") as file:  # what a disk counts says nothing
        os.posix_fallocate(file.fileno(), 0, 64 * PAGE_SIZE)
    pauses: list[float] = []
    monkeypatch.setattr(extents.time, "sleep", pauses.append)
    found = all_data_extents([(f"/proc/self/fd/{fd}", 8 * PAGE_SIZE) for fd in fds])
    assert [pages_of(runs).tolist() for runs in found] == [[2]] * 20
    assert len(pauses) == 3
    all_data_extents([(str(on_disk), 64 * PAGE_SIZE)])
    assert len(pauses) == 3
    for fd in fds:
        os.close(fd)
