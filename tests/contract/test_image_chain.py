# SPDX-License-Identifier: Apache-2.0
"""Every generation of a chain equals the truth, whatever is added, inherited, dropped or removed.

The truth is a plain dict {(obj, page): bytes}; chains grow, fork and lose images in the middle.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
import tempfile
import threading
import traceback

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpointd.errors import ImageNotFound
from checkpointd.image.consolidate import ConsolidationPolicy
from checkpointd.image.info import PageCounts
from checkpointd.image.store import Store
from checkpointd.memory import PAGE_SIZE

EAGER = ConsolidationPolicy(max_amplification=1.2, settle_amplification=1.05, max_packs=3, min_dead_pages=0)


@pytest.fixture
def store(tmp_path):
    return Store.open(tmp_path / "store", create=True)


def content(value: int) -> bytes:
    """A page: 0 is zeroes, odd values compress, even ones do not; those from 100 on differ in a few bytes."""
    if value == 0:
        return bytes(PAGE_SIZE)
    if value >= 100:
        page = np.frombuffer(content(2), dtype=np.uint8).copy()
        page[(value - 100) * 64 : (value - 98) * 64] ^= value
        return page.tobytes()
    if value % 2:
        return bytes([value % 256]) * PAGE_SIZE
    return np.random.default_rng(value).bytes(PAGE_SIZE)


def put(builder, truth, obj, pages):
    data = b"".join(truth[obj, page] for page in pages)
    return builder.add_pages(obj, np.array(pages, dtype=np.uint64), np.frombuffer(data, dtype=np.uint8))


def check(image, truth):
    """Everything an image can be asked agrees with the truth."""
    objs = sorted({obj for obj, _ in truth})
    assert image.objects() == objs
    assert image.info.nr_pages == len(truth)
    streamed = {}
    for obj, pages, data in image.stream(threads=2, chunk_pages=7, verify_digests=True):
        assert len(data) == len(pages) * PAGE_SIZE
        for page, at in zip(pages.tolist(), range(0, len(data), PAGE_SIZE), strict=True):
            assert (obj, page) not in streamed
            streamed[obj, page] = data[at : at + PAGE_SIZE].tobytes()
    visited, lock = {}, threading.Lock()

    def take(obj, pages, parts):
        for start, end, data in parts:
            for page, row in zip(pages[start:end].tolist(), data.reshape(-1, PAGE_SIZE), strict=True):
                with lock:
                    assert (obj, page) not in visited
                    visited[obj, page] = row.tobytes()

    image.visit(take, threads=2)
    assert visited == streamed
    for obj in objs:
        pages = sorted(page for o, page in truth if o == obj)
        assert image.pages(obj).tolist() == pages
        zero = [page for page in pages if not any(truth[obj, page])]
        assert image.zero_pages(obj).tolist() == zero
        shuffled = pages[::2] + pages[1::2][::-1] + pages[:1]
        data = image.read(obj, np.array(shuffled, dtype=np.uint64)).tobytes()
        assert data == b"".join(truth[obj, page] for page in shuffled)
        around = np.array([*pages, max(pages) + 1, max(pages) + 5], dtype=np.uint64)
        assert image.has(obj, around).tolist() == [True] * len(pages) + [False, False]
        with pytest.raises(KeyError):
            image.read(obj, around)
    assert streamed == {key: value for key, value in truth.items() if any(value)}


@st.composite
def plans(draw):
    """A list of generations: which parent, which pages change to what, how they are given."""
    steps = []
    for number in range(draw(st.integers(1, 7))):
        steps.append(
            {
                "parent": draw(st.one_of(st.none(), st.integers(0, number - 1))) if number else None,
                "set": draw(
                    st.dictionaries(
                        st.tuples(st.sampled_from([0, 0, 1, 9]), st.integers(0, 40)),
                        st.one_of(st.integers(0, 6), st.integers(100, 130)),
                        max_size=40,
                    )
                ),
                "drop": draw(st.sets(st.tuples(st.sampled_from([0, 1]), st.integers(0, 40)), max_size=10)),
                "reread": draw(st.floats(0, 1)),
                "compress": draw(st.sampled_from(["none", "zstd:1", "zstd:1"])),
                "delta": draw(st.booleans()),
                "remove": draw(st.one_of(st.none(), st.integers(0, number))),
                "seed": draw(st.integers(0, 1000)),
            }
        )
    return steps


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(plans())
def test_every_generation_equals_the_truth(plan):
    run_plan(plan)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))
@given(plans())
def test_every_generation_equals_the_truth_at_length(plan):
    run_plan(plan)


def run_plan(plan):
    directory = tempfile.mkdtemp(prefix="store-test-")
    try:
        store = Store.open(f"{directory}/store", create=True)
        kept = {}  # number -> (id, truth)
        for number, step in enumerate(plan):
            parent_id, old = kept.get(step["parent"], (None, {}))
            parent = store.load(parent_id) if parent_id else None
            truth = {key: value for key, value in old.items() if key not in step["drop"]}
            truth |= {key: content(value) for key, value in step["set"].items()}
            rng = np.random.default_rng(step["seed"])
            with store.begin(
                parent=parent, compress=step["compress"], sync=False, policy=EAGER, delta=step["delta"]
            ) as builder:
                counts = PageCounts()
                for obj in {obj for obj, _ in truth}:
                    pages = sorted(page for o, page in truth if o == obj)
                    unchanged = [page for page in pages if old.get((obj, page)) == truth[obj, page]]
                    inherited = {page for page in unchanged if rng.random() > step["reread"]}
                    read = [page for page in pages if page not in inherited]
                    half = len(read) // 2
                    counts += put(builder, truth, obj, read[half:])
                    counts += put(builder, truth, obj, read[:half])
                    builder.inherit(obj, np.array(sorted(inherited), dtype=np.uint64))
                    new_zero = sum(1 for page in read if not any(truth[obj, page]))
                    assert new_zero <= counts.zero
                info = builder.commit(meta={"number": number}, state=b"state %d" % number)
            assert builder.counts == counts
            assert counts.delta <= counts.written
            assert counts.zero + counts.same + counts.written + builder.nr_inherited == len(truth)
            kept[number] = (info.id, truth)
            if step["remove"] in kept:
                store.remove(kept.pop(step["remove"])[0])
            assert {listed.id for listed in store.images()} == {image_id for image_id, _ in kept.values()}
        assert [listed.id for listed in store.images()] == [image_id for image_id, _ in kept.values()]
        for number, (image_id, truth) in kept.items():
            image = store.load(image_id)
            assert image.state == b"state %d" % number
            assert image.meta["number"] == number
            check(image, truth)
            report = store.verify(image_id)
            assert report.ok, report.problems
        portable = io.BytesIO()
        for image_id, truth in list(kept.values())[-1:]:
            store.export_image(image_id, portable)
            portable.seek(0)
            other = Store.open(f"{directory}/other", create=True)
            imported = other.load(other.import_image(portable).id)
            check(imported, truth)
            assert imported.state == store.load(image_id).state
            assert portable.read() == b""
        for image_id, _ in kept.values():
            store.remove(image_id)
        assert os.listdir(store.packs_fd) == []
        assert os.listdir(store.tmp_fd) == []
    finally:
        shutil.rmtree(directory)


def numbered(nr_pages, seed=0):
    data = np.random.default_rng(seed).integers(0, 256, (nr_pages, PAGE_SIZE), dtype=np.uint8)
    data[:, :8] = np.arange(nr_pages, dtype="<u8").reshape(-1, 1).view(np.uint8)
    return data


def test_many_threads_may_add_at_once(store):
    data = numbered(6000)
    pages = np.arange(6000, dtype=np.uint64)
    with store.begin(compress="none", threads=3) as builder:
        barrier = threading.Barrier(4)

        def work(number):
            barrier.wait()
            for at in range(number * 100, 6000, 400):
                builder.add_pages(0, pages[at : at + 100], data[at : at + 100])

        workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        info = builder.commit(meta={}, state=b"")
    assert (store.load(info.id).read(0, pages).reshape(-1, PAGE_SIZE) == data).all()


@pytest.mark.parametrize("compress", ["none", "zstd:1"])
def test_one_large_call_is_shared_among_threads(store, compress):
    data = numbered(5000)
    data[1000:3000] = 0
    data[4000:, 16:] = 3
    pages = np.arange(1 << 35, (1 << 35) + 5000, dtype=np.uint64)
    with store.begin(compress=compress) as builder:
        assert builder.add_pages(0, pages, data) == PageCounts(zero=2000, written=3000)
        image = store.load(builder.commit(meta={}, state=b"").id)
    assert (image.read(0, pages).reshape(-1, PAGE_SIZE) == data).all()
    with store.begin(parent=image, compress=compress) as builder:
        assert builder.add_pages(0, pages, data) == PageCounts(zero=2000, same=3000)
        again = store.load(builder.commit(meta={}, state=b"").id)
    assert again.info.bytes_stored < 5000
    assert np.array_equal(again.digests(0), image.digests(0))


@pytest.mark.parametrize("compress", ["none", "zstd:1"])
def test_pages_read_as_they_are_needed_make_the_same_image(store, compress):
    """Across blocks, with zero pages, pages like the parent's and new ones in each; memory may be used again."""
    nr_pages = 600
    data = np.random.default_rng(5).integers(0, 256, (nr_pages, PAGE_SIZE), dtype=np.uint8)
    data[100:300:7] = 0
    pages = np.arange(10, 10 + 2 * nr_pages, 2, dtype=np.uint64)
    found = []
    parent = None
    for _ in range(2):
        room, asked = np.empty((256, PAGE_SIZE), dtype=np.uint8), []

        def read(start, end, room=room, asked=asked):
            asked.append((start, end))
            room[: end - start] = data[start:end]
            return room[: end - start]

        with store.begin(parent=parent, compress=compress) as builder:
            counts = builder.add_read(0, pages, read)
            assert builder.counts == counts
            info = builder.commit(meta={}, state=b"")
        with store.begin(parent=parent, compress=compress) as builder:
            assert builder.add_pages(0, pages, data.reshape(-1)) == counts
        assert asked == [(0, 256), (256, 512), (512, 600)]
        parent = store.load(info.id)
        assert np.array_equal(parent.read(0, pages).reshape(data.shape), data)
        found.append(counts)
        data[::3, 9] ^= 1
    assert (found[0].zero, found[0].same, found[0].written) == (29, 0, 571)
    changed = {*range(0, nr_pages, 3)}
    zero = {*range(100, 300, 7)} - changed
    assert (found[1].zero, found[1].written) == (len(zero), len(changed))
    assert found[1].same == nr_pages - len(zero) - len(changed)


def test_a_failed_read_spoils_the_image(store):
    def read(start, end):
        raise OSError(errno.ESRCH, "it is gone")

    with store.begin() as builder:
        with pytest.raises(ProcessLookupError):
            builder.add_read(0, np.arange(3, dtype=np.uint64), read)
        with pytest.raises(ValueError, match="an earlier step failed"):
            builder.commit(meta={}, state=b"")
    assert store.images() == []


def test_a_page_given_twice_is_a_bug(store):
    data = numbered(3)
    with store.begin() as builder:
        first = store.load(put_and_commit(builder, [1, 2, 3], data).id)
    with store.begin(parent=first) as builder:
        builder.add_pages(0, np.array([2], dtype=np.uint64), data[0])
        builder.inherit(0, np.array([1, 2], dtype=np.uint64))
        with pytest.raises(ValueError, match="twice"):
            builder.commit(meta={}, state=b"")
    with store.begin() as builder, pytest.raises(ValueError, match="sorted"):
        builder.add_pages(0, np.array([2, 2], dtype=np.uint64), data[:2])
    with store.begin() as builder, pytest.raises(ValueError, match="bytes of data"):
        builder.add_pages(0, np.array([2], dtype=np.uint64), data[:2])
    assert len(store.images()) == 1
    assert os.listdir(store.tmp_fd) == []


def put_and_commit(builder, pages, data, **meta):
    builder.add_pages(0, np.array(pages, dtype=np.uint64), data)
    return builder.commit(meta=meta, state=b"")


def test_what_the_parent_lacks_cannot_be_inherited(store):
    with store.begin() as builder:
        with pytest.raises(KeyError, match="no parent"):
            builder.inherit(0, np.array([1], dtype=np.uint64))
        parent = store.load(put_and_commit(builder, [1], numbered(1)).id)
    with store.begin(parent=parent) as builder:
        for obj, page in ((0, 2), (1, 1)):
            with pytest.raises(KeyError, match=parent.id[:12]):
                builder.inherit(obj, np.array([page], dtype=np.uint64))


def test_restore_time_is_bounded_by_the_policy(store):
    """After 60 generations of scattered changes few packs are open and few dead pages are read."""
    rng = np.random.default_rng(3)
    nr = 4096
    data = numbered(nr)
    pages = np.arange(nr, dtype=np.uint64)
    image = None
    written = 0
    for _ in range(60):
        dirty = np.sort(rng.choice(nr, nr // 20, replace=False)) if image else np.arange(nr)
        data[dirty, 8:16] = rng.integers(0, 256, (len(dirty), 8), dtype=np.uint8)
        with store.begin(parent=image, compress="none", sync=False) as builder:
            builder.add_pages(0, pages[dirty], data[dirty])
            builder.inherit(0, np.delete(pages, dirty))
            info = builder.commit(meta={}, state=b"")
        image = store.load(info.id)
        written += info.bytes_stored
        assert len(image.packs) <= 32
        assert sum(pack.nr_pages for pack in image.packs) <= 3 * nr
    assert (image.read(0, pages).reshape(-1, PAGE_SIZE) == data).all()
    dirty_bytes = (nr + 59 * (nr // 20)) * PAGE_SIZE
    assert written < 5 * dirty_bytes


def test_readers_are_not_disturbed_by_removal(store):
    data = numbered(2000)
    pages = np.arange(2000, dtype=np.uint64)
    with store.begin(compress="none") as builder:
        builder.add_pages(0, pages, data)
        image = store.load(builder.commit(meta={}, state=b"").id)
    stream = image.stream(chunk_pages=64)
    first = next(stream)[2].copy()
    store.remove(image.id)
    assert os.listdir(store.packs_fd) == []
    rest = [chunk.copy() for _, _, chunk in stream]
    assert np.array_equal(np.concatenate([first, *rest]), data.reshape(-1))
    with pytest.raises(ImageNotFound):
        store.load(image.id)
    with pytest.raises(ImageNotFound):
        store.begin(parent=image)
    assert os.listdir(store.tmp_fd) == []


def test_a_parent_removed_while_its_child_is_built_leaves_the_child_whole(store):
    data = numbered(600)
    pages = np.arange(600, dtype=np.uint64)
    with store.begin() as builder:
        parent = store.load(put_and_commit(builder, pages, data).id)
    with store.begin(parent=parent) as builder:
        store.remove(parent.id)
        store.prune()
        builder.inherit(0, pages)
        child = builder.commit(meta={}, state=b"").id
    del parent
    fresh = Store.open(store.path)
    assert (fresh.load(child).read(0, pages).reshape(-1, PAGE_SIZE) == data).all()
    assert fresh.verify(child).ok


def test_concurrent_writers_removers_and_readers(store):
    """Threads that commit, remove and read at once: whatever is listed can be loaded and is right, or is gone."""
    errors = []
    pages = np.arange(300, dtype=np.uint64)

    def writer(number):
        parent = None
        for turn in range(12):
            data = np.full((300, PAGE_SIZE), number * 16 + turn + 1, dtype=np.uint8)
            with store.begin(parent=parent, sync=False) as builder:
                builder.add_pages(0, pages[: 300 - turn], data[: 300 - turn])
                info = builder.commit(meta={"fill": number * 16 + turn + 1, "nr": 300 - turn}, state=b"")
            parent = store.load(info.id)
            if turn % 3 == 2:
                store.remove(info.id)
                parent = None

    def reader():
        for _ in range(40):
            for info in Store.open(store.path).images():
                try:
                    image = store.load(info.id)
                except ImageNotFound:
                    continue
                nr = image.meta["nr"]
                assert (image.read(0, pages[:nr]) == image.meta["fill"]).all()

    def run(work, *args):
        try:
            work(*args)
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=run, args=(writer, number)) for number in range(3)]
    workers += [threading.Thread(target=run, args=(reader,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors, [traceback.format_exception(error) for error in errors]
    for info in store.images():
        assert store.verify(info.id).ok


def test_with_confirm_same_even_a_collision_loses_no_page(store, monkeypatch):
    def collide(data, seed):
        return np.ones((len(data.reshape(-1)) // PAGE_SIZE, 2), dtype=np.uint64)

    pages = np.arange(40, dtype=np.uint64)
    old, new = numbered(40), numbered(40)
    new[7, 4000] ^= 1
    for confirm, expected in ((True, new), (False, old)):
        with monkeypatch.context() as patch:
            patch.setattr("checkpointd.image.builder.digest_pages", collide)
            with store.begin() as builder:
                parent = store.load(put_and_commit(builder, pages, old).id)
            with store.begin(parent=parent, confirm_same=confirm) as builder:
                counts = builder.add_pages(0, pages, new)
                image = store.load(builder.commit(meta={}, state=b"").id)
        assert counts == PageCounts(same=40 - confirm, written=int(confirm))
        assert (image.read(0, pages).reshape(-1, PAGE_SIZE) == expected).all()
