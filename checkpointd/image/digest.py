# SPDX-License-Identifier: Apache-2.0
"""Page digests: 16 bytes a page, keyed by the store's secret seed (docs/decisions/0002-page-digest.md).

A digest is XXH3 (128 bit) of the page, its 16 canonical bytes kept as two little-endian uint64; only equality
has a meaning.  The seed never leaves the store, so digests of two stores cannot be compared.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from checkpointd.image import xxh3
from checkpointd.memory import PAGE_SIZE

Digests = npt.NDArray[np.uint64]
Bytes = npt.NDArray[np.uint8]

NO_DIGESTS: Digests = np.zeros((0, 2), dtype=np.uint64)


def digest_pages(data: Bytes, seed: int) -> Digests:
    """The digests, (n, 2), of n pages lying one after the other.

    Raises:
        ValueError: not a whole number of pages.
    """
    flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    if len(flat) % PAGE_SIZE:
        raise ValueError(f"{len(flat)} bytes are not whole pages")
    return np.frombuffer(xxh3.HASHER.pages(flat, seed), dtype="<u8").reshape(-1, 2)


def zero_digest(seed: int) -> Digests:
    """The digest, (2,), of a page of zeroes."""
    zero: Digests = digest_pages(np.zeros(PAGE_SIZE, dtype=np.uint8), seed)[0]
    return zero


def zero_pages(data: Bytes, digests: Digests, zero: Digests) -> npt.NDArray[np.bool_]:
    """Which pages hold only zeroes: found by digest, then confirmed by their bytes."""
    if zero.tobytes() not in digests.tobytes():  # nearly always; a fraction of what comparing takes
        return np.zeros(len(digests), dtype=bool)
    found: npt.NDArray[np.bool_] = (digests[:, 0] == zero[0]) & (digests[:, 1] == zero[1])
    if found.any():
        at = np.flatnonzero(found)
        found[at] = ~data.reshape(-1, PAGE_SIZE)[at].view(np.uint64).any(axis=1)
    return found
