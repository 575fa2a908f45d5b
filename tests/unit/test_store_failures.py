# SPDX-License-Identifier: Apache-2.0
"""Failures half-way: a full disk at every write, a call that fails, a kill at every trace point.

Whatever happens, the images that were there stay whole, a half image is never seen, and the next dump works.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest

from checkpointd import tracepoint
from checkpointd.errors import CheckpointError, NoSpace
from checkpointd.image import pack
from checkpointd.image.consolidate import ConsolidationPolicy
from checkpointd.image.store import Store

NR = 700
PAGES = np.arange(NR, dtype=np.uint64)
# Everything is consolidated each time, so that its steps are reached too.
EAGER = ConsolidationPolicy(max_amplification=1.01, settle_amplification=1.0, max_packs=2, min_dead_pages=0)


def generation(number):
    """The truth of generation `number`: 700 pages, 100 of them changed each time."""
    data = np.random.default_rng(1).integers(0, 256, (NR, 4096), dtype=np.uint8)
    for turn in range(1, number + 1):
        data[turn * 50 : turn * 50 + 100, : turn + 1] = turn
    return data


def dump(store, number):
    """Commit generation `number` on top of the latest."""
    images = store.images()
    parent = store.load(images[-1].id) if images else None
    data = generation(number)
    with store.begin(parent=parent, compress="none", policy=EAGER, threads=2) as builder:
        changed = np.arange(number * 50, number * 50 + 100) if parent else np.arange(NR)
        builder.add_pages(0, PAGES[changed], data[changed])
        builder.inherit(0, np.delete(PAGES, changed) if parent else PAGES[:0])
        return builder.commit(meta={"number": number}, state=b"s")


def check_all(path, numbers):
    """The store holds exactly these generations, whole, and nothing else."""
    store = Store.open(path)
    assert [store.load(info.id).meta["number"] for info in store.images()] == numbers
    for info, number in zip(store.images(), numbers, strict=True):
        report = store.verify(info.id)
        assert report.ok, report.problems
        assert (store.load(info.id).read(0, PAGES).reshape(NR, 4096) == generation(number)).all()
    return store


def nothing_left_over(store):
    referred = {f"{one.id}.pack" for info in store.images() for one in store.load(info.id).packs}
    assert set(os.listdir(f"{store.path}/packs")) == referred
    assert os.listdir(f"{store.path}/tmp") == []


@pytest.fixture
def store(tmp_path):
    store = Store.open(tmp_path / "store", create=True)
    for number in range(2):
        dump(store, number)
    return store


class FailAfter:
    """An os function that works `times` times, then fails for good; a write is cut short first."""

    def __init__(self, function, times, number):
        self.function, self.times, self.number = function, times, number
        self.failed = False

    def __call__(self, *args, **kwargs):
        if self.times == 0:
            self.failed = True
            raise OSError(self.number, os.strerror(self.number))
        self.times -= 1
        if self.times == 0 and self.function is REAL["pwrite"]:
            fd, data, offset = args
            return self.function(fd, data[: max(1, len(data) // 2)], offset)
        return self.function(*args, **kwargs)


REAL = {name: getattr(os, name) for name in ("pwrite", "fsync", "fdatasync", "link", "rename", "mkdir")}


@pytest.mark.parametrize("name", ["pwrite", "fsync", "fdatasync", "link", "rename", "mkdir"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_any_call_may_fail(store, monkeypatch, name, number):
    """Fail the 1st, 2nd, ... call until the dump gets through: each time nothing is lost and nothing is left."""
    monkeypatch.setattr(pack, "_FLUSH_BYTES", 64 << 10)
    times = 0
    while True:
        failing = FailAfter(REAL[name], times, number)
        with monkeypatch.context() as patch:
            patch.setattr(os, name, failing)
            try:
                dump(store, 2)
            except CheckpointError as error:
                assert failing.failed
                assert isinstance(error, NoSpace) == (number != errno.EIO)
                assert error.message
            else:
                assert not failing.failed, "a failed call was ignored"
                break
        nothing_left_over(check_all(store.path, [0, 1]))
        times += 1
        assert times < 60
    assert times > 0
    nothing_left_over(check_all(store.path, [0, 1, 2]))


def test_a_failed_step_makes_the_builder_useless(store, monkeypatch):
    with store.begin() as builder:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", FailAfter(os.pwrite, 0, errno.ENOSPC))
            with pytest.raises(NoSpace):
                builder.add_pages(0, PAGES, generation(0))
        with pytest.raises(ValueError, match="earlier step failed"):
            builder.add_pages(0, PAGES, generation(0))
        with pytest.raises(ValueError, match="earlier step failed"):
            builder.commit(meta={}, state=b"")
    nothing_left_over(check_all(store.path, [0, 1]))


CHILD = """
import resource, sys
sys.path.insert(0, {tests!r})
from checkpointd.image.store import Store
import test_store_failures as t

path, what, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
store = Store.open(path)
try:
    if what == "dump":
        t.dump(store, 2)
    elif what == "abort":
        store.begin().abort()
    else:
        store.remove(store.images()[0].id)
except t.NoSpace:
    sys.exit(13)
"""


def in_child(store, what, *, point="", size_limit=0):
    """Do it in a process that is killed at `point`, or may not write files beyond `size_limit`."""
    code = CHILD.format(tests=os.path.dirname(__file__))
    environment = {**os.environ, "CHECKPOINTD_TRACEPOINT": f"{point}@1=kill" if point else ""}
    done = subprocess.run(
        [sys.executable, "-c", code, store.path, what, str(size_limit)],
        check=False, capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode in (0, 13, -signal.SIGKILL), done.stderr
    return done.returncode


@pytest.mark.parametrize(
    ("point", "seen"),
    [
        ("image.begun", False),
        ("image.commit", False),
        ("image.consolidated", False),
        ("image.pack_written", False),
        ("image.pack_linked", False),
        ("image.before_rename", False),
        ("image.renamed", True),
        ("image.committed", True),
    ],
)
def test_a_kill_at_any_point_of_a_dump(store, point, seen):
    """Before the rename the image was never there, after it is there; the next dump sweeps and is complete."""
    assert in_child(store, "dump", point=point) == -signal.SIGKILL
    assert os.listdir(f"{store.path}/tmp") != []
    numbers = [0, 1, 2] if seen else [0, 1]
    check_all(store.path, numbers)
    dump(store, numbers[-1] + 1)
    nothing_left_over(check_all(store.path, [*numbers, numbers[-1] + 1]))


@pytest.mark.parametrize(
    "point",
    [
        "image.commit",
        "image.consolidated",
        "image.pack_written",
        "image.pack_linked",
        "image.before_rename",
        "image.renamed",
    ],
)
def test_an_interrupt_at_any_point_of_a_dump(store, monkeypatch, point):
    """Ctrl-C is an exception like any other: nothing stays of the image."""

    def hit(name):
        if name == point:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tracepoint, "hit", hit)
        with pytest.raises(KeyboardInterrupt):
            dump(store, 2)
    nothing_left_over(check_all(store.path, [0, 1]))


def test_a_kill_while_aborting(store):
    assert in_child(store, "abort", point="image.abort") == -signal.SIGKILL
    assert store.prune() == 1
    nothing_left_over(check_all(store.path, [0, 1]))


@pytest.mark.parametrize("point", ["image.removed", "image.pack_dropped"])
def test_a_kill_while_removing(tmp_path, point):
    store = Store.open(tmp_path / "store", create=True)
    for number in range(2):
        with store.begin(compress="none") as builder:
            builder.add_pages(0, PAGES, generation(number))
            builder.commit(meta={"number": number}, state=b"")
    assert in_child(store, "remove", point=point) == -signal.SIGKILL
    check_all(store.path, [1])
    store.prune()
    nothing_left_over(check_all(store.path, [1]))


@pytest.mark.parametrize("limit", [1, 100, 4096, 300_000])
def test_a_real_size_limit(store, limit):
    """RLIMIT_FSIZE makes the kernel itself cut writes short and then refuse them."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    assert in_child(store, "dump", size_limit=limit) == 13
    nothing_left_over(check_all(store.path, [0, 1]))


def test_a_real_full_disk(tmp_path):
    """A tmpfs of 6 MiB takes a generation of 2.8 MiB, not three; room made by `remove` is used again."""
    mount = tmp_path / "small"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(mount)], check=False, capture_output=True
    )
    if done.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        store = Store.open(mount / "store", create=True)
        first = fill(store, 0)
        fill(store, 1)
        with pytest.raises(NoSpace) as caught:
            fill(store, 2)
        assert caught.value.hint
        nothing_left_over(check_all(store.path, [0, 1]))
        store.remove(first)
        fill(store, 2)
        nothing_left_over(check_all(store.path, [1, 2]))
        del store
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


def fill(store, number):
    with store.begin(compress="none") as builder:
        builder.add_pages(0, PAGES, generation(number))
        return builder.commit(meta={"number": number}, state=b"").id


def test_all_trace_points_are_reached(store, monkeypatch):
    """The list above stays complete: a new point in the code must be staged here."""
    points = []
    monkeypatch.setattr(tracepoint, "hit", points.append)
    dump(store, 2)
    store.begin().abort()
    for info in store.images():
        store.remove(info.id)
    staged = {
        "image.begun", "image.commit", "image.consolidated", "image.pack_written", "image.pack_linked",
        "image.before_rename", "image.renamed", "image.committed", "image.abort", "image.removed",
        "image.pack_dropped",
    }  # fmt: skip
    assert set(points) == staged
