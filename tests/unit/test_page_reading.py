# SPDX-License-Identifier: Apache-2.0
"""Cutting requests: what is read is exactly what was asked for, in order, whatever the cuts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpointd.dump.page_reading import CopyRequest, cut, pieces, reading, rows_of
from checkpointd.memory import PAGE_SIZE, nr_pages_in, pages_of


@st.composite
def runs(draw):
    """Sorted runs with gaps, some of them long."""
    at, found = 0, []
    for gap, length in draw(
        st.lists(st.tuples(st.integers(1, 9), st.integers(1, 40)), min_size=1, max_size=9)
    ):
        at += gap
        found.append((at, length))
        at += length
    return np.array(found, dtype=np.uint64)


@given(runs(), st.data())
def test_rows_are_those_of_the_pages_written_out(runs, data):
    start = data.draw(st.integers(0, nr_pages_in(runs) - 1))
    end = data.draw(st.integers(start + 1, nr_pages_in(runs)))
    before = runs.copy()
    assert pages_of(rows_of(runs, start, end)).tolist() == pages_of(runs)[start:end].tolist()
    assert np.array_equal(runs, before)


@given(runs(), st.integers(1, 50))
def test_pieces_are_all_of_it_and_none_is_too_large(runs, nr_pages):
    found = list(pieces(runs, nr_pages))
    assert np.concatenate([pages_of(piece) for piece in found]).tolist() == pages_of(runs).tolist()
    assert max(nr_pages_in(piece) for piece in found) <= nr_pages


@given(runs(), st.integers(0, 400))
def test_a_cut_loses_nothing(runs, nr_pages):
    within, beyond = cut([CopyRequest(1, 0, runs)], nr_pages)
    pages = [page for part in (*within, *beyond) for page in pages_of(part.runs).tolist()]
    assert pages == pages_of(runs).tolist()
    assert sum(nr_pages_in(part.runs) for part in within) == min(nr_pages, nr_pages_in(runs))


def test_one_reading_reads_many_times(tmp_path):
    """The tail of a file's last page reads as zeroes."""
    content = np.random.default_rng(3).integers(1, 256, 5 * PAGE_SIZE - 100, dtype=np.uint8)
    path = tmp_path / "object"
    path.write_bytes(content.tobytes())
    whole = np.concatenate((content, np.zeros(100, dtype=np.uint8))).reshape(-1, PAGE_SIZE)
    into = np.full((2, PAGE_SIZE), 7, dtype=np.uint8)
    with reading(CopyRequest(0, 1, np.array([[0, 5]], dtype=np.uint64), source=str(path))) as some:
        for first, nr in ((3, 2), (0, 1), (4, 1)):
            some(np.array([[first, nr]], dtype=np.uint64), into[:nr].reshape(-1))
            assert np.array_equal(into[:nr], whole[first : first + nr])
    with (
        pytest.raises(FileNotFoundError),
        reading(CopyRequest(0, 1, np.zeros((0, 2)), source=str(path) + "-")),
    ):
        pass
