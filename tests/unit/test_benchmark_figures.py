# SPDX-License-Identifier: Apache-2.0
"""The benchmarks that compare page sets count what they say they count."""

import numpy as np
import pytest

from benchmarks import against_criu, precision
from checkpointd.memory import runs_of
from checkpointd.tracking.base import Collection, Found
from tests.oracle.truth import Contents


def contents(pages):
    """Pages by number, each filled with one value."""
    data = np.array([[value] * 4096 for value in pages.values()], dtype=np.uint8).reshape(-1, 4096)
    return Contents(np.array(list(pages), dtype=np.uint64), data)


def runs(*pages):
    return runs_of(np.array(pages, dtype=np.uint64))


def test_what_changed_is_held_against_what_was_called_dirty():
    row = precision.Row("", "")
    before = contents({10: 1, 11: 1, 12: 1, 13: 1, 90: 1})
    now = contents({10: 1, 11: 2, 12: 2, 13: 1, 14: 5, 15: 5, 90: 2})
    # 10 over-reported, 11 seen, 12 called clean, 14 not named, 15 new and seen; 90 is of a file
    found = Collection(Found(clean=runs(12, 13, 90), dirty=runs(10, 11, 15), nr_reported=7))
    precision.judge(row, found, before, now, np.array([[0, 50]], dtype=np.uint64), np.array([11, 15]))
    assert (row.changed, row.missed, row.over, row.kernel, row.unmarked) == (4, 2, 1, 7, 2)


def test_pages_without_any_before_are_all_changed():
    row = precision.Row("", "")
    precision.judge(
        row,
        Collection(Found(dirty=runs(3, 4))),
        contents({}),
        contents({3: 0, 4: 9}),
        np.array([[0, 9]], np.uint64),
    )
    assert (row.changed, row.missed, row.over) == (2, 0, 0)


def test_a_figure_is_the_median_with_its_range_where_there_is_one():
    rows = [
        precision.Row("heap", "uffd-wp", changed=n, over=4, collect_us=[us, us])
        for n, us in ((9, 5), (7, 6), (30, 5))
    ]
    assert precision.cells(rows) == [
        "heap",
        "uffd-wp",
        "9 (7 to 30)",
        "0",
        "4",
        "0",
        "",
        "0",
        "0",
        "5 (5 to 6)",
    ]


@pytest.mark.parametrize("name", list(precision.traces_of(3, 0)))
def test_a_trace_fails_nowhere_without_a_tracker(name):
    """Or a failure would not be a tracker's side effect."""
    row = precision.play(name, precision.traces_of(3, 0)[name], "")
    assert row.failed == 0


def test_pages_and_bytes_of_criu_are_those_of_its_files(tmp_path, monkeypatch):
    program = tmp_path / "criu"
    program.write_text(
        "#!/bin/sh\n"
        "while [ $1 != -D ]; do shift; done; cd $2\n"
        "head -c 12288 /dev/zero > pages-1.img; echo mappings > pagemap-7.img; echo long > log\n"
        "for word; do case $word in ../*) ln -s $word parent;; esac; done\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    criu = against_criu.Criu(tmp_path / "images")
    for nr in range(2):
        found = criu.dump(1)
        assert (found.pages, found.nr_bytes) == (3, 12288 + 9)
        assert 0 < found.packed_bytes < 200
        assert (tmp_path / "images" / str(nr) / "parent").is_symlink() == bool(nr)


def test_a_line_sums_what_followed_the_first_dump():
    dumps = [against_criu.Dump(100, 1000), against_criu.Dump(5, 50), against_criu.Dump(6, 61)]
    assert against_criu.line("p", "t", dumps) == "| p | t | 100 | 1000 | 11 | 111 | 5 6 |"
