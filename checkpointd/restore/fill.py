# SPDX-License-Identifier: Apache-2.0
"""Writing an image's pages into the new process and its shared objects.

Two threads write at once (a page fault each 4 KiB is what costs time, and faults run in parallel); places that are
not writable go through /proc/PID/mem on the tracer's thread.  Zero pages are not written where memory reads zero
anyhow.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import numpy.typing as npt

from checkpointd.errors import ImageDamaged
from checkpointd.linux.process_vm_write import write_runs
from checkpointd.memory import PAGE_SHIFT, PAGE_SIZE, PRIVATE_OBJECT, PageNumbers, VmaKind, runs_of
from checkpointd.restore.objects import Objects
from checkpointd.restore.plan import is_filled_writable
from checkpointd.restore.stub import Stub
from checkpointd.state.memory import AddressSpace

_NR_THREADS = 2
_MIN_PAGES_TO_SPLIT = 64
_HUGE_PAGES = np.uint64(512)
_NO_WRITES = frozenset({VmaKind.VDSO, VmaKind.VVAR, VmaKind.VSYSCALL})

Bytes = npt.NDArray[np.uint8]
Progress = Callable[[str, int, int], None]


class PageSource(Protocol):
    """What a restore needs of an image."""

    def objects(self) -> list[int]: ...
    def pages(self, obj: int) -> PageNumbers: ...
    def zero_pages(self, obj: int) -> PageNumbers: ...
    def stream(self) -> Iterable[tuple[int, PageNumbers, Bytes]]: ...


class _Map:
    """Which VMA a page is in, for whole arrays of pages."""

    def __init__(self, space: AddressSpace) -> None:
        vmas = [vma for vma in space.vmas if vma.kind not in _NO_WRITES]
        self.starts = np.array([vma.start >> PAGE_SHIFT for vma in vmas], dtype=np.uint64)
        self.ends = np.array([vma.end >> PAGE_SHIFT for vma in vmas], dtype=np.uint64)
        self.writable = np.array([is_filled_writable(vma) for vma in vmas], dtype=bool)
        self.of_file = np.array(
            [not vma.shared and (vma.file is not None or vma.object is not None) for vma in vmas], dtype=bool
        )

    def find(self, pages: PageNumbers) -> npt.NDArray[np.intp]:
        """Index of each page's VMA.

        Raises:
            ImageDamaged: a page is in none.
        """
        at = np.searchsorted(self.starts, pages, side="right") - 1
        if len(pages) and (int(at.min()) < 0 or bool((pages >= self.ends[at]).any())):
            raise ImageDamaged("the image holds pages outside of its mappings")
        return at


def fill(stub: Stub, image: PageSource, space: AddressSpace, objects: Objects, progress: Progress) -> int:
    """Write everything; the number of pages.

    Raises:
        ImageDamaged: a block is damaged, or pages do not fit the mappings.
        OSError: the process or its memory is gone.
    """
    table = _Map(space)
    known = {one.id for one in space.objects}
    total = sum(
        len(image.pages(obj)) - len(image.zero_pages(obj))
        for obj in image.objects()
        if obj == PRIVATE_OBJECT or obj in known
    )
    done = 0
    for obj in known:
        objects.empty(obj)
    with ThreadPoolExecutor(_NR_THREADS, thread_name_prefix="restore-fill") as pool:
        for obj, pages, data in image.stream():
            if obj == PRIVATE_OBJECT:
                _write_private(stub, pool, table, pages, data)
            elif obj in known:
                objects.write(obj, pages, data)
            else:
                continue  # content of a deleted file: whoever restores files asks for it
            done += len(pages)
            progress("memory", done, total)
        _write_zeros(stub, table, image.zero_pages(PRIVATE_OBJECT))
    return done


def _write_private(
    stub: Stub, pool: ThreadPoolExecutor, table: _Map, pages: PageNumbers, data: Bytes
) -> None:
    writable = table.writable[table.find(pages)]
    if not writable.all():
        rows = data.reshape(-1, PAGE_SIZE)
        _write_forced(stub, pages[~writable], rows[~writable].reshape(-1))
        pages, data = pages[writable], rows[writable].reshape(-1)
    if len(pages) < _MIN_PAGES_TO_SPLIT:
        if len(pages):
            _write_part(stub.pid, pages, data)
        return
    cuts = [0, *(_cut(pages, n * len(pages) // _NR_THREADS) for n in range(1, _NR_THREADS)), len(pages)]
    jobs = [
        pool.submit(_write_part, stub.pid, pages[lo:hi], data[lo * PAGE_SIZE : hi * PAGE_SIZE])
        for lo, hi in itertools.pairwise(cuts)
    ]
    for job in jobs:
        job.result()


def _cut(pages: PageNumbers, near: int) -> int:
    """Where to divide the work: between huge pages, so that no two threads fault (and zero) the same one."""
    cut = int(np.searchsorted(pages, pages[near] // _HUGE_PAGES * _HUGE_PAGES))
    return cut or near


def _write_part(pid: int, pages: PageNumbers, data: Bytes) -> None:
    runs = runs_of(pages)
    write_runs(pid, runs << np.uint64(PAGE_SHIFT), data)


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
