# SPDX-License-Identifier: Apache-2.0
"""`make demo`, small: with redis where there is one, and where there is none with the program that stands in."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = ("--megabytes", "16", "--clients", "2", "--interval", "0.2")
ASKED = (
    *("gen", "backend", "scanned", "dirty", "zero", "same", "written"),
    *("raw", "stored", "freezing", "frozen", "total", "saving"),
)
COUNTED = (
    *("pages_scanned", "pages_dirty", "pages_zero", "pages_same", "pages_skipped_parent", "pages_written"),
    *("bytes_raw", "bytes_stored", "freezing_time", "frozen_time", "total_time", "saving_percent"),
)

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="restoring with the same pid needs CAP_CHECKPOINT_RESTORE"
)


def run_demo(*words, **environ):
    return subprocess.run(
        [sys.executable, "-m", "demo", *SMALL, *words],
        cwd=ROOT,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_without_redis_it_says_so_and_another_program_stands_in(tmp_path):
    done = run_demo(PATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    said = " ".join(done.stdout.split())
    assert "redis-server is not installed and could not be" in said
    assert "sqlite, 2 clients writing" in said
    (header,) = [line for line in done.stdout.splitlines() if "frozen" in line and "┃" in line]
    columns = header.replace("┃", " ").split()
    assert [name for name in ASKED if name not in columns] == []
    assert len(re.findall(r"^│ [0-6] ", done.stdout, re.MULTILINE)) == 7
    assert "every proof holds" in said


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="no redis-server")
def test_with_redis_every_proof_holds_and_every_number_is_there():
    done = run_demo("--json")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert (result["program"], result["failures"]) == ("redis", [])
    full, *others = result["generations"]
    assert len(others) == 6
    assert full["parent_id"] == ""
    for earlier, later in zip(result["generations"], others, strict=False):
        assert later["parent_id"] == earlier["image_id"]
        assert later["pages_skipped_parent"] + later["pages_same"] > 0
        assert later["bytes_stored"] < full["bytes_stored"]
    for generation in result["generations"]:
        assert all(isinstance(generation[name], (int, float)) for name in COUNTED)
    assert [proof["generation"] for proof in result["proofs"]] == [5, 2]
    assert all(proof["nr_must"] > 0 and proof["nr_must_not"] > 0 for proof in result["proofs"])
