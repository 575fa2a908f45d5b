# SPDX-License-Identifier: Apache-2.0
"""What a tracker remembers from one collection to the next: the part of the contract all kernels have in common.

A page is clean only if it held data at the last committed collection, was not suspect then, and no collection rolled
back since has reported it.  Values only; no errors.
"""

from __future__ import annotations

import numpy as np

from checkpointd.memory import NO_RUNS, Runs, intersect_runs, merge_runs, subtract_runs


class Epochs:
    """See the module's text.

    Attributes:
        base: what held data at the last committed collection, and changed by page tables only.
    """

    def __init__(self) -> None:
        self.base: Runs = NO_RUNS
        self._carried: Runs = NO_RUNS  # reported by collections that were rolled back
        self._pending: tuple[Runs, Runs] | None = None  # (data, dirty) of the collection not yet decided

    def clean(self, candidates: Runs, always_dirty: Runs) -> Runs:
        """Of the pages the kernel calls unchanged (any rows), those that may be called clean."""
        found = intersect_runs(merge_runs(candidates), self.base)
        for unsafe in (self._carried, always_dirty):
            found = subtract_runs(found, unsafe)
        return found

    def keeps(self, data: Runs) -> bool:
        """Is all of `data`, as it was given to `close`, what may be called clean now?"""
        return self.base is data and len(self._carried) == 0

    def close(self, data: Runs, dirty: Runs, always_dirty: Runs) -> None:
        """A collection has found so much, and is to be committed or rolled back.

        What may be written behind the back of page tables may be so until the next collection too, which need not see
        any more that it could: it is in no base, and so read once more after that has ended.
        """
        self._pending = (subtract_runs(data, always_dirty), dirty)

    def commit(self) -> None:
        if self._pending is not None:
            self.base = self._pending[0]
            self._carried = NO_RUNS
            self._pending = None

    def rollback(self) -> None:
        if self._pending is not None:
            self._carried = merge_runs(np.concatenate((self._carried, self._pending[1])))
            self._pending = None

    def forget(self) -> None:
        """Nothing is clean until a collection has been committed again."""
        self.base = NO_RUNS
