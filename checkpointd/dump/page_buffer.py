# SPDX-License-Identifier: Apache-2.0
"""Memory for the pages of a stopped target.  Raises OSError when not even 2 MiB can be had."""

from __future__ import annotations

import mmap
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from checkpointd.dump.page_reading import Bytes
from checkpointd.linux._libc import syscall
from checkpointd.linux.arch import Nr
from checkpointd.memory import PAGE_SIZE

MAX_BUFFER_BYTES = 1 << 30
NR_THREADS = 2
"""Of the page worker: what touches, reads and encodes."""

_HUGE_BYTES = 2 << 20
_MADV_POPULATE_WRITE = 23  # Linux 5.14
_MAP_NORESERVE = 0x4000
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE


class PageBuffer:
    """Memory for pages, in huge pages where there are any; touched before it is needed, given back afterwards.

    A first touch inside the freeze would halve the speed of reading.
    """

    def __init__(self, max_bytes: int) -> None:
        size = min(max_bytes, _memory_available() // 4) & -_HUGE_BYTES or _HUGE_BYTES
        while True:
            try:
                self._map = mmap.mmap(-1, size + _HUGE_BYTES, flags=_FLAGS)
                break
            except OSError:  # the system does not overcommit
                if size <= _HUGE_BYTES:
                    raise
                size = size // 2 & -_HUGE_BYTES
        whole = np.frombuffer(self._map, dtype=np.uint8)
        skip = -int(whole.ctypes.data) % _HUGE_BYTES
        self.bytes: Bytes = whole[skip : skip + size]
        self._base = int(self.bytes.ctypes.data)
        self._touched = 0
        self._advise(0, size, mmap.MADV_HUGEPAGE)

    def touch(self, nr_bytes: int, pool: ThreadPoolExecutor) -> None:
        """Have the first `nr_bytes` (or all there are) in memory."""
        wanted = -(-min(nr_bytes, len(self.bytes)) // _HUGE_BYTES) * _HUGE_BYTES
        if wanted <= self._touched:
            return
        step = max(_HUGE_BYTES, (wanted - self._touched) // NR_THREADS // _HUGE_BYTES * _HUGE_BYTES)
        starts = range(self._touched, wanted, step)
        list(pool.map(lambda at: self._touch(at, min(at + step, wanted)), starts))
        self._touched = wanted

    def shrink(self, nr_bytes: int) -> None:
        """Give back all but the first `nr_bytes`."""
        if self._touched > nr_bytes:
            self._advise(nr_bytes, self._touched, mmap.MADV_DONTNEED)
            self._touched = nr_bytes

    def _touch(self, start: int, end: int) -> None:
        if not self._advise(start, end, _MADV_POPULATE_WRITE):
            self.bytes[start:end:PAGE_SIZE].fill(0)

    def _advise(self, start: int, end: int, advice: int) -> bool:
        # mmap.madvise would hold the interpreter's lock
        try:
            syscall(Nr.MADVISE, self._base + start, end - start, advice, name="madvise")
        except OSError:
            return False
        return True


def _memory_available() -> int:
    with open("/proc/meminfo", "rb") as file:
        for line in file:
            if line.startswith(b"MemAvailable:"):
                return int(line.split()[1]) << 10
    return MAX_BUFFER_BYTES
