# SPDX-License-Identifier: Apache-2.0
"""Images with delta pages: as whole as any other, smaller where pages change little, and no slower with depth.

test_image_chain.py draws chains with deltas among others; test_image_damage.py damages a store that has some.
"""

from __future__ import annotations

import io
import os
from collections import Counter

import numpy as np
import pytest

from checkpointd.errors import ImageDamaged, UnknownFormat
from checkpointd.image import delta as delta_module
from checkpointd.image import pack as pack_module
from checkpointd.image.consolidate import ConsolidationPolicy
from checkpointd.image.format import DELTA_VERSION, FORMAT_VERSION, NO_BASE, check_version
from checkpointd.image.info import PageCounts
from checkpointd.image.store import Store
from checkpointd.memory import PAGE_SIZE

PAGES = np.arange(1 << 35, (1 << 35) + 3000, dtype=np.uint64)
LAZY = ConsolidationPolicy(max_amplification=1e9, max_packs=4000)


@pytest.fixture
def store(tmp_path):
    return Store.open(tmp_path / "store", create=True)


def random_pages(nr_pages, seed=1):
    return np.random.default_rng(seed).integers(0, 256, (nr_pages, PAGE_SIZE), dtype=np.uint8)


def put(store, data, parent=None, dirty=None, **options):
    """One image; with `dirty` only those rows are given and the others inherited."""
    pages = PAGES[: len(data)]
    with store.begin(parent=parent, sync=False, **{"delta": True, **options}) as builder:
        if dirty is None:
            builder.add_pages(0, pages, data)
        else:
            builder.add_pages(0, pages[dirty], data[dirty])
            builder.inherit(0, np.delete(pages, dirty))
        info = builder.commit(meta={}, state=b"state")
    return store.load(info.id), builder.counts


def check(store, image, data):
    """Every way of reading gives the truth."""
    pages = PAGES[: len(data)]
    assert (image.read(0, pages).reshape(-1, PAGE_SIZE) == data).all()
    backwards = np.arange(len(data))[::-1]
    assert (image.read(0, pages[backwards]).reshape(-1, PAGE_SIZE) == data[backwards]).all()
    for read in (visited, streamed):
        content = read(image)
        assert sorted(content) == pages[data.any(axis=1)].tolist()
        assert all(content[page] == data[page - int(PAGES[0])].tobytes() for page in content)
    assert store.verify(image.id).problems == []


def streamed(image):
    out = {}
    for _, pages, data in image.stream(verify_digests=True, chunk_pages=100):
        out |= dict(zip(pages.tolist(), map(bytes, data.reshape(-1, PAGE_SIZE)), strict=True))
    return out


def visited(image, threads=2):
    out = {}

    def take(_, pages, parts):
        for start, end, data in parts:
            rows = map(bytes, data.reshape(-1, PAGE_SIZE))
            out.update(zip(pages[start:end].tolist(), rows, strict=True))

    image.visit(take, threads=threads)
    return out


def touched(data, rows, seed):
    """A copy in which 20 bytes of each of these pages are others."""
    data = data.copy()
    rng = np.random.default_rng(seed)
    at = rng.integers(0, PAGE_SIZE - 20)
    data[rows, at : at + 20] ^= rng.integers(1, 256, (len(rows), 20), dtype=np.uint8)
    return data


def nr_based(image):
    return sum(int(index.counts[index.bases != NO_BASE].sum()) for index in image.index.values())


def test_little_changes_are_stored_small_and_read_whole(store):
    data = random_pages(600)
    first, counts = put(store, data)
    assert (counts.delta, first.info.format_version) == (0, FORMAT_VERSION)
    rows = np.arange(0, 600, 3)
    data = touched(data, rows, 2)
    plain, _ = put(store, data, first, delta=False)
    second, counts = put(store, data, first)
    assert counts == PageCounts(same=400, written=200, delta=200)
    assert second.info.format_version == DELTA_VERSION
    assert second.meta["pages_delta"] == 200
    assert second.info.bytes_stored < plain.info.bytes_stored / 20
    assert np.array_equal(second.digests(0), plain.digests(0)), "the digest is that of the whole page"
    check(store, second, data)
    check(store, first, random_pages(600))


def test_a_delta_page_is_the_same_as_itself(store):
    data = random_pages(300)
    first, _ = put(store, data)
    data = touched(data, np.arange(300), 2)
    second, counts = put(store, data, first)
    assert counts.delta == 300
    third, counts = put(store, data, second, confirm_same=True)
    assert counts == PageCounts(same=300)
    assert nr_based(third) == 300
    check(store, third, data)


def test_the_base_of_a_delta_page_is_always_plain(store):
    """However often a page changes, it takes one other page to read it."""
    data = random_pages(300)
    image, _ = put(store, data)
    base_pack = image.packs[0].id
    for generation in range(6):
        data = touched(data, np.arange(300), generation)
        image, counts = put(store, data, image, policy=LAZY)
        assert counts.delta == 300
        (index,) = image.index.values()
        assert {image.packs[int(base) >> 32].id for base in index.bases.tolist()} == {base_pack}
    assert len(image.packs) == 2
    check(store, image, data)


def test_pages_that_changed_much_are_stored_plain(store):
    first, _ = put(store, random_pages(300, 1))
    data = random_pages(300, 2)
    second, counts = put(store, data, first)
    assert counts == PageCounts(written=300)
    assert second.info.format_version == FORMAT_VERSION
    check(store, second, data)


def test_each_page_of_a_mix_is_stored_the_better_way(store):
    data = random_pages(900)
    data[600:] = 7  # compresses to nothing as it is
    first, _ = put(store, data)
    data = touched(data, np.arange(300), 2)
    data[300:600] = random_pages(300, 3)
    data[600:, ::2] = random_pages(300, 4)[:, :2048] % 2 + 7
    second, counts = put(store, data, first)
    assert (counts.written, counts.delta) == (900, 300)
    check(store, second, data)


def test_what_has_no_base(store):
    """New pages and pages that were zero are plain; without compression all are."""
    data = random_pages(300)
    data[:100] = 0
    pages = PAGES[:300]
    with store.begin(delta=True) as builder:
        builder.add_pages(0, pages[:200], data[:200])
        parent = store.load(builder.commit(meta={}, state=b"").id)
    data[:100] = random_pages(100, 7)
    data[199] = 0
    image, counts = put(store, touched(data, np.arange(100, 199), 1), parent)
    assert counts == PageCounts(zero=1, written=299, delta=99)
    check(store, image, touched(data, np.arange(100, 199), 1))
    _, counts = put(store, touched(data, np.arange(100, 199), 1), parent, compress="none")
    assert counts == PageCounts(zero=1, written=299)


def test_removing_any_generation_leaves_the_others_whole(store):
    for gone in range(4):
        data = random_pages(400, gone)
        image, _ = put(store, data)
        truth = {image.id: data}
        for generation in range(3):
            data = touched(data, np.arange(generation, 400, generation + 1), generation)
            image, counts = put(store, data, image)
            assert counts.delta
            truth[image.id] = data
        removed = list(truth)[gone]
        store.remove(removed)
        del image, truth[removed]
        fresh = Store.open(store.path)
        for image_id, expected in truth.items():
            check(fresh, fresh.load(image_id), expected)
        for image_id in truth:
            store.remove(image_id)
        assert os.listdir(store.packs_fd) == []


def test_a_pack_that_holds_only_bases_stays(store):
    data = random_pages(300)
    first, _ = put(store, data)
    old_packs = {pack.id for pack in first.packs}
    data = touched(data, np.arange(300), 1)
    second, counts = put(store, data, first)
    assert counts.delta == 300
    store.remove(first.id)
    assert old_packs < {name.removesuffix(".pack") for name in os.listdir(store.packs_fd)}
    check(store, second, data)


def test_consolidation_moves_deltas_and_bases_as_they_are(store):
    eager = ConsolidationPolicy(
        max_amplification=1.2, settle_amplification=1.0, max_packs=3, min_dead_pages=0
    )
    rng = np.random.default_rng(8)
    data = random_pages(1500)
    image, _ = put(store, data, policy=eager)
    copied = 0
    for generation in range(12):
        rows = np.sort(rng.choice(1500, 200, replace=False))
        data = touched(data, rows, generation)
        if generation % 4 == 3:
            data[rows[:50]] = random_pages(50, 100 + generation)
        image, counts = put(store, data, image, rows, policy=eager)
        assert counts.delta >= 100
        copied += image.meta["pages_consolidated"]
        assert len(image.packs) <= 4
        check(store, image, data)
    assert copied
    assert nr_based(image)


def test_reading_does_not_slow_down_with_depth(store, monkeypatch):
    """Each block is read once for a restore, however many generations of deltas go back to the same bases."""
    rng = np.random.default_rng(9)
    nr = 3000
    data = random_pages(nr)
    image, _ = put(store, data)
    for generation in range(40):
        rows = np.sort(rng.choice(nr, 60, replace=False))
        data = touched(data, rows, generation)
        image, _ = put(store, data, image, rows)
        assert len(image.packs) <= 32
    read = Counter()
    original = pack_module.PackReader.read_block

    def count(pack, block, into=None):
        read[pack.id, block] += 1
        return original(pack, block, into)

    monkeypatch.setattr(pack_module.PackReader, "read_block", count)
    monkeypatch.setattr(
        pack_module.PackReader,
        "read_blocks",
        lambda pack, first, number, into: into.__setitem__(
            slice(0, int(pack.block_pages[first : first + number].sum())),
            np.concatenate([pack.read_block(block) for block in range(first, first + number)]),
        ),
    )
    content = visited(image, threads=1)
    assert b"".join(content[page] for page in PAGES.tolist()) == data.tobytes()
    assert nr_based(image) > 500
    assert max(read.values()) == 1
    pages_read = sum(
        int(pack.block_pages[block])
        for pack in image.packs
        for block in range(pack.nr_blocks)
        if read[pack.id, block]
    )
    assert pages_read <= 2 * 1.6 * nr


def test_the_cache_of_blocks_is_bounded(store, monkeypatch):
    data = random_pages(2500)
    first, _ = put(store, data)
    data = touched(data, np.arange(2500), 1)
    second, counts = put(store, data, first)
    assert counts.delta == 2500
    monkeypatch.setattr(delta_module, "CACHE_BYTES", 2 << 20)
    held = []
    original = delta_module.DeltaReader._block

    def watch(reader, number, block):
        found = original(reader, number, block)
        held.append((reader._nr_bytes, sum(one.nbytes for one in reader._blocks.values())))
        return found

    monkeypatch.setattr(delta_module.DeltaReader, "_block", watch)
    second.visit(lambda *_: None, threads=1)
    assert len(held) > 5
    assert all(said == real <= 2 << 20 for said, real in held)


def test_an_export_is_flat_and_plain(store, tmp_path):
    data = random_pages(400)
    first, _ = put(store, data)
    data = touched(data, np.arange(0, 400, 2), 1)
    second, counts = put(store, data, first)
    assert counts.delta == 200
    out = io.BytesIO()
    store.export_image(second.id, out)
    assert out.getvalue()[8:12] == FORMAT_VERSION.to_bytes(4, "little")
    other = Store.open(tmp_path / "other", create=True)
    out.seek(0)
    imported = other.load(other.import_image(out, sync=False).id)
    assert (imported.info.format_version, imported.meta.get("pages_delta")) == (FORMAT_VERSION, 0)
    check(other, imported, data)


def test_a_damaged_base_damages_the_image_with_the_delta(store):
    data = random_pages(300)
    first, _ = put(store, data)
    base = first.packs[0]
    second, counts = put(store, touched(data, np.arange(300), 1), first)
    assert counts.delta == 300
    assert first.packs[0].id in {pack.id for pack in second.packs}
    flip(f"{store.path}/packs/{base.id}.pack", 5000)
    fresh = Store.open(store.path)
    report = fresh.verify(second.id)
    assert not report.ok
    assert all(base.id in problem for problem in report.problems)
    image = fresh.load(second.id)
    for read in (streamed, visited, lambda image: image.read(0, PAGES[:300])):
        with pytest.raises(ImageDamaged, match=base.id):
            read(image)
    with pytest.raises(ImageDamaged, match=base.id):
        fresh.export_image(second.id, io.BytesIO())


def test_a_base_that_cannot_be_read_fails_the_dump_and_leaves_nothing(store):
    first, _ = put(store, random_pages(300))
    flip(f"{store.path}/packs/{first.packs[0].id}.pack", 5000)
    before = sorted(os.listdir(store.packs_fd))
    with pytest.raises(ImageDamaged, match=first.packs[0].id):
        put(store, touched(random_pages(300), np.arange(300), 1), Store.open(store.path).load(first.id))
    assert sorted(os.listdir(store.packs_fd)) == before
    assert os.listdir(store.tmp_fd) == []


def test_verify_compares_the_whole_page_with_its_digest(store, monkeypatch):
    """A delta stored against the wrong base has every checksum right: only the digest tells."""
    first, _ = put(store, random_pages(300))
    original = delta_module.difference

    def wrong(pages, bases):
        out = original(pages, bases)
        out[17, 5] ^= 1
        return out

    monkeypatch.setattr("checkpointd.image.builder.difference", wrong)
    second, counts = put(store, touched(random_pages(300), np.arange(300), 1), first)
    assert counts.delta == 300
    (problem,) = store.verify(second.id).problems
    assert "digest" in problem
    assert first.packs[0].id in problem
    with pytest.raises(ImageDamaged, match="digest"):
        store.export_image(second.id, io.BytesIO())


def test_a_program_of_version_1_refuses_what_it_cannot_read(store, monkeypatch):
    data = random_pages(300)
    first, _ = put(store, data)
    data[:100] = touched(data, np.arange(100), 1)[:100]
    data[100:200] = random_pages(100, 3)
    second, counts = put(store, data, first)
    assert 0 < counts.delta < counts.written
    data[:100] = random_pages(100, 4)
    third, _ = put(store, data, second, delta=False)
    assert third.info.format_version == FORMAT_VERSION, "no delta is left, but its pack holds some"
    ids = [first.id, second.id, third.id]
    del first, second, third

    def check_version_1(version, path, *, newest=FORMAT_VERSION):
        check_version(version, path)

    for module in ("imagefile", "pack"):
        monkeypatch.setattr(f"checkpointd.image.{module}.check_version", check_version_1)
    old = Store.open(store.path)
    assert old.verify(ids[0]).ok
    for image_id, where in ((ids[1], "images/"), (ids[2], "packs/")):
        with pytest.raises(UnknownFormat, match=f"{where}.*version 2"):
            old.load(image_id)


def flip(path, at):
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))
