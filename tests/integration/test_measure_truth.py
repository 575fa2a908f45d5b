# SPDX-License-Identifier: Apache-2.0
"""The measuring itself, on programs whose dirty set is known to the page, some of them built to fool a tracker.

The reader runs in this process, so that the exact sets of pages can be looked at.
"""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from checkpointd import features
from checkpointd.measure import engine, reader
from checkpointd.measure.account import Report, judge
from checkpointd.memory import intersect_runs, pages_of, runs_of, subtract_runs
from checkpointd.tracking.base import Collection, Found

PROGRAM = Path(__file__).parents[1] / "programs" / "measure_program.py"
FIRST = 0x7E00_0000_0000 >> 12
LAST = FIRST + (1 << 20)

pytestmark = pytest.mark.needs("ptrace", "pagemap_scan")


class Target:
    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, str(PROGRAM)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self.process.pid

    def do(self, *lines):
        for line in lines:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            assert self.process.stdout.readline().strip() == "ok", line

    def close(self):
        self.process.stdin.close()
        self.process.wait(60)


@pytest.fixture
def target():
    made = Target()
    yield made
    made.close()


class Watched(reader._Server):
    """The reader's end without its process; keeps every truth and every report."""

    seen: list

    def settle(self, reports):
        self.verdicts = {}
        found = super().settle(reports)
        if self.verdicts:
            Watched.seen.append(self.verdicts)
        return found

    def _judge(self, truth, sizes, given, digests, bytes_stored):
        if given["backend"] != "content":
            clean, dirty, forced = (pages_of(given[name]) for name in ("clean", "dirty", "forced"))
            verdict = judge(truth, Report(clean, dirty, forced))
            self.verdicts["reported"] = verdict.reported
        self.verdicts["changed"] = truth.changed()
        self.verdicts["truth"] = truth
        found = super()._judge(truth, sizes, given, digests, bytes_stored)
        self.verdicts[given["backend"]] = found
        return found

    def close(self):
        pass


@pytest.fixture(autouse=True)
def watched(monkeypatch):
    Watched.seen = []
    monkeypatch.setattr(engine, "ReaderProcess", Watched)
    return Watched


def area(pages):
    """Pages of the area, counted from its start."""
    return [int(page) - FIRST for page in pages if FIRST <= page < LAST]


def measured(target, *epochs, backends=("uffd-wp", "content")):
    """Each epoch is a tuple of lines for the target; what was seen in each."""
    records = []

    def between(epoch):
        target.do(*epochs[epoch - 1])

    options = engine.MeasureOptions(epochs=len(epochs), backends=backends, baseline_us=0)
    end = engine.measure(target.pid, options, records.append, between=between)
    assert end["reason"] == "done"
    return Watched.seen[-len(epochs) :], records


def in_area(seen, backend):
    """[reported, changed, over, missed] of the mappings in the area."""
    truth = seen["truth"]
    rows = [
        row
        for row in seen[backend]["mappings"]
        if row[0] < 0 or (row[0] < len(truth.mappings) and FIRST <= truth.mappings[row[0]].start >> 12 < LAST)
    ]
    return np.array(rows, dtype=np.int64).reshape(-1, 5)[:, 1:].sum(axis=0).tolist()


@pytest.mark.needs("uffd_wp")
def test_writes_are_seen_to_the_page_and_epoch_by_epoch(target):
    target.do("new(0, 64)", "write(1, *range(64))")
    seen, _ = measured(target, ("write(2, 3, 5, 6, 40)",), (), ("write(3, 63)", "write(3, 0)"))
    for one, wanted in zip(seen, ([3, 5, 6, 40], [], [0, 63]), strict=True):
        assert area(one["changed"]) == wanted
        assert area(one["reported"]) == wanted
        assert one["uffd-wp"]["pages_missed"] == one["content"]["pages_missed"] == 0
        assert in_area(one, "uffd-wp") == in_area(one, "content") == [len(wanted), len(wanted), 0, 0]


@pytest.mark.needs("uffd_wp")
def test_a_write_of_the_same_bytes_is_silent_and_no_change(target):
    target.do("new(0, 16)", "write(1, *range(16))")
    ((one,), _) = measured(target, ("write(1, 2, 4, 8)", "write(9, 5)"))
    assert area(one["changed"]) == [5]
    assert area(one["reported"]) == [2, 4, 5, 8]
    assert in_area(one, "uffd-wp") == [4, 1, 3, 0]
    assert in_area(one, "content") == [1, 1, 0, 0]
    assert one["uffd-wp"]["pages_silent"] >= 3
    assert one["content"]["pages_silent"] == 0


@pytest.mark.needs("uffd_wp")
def test_lines_and_differences_within_a_page_are_counted(target):
    target.do("new(0, 16)", "write(7, *range(16), size=4096)")
    _, records = measured(target, ("write(8, 1, offset=60, size=8)", "write(8, 2, size=4096)"))
    after = next(r for r in records if r["type"] == "epoch" and r["epoch"] == 1)
    # two lines of page 1, all 64 of page 2; the interpreter's own pages change a little either way
    others = after["pages_written"] - 2
    assert 66 + others <= after["lines_changed"] <= 66 + 64 * others
    assert after["bytes_xor"] > 0
    assert after["bytes_lines"] == after["lines_changed"] * 64 + after["pages_written"] * 8


@pytest.mark.needs("uffd_wp")
def test_dropped_pages_do_not_come_back(target):
    target.do("new(0, 32)", "write(1, *range(32))")
    seen, _ = measured(
        target,
        ("advise(4, 4, 4)",),  # MADV_DONTNEED
        ("look(4)", "advise(8, 2, 4)", "write(1, 8)", "advise(10, 1, 4)", "write(0, 10)"),
    )
    first, second = seen
    assert area(first["truth"].before) == list(range(32))
    assert area(first["truth"].now) == [*range(4), *range(8, 32)]
    assert first["uffd-wp"]["pages_missed"] == 0
    # page 8 came back with its old bytes, page 9 is gone, page 10 holds zeroes now
    assert area(second["changed"]) == [10]
    assert {8, 10} <= set(area(second["reported"])) <= {4, 8, 10}
    assert second["uffd-wp"]["pages_missed"] == second["content"]["pages_missed"] == 0


@pytest.mark.needs("uffd_wp")
def test_moved_mappings_are_new_where_they_are_and_gone_where_they_were(target):
    target.do("new(0, 8)", "write(1, *range(8))", "new(100, 8)", "write(2, *range(100, 108))")
    seen, _ = measured(target, ("move(0, 8, 50)",), ("move(100, 8, 0)", "move(50, 8, 8)"))
    assert area(seen[0]["changed"]) == list(range(50, 58))
    assert set(range(50, 58)) == set(area(seen[0]["reported"]))
    assert area(seen[1]["changed"]) == list(range(16))
    assert set(range(16)) == set(area(seen[1]["reported"]))
    assert all(one[name]["pages_missed"] == 0 for one in seen for name in ("uffd-wp", "content"))


@pytest.mark.needs("uffd_wp")
def test_a_new_mapping_beside_a_clean_one_does_not_dirty_it(target):
    target.do("new(0, 8)", "write(1, *range(8))")
    seen, _ = measured(
        target,
        ("new(8, 8)", "write(1, *range(8, 16))"),
        ("protect(0, 8, 1)", "protect(0, 8, 3)", "protect(8, 8, 3)", "write(2, 0)"),
    )
    assert area(seen[0]["reported"]) == list(range(8, 16))
    assert in_area(seen[0], "uffd-wp") == [8, 8, 0, 0]
    assert area(seen[1]["changed"]) == area(seen[1]["reported"]) == [0]


@pytest.mark.needs("uffd_wp")
def test_a_write_by_another_process_into_shared_memory_counts(target):
    target.do(
        "fd = os.memfd_create('shared'); os.ftruncate(fd, 16 * PAGE)",
        "new(0, 16, flags=0x11, fd=fd)",  # MAP_FIXED|MAP_SHARED
        "write(1, *range(16))",
    )
    ((one,), _) = measured(target, ("elsewhere(fd, 9, 11)",))
    truth = one["truth"]
    where = [int(page) & 0xFFFF for page in one["changed"] if page >= 1 << 52]
    assert where == [11]
    assert any(name.startswith("/memfd:shared") for name in truth.objects)
    for name in ("uffd-wp", "content"):
        assert one[name]["pages_missed"] == 0
        assert [row[1:] for row in one[name]["mappings"] if row[0] < 0] == [[1, 1, 0, 0]]
    assert one["uffd-wp"]["pages_read"] >= 16  # shared memory is read whole, whatever changed


@pytest.mark.needs("uffd_wp")
def test_a_direct_read_into_a_clean_page_counts(target, tmp_path):
    source = tmp_path / "block"
    source.write_bytes(b"d" * 4096)
    target.do("new(0, 8)", "write(1, *range(8))")
    try:
        target.do(f"fd = os.open({str(source)!r}, os.O_RDONLY | os.O_DIRECT); os.close(fd)")
    except AssertionError:
        pytest.skip("missing: O_DIRECT on the file system of the temporary directory")
    ((one,), _) = measured(target, (f"direct({str(source)!r}, 3)",))
    assert area(one["changed"]) == area(one["reported"]) == [3]
    assert one["uffd-wp"]["pages_missed"] == 0


@pytest.mark.needs("uffd_wp", "io_uring")
def test_a_write_behind_the_page_tables_is_not_missed(target, tmp_path):
    (tmp_path / "source").write_bytes(b"u" * 4096)
    target.do("new(0, 8)", "write(1, *range(8))", "ring = Ring(5)")
    target.do(f"source = os.open({str(tmp_path / 'source')!r}, os.O_RDONLY)")
    ((one,), _) = measured(target, ("ring.read(source)",))
    assert area(one["changed"]) == [5]
    assert 5 in area(one["reported"])
    assert one["uffd-wp"]["pages_missed"] == one["content"]["pages_missed"] == 0
    assert (
        one["uffd-wp"]["causes"]["forced"] >= 7
    )  # nothing says what is pinned, so all that is like it is read


@pytest.mark.needs("uffd_wp")
def test_one_byte_in_a_huge_page_is_one_page(target):
    target.do("new(0, 1024)", "advise(0, 1024, 14)", "write(1, *range(1024))")  # MADV_HUGEPAGE
    ((one,), _) = measured(target, ("write(2, 700, size=1)",))
    assert area(one["changed"]) == [700]
    assert one["uffd-wp"]["pages_missed"] == 0
    assert area(one["reported"]) == [700]


@pytest.mark.needs("uffd_wp")
def test_reading_content_beside_a_tracker_changes_nothing_it_says(target):
    target.do("new(0, 64)", "write(1, *range(64))")
    lines = ("write(2, 1, 2)", "advise(9, 2, 4)", "new(64, 4)", "write(1, 64)", "write(1, 20)")
    alone, _ = measured(target, lines, backends=("uffd-wp",))
    target.do("new(0, 64)", "write(1, *range(64))", "unmap(64, 4)")
    beside, _ = measured(target, lines, backends=("uffd-wp", "content"))
    assert area(alone[0]["reported"]) == area(beside[0]["reported"]) == [1, 2, 20, 64]


def test_content_alone_finds_everything(target):
    target.do("new(0, 64)", "write(1, *range(64))")
    ((one,), records) = measured(
        target, ("write(2, 7)", "unmap(9, 3)", "new(70, 2)", "write(3, 71)"), backends=("content",)
    )
    assert area(one["changed"]) == [7, 71]
    assert in_area(one, "content") == [2, 2, 0, 0]
    assert records[0]["runs"] == [["content"]]


class Forgetful:
    """A tracker that calls one page clean for ever, and does not mention another."""

    def __init__(self, tracker, clean, silent):
        self.tracker, self.clean, self.silent = tracker, runs_of(clean), runs_of(silent)

    def collect(self, space):
        found = self.tracker.collect(space)
        wrong = intersect_runs(found.dirty, self.clean)
        both = np.concatenate((found.clean, wrong))
        clean = both[np.argsort(both[:, 0])]
        dirty = subtract_runs(subtract_runs(found.dirty, self.clean), self.silent)
        told = Found(subtract_runs(clean, self.silent), dirty, found.nr_reported)
        return Collection(told, guards=found.guards, forced=found.forced)

    def __getattr__(self, name):
        return getattr(self.tracker, name)


@pytest.mark.needs("uffd_wp")
def test_a_forgetful_tracker_is_caught_by_page_and_mapping(target, monkeypatch):
    target.do("new(0, 8)", "write(1, *range(8))")
    real = engine.make_tracker

    def make(backend, pid, remote, found):
        tracker, choice = real(backend, pid, remote, found)
        pages = np.array([FIRST + 2], dtype=np.uint64), np.array([FIRST + 6], dtype=np.uint64)
        return (Forgetful(tracker, *pages) if backend == "uffd-wp" else tracker), choice

    monkeypatch.setattr(engine, "make_tracker", make)
    (first, second), records = measured(target, ("write(2, 2, 3)",), ("advise(2, 1, 4)",))
    assert [m["why"] for m in first["uffd-wp"]["missed"]] == [
        "it changed and was called clean",
        "it holds data and was not mentioned",
    ]
    named = [m["page"] for m in first["uffd-wp"]["missed"]]
    assert [name.split()[0] for name in named] == [f"{FIRST + 2 << 12:x}", f"{FIRST + 6 << 12:x}"]
    assert all(f"{FIRST << 12:x}-" in name for name in named)
    assert second["uffd-wp"]["pages_missed"] == 1  # page 6; page 2 is gone, and nobody said otherwise
    assert first["content"]["pages_missed"] == 0
    assert records[-1]["pages_missed"] == 3


def test_the_target_runs_on_after_a_measurement(target):
    measured(target, (), ())
    status = Path(f"/proc/{target.pid}/status").read_text()
    assert "TracerPid:\t0" in status
    target.do("new(0, 4)", "write(1, 0, 1)")
    smaps = Path(f"/proc/{target.pid}/smaps").read_text()
    flags = itertools.chain(*(line.split()[1:] for line in smaps.splitlines() if line.startswith("VmFlags")))
    assert "uw" not in set(flags)  # no mapping is left registered for write-protection


def test_a_target_that_exits_ends_the_measurement_with_what_there_was(target):
    records = []

    def between(epoch):
        if epoch == 3:
            target.process.kill()
            target.process.wait()

    options = engine.MeasureOptions(epochs=5, baseline_us=0)
    end = engine.measure(target.pid, options, records.append, between=between)
    assert end["epochs"] == 2
    assert "gone" in end["reason"]
    assert records[-1] is end


def test_unknown_and_impossible_backends_are_refused(target):
    from checkpointd.errors import KernelLacks, UsageError
    from checkpointd.measure.plan import plan_runs

    with pytest.raises(UsageError):
        plan_runs(["magic"], features.probe())
    bare = features.Features(True, False, False, False, False, ("none",))
    assert plan_runs([], bare).runs == (("content",),)
    assert "uffd-wp" in plan_runs([], bare).unavailable
    with pytest.raises(KernelLacks):
        plan_runs(["uffd-wp"], bare)
