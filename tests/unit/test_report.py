# SPDX-License-Identifier: Apache-2.0
"""Reports from a recorded measurement; nothing is measured here."""

import copy
import csv
import io
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from checkpointd.errors import UsageError
from checkpointd.report import charts, heat, page, record, summary, text

RECORD = Path(__file__).parents[1] / "data" / "measurement-v1.jsonl"
LINES = RECORD.read_text(encoding="utf-8").splitlines()


@pytest.fixture
def measurement():
    return record.load(RECORD)


def with_changes(change):
    """The record with every line passed through `change(value)`."""
    lines = []
    for line in LINES:
        value = json.loads(line)
        changed = change(copy.deepcopy(value))
        if changed is not None:
            lines.append(record.line(changed))
    return record.parse(lines)


def test_a_record_is_read_whole(measurement):
    assert measurement.header["comm"] == "worker"
    assert [name for name, _ in measurement.backends()] == ["uffd-wp", "content"]
    (run,) = measurement.runs
    assert sorted(run.epochs) == [0, 1, 2, 3, 4]
    assert sorted(run.backends["uffd-wp"]) == [1, 2, 3, 4]
    assert measurement.end["reason"] == "done"
    assert measurement.nr_missed == 0


def test_figures_are_means_of_what_was_recorded(measurement):
    found = summary.summarise(measurement)
    uffd, content = found.backends
    by_hand = [json.loads(line) for line in LINES]
    reported = [r["pages_reported"] for r in by_hand if r.get("backend") == "uffd-wp"]
    assert uffd.reported.mean == sum(reported) / 4
    assert (uffd.reported.low, uffd.reported.high) == (min(reported), max(reported))
    assert uffd.over_ratio == pytest.approx(uffd.over_reported.mean / uffd.changed.mean)
    assert content.over_reported.mean == 0
    assert sum(uffd.causes.values()) == pytest.approx(uffd.reported.mean)
    assert sum(m.reported for m in uffd.mappings) == pytest.approx(uffd.reported.mean)
    assert any(m.name.startswith("shared /memfd:shared") for m in uffd.mappings)
    (run,) = found.runs
    assert run.throughput_before is not None
    assert run.throughput.mean == pytest.approx(10_000, rel=0.01)  # the made-up probe counts 100 us


def test_a_truncated_record_is_read_up_to_there():
    cut = record.parse([*LINES[:-4], LINES[-4][:50]])
    assert cut.end is None
    assert "killed" in " ".join(summary.summarise(cut).notes)
    assert "killed" in page.html(cut)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], "no measurement"),
        (["{}"], "no record"),
        (["nonsense"], "no measurement"),
        ([LINES[0].replace('"version":1', '"version":99')], "version 99"),
        ([LINES[0], "{broken", LINES[1]], "line 2"),
    ],
)
def test_what_is_no_record_is_refused(lines, words):
    with pytest.raises(UsageError, match=words):
        record.parse(lines)


def test_unknown_types_and_keys_are_passed_over():
    lines = [LINES[0], '{"type":"dream","run":0}', *LINES[1:]]
    assert len(record.parse(lines).runs) == 1
    found = with_changes(lambda value: {**value, "surprise": 1})
    assert text.table(found) == text.table(record.load(RECORD))


def test_the_table_says_what_matters(measurement):
    shown = text.table(measurement)
    assert "worker (pid 4242) on lab, Linux 6.18.44" in shown
    for word in (
        "over/changed",
        "silent",
        "forced",
        "missed",
        "VMAs",
        "throughput",
        "untracked",
        "lines differ",
    ):
        assert word in shown
    assert "MISSED" not in shown


def test_missed_pages_are_named_in_every_report():
    def lose(value):
        if value.get("backend") == "uffd-wp" and value["epoch"] == 2:
            value["pages_missed"] = 1
            value["missed"] = [
                {"page": "7e0000002000 in 7e0000000000-7e00007d0000 rw-p", "why": "it is gone"}
            ]
        return value

    broken = with_changes(lose)
    assert broken.nr_missed == 1
    for shown in (text.table(broken), page.html(broken)):
        assert "7e0000002000 in 7e0000000000-7e00007d0000 rw-p" in shown
        assert "it is gone" in shown


def test_what_was_not_measured_is_missing_and_not_zero():
    bare = with_changes(
        lambda value: None if value["type"] in ("probe", "baseline") else {**value, "copy_us": None}
    )
    found = summary.summarise(bare)
    assert found.runs[0].throughput is None
    assert found.runs[0].cpu_before is None
    assert found.backends[0].frozen_us is None
    assert "throughput" not in text.table(bare)
    row = next(
        line for line in text.table(bare).splitlines() if line.startswith("uffd-wp") and line.endswith("-")
    )
    assert row.split()[-2:] == ["-", "-"]
    assert "<td>-</td>" in page.html(bare)


def test_a_measurement_without_an_epoch_has_reports_too():
    nothing = record.parse(LINES[:1])
    assert "nothing was measured" in text.table(nothing)
    assert "No epoch was measured" in page.html(nothing)
    assert text.csv_text(nothing).splitlines() == [",".join(text.CSV_COLUMNS)]


def test_csv_has_a_line_for_every_epoch_and_backend(measurement):
    rows = list(csv.DictReader(io.StringIO(text.csv_text(measurement))))
    assert len(rows) == 8
    for row in rows:
        causes = sum(int(row[f"cause_{cause}"]) for cause in summary.CAUSES)
        assert (
            causes
            == int(row["pages_reported"])
            == int(row["pages_changed"]) + int(row["pages_over_reported"])
        )
        assert int(row["nr_vmas"]) > 10
    assert {row["backend"] for row in rows} == {"uffd-wp", "content"}


class Strict(HTMLParser):
    """Every element is closed in order; all addresses anybody would fetch are collected."""

    VOID = ("meta", "line", "rect", "circle", "polyline", "br")

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.tags = [], [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.fetched += [
            value for name, value in attrs if name in ("src", "href", "xlink:href", "data", "action")
        ]
        if tag not in self.VOID or (
            tag in ("rect", "circle") and not self.get_starttag_text().endswith("/>")
        ):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_fetches_nothing(measurement):
    shown = page.html(measurement)
    parser = Strict()
    parser.feed(shown)
    assert parser.open == []
    assert parser.fetched == []
    assert not parser.tags & {"script", "link", "img", "iframe", "object"}
    assert "@import" not in shown
    assert "url(" not in shown
    assert "worker --serve &lt;demo&gt;" in shown  # what a process calls itself is no markup
    drawings = re.findall(r"<svg.*?</svg>", shown, re.DOTALL)
    assert len(drawings) == 5
    for drawing in drawings:
        root = ET.fromstring(drawing)
        assert root.get("aria-label")
        words = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
        assert len(words) > 3


def test_charts_show_each_value_once(measurement):
    points = [(1.0, 5.0), (2.0, 7.0)]
    drawing = charts.line_chart("t", [charts.Series("a", "c0", points)], "epoch", "pages", text.count)
    tips = re.findall(r"<title>(.*?)</title>", drawing)
    assert tips == ["a, epoch 1: 5", "a, epoch 2: 7"]
    ys = [float(y) for y in re.findall(r'cy="([\d.]+)"', drawing)]
    assert ys[0] > ys[1]  # more is higher


@pytest.mark.parametrize(("most", "nr"), [(0, 2), (1, 2), (7, 4), (99, 5), (12_345, 5), (1e9, 5)])
def test_axes_cover_what_they_show_in_round_steps(most, nr):
    found = charts.ticks(most)
    assert found[0] == 0
    assert found[-1] >= most
    assert nr <= len(found) <= 12
    binary = charts.ticks(most, binary=True)
    assert binary[-1] >= most


def test_the_heat_map_holds_every_changed_page(measurement):
    (run,) = measurement.runs
    found = heat.bands(run)
    shown = sum(nr for band in found for _, nr in band.cells.values())
    assert shown == sum(epoch["pages_changed"] for number, epoch in run.epochs.items() if number)
    assert all(0 <= row < band.nr_rows for band in found for row, _ in band.cells)
    assert any(band.name.startswith("anonymous 7e") for band in found)
