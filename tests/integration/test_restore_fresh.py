# SPDX-License-Identifier: Apache-2.0
"""Anonymous memory is filled by UFFDIO_COPY where that can be, and is the same memory where it cannot."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import pytest

from checkpointd.linux import pidfd
from checkpointd.linux import userfaultfd as uffd
from checkpointd.memory import PAGE_SHIFT, PAGE_SIZE, PRIVATE_OBJECT, Vma, VmaKind
from checkpointd.procfs import maps
from checkpointd.restore import fresh
from checkpointd.restore.fresh import FreshMemory
from checkpointd.restore.restorer import RestoreOptions
from checkpointd.restore.stub import Stub
from checkpointd.state.memory import AddressSpace, VmaState
from checkpointd.target.remote import Call
from checkpointd.tracking import make
from tests.programs.restore_harness import Captured, capture, restore
from tests.programs.rounds import RoundsTarget

pytestmark = pytest.mark.needs("root", "ptrace", "set_tid")

MIB = 1 << 20
# 4 MiB whole; 4 MiB of which every second page; 1 MiB that is read-only now, between two writable ones
PROGRAM = """
import ctypes, hashlib, mmap, sys, time
anon = dict(flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
whole, sparse, parts = mmap.mmap(-1, 4 << 20, **anon), mmap.mmap(-1, 4 << 20, **anon), mmap.mmap(-1, 3 << 20, **anon)
for area in (whole, sparse, parts):
    area.madvise(15)  # no huge pages, whatever the system's setting
for step, area in ((4096, whole), (8192, sparse), (4096, parts)):
    for at in range(0, len(area), step):
        area[at : at + 4096] = hashlib.sha256(b"%d %d" % (len(area) + step, at)).digest() * 128
start = ctypes.addressof(ctypes.c_char.from_buffer(parts))
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + (1 << 20)), ctypes.c_size_t(1 << 20), 1) == 0
def digest():
    return hashlib.sha256(whole[:] + sparse[:] + parts[:]).hexdigest()
want, number = digest(), 0
while True:
    number += 1
    whole[0:1] = whole[0:1]
    with open(sys.argv[1], "w") as file:
        file.write(f"{number} {int(digest() == want)}")
    time.sleep(0.02)
"""


@pytest.fixture
def target(tmp_path: Path) -> Iterator[RoundsTarget]:
    found = RoundsTarget(PROGRAM, tmp_path)
    yield found
    found.kill()


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each run that is filled by UFFDIO_COPY."""
    found: list[int] = []
    write = FreshMemory.write

    def spy(self: FreshMemory, first_page: int, data: npt.NDArray[np.uint8]) -> int:
        found.append(write(self, first_page, data))
        return found[-1]

    monkeypatch.setattr(FreshMemory, "write", spy)
    return found


Mapping = tuple[int, int, int, frozenset[str]]


def _anonymous(vmas: Iterable[Vma | VmaState]) -> list[Mapping]:
    """Without what says that pages are dirty.

    Neighbours that are alike count as one: such that could not merge in the program may do so in the restored one.
    """
    found: list[Mapping] = []
    for vma in sorted(vmas, key=lambda one: one.start):
        if vma.kind is not VmaKind.ANON:
            continue
        like = vma.prot, vma.flags - {"sd"}
        if found and found[-1][1] == vma.start and found[-1][2:] == like:
            found[-1] = found[-1][0], vma.end, *like
        else:
            found.append((vma.start, vma.end, *like))
    return found


def _bring_back(target: RoundsTarget, meanwhile: Callable[[Captured], None] = lambda captured: None) -> None:
    """Dump, kill and restore; its anonymous mappings are what they were, before it runs on."""
    captured = capture(target.pid, kill=True)
    target.kill()
    meanwhile(captured)
    found: list[Mapping] = []

    def look(stub: Stub) -> None:
        found.extend(_anonymous(maps.read_smaps(stub.pid)))

    restore(captured, options=RestoreOptions(wait_for_ids_s=20, before_release=look))
    target.wait_rounds(2)
    wanted = _anonymous(captured.state.address_space.vmas)
    assert wanted and not [one for one in wanted if one not in found]


@pytest.mark.needs("merge_barrier")  # a registration for write protection
def test_long_runs_are_copied_into_fresh_memory(target: RoundsTarget, copied: list[int]) -> None:
    _bring_back(target)
    assert sum(copied) >= 7 * MIB
    assert min(copied) >= fresh.MIN_RUN_PAGES * PAGE_SIZE


def test_memory_comes_back_where_there_is_no_userfaultfd(
    target: RoundsTarget, copied: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make, "_USERFAULTFD", Call(9999, ()))
    _bring_back(target)
    assert not copied


def test_memory_comes_back_where_write_protect_mode_is_unknown(
    target: RoundsTarget, copied: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uffd, "FEATURE_PAGEFAULT_FLAG_WP", 1 << 62)
    _bring_back(target)
    assert not copied


@pytest.mark.needs("merge_barrier")  # a registration for write protection
def test_pages_that_are_there_already_are_written_over(
    target: RoundsTarget, copied: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    init: Callable[[FreshMemory, Stub, AddressSpace, str], None] = FreshMemory.__init__
    touched: list[int] = []

    def touch_some(captured: Captured) -> None:
        image = captured.image
        pages = np.setdiff1d(image.pages(PRIVATE_OBJECT), image.zero_pages(PRIVATE_OBJECT))

        def touch_first(self: FreshMemory, stub: Stub, space: AddressSpace, dumped_on: str) -> None:
            for vma in filter(fresh.is_fresh, space.vmas):
                inside = (pages >= vma.start >> PAGE_SHIFT) & (pages < vma.end >> PAGE_SHIFT)
                for page in pages[inside][::37].tolist():
                    stub.mem.write(page << PAGE_SHIFT, b"not of the image")
                    touched.append(page)
            init(self, stub, space, dumped_on)

        monkeypatch.setattr(FreshMemory, "__init__", touch_first)

    _bring_back(target, touch_some)
    assert touched and 0 in copied


# The tail of an area is made read-only; told to go on, the program makes it writable again and grows the whole.
GROWING = """
import ctypes, mmap, os, sys, time
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
def call(function, *words):
    return function(*(ctypes.c_size_t(word) for word in words))
tail, more_flags, out = int(sys.argv[1]) << 12, int(sys.argv[2]), sys.argv[3]
size = 2 << 20
at = call(libc.mmap, 0, 4 * size, 3, 0x22 | more_flags, 2**64 - 1, 0)
call(libc.madvise, at, 4 * size, 15)
call(libc.munmap, at + size, 3 * size)  # so that no neighbour of its kind comes to lie behind it
ctypes.memset(at, 7, size)
assert call(libc.mprotect, at + size - tail, tail, 1) == 0
number, grown = 0, 0
while True:
    number += 1
    if os.path.exists(out + ".go") and not grown:
        assert call(libc.mprotect, at + size - tail, tail, 3) == 0
        moved = call(libc.mremap, at, size, 2 * size, 1)
        grown = ctypes.get_errno() if moved in (None, 2**64 - 1) else -1
    with open(out, "w") as file:
        file.write(f"{number} 1 {grown}")
    time.sleep(0.02)
"""


@pytest.mark.parametrize(
    "tail,flags", [(16, 0), (128, 0x4000), (128, 0)], ids=["small", "noreserve", "large"]
)
def test_parts_of_an_area_merge_again(tmp_path: Path, tail: int, flags: int) -> None:
    """mremap(2) over VMAs that did not merge fails with EFAULT."""
    target = RoundsTarget(GROWING, tmp_path, str(tail), str(flags))
    try:
        captured = capture(target.pid, kill=True)
        target.kill()
        restore(captured)
        tmp_path.joinpath("out.go").touch()
        assert target.wait_rounds(3)[2] == -1
    finally:
        target.kill()


@pytest.mark.parametrize("number", ["pidfd_getfd", "handshake", "register_wp"])
def test_a_refused_userfaultfd_costs_time_and_nothing_else(
    target: RoundsTarget, copied: list[int], monkeypatch: pytest.MonkeyPatch, number: str
) -> None:
    def refuse(*args: object) -> int:
        raise PermissionError(errno.EACCES, "as a security module may answer")

    monkeypatch.setattr(pidfd if number == "pidfd_getfd" else uffd, number, refuse)
    nr_fds = len(os.listdir("/proc/self/fd"))
    _bring_back(target)
    assert not copied
    assert len(os.listdir("/proc/self/fd")) == nr_fds


@pytest.mark.parametrize(
    "always,release,advised,is_used",
    [
        (True, "6.1.0-18-amd64 #1 SMP", False, False),
        (True, "6.1.0-18-amd64 #1 SMP", True, True),
        (True, "6.18.44 #1", False, True),
        (False, "6.1.0-18-amd64 #1 SMP", False, True),
    ],
)
def test_memory_of_kernels_that_do_not_tell_may_become_huge(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, always: bool, release: str, advised: bool, is_used: bool
) -> None:
    setting = tmp_path / "enabled"
    setting.write_text("[always] madvise never" if always else "always [madvise] never")
    monkeypatch.setattr(fresh, "_THP", setting)
    flags = frozenset({"rd", "wr", "ac", *(["nh"] if advised else [])})
    vma = VmaState(0x10000000, 0x10400000, 3, False, 0, VmaKind.ANON, "", flags)
    asked: list[object] = []

    class NoStub:
        pid = 0

        def batch(self, calls: object, *, undo: object) -> list[int]:
            asked.append(calls)
            return [-errno.ENOSYS]

    made = FreshMemory(cast("Stub", NoStub()), AddressSpace((vma,), (), ()), release)
    assert bool(asked) == is_used
    made.close()
