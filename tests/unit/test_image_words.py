# SPDX-License-Identifier: Apache-2.0
"""Small pure parts: compression words, names of images, digests, which blocks consolidation copies."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpointd.errors import ImageDamaged, ImageNotFound, UnknownFormat, UsageError
from checkpointd.image.consolidate import ConsolidationPolicy, blocks_to_copy
from checkpointd.image.digest import digest_pages, zero_digest, zero_pages
from checkpointd.image.format import Compression, check_version, decompress
from checkpointd.image.info import ImageInfo, info_from_meta
from checkpointd.image.refs import resolve

A, B, C = "aaaa1" + "0" * 59, "aaaa2" + "0" * 59, "cccc" + "0" * 60
IMAGES = [
    ImageInfo(A, tag="night", pid=7),
    ImageInfo(B, tag="night", pid=7),
    ImageInfo(C, pid=8, tag="x:y"),
]


@pytest.mark.parametrize(
    ("text", "codec", "level"), [("none", 0, 0), ("zstd", 1, 1), ("zstd:-5", 1, -5), ("zstd:19", 1, 19)]
)
def test_compression_words(text, codec, level):
    assert Compression.parse(text) == Compression(codec, level)


@pytest.mark.parametrize(
    "text", ["", "gzip", "none:1", "zstd:", "zstd:20", "zstd:-8", "zstd:1.5", "zstd:x", "ZSTD"]
)
def test_other_compression_words_are_refused(text):
    with pytest.raises(UsageError) as caught:
        Compression.parse(text)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("ref", "found"),
    [
        (A, A),
        ("cccc", C),
        ("aaaa1", A),
        ("latest", C),
        ("latest~0", C),
        ("latest~2", A),
        ("tag:night", B),
        ("tag:x:y", C),
        ("pid:7", B),
    ],
)
def test_names_of_images(ref, found):
    assert resolve(ref, IMAGES) == found


@pytest.mark.parametrize(
    "ref",
    [
        "",
        "ccc",
        "../../etc/passwd",
        "CCCC",
        "latest~",
        "latest~-1",
        "tag:",
        "pid:x",
        "cccc/../x",
        "a" * 65,
        "cccc\n",
    ],
)
def test_bad_names_are_refused(ref):
    with pytest.raises(UsageError):
        resolve(ref, IMAGES)


@pytest.mark.parametrize("ref", ["dddd", "latest~3", "tag:other", "pid:9", "latest~999999999"])
def test_names_of_nothing(ref):
    with pytest.raises(ImageNotFound):
        resolve(ref, IMAGES)


def test_an_ambiguous_prefix_lists_the_candidates():
    with pytest.raises(UsageError) as caught:
        resolve("aaaa", IMAGES)
    assert A[:16] in caught.value.message
    assert B[:16] in caught.value.message


def test_latest_does_not_skip_a_damaged_image():
    assert resolve("latest", [*IMAGES, ImageInfo("d" * 64, damaged="why")]) == "d" * 64


def test_unknown_version():
    with pytest.raises(UnknownFormat, match="version 2"):
        check_version(2, "store.json")
    check_version(2, "images/x.img", newest=2)
    for version in (0, 3):
        with pytest.raises(UnknownFormat, match=f"version {version}.*versions 1 to 2"):
            check_version(version, "images/x.img", newest=2)


def test_meta_of_wrong_types_is_ignored():
    info = info_from_meta(
        "a" * 64, {"pid": "12", "comm": 5, "cmdline": ["a", "b"], "tag": "t", "incremental": 1}
    )
    assert (info.pid, info.comm, info.cmdline, info.tag, info.incremental) == (0, "", "a b", "t", False)


@given(st.integers(0, 2**64 - 1), st.integers(0, 5))
def test_digests_depend_on_the_seed_and_on_every_page(seed, nr_pages):
    data = np.arange(nr_pages * 512, dtype=np.uint64).view(np.uint8)
    digests = digest_pages(data, seed)
    assert digests.shape == (nr_pages, 2)
    assert len({tuple(row) for row in digests.tolist()}) == nr_pages
    if nr_pages:
        assert not np.array_equal(digests, digest_pages(data, seed ^ 1))


def test_zero_pages_are_confirmed_by_their_bytes():
    data = np.zeros((3, 4096), dtype=np.uint8)
    data[1, 4095] = 1
    zero = zero_digest(5)
    assert zero_pages(data, digest_pages(data, 5), zero).tolist() == [True, False, True]
    forged = np.tile(zero, (3, 1))  # as if page 1 collided with the zero page
    assert zero_pages(data, forged, zero).tolist() == [True, False, True]
    # its bytes across two digests are nobody's digest
    across = np.frombuffer(b"12345678" + zero.tobytes() + b"12345678", dtype="<u8").reshape(-1, 2)
    assert zero_pages(data[:2], across, zero).tolist() == [False, False]


def test_half_pages_have_no_digest():
    with pytest.raises(ValueError, match="whole pages"):
        digest_pages(np.zeros(100, dtype=np.uint8), 0)


def test_a_frame_that_claims_more_than_it_should_is_not_expanded():
    import zstandard

    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 24))
    with pytest.raises(ImageDamaged):
        decompress(bomb, 4096, "packs/x.pack")
    with pytest.raises(ImageDamaged):
        decompress(b"not a frame", 4096, "packs/x.pack")
    with pytest.raises(ImageDamaged):
        decompress(bomb + b"more", 1 << 24, "packs/x.pack")


def pack_of(block_pages):
    counts = np.array(block_pages, dtype=np.int64)
    firsts = np.cumsum(counts) - counts
    return SimpleNamespace(
        nr_blocks=len(counts),
        block_pages=counts,
        block_of=lambda ordinals: np.searchsorted(firsts, ordinals.astype(np.int64), side="right") - 1,
    )


@given(
    st.lists(st.lists(st.integers(1, 8), min_size=1, max_size=5), min_size=1, max_size=8),
    st.integers(0, 40),
    st.randoms(use_true_random=False),
)
def test_consolidation_keeps_its_bounds(packs_blocks, nr_new, random):
    policy = ConsolidationPolicy(
        max_amplification=1.6, settle_amplification=1.3, max_packs=4, min_dead_pages=3
    )
    packs = [pack_of(blocks) for blocks in packs_blocks]
    live = [
        (number << 32) + ordinal
        for number, blocks in enumerate(packs_blocks)
        for ordinal in range(sum(blocks))
        if random.random() < 0.5
    ]
    locations = np.array(live, dtype=np.uint64)
    copy = blocks_to_copy(locations, packs, nr_new, 1, policy)
    assert len(copy) == len(locations)

    def blocks_of(some):
        return {
            (int(at) >> 32, int(packs[int(at) >> 32].block_of(np.array([int(at) & 0xFFFFFFFF]))[0]))
            for at in some
        }

    blocks, copied = blocks_of(locations[~copy]), blocks_of(locations[copy])
    assert not blocks & copied, "a block is copied whole or not at all"
    referenced = nr_new + int(copy.sum()) + sum(packs_blocks[p][b] for p, b in blocks)
    nr_live = nr_new + len(live)
    assert referenced <= 1.6 * nr_live or referenced - nr_live <= policy.min_dead_pages
    assert len({p for p, _ in blocks}) + 1 <= policy.max_packs
