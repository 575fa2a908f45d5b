# SPDX-License-Identifier: Apache-2.0
"""What fills whole blocks and what is left are together what the index says, each page once and in its place."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from checkpointd.image.format import LOCATION_SHIFT, ZERO_LOCATION
from checkpointd.image.index import NO_BASE_U64, ObjectIndex, expand, expand_locations
from checkpointd.image.whole import split


def packs_of(*blocks):
    found = []
    for sizes in blocks:
        pages = np.array(sizes, dtype=np.int64)
        found.append(SimpleNamespace(block_pages=pages, block_firsts=np.cumsum(pages) - pages))
    return found


def index_of(*extents):
    """Of (first page, count, location, base)."""
    columns = np.array(extents, dtype=np.uint64).reshape(-1, 4).T
    return ObjectIndex(columns[0], columns[1], columns[2], columns[3])


def places(index):
    """{page: (location, base)}; no page twice."""
    pages = expand(index.firsts, index.counts).tolist()
    assert len(set(pages)) == len(pages)
    locations = expand_locations(index.locations, index.counts).tolist()
    bases = expand_locations(index.bases, index.counts).tolist()
    return dict(zip(pages, zip(locations, bases, strict=True), strict=True))


@st.composite
def images(draw):
    """Packs, and an index whose extents lie in them in any order, with zero extents and deltas among them."""
    packs = packs_of(
        *draw(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=8), min_size=1, max_size=3))
    )
    index, page = {}, 1
    for obj in range(draw(st.integers(1, 2))):
        extents = []
        for _ in range(draw(st.integers(0, 6))):
            page += draw(st.integers(0, 3))
            number = draw(st.integers(0, len(packs) - 1))
            nr_pages = int(packs[number].block_pages.sum())
            first = draw(st.integers(0, nr_pages - 1))
            count = draw(st.integers(1, nr_pages - first))
            location, base = (number << LOCATION_SHIFT) + first, int(NO_BASE_U64)
            kind = draw(st.sampled_from(["plain", "plain", "plain", "zero", "delta"]))
            if kind == "zero":
                location = ZERO_LOCATION
            if kind == "delta":
                base = location
            extents.append((page, count, location, base))
            page += count
        index[obj] = index_of(*extents)
    return packs, index


@given(images(), st.integers(1, 9))
def test_nothing_is_lost_and_nothing_is_twice(image, nr_parts):
    packs, index = image
    whole, rest = split(index, packs, nr_parts=nr_parts)
    numbers = [next(n for n, pack in enumerate(packs) if pack is one.pack) for one in whole]
    for obj, part in index.items():
        found = places(rest[obj]) if obj in rest else {}
        left = dict(found)
        for number, one in zip(numbers, whole, strict=True):
            if one.obj != obj:
                continue
            start = int(one.pack.block_firsts[one.first_block]) + (number << LOCATION_SHIFT)
            for n, page in enumerate(one.pages().tolist()):
                assert page not in found
                found[page] = (start + n, int(NO_BASE_U64))
        assert found == places(part)
        # no whole block is left over
        for extent in zip(
            *(c.tolist() for c in (part.firsts, part.counts, part.locations, part.bases)), strict=True
        ):
            first, count, location, base = extent
            if location == ZERO_LOCATION or base != int(NO_BASE_U64):
                continue
            pack, ordinal = packs[location >> LOCATION_SHIFT], location & ((1 << LOCATION_SHIFT) - 1)
            for start, nr in zip(pack.block_firsts.tolist(), pack.block_pages.tolist(), strict=True):
                if ordinal <= start and start + nr <= ordinal + count:
                    assert not {*range(first + start - ordinal, first + start - ordinal + nr)} & left.keys()


def test_there_are_parts_enough_for_all_threads():
    packs = packs_of([4] * 40)
    index = {0: index_of((100, 160, 0, int(NO_BASE_U64)))}
    assert [one.nr_blocks for one in split(index, packs, nr_parts=1)[0]] == [16, 16, 8]
    parts, rest = split(index, packs, nr_parts=8)
    assert [one.nr_blocks for one in parts] == [5] * 8
    assert rest == {}
    assert [one.first_page for one in parts] == [100 + 20 * n for n in range(8)]


def test_they_come_in_the_order_of_the_disk():
    packs, none = packs_of([4] * 3, [4] * 3), int(NO_BASE_U64)
    second = 1 << LOCATION_SHIFT
    index = {0: index_of((1, 4, second + 4, none), (5, 4, 8, none)), 1: index_of((1, 8, 0, none))}
    whole, _ = split(index, packs, nr_parts=1)
    assert [(one.pack is packs[1], one.first_block, one.obj) for one in whole] == [
        (False, 0, 1),
        (False, 2, 0),
        (True, 1, 0),
    ]
