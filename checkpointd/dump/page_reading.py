# SPDX-License-Identifier: Apache-2.0
"""Reading pages of a process that stands still, by the way that suits each page.

Runs are cut into pieces for threads; a piece is read into a buffer by process_vm_readv(2), by /proc/PID/mem, or from
the file of a shared object.

Raises TargetGone when the process ends meanwhile, CheckpointError when a page cannot be read.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from checkpointd.dump.targets import mapped_by_nobody_else
from checkpointd.errors import CheckpointError, TargetGone
from checkpointd.linux import process_vm
from checkpointd.memory import PAGE_SHIFT, PAGE_SIZE, Runs, nr_pages_in

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class CopyRequest:
    """Pages to read from a process that stands still.

    Attributes:
        pid: the frozen target, or its forked copy.
        obj: the image's object they belong to.
        runs: page numbers there.
        through_mem: read everything by /proc/PID/mem.  Else only what others may map too (it does not un-share
            pages of forked relatives) and what process_vm_readv(2) cannot read (PROT_NONE).
        alone: known to be mapped by nobody else, so that nothing has to be looked at.
        source: file to read a shared object from; "" reads the address space.
        shift: what to add to a page number to find the page in `source`, in pages.
    """

    pid: int
    obj: int
    runs: Runs
    through_mem: bool = True
    alone: bool = False
    source: str = ""
    shift: int = 0


def cut(requests: list[CopyRequest], nr_pages: int) -> tuple[list[CopyRequest], list[CopyRequest]]:
    """(requests of the first `nr_pages` pages, the rest)."""
    within: list[CopyRequest] = []
    beyond: list[CopyRequest] = []
    for request in requests:
        ends = np.cumsum(request.runs[:, 1].astype(np.int64))
        at = int(np.searchsorted(ends, nr_pages, side="right"))  # runs that fit as a whole
        if at == len(ends):
            within.append(request)
            nr_pages -= int(ends[-1]) if at else 0
            continue
        first, nr = request.runs[at].tolist()
        fit = nr_pages - (int(ends[at - 1]) if at else 0)
        head = np.array([[first, fit]] if fit else [], dtype=np.uint64).reshape(-1, 2)
        tail = np.array([[first + fit, nr - fit]], dtype=np.uint64)
        within.append(replace(request, runs=np.concatenate((request.runs[:at], head))))
        beyond.append(replace(request, runs=np.concatenate((tail, request.runs[at + 1 :]))))
        nr_pages = 0
    return within, beyond


def pieces(runs: Runs, nr_pages: int) -> Iterator[Runs]:
    """Cut runs into lists of at most `nr_pages` pages, whole runs together where they fit."""
    if len(runs) == 0:
        return
    if (runs[:, 1] > nr_pages).any():
        # a long run becomes several short ones
        size = np.uint64(nr_pages)
        nr_parts = ((runs[:, 1] + size - np.uint64(1)) // size).astype(np.int64)
        offsets = np.arange(int(nr_parts.sum())) - np.repeat(np.cumsum(nr_parts) - nr_parts, nr_parts)
        skipped = offsets.astype(np.uint64) * size
        firsts, counts = np.repeat(runs[:, 0], nr_parts), np.repeat(runs[:, 1], nr_parts)
        runs = np.stack((firsts + skipped, np.minimum(counts - skipped, size)), axis=1)
    ends = np.cumsum(runs[:, 1].astype(np.int64))
    start = 0
    while start < len(runs):
        before = int(ends[start - 1]) if start else 0
        stop = int(np.searchsorted(ends, before + nr_pages, side="right"))
        yield runs[start:stop]
        start = stop


def rows_of(runs: Runs, start: int, end: int) -> Runs:
    """The pages from one row to another, where `runs` are written out a page a row."""
    if len(runs) == 1:  # most are long
        return np.array([[int(runs[0, 0]) + start, end - start]], dtype=np.uint64)
    ends = np.cumsum(runs[:, 1].astype(np.int64))
    first = int(np.searchsorted(ends, start, side="right"))
    last = int(np.searchsorted(ends, end, side="left"))
    part: Runs = runs[first : last + 1].copy()
    part[-1, 1] -= np.uint64(int(ends[last]) - end)
    skipped = np.uint64(start - (int(ends[first - 1]) if first else 0))
    part[0, 0] += skipped
    part[0, 1] -= skipped
    return part


@contextlib.contextmanager
def reading(request: CopyRequest) -> Iterator[Callable[[Runs, Bytes], None]]:
    """What reads some pages of the request, written one after the other into memory of exactly their size."""
    pid, path = request.pid, request.source
    if not path and request.through_mem:
        path = f"/proc/{pid}/mem"
    try:
        if path:
            with _opened(path) as fd:
                yield lambda runs, into: _read_open(fd, path, runs, into, request.shift)
        else:
            yield lambda runs, into: _read_target(pid, runs, into, alone=request.alone)
    except (FileNotFoundError, ProcessLookupError) as error:
        if request.source and isinstance(error, FileNotFoundError):
            raise
        raise TargetGone(f"process {pid} ended while its memory was read", pid=pid) from error


def read(request: CopyRequest, runs: Runs, buffer: Bytes, offset: int) -> None:
    """Read pages of the request to `offset` of the buffer."""
    with reading(request) as some:
        some(runs, buffer[offset : offset + nr_pages_in(runs) * PAGE_SIZE])


def _read_target(pid: int, runs: Runs, into: Bytes, *, alone: bool) -> None:
    if not (alone and _read_quickly(pid, runs, into)):
        _read_looking(pid, runs, into)


def _read_looking(pid: int, runs: Runs, into: Bytes) -> None:
    """Each page by the way that is right for it."""
    alone = mapped_by_nobody_else(pid, runs)
    edges = [0, *(np.flatnonzero(np.diff(alone)) + 1).tolist(), len(runs)]
    at = 0
    for first, last in itertools.pairwise(edges):
        part = runs[first:last]
        size = nr_pages_in(part) * PAGE_SIZE
        room = into[at : at + size]
        if not (alone[first] and _read_quickly(pid, part, room)):
            path = f"/proc/{pid}/mem"
            with _opened(path) as fd:
                _read_open(fd, path, part, room, 0)
        at += size


def _read_quickly(pid: int, runs: Runs, into: Bytes) -> bool:
    """By process_vm_readv(2); False where it may not: pages that only FOLL_FORCE reads (PROT_NONE)."""
    try:
        return process_vm.read_runs(pid, runs << np.uint64(PAGE_SHIFT), into) == len(into)
    except OSError as error:
        if error.errno == errno.EFAULT:
            return False
        raise


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _read_open(fd: int, path: str, runs: Runs, into: Bytes, shift: int) -> None:
    view, at = memoryview(into.data), 0
    is_mem = path.endswith("/mem")
    for first, nr in runs.tolist():
        size = nr * PAGE_SIZE
        done = 0
        while done < size:
            where = (first + shift << PAGE_SHIFT) + done
            try:
                got = os.preadv(fd, [view[at + done : at + size]], where)
            except OSError as error:
                if shift and error.errno == errno.EIO:
                    # a relative that runs has just cut the object that is mapped there
                    into[at + done : at + size] = 0
                    break
                raise CheckpointError(
                    f"{path} cannot be read at {where:#x} ({error.strerror}); nothing was saved",
                    hint="the target runs on; `checkpoint check -p PID` may know why",
                ) from error
            if got == 0:
                if is_mem:
                    raise ProcessLookupError(errno.ESRCH, path)
                # the tail of a shared object's last page lies behind its end
                into[at + done : at + size] = 0
                break
            done += got
        at += size
