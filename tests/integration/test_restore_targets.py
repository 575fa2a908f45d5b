# SPDX-License-Identifier: Apache-2.0
"""The self-checking targets of the injection tests, killed and brought back a few times each."""

from __future__ import annotations

import mmap
import os
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpointd.linux import capability as cap
from checkpointd.target.process import SleepMemory
from tests.programs.restore_harness import capture, kill_and_reap, restore

PROGRAMS = Path(__file__).parent.parent / "programs"
pytestmark = pytest.mark.skipif(
    not cap.has(cap.effective(), cap.CAP_CHECKPOINT_RESTORE) or os.geteuid() != 0,
    reason="choosing process ids needs root",
)
MODES = [
    "regs", "nanosleep", "clock-nanosleep", "poll", "ppoll", "futex", "epoll-timeout", "altstack", "clock", "rseq",
    "threads9", "threads64", "births",
]  # fmt: skip
_NR_CYCLES = 3


@pytest.fixture(scope="module")
def binaries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("targets")
    found = {"dynamic": directory / "dynamic", "static": directory / "static"}
    for name, path in found.items():
        flags = ["-static"] if name == "static" else []
        source = PROGRAMS / "inject_target.c"
        subprocess.run(["gcc", "-O1", "-w", *flags, "-o", path, source, "-lpthread", "-lm"], check=True)
    if shutil.which("go"):
        found["go"] = directory / "go"
        subprocess.run(
            ["go", "build", "-o", found["go"], PROGRAMS / "inject_go.go"],
            check=True,
            env={**os.environ, "GOCACHE": str(directory / "cache"), "GO111MODULE": "off"},
        )
    return found


class Shared:
    """The page by which a target tells how it fares."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(4096))
        with path.open("r+b") as file:
            self.page = mmap.mmap(file.fileno(), 4096)

    def word(self, index: int) -> int:
        return int(struct.unpack_from("=Q", self.page, index * 8)[0])

    @property
    def errors(self) -> str:
        return self.page[24:280].split(b"\0")[0].decode() if self.word(2) else ""

    def wait_progress(self) -> None:
        first, deadline = self.word(1), time.monotonic() + 30
        while self.word(1) == first:
            assert time.monotonic() < deadline, self.errors or "it does not go on"
            time.sleep(0.002)


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Shared]:
    found = Shared(tmp_path / "shared")
    yield found
    found.page.close()


def survive(arguments: list[str | Path], shared: Shared, output: Path) -> None:
    with output.open("wb") as out:
        child = subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
    alive: subprocess.Popen[bytes] | int = child
    try:
        shared.wait_progress()
        sleeps = SleepMemory()
        for _ in range(_NR_CYCLES):
            captured = capture(child.pid, sleeps, kill=True)
            kill_and_reap(alive)
            sleeps = restore(captured).sleeps
            alive = child.pid
            shared.wait_progress()
            assert shared.errors == "", captured.state.process.warnings
    finally:
        kill_and_reap(alive)


@pytest.mark.parametrize("mode", MODES)
def test_target_comes_back(mode: str, binaries: dict[str, Path], shared: Shared, tmp_path: Path) -> None:
    survive([binaries["dynamic"], mode, tmp_path / "shared"], shared, tmp_path / "out")


@pytest.mark.parametrize("mode", ["regs", "threads9"])
def test_static_target_comes_back(
    mode: str, binaries: dict[str, Path], shared: Shared, tmp_path: Path
) -> None:
    survive([binaries["static"], mode, tmp_path / "shared"], shared, tmp_path / "out")


def test_go_program_comes_back(binaries: dict[str, Path], shared: Shared, tmp_path: Path) -> None:
    if "go" not in binaries:
        pytest.skip("no Go compiler")
    survive([binaries["go"], tmp_path / "shared"], shared, tmp_path / "out")
