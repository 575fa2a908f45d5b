# SPDX-License-Identifier: Apache-2.0
"""Extents: every page finds its location, encoding is undone by decoding, nonsense is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpointd.errors import ImageDamaged
from checkpointd.image.format import MISSING_LOCATION, ZERO_LOCATION
from checkpointd.image.index import decode_columns, encode_columns, index_of

ZERO = ZERO_LOCATION


@st.composite
def page_maps(draw):
    """{page: location} with runs, zero pages, pages at the ends of the range, and neighbouring packs."""
    out = {}
    for _ in range(draw(st.integers(0, 8))):
        first = draw(st.one_of(st.integers(0, 60), st.integers((1 << 52) - 30, (1 << 52) - 15)))
        kind = draw(st.sampled_from(["zero", "run", "constant-step"]))
        start = draw(st.sampled_from([0, 1, 5, (1 << 32) - 3, 1 << 32, (3 << 32) + 7]))
        for step in range(draw(st.integers(1, 12))):
            if kind == "zero":
                out[first + step] = ZERO
            else:
                out[first + step] = start + step * (1 if kind == "run" else 2)
    return out


def arrays(mapping):
    pages = np.array(sorted(mapping), dtype=np.uint64)
    locations = np.array([mapping[page] for page in sorted(mapping)], dtype=np.uint64)
    return pages, locations


@given(page_maps(), st.lists(st.one_of(st.integers(0, 90), st.integers(0, 2**64 - 1)), max_size=20))
def test_each_page_finds_its_location(mapping, others):
    pages, locations = arrays(mapping)
    index = index_of(pages, locations)
    assert np.array_equal(index.pages(), pages)
    assert np.array_equal(index.page_locations(), locations)
    real = index.locations != ZERO
    last = index.locations[real] + index.counts[real] - 1
    assert np.array_equal(index.locations[real] >> 32, last >> 32), "an extent lies in one pack"
    asked = np.array(others + list(mapping), dtype=np.uint64)
    expected = [mapping.get(page, MISSING_LOCATION) for page in asked.tolist()]
    assert index.locate(asked).tolist() == expected


@given(st.lists(page_maps(), max_size=4))
def test_decoding_undoes_encoding(mappings):
    indexes = [index_of(*arrays(mapping)) for mapping in mappings]
    decoded = decode_columns(encode_columns(indexes), [len(index.firsts) for index in indexes], "x")
    for ours, theirs in zip(indexes, decoded, strict=True):
        assert np.array_equal(ours.pages(), theirs.pages())
        assert np.array_equal(ours.page_locations(), theirs.page_locations())


def test_a_million_pages_in_one_run_are_one_extent():
    pages = np.arange(1 << 20, dtype=np.uint64)
    assert len(index_of(pages, pages).firsts) == 1


@settings(max_examples=300)
@given(st.integers(0, 3), st.binary(max_size=96))
def test_nonsense_is_refused_or_decodes_in_order(nr_extents, junk):
    columns = tuple((junk + bytes(8 * nr_extents))[: 8 * nr_extents] for _ in range(3))
    try:
        (index,) = decode_columns(columns, [nr_extents], "images/x.img")
    except ImageDamaged as error:
        assert "images/x.img" in error.message
        return
    ends = index.firsts + index.counts
    assert bool((index.counts > 0).all())
    assert bool((index.firsts[1:] >= ends[:-1]).all())


def test_a_column_of_the_wrong_length_is_refused():
    with pytest.raises(ImageDamaged):
        decode_columns((b"12345678", b"", b""), [1], "x")
