# SPDX-License-Identifier: Apache-2.0
"""Which trackers run side by side, and which need a run of their own.  Pure but for the features given.

`content` only reads, so it runs beside every other.  All others are alone: they share the state they look at.
A userfaultfd registration keeps new VMAs from merging into old ones, which is just what plain soft-dirty suffers
from: beside uffd-wp it would look as exact as barrier-soft-dirty is, which is nothing but that registration.  The
soft-dirty backends share one bit per page and one clear for the whole process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from checkpointd.errors import KernelLacks, UsageError
from checkpointd.features import Features
from checkpointd.tracking.select import BACKENDS, select_backend

PASSIVE = "content"


@dataclass(frozen=True, slots=True)
class Plan:
    """`runs`: names side by side, one tuple a run.  `unavailable`: backend -> why it cannot run here."""

    runs: tuple[tuple[str, ...], ...]
    unavailable: dict[str, str]


def plan_runs(asked: Sequence[str], features: Features) -> Plan:
    """The runs for the backends asked for; with none asked for, all that work here.

    Raises:
        UsageError: no backend of that name.
        KernelLacks: one that was asked for by name cannot work here.
    """
    known = [name for name in BACKENDS if name != "auto"]
    for name in asked:
        if name not in known:
            raise UsageError(f"no backend named {name!r}", hint=f"choose of {', '.join(known)}")
    unavailable: dict[str, str] = {}
    usable: list[str] = []
    for name in dict.fromkeys(asked or known):
        try:
            select_backend(name, features)
        except KernelLacks as error:
            if asked:
                raise
            unavailable[name] = error.message
        else:
            usable.append(name)
    passive = [PASSIVE] if PASSIVE in usable else []
    alone = [name for name in usable if name != PASSIVE]
    runs = tuple((name, *passive) for name in alone) or (tuple(passive),)
    return Plan(runs, unavailable)
