# SPDX-License-Identifier: Apache-2.0
"""What a dump is asked to do.  Values only; no errors."""

from __future__ import annotations

from dataclasses import dataclass, field

from checkpointd.state.files import FilesOptions


@dataclass(frozen=True, slots=True)
class DumpOptions:
    """What one dump is asked to do; see `checkpointd.agent.protocol.DumpArgs`."""

    store: str
    incremental: bool = False
    backend: str = "auto"
    kill: bool = False
    max_frozen_us: int = 0
    compress: str = ""
    tag: str = ""
    parent: str = ""
    read_mode: str = "auto"
    delta: bool = False
    files: FilesOptions = field(default_factory=FilesOptions)
    deadline_ns: int = 0  # monotonic; 0: none

    def why_no_deltas(self, parent: str) -> str:
        """Why no page can be stored as a difference; "" where some can, and where nobody asked."""
        if not self.delta:
            return ""
        if not parent:
            return "there is no parent to differ from"
        return "they need compression" if self.compress == "none" else ""
