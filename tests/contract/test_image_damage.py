# SPDX-License-Identifier: Apache-2.0
"""Damage is found, named, never a crash, and never silently restored.

Any byte of any file is changed, any file is cut short, made longer or taken away; then `verify` must tell, and
what can still be read must be right.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import random
import shutil
import struct

import numpy as np
import pytest

from checkpointd.agent.protocol import RestoreArgs
from checkpointd.agent.restoring import restore
from checkpointd.errors import CheckpointError, ImageDamaged, ImageNotFound, UnknownFormat
from checkpointd.image import format as fmt
from checkpointd.image import imagefile
from checkpointd.image.index import ObjectIndex, no_bases
from checkpointd.image.store import Store
from checkpointd.memory import PAGE_SIZE

PAGES = np.arange(100, 190, dtype=np.uint64)
SHARED = np.arange(0, 20, dtype=np.uint64)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A store of three generations, and the truth of each; the last two have delta pages."""
    path = tmp_path_factory.mktemp("damage") / "store"
    store = Store.open(path, create=True)
    rng = np.random.default_rng(5)
    data = rng.integers(0, 256, (90, PAGE_SIZE), dtype=np.uint8)
    data[20:40] = 0
    data[40:, 100:] = 5
    shared = rng.integers(0, 4, (20, PAGE_SIZE), dtype=np.uint8)
    truth = {}
    parent = None
    for number, compress in enumerate(("none", "zstd:1", "zstd:1")):
        if parent is not None:
            data = data.copy()
            data[number * 10 : number * 10 + 7, :50] = number
        with store.begin(parent=parent, compress=compress, delta=True) as builder:
            assert builder.add_pages(0, PAGES, data).delta == (7 if number == 1 else 0)
            builder.add_pages(4, SHARED, shared)
            info = builder.commit(meta={"pid": 1, "number": number}, state=b"state of it" * 50)
        assert info.format_version == (2 if number else 1)
        truth[info.id] = (data, shared)
        parent = store.load(info.id)
    return path, truth


@pytest.fixture
def damaged_copy(original, tmp_path):
    """A function that copies the store, lets `change` damage a file's bytes, and checks all promises."""
    path, truth = original

    def run(name, change):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(path, copy)
        file = copy / name
        content = file.read_bytes()
        changed = change(content)
        if changed is None:
            file.unlink()
        else:
            assert changed != content
            file.unlink()  # overwriting in place would make ext4 flush each time
            file.write_bytes(changed)
        return found_and_harmless(copy, name, truth)

    return run


def found_and_harmless(path, name, truth):
    """Open, list, load, read and verify all; returns the messages of what was found."""
    messages = []
    try:
        store = Store.open(path)
    except CheckpointError as error:
        return [error.message]
    listed = store.images()
    messages += [info.damaged for info in listed if info.damaged]
    for image_id, (data, shared) in truth.items():
        with contextlib.suppress(ImageDamaged, ImageNotFound):
            image = store.load(image_id)
            assert image.state == b"state of it" * 50
            for obj, pages, expected in ((0, PAGES, data), (4, SHARED, shared)):
                with contextlib.suppress(ImageDamaged):
                    assert (image.read(obj, pages).reshape(-1, PAGE_SIZE) == expected).all()
            with contextlib.suppress(ImageDamaged):
                for obj, pages, content in image.stream():
                    expected = data[(pages - 100).astype(int)] if obj == 0 else shared[pages.astype(int)]
                    assert (content.reshape(-1, PAGE_SIZE) == expected).all()
        try:
            report = store.verify(image_id)
        except ImageNotFound as error:
            messages.append(error.message)
            continue
        messages += report.problems
        if not report.ok:
            with pytest.raises(ImageDamaged):
                report.raise_if_damaged()
        out = io.BytesIO()
        with contextlib.suppress(ImageDamaged, ImageNotFound):
            store.export_image(image_id, out)
            assert report.ok or name.startswith("packs/"), "a damaged image was exported"
    assert messages, f"damage of {name} was not found"
    if name.startswith(("images/", "packs/")):
        stem = name.split("/")[1][:12]
        assert any(stem in message for message in messages), messages
    return messages


def files_of(path):
    found = [f"images/{name}" for name in os.listdir(path / "images")]
    found += [f"packs/{name}" for name in os.listdir(path / "packs")]
    return sorted([*found, "store.json"], key=lambda name: (name.split("/")[0], os.path.getsize(path / name)))


def flipped(content, at, mask):
    return content[:at] + bytes([content[at] ^ mask]) + content[at + 1 :]


def spots(size, number, rng):
    """Positions in a file: its ends, where headers and tables are, and random ones."""
    fixed = {
        0,
        7,
        8,
        11,
        12,
        16,
        31,
        32,
        63,
        64,
        79,
        80,
        95,
        size - 1,
        size - 8,
        size - 16,
        size - 24,
        size - 40,
        size - 64,
    }
    return sorted({at for at in fixed if 0 <= at < size} | {rng.randrange(size) for _ in range(number)})


@pytest.mark.parametrize("file_number", range(7))
def test_any_flipped_byte_is_found(original, damaged_copy, file_number):
    path, _ = original
    names = files_of(path)
    assert len(names) == 7
    name = names[file_number]
    rng = random.Random(file_number)
    for at in spots(os.path.getsize(path / name), 40, rng):
        mask = rng.randrange(1, 256)
        damaged_copy(
            name,
            lambda content, at=at, mask=mask: content[:at] + bytes([content[at] ^ mask]) + content[at + 1 :],
        )


@pytest.mark.parametrize("file_number", range(7))
def test_any_other_length_is_found(original, damaged_copy, file_number):
    path, _ = original
    name = files_of(path)[file_number]
    size = os.path.getsize(path / name)
    rng = random.Random(file_number)
    for length in {0, 1, size - 1, size // 2, *(rng.randrange(size) for _ in range(12))}:
        damaged_copy(name, lambda content, length=length: content[:length])
    for more in (b"\0", b"\0" * 5000):
        damaged_copy(name, lambda content, more=more: content + more)


@pytest.mark.parametrize("file_number", range(7))
def test_a_missing_file_is_named(original, damaged_copy, file_number):
    path, _ = original
    damaged_copy(files_of(path)[file_number], lambda content: None)


def test_a_disk_that_cannot_read_is_damage(original, monkeypatch):
    path, truth = original
    store = Store.open(path)
    image_id = next(iter(truth))
    image = store.load(image_id)

    def broken(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(ImageDamaged, match=r"packs/.*Input/output"):
        image.read(0, PAGES)
    with pytest.raises(ImageDamaged, match=r"packs/.*Input/output"):
        list(image.stream())
    assert not store.verify(image_id).ok


def test_swapped_files_are_found(original, tmp_path):
    path, truth = original
    for folder in ("images", "packs"):
        copy = tmp_path / folder
        shutil.copytree(path, copy)
        one, two = sorted(os.listdir(copy / folder))[:2]
        os.rename(copy / folder / one, copy / "x")
        os.rename(copy / folder / two, copy / folder / one)
        os.rename(copy / "x", copy / folder / two)
        found_and_harmless(copy, f"{folder}/{one}", truth)


def test_a_damaged_image_can_be_removed_and_costs_no_other(original, tmp_path):
    path, truth = original
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    store = Store.open(copy)
    ids = [info.id for info in store.images()]
    last = {pack.id for pack in store.load(ids[2]).packs}
    assert last - {pack.id for image_id in ids[:2] for pack in store.load(image_id).packs}
    file = copy / "images" / f"{ids[2]}.img"
    content = file.read_bytes()
    file.write_bytes(b"\xff" * 500)
    assert sum(1 for info in store.images() if info.damaged) == 1
    store.remove(ids[0])
    left = {name.removesuffix(".pack") for name in os.listdir(copy / "packs")}
    assert last <= left, "with one header unreadable, nothing may be dropped"
    file.write_bytes(content)  # say, from a copy
    assert store.verify(ids[2]).ok
    assert (store.load(ids[2]).read(0, PAGES).reshape(-1, PAGE_SIZE) == truth[ids[2]][0]).all()
    file.write_bytes(b"\xff" * 500)
    store.remove(ids[2])
    assert store.verify(ids[1]).ok
    assert (store.load(ids[1]).read(0, PAGES).reshape(-1, PAGE_SIZE) == truth[ids[1]][0]).all()
    kept = {f"{pack.id}.pack" for pack in store.load(ids[1]).packs}
    assert set(os.listdir(copy / "packs")) == kept


def test_another_version_is_named(original, tmp_path):
    path, _ = original
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    store = Store.open(copy)
    ids = [info.id for info in store.images()]
    for folder, name in (("images", f"{ids[0]}.img"), ("packs", sorted(os.listdir(copy / "packs"))[0])):
        file = copy / folder / name
        content = bytearray(file.read_bytes())
        content[8:12] = struct.pack("<I", 7)
        file.write_bytes(content)
    with pytest.raises(UnknownFormat, match="version 7"):
        store.load(ids[0])
    assert any("version 7" in info.damaged for info in store.images())
    config = copy / "store.json"
    config.write_text(config.read_text().replace('"format_version": 1', '"format_version": 9'))
    with pytest.raises(UnknownFormat, match="version 9"):
        Store.open(copy)


# -- the portable file ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(original):
    path, truth = original
    store = Store.open(path)
    image_id = list(truth)[-1]
    out = io.BytesIO()
    store.export_image(image_id, out)
    return out.getvalue()


def refused(tmp_path, content):
    """Import must fail and leave nothing."""
    store = Store.open(tmp_path / "into", create=True)
    with pytest.raises(ImageDamaged) as caught:
        store.import_image(io.BytesIO(content))
    assert caught.value.message
    assert store.images() == []
    assert os.listdir(store.packs_fd) == []
    assert os.listdir(store.tmp_fd) == []


def test_any_flipped_byte_of_an_export_is_found(exported, tmp_path):
    rng = random.Random(3)
    for at in spots(len(exported), 250, rng):
        refused(tmp_path, flipped(exported, at, rng.randrange(1, 256)))


def test_a_truncated_export_is_refused(exported, tmp_path):
    rng = random.Random(4)
    for length in {0, 1, 23, 24, len(exported) - 1, *(rng.randrange(len(exported)) for _ in range(80))}:
        refused(tmp_path, exported[:length])


def test_an_export_of_another_version_is_named(exported, tmp_path):
    store = Store.open(tmp_path / "into", create=True)
    with pytest.raises(UnknownFormat, match="version 3"):
        store.import_image(io.BytesIO(exported[:8] + struct.pack("<I", 3) + exported[12:]))


def test_an_export_is_read_from_a_pipe(exported, original, tmp_path):
    class Pipe(io.RawIOBase):
        """Gives a few bytes at a time and cannot seek."""

        def __init__(self):
            self.inner = io.BytesIO(exported)

        def read(self, size=-1):
            return self.inner.read(min(size, 1000))

    store = Store.open(tmp_path / "into", create=True)
    seen = []
    info = store.import_image(Pipe(), progress=lambda done, total: seen.append((done, total)))
    _, truth = original
    assert (store.load(info.id).read(0, PAGES).reshape(-1, PAGE_SIZE) == list(truth.values())[-1][0]).all()
    assert (info.pid, info.parent_id) == (1, "")
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]


# -- forged files: right checksums around wrong content --------------------------------------------------------


def forge(store, **changes):
    """An image file with a right id that says something impossible."""
    none = np.zeros(0, dtype=np.uint64)
    parts = {
        "sequence": 1,
        "parent_id": "",
        "meta": {},
        "state": b"",
        "pack_ids": [],
        "objects": {0: ObjectIndex(none, none, none, none)},
    } | changes
    image_id, data = imagefile.build(**parts)
    with open(f"{store.path}/images/{image_id}.img", "wb") as file:
        file.write(data)
    return image_id


def column(*values):
    return np.array(values, dtype=np.uint64)


def plain(firsts, counts, locations):
    return ObjectIndex(firsts, counts, locations, no_bases(len(firsts)))


@pytest.mark.parametrize(
    "index",
    [
        plain(column(0), column(5), column(0)),  # no pack at all
        plain(column(0), column(5), column(fmt.MISSING_LOCATION)),
        plain(column(0), column(1 << 60), column(fmt.ZERO_LOCATION)),
        plain(column(0, 3), column(5, 5), column(fmt.ZERO_LOCATION, fmt.ZERO_LOCATION)),
        plain(column(0, 1 << 40), column(1 << 36, 1), column(fmt.ZERO_LOCATION, fmt.ZERO_LOCATION)),
        plain(column(1 << 63), column(5), column(fmt.ZERO_LOCATION)),
        plain(column(0), column(0), column(fmt.ZERO_LOCATION)),
    ],
)
def test_a_forged_index_is_refused(tmp_path, index):
    store = Store.open(tmp_path / "store", create=True)
    image_id = forge(store, objects={0: index})
    with pytest.raises(ImageDamaged):
        store.load(image_id)
    assert not store.verify(image_id).ok


@pytest.mark.parametrize(
    ("end", "what"),
    [
        ("location", "outside"),
        ("location", "past the end"),
        ("location", "a plain page"),
        ("base", "outside"),
        ("base", "past the end"),
        ("base", "a delta page"),
    ],
)
def test_a_forged_delta_is_refused(original, tmp_path, end, what):
    path, truth = original
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    store = Store.open(copy)
    image = store.load(list(truth)[1])
    index = image.index[0]
    (at,) = np.flatnonzero(index.bases != fmt.NO_BASE)
    location, base = int(index.locations[at]), int(index.bases[at])

    def forged(location, base):
        objects = {0: ObjectIndex(column(1), column(7), column(location), column(base))}
        pack_ids = [pack.id for pack in image.packs]
        return forge(store, pack_ids=pack_ids, objects=objects)

    good = store.load(forged(location, base)).read(0, column(*range(1, 8)))
    assert np.array_equal(good.reshape(-1, PAGE_SIZE), truth[image.id][0][10:17])
    wrong = {
        "outside": len(image.packs) << 32,
        "past the end": ((location if end == "location" else base) >> 32 << 32) + (1 << 20),
        "a plain page": base,
        "a delta page": location,
    }[what]
    forgery = forged(wrong, base) if end == "location" else forged(location, wrong)
    with pytest.raises(ImageDamaged, match=forgery):
        store.load(forgery)
    assert not store.verify(forgery).ok


def test_a_pack_list_that_names_no_pack(tmp_path):
    store = Store.open(tmp_path / "store", create=True)
    image_id = forge(store, pack_ids=["ab" * 32])
    with pytest.raises(ImageDamaged, match=r"packs/abab.*missing"):
        store.load(image_id)


@pytest.mark.parametrize("damaged_file", ["image", "pack"])
def test_who_reads_a_damaged_image_is_told_which_one(original, tmp_path, damaged_file):
    path, truth = original
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    if damaged_file == "image":
        files = [copy / "images" / f"{image_id}.img" for image_id in truth]
    else:
        files = list((copy / "packs").iterdir())
    for file in files:
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(flipped(content, len(content) // 2, 1))
    store = Store.open(copy)
    image_id = next(iter(truth))
    named = f"image {image_id[:12]} is damaged: {damaged_file}s/"
    with pytest.raises(ImageDamaged) as caught:
        store.export_image(image_id, io.BytesIO())
    assert caught.value.message.startswith(named)
    assert caught.value.message.count("is damaged") == 1
    assert "restored" not in caught.value.hint
    if damaged_file == "image":
        with pytest.raises(ImageDamaged) as caught:
            store.load(image_id)
        assert caught.value.message.startswith(named)
        assert store.verify(image_id).problems[0].startswith("images/")
        with pytest.raises(ImageDamaged) as caught:
            restore(RestoreArgs(str(copy), image_id), lambda *_: None)
        assert caught.value.message.startswith(named)
        assert caught.value.message.count("is damaged") == 1
        assert caught.value.hint.startswith("nothing was restored of it; `checkpoint verify`")


def test_damage_is_named_by_who_knows_the_image_best():
    error = ImageDamaged("images/1.img: it is short").of_image("image 1")
    there = CheckpointError.from_dict(error.to_dict())  # from the page worker to the agent
    assert isinstance(there, ImageDamaged)
    there.of_image("the parent image 1 of process 7")
    assert there.message == "the parent image 1 of process 7 is damaged: images/1.img: it is short"
