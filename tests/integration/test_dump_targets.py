# SPDX-License-Identifier: Apache-2.0
"""Which pages of a process nobody else maps, asked of real processes."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from checkpointd.dump.dump import Dumper, DumpOptions
from checkpointd.dump.targets import KnownAlone, mapped_by_nobody_else
from checkpointd.image.store import Store
from checkpointd.linux import pidfd
from checkpointd.memory import NO_RUNS, PAGE_SIZE

NR_PAGES = 3000


def _address(area: mmap.mmap) -> int:
    return int(np.frombuffer(area, dtype=np.uint8).ctypes.data) // PAGE_SIZE


@pytest.fixture
def family():
    """The first page of a parent (we) that rewrote every third page after the fork: those alone are its own."""
    area = mmap.mmap(-1, NR_PAGES * PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_NOHUGEPAGE)
    view = np.frombuffer(area, dtype=np.uint8)
    view[::PAGE_SIZE] = 1
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    view[:: 3 * PAGE_SIZE] = 2
    yield _address(area)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_every_run_is_told_apart(family):
    runs = np.array([[family + n, 1] for n in range(NR_PAGES)], dtype=np.uint64)
    assert mapped_by_nobody_else(os.getpid(), runs).tolist() == [n % 3 == 0 for n in range(NR_PAGES)]


def test_runs_far_apart_and_runs_that_are_partly_shared(family):
    runs = np.array([[family, 1], [family + 3, 2], [family + 2400, 1], [family + 2998, 2]], dtype=np.uint64)
    assert mapped_by_nobody_else(os.getpid(), runs).tolist() == [True, False, True, False]


def test_all_is_ones_own_again_when_the_relative_is_gone():
    area = mmap.mmap(-1, 10 * PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = np.frombuffer(area, dtype=np.uint8)
    view[::PAGE_SIZE] = 1
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    assert mapped_by_nobody_else(os.getpid(), np.array([[_address(area), 10]], dtype=np.uint64)).tolist() == [
        True
    ]


def test_what_is_not_there_or_a_files_or_shared_memory_is_not_ones_own():
    hole = mmap.mmap(-1, PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    shared = mmap.mmap(-1, PAGE_SIZE)
    shared[0] = 1
    with open("/proc/self/exe", "rb") as file:
        text = mmap.mmap(file.fileno(), PAGE_SIZE, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE)
    assert text[0] == 0x7F
    pages = sorted(_address(area) for area in (hole, shared, text))
    runs = np.array([[page, 1] for page in pages], dtype=np.uint64)
    assert mapped_by_nobody_else(os.getpid(), runs).tolist() == [False] * 3
    assert mapped_by_nobody_else(os.getpid(), runs[:0]).tolist() == []


def test_a_fork_meanwhile_is_noticed(family):
    runs = np.array([[family + n, 1] for n in range(NR_PAGES)], dtype=np.uint64)
    known = KnownAlone.look(os.getpid(), runs, NO_RUNS)
    assert (known.runs[:, 0] - np.uint64(family)).tolist() == list(range(0, NR_PAGES, 3))
    assert len(known.still(os.getpid())) == len(known.runs)
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    assert len(known.still(os.getpid())) == 0
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(KnownAlone.look(os.getpid(), NO_RUNS, runs).still(os.getpid())) == 0


def test_pages_seldom_written_tell_of_a_fork_after_which_all_others_were_written():
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    hot, cold = mmap.mmap(-1, 16 * PAGE_SIZE, flags), mmap.mmap(-1, 16 * PAGE_SIZE, flags)
    for area in (hot, cold):
        area[:] = b"1" * len(area)
    written, others = (np.array([[_address(area), 16]], dtype=np.uint64) for area in (hot, cold))
    alone = [KnownAlone.look(os.getpid(), written, some) for some in (others, NO_RUNS)]
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    hot[:] = b"2" * len(hot)
    found = [len(one.still(os.getpid())) for one in alone]
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert found == [0, 1]


WATCHED = """
import ctypes, fcntl, mmap, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
fd = libc.syscall(323, os.O_CLOEXEC | os.O_NONBLOCK)
assert fd >= 0
fcntl.ioctl(fd, 0xC018AA3F, struct.pack("=QQQ", 0xAA, 1 << 1, 0))  # UFFDIO_API with EVENT_FORK
area = mmap.mmap(-1, 64 * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
at = ctypes.addressof(ctypes.c_char.from_buffer(area))
for page in range(32):
    area[page * 4096] = 7
fcntl.ioctl(fd, 0xC020AA00, struct.pack("=QQQQ", at, 64 * 4096, 1, 0))  # UFFDIO_REGISTER for missing pages
print(fd, flush=True)
sys.stdin.readline()
os.close(fd)
print("closed", flush=True)
print(sys.stdin.readline(), flush=True)
"""


@pytest.mark.needs("root", "ptrace", "pagemap_scan")
def test_a_target_whose_forks_somebody_wants_to_hear_of_is_read_stopped(tmp_path):
    """The fork of a copy would wait for that somebody, and the target with it."""
    with subprocess.Popen(
        [sys.executable, "-c", WATCHED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as target:
        try:
            number = target.stdout.readline()
            if not number:
                pytest.skip("no userfaultfd here")
            theirs = pidfd.pidfd_open(target.pid)
            ours = pidfd.pidfd_getfd(theirs, int(number))
            target.stdin.write("\n")
            assert target.stdout.readline() == "closed\n"
            Store.open(tmp_path / "store", create=True)
            dumper = Dumper(target.pid)
            try:
                stats = dumper.dump(DumpOptions(store=str(tmp_path / "store"), read_mode="fork"))
            finally:
                dumper.close()
                os.close(ours)
                os.close(theirs)
            assert stats.read_mode == "stopped"
            target.stdin.write("on\n")
            assert target.stdout.readline() == "on\n"
        finally:
            target.kill()
