# SPDX-License-Identifier: Apache-2.0
"""An engine that is right by being naive, and ways to make it wrong.

It reads all memory itself and keeps it in memory.  With a mistake planted, each shows one way in which a real
engine can lose or invent data; the oracle must see every one of them.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.oracle import truth
from tests.oracle.engine import PRIVATE, U64, Pages
from tests.oracle.truth import PAGE, Contents, Key, Truth


class NaiveGeneration:
    def __init__(self, seen: Truth, backend: str) -> None:
        self.backend = backend
        self.stats: dict[str, Any] = {}
        self.mappings = [
            (m.start, m.end, m.prot, m.offset)
            for m in seen.mappings
            if not m.path.startswith(("[vdso]", "[vvar", "[vsyscall]"))
        ]
        self.guards = seen.guards
        self.objects: dict[Key, tuple[int, int]] = {}
        self.contents: dict[int, Contents] = {
            PRIVATE: Contents(seen.private.pages.copy(), seen.private.data.copy())
        }
        for obj, (key, (nr_pages, contents)) in enumerate(sorted(seen.shared.items()), start=1):
            self.objects[key] = (obj, nr_pages)
            self.contents[obj] = Contents(contents.pages.copy(), contents.data.copy())

    def pages(self, obj: int) -> U64:
        return self.contents[obj].pages

    def read(self, obj: int, pages: U64) -> Pages:
        held = self.contents[obj]
        return held.data[np.searchsorted(held.pages, pages)]


Mistake = Callable[[random.Random, NaiveGeneration, NaiveGeneration, Truth], None]
"""(dice, this generation, its parent, what was seen): spoils this generation."""


def drop_dirty(
    dice: random.Random, image: NaiveGeneration, parent: NaiveGeneration, seen: Truth, share: float = 0.01
) -> None:
    """A tracker misses one dirty page in a hundred."""
    held, old = image.contents[PRIVATE], parent.contents[PRIVATE]
    for n, m in _pairs(held.pages, old.pages):
        if dice.random() < share and not np.array_equal(held.data[n], old.data[m]):
            held.data[n] = old.data[m]


def inherit_vanished(
    dice: random.Random, image: NaiveGeneration, parent: NaiveGeneration, seen: Truth
) -> None:
    """ "Not marked dirty, so inherit": a page dropped by the target comes back from the parent."""
    held, old = image.contents[PRIVATE], parent.contents[PRIVATE]
    gone = ~np.isin(old.pages, held.pages)
    for m in seen.mappings:
        mapped = (old.pages >= m.start // PAGE) & (old.pages < m.end // PAGE) & gone
        if mapped.any() and not m.shared:
            pages = np.concatenate((held.pages, old.pages[mapped]))
            data = np.concatenate((held.data, old.data[mapped]))
            order = np.argsort(pages)
            held.pages, held.data = pages[order], data[order]


def lose_new(dice: random.Random, image: NaiveGeneration, parent: NaiveGeneration, seen: Truth) -> None:
    """Memory that is new since the parent is sometimes not looked at."""
    held, old = image.contents[PRIVATE], parent.contents[PRIVATE]
    lost = ~np.isin(held.pages, old.pages) & (np.array([dice.random() for _ in held.pages]) < 0.02)
    held.pages, held.data = held.pages[~lost], held.data[~lost]


def stale_shared(dice: random.Random, image: NaiveGeneration, parent: NaiveGeneration, seen: Truth) -> None:
    """Shared memory is taken as unchanged unless its size changed."""
    for key, (obj, nr_pages) in image.objects.items():
        if key in parent.objects and parent.objects[key][1] == nr_pages:
            image.contents[obj] = parent.contents[parent.objects[key][0]]


def zero_is_hole(dice: random.Random, image: NaiveGeneration, parent: NaiveGeneration, seen: Truth) -> None:
    """A page of zeroes is left out, also where a file lies beneath it."""
    held = image.contents[PRIVATE]
    keep = held.data.any(axis=1)
    held.pages, held.data = held.pages[keep], held.data[keep]


def torn(dice: random.Random, image: NaiveGeneration, parent: NaiveGeneration, seen: Truth) -> None:
    """A page is read while it is written: half of it is old."""
    held, old = image.contents[PRIVATE], parent.contents[PRIVATE]
    pairs = [
        (n, m) for n, m in _pairs(held.pages, old.pages) if not np.array_equal(held.data[n], old.data[m])
    ]
    if pairs:
        n, m = dice.choice(pairs)
        held.data[n, PAGE // 2 :] = old.data[m, PAGE // 2 :]


def forget_guards(dice: random.Random, image: NaiveGeneration, parent: NaiveGeneration, seen: Truth) -> None:
    """Guard regions are not recorded."""
    image.guards = image.guards[:0]


def old_protection(dice: random.Random, image: NaiveGeneration, parent: NaiveGeneration, seen: Truth) -> None:
    """The mappings of the parent are kept."""
    image.mappings = parent.mappings


def forget_moved(dice: random.Random, image: NaiveGeneration, parent: NaiveGeneration, seen: Truth) -> None:
    """Where the parent has data at an address, that is taken, though another mapping lies there now."""
    held, old = image.contents[PRIVATE], parent.contents[PRIVATE]
    for n, m in _pairs(held.pages, old.pages):
        if held.data[n].any() and dice.random() < 0.005:
            held.data[n] = old.data[m]


MISTAKES: dict[str, Mistake] = {
    mistake.__name__: mistake
    for mistake in (
        drop_dirty,
        inherit_vanished,
        lose_new,
        stale_shared,
        zero_is_hole,
        torn,
        forget_guards,
        old_protection,
        forget_moved,
    )
}


class NaiveEngine:
    """See the module's text.  `mistake` is a key of `MISTAKES`, or empty."""

    def __init__(self, mistake: str = "", seed: int = 1) -> None:
        self.name = f"naive{'+' + mistake if mistake else ''}"
        self._mistake = MISTAKES[mistake] if mistake else None
        self._dice = random.Random(seed)
        self._parent: NaiveGeneration | None = None

    def dump(self, pid: int, *, incremental: bool) -> NaiveGeneration:
        with _stopped(pid):
            seen = truth.take(pid)
        image = NaiveGeneration(seen, self.name)
        if self._mistake and incremental and self._parent is not None:
            self._mistake(self._dice, image, self._parent, seen)
        self._parent = image
        return image

    def fail(self, pid: int) -> bool:
        return False

    def restore(self, generation: object) -> int:
        raise NotImplementedError("a naive engine restores nothing")

    def close(self) -> None:
        self._parent = None


@contextlib.contextmanager
def _stopped(pid: int) -> Iterator[None]:
    """All threads stand still; a target that was blocked goes on with what it was blocked in."""
    os.kill(pid, signal.SIGSTOP)
    try:
        for tid in os.listdir(f"/proc/{pid}/task"):
            while Path(f"/proc/{pid}/task/{tid}/stat").read_text().rpartition(")")[2].split()[0] not in "TZX":
                time.sleep(0.0001)
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def _pairs(left: U64, right: U64) -> list[tuple[int, int]]:
    _, n, m = np.intersect1d(left, right, return_indices=True)
    return list(zip(n.tolist(), m.tolist(), strict=True))
