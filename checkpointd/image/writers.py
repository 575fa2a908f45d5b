# SPDX-License-Identifier: Apache-2.0
"""The packs of an image in the making: one for each thread that writes.

Two threads writing one tmpfs or ext4 file would wait for each other.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from checkpointd import tracepoint
from checkpointd.image.format import Compression
from checkpointd.image.pack import PackWriter


class Writers:
    """Up to `limit` pack writers, made when needed.

    Args:
        first_number: the number of the first new pack among all packs (columns.py).
        sync: have the data go to the disk in the background as it comes, and be durable when `finish` returns.
    """

    def __init__(
        self, dir_fd: int, compression: Compression, *, first_number: int, limit: int, sync: bool
    ) -> None:
        self._dir_fd = dir_fd
        self._compression = compression
        self._first_number = first_number
        self._limit = limit
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix="image-flush") if sync else None
        self._all: list[PackWriter] = []
        self._free: queue.LifoQueue[PackWriter] = queue.LifoQueue()
        self._mutex = threading.Lock()

    @property
    def nr_pages(self) -> int:
        return sum(writer.nr_pages for writer in self._all)

    @property
    def nr_used(self) -> int:
        """How many packs have a page."""
        return sum(1 for writer in self._all if writer.nr_pages)

    @contextlib.contextmanager
    def take(self) -> Iterator[tuple[int, PackWriter]]:
        """A pack writer for this thread alone, and its number among all packs."""
        try:
            writer = self._free.get_nowait()
        except queue.Empty:
            writer = self._new() or self._free.get()
        try:
            yield self._first_number + self._all.index(writer), writer
        finally:
            self._free.put(writer)

    def finish(self) -> list[tuple[str, PackWriter]]:
        """Complete the packs; the id of each, in the order of their numbers, empty for one without a page."""
        finished = []
        for writer in self._all:
            finished.append((writer.finish() if writer.nr_pages else "", writer))
            tracepoint.hit("image.pack_written")
        return finished

    def close(self) -> None:
        if self._flusher is not None:
            self._flusher.shutdown(wait=True, cancel_futures=True)
        for writer in self._all:
            writer.close()

    def _new(self) -> PackWriter | None:
        with self._mutex:
            if len(self._all) >= self._limit:
                return None
            writer = PackWriter(f"{len(self._all)}.pack", self._dir_fd, self._compression, self._flusher)
            self._all.append(writer)
            return writer
