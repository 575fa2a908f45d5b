# SPDX-License-Identifier: Apache-2.0
"""The naive reader: the whole memory of a process that stands still, by maps, pagemap, mem and map_files.

It shares no code with checkpointd, on purpose, and knows nothing of dirty tracking: it reads everything.
Addresses and offsets are bytes, pages are numbers (address >> 12), contents are (n, 4096) uint8.

Source: proc_pid_maps(5), proc_pid_pagemap(5), Documentation/admin-guide/mm/pagemap.rst.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

PAGE = 4096
Key = tuple[tuple[int, int], int, bool]
"""A shared memory object: device, inode, is it a System V segment.  The last because the inode of a segment is
its shmid, on the device which also numbers memfds and shared anonymous memory: the two can be equal."""

U64 = npt.NDArray[np.uint64]
Pages = npt.NDArray[np.uint8]

_PRESENT = np.uint64(1 << 63)
_SWAPPED = np.uint64(1 << 62)
_FILE_OR_SHARED = np.uint64(1 << 61)
_GUARD = np.uint64(1 << 58)
_PFN = np.uint64((1 << 55) - 1)
_KPF_ZERO_PAGE = np.uint64(1 << 24)
_MARKER_TYPE = np.uint64(31)

_LINE = re.compile(
    r"([0-9a-f]+)-([0-9a-f]+) ([r-][w-][x-][ps]) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+) *(.*)"
)


@dataclass(frozen=True)
class Mapping:
    start: int
    end: int
    prot: str  # as maps prints it: "rw-p"
    offset: int
    device: tuple[int, int]
    inode: int
    path: str

    @property
    def shared(self) -> bool:
        return self.prot[3] == "s"

    def __str__(self) -> str:
        return f"{self.start:x}-{self.end:x} {self.prot} {self.offset:x} {self.path}"


@dataclass
class Contents:
    """Pages that hold data, sorted, and the data; pages of zeroes nobody wrote are in `maybe_zero`."""

    pages: U64
    data: Pages
    maybe_zero: U64 = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))


@dataclass
class Truth:
    """One process at one instant.

    Attributes:
        mappings: lines of maps, all of them.
        private: pages of the address space itself, by address.
        shared: key -> (size in pages, contents by offset) of each shared memory object that is mapped shared,
            and of each memfd held open.
        guards: pages of guard regions.
        frames: private page -> page frame number, to see whether somebody un-shared or moved pages.
    """

    mappings: list[Mapping]
    private: Contents
    shared: dict[Key, tuple[int, Contents]]
    guards: U64
    frames: dict[int, int]


def mappings_of(pid: int) -> list[Mapping]:
    found = []
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            match = _LINE.match(line.rstrip("\n"))
            if not match:
                raise ValueError(f"maps of {pid}: {line!r}")
            start, end, prot, offset, major, minor, inode, path = match.groups()
            found.append(
                Mapping(
                    int(start, 16),
                    int(end, 16),
                    prot,
                    int(offset, 16),
                    (int(major, 16), int(minor, 16)),
                    int(inode),
                    path,
                )
            )
    return found


def take(pid: int) -> Truth:
    """Read everything.  The process must stand still (blocked, or stopped).

    Raises:
        OSError: it is gone, or may not be read (root is needed for page frame numbers and map_files).
    """
    mappings = mappings_of(pid)
    pages: list[U64] = []
    data: list[Pages] = []
    zero: list[U64] = []
    guards: list[U64] = []
    frames: dict[int, int] = {}
    shared: dict[Key, tuple[int, Contents]] = {}
    mem = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for mapping in mappings:
            if (
                mapping.path in ("[vdso]", "[vvar]", "[vvar_vclock]", "[vsyscall]")
                or "io_uring" in mapping.path
            ):
                continue
            if mapping.shared:
                _add_object(f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}", shared)
                continue
            words = _words(pagemap, mapping)
            first = np.uint64(mapping.start // PAGE)
            guard = (words & _GUARD) != 0
            if guard.any():
                guards.append(np.flatnonzero(guard).astype(np.uint64) + first)
            present = (words & _PRESENT) != 0
            swapped = (
                ((words & _SWAPPED) != 0) & ((words & np.uint64(31)) != _MARKER_TYPE) & ~guard & ~present
            )
            own = (present & ((words & _FILE_OR_SHARED) == 0)) | swapped
            if not own.any():
                continue
            at = np.flatnonzero(own)
            numbers = at.astype(np.uint64) + first
            seen = _read(mem, numbers)
            is_zero_page = present[at] & ~seen.any(axis=1)
            rows = np.flatnonzero(is_zero_page)
            is_zero_page[rows] = _zero_frames(words[at[rows]] & _PFN)
            zero.append(numbers[is_zero_page])
            pages.append(numbers[~is_zero_page])
            data.append(seen[~is_zero_page])
            frames.update(zip(pages[-1].tolist(), (words[at[~is_zero_page]] & _PFN).tolist(), strict=True))
        for name in os.listdir(f"/proc/{pid}/fd"):
            target = os.readlink(f"/proc/{pid}/fd/{name}")
            # a file on a tmpfs which still has its name is a file like others, unless it is mapped shared
            if target.startswith("/memfd:"):
                _add_object(f"/proc/{pid}/fd/{name}", shared)
    finally:
        os.close(mem)
        os.close(pagemap)
    return Truth(
        mappings, Contents(_join(pages), _join_data(data), _join(zero)), shared, _join(guards), frames
    )


def _words(pagemap: int, mapping: Mapping) -> U64:
    nr_pages = (mapping.end - mapping.start) // PAGE
    raw = os.pread(pagemap, nr_pages * 8, mapping.start // PAGE * 8)
    if len(raw) != nr_pages * 8:
        raise OSError(f"short read of pagemap at {mapping}")
    return np.frombuffer(raw, dtype=np.uint64)


def _read(mem: int, pages: U64) -> Pages:
    out = np.empty((len(pages), PAGE), dtype=np.uint8)
    breaks = np.flatnonzero(np.diff(pages) != 1) + 1 if len(pages) else []
    for part in np.split(np.arange(len(pages)), breaks):
        if len(part) == 0:
            continue
        room = memoryview(out[part[0] : part[-1] + 1]).cast("B")
        got = 0
        while got < len(room):
            step = os.preadv(mem, [room[got:]], int(pages[part[0]]) * PAGE + got)
            if step <= 0:
                raise OSError(f"cannot read {int(pages[part[0]]) * PAGE + got:#x}")
            got += step
    return out


def _zero_frames(frames: U64) -> npt.NDArray[np.bool_]:
    """Which page frames are the kernel's shared page of zeroes (/proc/kpageflags, KPF_ZERO_PAGE)."""
    out = np.zeros(len(frames), dtype=bool)
    fd = os.open("/proc/kpageflags", os.O_RDONLY | os.O_CLOEXEC)
    try:
        known: dict[int, bool] = {}
        for n, frame in enumerate(frames.tolist()):
            if frame not in known:
                word = np.frombuffer(os.pread(fd, 8, frame * 8), dtype=np.uint64)
                known[frame] = bool(len(word) and (word[0] & _KPF_ZERO_PAGE))
            out[n] = known[frame]
    finally:
        os.close(fd)
    return out


def _add_object(path: str, shared: dict[Key, tuple[int, Contents]]) -> None:
    """A memory object by its descriptor; a file on a disk is no object of ours."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        facts = os.fstat(fd)
        is_sysv = os.readlink(path).startswith("/SYSV")
        key = ((os.major(facts.st_dev), os.minor(facts.st_dev)), facts.st_ino, is_sysv)
        if key in shared or not _is_memory(facts.st_dev):
            return
        nr_pages = (facts.st_size + PAGE - 1) // PAGE
        # a page that the kernel moves just now may look like a hole
        seen = _data_pages(fd, facts.st_size) | _data_pages(fd, facts.st_size)
        for _ in range(20):
            if len(seen) * PAGE >= os.fstat(fd).st_blocks * 512:
                break
            time.sleep(0.001)
            seen |= _data_pages(fd, facts.st_size)
        pages = sorted(seen)
        zero: set[int] = set()
        if facts.st_blksize > PAGE:
            # of a hugetlb pool, which cannot tell holes: a huge page of zeroes may be one
            zero = _zero_huge_pages(fd, facts.st_size, facts.st_blksize)
            pages = [page for page in pages if page not in zero]
        numbers = np.array(pages, dtype=np.uint64)
        data = np.zeros((len(pages), PAGE), dtype=np.uint8)
        for n, page in enumerate(pages):
            chunk = os.pread(fd, PAGE, page * PAGE)
            data[n, : len(chunk)] = np.frombuffer(chunk, dtype=np.uint8)
        shared[key] = (nr_pages, Contents(numbers, data, np.array(sorted(zero), dtype=np.uint64)))
    finally:
        os.close(fd)


def _data_pages(fd: int, size: int) -> set[int]:
    pages: set[int] = set()
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError:
            break
        pages.update(range(start // PAGE, (end + PAGE - 1) // PAGE))
        at = end
    return pages


def _zero_huge_pages(fd: int, size: int, huge: int) -> set[int]:
    found: set[int] = set()
    for at in range(0, size, huge):
        if not any(os.pread(fd, huge, at)):
            found.update(range(at // PAGE, (at + huge) // PAGE))
    return found


_memory_devices: dict[int, bool] = {}


def _is_memory(device: int) -> bool:
    """Is this device a tmpfs (mounted, or the kernel's own for shared anonymous memory)?"""
    if device not in _memory_devices:
        kinds = {}
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            for line in file:
                words = line.split()
                major, minor = words[2].split(":")
                kinds[os.makedev(int(major), int(minor))] = words[words.index("-") + 1]
        # the kernel's own shmem mount is not in any namespace: a device without a block device (major 0)
        _memory_devices[device] = kinds.get(device, "tmpfs" if os.major(device) == 0 else "") == "tmpfs"
    return _memory_devices[device]


def _join(parts: list[U64]) -> U64:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint64)


def _join_data(parts: list[Pages]) -> Pages:
    return np.concatenate(parts) if parts else np.zeros((0, PAGE), dtype=np.uint8)
