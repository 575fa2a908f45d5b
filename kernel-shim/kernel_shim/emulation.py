# SPDX-License-Identifier: Apache-2.0
"""Exact soft-dirty tracking on a kernel without the patch: the merge barrier. Pure; the caller acts.

The mappings to be tracked are registered with a userfaultfd of the target in write-protect mode, and nothing
is ever write-protected. No page fault is delivered to anybody. But a registered mapping differs from every
new one, so the kernel does not merge them, ``VM_SOFTDIRTY`` of the new one does not spread, and bit 55 of
pagemap stays exact for the old one. It also keeps a clean mapping from swallowing the flag of a soft-dirty
one, the way in which stock kernels lose writes.

Order at a checkpoint, with the target frozen::

    read pagemap -> for each VMA ask trust() -> write 4 to clear_refs -> MergeBarrier.extend(all VMAs)

Extending after clearing matters: registering merges neighbours that became alike, and before the clear one of
them may still carry the flag.

What the target can notice: more mappings; a userfaultfd of its own cannot be registered on these ranges
(EBUSY); mremap() of a range that crosses a seam fails with EFAULT. All of it ends when the userfaultfd is
closed.

Facts measured on 6.1.192 and 6.12.117.
"""

from __future__ import annotations

import bisect
import dataclasses
import enum
import errno
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol


class VmaLike(Protocol):
    """What has to be known of a VMA. ``flags`` are the two-letter codes of VmFlags in smaps."""

    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def private_anonymous(self) -> bool: ...
    @property
    def flags(self) -> frozenset[str]: ...


class Mode(enum.Enum):
    """How soft-dirty tracking is done in a target."""

    PLAIN = "soft-dirty"
    PATCHED = "precise-soft-dirty"
    BARRIER = "soft-dirty with merge barrier"


class Trust(enum.Enum):
    """What a clear bit 55 of a page is worth in one VMA."""

    EXACT = "a clear bit means unchanged"
    COMPARE = "a clear bit proves nothing, compare the content with the parent"
    DUMP = "tracking does not cover this VMA, dump what is present"


# VmFlags of smaps: VM_PFNMAP, VM_IO, VM_DONTEXPAND and VM_MIXEDMAP are never merged, userfaultfd takes none of them
_SPECIAL = frozenset({"pf", "io", "de", "mm"})
# hugetlb has no soft-dirty bits
_HUGETLB = "ht"
# KSM replaces a page by one without the bit (6.1, 6.12: 31 of 32 rewritten pages read clean)
_MERGEABLE = "mg"
_UFFD = frozenset({"um", "uw", "ui"})
_UFFD_WP = "uw"
_SOFTDIRTY = "sd"


def needs_barrier(vma: VmaLike) -> bool:
    """Whether ``vma`` is to be registered: private anonymous memory that the kernel might merge.

    Memory of files is dumped by its copied pages and by content, see the dump rule, and a registered file
    mapping can hang the target (MADV_GUARD_INSTALL), so it is left alone.
    """
    return vma.private_anonymous and not vma.flags & (_SPECIAL | {_HUGETLB}) and not vma.flags & _UFFD


def trust(vma: VmaLike, mode: Mode, *, keeps_writes: bool, registered: bool = False) -> Trust:
    """What a clear bit 55 is worth in ``vma``, asked before the next clear.

    Args:
        vma: as it is at the checkpoint.
        mode: how the target is tracked since the parent.
        keeps_writes: the kernel loses no write by a merge (``probe``).
        registered: in barrier mode, ``vma`` lies within ranges which are registered with *our* userfaultfd.

    A VMA with ``sd`` reads dirty as a whole, which is safe: EXACT.
    """
    if vma.flags & {_HUGETLB, _MERGEABLE} or vma.flags & _SPECIAL:
        return Trust.DUMP
    if _SOFTDIRTY in vma.flags or mode is Mode.PATCHED:
        return Trust.EXACT
    if mode is Mode.BARRIER and registered and _UFFD_WP in vma.flags:
        return Trust.EXACT
    # plain, or lost its registration (moved by mremap): a merge may have taken the flag away
    return Trust.EXACT if keeps_writes else Trust.COMPARE


def over_reported(vmas: Iterable[VmaLike]) -> list[tuple[int, int]]:
    """Ranges that read dirty as a whole although most of it may be unchanged: compare their digests.

    For targets in which no userfaultfd can be had: spares the bytes, not the reading.
    """
    return [(vma.start, vma.end) for vma in vmas if vma.private_anonymous and _SOFTDIRTY in vma.flags]


@dataclasses.dataclass(frozen=True)
class BarrierReport:
    """Outcome of one ``extend``.

    Attributes:
        registered: ranges newly behind the barrier.
        foreign: ranges that belong to a userfaultfd of the target itself: dump in full.
        refused: ranges the kernel would not register, with the errno: ``trust`` says COMPARE for them.
    """

    registered: list[tuple[int, int]]
    foreign: list[tuple[int, int]]
    refused: list[tuple[int, int, int]]


class MergeBarrier:
    """The ranges of one target that are registered, kept in step with its VMAs.

    Args:
        register: registers ``[start, end)`` with the target's userfaultfd in write-protect mode
            (UFFDIO_REGISTER_MODE_WP); raises OSError as the ioctl does.
    """

    def __init__(self, register: Callable[[int, int], None]) -> None:
        self._register = register
        self._ranges: list[tuple[int, int]] = []

    @property
    def ranges(self) -> Sequence[tuple[int, int]]:
        """What was registered, sorted and disjoint."""
        return tuple(self._ranges)

    def covers(self, vma: VmaLike) -> bool:
        """Whether ``vma`` has been behind this barrier since the last ``extend``.

        Asked with the flags from before the clear. All of it was registered by us, the kernel still says so, and
        it carries no ``sd``, which a mapping made there since would. What grew in place is not covered this once.
        """
        if _UFFD_WP not in vma.flags or _SOFTDIRTY in vma.flags:
            return False
        index = bisect.bisect_right(self._ranges, vma.start, key=_start) - 1
        return index >= 0 and vma.end <= self._ranges[index][1]

    def extend(self, vmas: Iterable[VmaLike]) -> BarrierReport:
        """Register what is not registered yet. Call it after clear_refs, with the target frozen.

        Args:
            vmas: all VMAs of the target, with the flags they had before the clear.

        Raises:
            OSError: the userfaultfd or the target is gone (EBADF, ESRCH, ENOMEM).
        """
        kept: list[tuple[int, int]] = []
        registered: list[tuple[int, int]] = []
        foreign: list[tuple[int, int]] = []
        refused: list[tuple[int, int, int]] = []
        for vma in vmas:
            where = (vma.start, vma.end)
            if self.covers(vma):
                kept.append(where)
                continue
            # registered, but not known as ours: grown from ours, or the target's own; the kernel knows
            ours_perhaps = _UFFD_WP in vma.flags and self._overlaps(vma)
            if vma.flags & _UFFD and not ours_perhaps:
                foreign.append(where)
            elif ours_perhaps or needs_barrier(vma):
                try:
                    self._register(*where)
                except OSError as error:
                    if error.errno == errno.EBUSY:
                        foreign.append(where)
                    elif error.errno in (errno.EINVAL, errno.EPERM):
                        refused.append((*where, error.errno or 0))
                    else:
                        raise
                else:
                    registered.append(where)
        self._ranges = _joined(kept + registered)
        return BarrierReport(registered, foreign, refused)

    def _overlaps(self, vma: VmaLike) -> bool:
        index = bisect.bisect_left(self._ranges, vma.end, key=_start) - 1
        return index >= 0 and vma.start < self._ranges[index][1]


def _start(where: tuple[int, int]) -> int:
    return where[0]


def _joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    result: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result
