# SPDX-License-Identifier: Apache-2.0
"""What the study's own clocks and turns say is what happened."""

import subprocess
import sys
import time

from benchmarks.study import measure as study
from checkpointd.measure.engine import MeasureOptions

SPINS = (
    "import time\nwhile time.process_time() < 0.2: pass\nprint(time.process_time_ns(), flush=True)\ninput()"
)


def test_cpu_time_is_the_process_s_own_and_exact():
    words = [sys.executable, "-c", SPINS]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        its_own = int(child.stdout.readline())
        seen = study.cpu_ns(child.pid)
        child.stdin.write("\n")
    assert its_own <= seen < its_own + 100_000_000


def test_intervals_take_turns_and_are_held_against_both_neighbours(monkeypatch):
    done, spent, at, asked = [0.0], [0], [0.0], []
    rates = iter([(100, 10), (50, 30), (200, 20), (80, 40), (100, 60)])  # (done a second, CPU time of one)

    def sleep(seconds):
        at[0] += seconds
        if seconds != study.SETTLING_S:
            rate, cpu_ns = next(rates)
            done[0] += rate * seconds
            spent[0] += rate * seconds * cpu_ns

    def measured(pid, options, emit, between):
        asked.append(options.backends)
        between(1)

    monkeypatch.setattr(study, "measure", measured)
    monkeypatch.setattr(study, "cpu_ns", lambda pid: spent[0])
    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: at[0])
    options = MeasureOptions(interval_us=2_000_000, backends=("uffd-wp",), run=0)
    first, second = study.pairs(1, options, lambda: done[0], 2)
    assert asked == [("content",), ("uffd-wp",), ("content",), ("uffd-wp",), ("content",)]
    assert (first["untracked"], first["tracked"]) == (150, 50)
    assert (first["untracked_cpu_ns"], first["tracked_cpu_ns"]) == (15, 30)
    assert (second["untracked"], second["tracked"]) == (150, 80)
    assert (second["untracked_cpu_ns"], second["tracked_cpu_ns"]) == (40, 40)


def test_a_program_that_stands_still_gives_no_pair(monkeypatch, capsys):
    monkeypatch.setattr(study, "measure", lambda pid, options, emit, between: between(1))
    monkeypatch.setattr(study, "cpu_ns", lambda pid: 0)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert list(study.pairs(1, MeasureOptions(), lambda: 7.0, 3)) == []
    assert "did nothing" in capsys.readouterr().err
