# SPDX-License-Identifier: Apache-2.0
"""Pools of huge pages in words and numbers: what smaps says, what a restore wants, what is being moved."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from checkpointd.errors import CheckpointError
from checkpointd.linux import hugetlb
from checkpointd.linux import pagemap_scan as ps
from checkpointd.linux.hugetlb import MAP_HUGETLB, Pool, size_flag
from checkpointd.memory import NO_PAGES, Vma, VmaKind
from checkpointd.procfs import maps
from checkpointd.restore import plan, pools
from checkpointd.state.memory import AddressSpace, SharedObject, VmaState
from checkpointd.target.process import vma_blockers
from checkpointd.target.shared_objects import pool_device
from checkpointd.tracking import pool_pages
from tests import abilities

HUGE, GIGA = 2 << 20, 1 << 30
AT = 1 << 40

SMAPS = f"""\
{AT:x}-{AT + 4 * HUGE:x} rw-p 00000000 00:11 99                     /anon_hugepage (deleted)
KernelPageSize:     2048 kB
Rss:                   0 kB
AnonHugePages:         0 kB
Shared_Hugetlb:     2048 kB
Private_Hugetlb:    4096 kB
VmFlags: rd wr mr mw me de ht
{AT + GIGA:x}-{AT + 2 * GIGA:x} rw-p 00000000 00:12 100                     /anon_hugepage (deleted)
KernelPageSize:  1048576 kB
Private_Hugetlb:       0 kB
VmFlags: rd wr mr mw me de ht
{AT + 3 * GIGA:x}-{AT + 3 * GIGA + 4096:x} rw-p 00000000 00:00 0
KernelPageSize:        4 kB
VmFlags: rd wr mr mw me ac
""".encode()


def test_page_sizes_and_what_is_in_memory_are_read_from_smaps() -> None:
    found = list(maps.parse_smaps(SMAPS))
    assert [vma.kind for vma in found] == [VmaKind.HUGETLB, VmaKind.HUGETLB, VmaKind.ANON]
    assert [vma.pool_page_bytes for vma in found] == [HUGE, GIGA, 0]
    assert maps.parse_pool_bytes(SMAPS) == {AT: 3 * HUGE}


def state(start: int, nr: int, size: int = HUGE, *flags: str, prot: int = 3) -> VmaState:
    return VmaState(
        start=start,
        end=start + nr * size,
        prot=prot,
        shared=False,
        offset=0,
        kind=VmaKind.HUGETLB,
        path="/anon_hugepage",
        flags=frozenset({"ht", *flags}),
        pool_page_bytes=size,
    )


def space(*vmas: VmaState) -> AddressSpace:
    return AddressSpace(tuple(vmas), (), ())


def pages(*addresses: int) -> npt.NDArray[np.uint64]:
    return np.array(sorted(address // 4096 for address in addresses), dtype=np.uint64)


def test_a_restore_wants_what_is_reserved_or_else_what_was_held() -> None:
    # behind 4 reserved pages 4 that are not, of which two are held, and one of 1 GiB
    free, big = AT + 4 * HUGE, AT + GIGA
    image = space(state(AT, 4), state(free, 4, HUGE, "nr"), state(big, 1, GIGA))
    held = pools.held_privately(image, lambda _: pages(AT, free + 4096, free + 8192, free + 3 * HUGE + 4096))
    assert {start: runs.tolist() for start, runs in held.items()} == {
        AT: [[AT // HUGE, 1]],
        free: [[free // HUGE, 1], [free // HUGE + 3, 1]],
        big: [],
    }
    assert pools.wanted(image, held, lambda _: NO_PAGES, lambda _: False) == {HUGE: 6, GIGA: 1}
    steps = plan.pool_steps(image, held)
    assert [step.call.args[:2] for step in steps] == [(AT, HUGE), (free, HUGE), (free + 3 * HUGE, HUGE)]


def test_a_restore_wants_a_shared_object_once() -> None:
    def obj(number: int, flavour: str, nr: int) -> SharedObject:
        return SharedObject(
            number, flavour, "", (0, 17), number, nr * HUGE - 99, hugetlb=True, pool_page_bytes=HUGE
        )

    def view(number: int, start: int, first: int, nr: int, *flags: str, shared: bool = True) -> VmaState:
        made = state(start, nr, HUGE, *flags)
        return dataclasses.replace(made, shared=shared, object=number, offset=first * HUGE)

    image = AddressSpace(
        (view(1, AT, 0, 3), view(1, AT + GIGA, 2, 2), view(2, AT + 2 * GIGA, 0, 9, "nr")),
        (),
        (obj(1, "memfd", 8), obj(2, "anon", 9), obj(3, "sysv", 5), obj(4, "sysv", 7)),
    )
    held = {1: pages(3 * HUGE, 7 * HUGE + 4096), 2: pages(4096, HUGE, HUGE + 4096), 3: NO_PAGES, 4: pages(0)}
    # of 1 four pages are reserved, one of these and one more held; of 2 two held; of 3 all; 4 is there
    found = pools.wanted(image, {}, lambda number: held[number], lambda number: number == 4)
    assert found == {HUGE: (4 + 1) + 2 + 5}


def test_segments_are_attached_where_their_pages_can_be() -> None:
    segment = SharedObject(1, "sysv", "", (0, 17), 5, HUGE + 1, hugetlb=True, pool_page_bytes=HUGE)
    made = dataclasses.replace(state(AT, 1, HUGE, "mw"), shared=True, object=1, offset=HUGE)
    image = AddressSpace((made,), (), (segment,))
    room = plan.scratch_bytes(image)
    for scratch in (AT - 4096, AT, AT + 4096):
        attach, move, away = plan.mapping_steps(image, {}, {1: 5}, scratch)
        at = attach.call.args[1]
        assert isinstance(at, int)
        assert at % HUGE == 0
        assert scratch <= at <= at + 2 * HUGE <= scratch + room
        assert move.call.args == (at + HUGE, HUGE, HUGE, 3, AT)
        assert away.call.args == (at, 2 * HUGE)


def test_what_is_missing_is_said_with_the_command_that_helps() -> None:
    have = {HUGE: Pool(HUGE, size=10, free=5, reserved=2, more=1)}
    assert pools.shortages({HUGE: 4}, have) == []
    (sentence,) = pools.shortages({HUGE: 6}, have)
    assert sentence == (
        "2 huge pages of 2048 KiB are missing: the process needs 6, and the pool can give 4; "
        "make room with `echo 12 > /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages`"
    )
    (sentence,) = pools.shortages({GIGA: 1}, have)
    assert sentence == "this machine has no huge pages of 1048576 KiB, of which the process needs 1"


def test_pools_are_read_and_a_count_below_zero_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for page_kib, numbers in ((2048, (10, 7, 3, 2, 6)), (1048576, (1, 1, 2**64 - 12, 0, 0))):
        directory = tmp_path / f"hugepages-{page_kib}kB"
        directory.mkdir()
        for name, number in zip(("nr", "free", "resv", "surplus", "nr_overcommit"), numbers, strict=True):
            (directory / f"{name}_hugepages").write_text(f"{number}\n")
    monkeypatch.setattr(hugetlb, "_POOLS", tmp_path)
    found = hugetlb.read_pools()
    assert found == {HUGE: Pool(HUGE, 10, 7, 3, 4), GIGA: Pool(GIGA, 1, 1, 0, 0)}
    assert [found[size].available for size in (HUGE, GIGA)] == [8, 1]
    assert found[HUGE].control == tmp_path / "hugepages-2048kB" / "nr_hugepages"


def test_mappings_are_made_of_the_right_pool_and_filled_before_they_are_protected() -> None:
    for prot, first in ((3, 3), (1, 3), (0, 2)):
        (step,) = plan.mapping_steps(space(state(AT, 1, GIGA, prot=prot)), {}, {})
        assert step.call.args[2] == first
        assert step.call.args[3] & (MAP_HUGETLB | 63 << 26) == MAP_HUGETLB | 30 << 26
    assert size_flag(HUGE) == 21 << 26


def vma(start: int, end: int, kind: VmaKind = VmaKind.HUGETLB, dev: tuple[int, int] = (0, 0)) -> Vma:
    return Vma(
        start, end, 3, False, 0, dev, 1, "/anon_hugepage", True, kind, frozenset({"ht"}), pool_page_bytes=HUGE
    )


def test_only_files_with_a_name_are_refused() -> None:
    abilities.require("hugetlb")
    device = pool_device(HUGE)
    ours = (device >> 8 & 0xFFF, device & 0xFF | device >> 12 & 0xFFF00)
    assert vma_blockers([vma(AT, AT + HUGE, dev=ours)]) == []
    (sentence,) = vma_blockers([vma(AT, AT + HUGE, dev=(ours[0], ours[1] + 1))])
    assert "is of a file on a mounted hugetlbfs, which is not saved" in sentence


HERE, MOVING, MARKER = (
    ps.PAGE_IS_PRESENT | ps.PAGE_IS_WRITTEN,
    ps.PAGE_IS_SWAPPED | ps.PAGE_IS_WRITTEN,
    ps.PAGE_IS_SWAPPED,
)


def regions(*rows: tuple[int, int, int]) -> ps.Regions:
    return np.array(rows, dtype=np.uint64).reshape(-1, 3)


def looks(*found: ps.Regions) -> Iterator[ps.Regions]:
    yield from found
    raise AssertionError("looked once too often")


def test_a_page_that_is_being_moved_is_looked_at_again() -> None:
    there = regions((AT, AT + HUGE, HERE))
    seen = looks(regions((AT, AT + HUGE, MOVING)), regions((AT, AT + HUGE, MOVING)), there)
    assert pool_pages.scan_at_rest(lambda: next(seen), [vma(AT, AT + HUGE)]) is there


def test_markers_and_other_memory_are_not_waited_for() -> None:
    found = regions((AT - 4096, AT, MOVING), (AT, AT + HUGE, MARKER), (AT + HUGE, AT + HUGE + 4096, MOVING))
    around = [vma(AT - 4096, AT, VmaKind.ANON), vma(AT, AT + HUGE)]
    seen = looks(found)
    assert pool_pages.scan_at_rest(lambda: next(seen), around) is found


def test_a_page_that_stays_away_fails_the_dump(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_pages, "MOVE_S", 0)
    found = regions((AT - 4096, AT + HUGE, MOVING))
    with pytest.raises(CheckpointError, match=f"the huge page at {AT:#x} can be neither read nor called"):
        pool_pages.scan_at_rest(lambda: found, [vma(AT - 4096, AT, VmaKind.ANON), vma(AT, AT + HUGE)])


def test_words_are_read_again_until_they_show_what_smaps_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    mapping = vma(AT, AT + 2 * HUGE)
    monkeypatch.setattr(maps, "read_pool_bytes", lambda pid: {AT: 2 * HUGE})
    one, both = regions((AT, AT + HUGE, HERE)), regions((AT, AT + 2 * HUGE, HERE))
    seen = looks(one, both)
    assert pool_pages.words_at_rest(1, lambda: next(seen), [mapping]) is both
    monkeypatch.setattr(pool_pages, "MOVE_S", 0)
    with pytest.raises(CheckpointError, match=r"a huge page of mapping .*anon_hugepage can be neither"):
        pool_pages.words_at_rest(1, lambda: one, [mapping])
