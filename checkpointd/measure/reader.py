# SPDX-License-Identifier: Apache-2.0
"""The reader process: holds the last two full reads of the target, compares and sizes them.

Why a process of its own: the one that traces must die fast (docs/decisions/0001-page-worker.md), and two copies
of a target are large.  It reads while the target is frozen and compares after the thaw.

How the two talk is in checkpointd/dump/child.py.  The agent going away is end of file: the reader exits.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import zstandard

from checkpointd.dump.child import Child
from checkpointd.errors import Busy, CheckpointError, FrozenTooLong, TargetGone
from checkpointd.image.digest import digest_pages
from checkpointd.image.format import BLOCK_PAGES
from checkpointd.measure.account import MAX_MAPPINGS, Report, Truth, judge, within
from checkpointd.measure.truth import NO_PAGES, OBJECTS, PAGE, U64, Bools, Mapping, Pages, Reader, Reading
from checkpointd.memory import Runs, pages_of

_CHUNK = 2048  # pages compared at a time
_KEEP_COMPRESSED_BELOW = 0.95  # as the image room stores a block
_LINE = 64
BIT = " bit"
"""Ends the name of what is no backend: the kernel's soft-dirty bits believed as they are, beside the backend of that
name, which knows when not to believe them."""
_GONE = (
    "the process that reads the target ended unexpectedly; the target runs on",
    "look for an out-of-memory kill in the kernel log",
)
_HEAT_CELLS = 2048
_HEAT_PAGES = 16


class ReaderProcess:
    """The agent's end."""

    def __init__(self, pid: int) -> None:
        self._child = Child(__name__, str(pid), gone=_GONE)

    def prepare(self) -> None:
        """Before the freeze: check that memory for two copies is there and touch the buffer.

        Raises:
            Busy: it is not.
        """
        self._child.ask("prepare")

    def look(self, *, bits: bool = False) -> None:
        """In the freeze, before any tracker collects: the mappings, their flags and perhaps the soft-dirty bits."""
        self._child.ask("look", bits)

    def read(self, deadline_ns: int = 0) -> None:
        """In the freeze: all memory.

        Raises:
            FrozenTooLong: the deadline (CLOCK_MONOTONIC; 0: none) passed first.
        """
        self._child.ask("read", deadline_ns)

    def copy(self, runs: Runs) -> int:
        """In the freeze: read these pages as a dump would; the time in microseconds."""
        nr_us: int = self._child.ask("copy", runs)
        return nr_us

    def settle(self, reports: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """After the thaw: compare with the read before, judge the reports (name, clean, dirty, forced as runs).

        Returns:
            Facts of the epoch, and the verdict on each report, as JSON values.
        """
        found: tuple[dict[str, Any], list[dict[str, Any]]] = self._child.ask("settle", list(reports))
        return found

    def close(self) -> None:
        self._child.close()


class _Server:
    """The reader's end."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._reader = Reader(pid)
        self._mappings: list[Mapping] = []
        self._bits: tuple[U64, Bools] | None = None
        self._before = Reading()
        self._now = Reading()
        self._before_digests = np.zeros((0, 2), dtype=np.uint64)
        self._compressor = zstandard.ZstdCompressor(level=1, write_checksum=False)

    def prepare(self) -> None:
        with open(f"/proc/{self._pid}/statm", "rb") as file:
            nr_pages = int(file.read().split()[1])
        have = len(self._before.data)
        needed = (2 * nr_pages - have) * PAGE
        available = _available_bytes()
        if needed * 1.1 > available:
            raise Busy(
                f"measuring process {self._pid} needs about {needed >> 20} MiB for two copies of its memory and "
                f"{available >> 20} MiB are free",
                hint="measure a smaller process, or on a machine with more memory",
                pid=self._pid,
            )
        self._reader.reserve(nr_pages + 256)

    def look(self, bits: bool = False) -> None:
        self._mappings = self._reader.mappings()
        self._bits = self._reader.soft_dirty(self._mappings) if bits else None

    def read(self, deadline_ns: int = 0) -> None:
        try:
            self._now = self._reader.read(self._mappings, deadline_ns)
        except TimeoutError:
            raise FrozenTooLong(
                f"process {self._pid} could not be read in the time it may be frozen; it runs on",
                hint="allow more with --max-frozen, or measure a smaller process",
                pid=self._pid,
            ) from None

    def copy(self, runs: Runs) -> int:
        data = np.empty(int(runs[:, 1].sum()) * PAGE if len(runs) else 0, dtype=np.uint8)
        data[::PAGE] = 0
        view = memoryview(data.data)
        fd = os.open(f"/proc/{self._pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        begun, at = time.monotonic_ns(), 0
        try:
            for first, nr in runs.tolist():
                size = nr * PAGE
                done = 0
                while done < size and (
                    got := os.preadv(fd, [view[at + done : at + size]], first * PAGE + done)
                ):
                    done += got
                at += size
            return (time.monotonic_ns() - begun) // 1000
        except OSError:
            return -1  # some page cannot be read this way: no number rather than a wrong one
        finally:
            os.close(fd)

    def settle(self, reports: list[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        before, now = self._before, self._now
        digests = digest_pages(now.data, 0) if len(now.pages) else np.zeros((0, 2), dtype=np.uint64)
        zero_before, zero_now = _zero(before.data), _zero(now.data)
        both_now = np.flatnonzero(within(now.pages, before.pages))
        both_before = np.searchsorted(before.pages, now.pages[both_now])
        differs, lines = _compare(before.data, both_before, now.data, both_now)
        written_now = both_now[differs]
        truth = Truth(
            self._mappings,
            before.pages,
            zero_before,
            now.pages,
            zero_now,
            now.pages[written_now],
            tuple(self._reader.names),
        )
        changed = truth.changed()
        sizes = _Sizes(now, zero_now, self._compressor)
        first = len(before.pages) == 0
        bytes_stored = 0 if first else sizes.of(changed)  # a full read is no increment
        epoch = {
            "pages_held": len(now.pages),
            "pages_zero": int(zero_now.sum()),
            "pages_changed": len(changed),
            "pages_written": len(written_now),
            "pages_vanished": int((~within(before.pages, now.pages)).sum()),
            "pages_unreadable": now.nr_unreadable,
            "nr_vmas": len(self._mappings),
            "bytes_raw": len(changed) * PAGE,
            "bytes_stored": None if first else bytes_stored,
            "lines_changed": int(lines.sum()),
            "bytes_lines": int(lines.sum()) * _LINE + 8 * len(written_now),
            "bytes_written_stored": sizes.of(truth.written),
            "bytes_xor": None
            if first
            else self._xor(before.data, both_before[differs], now.data, written_now),
            "mappings": _mapping_rows(truth, changed),
            "objects": list(self._reader.names),
            **_heat(changed),
        }
        verdicts = (
            [] if first else [self._judge(truth, sizes, report, digests, bytes_stored) for report in reports]
        )
        self._before, self._before_digests, self._now = now, digests, Reading()
        return epoch, verdicts

    def _judge(
        self, truth: Truth, sizes: _Sizes, given: dict[str, Any], digests: U64, bytes_stored: int
    ) -> dict[str, Any]:
        clean, dirty, forced = (pages_of(given[name]) for name in ("clean", "dirty", "forced"))
        if given["backend"].endswith(BIT) and self._bits is not None:
            pages, marked = self._bits
            clean, dirty = pages[~marked], pages[marked]
        by_content = given["backend"] == "content"
        if by_content:
            # what the image room does with "everything may have changed": compare digests
            both = within(truth.now, truth.before)
            same = np.zeros(len(truth.now), dtype=bool)
            at = np.searchsorted(truth.before, truth.now[both])
            same[both] = (digests[both] == self._before_digests[at]).all(axis=1)
            listed = within(truth.now, dirty) | (truth.now >= np.uint64(OBJECTS))
            clean, dirty = truth.now[listed & same], truth.now[listed & ~same]
        verdict = judge(truth, Report(clean, dirty, forced, "soft-dirty" in given["backend"], by_content))
        return {
            **verdict.to_dict(truth),
            "bytes_raw": len(verdict.reported) * PAGE,
            "bytes_packed": sizes.of(verdict.reported),
            "bytes_stored": bytes_stored,
        }

    def _xor(self, old: Pages, old_at: Any, new: Pages, new_at: Any) -> int:
        """What the differences of written pages take, in blocks as the image room makes them."""
        total = 0
        for at in range(0, len(new_at), BLOCK_PAGES):
            some = old[old_at[at : at + BLOCK_PAGES]] ^ new[new_at[at : at + BLOCK_PAGES]]
            total += _packed(self._compressor, some)
        return total


class _Sizes:
    """What pages of one reading take in packs: blocks of 1 MiB, compressed, pages of zeroes left out."""

    def __init__(self, reading: Reading, zero: Bools, compressor: zstandard.ZstdCompressor) -> None:
        self._reading, self._zero, self._compressor = reading, zero, compressor
        self._known: tuple[U64, int] = (NO_PAGES, 0)

    def of(self, pages: U64) -> int:
        if len(pages) == len(self._known[0]) and np.array_equal(pages, self._known[0]):
            return self._known[1]
        there = pages[within(pages, self._reading.pages)]
        rows = np.searchsorted(self._reading.pages, there)
        rows = rows[~self._zero[rows]]
        total = 0
        for at in range(0, len(rows), BLOCK_PAGES):
            total += _packed(self._compressor, self._reading.data[rows[at : at + BLOCK_PAGES]])
        self._known = (pages, total)
        return total


def _packed(compressor: zstandard.ZstdCompressor, block: Pages) -> int:
    raw = block.nbytes
    size = len(compressor.compress(np.ascontiguousarray(block).data))
    return size if size < raw * _KEEP_COMPRESSED_BELOW else raw


def _zero(data: Pages) -> Bools:
    found = np.empty(len(data), dtype=bool)
    for at in range(0, len(data), _CHUNK):
        found[at : at + _CHUNK] = ~data[at : at + _CHUNK].view(np.uint64).any(axis=1)
    return found


def _compare(old: Pages, old_at: Any, new: Pages, new_at: Any) -> tuple[Bools, Any]:
    """Which pairs of pages differ, and for those in how many 64-byte lines."""
    differs = np.zeros(len(new_at), dtype=bool)
    lines: list[Any] = [np.zeros(0, dtype=np.int64)]
    for at in range(0, len(new_at), _CHUNK):
        a = old[old_at[at : at + _CHUNK]].view(np.uint64)
        b = new[new_at[at : at + _CHUNK]].view(np.uint64)
        words = a != b
        here = words.any(axis=1)
        differs[at : at + _CHUNK] = here
        lines.append(words[here].reshape(-1, PAGE // _LINE, _LINE // 8).any(axis=2).sum(axis=1))
    return differs, np.concatenate(lines)


def _mapping_rows(truth: Truth, changed: U64) -> list[list[Any]]:
    """Rows [place, start, end, prot, path, held, changed] of mappings that hold data, the busiest first."""
    places, counts = np.unique(truth.places(truth.now), return_counts=True)
    hot = dict(zip(*(v.tolist() for v in np.unique(truth.places(changed), return_counts=True)), strict=True))
    rows: list[list[Any]] = []
    for place, held in zip(places.tolist(), counts.tolist(), strict=True):
        if place < 0:
            rows.append([place, 0, 0, "rw-s", truth.objects[-1 - place], held, hot.get(place, 0)])
        elif place < len(truth.mappings):
            m = truth.mappings[place]
            rows.append([place, m.start, m.end, m.prot, m.path, held, hot.get(place, 0)])
    rows.sort(key=lambda row: (-row[6], -row[5]))
    return rows[:MAX_MAPPINGS]


def _heat(changed: U64) -> dict[str, Any]:
    """Changed pages per aligned block of addresses, in blocks coarse enough to be few."""
    width = _HEAT_PAGES
    while True:
        blocks, counts = np.unique(changed // np.uint64(width), return_counts=True)
        if len(blocks) <= _HEAT_CELLS:
            break
        width *= 2
    cells = [[block * width, nr] for block, nr in zip(blocks.tolist(), counts.tolist(), strict=True)]
    return {"heat_pages": width, "heat": cells}


def _available_bytes() -> int:
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return 1 << 62


def serve(fd: int, pid: int) -> None:
    """Answer until the agent is gone."""
    server = _Server(pid)
    connection = Connection(fd)
    while True:
        try:
            operation, args = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer = ("ok", getattr(server, operation)(*args))
        except CheckpointError as error:
            answer = ("error", error.to_dict())
        except (ProcessLookupError, FileNotFoundError):
            gone = TargetGone(f"process {pid} ended while its memory was read", pid=pid)
            answer = ("error", gone.to_dict())
        except MemoryError:
            busy = Busy("no memory is left for two copies of the target", hint="measure a smaller process")
            answer = ("error", busy.to_dict())
        except Exception as error:
            answer = ("error", CheckpointError(f"{operation}: {type(error).__name__}: {error}").to_dict())
        try:
            connection.send(answer)
        except OSError:
            return


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
