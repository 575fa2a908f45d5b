# SPDX-License-Identifier: Apache-2.0
"""Judging reports, on made-up truths: every cause, every way to miss a page."""

import numpy as np
import pytest

from checkpointd.measure.account import CAUSES, Report, Truth, judge
from checkpointd.measure.reader import _compare
from checkpointd.measure.truth import OBJECTS, Mapping, _own_words, object_page, parse_smaps

NONE = np.zeros(0, dtype=np.uint64)


def pages(*numbers):
    return np.array(sorted(numbers), dtype=np.uint64)


def mapping(first, last, path="", *flags, huge=0, prot="rw-p"):
    return Mapping(first << 12, last << 12, prot, path, frozenset(flags), huge, True)


def truth(before, now, written=(), mappings=None, zero=(), zero_before=(), objects=()):
    before, now = pages(*before), pages(*now)
    return Truth(
        mappings or [mapping(0, 10_000)],
        before,
        np.isin(before, list(zero_before)),
        now,
        np.isin(now, list(zero)),
        pages(*written),
        objects,
    )


def causes_of(verdict):
    assert set(verdict.causes) == set(CAUSES)
    assert sum(verdict.causes.values()) == len(verdict.reported)
    return {name: nr for name, nr in verdict.causes.items() if nr}


def test_every_reported_page_has_one_cause():
    found = judge(
        truth(range(10), range(12), written=[1, 2], zero=[11]),
        Report(pages(0, 5, 6, 7, 8, 9), pages(1, 2, 3, 4, 10, 11), forced=pages(4)),
    )
    assert causes_of(found) == {"written": 2, "new": 1, "new_zero": 1, "forced": 1, "silent": 1}
    assert (found.nr_changed, found.nr_over, len(found.missed)) == (3, 3, 0)


def test_a_marked_vma_is_a_merge_for_soft_dirty_only():
    world = truth(range(20), range(20), written=[0, 10], mappings=[mapping(0, 10), mapping(10, 20, "", "sd")])
    report = Report(pages(*range(1, 9)), pages(0, 9, *range(10, 20)), soft_dirty=True)
    assert causes_of(judge(world, report)) == {"written": 2, "merged": 9, "silent": 1}
    report.soft_dirty = False
    assert causes_of(judge(world, report)) == {"written": 2, "silent": 10}


def test_a_whole_huge_page_is_one_cause_of_soft_dirty():
    world = truth(range(1024), range(1024), written=[3], mappings=[mapping(0, 1024, huge=4 << 20)])
    found = judge(world, Report(pages(*range(513, 1024)), pages(*range(513)), soft_dirty=True))
    assert causes_of(found) == {"written": 1, "huge": 511, "silent": 1}


def test_merged_memory_and_files_are_forced():
    world = truth(
        range(30),
        range(30),
        mappings=[mapping(0, 10, "/lib/x.so"), mapping(10, 20, "", "mg"), mapping(20, 30, "[heap]")],
    )
    found = judge(world, Report(NONE, pages(*range(30)), soft_dirty=True))
    assert causes_of(found) == {"forced": 20, "silent": 10}


@pytest.mark.parametrize(
    ("world", "report", "why"),
    [
        (truth([1, 2], [1, 2], written=[2]), Report(pages(1, 2), NONE), "it changed and was called clean"),
        (truth([1, 2], [1]), Report(pages(1, 2), NONE), "it is gone and was called clean"),
        (truth([1], [1, 2]), Report(pages(1, 2), NONE), "it held no data before and was called clean"),
        (truth([1, 2], [1, 2]), Report(pages(1), NONE), "it holds data and was not mentioned"),
        (
            truth([1], [1, 2], zero=[2], mappings=[mapping(0, 9, "/lib/x.so")]),
            Report(NONE, pages(1)),
            "it holds data and was not mentioned",
        ),
    ],
)
def test_each_way_to_lose_a_page_is_told(world, report, why):
    found = judge(world, report)
    assert found.missed.tolist() == [2]
    assert found.missed_why == [why]
    assert found.to_dict(world)["missed"][0]["page"].startswith("2000 in 0-")
    assert [row[-1] for row in found.mappings if row[-1]] == [1]


@pytest.mark.parametrize(
    ("world", "report"),
    [
        (truth([1], [1, 2], zero=[2]), Report(pages(1), NONE)),  # a page of zeroes nobody wrote
        (
            truth([1, 2], [1], zero_before=[2]),
            Report(pages(1, 2), NONE),
        ),  # zeroes that are gone read as zeroes
        (truth([1, 2], [1]), Report(pages(1), NONE)),  # gone, and not mentioned
        (truth([1], [1]), Report(NONE, pages(1, 9))),  # saved although it holds nothing
    ],
)
def test_what_reads_the_same_after_a_restore_is_not_missed(world, report):
    assert judge(world, report).missed.tolist() == []


def test_shared_objects_are_compared_by_every_backend():
    shared = [object_page(1, n) for n in range(4)]
    world = truth([5, *shared], [5, *shared], written=[shared[2]], objects=("a", "/memfd:b"))
    found = judge(world, Report(pages(5), NONE))
    assert found.reported.tolist() == [shared[2]]
    assert found.nr_read == 4
    assert found.mappings == [[-2, 1, 1, 0, 0]]
    assert world.name(shared[2]) == "shared /memfd:b page 2"
    assert object_page(0, 0) == OBJECTS


def test_lines_that_differ_are_counted():
    old = np.zeros((3, 4096), dtype=np.uint8)
    new = old.copy()
    new[1, 63], new[1, 64], new[2] = 1, 1, 9
    at = np.arange(3)
    differs, lines = _compare(old, at, new, at)
    assert differs.tolist() == [False, True, True]
    assert lines.tolist() == [2, 64]


def test_what_holds_data_is_told_by_pagemap_words(tmp_path):
    present, swap, file_page, guard, soft = 1 << 63, 1 << 62, 1 << 61, 1 << 58, 1 << 55
    words = [
        *(present | soft, present | file_page, swap | 0x40, swap | 0x3F, swap | guard | 0x9F),
        *(
            swap | file_page | 0x60,
            0,
            swap,
        ),  # migrating page of a file, hole, swap entry hidden from this user
    ]
    path = tmp_path / "pagemap"
    path.write_bytes(np.array([0] * 8 + words, dtype=np.uint64).tobytes())
    with path.open("rb") as file:
        found = list(_own_words(file.fileno(), mapping(8, 16)))
    assert found[0][0].tolist() == [8, 10, 15]
    assert [bool(word >> 55 & 1) for word in found[0][1].tolist()] == [True, False, False]


def test_smaps_is_read_by_a_parser_of_its_own():
    text = (
        b"7f00-8f00 rw-p 00000000 00:00 0                          [heap]\n"
        b"Rss:                   4 kB\nAnonHugePages:      2048 kB\nSwap:                  0 kB\n"
        b"VmFlags: rd wr mr mw me ac sd \n"
        b"9f00-af00 r--p 00000000 fe:01 42 /usr/lib/with space.so (deleted)\n"
        b"Rss:                   0 kB\nSwap:                  0 kB\nVmFlags: rd mr\n"
    )
    heap, library = parse_smaps(text)
    assert (heap.path, heap.huge_bytes, heap.resident, heap.anonymous) == ("[heap]", 2 << 20, True, True)
    assert "sd" in heap.flags
    assert (library.path, library.resident) == ("/usr/lib/with space.so (deleted)", False)
    assert not library.anonymous
