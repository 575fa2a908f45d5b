# SPDX-License-Identifier: Apache-2.0
"""Making and undoing differences, what may be a base, and which pages are worth it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpointd.image.delta import LINE_BYTES, DeltaChooser, bases_of, difference, lines_changed
from checkpointd.image.format import MISSING_LOCATION, NO_BASE, ZERO_LOCATION, Compression
from checkpointd.image.index import Places
from checkpointd.memory import PAGE_SIZE

ZSTD = Compression.parse("zstd:1")


def random_pages(nr_pages, seed=1):
    return np.random.default_rng(seed).integers(0, 256, (nr_pages, PAGE_SIZE), dtype=np.uint8)


@given(st.integers(1, 4), st.integers(0, 1000), st.lists(st.integers(0, PAGE_SIZE - 1), max_size=9))
def test_a_difference_undoes_itself(nr_pages, seed, spots):
    bases = random_pages(nr_pages, seed)
    pages = bases.copy()
    pages[seed % nr_pages, spots] ^= 0x55
    found = difference(pages, bases)
    assert np.count_nonzero(found) == len(set(spots))
    assert np.array_equal(difference(found, bases), pages)
    expected = [0] * nr_pages
    expected[seed % nr_pages] = len({spot // LINE_BYTES for spot in spots})
    assert lines_changed(found).tolist() == expected


def test_only_whole_pages_have_a_difference():
    with pytest.raises(ValueError, match="whole pages"):
        difference(random_pages(2), random_pages(1))
    with pytest.raises(ValueError, match="whole pages"):
        difference(np.zeros(100, dtype=np.uint8), np.zeros(100, dtype=np.uint8))


def test_a_base_is_a_plain_page():
    locations = np.array([7, 8, ZERO_LOCATION, MISSING_LOCATION], dtype=np.uint64)
    bases = np.array([NO_BASE, 3, NO_BASE, NO_BASE], dtype=np.uint64)
    assert bases_of(Places(locations, bases)).tolist() == [7, 3, NO_BASE, NO_BASE]
    assert locations.tolist() == [7, 8, ZERO_LOCATION, MISSING_LOCATION], "what the parent says stays"


@pytest.mark.parametrize(
    ("lines", "what", "pays"),
    [
        (1, "random", True),
        (16, "random", True),
        (40, "random", True),
        (64, "random", False),
        (1, "text", True),
        (64, "constant", False),
    ],
)
def test_what_pays(lines, what, pays):
    """By the bytes it saves: what does not compress gains most, what compresses to nothing never."""
    bases = random_pages(30)
    if what == "text":
        bases = bases % 16 + 97
    elif what == "constant":
        bases[:] = 5
    pages = bases.copy()
    changed = slice(0, lines * LINE_BYTES)
    pages[:, changed] = 9 if what == "constant" else random_pages(30, 2)[:, changed]
    chosen = DeltaChooser(ZSTD).choose(pages, difference(pages, bases))
    assert chosen.tolist() == [pays] * 30


def test_pages_are_judged_with_their_like():
    bases = random_pages(60)
    pages = bases.copy()
    pages[::2, :10] ^= 1
    pages[1::2] = random_pages(30, 2)
    chosen = DeltaChooser(ZSTD).choose(pages, difference(pages, bases))
    assert chosen.tolist() == [True, False] * 30
    assert DeltaChooser(ZSTD).choose(pages[:0], bases[:0]).tolist() == []


def test_without_compression_there_is_nothing_to_choose():
    with pytest.raises(ValueError, match="compression"):
        DeltaChooser(Compression.parse("none"))
