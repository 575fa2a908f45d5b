# SPDX-License-Identifier: Apache-2.0
"""Files of format versions 1 and 2, as they were written when these were made, stay readable; and the page on the
format is true.

`read_by_the_book` is a second reader, written from docs/image-format.md with nothing of checkpointd.image.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import xxhash
import zstandard

from checkpointd.image.store import Store

DATA = Path(__file__).parent.parent / "data"
PAGES = np.array([5, 6, 7, 9, 1 << 35], dtype=np.uint64)


def truth(generation):
    """{obj: (pages, their bytes)} of generation 0, 1, 2."""
    data = np.zeros((5, 4096), dtype=np.uint8)
    data[0] = np.arange(4096) % 251
    data[2] = 7 + generation
    data[3, ::3] = 9
    data[4, 4095] = generation
    shared = np.full((2, 4096), 33, dtype=np.uint8)
    shared[1, : generation * 100] = 44
    return {0: (PAGES, data), 6: (np.array([0, 8], dtype=np.uint64), shared)}


def truth_with_deltas(generation):
    """{obj: (pages, their bytes)} of generation 0, 1, 2 of the store of version 2.

    Pages 5 to 7 change a little each time and are deltas from generation 1 on, page 9 is one in generation 1 only and
    is then written anew, and the object's second page is a delta that generation 2 inherits.
    """
    data = np.stack(
        [np.frombuffer(hashlib.shake_128(b"%d" % n).digest(4096), dtype=np.uint8) for n in range(5)]
    )
    data = data.copy()
    data[:3, 100 : 100 + 3 * generation] ^= 0x33
    if generation == 1:
        data[3, 7] ^= 1
    if generation == 2:
        data[3] = np.frombuffer(hashlib.shake_128(b"new").digest(4096), dtype=np.uint8)
    data[4] = 0
    shared = np.full((2, 4096), 33, dtype=np.uint8)
    shared[1] = np.frombuffer(hashlib.shake_128(b"shared").digest(4096), dtype=np.uint8)
    shared[1, 2000:2010] = 44 if generation else 43
    return {0: (PAGES, data), 6: (np.array([0, 8], dtype=np.uint64), shared)}


def unpacked(name, directory):
    with tarfile.open(DATA / f"{name}.tar.gz") as archive:
        archive.extraction_filter = getattr(tarfile, "tar_filter", None)  # there since 3.11.4
        archive.extractall(directory)
    return directory / name


@pytest.fixture
def golden(tmp_path):
    return unpacked("store-v1", tmp_path)


def test_a_store_of_version_1_is_read(golden):
    store = Store.open(golden)
    infos = store.images()
    assert [info.tag for info in infos] == ["g0", "g1", "g2"]
    for generation, info in enumerate(infos):
        image = store.load(info.id)
        assert image.state == b"state %d" % generation
        assert image.objects() == [0, 6]
        for obj, (pages, data) in truth(generation).items():
            assert np.array_equal(image.pages(obj), pages)
            assert (image.read(obj, pages).reshape(-1, 4096) == data).all()
        assert store.verify(info.id).ok
    with store.begin(parent=store.load(infos[2].id)) as builder:
        pages, data = truth(2)[0]
        assert builder.add_pages(0, pages, data).same == 4
        assert store.verify(builder.commit(meta={}, state=b"").id).ok


def test_a_store_of_version_2_is_read(tmp_path):
    store = Store.open(unpacked("store-v2", tmp_path))
    infos = store.images()
    assert [(info.tag, info.format_version) for info in infos] == [("g0", 1), ("g1", 2), ("g2", 2)]
    assert [store.load(info.id).meta["pages_delta"] for info in infos] == [0, 5, 3]
    for generation, info in enumerate(infos):
        image = store.load(info.id)
        for obj, (pages, data) in truth_with_deltas(generation).items():
            assert np.array_equal(image.pages(obj), pages)
            assert (image.read(obj, pages).reshape(-1, 4096) == data).all()
        assert store.verify(info.id).ok
    with store.begin(parent=store.load(infos[2].id), delta=True) as builder:
        pages, data = truth_with_deltas(2)[0]
        assert builder.add_pages(0, pages, data).same == 4
        assert store.verify(builder.commit(meta={}, state=b"").id).ok


def test_an_export_of_version_1_is_imported(tmp_path):
    store = Store.open(tmp_path / "store", create=True)
    with open(DATA / "export-v1.ckpt", "rb") as file:
        info = store.import_image(file)
    assert (info.pid, info.tag, info.created) == (102, "g2", "2026-01-03T00:00:00Z")
    image = store.load(info.id)
    for obj, (pages, data) in truth(2).items():
        assert (image.read(obj, pages).reshape(-1, 4096) == data).all()


@pytest.mark.parametrize(("name", "expected"), [("store-v1", truth), ("store-v2", truth_with_deltas)])
def test_the_page_on_the_format_is_true(tmp_path, name, expected):
    root = unpacked(name, tmp_path)
    config = json.loads((root / "store.json").read_text())
    seed = int(config["digest_seed"], 16)
    for file in (root / "images").iterdir():
        meta, state, content = read_by_the_book(root, file, seed)
        generation = int(meta["tag"][1:])
        assert state == b"state %d" % generation
        assert content == {
            (obj, page): row.tobytes()
            for obj, (pages, data) in expected(generation).items()
            for page, row in zip(pages.tolist(), data, strict=True)
        }


def check(data):
    return xxhash.xxh3_128(data).digest()


def read_by_the_book(root, file, seed):
    """(meta, state, {(obj, page): bytes}) of an image file."""
    image = file.read_bytes()
    assert hashlib.sha256(image).hexdigest() + ".img" == file.name
    magic, version, nr_sections, _sequence, nr_pages = struct.unpack_from("<8sIIQQ", image)
    assert (magic, image[64:80]) == (b"CKPTIMG\0", bytes(16))
    end = 80 + 48 * nr_sections
    assert check(image[:end]) == image[end : end + 16]
    sections = {}
    expected_offset = end + 16
    for at in range(80, end, 48):
        kind, codec, offset, stored_size, raw_size, checksum = struct.unpack_from("<4sIQQQ16s", image, at)
        stored = image[offset : offset + stored_size]
        assert offset == expected_offset
        assert check(stored) == checksum
        expected_offset += stored_size
        sections[kind] = zstandard.decompress(stored) if codec == 1 else stored
        assert len(sections[kind]) == raw_size
    assert struct.unpack("<8sQ", image[expected_offset:]) == (b"CKPTEND\0", len(image))
    assert version == (2 if set(sections) & {b"DEXT", b"DBAS"} else 1)
    packs = [
        read_pack_by_the_book(root, sections[b"PACK"][at : at + 32].hex())
        for at in range(0, len(sections[b"PACK"]), 32)
    ]
    rows = zip(*(words(sections[kind]) for kind in (b"FRST", b"NRPG", b"LOCN")), strict=True)
    counts = words(sections[b"NRPG"])
    bases, extent, base_end = {}, -1, 0
    for gap, difference in zip(
        words(sections.get(b"DEXT", b"")), words(sections.get(b"DBAS", b"")), strict=True
    ):
        extent += 1 + gap
        bases[extent] = (base_end + difference) % 2**64
        base_end = bases[extent] + counts[extent]
    content = {}
    nr_extents_before = 0
    objects = words(sections[b"OBJS"])
    for obj, nr_extents in zip(objects[::2], objects[1::2], strict=True):
        page_end = location_end = 0
        for number, (first_difference, count, location_difference) in enumerate(
            itertools.islice(rows, nr_extents), nr_extents_before
        ):
            first = (page_end + first_difference) % 2**64
            location = (location_end + location_difference) % 2**64
            for step in range(count):
                content[obj, first + step] = page_by_the_book(packs, location, bases.get(number), step, seed)
            page_end, location_end = first + count, location + count
        nr_extents_before += nr_extents
    assert next(rows, None) is None
    assert len(content) == nr_pages
    return json.loads(sections[b"META"]), sections[b"STAT"], content


def page_by_the_book(packs, location, base, step, seed):
    if location == 2**64 - 1:
        assert base is None
        return bytes(4096)
    page, is_delta, digest = packs[location >> 32][(location & 0xFFFFFFFF) + step]
    assert is_delta == (base is not None)
    if base is not None:
        plain, base_is_delta, _ = packs[base >> 32][(base & 0xFFFFFFFF) + step]
        assert not base_is_delta
        page = bytes(a ^ b for a, b in zip(page, plain, strict=True))
    assert xxhash.xxh3_128(page, seed).digest() == digest
    return page


def read_pack_by_the_book(root, pack_id):
    """By ordinal: the bytes of a page as stored, whether it is a delta, and its digest."""
    data = (root / "packs" / f"{pack_id}.pack").read_bytes()
    magic, version, nr_blocks, nr_pages, table = struct.unpack_from("<8sI4xQQQ", data, len(data) - 64)
    assert magic == b"CKPTPEND"
    assert version in (1, 2)
    assert data[:12] == b"CKPTPACK" + struct.pack("<I", version)
    assert hashlib.sha256(data[:64] + data[table:]).hexdigest() == pack_id
    pages = []
    offset = 64
    for at in range(table, table + 32 * nr_blocks, 32):
        stored_size, nr, codec, checksum = struct.unpack_from("<III4x16s", data, at)
        stored = data[offset : offset + stored_size]
        assert check(stored) == checksum
        raw = zstandard.decompress(stored) if codec == 1 else stored
        assert len(raw) == nr * 4096
        pages += [raw[start : start + 4096] for start in range(0, len(raw), 4096)]
        offset += stored_size
    assert (offset, len(pages)) == (table, nr_pages)
    digests = table + 32 * nr_blocks
    marks = data[digests + 16 * nr_pages : len(data) - 64]
    assert len(marks) == ((nr_pages + 7) // 8 if version == 2 else 0)
    rows = []
    for ordinal, page in enumerate(pages):
        digest = data[digests + 16 * ordinal : digests + 16 * ordinal + 16]
        is_delta = version == 2 and bool(marks[ordinal // 8] >> ordinal % 8 & 1)
        rows.append((page, is_delta, digest))
    return rows


def words(data):
    return struct.unpack(f"<{len(data) // 8}Q", data)
