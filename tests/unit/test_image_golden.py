# SPDX-License-Identifier: Apache-2.0
"""Files of format version 1, as they were written when it was made, stay readable; and the page on the format is true.

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


@pytest.fixture
def golden(tmp_path):
    with tarfile.open(DATA / "store-v1.tar.gz") as archive:
        archive.extractall(tmp_path, filter="tar")
    return tmp_path / "store-v1"


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


def test_an_export_of_version_1_is_imported(tmp_path):
    store = Store.open(tmp_path / "store", create=True)
    with open(DATA / "export-v1.ckpt", "rb") as file:
        info = store.import_image(file)
    assert (info.pid, info.tag, info.created) == (102, "g2", "2026-01-03T00:00:00Z")
    image = store.load(info.id)
    for obj, (pages, data) in truth(2).items():
        assert (image.read(obj, pages).reshape(-1, 4096) == data).all()


def test_the_page_on_the_format_is_true(golden):
    config = json.loads((golden / "store.json").read_text())
    seed = int(config["digest_seed"], 16)
    for file in (golden / "images").iterdir():
        meta, state, content = read_by_the_book(golden, file, seed)
        generation = int(meta["tag"][1:])
        assert state == b"state %d" % generation
        expected = {
            (obj, page): row.tobytes()
            for obj, (pages, data) in truth(generation).items()
            for page, row in zip(pages.tolist(), data, strict=True)
        }
        assert content == expected


def check(data):
    return xxhash.xxh3_128(data).digest()


def read_by_the_book(root, file, seed):
    """(meta, state, {(obj, page): bytes}) of an image file."""
    image = file.read_bytes()
    assert hashlib.sha256(image).hexdigest() + ".img" == file.name
    magic, version, nr_sections, _sequence, nr_pages = struct.unpack_from("<8sIIQQ", image)
    assert (magic, version, image[64:80]) == (b"CKPTIMG\0", 1, bytes(16))
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
    packs = [
        read_pack_by_the_book(root, sections[b"PACK"][at : at + 32].hex(), seed)
        for at in range(0, len(sections[b"PACK"]), 32)
    ]
    rows = zip(*(words(sections[kind]) for kind in (b"FRST", b"NRPG", b"LOCN")), strict=True)
    content = {}
    objects = words(sections[b"OBJS"])
    for obj, nr_extents in zip(objects[::2], objects[1::2], strict=True):
        page_end = location_end = 0
        for first_difference, count, location_difference in itertools.islice(rows, nr_extents):
            first = (page_end + first_difference) % 2**64
            location = (location_end + location_difference) % 2**64
            for step in range(count):
                zero = location == 2**64 - 1
                page = bytes(4096) if zero else packs[location >> 32][(location & 0xFFFFFFFF) + step]
                content[obj, first + step] = page
            page_end, location_end = first + count, location + count
    assert next(rows, None) is None
    assert len(content) == nr_pages
    return json.loads(sections[b"META"]), sections[b"STAT"], content


def read_pack_by_the_book(root, pack_id, seed):
    """The pages of a pack by ordinal."""
    data = (root / "packs" / f"{pack_id}.pack").read_bytes()
    assert data[:12] == b"CKPTPACK" + struct.pack("<I", 1)
    magic, version, nr_blocks, nr_pages, table = struct.unpack_from("<8sI4xQQQ", data, len(data) - 64)
    assert (magic, version) == (b"CKPTPEND", 1)
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
    for ordinal, page in enumerate(pages):
        digest = data[digests + 16 * ordinal : digests + 16 * ordinal + 16]
        assert xxhash.xxh3_128(page, seed).digest() == digest
    return pages


def words(data):
    return struct.unpack(f"<{len(data) // 8}Q", data)
