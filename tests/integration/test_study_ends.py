# SPDX-License-Identifier: Apache-2.0
"""A study that is ended leaves nothing running: its programs and their load are sessions of their own."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from checkpointd.procfs.process import read_stat

TIMEOUT_S = 60


def descendants(pid: int) -> set[int]:
    found: set[int] = set()
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, path.read_text().split()):
            found |= {child} | descendants(child)
    return found


def lives(pid: int) -> bool:
    try:
        return read_stat(pid).state != "Z"
    except OSError:
        return False


@pytest.mark.needs("root")
def test_what_it_measures_ends_with_it(tmp_path: Path) -> None:
    places = ["--records", tmp_path / "kept", "--full", tmp_path / "full", "--output", tmp_path / "page.md"]
    words = ["pattern-pair", "--where", "native", "--repeats", "1", *places]
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.study", *words], stdout=subprocess.DEVNULL
    ) as study:
        deadline = time.monotonic() + TIMEOUT_S
        part = tmp_path / "full" / "native" / "pattern-pair-1.part"
        while not part.exists() or '"epoch"' not in part.read_text():
            assert study.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        started = descendants(study.pid)
        study.terminate()
        assert study.wait(TIMEOUT_S) == 128 + 15
    assert len(started) >= 2  # what measures, and what is measured
    assert not [pid for pid in started if lives(pid)]
