# SPDX-License-Identifier: Apache-2.0
"""One dump under way: what the steps of a `Dumper` hand to each other."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from kernel_shim.limits import read_max_map_count

from checkpointd.dump.division import private_requests
from checkpointd.dump.limits import Limits
from checkpointd.dump.page_reading import CopyRequest
from checkpointd.dump.priority import AheadOfOthers
from checkpointd.dump.targets import KnownAlone
from checkpointd.memory import NO_RUNS, Runs, Vma, nr_pages_in
from checkpointd.procfs import maps
from checkpointd.state.process import ImageState
from checkpointd.stats import DumpStats
from checkpointd.target.files import FilesDraft
from checkpointd.target.fork import ForkedCopy
from checkpointd.target.memory import SpaceDraft
from checkpointd.target.policies import NO_POLICIES, Policies
from checkpointd.target.process import ProcessDraft
from checkpointd.tracking.base import Collection


@dataclass
class Work:
    """One dump under way.

    Attributes:
        copies: what is still to be read.
        early: pages that are read while the tracker is still collecting; not in `copies`.
        nr_resident: pages the target held before the freeze, about.
        found: what the tracker said, where the rest of it is asked for after the thaw.
        clean: pages taken from the parent.
        copy: the forked copy, from the moment it was made.
        alone: pages that nobody else mapped before the freeze, and how to tell inside that it is still so.
        still_alone: those of which that has been told.
    """

    stats: DumpStats
    limits: Limits
    copies: list[CopyRequest] = field(default_factory=list)
    early: Runs = field(default_factory=lambda: NO_RUNS)
    nr_resident: int = 0
    found: Collection | None = None
    clean: Runs = field(default_factory=lambda: NO_RUNS)
    state: ImageState | None = None
    process_draft: ProcessDraft | None = None
    maps_draft: maps.MapsDraft | None = None
    huge: Runs = field(default_factory=lambda: NO_RUNS)
    files_draft: FilesDraft | None = None
    space_draft: SpaceDraft | None = None
    copy: ForkedCopy | None = None
    alone: KnownAlone | None = None
    still_alone: Runs | None = None
    kernel_workers: bool = False
    ahead: AheadOfOthers = field(default_factory=AheadOfOthers)
    max_map_count: int = field(default_factory=read_max_map_count)
    started_ns: int = field(default_factory=time.monotonic_ns)

    @property
    def policies(self) -> Policies:
        return self.process_draft.policies if self.process_draft else NO_POLICIES

    def mark(self, phase: str, since_ns: int) -> int:
        """A phase has ended; the time, in nanoseconds."""
        now = time.monotonic_ns()
        self.stats.phases[phase] = self.stats.phases.get(phase, 0) + (now - since_ns) // 1000
        return now

    def settle(self) -> None:
        """Ask the tracker for what the target did not wait for, if anything."""
        if self.found is not None:
            self.clean = self.found.clean
            self.stats.pages_scanned += nr_pages_in(self.clean) + nr_pages_in(self.found.dirty)

    def private_requests(self, runs: Runs, vmas: Sequence[Vma]) -> list[CopyRequest]:
        """How private pages of the frozen target are to be read."""
        if len(runs) == 0:
            return []
        if self.still_alone is None:  # nobody shares more of a process that stands still
            self.still_alone = self.alone.still(self.stats.pid) if self.alone else NO_RUNS
        return private_requests(self.stats.pid, runs, self.still_alone, vmas)
