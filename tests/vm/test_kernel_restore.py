# SPDX-License-Identifier: Apache-2.0
"""Saved in one boot, restored in another one, where the clocks are elsewhere.  Runs on the host; two guests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from vmtest import kbuild, vm

PROGRAMS = Path(__file__).parents[1] / "programs"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(os.environ.get("CHECKPOINTD_VM_KERNEL")), reason="we are in a guest already"),
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="needs qemu-system-x86_64"),
    pytest.mark.timeout(2000),
]


def image_of(kernel: str) -> Path:
    image = kbuild.cached_image(kernel)
    if image is None:
        pytest.skip(f"needs the kernel {kernel}: make kernel")
    return image


def boot(kernel: str, program: str, phase: str, share: Path) -> dict[str, Any]:
    """Run one phase of a program of ours in a guest; the document it printed."""
    out, err = BytesIO(), BytesIO()
    command = [sys.executable, str(PROGRAMS / program), phase, str(share)]
    status = vm.run(
        image_of(kernel),
        command,
        name=kernel,
        stdout=out,
        stderr=err,
        share=share,
        cpus=1,
        timeout_seconds=900,
    )
    assert status == 0, err.getvalue().decode()
    answer: dict[str, Any] = json.loads(out.getvalue().splitlines()[-1])
    print(phase, answer)
    return answer


@pytest.mark.parametrize("kernel", ["6.12-stock", "6.1-stock"])
def test_programs_run_on_in_another_boot(tmp_path: Path, kernel: str) -> None:
    image_of(kernel)
    share = tmp_path / "share"
    share.mkdir()
    build = ["gcc", "-O1", "-static", "-o", share / "clocks", PROGRAMS / "restore_clocks.c", "-lpthread"]
    subprocess.run(build, check=True)
    before = boot(kernel, "two_boots.py", "dump", share)
    after = boot(kernel, "two_boots.py", "restore", share)
    assert after["boot"] != before["boot"]
    assert after["pids"] == before["pids"]
    assert after["rounds"] > before["rounds"]
    # the second guest's clock is elsewhere, the program's went on from the dump
    assert before["monotonic_ns"] < after["monotonic_ns"] < before["monotonic_ns"] + 600 * 10**9
    assert all(offsets != [0, 0] for offsets in after["offsets"])
    assert not [one for warnings in after["warnings"] for one in warnings if "clock jumps" in one]


@pytest.mark.needs("redis")
@pytest.mark.parametrize(
    ("kernel", "backend"), [("6.12-stock", "uffd-wp"), ("6.1-stock", "barrier-soft-dirty")]
)
def test_redis_moves_to_another_boot_by_the_command(tmp_path: Path, kernel: str, backend: str) -> None:
    """Dumped twice under writes, exported, imported, restored: no acknowledged write is lost, and its chain goes on."""
    image_of(kernel)
    share = tmp_path / "share"
    share.mkdir()
    before = boot(kernel, "migration_by_command.py", "dump", share)
    first, second = before["dumps"]
    assert (second["incremental"], second["parent_id"]) == (True, first["image_id"])
    assert second["backend"] == backend
    assert second["pages_skipped_parent"] > second["pages_written"] > 0
    after = boot(kernel, "migration_by_command.py", "restore", share)
    assert after["boot"] != before["boot"]
    assert after["pid"] == before["pid"]
    assert after["failures"] == []
    assert after["lost"] == 0
    assert after["present"] >= after["must"] > 0
    found = after["dump"]
    assert (found["incremental"], found["parent_id"]) == (True, after["image"])
    assert (after["tracking"], found["backend"]) == (backend, backend)
    assert found["pages_skipped_parent"] > found["pages_written"] > 0
