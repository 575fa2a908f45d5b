# SPDX-License-Identifier: Apache-2.0
"""Chains of dumps of a real program, in process: what the tracker may and may not be trusted with."""

import contextlib
import time

import pytest

from checkpointd import tracepoint
from checkpointd.dump.dump import Dumper
from checkpointd.dump.pages import PageWorker
from checkpointd.errors import Cancelled, FrozenTooLong
from checkpointd.memory import PAGE_SIZE
from tests.programs.page_program import Target, options


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
