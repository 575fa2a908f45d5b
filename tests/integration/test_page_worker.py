# SPDX-License-Identifier: Apache-2.0
"""The page worker tells how far it is, can be stopped half-way, and works on afterwards."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection

import numpy as np
import pytest

from checkpointd import tracepoint
from checkpointd.dump.page_reading import CopyRequest
from checkpointd.dump.page_server import PageServer
from checkpointd.dump.pages import PageWorker
from checkpointd.errors import Cancelled, NoSpace, TargetGone
from checkpointd.image.store import Store
from checkpointd.memory import PAGE_SIZE

NR_PAGES = 16_384
MEMORY_PROGRAM = f"""
import ctypes, mmap, sys
memory = mmap.mmap(-1, {NR_PAGES * PAGE_SIZE}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.write(bytes(range(1, 256)) * (len(memory) // 255))
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
sys.stdin.read()
"""
OBJECT = 1


@pytest.fixture
def worker(monkeypatch):
    # time passes between two pieces, so that there is progress to hear on any machine
    monkeypatch.setenv(tracepoint.ENVIRONMENT, "worker.piece_done=sleep:30")
    made = PageWorker()
    yield made
    made.close()


@pytest.fixture
def request_of(tmp_path):
    """A request for a file of random pages, and its content."""
    content = np.random.default_rng(7).integers(0, 256, NR_PAGES * PAGE_SIZE, dtype=np.uint8)
    path = tmp_path / "memory"
    path.write_bytes(content.tobytes())
    runs = np.array([[0, NR_PAGES]], dtype=np.uint64)
    return CopyRequest(0, OBJECT, runs, source=str(path)), content


def begin(worker, tmp_path, compress, **options):
    Store.open(str(tmp_path / "store"), create=True)
    asked = {"pid": 0, "parent": "", "delta": False, "expected_pages": 4 * NR_PAGES} | options
    worker.begin(store=str(tmp_path / "store"), compress=compress, **asked)


@pytest.mark.parametrize("step", ["copy", "encode", "read_and_encode"])
def test_what_the_listener_raises_stops_the_work_and_leaves_nothing_of_it(worker, request_of, tmp_path, step):
    request, content = request_of
    begin(worker, tmp_path, "zstd:1")
    heard = []

    def stop(done, total):
        heard.append((done, total))
        raise Cancelled("enough")

    if step == "encode":
        worker.copy([request])
    with pytest.raises(Cancelled, match="enough"):
        if step == "encode":
            worker.encode(stop)
        else:
            getattr(worker, step)([request] * (4 if step == "copy" else 1), stop)
    assert len(heard) == 1
    assert 0 < heard[0][0] < heard[0][1]

    begin(worker, tmp_path, "none")
    worker.copy([request])
    worker.encode()
    made = worker.commit({"pid": 1}, b"{}")
    store = Store.open(str(tmp_path / "store"))
    assert [info.id for info in store.images()] == [made["id"]]
    image = store.load(made["id"])
    pages = image.pages(OBJECT)
    assert len(pages) == NR_PAGES
    assert np.array_equal(image.read(OBJECT, pages).reshape(-1), content)


def test_the_parent_is_not_read_while_the_target_stands_still(request_of, tmp_path):
    """What does not fit into the buffer is encoded before the thaw: whole.  The rest becomes differences."""
    request, content = request_of
    worker = PageWorker(buffer_bytes=4 << 20)
    try:
        begin(worker, tmp_path, "zstd:1", expected_pages=1024)
        worker.copy([request])
        worker.encode()
        first = worker.commit({"pid": 1}, b"{}")
        content.reshape(-1, PAGE_SIZE)[:, 5] ^= 1
        content.tofile(request.source)
        begin(worker, tmp_path, "zstd:1", parent=first["id"], delta=True, expected_pages=1024)
        worker.copy([request])
        worker.encode()
        second = worker.commit({"pid": 1}, b"{}")
        begin(worker, tmp_path, "zstd:1", parent=first["id"], delta=True, expected_pages=0)
        worker.read_and_encode([request])
        third = worker.commit({"pid": 1}, b"{}")
    finally:
        worker.close()
    assert (second["pages_written"], second["pages_delta"]) == (NR_PAGES, 1024)
    assert (third["pages_written"], third["pages_delta"]) == (NR_PAGES, NR_PAGES)
    store = Store.open(str(tmp_path / "store"))
    for made in (second, third):
        image = store.load(made["id"])
        assert np.array_equal(image.read(OBJECT, image.pages(OBJECT)).reshape(-1), content)


@pytest.mark.parametrize("cause", [NoSpace("no space left"), MemoryError("no memory left")])
def test_of_two_failures_the_cause_is_told(cause):
    """A thread that meets a builder another one has just broken may be the first to fail."""
    begun, broken = threading.Event(), threading.Event()

    def work(job, step):
        if job == "disk":
            begun.set()
            broken.wait(30)
            raise cause
        assert begun.wait(30)
        threading.Timer(0.1, broken.set).start()
        raise ValueError("the image cannot be finished: an earlier step failed") from cause

    ours, theirs = socket.socketpair()
    server = PageServer(Connection(ours.detach()), 1 << 20)
    with theirs, pytest.raises(type(cause)):
        server._each(work, ["later", "disk"], 2, 0.02)


def test_a_store_that_was_moved_away_is_not_written_to(tmp_path):
    """Its path names another one since: what is dumped belongs there."""
    path = tmp_path / "store"
    ours, theirs = socket.socketpair()
    with ours, theirs:
        server = PageServer(Connection(theirs.detach()), 1 << 20)
        Store.open(str(path), create=True)
        first = server._open(str(path))
        assert server._open(str(path)) is first
        path.rename(tmp_path / "moved")
        Store.open(str(path), create=True)
        second = server._open(str(path))
        assert second is not first
        assert second.is_at_its_path()
        assert not first.is_at_its_path()


def test_what_is_read_may_end_in_the_middle(tmp_path):
    """Both threads meet it, one of them the builder that the other has broken."""
    child = subprocess.Popen(
        [sys.executable, "-c", MEMORY_PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    ours, theirs = socket.socketpair()
    server = PageServer(Connection(ours.detach()), 1 << 20)
    Store.open(tmp_path / "store", create=True)
    try:
        first_page = int(child.stdout.readline()) // PAGE_SIZE
        runs = np.array([[first_page, NR_PAGES]], dtype=np.uint64)
        server.begin(child.pid, str(tmp_path / "store"), "", "none", False, 0, None)

        def end_it(_):
            child.kill()
            child.wait()

        tracepoint.register("worker.piece_done", end_it, at=3)
        with theirs, pytest.raises(TargetGone, match=f"process {child.pid} ended while"):
            server.read_and_encode([CopyRequest(child.pid, 0, runs)], still=False)
        server.abort()
        assert Store.open(tmp_path / "store").images() == []
    finally:
        tracepoint.clear()
        child.kill()
        child.wait()


def test_work_is_left_in_the_middle_of_a_piece(tmp_path):
    """A thread stops after the block that it is at: with slow compression a whole piece takes seconds."""
    ours, theirs = socket.socketpair()
    server = PageServer(Connection(ours.detach()), 1 << 20)
    agent = Connection(theirs.detach())
    steps, long_ago = [], time.monotonic()

    def work(job, step):
        for n in range(1000):
            steps.append((job, n))
            if n == 3:
                agent.send(("stop", ()))
            time.sleep(0.01)
            step(1)

    with pytest.raises(Cancelled):
        server._each(work, ["a", "b"], 2000, 0.02)
    assert len(steps) < 200
    assert time.monotonic() - long_ago < 9
    assert agent.poll(0)  # it was told of progress
    assert agent.recv()[0] == "progress"
    agent.close()
