# SPDX-License-Identifier: Apache-2.0
"""XXH3 (128 bit) of many pages: canonical bytes, as xxh3_128_digest of the xxhash package gives them.

The package takes a step of Python for each page and keeps the GIL for it (not so for large buffers: block checksums are
its work everywhere).  Where the system's libxxhash is there (Debian has it: apt needs it) a few instructions of ours
call it for one page after the other, without the GIL: two threads then hash at the same time.  Which one worked cannot
be seen in an image: both give the same bytes, which is tried once before the library is trusted (XXH3 was another
function before its release 0.8.0).

Source: xxHash doc/xxhash_spec.md, xxh_x86dispatch.h.  Measurements: docs/decisions/0002-page-digest.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
from typing import Protocol

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_128_digest

from checkpointd.image.blobs import EACH_PAGE
from checkpointd.memory import PAGE_SIZE
from checkpointd.native import NativeFunction

DIGEST_BYTES = 16
_LIBRARY = "libxxhash.so.0"
_SEED = 0x9E37_79B9_7F4A_7C15

Bytes = npt.NDArray[np.uint8]


class Hasher(Protocol):
    """One of two ways to the same bytes."""

    def pages(self, data: Bytes, seed: int) -> bytes:
        """16 bytes for each of the pages lying one after the other in `data`, (n * 4096,), contiguous."""


class PackageHasher:
    """By the xxhash package: 0.3 to 0.8 us a page with the lock held."""

    def pages(self, data: Bytes, seed: int) -> bytes:
        view = data.data
        return b"".join(
            [xxh3_128_digest(view[at : at + PAGE_SIZE], seed) for at in range(0, len(view), PAGE_SIZE)]
        )


class LibraryHasher:
    """By the shared library.

    Raises:
        OSError: there is none here, it is of another kind than we know, or we get no executable memory.
    """

    def __init__(self) -> None:
        if platform.machine() != "x86_64":
            raise OSError(f"no machine code for {platform.machine()}")
        library = ctypes.CDLL(_LIBRARY)
        seeded = ctypes.cast(_function(library, "XXH3_128bits_withSeed"), ctypes.c_void_p).value
        if not seeded:
            raise OSError(f"{_LIBRARY} has a function at address 0")
        self._seeded = seeded
        self._each_page = NativeFunction(EACH_PAGE)
        self._check()

    def pages(self, data: Bytes, seed: int) -> bytes:
        nr_pages = len(data) // PAGE_SIZE
        out = np.empty(nr_pages * DIGEST_BYTES, dtype=np.uint8)
        self._each_page(self._seeded, data.ctypes.data, nr_pages, seed, out.ctypes.data)
        return out.tobytes()

    def _check(self) -> None:
        sample = np.arange(16 * PAGE_SIZE, dtype=np.uint32) * np.uint32(2654435761) >> np.uint32(24)
        pages = sample.astype(np.uint8)
        if self.pages(pages, _SEED) != PackageHasher().pages(pages, _SEED):
            raise OSError(f"{_LIBRARY} gives other values than the xxhash package")


def _function(library: ctypes.CDLL, name: str) -> ctypes._NamedFuncPointer:
    """The one that looks at the CPU, where the library was built with it.

    Raises:
        OSError: it has neither.
    """
    for candidate in (f"{name}_dispatch", name):
        with contextlib.suppress(AttributeError):
            return getattr(library, candidate)  # type: ignore[no-any-return]
    raise OSError(f"{_LIBRARY} has no {name}")


def best_hasher() -> Hasher:
    """The faster one of those that work here."""
    try:
        return LibraryHasher()
    except OSError:
        return PackageHasher()


HASHER: Hasher = best_hasher()
