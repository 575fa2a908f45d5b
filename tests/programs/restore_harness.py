# SPDX-License-Identifier: Apache-2.0
"""Capture, kill and restore without a store: an image in memory, read by the plainest means.

Used by the tests of restore only.  Pages are read through /proc/PID/mem by what /proc/PID/pagemap says.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from checkpointd.memory import NO_PAGES, PAGE_SHIFT, PAGE_SIZE, PRIVATE_OBJECT, VmaKind, runs_of
from checkpointd.procfs import maps
from checkpointd.restore.fill import Parts
from checkpointd.restore.restorer import Restored, RestoreOptions, restore_process
from checkpointd.state import codec
from checkpointd.state.process import ImageState
from checkpointd.target.extents import data_extents
from checkpointd.target.files import capture_files
from checkpointd.target.freeze import freeze
from checkpointd.target.memory import capture_address_space, huge_runs
from checkpointd.target.process import ProcessDraft, SleepMemory, capture_process, prepare_process

_PRESENT, _SWAPPED, _FILE, _GUARD = 1 << 63, 1 << 62, 1 << 61, 1 << 58
_PRIVATE = (VmaKind.ANON, VmaKind.FILE_PRIVATE)
_CHUNK_PAGES = 1024
_PART_PAGES = 100


@dataclass
class MemoryImage:
    """Pages by object, with the interface of `checkpointd.image.Image` that restore uses."""

    content: dict[int, dict[int, bytes]] = field(default_factory=dict)

    def objects(self) -> list[int]:
        return sorted(self.content)

    def pages(self, obj: int) -> npt.NDArray[np.uint64]:
        return np.array(sorted(self.content.get(obj, {})), dtype=np.uint64)

    def zero_pages(self, obj: int) -> npt.NDArray[np.uint64]:
        found = sorted(n for n, data in self.content.get(obj, {}).items() if not any(data))
        return np.array(found, dtype=np.uint64) if found else NO_PAGES

    def visit(
        self,
        visitor: Callable[[int, npt.NDArray[np.uint64], Parts], None],
        *,
        threads: int,
    ) -> None:
        for obj, pages in self.content.items():
            numbers = [n for n in sorted(pages) if any(pages[n])]
            for at in range(0, len(numbers), _CHUNK_PAGES):
                part = numbers[at : at + _CHUNK_PAGES]
                visitor(obj, np.array(part, dtype=np.uint64), _parts([pages[n] for n in part]))


def _parts(pages: list[bytes]) -> Iterator[tuple[int, int, npt.NDArray[np.uint8]]]:
    """As an image hands them out: the memory of one part is used again for the next."""
    room = np.empty(_PART_PAGES * PAGE_SIZE, dtype=np.uint8)
    for start in range(0, len(pages), _PART_PAGES):
        some = pages[start : start + _PART_PAGES]
        data = room[: len(some) * PAGE_SIZE]
        data[:] = np.frombuffer(b"".join(some), dtype=np.uint8)
        yield start, start + len(some), data
        data[:] = 0xA5


@dataclass
class Captured:
    image: MemoryImage
    state: ImageState
    frozen_us: int

    def changed(self, **process: Any) -> Captured:
        """Itself, with these attributes of its process."""
        other = replace(self.state, process=replace(self.state.process, **process))
        return replace(self, state=other)


def capture(
    pid: int, memory: SleepMemory | None = None, *, with_files: bool = True, kill: bool = False
) -> Captured:
    """Everything of a running process.  The state goes through JSON types, as in a real image.

    Args:
        kill: it does not get to run again.
    """
    draft: ProcessDraft = prepare_process(pid)
    with freeze(pid) as frozen:
        started = time.monotonic_ns()
        vmas = maps.read_smaps(pid)
        space = capture_address_space(pid, vmas, _guards(pid, vmas), huge_runs(pid, vmas), draft.policies)
        with frozen.inject() as remote:
            process = capture_process(frozen, remote, memory, draft)
        files = capture_files(frozen, space.object_ids).state if with_files else None
        image = MemoryImage()
        _read_private(pid, vmas, {vma.start for vma in space.read_whole}, image)
        for source in space.sources:
            _read_object(source.path, source.object.id, source.object.size_bytes, image)
        frozen_us = (time.monotonic_ns() - started) // 1000
        if kill:
            os.kill(pid, signal.SIGKILL)
    state = ImageState(process, space.space, files)
    return Captured(image, codec.decode(ImageState, codec.encode(state)), frozen_us)


def _guards(pid: int, vmas: list[maps.Vma]) -> npt.NDArray[np.uint64]:
    """Runs of guard pages."""
    found = [NO_PAGES]
    with open(f"/proc/{pid}/pagemap", "rb") as pagemap:
        for vma in vmas:
            if vma.kind in _PRIVATE:
                pagemap.seek(vma.first_page * 8)
                words = np.frombuffer(pagemap.read(vma.nr_pages * 8), dtype=np.uint64)
                at = np.flatnonzero(words & np.uint64(_GUARD))
                found.append(at.astype(np.uint64) + np.uint64(vma.first_page))
    return runs_of(np.concatenate(found))


def _read_private(pid: int, vmas: list[maps.Vma], whole: set[int], image: MemoryImage) -> None:
    found = image.content.setdefault(PRIVATE_OBJECT, {})
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as mem, open(f"/proc/{pid}/pagemap", "rb") as pagemap:
        for vma in vmas:
            if vma.shared or vma.kind not in _PRIVATE:
                continue
            pagemap.seek(vma.first_page * 8)
            words = np.frombuffer(pagemap.read(vma.nr_pages * 8), dtype=np.uint64)
            has = ((words & np.uint64(_PRESENT | _SWAPPED)) != 0) & ((words & np.uint64(_GUARD)) == 0)
            if vma.start in whole:
                has[:] = True
            elif vma.kind is VmaKind.FILE_PRIVATE:
                has &= (words & np.uint64(_FILE)) == 0
            for index in np.flatnonzero(has).tolist():
                page = vma.first_page + index
                found[page] = os.pread(mem.fileno(), PAGE_SIZE, page << PAGE_SHIFT)


def _read_object(path: str, number: int, size_bytes: int, image: MemoryImage) -> None:
    found = image.content.setdefault(number, {})
    fd = os.open(path, os.O_RDONLY)
    try:
        for first, nr in data_extents(fd, size_bytes).tolist():
            for page in range(first, first + nr):
                found[page] = os.pread(fd, PAGE_SIZE, page << PAGE_SHIFT).ljust(PAGE_SIZE, b"\0")
    finally:
        os.close(fd)


def kill_and_reap(child: subprocess.Popen[bytes] | int) -> None:
    """SIGKILL, and wait until the pid is free."""
    if not isinstance(child, int):
        child.kill()
        child.wait()
        return
    try:
        os.kill(child, signal.SIGKILL)
    except ProcessLookupError:
        return
    wait_gone(child)


def wait_gone(pid: int, timeout_s: float = 20.0) -> None:
    """Wait until somebody has reaped it."""
    deadline = time.monotonic() + timeout_s
    while Path(f"/proc/{pid}").exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {pid} is not reaped")
        time.sleep(0.01)


def restore(captured: Captured, *, new_pid: bool = False, options: RestoreOptions | None = None) -> Restored:
    return restore_process(
        captured.image, captured.state, new_pid=new_pid, options=options or RestoreOptions(wait_for_ids_s=20)
    )
