# SPDX-License-Identifier: Apache-2.0
"""How close a process is to the limit of mappings, and what to tell its owner.

Precise tracking, by the patch or by the barrier, costs mappings: a new one wherever new memory touches old.
The patched kernel goes back to merging new mappings when 15/16 of ``vm.max_map_count`` are in use; other
kernels let the process run into ENOMEM. Warn well before either.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

MAX_MAP_COUNT = Path("/proc/sys/vm/max_map_count")
WARN_SHARE = 0.75


def fallback_threshold(max_map_count: int) -> int:
    """Mappings from which on the patched kernel merges new mappings with clean ones again."""
    return max_map_count - max_map_count // 16


@dataclasses.dataclass(frozen=True)
class Headroom:
    """Number of VMAs of a process beside the limit that holds for it."""

    nr_vmas: int
    max_map_count: int

    @property
    def near(self) -> bool:
        """Three quarters of the limit are in use."""
        return self.nr_vmas >= self.max_map_count * WARN_SHARE

    @property
    def imprecise(self) -> bool:
        """So many that a patched kernel has given up precision for new mappings."""
        return self.nr_vmas >= fallback_threshold(self.max_map_count)

    @property
    def warning(self) -> str | None:
        """One sentence for the user with the remedy, or None while there is room."""
        if not self.near:
            return None
        cost = (
            "new mappings are tracked imprecisely (safe, larger dumps)"
            if self.imprecise
            else "tracking becomes imprecise or mmap fails soon"
        )
        return (
            f"{self.nr_vmas} of {self.max_map_count} mappings are in use, {cost}; "
            f"raise the limit (sysctl -w vm.max_map_count={self.max_map_count * 4}) "
            "or turn precise tracking off"
        )


def read_max_map_count() -> int:
    """The limit of mappings per process.

    Raises:
        OSError: the sysctl cannot be read.
    """
    return int(MAX_MAP_COUNT.read_text())
