# SPDX-License-Identifier: Apache-2.0
"""Chains of dumps of a real program, in process: what the tracker may and may not be trusted with."""

import contextlib
import errno
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from checkpointd import tracepoint
from checkpointd.dump import dump as dump_module
from checkpointd.dump.dump import Dumper, DumpOptions
from checkpointd.dump.pages import PageWorker
from checkpointd.errors import Cancelled, CheckpointError, FrozenTooLong, Unsupported
from checkpointd.image.store import Store
from checkpointd.memory import PAGE_SIZE, PRIVATE_OBJECT
from checkpointd.tracking import uffd_wp
from checkpointd.tracking.base import TrackingLostError

SOURCE = """
import mmap, os, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # the kernel writes the CPU's number to rseq memory
area = mmap.mmap(-1, 256 * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
area.madvise(mmap.MADV_NOHUGEPAGE)  # other flags than its neighbours': a mapping of its own
for page in range(256):
    area[page * 4096] = 1
print("ready", flush=True)
for line in sys.stdin:
    for word in line.split():
        page, value = word.split("=")
        if page == "dontfork":
            area.madvise(mmap.MADV_DONTFORK)
            continue
        area[int(page) * 4096 + 7] = int(value)
    print("done", flush=True)
"""


class Target:
    def __init__(self, source=SOURCE, *words):
        self.process = subprocess.Popen(
            [sys.executable, "-c", source, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            # the kernel writes the number of the processor into the area of rseq when a thread is let go
            env={**os.environ, "GLIBC_TUNABLES": "glibc.pthread.rseq=0"},
        )
        assert self.process.stdout.readline() == "ready\n"
        self.pid = self.process.pid
        self.settle()

    def settle(self):
        """Wait until it is blocked in read(0): from then on its memory stands still."""
        while not Path(f"/proc/{self.pid}/syscall").read_text().startswith("0 0x0 "):
            time.sleep(0.001)

    def write(self, **pages):
        self.process.stdin.write(" ".join(f"{page[1:]}={value}" for page, value in pages.items()) + "\n")
        assert self.process.stdout.readline() == "done\n"
        self.settle()

    def advise_dontfork(self):
        self.process.stdin.write("dontfork=1\n")
        assert self.process.stdout.readline() == "done\n"
        self.settle()

    def memory_differs_from(self, image):
        """Page numbers whose content in the process is not that of the image.  The target waits in read(2)."""
        pages = image.pages(PRIVATE_OBJECT)
        held = image.read(PRIVATE_OBJECT, pages).reshape(-1, PAGE_SIZE)
        wrong = []
        with open(f"/proc/{self.pid}/mem", "rb", buffering=0) as memory:
            for page, content in zip(pages.tolist(), held, strict=True):
                live = os.pread(memory.fileno(), PAGE_SIZE, page * PAGE_SIZE)
                if live != content.tobytes():
                    wrong.append(page)
        return wrong


@pytest.fixture
def target():
    made = Target()
    yield made
    made.process.kill()
    made.process.wait()


@pytest.fixture
def store(tmp_path):
    return Store.open(tmp_path / "store", create=True)


@pytest.fixture
def dumper(target):
    made = Dumper(target.pid)
    yield made
    tracepoint.clear()
    made.close()


def options(tmp_path, **more):
    return DumpOptions(store=str(tmp_path / "store"), **more)


@pytest.mark.parametrize("backend", ["uffd-wp", "content"])
@pytest.mark.parametrize("read_mode", ["stopped", "fork"])
def test_each_generation_is_what_the_memory_was(target, dumper, store, tmp_path, backend, read_mode):
    for step in range(4):
        made = dumper.dump(
            options(tmp_path, incremental=step > 0, backend=backend, read_mode=read_mode, compress="none")
        )
        assert made.backend == backend
        assert made.read_mode == read_mode
        assert target.memory_differs_from(store.load(made.image_id)) == []
        if step:
            assert made.pages_written < 200
            assert made.pages_scanned == (
                made.pages_skipped_parent + made.pages_same + made.pages_zero + made.pages_written
            )
        target.write(p3=step + 2, p200=step + 2)


@pytest.mark.parametrize("backend", ["uffd-wp", "content"])
def test_generations_of_differences_are_what_the_memory_was(target, dumper, store, tmp_path, backend):
    """Every page of the area changes in one byte each time."""
    for step in range(5):
        target.write(**{f"p{page}": page % 200 + 10 * step for page in range(256)})
        made = dumper.dump(options(tmp_path, incremental=step > 0, backend=backend, delta=True))
        assert target.memory_differs_from(store.load(made.image_id)) == []
        assert store.verify(made.image_id).ok
        assert made.delta_reason == ("" if step else "there is no parent to differ from")
        assert 0 < made.pages_delta <= made.pages_written if step else made.pages_delta == 0
    assert store.info(made.image_id).pages_delta == made.pages_delta
    made = dumper.dump(options(tmp_path, incremental=True, backend=backend, delta=True, compress="none"))
    assert (made.pages_delta, made.delta_reason) == (0, "they need compression")


@pytest.mark.needs("uffd_wp", "holes_are_written")
def test_pages_are_read_while_the_tracker_goes_on(target, dumper, store, tmp_path):
    dumper.dump(options(tmp_path))
    seen = []
    tracepoint.register("track.written", lambda _: seen.append(dumper._worker._copying))
    for step in range(3):
        target.write(**{f"p{page}": step + 2 for page in range(3, 256, 5)})
        made = dumper.dump(options(tmp_path, incremental=True))
        assert made.pages_dirty >= 51
        assert made.pages_scanned == (
            made.pages_skipped_parent + made.pages_same + made.pages_zero + made.pages_written
        )
        assert target.memory_differs_from(store.load(made.image_id)) == []
    assert seen == [True] * 3


JIT = """
import ctypes, mmap, sys
libc = ctypes.CDLL(None)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
kinds = sys.argv[1].split(",")
areas = []
for kind in kinds:
    area = mmap.mmap(-1, 256 * 4096, prot=3 | (4 if kind == "rwx" else 0), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_NOHUGEPAGE)
    for page in range(256):
        area[page * 4096] = 1
    areas.append(area)
if kinds == ["rwx"]:  # all that it may write, the stack too, is executable, as in some language implementations
    for line in open("/proc/self/maps"):
        span, access, _, _, inode, *path = line.split()
        if access == "rw-p" and inode == "0" and path != ["[vvar]"]:
            start, end = (int(word, 16) for word in span.split("-"))
            libc.mprotect(start, end - start, 7)
print("ready", flush=True)
for line in sys.stdin:
    for word in line.split():
        page, value = word.split("=")
        areas[0][int(page) * 4096 + 7] = int(value)
    print("done", flush=True)
"""


@pytest.mark.parametrize("kinds", ["rwx", "rwx,rw"])
def test_memory_that_is_writable_and_executable(store, tmp_path, kinds):
    """Pages of code are read after the injection: of what is written there nothing can be read early."""
    target = Target(JIT, kinds)
    dumper = Dumper(target.pid)
    try:
        for step in range(4):
            made = dumper.dump(options(tmp_path, incremental=step > 0))
            assert target.memory_differs_from(store.load(made.image_id)) == []
            assert len(store.images()) == step + 1
            target.write(p3=step + 2, p200=step + 2)
    finally:
        dumper.close()
        target.process.kill()
        target.process.wait()


POINTS = ["track.written", "track.armed", "dump.collected", "dump.copied", "dump.thawed", "dump.commit"]


@pytest.mark.parametrize("point", POINTS)
def test_failed_dump_loses_no_dirty_page(target, dumper, store, tmp_path, point):
    dumper.dump(options(tmp_path))
    target.write(p5=77)

    def fail(name):
        raise OSError(5, "staged failure", name)

    tracepoint.register(point, fail)
    with pytest.raises(OSError, match="staged failure"):
        dumper.dump(options(tmp_path, incremental=True))
    tracepoint.clear()
    target.write(p9=78)
    made = dumper.dump(options(tmp_path, incremental=True))
    assert made.backend == "uffd-wp"
    assert target.memory_differs_from(store.load(made.image_id)) == []
    assert len(store.images()) == 2


@pytest.mark.needs("uffd_wp", "holes_are_written")
def test_page_worker_killed_while_it_walks_loses_no_dirty_page(target, store, tmp_path, monkeypatch):
    """What it had armed nobody knows any more."""
    monkeypatch.setenv(tracepoint.ENVIRONMENT, "worker.walked@2=kill")
    dumper = Dumper(target.pid)
    try:
        for value in range(2):
            dumper.dump(options(tmp_path, incremental=True))
            target.write(p5=value + 2)
        with pytest.raises(CheckpointError, match="page worker ended unexpectedly"):
            dumper.dump(options(tmp_path, incremental=True))
        monkeypatch.delenv(tracepoint.ENVIRONMENT)
        for value in range(2):
            target.write(p9=value + 2)
            made = dumper.dump(options(tmp_path, incremental=True))
            assert made.backend == "uffd-wp"
            assert target.memory_differs_from(store.load(made.image_id)) == []
    finally:
        dumper.close()


@pytest.mark.needs("uffd_wp", "holes_are_written")
def test_dump_refused_in_the_middle_of_a_collection_loses_no_knowledge(
    target, dumper, store, tmp_path, monkeypatch
):
    dumper.dump(options(tmp_path))
    target.write(p5=77)
    with monkeypatch.context() as patch:
        patch.setattr(dump_module, "capture_files", _refuse)
        with pytest.raises(Unsupported, match="staged"):
            dumper.dump(options(tmp_path, incremental=True))
    target.write(p9=78)
    made = dumper.dump(options(tmp_path, incremental=True))
    assert made.backend == "uffd-wp"
    assert made.pages_skipped_parent > 200
    assert target.memory_differs_from(store.load(made.image_id)) == []


@pytest.mark.needs("uffd_wp", "holes_are_written")
@pytest.mark.parametrize("what", ["walk", "copy_written", "copy"])
def test_request_that_cannot_be_made_holds_nobody(target, dumper, store, tmp_path, monkeypatch, what):
    """Its answer would never come."""
    dumper.dump(options(tmp_path))
    target.write(p5=77)
    dumps = pickle.dumps

    def failing(message, **kwargs):
        if message[0] == what:
            raise MemoryError
        return dumps(message, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(pickle, "dumps", failing)
        with pytest.raises(MemoryError):
            dumper.dump(options(tmp_path, incremental=True))
    made = dumper.dump(options(tmp_path, incremental=True))
    assert target.memory_differs_from(store.load(made.image_id)) == []


@pytest.mark.needs("uffd_wp", "holes_are_written")
def test_freeze_longer_than_allowed_when_the_walk_has_begun_loses_no_knowledge(
    target, dumper, store, tmp_path
):
    dumper.dump(options(tmp_path))
    target.write(p5=77)
    with pytest.raises(FrozenTooLong):
        dumper.dump(options(tmp_path, incremental=True, max_frozen_us=1))
    made = dumper.dump(options(tmp_path, incremental=True))
    assert made.backend == "uffd-wp"
    assert made.pages_skipped_parent > 200
    assert target.memory_differs_from(store.load(made.image_id)) == []


def _refuse(*_, **__):
    raise Unsupported("staged")


@pytest.mark.needs("uffd_wp")
@pytest.mark.parametrize("point", ["track.scanned", "track.armed", "the second walk"])
def test_tracking_lost_in_the_middle_of_a_collection_is_made_anew(
    target, dumper, store, tmp_path, monkeypatch, point
):
    def lose(*_, **__):
        raise TrackingLostError("staged")

    dumper.dump(options(tmp_path))
    target.write(p5=77, p6=78)
    with monkeypatch.context() as patch:
        if point == "the second walk":
            look_again, results = uffd_wp.look_again, [lose]
            patch.setattr(
                uffd_wp, "look_again", lambda *a, **k: (results.pop() if results else look_again)(*a, **k)
            )
        else:
            tracepoint.register(point, lose, at=1)
        made = dumper.dump(options(tmp_path, incremental=True))
    assert [one for one in made.warnings if "dirty tracking was lost (staged)" in one]
    assert made.backend == "content"
    for value in (2, 3):
        assert target.memory_differs_from(store.load(made.image_id)) == []
        target.write(p9=value)
        made = dumper.dump(options(tmp_path, incremental=True))
        assert made.backend == "uffd-wp"
    assert target.memory_differs_from(store.load(made.image_id)) == []


def test_parent_that_is_not_the_epochs_is_compared_by_content(target, dumper, store, tmp_path):
    first = dumper.dump(options(tmp_path))
    target.write(p5=1, p6=2)
    dumper.dump(options(tmp_path, incremental=True))
    made = dumper.dump(options(tmp_path, incremental=True, parent=first.image_id))
    assert made.backend == "content"
    assert "did not begin" in made.backend_reason
    assert target.memory_differs_from(store.load(made.image_id)) == []


def test_parent_of_another_process_is_told(target, dumper, store, tmp_path):
    other = Target()
    theirs = Dumper(other.pid)
    try:
        parent = theirs.dump(options(tmp_path)).image_id
        made = dumper.dump(options(tmp_path, incremental=True, parent=parent))
    finally:
        theirs.close()
        other.process.kill()
        other.process.wait()
    (warning,) = [one for one in made.warnings if "another process" in one]
    assert f"{parent[:12]} is an image of another process ({other.pid}, python" in warning
    assert target.memory_differs_from(store.load(made.image_id)) == []
    made = dumper.dump(options(tmp_path, incremental=True, parent=made.image_id))
    assert not [one for one in made.warnings if "another process" in one]


def test_tracking_lost_with_its_agent_falls_back_to_content(target, store, tmp_path):
    earlier = Dumper(target.pid)
    first = earlier.dump(options(tmp_path))
    earlier.close()
    target.write(p11=9)
    later = Dumper(target.pid)
    made = later.dump(options(tmp_path, incremental=True))
    later.close()
    assert (made.parent_id, made.backend) == (first.image_id, "content")
    assert target.memory_differs_from(store.load(made.image_id)) == []


def test_cancelled_dump_lets_the_target_run(target, dumper, tmp_path, store):
    dumper.cancelled = lambda: True
    with pytest.raises(Cancelled):
        dumper.dump(options(tmp_path))
    target.write(p1=1)
    assert store.images() == []


def test_freeze_longer_than_allowed_is_refused(target, dumper, store, tmp_path):
    with pytest.raises(FrozenTooLong):
        dumper.dump(options(tmp_path, max_frozen_us=1))
    target.write(p1=1)


@pytest.mark.parametrize("why", ["too long", "deadline", "cancelled"])
def test_reading_that_takes_too_long_or_is_cancelled_half_way_lets_the_target_run(
    target, dumper, store, tmp_path, monkeypatch, why
):
    dumper.dump(options(tmp_path))
    target.write(p5=77)
    finish_copy = dumper._worker.finish_copy

    def slow_finish(heard=None):
        if heard is not None:
            if why == "cancelled":
                dumper.cancelled = lambda: True
            else:
                time.sleep(3)
            heard(1, 2)
        finish_copy(heard)

    monkeypatch.setattr(dumper._worker, "finish_copy", slow_finish)
    limits = {"too long": {"max_frozen_us": 2_900_000}, "cancelled": {}}.get(why)
    if limits is None:
        limits = {"deadline_ns": time.monotonic_ns() + 2_900_000_000}
    error, words = {
        "too long": (FrozenTooLong, "only 1 of 2 pages"),
        "deadline": (FrozenTooLong, "deadline passed while"),
        "cancelled": (Cancelled, "runs on"),
    }[why]
    with pytest.raises(error, match=words):
        dumper.dump(options(tmp_path, incremental=True, **limits))
    target.write(p9=78)
    monkeypatch.setattr(dumper._worker, "finish_copy", finish_copy)
    dumper.cancelled = lambda: False
    made = dumper.dump(options(tmp_path, incremental=True))
    assert made.backend == "uffd-wp"
    assert target.memory_differs_from(store.load(made.image_id)) == []
    assert len(store.images()) == 2


def test_memory_kept_out_of_forks_at_the_last_moment_is_read_all_the_same(target, dumper, store, tmp_path):
    """The flags of mappings are read before the freeze; what the forked copy lacks shows in its page tables."""
    dumper.dump(options(tmp_path, read_mode="fork"))
    target.write(p5=77)
    tracepoint.register("dump.freeze", lambda name: target.advise_dontfork(), at=1)
    made = dumper.dump(options(tmp_path, incremental=True, read_mode="fork"))
    assert made.read_mode == "stopped"
    assert target.memory_differs_from(store.load(made.image_id)) == []


def test_what_the_buffer_cannot_hold_is_encoded_while_stopped(target, store, tmp_path):
    size = 2 << 20
    with contextlib.closing(Dumper(target.pid, worker=PageWorker(buffer_bytes=size))) as dumper:
        made = dumper.dump(options(tmp_path, read_mode="stopped"))
        assert made.pages_dirty * PAGE_SIZE > size
        assert target.memory_differs_from(store.load(made.image_id)) == []


def _policies(*tids):
    return {os.sched_getscheduler(tid) & ~os.SCHED_RESET_ON_FORK for tid in tids}


@pytest.mark.needs("uffd_wp")
def test_tracking_what_is_tracked_keeps_its_epoch(target, dumper, store, tmp_path):
    dumper.dump(options(tmp_path))
    assert dumper.track() == dumper.track("uffd-wp") == dumper.choice
    target.write(p7=9)
    made = dumper.dump(options(tmp_path, incremental=True))
    assert made.backend == "uffd-wp"  # "content", had the tracker forgotten the image
    assert made.pages_skipped_parent > 200
    dumper.track("content")
    assert dumper.choice.backend == "content"


@pytest.mark.needs("realtime")
@pytest.mark.parametrize("read_mode", ["stopped", "fork"])
def test_those_the_target_waits_for_go_ahead_of_others_until_the_thaw(
    target, dumper, store, tmp_path, read_mode
):
    dumper.dump(options(tmp_path))
    ours = (threading.get_native_id(), dumper._worker.pid)
    seen, started = {}, []
    for point in ("dump.freeze", "freeze.done", "dump.collected", "dump.copied", "dump.thawed"):
        tracepoint.register(point, lambda name: seen.setdefault(name, _policies(*ours)))
    tracepoint.register("dump.copied", lambda name: started.append(_policy_of_a_new_thread()), at=1)
    dumper.dump(options(tmp_path, read_mode=read_mode, incremental=True))
    ahead, ordinary = {os.SCHED_RR}, {os.SCHED_OTHER}
    assert seen.pop("dump.freeze") == seen.pop("dump.thawed") == ordinary
    assert list(seen.values()) == [ahead] * 3
    assert started == [ordinary]
    assert _policies(*ours, target.pid) == ordinary


@pytest.mark.needs("realtime", "uffd_wp", "holes_are_written")
def test_page_worker_keeps_off_the_cpu_of_the_target_until_the_thaw(target, dumper, store, tmp_path):
    dumper.dump(options(tmp_path))
    worker, everywhere, seen = dumper._worker.pid, os.sched_getaffinity(0), []
    tracepoint.register("dump.collected", lambda _: seen.append(os.sched_getaffinity(worker)))
    for cpu in sorted(everywhere)[:2]:
        os.sched_setaffinity(target.pid, {cpu})
        dumper.dump(options(tmp_path, incremental=True))
        assert seen.pop() == everywhere - {cpu}
        threads = [int(tid) for tid in os.listdir(f"/proc/{worker}/task")]
        assert len(threads) > 2
        assert [os.sched_getaffinity(tid) for tid in threads] == [everywhere] * len(threads)


def _policy_of_a_new_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(_policies(threading.get_native_id())))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.needs("realtime")
@pytest.mark.parametrize("point", ["dump.collected", "dump.copied"])
def test_a_dump_that_fails_leaves_nobody_ahead_of_others(target, dumper, store, tmp_path, point):
    ours = (threading.get_native_id(), dumper._worker.pid)
    seen = []

    def fail(name):
        seen.append(_policies(*ours))
        raise OSError(5, "staged failure", name)

    tracepoint.register(point, fail)
    with pytest.raises(OSError, match="staged failure"):
        dumper.dump(options(tmp_path))
    assert seen == [{os.SCHED_RR}]
    assert _policies(*ours) == {os.SCHED_OTHER}


@pytest.mark.needs("realtime")
def test_a_target_that_is_killed_is_encoded_with_ordinary_priority(target, dumper, store, tmp_path):
    ours = (threading.get_native_id(), dumper._worker.pid)
    seen = []
    for point in ("dump.copied", "dump.commit"):
        tracepoint.register(point, lambda _: seen.append(_policies(*ours)))
    dumper.dump(options(tmp_path, kill=True))
    assert seen == [{os.SCHED_RR}, {os.SCHED_OTHER}]


@pytest.mark.parametrize("policy", [os.SCHED_BATCH, os.SCHED_IDLE])
def test_a_service_that_runs_as_batch_work_stays_that(target, dumper, store, tmp_path, policy):
    seen = []
    tracepoint.register("dump.copied", lambda _: seen.append(_policies(threading.get_native_id())))
    os.sched_setscheduler(0, policy, os.sched_param(0))
    try:
        dumper.dump(options(tmp_path))
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    assert seen == [{policy}]


@pytest.mark.needs("realtime")
def test_where_time_ahead_of_others_is_limited_nobody_goes_ahead(target, dumper, store, tmp_path):
    """The kernel kills with SIGXCPU who exceeds it."""
    seen = []
    tracepoint.register("dump.copied", lambda _: seen.append(_policies(threading.get_native_id())))
    limits = resource.getrlimit(resource.RLIMIT_RTTIME)
    resource.setrlimit(resource.RLIMIT_RTTIME, (200_000, limits[1]))
    try:
        dumper.dump(options(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_RTTIME, limits)
    assert seen == [{os.SCHED_OTHER}]


@pytest.mark.needs("realtime")
def test_with_a_single_cpu_nobody_goes_ahead(target, dumper, store, tmp_path):
    """Whom they wait for would have to wait for them."""
    seen = []
    tracepoint.register("dump.copied", lambda _: seen.append(_policies(threading.get_native_id())))
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cpus)})
    try:
        dumper.dump(options(tmp_path))
    finally:
        os.sched_setaffinity(0, cpus)
    assert seen == [{os.SCHED_OTHER}]


def test_without_the_right_to_go_ahead_a_dump_is_made_all_the_same(
    target, dumper, store, tmp_path, monkeypatch
):
    asked = []

    def refuse(tid, policy, param):
        asked.append(tid)
        raise PermissionError(errno.EPERM, "staged")

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    made = dumper.dump(options(tmp_path))
    if len(os.sched_getaffinity(0)) > 1:
        assert {threading.get_native_id(), dumper._worker.pid} <= set(asked)
    assert target.memory_differs_from(store.load(made.image_id)) == []


def _worker_pid(dumper):
    return dumper._worker._child.pid


@pytest.mark.parametrize(
    ("point", "how"),
    [("dump.collected", signal.SIGSTOP), ("dump.collected", signal.SIGKILL), ("dump.commit", signal.SIGKILL)],
)
def test_a_page_worker_that_is_stopped_or_killed_costs_one_dump(target, store, tmp_path, point, how):
    """The target goes on, and the next dump has everything, with a worker of its own."""
    dumper = Dumper(target.pid)
    options = DumpOptions(store=str(tmp_path / "store"), incremental=True, read_mode="stopped")
    try:
        first = dumper.dump(options)
        target.write(p3=3)
        tracepoint.register(point, lambda name: os.kill(_worker_pid(dumper), how), at=1)
        try:
            with pytest.raises(CheckpointError, match="page worker"):
                dumper.dump(options)
        finally:
            tracepoint.clear()
        target.write(p5=5)
        second = dumper.dump(options)
        assert second.parent_id == first.image_id
        assert target.memory_differs_from(store.load(second.image_id)) == []
    finally:
        dumper.close()


def test_an_agent_that_is_stopped_while_it_holds_its_target_is_killed_by_its_page_worker(
    target, tmp_path, store
):
    """No service is needed for that."""
    code = (
        "import sys; from checkpointd.dump.dump import Dumper, DumpOptions\n"
        "Dumper(int(sys.argv[1])).dump(DumpOptions(store=sys.argv[2]))"
    )
    agent = subprocess.Popen(
        [sys.executable, "-c", code, str(target.pid), str(tmp_path / "store")],
        env={**os.environ, "CHECKPOINTD_TRACEPOINT": "dump.collected=stop"},
        cwd=Path(__file__).parents[2],
    )
    assert agent.wait(60) == -signal.SIGKILL
    target.write(p1=1)
    assert store.images() == []
