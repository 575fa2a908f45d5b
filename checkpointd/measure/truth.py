# SPDX-License-Identifier: Apache-2.0
"""The naive reader: the whole memory of a process that stands still.

It reads everything it can at every look, knows nothing of dirty tracking, and has a parser and a rule of presence
of its own, so that a mistake in those of checkpointd.tracking or checkpointd.procfs shows as a difference.

A *page number* is an address >> 12; pages of shared memory objects, seen once however often they are mapped, are
numbered from `OBJECTS` on (`object_page`), so that one sorted array holds them all.

Source: proc_pid_smaps(5), proc_pid_pagemap(5), proc_pid_map_files(5),
Documentation/admin-guide/mm/pagemap.rst.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from checkpointd.linux import pagemap_scan

PAGE = 4096
OBJECTS = 1 << 52
_OBJECT_SHIFT = 36  # 256 TiB an object

U64 = npt.NDArray[np.uint64]
Pages = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]
ObjectKey = tuple[int, int, bool]  # device, inode, a System V segment?  (their shmid may be a memfd's inode)

NO_PAGES: U64 = np.zeros(0, dtype=np.uint64)

_PRESENT = np.uint64(1 << 63)
_SWAPPED = np.uint64(1 << 62)
_FILE_OR_SHARED = np.uint64(1 << 61)
_GUARD = np.uint64(1 << 58)
_SOFT_DIRTY = np.uint64(1 << 55)
_ENTRY = np.uint64((1 << 55) - 1)
_MARKER = np.uint64(31)  # the swap type of pte markers: no data behind it

_SPARSE_PAGES = 1 << 18  # from 1 GiB on a VMA is searched for its pages before its words are read
_WORDS = 1 << 18
_AT_ONCE = 16 << 20

_LINE = re.compile(
    rb"^([0-9a-f]+)-([0-9a-f]+) ([r-][w-][x-][ps]) ([0-9a-f]+) ([0-9a-f]+:[0-9a-f]+) (\d+)[ ]*(.*)$",
    re.MULTILINE,
)
_MORE_LOOKS, _PAUSE_S = 3, 0.0005
_NEVER = ("[vdso]", "[vvar", "[vsyscall]", "[uprobes]")


@dataclass(frozen=True, slots=True)
class Mapping:
    """One VMA.  `huge_bytes`: mapped by huge pages (AnonHugePages); `resident`: it has pages at all."""

    start: int
    end: int
    prot: str  # as the kernel prints it: "rw-p"
    path: str
    flags: frozenset[str]
    huge_bytes: int
    resident: bool

    @property
    def shared(self) -> bool:
        return self.prot[3] == "s"

    @property
    def anonymous(self) -> bool:
        """Does a page that holds nothing read as zeroes?"""
        return not self.path or self.path.startswith("[") or self.path == "/dev/zero"

    @property
    def huge_tlb(self) -> bool:
        return "ht" in self.flags


@dataclass(slots=True)
class Reading:
    """All pages that hold data, sorted, and their bytes, (n, 4096)."""

    pages: U64 = field(default_factory=lambda: NO_PAGES)
    data: Pages = field(default_factory=lambda: np.zeros((0, PAGE), dtype=np.uint8))
    nr_unreadable: int = 0


def parse_smaps(text: bytes) -> list[Mapping]:
    """The lines of a smaps file."""
    matches = list(_LINE.finditer(text))
    found = []
    for n, match in enumerate(matches):
        body = text[match.end() : matches[n + 1].start() if n + 1 < len(matches) else len(text)]
        start, end, prot, _offset, _device, _inode, path = match.groups()
        found.append(
            Mapping(
                int(start, 16),
                int(end, 16),
                prot.decode(),
                path.decode("utf-8", "surrogateescape"),
                frozenset(_word(body, b"VmFlags:").decode().split()),
                _kib(body, b"AnonHugePages:") << 10,
                bool(_kib(body, b"Rss:") or _kib(body, b"Swap:") or b"ht" in _word(body, b"VmFlags:")),
            )
        )
    return found


def _word(body: bytes, name: bytes) -> bytes:
    at = body.find(b"\n" + name)
    return body[at + 1 + len(name) : body.find(b"\n", at + 1)] if at >= 0 else b""


def _kib(body: bytes, name: bytes) -> int:
    words = _word(body, name).split()
    return int(words[0]) if words else 0


def object_page(index: int, page: int) -> int:
    """The number of page `page` of the shared object number `index`."""
    return OBJECTS + (index << _OBJECT_SHIFT) + page


def object_index(page: int) -> int:
    return (page - OBJECTS) >> _OBJECT_SHIFT


class Reader:
    """Reads one process, again and again.  `objects` are the shared objects met so far, by their index."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.objects: dict[ObjectKey, int] = {}
        self.names: list[str] = []
        self._room: Pages = np.zeros((0, PAGE), dtype=np.uint8)

    def mappings(self) -> list[Mapping]:
        with open(f"/proc/{self.pid}/smaps", "rb") as file:
            return parse_smaps(file.read())

    def reserve(self, nr_pages: int) -> None:
        """Touch the buffer of the next `read` while the target still runs."""
        if len(self._room) < nr_pages:
            self._room = np.zeros((nr_pages, PAGE), dtype=np.uint8)
            self._room[:, 0] = 1

    def read(self, mappings: Sequence[Mapping], deadline_ns: int = 0) -> Reading:
        """Everything.  The process must stand still.

        Raises:
            OSError: ESRCH when it is gone.
            TimeoutError: the deadline (CLOCK_MONOTONIC; 0: none) passed.
        """
        numbers, sources = self._find(mappings)
        total = sum(len(pages) for pages, _ in sources)
        self.reserve(total)
        room, self._room = self._room, np.zeros((0, PAGE), dtype=np.uint8)
        unreadable: list[int] = []
        at = 0
        for pages, path in sources:
            bad = _fill(path, pages, room[at : at + len(pages)], deadline_ns)
            unreadable += (bad + at).tolist()
            at += len(pages)
        data = room[:total]
        if unreadable:
            keep = np.ones(total, dtype=bool)
            keep[unreadable] = False
            numbers, data = numbers[keep], data[keep]
        return Reading(numbers, data, len(unreadable))

    def soft_dirty(self, mappings: Sequence[Mapping]) -> tuple[U64, Bools]:
        """Private pages that hold data, and which of them the kernel calls soft-dirty.  Before anybody clears."""
        numbers, marks = [NO_PAGES], [np.zeros(0, dtype=bool)]
        pagemap = os.open(f"/proc/{self.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            for mapping in mappings:
                if mapping.resident and not mapping.shared and not mapping.path.startswith(_NEVER):
                    for pages, words in _own_words(pagemap, mapping):
                        numbers.append(pages)
                        marks.append((words & _SOFT_DIRTY) != 0)
        finally:
            os.close(pagemap)
        return np.concatenate(numbers), np.concatenate(marks)

    def _find(self, mappings: Sequence[Mapping]) -> tuple[U64, list[tuple[U64, str]]]:
        """Numbers of all pages that hold data, and per file to read: the pages there, in the same order."""
        private: list[U64] = []
        objects: list[tuple[int, U64, str]] = []
        seen: set[int] = set()
        pagemap = os.open(f"/proc/{self.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            for mapping in mappings:
                if mapping.path.startswith(_NEVER) or mapping.flags & {"io", "pf"}:
                    continue
                if mapping.shared:
                    self._find_object(mapping, seen, objects)
                elif mapping.resident:
                    private.append(_own_pages(pagemap, mapping))
        finally:
            os.close(pagemap)
        own = np.concatenate(private) if private else NO_PAGES
        numbers, sources = [own], [(own, f"/proc/{self.pid}/mem")]
        for index, pages, path in sorted(objects, key=lambda found: found[0]):
            numbers.append(pages + np.uint64(object_page(index, 0)))
            sources.append((pages, path))
        return np.concatenate(numbers), sources

    def _find_object(self, mapping: Mapping, seen: set[int], objects: list[tuple[int, U64, str]]) -> None:
        path = f"/proc/{self.pid}/map_files/{mapping.start:x}-{mapping.end:x}"
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return  # a device, or not ours to open: then no dump saves it either
        try:
            facts = os.fstat(fd)
            if not _is_memory(facts.st_dev):
                return
            key = (facts.st_dev, facts.st_ino, mapping.path.startswith("/SYSV"))
            index = self.objects.setdefault(key, len(self.objects))
            if index == len(self.names):
                self.names.append(mapping.path)
            if index in seen:
                return
            seen.add(index)
            objects.append((index, _data_pages(fd, facts.st_size), path))
        finally:
            os.close(fd)


def _own_pages(pagemap: int, mapping: Mapping) -> U64:
    """Private pages of a VMA that hold data of their own."""
    parts = [pages for pages, _ in _own_words(pagemap, mapping)]
    return np.concatenate(parts) if parts else NO_PAGES


def _own_words(pagemap: int, mapping: Mapping) -> Iterator[tuple[U64, U64]]:
    """Those pages, and their words, piece by piece."""
    first, last = mapping.start // PAGE, mapping.end // PAGE
    ranges = [(first, last)]
    if last - first >= _SPARSE_PAGES:
        wanted = pagemap_scan.PAGE_IS_PRESENT | pagemap_scan.PAGE_IS_SWAPPED
        try:
            found = pagemap_scan.scan(pagemap, mapping.start, mapping.end, anyof=wanted, returned=wanted)
        except OSError as error:
            if error.errno not in (errno.ENOTTY, errno.EINVAL):
                raise
        else:
            ranges = [(start // PAGE, end // PAGE) for start, end, _ in found.tolist()]
    for start, end in ranges:
        for at in range(start, end, _WORDS):
            raw = os.pread(pagemap, min(_WORDS, end - at) * 8, at * 8)
            words = np.frombuffer(raw, dtype=np.uint64)
            present = (words & _PRESENT) != 0
            entry = words & _ENTRY
            swapped = ((words & _SWAPPED) != 0) & ~present & ((words & _GUARD) == 0)
            swapped &= (entry == 0) | ((entry & _MARKER) != _MARKER)
            swapped &= (
                words & _FILE_OR_SHARED
            ) == 0  # a page of the file that is being migrated looks swapped out
            own = (present & ((words & _FILE_OR_SHARED) == 0)) | swapped
            yield np.flatnonzero(own).astype(np.uint64) + np.uint64(at), words[own]


def _data_pages(fd: int, size_bytes: int) -> U64:
    """Pages that hold data.

    One that the kernel moves at that moment may look like a hole: all is looked for twice, and again while the object
    counts more pages than were found.
    """
    found = np.union1d(_look_for_data(fd, size_bytes), _look_for_data(fd, size_bytes))
    for _ in range(_MORE_LOOKS):
        if len(found) * PAGE >= os.fstat(fd).st_blocks * 512:
            break
        time.sleep(_PAUSE_S)
        found = np.union1d(found, _look_for_data(fd, size_bytes))
    return found


def _look_for_data(fd: int, size_bytes: int) -> U64:
    parts: list[U64] = []
    at = 0
    while at < size_bytes:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
            at = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            break  # no data behind `at`; or a relative that runs has just cut the object
        parts.append(np.arange(start // PAGE, -(-at // PAGE), dtype=np.uint64))
    return np.concatenate(parts) if parts else NO_PAGES


def _fill(path: str, pages: U64, into: Pages, deadline_ns: int) -> npt.NDArray[np.int64]:
    """Read pages of a file; positions of those that cannot be read.

    Raises:
        OSError: ESRCH when the process is gone.
        TimeoutError: the deadline passed.
    """
    bad: list[int] = []
    if len(pages) == 0:
        return np.zeros(0, dtype=np.int64)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        edges = np.concatenate(([0], np.flatnonzero(np.diff(pages) != 1) + 1, [len(pages)])).tolist()
        for first, last in itertools.pairwise(edges):
            offset = int(pages[first]) * PAGE
            view = memoryview(into[first:last].reshape(-1).data)
            done = 0
            while done < len(view):
                if deadline_ns and time.monotonic_ns() > deadline_ns:
                    raise TimeoutError
                try:
                    got = os.preadv(fd, [view[done : done + _AT_ONCE]], offset + done)
                except OSError as error:
                    if error.errno != errno.EIO:
                        raise
                    got = 0
                    bad.append(first + done // PAGE)
                else:
                    if got == 0 and path.endswith("/mem"):
                        raise ProcessLookupError(errno.ESRCH, path)
                if got == 0:  # unreadable, or the tail of an object behind its end: zeroes
                    got = PAGE - done % PAGE
                    view[done : done + got] = bytes(got)
                done += got
    finally:
        os.close(fd)
    return np.array(bad, dtype=np.int64)


def _is_memory(device: int) -> bool:
    """Is it a tmpfs, mounted or the kernel's own (of shared anonymous memory, memfd, System V)?"""
    if os.major(device) != 0:
        return False
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            left, _, right = line.partition(" - ")
            if left.split()[2] == f"0:{os.minor(device)}":
                return right.split(" ", 1)[0] in ("tmpfs", "devtmpfs", "hugetlbfs")
    return True
