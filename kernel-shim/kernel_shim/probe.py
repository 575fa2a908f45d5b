# SPDX-License-Identifier: Apache-2.0
"""What this kernel can do for exact soft-dirty tracking, found by trying, never by its version.

``clear_refs`` succeeds on kernels without soft-dirty tracking, ``PAGEMAP_SCAN`` takes the category there,
distributions backport: only a page that is written, cleared, looked at, written and looked at again tells
the truth. The attempts are made in a process of their own (``_probe_child``), because clearing would spoil
somebody's tracking and the switch would stay.

Five questions are answered:

* does soft-dirty work at all;
* is there the switch of the patched kernel, and does it keep a clean mapping clean;
* can a userfaultfd serve as merge barrier, and does it;
* does an ordinary merge lose writes (Linux kernel commit 6707915e030a ("mm: propagate VM_SOFTDIRTY on merge")
  (in v6.19) ends that); if so, plain soft-dirty tracking is not safe and must not be used alone;
* do pages read dirty where mremap put them, also when it moves whole page tables (asked with the switch on where
  there is one: the patch sees to it).
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

CHILD = Path(__file__).with_name("_probe_child.py")
TIMEOUT_SECONDS = 30.0


class Precision(enum.Enum):
    """How soft-dirty tracking can be made exact here."""

    PATCHED = "patched"
    EMULATED = "emulated"
    NEITHER = "neither"


@dataclasses.dataclass(frozen=True)
class Finding:
    """The answer to one question, and the observation it rests on."""

    works: bool
    why: str


@dataclasses.dataclass(frozen=True)
class ProbeResult:
    """The answers of one kernel to one user.

    Attributes:
        soft_dirty: written pages read dirty, cleared ones clean.
        switch: the prctl exists and a mapping made next to a clean one leaves it clean.
        barrier: a userfaultfd can be had, and a mapping made next to a registered one leaves it clean.
        keeps_writes: an mprotect merge does not make written pages read clean (without switch or barrier).
        marks_moves: moved page tables read dirty (with the switch on where there is one).
    """

    soft_dirty: Finding
    switch: Finding
    barrier: Finding
    keeps_writes: Finding
    marks_moves: Finding

    @property
    def precision(self) -> Precision:
        """The best way to be exact."""
        if self.soft_dirty.works and self.switch.works:
            return Precision.PATCHED
        if self.soft_dirty.works and self.barrier.works:
            return Precision.EMULATED
        return Precision.NEITHER

    @property
    def why(self) -> str:
        """One sentence for a person: what will be used and what stands against the better choice."""
        if not self.soft_dirty.works:
            return f"neither: {self.soft_dirty.why}"
        if self.precision is Precision.PATCHED:
            return f"patched: {self.switch.why}"
        if self.precision is Precision.EMULATED:
            return f"emulated by a merge barrier: {self.switch.why}; {self.barrier.why}"
        return f"neither: {self.switch.why}; {self.barrier.why}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**dataclasses.asdict(self), "precision": self.precision.value, "why": self.why}


def parse(report: str) -> ProbeResult:
    """Turn the child's report (JSON) into a result.

    Raises:
        ValueError: it is not such a report.
    """
    try:
        told = json.loads(report)
        return ProbeResult(
            **{
                field.name: Finding(bool(told[field.name]["works"]), str(told[field.name]["why"]))
                for field in dataclasses.fields(ProbeResult)
            }
        )
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"not a probe report: {report[:200]!r}") from error


def nothing(why: str) -> ProbeResult:
    """The result of a kernel that can do none of it."""
    finding = Finding(False, why)
    return ProbeResult(*[finding] * 5)


def probe_now(timeout_seconds: float = TIMEOUT_SECONDS) -> ProbeResult:
    """Try everything, in a child process; a child that cannot tell counts as "no" with its complaint.

    Never raises for what the kernel answers; the child is killed when its time is up.
    """
    return _ask_child(timeout_seconds) or nothing(f"the probe did not end within {timeout_seconds:.0f} s")


def _ask_child(timeout_seconds: float) -> ProbeResult | None:
    """None: its time was up."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", str(CHILD)],
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            stdin=subprocess.DEVNULL,
            env={"LC_ALL": "C", "PATH": os.defpath},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    except OSError as error:
        return nothing(f"the probe could not be started: {error}")
    try:
        return parse(done.stdout)
    except ValueError:
        complaint = done.stderr.strip().splitlines()
        return nothing(
            f"the probe ended with {done.returncode}: {complaint[-1] if complaint else 'no report'}"
        )


@functools.cache
def probe() -> ProbeResult:
    """As ``probe_now``, once per process: the kernel does not change under us.

    It is asked a second time, with more patience, when a busy machine has let the time pass: the answer stays.
    """
    return _ask_child(TIMEOUT_SECONDS) or probe_now(2 * TIMEOUT_SECONDS)
