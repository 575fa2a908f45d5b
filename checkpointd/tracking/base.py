# SPDX-License-Identifier: Apache-2.0
"""The contract of every dirty tracker.

A tracker says, for a frozen target, which private pages *hold data* now and which of those are *clean*:
unchanged since the last committed collection.  It may call a clean page dirty; it must never call a dirty page
clean, nor claim data where there is none (a page that vanished must not come back from the parent).

Life of one dump, all on the thread that holds the freeze::

    collect(space)   while frozen: read presence and dirt, then start the next epoch
    commit()         the image is durable: what collect() reported is no longer pending
    rollback()       the dump failed: the next collect() reports all of it again

`attach(frozen)` arms the first epoch; nothing is clean before the first commit.  `disarm()` gives the target
back as it was found.  When the target replaced its address space, `collect` raises `TrackingLostError` and the caller
compares content with the parent's digests.

Shared memory, hugetlb and anything not private is no tracker's business: no tracker of one address space sees
every writer.  It is compared by digest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from checkpointd.memory import NO_RUNS, Runs, Vma

Ranges = Sequence[tuple[int, int]]
"""(start, end) addresses of VMAs, sorted."""


class TrackingLostError(Exception):
    """What was armed is gone (exec, a foreign clear_refs, a closed userfaultfd): trust nothing since then."""


@dataclass(frozen=True, slots=True)
class Found:
    """Runs of page numbers of the private object, sorted, disjoint.

    Attributes:
        clean: pages that hold data and did not change since the last committed collection.
        dirty: all other pages that hold data.
        nr_reported: pages the kernel's tracker itself called dirty (for `measure`; equals dirty where it
            cannot be told apart).
    """

    clean: Runs = field(default_factory=lambda: NO_RUNS)
    dirty: Runs = field(default_factory=lambda: NO_RUNS)
    nr_reported: int = 0


class Collection:
    """What a tracker found.

    What the target need not stand still for is worked out when it is first asked for: see `Found`.

    Attributes:
        guards: pages of guard regions (MADV_GUARD_INSTALL); they hold nothing.
        forced: pages in `dirty` only because their kind cannot be tracked (pinned, foreign uffd, KSM, ...).
        unread: the dirty pages that `Space.walk` does not have read; None where that takes all of `found`.
    """

    def __init__(
        self,
        found: Found | Callable[[], Found],
        *,
        guards: Runs = NO_RUNS,
        forced: Runs = NO_RUNS,
        unread: Runs | None = None,
    ) -> None:
        self._found = found
        self.guards, self.forced, self.unread = guards, forced, unread

    @property
    def found(self) -> Found:
        if not isinstance(self._found, Found):
            self._found = self._found()
        return self._found

    @property
    def clean(self) -> Runs:
        return self.found.clean

    @property
    def dirty(self) -> Runs:
        return self.found.dirty

    @property
    def nr_reported(self) -> int:
        return self.found.nr_reported


@dataclass(frozen=True, slots=True)
class Taken:
    """What was written in VMAs that have been registered since the last collection, and is armed again (walks.py).

    Attributes:
        seen: all of it, whatever it holds.
        runs: the pages of these that hold data; the very same array where all do.
        read: pages of `runs` that whoever made the walk is reading already; the same array where all are.
    """

    seen: Runs
    runs: Runs
    read: Runs = field(default_factory=lambda: NO_RUNS)


@dataclass(frozen=True, slots=True)
class Written:
    """What was written there, and what else is no longer what it was.

    Attributes:
        seen: all that was written, emptied or is a guard.
        runs: the pages of these that hold data.
        guards: the pages of guard regions.
        nr_reported: how many pages the kernel called written.
        read: see `Taken`.
    """

    seen: Runs
    runs: Runs
    guards: Runs
    nr_reported: int
    read: Runs = field(default_factory=lambda: NO_RUNS)


NOTHING_WRITTEN = Written(NO_RUNS, NO_RUNS, NO_RUNS, 0)

Walk = Callable[[Ranges, bool], Callable[[], Taken]]
"""Gets ranges, and whether the kernel knows the guard category; see `Space.walk`."""


@dataclass(frozen=True, slots=True)
class Space:
    """A frozen address space as trackers see it.

    Attributes:
        pagemap: descriptor of /proc/PID/pagemap, opened after the freeze.
        vmas: all VMAs with flags.
        always_dirty: page runs that must be read whatever the tracker says (pinned for I/O).
        walk: has `walks.take_written` made elsewhere, of these ranges, where what was written may be read at once; what
            it returns waits for the walk.  Called once at most.
    """

    pid: int
    pagemap: int
    vmas: tuple[Vma, ...]
    always_dirty: Runs = field(default_factory=lambda: NO_RUNS)
    walk: Walk | None = None


class Tracker(Protocol):
    name: str
    precision: str
    """One line for people: what it over-reports."""
    cost: str
    """One line for people: what it costs the target."""

    def collect(self, space: Space) -> Collection:
        """See the module's text.

        Raises:
            TrackingLostError: nothing can be called clean; the next epoch is armed all the same if possible.
        """

    def commit(self) -> None: ...
    def rollback(self) -> None: ...
    def disarm(self) -> None: ...
