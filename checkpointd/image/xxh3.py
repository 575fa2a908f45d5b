# SPDX-License-Identifier: Apache-2.0
"""XXH3 (128 bit) of many pages: canonical bytes, as xxh3_128_digest of the xxhash package gives them.

The package takes a step of Python for each page and keeps the GIL for it (not so for large buffers: block checksums are
its work everywhere).  So a few instructions of ours call the C function inside it, or that of the system's libxxhash,
for one page after the other, without the GIL: two threads then hash at the same time.  That function is no promised
interface of the package: where neither can be had, and on other CPUs, the package is called page by page.  Which one
worked cannot be seen in an image: all give the same bytes, which is tried once before a library is trusted (XXH3 was
another function before xxHash 0.8.0).

Source: xxHash doc/xxhash_spec.md, xxh_x86dispatch.h.  Measurements: docs/decisions/0002-page-digest.md.
"""

from __future__ import annotations

import ctypes
import importlib.util
import platform
import sys
import warnings
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_128_digest

from checkpointd.image.blobs import EACH_PAGE
from checkpointd.memory import PAGE_SIZE
from checkpointd.native import NativeFunction

DIGEST_BYTES = 16
_SYSTEM = "libxxhash.so.0"
# The variant that looks at the CPU first: without it the package, built for this CPU or not, is faster.
_FUNCTION = "XXH3_128bits_withSeed_dispatch"
_SEEDS = (0, 0x9E37_79B9_7F4A_7C15)
_KNOWN = "3203f3b99ad3538d9bf67f8deff876ae"  # of the first page of the sample, by xxHash 0.8.1 in C

Bytes = npt.NDArray[np.uint8]


class Hasher(Protocol):
    """One of several ways to the same bytes."""

    def pages(self, data: Bytes, seed: int) -> bytes:
        """16 bytes for each of the pages lying one after the other in `data`, (n * 4096,), contiguous."""


class PackageHasher:
    """By the xxhash package: 0.3 to 0.8 us a page with the GIL held."""

    def pages(self, data: Bytes, seed: int) -> bytes:
        view = data.data
        return b"".join(
            [xxh3_128_digest(view[at : at + PAGE_SIZE], seed) for at in range(0, len(view), PAGE_SIZE)]
        )


class WrongDigestsError(OSError):
    """A library hashes to other values: it is too old, or we call it wrongly."""


class LibraryHasher:
    """By the C function of a shared library.

    Args:
        library: path or name, as for dlopen(3).

    Raises:
        OSError: there is none, it lacks the function, or we get no executable memory.
        WrongDigestsError: see there.
    """

    def __init__(self, library: str) -> None:
        if platform.machine() != "x86_64" or sys.maxsize <= 1 << 32:
            raise OSError(f"no machine code for {platform.machine()}")
        try:
            function = getattr(ctypes.CDLL(library), _FUNCTION)
        except AttributeError as error:
            raise OSError(f"{library} has no {_FUNCTION}") from error
        self._function = ctypes.cast(function, ctypes.c_void_p).value or 0
        self._each_page = NativeFunction(EACH_PAGE)
        self._check(library)

    def pages(self, data: Bytes, seed: int) -> bytes:
        if data.ndim != 1 or data.itemsize != 1 or not data.flags.c_contiguous:
            raise ValueError("pages are hashed as contiguous bytes")
        nr_pages = len(data) // PAGE_SIZE
        out = np.empty(nr_pages * DIGEST_BYTES, dtype=np.uint8)
        self._each_page(self._function, data.ctypes.data, nr_pages, seed, out.ctypes.data)
        return out.tobytes()

    def _check(self, library: str) -> None:
        """Against the package, which may be the same code, and against a value noted down."""
        words = np.arange(16 * PAGE_SIZE, dtype=np.uint32) * np.uint32(2654435761) >> np.uint32(24)
        sample = words.astype(np.uint8)
        found = [self.pages(sample, seed) for seed in _SEEDS]
        known = [PackageHasher().pages(sample, seed) for seed in _SEEDS]
        if found != known or found[0][:DIGEST_BYTES].hex() != _KNOWN:
            raise WrongDigestsError(f"{library} hashes pages to other values than XXH3")


def libraries() -> Iterator[str]:
    """Where the function may be: in the package's own code, in the system's library."""
    spec = importlib.util.find_spec("xxhash._xxhash")
    if spec is not None and spec.origin:
        yield spec.origin
    yield _SYSTEM


def best_hasher() -> Hasher:
    """The first library that works here, else the package."""
    for library in libraries():
        try:
            return LibraryHasher(library)
        except WrongDigestsError as error:
            warnings.warn(f"{error}: not used", RuntimeWarning, stacklevel=2)
        except OSError:
            continue
    return PackageHasher()


HASHER: Hasher = best_hasher()
