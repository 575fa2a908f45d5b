# SPDX-License-Identifier: Apache-2.0
"""The shared page of zeroes in a private mapping of a file: the process's own, and not what the file holds there."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
from collections.abc import Iterator

import numpy as np
import pytest

from checkpointd import features
from checkpointd.linux import pagemap_scan as ps
from checkpointd.linux import userfaultfd as uffd
from checkpointd.linux._libc import syscall
from checkpointd.memory import PAGE_SIZE, Vma, pages_of
from checkpointd.procfs import maps
from checkpointd.tracking.base import Space
from checkpointd.tracking.presence import Sight, look

UFFDIO_ZEROPAGE = 0xC020AA04
NR_PAGES = 4


@pytest.fixture
def mapping() -> Iterator[Vma]:
    """Its first page is the shared page of zeroes, its second a copy, the others are the file's."""
    file = os.memfd_create("of-a-file")
    os.write(file, b"A" * NR_PAGES * PAGE_SIZE)
    area = mmap.mmap(file, NR_PAGES * PAGE_SIZE, flags=mmap.MAP_PRIVATE)
    start = int(np.frombuffer(area, dtype=np.uint8).ctypes.data)
    fd = syscall(uffd.NR_USERFAULTFD, os.O_CLOEXEC | uffd.UFFD_USER_MODE_ONLY)
    uffd.handshake(fd, 0)
    uffd.register_missing(fd, start, start + NR_PAGES * PAGE_SIZE)
    fcntl.ioctl(fd, UFFDIO_ZEROPAGE, struct.pack("=4Q", start, PAGE_SIZE, 0, 0))
    os.close(fd)
    assert ctypes.string_at(start, 1) == b"\0"
    assert ctypes.string_at(start + 2 * PAGE_SIZE, 1) == b"A"
    ctypes.memset(start + PAGE_SIZE, 1, 1)
    yield next(vma for vma in maps.read_smaps(os.getpid()) if vma.start == start)
    os.close(file)


@pytest.mark.needs("uffd_wp")
@pytest.mark.parametrize("by_words", [pytest.param(False, marks=pytest.mark.needs("pagemap_scan")), True])
def test_it_holds_data(mapping: Vma, *, by_words: bool) -> None:
    known = features.probe()
    pagemap = ps.open_pagemap(os.getpid())
    try:
        sight = Sight(has_scan=not by_words, has_guard_category=known.guard_category)
        found = look(Space(os.getpid(), pagemap, (mapping,)), sight)
    finally:
        os.close(pagemap)
    assert [page - mapping.first_page for page in pages_of(found.runs).tolist()] == [0, 1]
