# SPDX-License-Identifier: Apache-2.0
"""Writing an image's pages into the new process and its shared objects.

Two threads read the image and write at once (a page fault each 4 KiB is what costs time, and faults run in parallel),
each what it has just read: into anonymous memory that holds nothing yet as `fresh` does, elsewhere by
process_vm_writev(2).  Places that are not writable go through /proc/PID/mem on the tracer's thread, since a kernel may
let only the tracer itself do that.  Zero pages are not written where memory reads zero anyhow.

Memory that was of huge pages is made so again before it is written (`plan.huge_steps`).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import numpy.typing as npt

from checkpointd.errors import CheckpointError, ImageDamaged
from checkpointd.linux.process_vm_write import write_runs
from checkpointd.memory import PAGE_SHIFT, PAGE_SIZE, PRIVATE_OBJECT, PageNumbers, VmaKind, runs_of
from checkpointd.restore.fresh import MIN_RUN_PAGES, FreshMemory
from checkpointd.restore.objects import Objects
from checkpointd.restore.plan import is_filled_writable
from checkpointd.restore.stub import Stub
from checkpointd.state.memory import AddressSpace

_NR_THREADS = 2
_MAX_WAITING = 4  # copies of what the tracer's thread has to write
_NO_WRITES = frozenset({VmaKind.VDSO, VmaKind.VVAR, VmaKind.VSYSCALL})

Bytes = npt.NDArray[np.uint8]
Parts = Iterable[tuple[int, int, Bytes]]  # as an image gives them: see `PageSource.visit`
Progress = Callable[[str, int, int], None]


class PageSource(Protocol):
    """What a restore needs of an image."""

    def objects(self) -> list[int]: ...
    def pages(self, obj: int) -> PageNumbers: ...
    def zero_pages(self, obj: int) -> PageNumbers: ...
    def visit(self, visitor: Callable[[int, PageNumbers, Parts], None], *, threads: int) -> None: ...


class _Map:
    """Which VMA a page is in, for whole arrays of pages."""

    def __init__(self, space: AddressSpace, fresh: set[int]) -> None:
        vmas = [vma for vma in space.vmas if vma.kind not in _NO_WRITES]
        self.starts = np.array([vma.start >> PAGE_SHIFT for vma in vmas], dtype=np.uint64)
        self.ends = np.array([vma.end >> PAGE_SHIFT for vma in vmas], dtype=np.uint64)
        self.writable = np.array([is_filled_writable(vma) for vma in vmas], dtype=bool)
        self.fresh = np.array([vma.start in fresh for vma in vmas], dtype=bool)
        self.of_file = np.array(
            [not vma.shared and (vma.file is not None or vma.object is not None) for vma in vmas], dtype=bool
        )

    def find(self, pages: PageNumbers) -> npt.NDArray[np.intp]:
        """Index of each page's VMA; `pages` are sorted.

        Raises:
            ImageDamaged: a page is in none.
        """
        if len(pages) > 2:  # most are of one VMA
            first, last = self.find(pages[[0, -1]]).tolist()
            if first == last:
                return np.full(len(pages), first, dtype=np.intp)
        at = np.searchsorted(self.starts, pages, side="right") - 1
        if len(pages) and (int(at.min()) < 0 or bool((pages >= self.ends[at]).any())):
            raise ImageDamaged("the image holds pages outside of its mappings")
        return at


def fill(
    stub: Stub,
    image: PageSource,
    space: AddressSpace,
    objects: Objects,
    progress: Progress,
    *,
    dumped_on: str,
) -> int:
    """Write everything; the number of pages.

    Args:
        dumped_on: release of the kernel that the image is from.

    Raises:
        ImageDamaged: a block is damaged, or pages do not fit the mappings.
        OSError: the process or its memory is gone.
    """
    known = {one.id for one in space.objects}
    total = sum(
        len(image.pages(obj)) - len(image.zero_pages(obj))
        for obj in image.objects()
        if obj == PRIVATE_OBJECT or obj in known
    )
    for obj in known:
        objects.empty(obj)
        objects.take(obj, image.pages(obj))
    fresh = FreshMemory(stub, space, dumped_on)
    table = _Map(space, fresh.starts)
    work = _Work(stub, table, fresh, objects, known)
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="restore-fill") as pool:
            visiting = pool.submit(image.visit, work.visit, threads=_NR_THREADS)
            visiting.add_done_callback(lambda _: work.news.put(None))
            try:
                done = work.follow(lambda nr: progress("memory", nr, total))
            finally:
                work.stop()
            visiting.result()
    finally:
        fresh.close()
    _write_zeros(stub, table, image.zero_pages(PRIVATE_OBJECT))
    return done


class _Work:
    """What the image's threads share with the tracer's.

    Attributes:
        news: (pages done, pages and bytes for the tracer to write or None); None at the end.
    """

    def __init__(
        self, stub: Stub, table: _Map, fresh: FreshMemory, objects: Objects, known: set[int]
    ) -> None:
        self.stub, self.table, self.fresh, self.objects, self.known = stub, table, fresh, objects, known
        self.news: queue.SimpleQueue[tuple[int, tuple[PageNumbers, Bytes] | None] | None] = (
            queue.SimpleQueue()
        )
        self._room = threading.Semaphore(_MAX_WAITING)
        self._stopped = False

    def visit(self, obj: int, pages: PageNumbers, parts: Parts) -> None:
        """On the image's threads."""
        if obj != PRIVATE_OBJECT and obj not in self.known:
            return  # content of a deleted file: whoever restores files asks for it
        is_fresh = self._of_one_writable(pages) if obj == PRIVATE_OBJECT else None
        for start, end, data in parts:
            if self._stopped:
                raise CheckpointError("the restore was given up")
            forced = None
            if obj != PRIVATE_OBJECT:
                self.objects.write(obj, pages[start:end], data)
            elif is_fresh is None:
                forced = self._write_private(pages[start:end], data)
            else:
                self._write_run(int(pages[start]), data, is_fresh)
            if forced is not None:
                self.news.put((0, forced))
        self.news.put((len(pages), None))

    def _of_one_writable(self, pages: PageNumbers) -> bool | None:
        """Are these adjacent pages of one writable VMA, and that a fresh one?  None: they are not."""
        at = self.table.find(pages[[0, -1]])
        is_run = int(pages[-1]) - int(pages[0]) == len(pages) - 1
        if not is_run or at[0] != at[1] or not self.table.writable[at[0]]:
            return None
        return bool(self.table.fresh[at[0]])

    def _write_run(self, first_page: int, data: Bytes, is_fresh: bool) -> None:
        done = 0
        if is_fresh and data.nbytes >= MIN_RUN_PAGES * PAGE_SIZE:
            done = self.fresh.write(first_page, data)
        if done < data.nbytes:
            runs = np.array([[(first_page << PAGE_SHIFT) + done, data.nbytes - done]], dtype=np.uint64)
            write_runs(self.stub.pid, runs, data[done:])

    def _write_private(self, pages: PageNumbers, data: Bytes) -> tuple[PageNumbers, Bytes] | None:
        """Write what can be; what the tracer must write is copied."""
        forced = None
        at = self.table.find(pages)
        writable = self.table.writable[at]
        if not writable.all():
            rows = data.reshape(-1, PAGE_SIZE)
            self._room.acquire()
            forced = pages[~writable], rows[~writable].reshape(-1)
            pages, data, at = pages[writable], rows[writable].reshape(-1), at[writable]
        if len(pages):
            self._write_writable(pages, data, self.table.fresh[at], at)
        return forced

    def _write_writable(
        self, pages: PageNumbers, data: Bytes, fresh: npt.NDArray[np.bool_], at: npt.NDArray[np.intp]
    ) -> None:
        """Long runs in fresh memory one by one, all others together.

        Args:
            at: the VMA of each page; a run ends with it.
        """
        if fresh.any():
            ends = np.flatnonzero((pages[1:] != pages[:-1] + np.uint64(1)) | (at[1:] != at[:-1])) + 1
            bounds = np.concatenate(([0], ends, [len(pages)]))
            is_long = (np.diff(bounds) >= MIN_RUN_PAGES) & fresh[bounds[:-1]]
            done = 0  # pages
            for first, end in zip(bounds[:-1][is_long].tolist(), bounds[1:][is_long].tolist(), strict=True):
                self._write_over(pages[done:first], data[done * PAGE_SIZE : first * PAGE_SIZE])
                wrote = self.fresh.write(int(pages[first]), data[first * PAGE_SIZE : end * PAGE_SIZE])
                done = first + wrote // PAGE_SIZE
            pages, data = pages[done:], data[done * PAGE_SIZE :]
        self._write_over(pages, data)

    def _write_over(self, pages: PageNumbers, data: Bytes) -> None:
        if len(pages):
            write_runs(self.stub.pid, runs_of(pages) << np.uint64(PAGE_SHIFT), data)

    def follow(self, progress: Callable[[int], None]) -> int:
        """On the tracer's thread, until the image is through; the number of pages."""
        done = 0
        while (one := self.news.get()) is not None:
            nr, forced = one
            if forced is not None:
                _write_forced(self.stub, *forced)
                self._room.release()
            done += nr
            progress(done)
        return done

    def stop(self) -> None:
        """Let no thread wait or go on: all is done, or we failed."""
        self._stopped = True
        self._room.release(_NR_THREADS)


def _write_forced(stub: Stub, pages: PageNumbers, data: Bytes) -> None:
    view = memoryview(data)  # type: ignore[arg-type]
    at = 0
    for first, nr in runs_of(pages).tolist():
        stub.mem.write(first << PAGE_SHIFT, view[at : at + nr * PAGE_SIZE])
        at += nr * PAGE_SIZE


def _write_zeros(stub: Stub, table: _Map, pages: PageNumbers) -> None:
    """A private page of a file that was overwritten with zeros would otherwise show the file."""
    if len(pages) == 0:
        return
    of_file = pages[table.of_file[table.find(pages)]]
    for first in range(0, len(of_file), 1024):
        part = of_file[first : first + 1024]
        _write_forced(stub, part, np.zeros(len(part) * PAGE_SIZE, dtype=np.uint8))
