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

KERNEL = "6.12-stock"
IMAGE = kbuild.cached_image(KERNEL)
PROGRAMS = Path(__file__).parents[1] / "programs"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(os.environ.get("CHECKPOINTD_VM_KERNEL")), reason="we are in a guest already"),
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="needs qemu-system-x86_64"),
    pytest.mark.skipif(IMAGE is None, reason=f"needs the kernel {KERNEL}: make kernel"),
]


def boot(phase: str, share: Path) -> dict[str, Any]:
    assert IMAGE is not None
    out, err = BytesIO(), BytesIO()
    command = [sys.executable, str(PROGRAMS / "two_boots.py"), phase, str(share)]
    status = vm.run(
        IMAGE, command, name=KERNEL, stdout=out, stderr=err, share=share, cpus=1, timeout_seconds=900
    )
    assert status == 0, err.getvalue().decode()
    answer: dict[str, Any] = json.loads(out.getvalue().splitlines()[-1])
    print(phase, answer)
    return answer


def test_programs_run_on_in_another_boot(tmp_path: Path) -> None:
    share = tmp_path / "share"
    share.mkdir()
    build = ["gcc", "-O1", "-static", "-o", share / "clocks", PROGRAMS / "restore_clocks.c", "-lpthread"]
    subprocess.run(build, check=True)
    before = boot("dump", share)
    after = boot("restore", share)
    assert after["boot"] != before["boot"]
    assert after["pids"] == before["pids"]
    assert after["rounds"] > before["rounds"]
    # the second guest's clock is elsewhere, the program's went on from the dump
    assert before["monotonic_ns"] < after["monotonic_ns"] < before["monotonic_ns"] + 600 * 10**9
    assert all(offsets != [0, 0] for offsets in after["offsets"])
    assert not [one for warnings in after["warnings"] for one in warnings if "clock jumps" in one]
