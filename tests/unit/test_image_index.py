# SPDX-License-Identifier: Apache-2.0
"""Extents: every page finds its location, encoding is undone by decoding, nonsense is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpointd.errors import ImageDamaged
from checkpointd.image.format import MISSING_LOCATION, NO_BASE, ZERO_LOCATION
from checkpointd.image.index import Places, decode_columns, encode_columns, encode_deltas, index_of

ZERO = ZERO_LOCATION


@st.composite
def page_maps(draw):
    """{page: (location, base)} with runs, zero pages, pages at the ends of the range, and neighbouring packs."""
    out = {}
    for _ in range(draw(st.integers(0, 8))):
        first = draw(st.one_of(st.integers(0, 60), st.integers((1 << 52) - 30, (1 << 52) - 15)))
        kind = draw(st.sampled_from(["zero", "run", "constant-step"]))
        start = draw(st.sampled_from([0, 1, 5, (1 << 32) - 3, 1 << 32, (3 << 32) + 7]))
        base = draw(st.sampled_from([None, None, 0, 5, (1 << 32) - 3, 2 << 32]))
        base_step = draw(st.sampled_from([1, 3]))
        for step in range(draw(st.integers(1, 12))):
            if kind == "zero":
                out[first + step] = ZERO, NO_BASE
            else:
                location = start + step * (1 if kind == "run" else 2)
                out[first + step] = location, NO_BASE if base is None else base + step * base_step
    return out


def arrays(mapping):
    pages = np.array(sorted(mapping), dtype=np.uint64)
    columns = np.array([mapping[page] for page in sorted(mapping)], dtype=np.uint64).reshape(-1, 2)
    return pages, Places(columns[:, 0], columns[:, 1])


def equal(ours, theirs):
    return np.array_equal(ours.locations, theirs.locations) and np.array_equal(ours.bases, theirs.bases)


def decode(indexes, path="x"):
    extents = [len(index.firsts) for index in indexes]
    return decode_columns(encode_columns(indexes), encode_deltas(indexes), extents, path)


@given(page_maps(), st.lists(st.one_of(st.integers(0, 90), st.integers(0, 2**64 - 1)), max_size=20))
def test_each_page_finds_its_place(mapping, others):
    pages, places = arrays(mapping)
    index = index_of(pages, places)
    assert np.array_equal(index.pages(), pages)
    assert equal(index.page_places(), places)
    for column in (index.locations, index.bases):
        real = column != ZERO
        last = column[real] + index.counts[real] - 1
        assert np.array_equal(column[real] >> 32, last >> 32), "an extent lies in one pack"
    asked = np.array(others + list(mapping), dtype=np.uint64)
    expected = [mapping.get(page, (MISSING_LOCATION, NO_BASE)) for page in asked.tolist()]
    found = index.locate(asked)
    assert list(zip(found.locations.tolist(), found.bases.tolist(), strict=True)) == expected
    based = {page for page, (_, base) in mapping.items() if base != NO_BASE}
    assert set(index.delta_extents().pages().tolist()) == based


@given(st.lists(page_maps(), max_size=4))
def test_decoding_undoes_encoding(mappings):
    indexes = [index_of(*arrays(mapping)) for mapping in mappings]
    for ours, theirs in zip(indexes, decode(indexes), strict=True):
        assert np.array_equal(ours.pages(), theirs.pages())
        assert equal(ours.page_places(), theirs.page_places())


def test_a_million_pages_in_one_run_are_one_extent():
    pages = np.arange(1 << 20, dtype=np.uint64)
    assert len(index_of(pages, Places(pages, np.full(1 << 20, NO_BASE, dtype=np.uint64))).firsts) == 1
    assert len(index_of(pages, Places(pages, pages + np.uint64(1 << 32))).firsts) == 1


def test_without_deltas_nothing_is_stored_of_bases():
    pages = np.arange(5, dtype=np.uint64)
    assert encode_deltas([index_of(pages, Places(pages, np.full(5, NO_BASE, dtype=np.uint64)))]) == (b"", b"")


@settings(max_examples=300)
@given(st.integers(0, 3), st.binary(max_size=96), st.lists(st.integers(0, 3), max_size=4))
def test_nonsense_is_refused_or_decodes_in_order(nr_extents, junk, gaps):
    columns = tuple((junk + bytes(8 * nr_extents))[: 8 * nr_extents] for _ in range(3))
    try:
        deltas = (np.array(gaps, dtype="<u8").tobytes(), (junk + bytes(32))[: 8 * len(gaps)])
        (index,) = decode_columns(columns, deltas, [nr_extents], "images/x.img")
    except ImageDamaged as error:
        assert "images/x.img" in error.message
        return
    ends = index.firsts + index.counts
    assert bool((index.counts > 0).all())
    assert bool((index.firsts[1:] >= ends[:-1]).all())


def test_a_column_of_the_wrong_length_is_refused():
    with pytest.raises(ImageDamaged):
        decode_columns((b"12345678", b"", b""), (b"", b""), [1], "x")


@pytest.mark.parametrize(
    "deltas",
    [
        (b"\0" * 8, b""),  # an extent without its base
        (b"\0" * 7, b"\0" * 7),
        (b"\2" + b"\0" * 7, b"\0" * 8),  # the third of two extents
        (b"\1" + b"\0" * 15, b"\0" * 16),  # the second, and the one after it
        (b"\0" * 24, b"\0" * 24),  # three of two
        (b"\xff" * 8, b"\0" * 8),
        (b"\0" * 8, b"\0" * 8),  # the first holds zero pages
    ],
)
def test_impossible_deltas_are_refused(deltas):
    pages = np.array([1, 7], dtype=np.uint64)
    index = index_of(
        pages, Places(np.array([ZERO, 3], dtype=np.uint64), np.full(2, NO_BASE, dtype=np.uint64))
    )
    columns = encode_columns([index])
    decode_columns(columns, (b"\1" + b"\0" * 7, b"\0" * 8), [2], "x")
    with pytest.raises(ImageDamaged):
        decode_columns(columns, deltas, [2], "x")
