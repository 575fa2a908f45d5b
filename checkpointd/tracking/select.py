# SPDX-License-Identifier: Apache-2.0
"""Which tracker for this kernel and this target, with the reason in words.

`auto` takes the first of: uffd-wp, content.
"""

from __future__ import annotations

from dataclasses import dataclass

from checkpointd.errors import KernelLacks, UsageError
from checkpointd.features import Features

BACKENDS = ("auto", "uffd-wp", "content")


@dataclass(frozen=True, slots=True)
class Choice:
    backend: str
    reason: str


def select_backend(asked: str, features: Features, *, injection_refused: str = "") -> Choice:
    """The backend to use.

    Args:
        asked: one of `BACKENDS`.
        injection_refused: why no userfaultfd can be made in this target; "" when it can.

    Raises:
        UsageError: no backend of that name.
        KernelLacks: the backend asked for cannot work here.
    """
    if asked not in BACKENDS:
        raise UsageError(f"no backend named {asked!r}", hint=f"choose one of {', '.join(BACKENDS)}")
    if asked == "content":
        return Choice("content", "asked for")
    if not features.pagemap_scan:
        missing = "this kernel has no PAGEMAP_SCAN (Linux 6.7)"
    elif not features.uffd_wp_async:
        missing = "asynchronous userfaultfd write-protect does not work: " + (
            "; ".join(features.notes) or "no reason given"
        )
    elif injection_refused:
        missing = injection_refused
    else:
        return Choice(
            "uffd-wp", "asked for" if asked != "auto" else "exact to the page and cheapest to collect"
        )
    if asked == "uffd-wp":
        raise KernelLacks(f"the uffd-wp backend cannot be used: {missing}", hint="use --backend content")
    return Choice("content", missing)
