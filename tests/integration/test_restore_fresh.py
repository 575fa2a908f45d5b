# SPDX-License-Identifier: Apache-2.0
"""Anonymous memory is filled by UFFDIO_COPY where that can be, and is the same memory where it cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from checkpointd.linux import userfaultfd as uffd
from checkpointd.memory import PAGE_SHIFT, PAGE_SIZE, PRIVATE_OBJECT
from checkpointd.procfs import maps
from checkpointd.restore import fresh
from checkpointd.restore.fresh import FreshMemory
from checkpointd.restore.stub import Stub
from checkpointd.state.memory import AddressSpace
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


class Target(RoundsTarget):
    def mappings(self) -> list[tuple[int, int, int, frozenset[str]]]:
        """Of anonymous memory; without what says that pages are dirty."""
        return [
            (vma.start, vma.end, vma.prot, vma.flags - {"sd"})
            for vma in maps.read_smaps(self.pid)
            if vma.kind == "anon"
        ]


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Target]:
    found = Target(PROGRAM, tmp_path)
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


def _bring_back(target: Target, meanwhile: Callable[[Captured], None] = lambda captured: None) -> None:
    before = target.mappings()
    captured = capture(target.pid, kill=True)
    target.kill()
    meanwhile(captured)
    restore(captured)
    target.wait_rounds(2)
    assert target.mappings() == before


@pytest.mark.needs("uffd_wp")
def test_long_runs_are_copied_into_fresh_memory(target: Target, copied: list[int]) -> None:
    _bring_back(target)
    assert sum(copied) >= 7 * MIB
    assert min(copied) >= fresh.MIN_RUN_PAGES * PAGE_SIZE


def test_memory_comes_back_where_there_is_no_userfaultfd(
    target: Target, copied: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uffd, "NR_USERFAULTFD", 9999)
    _bring_back(target)
    assert not copied


def test_memory_comes_back_where_write_protect_mode_is_unknown(
    target: Target, copied: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uffd, "FEATURE_PAGEFAULT_FLAG_WP", 1 << 62)
    _bring_back(target)
    assert not copied


@pytest.mark.needs("uffd_wp")
def test_pages_that_are_there_already_are_written_over(
    target: Target, copied: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    init: Callable[[FreshMemory, Stub, AddressSpace], None] = FreshMemory.__init__
    touched: list[int] = []

    def touch_some(captured: Captured) -> None:
        image = captured.image
        pages = np.setdiff1d(image.pages(PRIVATE_OBJECT), image.zero_pages(PRIVATE_OBJECT))

        def touch_first(self: FreshMemory, stub: Stub, space: AddressSpace) -> None:
            for vma in filter(fresh.is_fresh, space.vmas):
                inside = (pages >= vma.start >> PAGE_SHIFT) & (pages < vma.end >> PAGE_SHIFT)
                for page in pages[inside][::37].tolist():
                    stub.mem.write(page << PAGE_SHIFT, b"not of the image")
                    touched.append(page)
            init(self, stub, space)

        monkeypatch.setattr(FreshMemory, "__init__", touch_first)

    _bring_back(target, touch_some)
    assert touched and 0 in copied
