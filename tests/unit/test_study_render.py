# SPDX-License-Identifier: Apache-2.0
"""docs/savings.md comes from records, and says nothing they do not."""

import json
from pathlib import Path

import pytest

from benchmarks.study.render import render
from benchmarks.study.workloads import WORKLOADS
from checkpointd.report.record import line

LINES = (Path(__file__).parents[1] / "data" / "measurement-v1.jsonl").read_text().splitlines()
RECORDS = [json.loads(text) for text in LINES]


def keep(directory, where, name, repeat, change=lambda found: found):
    path = directory / where / f"{name}-{repeat}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line(change(dict(found))) + "\n" for found in RECORDS))


def row(text, *words):
    return next(
        found for found in text.splitlines() if found.startswith("| ") and all(w in found for w in words)
    )


def test_nothing_measured_is_said_to_be_so(tmp_path):
    assert "Nothing was measured yet" in render(tmp_path)


def test_repeats_have_a_spread_and_single_runs_have_none(tmp_path):
    def doubled(found):
        return {**found, "bytes_raw": found["bytes_raw"] * 2} if found["type"] == "backend" else found

    keep(tmp_path, "native", "redis", 1)
    keep(tmp_path, "native", "nginx", 1)
    keep(tmp_path, "native", "nginx", 2, doubled)
    text = render(tmp_path)
    raw = [found["bytes_raw"] for found in RECORDS if found.get("backend") == "uffd-wp"]
    mean = sum(raw) / len(raw)
    assert f"| {mean / (1 << 20):.1f} MiB |" in row(text, "redis:")
    assert (
        f"{1.5 * mean / (1 << 20):.1f} MiB ({mean / (1 << 20):.1f} MiB to {mean / (1 << 19):.1f} MiB)"
        in row(text, "nginx:")
    )
    assert "No reporter missed a page" in text
    assert "Plain soft-dirty was not measured" in text
    assert "numpy:" not in text


def test_throughput_is_shown_only_of_a_machine_that_was_not_busy(tmp_path):
    keep(tmp_path, "native", "redis", 1)
    assert "throughput/s" not in render(tmp_path)
    calm = {"nr_cpus": 2, "load_before": 0.3}
    keep(
        tmp_path,
        "native",
        "redis",
        1,
        lambda found: {**found, **calm} if found["type"] == "header" else found,
    )
    assert "throughput/s" in render(tmp_path)


def test_a_guest_s_savings_and_losses_are_counted(tmp_path):
    def as_backend(name, merged, missed=0):
        def change(found):
            if found["type"] == "backend":
                backend = f"{name} bit" if found["backend"] == "uffd-wp" else name
                causes = {**found["causes"], "merged": merged}
                over = found["pages_over_reported"] + merged
                reported = found["pages_reported"] + merged
                return {
                    **found,
                    **{"backend": backend, "advisory": backend.endswith("bit"), "causes": causes},
                    **{"pages_over_reported": over, "pages_reported": reported},
                    **{"pages_missed": missed, "missed": []},
                }
            if found["type"] == "epoch":
                return {**found, "clear_us": 70 + found["epoch"], "nr_vmas_after": 12}
            return found

        return change

    keep(tmp_path, "6.12-stock", "sqlite", 1, as_backend("soft-dirty", 100_000, missed=3))
    keep(tmp_path, "6.12-precise", "sqlite", 1, as_backend("precise-soft-dirty", 0))
    text = render(tmp_path)
    assert "merged with a new one: sqlite 99 %" in text or "merged with a new one: sqlite 100 %" in text
    judged = [found for found in RECORDS if found.get("backend") == "uffd-wp"]
    changed = sum(found["pages_changed"] for found in judged)
    over = sum(found["pages_over_reported"] for found in judged)
    first, last = 100 * (over + 400_000) / changed, 100 * over / changed
    assert f"sqlite {first:.0f} % to {last:.0f} %." in text
    assert row(text, "6.12-stock", "soft-dirty bit", "sqlite").endswith("| 12 |")
    assert row(text, "sqlite", "precise-soft-dirty bit").endswith("| 12 | 73 |")
    assert "The merge barrier on the stock kernel was not measured" in text


def test_what_a_machine_lacks_is_named(tmp_path):
    keep(tmp_path, "native", "redis", 1)
    (tmp_path / "native" / "java-1.jsonl").write_text('{"type":"lacking","why":"javac is missing"}\n')
    assert "Not measured native: java (javac is missing)." in render(tmp_path)


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_program_says_what_it_is(name):
    assert WORKLOADS[name].what
    assert len(WORKLOADS) >= 12
