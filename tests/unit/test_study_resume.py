# SPDX-License-Identifier: Apache-2.0
"""The study goes on where it was: what is kept is not measured again, whatever else is missing."""

import sys

import pytest

from benchmarks.study import __main__ as study
from benchmarks.study import compact

RECORD = [
    {"type": "lacking", "why": "a test needs nothing"},
]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the study with a measuring that only notes what it was asked for, and does as `doing` says."""
    asked = []

    def runner(*words, doing=lambda out: 0):
        def measured(where, name, out, timeout_s):
            asked.append((where, name, out.stem))
            return doing(out)

        monkeypatch.setattr(study, "_install", lambda names, places: None)
        monkeypatch.setattr(study, "_measure", measured)
        places = [
            "--records",
            tmp_path / "kept",
            "--full",
            tmp_path / "full",
            "--output",
            tmp_path / "page.md",
        ]
        monkeypatch.setattr(sys, "argv", ["study", *words, *map(str, places)])
        asked.clear()
        return study.main(), list(asked)

    return runner


def made(out):
    out.write_text('{"type":"lacking","why":"nothing is here"}\n')
    return 0


def test_what_is_kept_is_not_measured_again(run, tmp_path):
    words = ("redis", "xz", "--where", "native,6.12-stock", "--repeats", "2")
    compact.write(RECORD, tmp_path / "kept" / "native" / f"redis-1{compact.SUFFIX}")
    assert run(*words, doing=made)[1] == [
        ("native", "xz", "xz-1"),
        ("6.12-stock", "redis", "redis-1"),
        ("6.12-stock", "xz", "xz-1"),
        ("native", "redis", "redis-2"),
        ("native", "xz", "xz-2"),
        ("6.12-stock", "redis", "redis-2"),
        ("6.12-stock", "xz", "xz-2"),
    ]
    assert run(*words, doing=made) == (0, [])


def test_a_full_record_that_is_there_is_kept_without_measuring(run, tmp_path):
    full = tmp_path / "full" / "native"
    full.mkdir(parents=True)
    made(full / "xz-1.jsonl")
    assert run("xz", "--where", "native", "--repeats", "1") == (0, [])
    assert (tmp_path / "kept" / "native" / f"xz-1{compact.SUFFIX}").exists()


def test_what_failed_is_told_and_tried_again(run, tmp_path):
    words = ("xz", "--where", "6.12-stock", "--repeats", "1")
    assert run(*words, doing=lambda out: 125) == (1, [("6.12-stock", "xz", "xz-1")])
    assert run(*words, doing=made) == (0, [("6.12-stock", "xz", "xz-1")])


def test_a_guest_whose_time_is_up_is_kept_as_such(run, tmp_path):
    def slow(out):
        out.with_suffix(".part").write_text("")
        return study.TIME_IS_UP

    words = ("xz", "--where", "6.12-stock", "--repeats", "1", "--guest-timeout", "600")
    assert run(*words, doing=slow) == (0, [("6.12-stock", "xz", "xz-1")])
    (found,) = compact.read(tmp_path / "kept" / "6.12-stock" / f"xz-1{compact.SUFFIX}")
    assert found == {"type": "lacking", "why": "the emulated machine was given 10 minutes, which did not do"}


def test_cost_waits_for_a_calm_machine_and_does_not_count_before(run, tmp_path, monkeypatch):
    words = ("xz", "--where", "cost", "--repeats", "1")
    kept = tmp_path / "kept" / "cost" / f"xz-1{compact.SUFFIX}"
    times = {"untracked": 1, "tracked": 1, "untracked_cpu_ns": 1, "tracked_cpu_ns": 1}
    busy = [{"type": "cost", "nr_cpus": 2}, {"type": "pair", "load": 4.5, **times}]
    compact.write(busy, kept)
    monkeypatch.setattr("os.getloadavg", lambda: (1000.0, 0, 0))
    assert run(*words, doing=made) == (0, [])
    assert compact.read(kept) == busy
    monkeypatch.setattr("os.getloadavg", lambda: (0.5, 0, 0))
    assert run(*words, doing=made) == (0, [("cost", "xz", "xz-1")])
    assert compact.read(kept)[0]["type"] == "lacking"
    assert run(*words, doing=made) == (0, [])


def test_render_only_measures_nothing(run, tmp_path):
    assert run("--render-only") == (0, [])
    assert (tmp_path / "page.md").read_text().startswith("# What exact tracking saves")
