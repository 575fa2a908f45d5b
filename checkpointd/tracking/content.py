# SPDX-License-Identifier: Apache-2.0
"""No tracking at all: every page that holds data is read and compared with the parent by digest.

Works on any kernel and any target that can be frozen and read; costs the target nothing between dumps and a
full read at each.  On kernels without PAGEMAP_SCAN presence comes from pagemap words.
"""

from __future__ import annotations

from checkpointd.memory import merge_runs
from checkpointd.tracking.base import Collection, Found, Space
from checkpointd.tracking.presence import Sight, look


class ContentTracker:
    """Calls everything dirty; the image room finds what is the same."""

    name = "content"
    precision = "exact by content: a page rewritten with the same bytes is not a change"
    cost = "nothing between dumps; every page is read and hashed at each dump"

    def __init__(self, sight: Sight) -> None:
        self._sight = sight

    def collect(self, space: Space) -> Collection:
        present = look(space, self._sight)
        data = merge_runs(present.runs)
        return Collection(Found(dirty=data), guards=present.guards)

    def commit(self) -> None:
        """Nothing is pending: the next collection looks at everything again."""

    def rollback(self) -> None:
        """Nothing is pending."""

    def disarm(self) -> None:
        """Nothing was armed."""
