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
import time
from pathlib import Path

import numpy as np
import pytest
from kernel_shim import probe, switch
from kernel_shim.emulation import Mode

from checkpointd import features
from checkpointd.linux import pagemap_scan as ps
from checkpointd.linux import userfaultfd as uffd
from checkpointd.linux._libc import syscall
from checkpointd.memory import PAGE_SIZE, intersect_runs, pages_of
from checkpointd.procfs import maps
from checkpointd.tracking import uffd_wp
from checkpointd.tracking.base import Space, TrackingLostError
from checkpointd.tracking.content import ContentTracker
from checkpointd.tracking.make import sight_of
from checkpointd.tracking.presence import Sight
from checkpointd.tracking.soft_dirty import SoftDirtyTracker
from checkpointd.tracking.uffd_wp import FEATURES, UffdWpTracker
from tests import abilities
from tests.huge_pool import pages_for_tests

NR_PAGES = 64
OPS = ("write", "write", "write", "read", "dontneed", "remap", "move", "protect", "guard", "unguard")
AREA = 0x7E00_0000_0000
TABLE = 512  # pages of one page table
FAR = 1 << 18  # pages: the area for whole page tables lies 1 GiB behind, aligned to 2 MiB
NEEDED = {
    "uffd-wp": ["pagemap_scan", "uffd_wp"],
    "uffd-wp-in-full": [
        "pagemap_scan",
        "uffd_wp",
    ],  # as on kernels where an emptied page does not read WRITTEN
    "soft-dirty": ["soft_dirty"],
    "precise-soft-dirty": ["soft_dirty", "precise"],
    "barrier-soft-dirty": ["soft_dirty", "merge_barrier"],
    "content": [],
}
KSM = Path("/sys/kernel/mm/ksm")
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
            elif op == "mprotect":
                libc.mprotect(ctypes.c_void_p(at), ctypes.c_size_t(PAGE_SIZE * args[1]), args[2])
            elif op == "advise":
                libc.madvise(ctypes.c_void_p(at), ctypes.c_size_t(PAGE_SIZE * args[1]), args[2])
            elif op == "fill":
                for n in range(args[1]):
                    ctypes.memset(at + n * PAGE_SIZE, args[2] if args[2] >= 0 else n, PAGE_SIZE)
            elif op == "move_many":
                libc.mremap(at, PAGE_SIZE * args[1], PAGE_SIZE * args[1], 3, AREA + args[2] * PAGE_SIZE)
            elif op == "hugetlb":
                libc.mmap(at, 2 << 20, 3, MAP | 0x40000, -1, 0)
            elif op == "precise":
                switch.turn_on()
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


def make_tracker(backend, child):
    """A tracker of that name, or skip with the name of what is missing."""
    abilities.require(*NEEDED[backend])
    found = features.probe()
    sight = sight_of(found)
    if backend == "content":
        return ContentTracker(sight)
    if backend.startswith("uffd-wp"):
        quick = backend == "uffd-wp"
        if quick and not found.holes_are_written:
            pytest.skip("emptied pages do not read WRITTEN")
        uffd.handshake(child.uffd, FEATURES)
        return UffdWpTracker(child.uffd, has_guard_category=found.guard_category, holes_are_written=quick)
    kinds = probe.probe()
    keeps, moves = kinds.keeps_writes.works, kinds.marks_moves.works
    if backend == "precise-soft-dirty":
        child.do("precise", 0)
        return SoftDirtyTracker(child.pid, Mode.PATCHED, sight, keeps_writes=keeps, marks_moves=moves)
    if backend == "barrier-soft-dirty":
        uffd.handshake(child.uffd, 0)
        return SoftDirtyTracker(child.pid, Mode.BARRIER, sight, fd=child.uffd, keeps_writes=keeps)
    return SoftDirtyTracker(child.pid, Mode.PLAIN, sight, keeps_writes=keeps)


@pytest.fixture(params=list(NEEDED))
def tracker(request, child, monkeypatch):
    monkeypatch.setattr(uffd_wp, "QUICK_PAGES", 1)
    made = make_tracker(request.param, child)
    yield made
    made.disarm()


exact = pytest.mark.parametrize(
    "tracker", ["uffd-wp", "precise-soft-dirty", "barrier-soft-dirty"], indirect=True
)
soft_dirty = pytest.mark.parametrize(
    "tracker", ["soft-dirty", "precise-soft-dirty", "barrier-soft-dirty"], indirect=True
)


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


@exact
def test_exact_trackers_report_what_was_written_and_nothing_else(tracker, child):
    for page in range(NR_PAGES):
        child.do("write", page, 1, 0)
    for _ in range(2):  # the switch and the barrier begin to keep mappings apart at the first collection
        collect(tracker, child)
        tracker.commit()
    child.do("write", 9, 2, 100)
    child.do("dontneed", 20, 2)
    child.do("remap", 30, 2)
    child.do("write", 30, 3, 0)
    child.do("remap", NR_PAGES, 4)  # a neighbour behind
    child.do("write", NR_PAGES, 3, 0)
    second = collect(tracker, child)
    assert area_pages(second.dirty) == {9, 30}
    assert area_pages(second.clean) == set(range(NR_PAGES)) - {9, 20, 21, 30, 31}


@exact
def test_exact_trackers_stay_exact_for_cycles(tracker, child):
    """New mappings behind the old ones at every cycle, as a growing program makes them."""
    child.do("remap", NR_PAGES, 64)
    child.do("unmap", NR_PAGES, 64)
    for page in range(NR_PAGES):
        child.do("write", page, 1, 0)
    collect(tracker, child)
    tracker.commit()
    for cycle in range(8):
        child.do("remap", NR_PAGES + cycle, 1)
        child.do("write", NR_PAGES + cycle, 5, 0)
        child.do("write", 3 * cycle, 2 + cycle, 0)
        found = collect(tracker, child)
        tracker.commit()
        assert area_pages(found.dirty) == {3 * cycle}, cycle


def test_write_that_a_merge_hides_is_not_lost(tracker, child):
    """Two mprotect merges make stock kernels drop VM_SOFTDIRTY: kernel_shim's keeps_writes, as a dump meets it."""
    child.do("unmap", 8, NR_PAGES - 8)
    child.do("fill", 0, 8, 1)
    child.do("mprotect", 0, 4, 1)
    collect(tracker, child)
    tracker.commit()
    child.do("remap", 8, 4)
    child.do("mprotect", 4, 8, 0)
    child.do("mprotect", 4, 8, 3)
    child.do("fill", 4, 4, 7)
    child.do("mprotect", 0, 4, 3)
    assert not {4, 5, 6, 7} & area_pages(collect(tracker, child).clean)


@pytest.mark.parametrize("nr_cut", [0, 1])
def test_moved_page_tables_are_not_taken_for_what_was_there(tracker, child, nr_cut):
    """mremap(2) moves whole page tables without marking their entries (6.1 and 6.12 without the patch).

    Cut afterwards, what is left of the mapping holds no whole table any more.
    """
    for at, value in ((FAR, 1), (FAR + 2 * TABLE, 2)):
        child.do("remap", at, TABLE)
        child.do("advise", at, TABLE, 15)  # MADV_NOHUGEPAGE
        child.do("fill", at, TABLE, value)
    collect(tracker, child)
    tracker.commit()
    child.do("move_many", FAR, TABLE, FAR + 2 * TABLE)
    if nr_cut:
        child.do("unmap", FAR + 3 * TABLE - nr_cut, nr_cut)
    found = collect(tracker, child)
    first = AREA // PAGE_SIZE + FAR + 2 * TABLE
    assert child.page(first)[0] == 1
    moved = np.array([[first, TABLE]], dtype=np.uint64)
    assert len(intersect_runs(found.clean, moved)) == 0
    assert int(intersect_runs(found.dirty, moved)[:, 1].sum()) == TABLE - nr_cut


@pytest.mark.parametrize("unmerge", [False, True])
def test_write_that_samepage_merging_hides_is_not_lost(tracker, child, unmerge):
    """KSM drops the bit; after MADV_UNMERGEABLE nothing in smaps tells that it ever was there."""
    abilities.require("root", "ksm")
    child.do("fill", 0, NR_PAGES, -1)
    collect(tracker, child)
    tracker.commit()
    child.do("fill", 0, 32, 0xEE)
    old = {name: (KSM / name).read_text() for name in ("run", "pages_to_scan", "sleep_millisecs")}
    try:
        for name, value in (("pages_to_scan", "5000"), ("sleep_millisecs", "5"), ("run", "1")):
            (KSM / name).write_text(value)
        child.do("advise", 0, NR_PAGES, 12)  # MADV_MERGEABLE
        deadline = time.monotonic() + 60
        while int((KSM / "pages_sharing").read_text()) < 28 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert int((KSM / "pages_sharing").read_text()) >= 28
        if unmerge:
            child.do("advise", 0, NR_PAGES, 13)  # MADV_UNMERGEABLE
        found = collect(tracker, child)
    finally:
        (KSM / "run").write_text("2")
        for name, value in old.items():
            (KSM / name).write_text(value)
    assert not set(range(32)) & area_pages(found.clean)


def test_hugetlb_memory_is_never_called_clean(tracker, child):
    abilities.require("hugetlb")
    with pages_for_tests(2):
        child.do("hugetlb", FAR)
        child.do("write", FAR, 1, 0)
        collect(tracker, child)
        tracker.commit()
        child.do("write", FAR, 2, 0)
        found = collect(tracker, child)
        child.do("unmap", FAR, TABLE)
    page = np.array([[AREA // PAGE_SIZE + FAR, TABLE]], dtype=np.uint64)
    assert len(intersect_runs(found.clean, page)) == 0
    assert len(intersect_runs(found.dirty, page)) == 1


@soft_dirty
def test_clear_by_somebody_else_is_noticed(tracker, child):
    for page in range(8):
        child.do("write", page, 1, 0)
    collect(tracker, child)
    tracker.commit()
    child.do("write", 3, 2, 0)
    Path(f"/proc/{child.pid}/clear_refs").write_text("4")
    with pytest.raises(TrackingLostError, match="somebody else cleared"):
        collect(tracker, child)


@soft_dirty
def test_clear_by_somebody_who_writes_code_pages_afterwards_is_noticed(tracker, child):
    """As CRIU does, which puts back what its parasite stood on, in the first page of an executable mapping."""
    collect(tracker, child)
    tracker.commit()
    child.do("write", 3, 2, 0)
    Path(f"/proc/{child.pid}/clear_refs").write_text("4")
    executable = [vma for vma in maps.read_maps(child.pid) if vma.prot == 5 and not vma.shared]
    with open(f"/proc/{child.pid}/mem", "r+b", buffering=0) as memory:
        for vma in executable:
            if vma.kind != "vdso" or vma.nr_pages == 1:
                byte = os.pread(memory.fileno(), 1, vma.start)
                os.pwrite(memory.fileno(), byte, vma.start)
    with pytest.raises(TrackingLostError, match="somebody else cleared"):
        collect(tracker, child)


def test_plain_words_tell_what_the_scan_tells(child):
    """The reader for kernels without PAGEMAP_SCAN against PAGEMAP_SCAN."""
    abilities.require("pagemap_scan")
    for page in (0, 1, 5, 9):
        child.do("write", page, 1, 0)
    child.do("read", 7)
    child.do("dontneed", 1, 1)
    by_words = collect(ContentTracker(Sight(has_scan=False)), child)
    by_scan = collect(ContentTracker(Sight(has_scan=True)), child)
    assert area_pages(by_words.dirty) == area_pages(by_scan.dirty) == {0, 5, 9}
    assert np.array_equal(by_words.dirty, by_scan.dirty)


@pytest.mark.parametrize("seed", range(6))
def test_inherited_pages_equal_the_parent(tracker, child, seed):
    """Random operations; after each collection clean + dirty is exactly the data, and clean is unchanged."""
    rng = random.Random(seed)
    parent, guarded = {}, set()
    ops = OPS if abilities.have("guard") else OPS[:-2]
    for _ in range(12):
        for _ in range(rng.randrange(40)):
            page = rng.randrange(NR_PAGES)
            op = rng.choice(ops)
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
    tracker = make_tracker("uffd-wp", child)
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
