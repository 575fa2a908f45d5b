# SPDX-License-Identifier: Apache-2.0
"""The lab itself: guests return output and status, and cannot hang or vanish unnoticed. Runs on the host."""

from __future__ import annotations

import os
import shutil
from io import BytesIO
from pathlib import Path

import pytest
from vmtest import kbuild, vm

IMAGE = kbuild.cached_image("6.12-stock")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(os.environ.get("CHECKPOINTD_VM_KERNEL")), reason="we are in a guest already"),
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="needs qemu-system-x86_64"),
    pytest.mark.skipif(IMAGE is None, reason="needs the kernel 6.12-stock: make kernel"),
]


def run(command: list[str], **options: object) -> tuple[int, bytes, bytes]:
    assert IMAGE is not None
    out, err = BytesIO(), BytesIO()
    status = vm.run(IMAGE, command, name="6.12-stock", stdout=out, stderr=err, **options)  # type: ignore[arg-type]
    return status, out.getvalue(), err.getvalue()


def test_output_status_and_name_come_back() -> None:
    status, out, err = run(
        ["sh", "-c", "echo $CHECKPOINTD_VM_KERNEL; uname -r; echo bad >&2; exit 7"], timeout_seconds=240
    )
    assert (status, err) == (7, b"bad\n")
    assert out.startswith(b"6.12-stock\n6.12.")
    assert out.endswith(b"-stock\n")


def test_large_output_arrives_whole() -> None:
    status, out, _ = run(["head", "-c", "3000000", "/dev/zero"], timeout_seconds=240)
    assert status == 0
    assert len(out) == 3000000


def test_host_is_visible_and_not_changed(tmp_path: Path) -> None:
    inside = Path(__file__).with_name("written-by-a-guest")
    share = tmp_path / "share"
    share.mkdir()
    status, out, _ = run(
        ["sh", "-c", f"echo x >{inside} && cat {inside} && echo y >{share}/result"],
        timeout_seconds=240,
        share=share,
    )
    assert (status, out) == (0, b"x\n")
    assert not inside.exists()
    assert (share / "result").read_text() == "y\n"


def test_a_command_that_hangs_is_stopped() -> None:
    with pytest.raises(vm.GuestTimeout, match="stopped after 25 s"):
        run(["sleep", "1000"], timeout_seconds=25)


def test_a_kernel_that_panics_is_told_from_a_command_that_fails() -> None:
    with pytest.raises(vm.LostGuest) as caught:
        run(["sh", "-c", "echo c >/proc/sysrq-trigger"], timeout_seconds=240)
    assert not isinstance(caught.value, vm.GuestTimeout)
    assert "Kernel" in caught.value.console
