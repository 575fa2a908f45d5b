# SPDX-License-Identifier: Apache-2.0
"""The merge barrier against the kernel: its decisions with real VMAs, flags, and a real userfaultfd.

Runs inside the guests of ``kernel-shim/vmtest``. The process tracks itself; what it looks at lies in the middle of
a PROT_NONE reservation.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from kernel_shim.emulation import MergeBarrier, Mode, Trust, trust
from kernel_shim.switch import poke, raw_syscall

pytestmark = pytest.mark.skipif(
    not os.environ.get("CHECKPOINTD_VM_KERNEL"),
    reason="needs a kernel of the lab: run it with python -m vmtest",
)

PAGE = 4096
RW, PRIVATE_ANONYMOUS, FIXED = 3, 0x22, 0x10
MMAP, MPROTECT, MUNMAP, MREMAP, USERFAULTFD = 9, 10, 11, 25, 323
UFFDIO_API, UFFDIO_REGISTER = 0xC018AA3F, 0xC020AA00


@dataclasses.dataclass(frozen=True)
class Vma:
    start: int
    end: int
    private_anonymous: bool
    flags: frozenset[str]


class Self:
    """This process as a target: 256 pages at ``base`` to play with."""

    def __init__(self) -> None:
        size = 512 * PAGE
        self.base = raw_syscall(MMAP, 0, size, 0, PRIVATE_ANONYMOUS | 0x4000, (1 << 64) - 1, 0) + 128 * PAGE
        self.uffd = raw_syscall(USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK | 1)
        fcntl.ioctl(self.uffd, UFFDIO_API, bytearray(struct.pack("3Q", 0xAA, 0, 0)))

    def at(self, page: int) -> int:
        return self.base + page * PAGE

    def map(self, page: int, nr_pages: int) -> None:
        raw_syscall(MMAP, self.at(page), nr_pages * PAGE, RW, PRIVATE_ANONYMOUS | FIXED, (1 << 64) - 1, 0)

    def write(self, page: int, nr_pages: int = 1) -> None:
        for index in range(nr_pages):
            poke(self.at(page + index), 7)

    def register(self, start: int, end: int) -> None:
        fcntl.ioctl(self.uffd, UFFDIO_REGISTER, bytearray(struct.pack("4Q", start, end - start, 2, 0)))

    def dirty(self, page: int, nr_pages: int) -> str:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            data = os.pread(file.fileno(), 8 * nr_pages, self.at(page) // PAGE * 8)
        return "".join("D" if word >> 55 & 1 else "." for word in struct.unpack(f"{nr_pages}Q", data))

    def vmas(self) -> list[Vma]:
        """The mappings of the playground which are readable, with their flags."""
        found: list[Vma] = []
        start = end = 0
        perms = ""
        for line in Path("/proc/self/smaps").read_text().splitlines():
            words = line.split()
            if line.startswith("VmFlags:"):
                if self.base <= start < self.at(256) and "r" in perms:
                    found.append(Vma(start, end, True, frozenset(words[1:])))
            elif not words[0].endswith(":"):
                start, end = (int(word, 16) for word in words[0].split("-"))
                perms = words[1]
        return found

    def checkpoint(self, barrier: MergeBarrier) -> None:
        vmas = self.vmas()
        Path("/proc/self/clear_refs").write_text("4")
        barrier.extend(vmas)


@pytest.fixture
def target() -> Iterator[Self]:
    made = Self()
    yield made
    os.close(made.uffd)
    raw_syscall(MUNMAP, made.base - 128 * PAGE, 512 * PAGE)


def judged(target: Self, barrier: MergeBarrier) -> list[tuple[int, int, Trust]]:
    return [
        (
            (vma.start - target.base) // PAGE,
            (vma.end - target.base) // PAGE,
            trust(vma, Mode.BARRIER, keeps_writes=False, registered=barrier.covers(vma)),
        )
        for vma in target.vmas()
    ]


def test_old_mapping_stays_exact_beside_new_ones_cycle_after_cycle(target: Self) -> None:
    barrier = MergeBarrier(target.register)
    target.map(100, 4)
    target.write(100, 4)
    target.checkpoint(barrier)
    for cycle in range(10):
        edge = 104 + cycle
        target.map(edge, 1)
        target.write(edge)
        target.write(100 + cycle % 4)
        expected = ["."] * (edge - 100)
        expected[cycle % 4] = "D"
        assert target.dirty(100, edge - 99) == "".join(expected) + "D"
        assert all(verdict is Trust.EXACT for *_, verdict in judged(target, barrier))
        target.checkpoint(barrier)
        assert target.dirty(100, edge - 99) == "." * (edge - 99)


def test_registered_after_the_first_checkpoint_and_trusted_from_then_on(target: Self) -> None:
    barrier = MergeBarrier(target.register)
    target.map(10, 4)
    target.write(10, 4)
    target.checkpoint(barrier)
    assert barrier.ranges == ((target.at(10), target.at(14)),)
    assert judged(target, barrier) == [(10, 14, Trust.EXACT)]


def test_moved_mapping_is_dirty_and_no_longer_trusted_when_clean(target: Self) -> None:
    barrier = MergeBarrier(target.register)
    target.map(10, 4)
    target.write(10, 4)
    target.checkpoint(barrier)
    raw_syscall(MREMAP, target.at(10), 4 * PAGE, 4 * PAGE, 3, target.at(60))
    assert target.dirty(60, 4) == "DDDD"
    assert judged(target, barrier) == [(60, 64, Trust.COMPARE)]
    target.checkpoint(barrier)
    assert judged(target, barrier) == [(60, 64, Trust.EXACT)]


def test_what_grew_in_place_is_compared_once(target: Self) -> None:
    barrier = MergeBarrier(target.register)
    target.map(10, 4)
    target.write(10, 4)
    raw_syscall(MUNMAP, target.at(14), 4 * PAGE)
    target.checkpoint(barrier)
    raw_syscall(MREMAP, target.at(10), 4 * PAGE, 8 * PAGE, 0, 0)
    assert judged(target, barrier) == [(10, 18, Trust.COMPARE)]
    target.checkpoint(barrier)
    assert judged(target, barrier) == [(10, 18, Trust.EXACT)]


def test_foreign_userfaultfd_is_reported(target: Self) -> None:
    other = Self()
    target.map(10, 4)
    start, end = target.at(10), target.at(14)
    other.register(start, end)
    barrier = MergeBarrier(target.register)
    report = barrier.extend(target.vmas())
    assert report.foreign == [(start, end)]
    # also if the flags are not known to say so
    report = barrier.extend([Vma(start, end, True, frozenset({"rd", "wr"}))])
    assert report.foreign == [(start, end)]
    os.close(other.uffd)


def test_shrunk_and_split_mappings_stay_trusted(target: Self) -> None:
    barrier = MergeBarrier(target.register)
    target.map(10, 12)
    target.write(10, 12)
    target.checkpoint(barrier)
    raw_syscall(MUNMAP, target.at(14), 2 * PAGE)
    raw_syscall(MPROTECT, target.at(18), 2 * PAGE, 1)
    target.write(11)
    assert {verdict for *_, verdict in judged(target, barrier)} == {Trust.EXACT}
    assert target.dirty(10, 4) == ".D.."
