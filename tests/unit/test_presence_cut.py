# SPDX-License-Identifier: Apache-2.0
"""Regions of PAGEMAP_SCAN are cut at the borders of the VMAs that were there before the injection."""

import numpy as np

from checkpointd.memory import Vma, VmaKind
from checkpointd.tracking.presence import _cut


def vma(start, end):
    return Vma(start << 12, end << 12, 3, False, 0, (0, 0), 0, "", False, VmaKind.ANON)


def cut(regions, vmas):
    rows = np.array([(a << 12, b << 12, c) for a, b, c in regions], dtype=np.uint64).reshape(-1, 3)
    pieces, owners = _cut(rows, vmas)
    return [(a >> 12, b >> 12, c, n) for (a, b, c), n in zip(pieces.tolist(), owners.tolist(), strict=True)]


def test_region_across_neighbours_is_split():
    assert cut([(10, 30, 8)], [vma(10, 20), vma(20, 30)]) == [(10, 20, 8, 0), (20, 30, 8, 1)]


def test_region_that_runs_into_a_foreign_mapping_ends_with_its_vma():
    assert cut([(10, 26, 8)], [vma(10, 20)]) == [(10, 20, 8, 0)]


def test_foreign_mapping_between_two_vmas_belongs_to_neither():
    assert cut([(10, 40, 8)], [vma(10, 20), vma(26, 40)]) == [(10, 20, 8, 0), (26, 40, 8, 1)]


def test_region_outside_all_vmas_is_dropped():
    assert cut([(1, 3, 8), (50, 60, 8)], [vma(10, 20)]) == []
