# SPDX-License-Identifier: Apache-2.0
"""The merge barrier's decisions: what is registered, what is believed, what happens when the kernel refuses."""

from __future__ import annotations

import dataclasses
import errno
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_shim.emulation import MergeBarrier, Mode, Trust, needs_barrier, over_reported, trust

PAGE = 4096


@dataclasses.dataclass(frozen=True)
class Vma:
    start: int
    end: int
    private_anonymous: bool = True
    flags: frozenset[str] = frozenset({"rd", "wr", "sd"})


def vma(first: int, nr_pages: int, *flags: str, anonymous: bool = True) -> Vma:
    return Vma(first * PAGE, (first + nr_pages) * PAGE, anonymous, frozenset(flags))


class Kernel:
    """Registers what it is asked to, except where it was told to refuse."""

    def __init__(self, refusals: dict[int, int] | None = None) -> None:
        self.calls: list[tuple[int, int]] = []
        self.refusals = refusals or {}

    def register(self, start: int, end: int) -> None:
        if start in self.refusals:
            raise OSError(self.refusals[start], "refused")
        self.calls.append((start, end))


def test_only_private_anonymous_ordinary_memory_is_registered() -> None:
    assert needs_barrier(vma(1, 1, "rd", "wr", "sd"))
    assert needs_barrier(vma(1, 1, "rd", "wr", "gd"))
    assert not needs_barrier(vma(1, 1, "rd", "wr", anonymous=False))
    assert not needs_barrier(vma(1, 1, "rd", "de"))
    assert not needs_barrier(vma(1, 1, "rd", "wr", "ht"))
    assert not needs_barrier(vma(1, 1, "rd", "wr", "um"))


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("flag", ["ht", "mg", "pf", "io", "mm", "de"])
def test_memory_without_reliable_bits_is_always_dumped(mode: Mode, flag: str) -> None:
    assert trust(vma(1, 1, "rd", "wr", "uw", flag), mode, keeps_writes=True, registered=True) is Trust.DUMP


def test_plain_tracking_is_believed_only_where_merges_keep_writes() -> None:
    clean = vma(1, 4, "rd", "wr")
    assert trust(clean, Mode.PLAIN, keeps_writes=True) is Trust.EXACT
    assert trust(clean, Mode.PLAIN, keeps_writes=False) is Trust.COMPARE
    assert trust(clean, Mode.PATCHED, keeps_writes=False) is Trust.EXACT


def test_barrier_is_believed_only_while_the_registration_stands() -> None:
    for flags, registered, expected in [
        (("rd", "wr", "uw"), True, Trust.EXACT),
        (("rd", "wr"), True, Trust.COMPARE),
        (("rd", "wr", "uw"), False, Trust.COMPARE),
        (("rd", "wr", "sd"), False, Trust.EXACT),
    ]:
        assert trust(vma(1, 4, *flags), Mode.BARRIER, keeps_writes=False, registered=registered) is expected


def test_over_reported_names_soft_dirty_anonymous_vmas() -> None:
    seen = [vma(1, 4, "rd", "sd"), vma(5, 4, "rd"), vma(9, 1, "rd", "sd", anonymous=False)]
    assert over_reported(seen) == [(PAGE, 5 * PAGE)]


def test_a_vma_is_registered_once_and_then_covered() -> None:
    kernel = Kernel()
    barrier = MergeBarrier(kernel.register)
    report = barrier.extend([vma(1, 4, "rd", "wr", "sd")])
    assert report.registered == kernel.calls == [(PAGE, 5 * PAGE)]
    armed = vma(1, 4, "rd", "wr", "uw")
    assert barrier.covers(armed)
    assert barrier.extend([armed]).registered == []
    assert kernel.calls == [(PAGE, 5 * PAGE)]


def test_a_part_left_by_munmap_stays_covered() -> None:
    barrier = MergeBarrier(Kernel().register)
    barrier.extend([vma(1, 8, "rd", "wr")])
    assert barrier.covers(vma(3, 2, "rd", "wr", "uw"))
    assert not barrier.covers(vma(3, 2, "rd", "wr"))


def test_a_new_mapping_at_an_old_place_is_not_covered_and_registered_again() -> None:
    kernel = Kernel()
    barrier = MergeBarrier(kernel.register)
    barrier.extend([vma(1, 8, "rd", "wr")])
    fresh = vma(1, 8, "rd", "wr", "sd")
    assert not barrier.covers(fresh)
    assert barrier.extend([fresh]).registered == [(PAGE, 9 * PAGE)]


def test_a_vma_grown_in_place_is_not_covered_until_it_is_registered_as_a_whole() -> None:
    barrier = MergeBarrier(Kernel().register)
    barrier.extend([vma(1, 4, "rd", "wr")])
    grown = vma(1, 8, "rd", "wr", "uw")
    assert not barrier.covers(grown)
    barrier.extend([grown])
    assert barrier.covers(grown)


def test_memory_of_the_targets_own_userfaultfd_is_named_foreign() -> None:
    kernel = Kernel({PAGE: errno.EBUSY})
    barrier = MergeBarrier(kernel.register)
    report = barrier.extend([vma(1, 4, "rd", "wr"), vma(9, 4, "rd", "wr", "um")])
    assert report.foreign == [(PAGE, 5 * PAGE), (9 * PAGE, 13 * PAGE)]
    assert kernel.calls == []
    assert not barrier.covers(vma(1, 4, "rd", "wr", "uw"))


def test_the_targets_own_registration_on_our_old_range_is_not_taken_for_ours() -> None:
    kernel = Kernel()
    barrier = MergeBarrier(kernel.register)
    barrier.extend([vma(1, 4, "rd", "wr")])
    # unmapped, mapped again, registered by the target itself: new memory carries sd
    kernel.refusals[PAGE] = errno.EBUSY
    theirs = vma(1, 4, "rd", "wr", "sd", "uw")
    assert not barrier.covers(theirs)
    assert barrier.extend([theirs]).foreign == [(PAGE, 5 * PAGE)]
    assert not barrier.covers(vma(1, 4, "rd", "wr", "uw"))


def test_what_the_kernel_refuses_is_reported_and_not_covered() -> None:
    barrier = MergeBarrier(Kernel({PAGE: errno.EINVAL}).register)
    assert barrier.extend([vma(1, 4, "rd", "wr")]).refused == [(PAGE, 5 * PAGE, errno.EINVAL)]
    assert barrier.ranges == ()


def test_a_lost_userfaultfd_is_an_error() -> None:
    barrier = MergeBarrier(Kernel({PAGE: errno.ESRCH}).register)
    with pytest.raises(OSError, match="refused"):
        barrier.extend([vma(1, 4, "rd", "wr")])


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 6)), max_size=12), st.integers(0, 70))
def test_covered_is_exactly_what_was_registered(areas: list[tuple[int, int]], probe: int) -> None:
    barrier = MergeBarrier(Kernel().register)
    taken: set[int] = set()
    vmas = []
    for first, nr_pages in areas:
        pages = set(range(first, first + nr_pages))
        if not pages & taken:
            taken |= pages
            vmas.append(vma(first, nr_pages, "rd", "wr"))
    barrier.extend(sorted(vmas, key=lambda area: area.start))
    assert barrier.covers(vma(probe, 1, "rd", "uw")) is (probe in taken)
    ranges = barrier.ranges
    assert all(left[1] < right[0] for left, right in itertools.pairwise(ranges))
