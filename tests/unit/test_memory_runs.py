# SPDX-License-Identifier: Apache-2.0
"""Run algebra against sets of page numbers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpointd import memory
from checkpointd.memory import are_within, intersect_runs, merge_runs, pages_of, runs_of, subtract_runs

page_sets = st.sets(st.integers(0, 60), max_size=40)


def to_runs(pages):
    return runs_of(np.array(sorted(pages), dtype=np.uint64))


def to_set(runs):
    pages = pages_of(runs).tolist()
    assert pages == sorted(set(pages))
    return set(pages)


@given(page_sets)
def test_runs_and_pages_are_inverse(pages):
    assert to_set(to_runs(pages)) == pages


@pytest.mark.parametrize("few", [0, 1000])
@given(page_sets, page_sets)
def test_intersection_and_difference_are_those_of_sets(few, a, b):
    """However many they are: few runs go another way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "_FEW_RUNS", few)
        assert to_set(intersect_runs(to_runs(a), to_runs(b))) == a & b
        assert to_set(subtract_runs(to_runs(a), to_runs(b))) == a - b
        assert intersect_runs(to_runs(a), to_runs(b)).dtype == subtract_runs(to_runs(a), to_runs(b)).dtype


@given(page_sets, page_sets)
def test_runs_within_others_are_those_that_lose_nothing(a, b):
    assert are_within(to_runs(a), to_runs(b)) == (a <= b)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 10)), max_size=20))
def test_merge_joins_overlaps_and_neighbours(rows):
    merged = merge_runs(np.array(rows, dtype=np.uint64).reshape(-1, 2))
    assert to_set(merged) == {page for first, nr in rows for page in range(first, first + nr)}
    assert np.all(merged[1:, 0] > merged[:-1, 0] + merged[:-1, 1])
