# SPDX-License-Identifier: Apache-2.0
"""What the oracle asks of an engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tests.oracle.truth import Key

U64 = npt.NDArray[np.uint64]
Pages = npt.NDArray[np.uint8]
PRIVATE = 0


class Refused(Exception):
    """The engine said no before it froze anything: state that cannot be saved."""


class Generation(Protocol):
    """One image, flattened: its index alone, never its parents.

    Attributes:
        backend: which tracker ran.
        stats: the counters of the dump (DumpStats by name).
        mappings: (start, end, "rw-p", offset) sorted by address.
        objects: shared memory object -> (its number in the index, size in pages).
        guards: pages of guard regions.
    """

    backend: str
    stats: dict[str, Any]
    mappings: list[tuple[int, int, str, int]]
    objects: dict[Key, tuple[int, int]]
    guards: U64

    def pages(self, obj: int) -> U64: ...

    def read(self, obj: int, pages: U64) -> Pages: ...


class Engine(Protocol):
    """Dumps of one target after the other, in one store."""

    name: str

    def dump(self, pid: int, *, incremental: bool) -> Generation:
        """One more generation.

        Raises:
            Refused: nothing was frozen.
        """

    def fail(self, pid: int) -> bool:
        """Begin an incremental dump and let it fail after it read; False when this engine cannot be made to."""

    def restore(self, generation: Generation) -> int:
        """Bring a generation back; later dumps are of that process, whose pid is returned."""

    def close(self) -> None:
        """Let go of the target."""


EngineFactory = Callable[[], Engine]
