# SPDX-License-Identifier: Apache-2.0
"""One suite for every tracker, on a child that stands still between commands.

The child makes its own userfaultfd and hands it over, so that the tracking room is tested without a freeze.
Truth is what a plain read of /proc/PID/mem sees.
"""

import contextlib
import ctypes
import mmap
import os
import pickle
import random
import signal
import socket

import numpy as np
import pytest

from checkpointd import features
from checkpointd.linux import pagemap_scan as ps
from checkpointd.linux import userfaultfd as uffd
from checkpointd.linux._libc import syscall
from checkpointd.memory import PAGE_SIZE, intersect_runs, pages_of
from checkpointd.procfs import maps
from checkpointd.tracking import uffd_wp
from checkpointd.tracking.base import Space
from checkpointd.tracking.content import ContentTracker
from checkpointd.tracking.uffd_wp import FEATURES, UffdWpTracker

NR_PAGES = 64
OPS = ("write", "write", "write", "read", "dontneed", "remap", "move", "protect", "guard", "unguard")
AREA = 0x7E00_0000_0000
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
libc.mremap.restype = ctypes.c_void_p
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
MAP = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10  # MAP_FIXED


class Child:
    """Runs commands in a forked process; between commands it is blocked in recv."""

    def __init__(self):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid == 0:
            ours.close()
            with contextlib.suppress(BaseException):
                self._serve(theirs)
            os._exit(0)
        theirs.close()
        self.sock = ours
        _, fds, _, _ = socket.recv_fds(ours, 16, 1)
        self.uffd = fds[0]

    @staticmethod
    def _serve(sock):
        fd = syscall(uffd.NR_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK | 1)
        libc.mmap(AREA, NR_PAGES * PAGE_SIZE, 3, MAP, -1, 0)
        socket.send_fds(sock, [b"fd"], [fd])
        os.close(fd)
        while data := sock.recv(65536):
            op, *args = pickle.loads(data)
            at = AREA + args[0] * PAGE_SIZE
            if op == "write":
                ctypes.memset(at + args[2] % PAGE_SIZE, args[1], 8)
            elif op == "read":
                ctypes.string_at(at, 1)
            elif op in ("guard", "unguard"):
                advice = {"guard": 102, "unguard": 103}[op]  # Linux 6.13; EINVAL before
                libc.madvise(ctypes.c_void_p(at), ctypes.c_size_t(PAGE_SIZE * args[1]), advice)
            elif op == "dontneed":
                libc.madvise(ctypes.c_void_p(at), ctypes.c_size_t(PAGE_SIZE * args[1]), 4)
            elif op == "remap":
                libc.mmap(at, PAGE_SIZE * args[1], 3, MAP, -1, 0)
            elif op == "unmap":
                libc.munmap(ctypes.c_void_p(at), ctypes.c_size_t(PAGE_SIZE * args[1]))
            elif op == "move":
                libc.mremap(at, PAGE_SIZE, PAGE_SIZE, 3, AREA + args[1] * PAGE_SIZE)
            elif op == "protect":
                libc.mprotect(ctypes.c_void_p(at), ctypes.c_size_t(PAGE_SIZE), 1)
                libc.mprotect(ctypes.c_void_p(at), ctypes.c_size_t(PAGE_SIZE), 3)
            sock.send(b"ok")

    def do(self, *command):
        self.sock.send(pickle.dumps(command))
        assert self.sock.recv(16) == b"ok"

    def space(self):
        return Space(self.pid, ps.open_pagemap(self.pid), tuple(maps.read_smaps(self.pid)))

    def page(self, number):
        with open(f"/proc/{self.pid}/mem", "rb", buffering=0) as memory:
            try:
                return os.pread(memory.fileno(), PAGE_SIZE, number * PAGE_SIZE)
            except OSError:
                return None

    def close(self):
        self.sock.close()
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@pytest.fixture
def child():
    made = Child()
    yield made
    made.close()


@pytest.fixture(params=["uffd-wp", "uffd-wp-in-full", "content"])
def tracker(request, child, monkeypatch):
    """Also as on kernels where an emptied page does not read WRITTEN: everything is looked at each time."""
    found = features.probe()
    monkeypatch.setattr(uffd_wp, "QUICK_PAGES", 1)
    if not found.pagemap_scan:
        pytest.skip("PAGEMAP_SCAN is missing")
    if request.param == "content":
        yield ContentTracker(has_guard_category=found.guard_category)
        return
    if not found.uffd_wp_async:
        pytest.skip("asynchronous userfaultfd write-protect is missing")
    uffd.handshake(child.uffd, FEATURES)
    if request.param == "uffd-wp" and not found.holes_are_written:
        pytest.skip("emptied pages do not read WRITTEN")
    made = UffdWpTracker(
        child.uffd,
        has_guard_category=found.guard_category,
        holes_are_written=request.param == "uffd-wp",
    )
    yield made
    made.disarm()


def area_pages(runs):
    area = np.array([[AREA // PAGE_SIZE, NR_PAGES]], dtype=np.uint64)
    return set((pages_of(intersect_runs(runs, area)) - np.uint64(AREA // PAGE_SIZE)).tolist())


def collect(tracker, child):
    space = child.space()
    try:
        return tracker.collect(space)
    finally:
        os.close(space.pagemap)


def test_first_collection_calls_nothing_clean(tracker, child):
    child.do("write", 3, 1, 0)
    found = collect(tracker, child)
    assert area_pages(found.clean) == set()
    assert area_pages(found.dirty) == {3}


def test_failed_dump_loses_no_dirty_page(tracker, child):
    for page in range(8):
        child.do("write", page, 1, 0)
    collect(tracker, child)
    tracker.commit()
    child.do("write", 2, 7, 0)
    assert 2 in area_pages(collect(tracker, child).dirty)
    tracker.rollback()
    child.do("write", 5, 7, 0)
    again = collect(tracker, child)
    assert {2, 5} <= area_pages(again.dirty)
    assert not {2, 5} & area_pages(again.clean)


def test_uffd_is_exact(child):
    found = features.probe()
    if not found.uffd_wp_async:
        pytest.skip("asynchronous userfaultfd write-protect is missing")
    uffd.handshake(child.uffd, FEATURES)
    tracker = UffdWpTracker(
        child.uffd, has_guard_category=found.guard_category, holes_are_written=found.holes_are_written
    )
    for page in range(NR_PAGES):
        child.do("write", page, 1, 0)
    collect(tracker, child)
    tracker.commit()
    child.do("write", 9, 2, 100)
    child.do("dontneed", 20, 2)
    child.do("remap", 30, 2)
    child.do("write", 30, 3, 0)
    second = collect(tracker, child)
    assert area_pages(second.dirty) == {9, 30}
    assert area_pages(second.clean) == set(range(NR_PAGES)) - {9, 20, 21, 30, 31}
    tracker.disarm()


@pytest.mark.parametrize("seed", range(6))
def test_inherited_pages_equal_the_parent(tracker, child, seed):
    """Random operations; after each collection clean + dirty is exactly the data, and clean is unchanged."""
    rng = random.Random(seed)
    parent, guarded = {}, set()
    for _ in range(12):
        for _ in range(rng.randrange(40)):
            page = rng.randrange(NR_PAGES)
            op = rng.choice(OPS)
            if op in ("write", "read") and page in guarded:
                continue
            if op in ("guard", "unguard", "remap"):
                touched = range(page, page + min(rng.randrange(1, 4), NR_PAGES - page))
                guarded = guarded | set(touched) if op == "guard" else guarded - set(touched)
                child.do(op, page, len(touched))
            elif op == "write":
                child.do("write", page, rng.randrange(256), rng.randrange(4000))
            elif op == "dontneed":
                child.do(op, page, min(rng.randrange(1, 4), NR_PAGES - page))
            elif op == "move":
                target = rng.randrange(NR_PAGES)
                if target != page and page not in guarded:
                    child.do("move", page, target)
                    child.do("remap", page, 1)
                    guarded.discard(target)
            else:
                child.do(op, page)
        found = collect(tracker, child)
        clean, dirty = area_pages(found.clean), area_pages(found.dirty)
        assert not clean & dirty
        first = AREA // PAGE_SIZE
        truth = {page: child.page(first + page) for page in range(NR_PAGES)}
        assert not (clean | dirty) & guarded
        if features.probe().guard_category:
            assert area_pages(found.guards) == guarded
        for page in clean:
            assert parent.get(page) == truth[page], f"page {page} is called clean but changed (seed {seed})"
        for page in set(range(NR_PAGES)) - clean - dirty:
            assert not any(truth[page] or b""), f"page {page} holds data but is in no set (seed {seed})"
        if rng.random() < 0.25:
            tracker.rollback()
        else:
            tracker.commit()
            parent = truth


def test_uffd_sees_writes_after_mremap_took_a_neighbours_registration(child):
    """mremap merges the moved VMA with its armed neighbour, and both lose their registration (seen on 6.18)."""
    found = features.probe()
    if not found.uffd_wp_async:
        pytest.skip("asynchronous userfaultfd write-protect is missing")
    uffd.handshake(child.uffd, FEATURES)
    tracker = UffdWpTracker(
        child.uffd, has_guard_category=found.guard_category, holes_are_written=found.holes_are_written
    )
    child.do("unmap", 8, NR_PAGES - 8)
    child.do("remap", 40, 1)
    for page in range(8):  # page 40 stays untouched: only such a VMA can merge where it is moved to
        child.do("write", page, 1, 0)
    collect(tracker, child)
    tracker.commit()
    child.do("move", 40, 8)
    child.do("write", 2, 2, 0)
    assert 2 in area_pages(collect(tracker, child).dirty)
    tracker.commit()
    for value in (3, 4):
        child.do("write", 2, value, 0)
        assert 2 in area_pages(collect(tracker, child).dirty)
        tracker.commit()
    tracker.disarm()
