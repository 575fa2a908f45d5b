# SPDX-License-Identifier: Apache-2.0
"""Measuring the soft-dirty backends, on programs built to fool them; in kernels of the lab (`make check-vm`)."""

import pytest

from checkpointd import features
from checkpointd.measure import engine
from checkpointd.measure.plan import plan_runs
from tests.integration.test_measure_truth import Target, Watched, area, in_area, measured

pytestmark = pytest.mark.needs("soft_dirty")


@pytest.fixture
def target():
    made = Target()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def watched(monkeypatch):
    Watched.seen = []
    monkeypatch.setattr(engine, "ReaderProcess", Watched)


def works(name):
    runs = plan_runs([], features.probe()).runs
    if not any(name in names for names in runs):
        pytest.skip(f"missing: the {name} backend on this kernel")
    return name


EXACT = ["precise-soft-dirty", "barrier-soft-dirty"]
MERGE = ("new(64, 16)", "write(9, *range(64, 80))", "write(2, 3, 5)")


def test_a_new_neighbour_dirties_a_clean_mapping_and_the_cause_is_named(target):
    name = works("soft-dirty")
    target.do("new(0, 64)", "write(1, *range(64))")
    (_, one), _ = measured(target, (), MERGE, backends=(name,))
    assert area(one["changed"]) == [3, 5, *range(64, 80)]
    found = one["soft-dirty bit"]
    assert found["causes"]["merged"] >= 62
    assert in_area(one, "soft-dirty bit") == [80, 18, 62, 0]
    assert one["soft-dirty"]["pages_missed"] == 0


@pytest.mark.parametrize("name", EXACT)
def test_exact_ways_report_the_new_neighbour_alone(target, name):
    works(name)
    target.do("new(0, 64)", "write(1, *range(64))")
    (_, one), _ = measured(target, (), MERGE, backends=(name,))
    for reporter in (name, f"{name} bit"):
        assert in_area(one, reporter) == [18, 18, 0, 0]
        assert one[reporter]["pages_missed"] == 0


@pytest.mark.parametrize("name", ["soft-dirty", *EXACT])
def test_a_write_of_the_same_bytes_is_silent(target, name):
    works(name)
    target.do("new(0, 16)", "write(1, *range(16))")
    (_, one), _ = measured(target, (), ("write(1, 2, 4, 8)", "write(9, 5)"), backends=(name,))
    assert in_area(one, f"{name} bit") == [4, 1, 3, 0]
    assert one[f"{name} bit"]["causes"]["silent"] >= 3


@pytest.mark.parametrize("name", ["soft-dirty", *EXACT])
def test_one_byte_dirties_a_huge_page(target, name):
    works(name)
    target.do("new(0, 1024)", "advise(0, 1024, 14)", "write(1, *range(1024))")
    (_, one), _ = measured(target, (), ("write(2, 700, size=1)",), backends=(name,))
    if not any(m.huge_bytes for m in one["truth"].mappings):
        pytest.skip("missing: transparent huge pages")
    assert area(one["changed"]) == [700]
    assert in_area(one, f"{name} bit") == [512, 1, 511, 0]
    assert one[f"{name} bit"]["causes"]["huge"] == 511


@pytest.mark.parametrize("name", ["soft-dirty", *EXACT])
def test_nothing_is_missed_whatever_the_kernel_loses(target, name):
    """Protection changes that merge marked and clean mappings: old kernels then forget that a write happened."""
    works(name)
    target.do("new(0, 64)", "write(1, *range(64))", "new(80, 16)", "write(1, *range(80, 96))")
    target.do("protect(80, 16, 1)")
    lose = ["new(64, 16)", "protect(0, 64, 0)", "protect(0, 64, 3)", "write(7, 10)", "protect(80, 16, 3)"]
    (_, one), _ = measured(target, (), lose, backends=(name,))
    assert 10 in area(one["changed"])
    assert one[name]["pages_missed"] == 0
    found = one[f"{name} bit"]
    if found["pages_missed"]:
        # what a tool that trusts the bit would have lost, found and named
        assert any(m["why"] == "it changed and was called clean" for m in found["missed"])


@pytest.mark.parametrize("name", ["soft-dirty", *EXACT])
def test_moved_dropped_and_pinned_memory_is_not_missed(target, name):
    works(name)
    target.do("new(0, 64)", "write(1, *range(64))", "new(1024, 1024)", "write(3, *range(1024, 2048))")
    seen, _ = measured(
        target,
        (),
        ("advise(4, 4, 4)", "move(16, 8, 100)", "write(5, 40)"),
        ("look(4)", "move(1024, 1024, 4096)", "move(100, 8, 16)"),
        (),
        backends=(name,),
    )
    assert [one[name]["pages_missed"] for one in seen] == [0, 0, 0, 0]


def test_runs_do_not_share_a_soft_dirty_bit():
    runs = plan_runs([], features.probe()).runs
    for names in runs:
        assert sum(name != "content" for name in names) == 1
