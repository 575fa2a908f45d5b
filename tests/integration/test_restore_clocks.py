# SPDX-License-Identifier: Apache-2.0
"""The clocks of a process go on after a restore in another boot, by a time namespace of its own.

Another boot is staged by another boot id in the image; tests/vm has the real thing.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from checkpointd.procfs import process
from checkpointd.restore import spawn
from checkpointd.target.process import SleepMemory, process_blockers
from demo.command import Checkpoint
from tests.programs.restore_harness import Captured, capture, kill_and_reap, restore

SOURCE = Path(__file__).parent.parent / "programs" / "restore_clocks.c"
AHEAD_S = 500_000
pytestmark = [
    pytest.mark.needs("root", "ptrace", "set_tid", "gcc"),
    pytest.mark.skipif(not Path("/proc/self/timens_offsets").exists(), reason="no time namespaces"),
    pytest.mark.skipif(shutil.which("unshare") is None, reason="no unshare"),
]


class Target:
    """The program, in a time namespace whose clocks are AHEAD_S ahead, unless `ahead` is False."""

    def __init__(self, binary: Path, directory: Path, *, ahead: bool) -> None:
        self.progress = directory / "progress"
        self.err = directory / "err"
        offsets = [f"--{clock}={AHEAD_S}" for clock in ("monotonic", "boottime")]
        words = ["unshare", "--time", *offsets, "--"] if ahead else []
        with self.err.open("wb") as err:
            self.child = subprocess.Popen(
                [*words, binary, self.progress, "120"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=err,
                start_new_session=True,
            )
        self.pid = self.child.pid
        self.wait_for_more()

    def read(self) -> list[int]:
        """[ticks, sleeps, CLOCK_MONOTONIC in ns]."""
        try:
            found = [int(word) for word in self.progress.read_text().split()]
        except OSError:
            return [0, 0, 0]
        return found if len(found) == 3 else [0, 0, 0]

    def wait_for_more(self) -> list[int]:
        first, deadline = self.read(), time.monotonic() + 60
        while True:
            now = self.read()
            if now[0] > first[0] + 5 and now[1] > first[1] + 4:
                return now
            assert time.monotonic() < deadline, self.err.read_text() or now
            assert not self.err.read_text()
            time.sleep(0.01)

    def kill(self) -> None:
        kill_and_reap(self.child if self.child.poll() is None else self.pid)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Target]]:
    started: list[Target] = []
    binary = tmp_path / "clocks"
    subprocess.run(["gcc", "-O1", "-o", binary, SOURCE, "-lpthread"], check=True)

    def run(*, ahead: bool) -> Target:
        started.append(Target(binary, tmp_path, ahead=ahead))
        return started[-1]

    yield run
    for target in started:
        target.kill()


def of_another_boot(captured: Captured) -> Captured:
    state = captured.state
    host = dataclasses.replace(state.process.host, boot_id="another")
    return dataclasses.replace(
        captured, state=dataclasses.replace(state, process=dataclasses.replace(state.process, host=host))
    )


def test_clocks_go_on_after_another_boot(start: Callable[..., Target]) -> None:
    target = start(ahead=True)
    captured = capture(target.pid, kill=True)
    target.kill()
    before_ns = captured.state.process.host.monotonic_ns
    assert before_ns - time.monotonic_ns() > (AHEAD_S - 1000) * 10**9
    time.sleep(1)
    warnings = restore(of_another_boot(captured)).warnings
    assert not any("clock" in warning for warning in warnings)
    at = time.monotonic_ns()
    first = target.wait_for_more()
    # as if no time had passed
    assert before_ns < first[2] < before_ns + (time.monotonic_ns() - at) + 10 * 10**9
    # and once more, from there
    captured = capture(target.pid, SleepMemory(), kill=True)
    target.kill()
    assert captured.state.process.host.monotonic_ns > before_ns
    restore(of_another_boot(captured))
    assert target.wait_for_more()[2] > first[2]


def test_a_time_namespace_comes_back_in_the_same_boot(start: Callable[..., Target], tmp_path: Path) -> None:
    target = start(ahead=True)
    offsets = process.time_offsets(target.pid)
    assert offsets[0] == AHEAD_S * 10**9
    command = Checkpoint(tmp_path)
    try:
        command.dump(target.pid)
        image = command.dump(target.pid, "--incremental")["image_id"]
        target.kill()
        command.restore(image, "--changed", "allow")  # it wrote on after the dump
        assert process.time_offsets(target.pid) == offsets
        assert target.wait_for_more()[2] > AHEAD_S * 10**9
        assert command.dump(target.pid, "--incremental")["parent_id"] == image
    finally:
        command.close()


def test_no_namespace_is_made_where_none_is_needed(start: Callable[..., Target]) -> None:
    target = start(ahead=False)
    captured = capture(target.pid, kill=True)
    target.kill()
    restore(captured)
    assert os.readlink(f"/proc/{target.pid}/ns/time") == os.readlink("/proc/self/ns/time")
    target.wait_for_more()


def test_it_is_said_where_the_clocks_cannot_go_on(
    start: Callable[..., Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = start(ahead=False)
    captured = capture(target.pid, kill=True)
    target.kill()
    monkeypatch.setattr(spawn, "_CLONE_NEWTIME", 1 << 30)  # no such flag: refused as by an older kernel
    warnings = restore(of_another_boot(captured)).warnings
    assert any("monotonic clock jumps" in warning for warning in warnings)
    assert os.readlink(f"/proc/{target.pid}/ns/time") == os.readlink("/proc/self/ns/time")
    target.wait_for_more()


def test_a_time_namespace_for_children_is_a_blocker() -> None:
    code = "import ctypes, time; assert ctypes.CDLL(None).unshare(0x80) == 0; print(1, flush=True); time.sleep(60)"
    child = subprocess.Popen(["python3", "-c", code], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        assert child.stdout.read(1) == b"1"
        assert any("time namespace" in one for one in process_blockers(child.pid))
    finally:
        child.kill()
        child.communicate()
