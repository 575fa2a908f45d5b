# SPDX-License-Identifier: Apache-2.0
"""Which tracker for this kernel and this target, with the reason in words.

`auto` takes the first that works of: uffd-wp, precise-soft-dirty (patched kernel), barrier-soft-dirty (its emulation on
any other), soft-dirty where merges lose no writes, content.  `precise` leaves the second and the third.
"""

from __future__ import annotations

from dataclasses import dataclass

from checkpointd.errors import KernelLacks, UsageError
from checkpointd.features import Features

BACKENDS = ("auto", "uffd-wp", "precise-soft-dirty", "barrier-soft-dirty", "soft-dirty", "content")
PRECISE = ("precise-soft-dirty", "barrier-soft-dirty")


@dataclass(frozen=True, slots=True)
class Choice:
    backend: str
    reason: str


def select_backend(
    asked: str,
    features: Features,
    *,
    injection_refused: str = "",
    switch_refused: str = "",
    precise: bool = False,
) -> Choice:
    """The backend to use.

    Args:
        asked: one of `BACKENDS`.
        injection_refused: why no userfaultfd can be made in this target; "" when it can.
        switch_refused: why precise tracking cannot be switched on in this target; "" when it can.
        precise: of the soft-dirty kind, and exact.

    Raises:
        UsageError: no backend of that name, or one that is not what `precise` asks for.
        KernelLacks: the backend asked for cannot work here.
    """
    if asked not in BACKENDS:
        raise UsageError(f"no backend named {asked!r}", hint=f"choose one of {', '.join(BACKENDS)}")
    if precise and asked not in ("auto", *PRECISE):
        raise UsageError(
            f"--precise does not go with --backend {asked}",
            hint=f"leave one of them out, or take {PRECISE[0]}",
        )
    if asked == "content":
        return Choice("content", "asked for")
    refusals = (injection_refused, switch_refused)
    if asked != "auto":
        missing = _missing(asked, features, *refusals)
        if missing:
            raise KernelLacks(
                f"the {asked} backend cannot be used: {missing}",
                hint="use --backend auto",
            )
        return Choice(asked, _reason(asked, features, "asked for"))
    why_not: list[str] = []
    for name in PRECISE if precise else BACKENDS[1:-1]:
        missing = _missing(name, features, *refusals)
        if not missing and name == "soft-dirty" and not features.soft_dirty_kinds.keeps_writes.works:
            missing = features.soft_dirty_kinds.keeps_writes.why
        if not missing:
            return Choice(name, _reason(name, features, "; ".join(why_not)))
        if missing not in why_not:
            why_not.append(missing)
    if precise:
        raise KernelLacks(
            f"precise soft-dirty tracking cannot be had: {'; '.join(why_not)}",
            hint="leave --precise out: `checkpoint check` says what tracking there is",
        )
    return Choice("content", why_not[0])


def _missing(name: str, features: Features, injection_refused: str, switch_refused: str) -> str:
    """Why this backend cannot work here; "" when it can."""
    kinds = features.soft_dirty_kinds
    if name == "uffd-wp":
        if not features.pagemap_scan:
            return "this kernel has no PAGEMAP_SCAN (Linux 6.7)"
        if not features.uffd_wp_async:
            notes = "; ".join(features.notes) or "no reason given"
            return f"asynchronous userfaultfd write-protect does not work: {notes}"
        return injection_refused
    if not kinds.soft_dirty.works:
        return kinds.soft_dirty.why
    if name == "precise-soft-dirty":
        return switch_refused if kinds.switch.works else kinds.switch.why
    if name == "barrier-soft-dirty":
        return injection_refused if kinds.barrier.works else kinds.barrier.why
    return ""


def _reason(name: str, features: Features, beside: str) -> str:
    kinds = features.soft_dirty_kinds
    text = {
        "uffd-wp": "exact to the page and cheapest to collect",
        "precise-soft-dirty": f"patched: {kinds.switch.why}",
        "barrier-soft-dirty": f"emulated: {kinds.barrier.why}",
        "soft-dirty": "over-reports where mappings merge"
        if kinds.keeps_writes.works
        else f"{kinds.keeps_writes.why}, so all content is compared",
    }[name]
    if beside == "asked for":
        return beside if name == "uffd-wp" else f"asked for; {text}"
    return f"{text} ({beside})" if beside else text
