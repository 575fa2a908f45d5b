# SPDX-License-Identifier: Apache-2.0
"""A freeze leaves no trace in the calls it interrupts: neither in their result, nor in later ones."""

from __future__ import annotations

import mmap
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpointd.linux.arch import Nr
from checkpointd.target.freeze import freeze
from checkpointd.target.process import SleepMemory
from tests.programs.restore_harness import capture
from tests.soak import lab

TIMEOUT_MS, NR_WAITS = 300, 3
EPOLL_WAIT, IO_URING_ENTER = 232, 426


class Target:
    """A running calls_target."""

    def __init__(self, program: Path, where: Path, mode: str) -> None:
        path = where / "told"
        path.write_bytes(bytes(4096))
        with path.open("r+b") as file:
            self._told = mmap.mmap(file.fileno(), 4096)
        self.process = subprocess.Popen([program, path, mode])
        self.pid = self.process.pid

    def told(self, index: int = 0) -> int:
        return int(struct.unpack_from("=q", self._told, 8 * index)[0])

    def wait_for_call(self, *numbers: int) -> None:
        deadline = time.monotonic() + 20
        while not Path(f"/proc/{self.pid}/syscall").read_text().startswith(tuple(f"{nr} " for nr in numbers)):
            assert self.process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._told.close()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp("calls") / "calls_target"
    source = Path(__file__).parent.parent / "programs" / "calls_target.c"
    subprocess.run(["gcc", "-O2", "-Wall", "-Werror", "-o", made, source], check=True)
    return made


@pytest.fixture
def target(program: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Target]:
    made = Target(program, tmp_path, request.param)
    yield made
    made.close()


@pytest.mark.parametrize("target", ["epoll"], indirect=True)
def test_later_waits_are_as_long_as_ever(target: Target) -> None:
    """Its register holds the timeout of all of them."""
    target.wait_for_call(EPOLL_WAIT)
    time.sleep(0.15)
    freeze(target.pid).thaw()
    deadline = time.monotonic() + 30
    while not target.told(NR_WAITS - 1):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    took = [target.told(n) for n in range(NR_WAITS)]
    assert min(took) >= TIMEOUT_MS - 1
    assert took[0] >= TIMEOUT_MS + 100, "it was not frozen in the first"


@pytest.mark.needs("io_uring")
@pytest.mark.parametrize("target", ["uring"], indirect=True)
def test_waiting_for_a_ring_goes_on(target: Target) -> None:
    target.wait_for_call(IO_URING_ENTER)
    for _ in range(3):
        freeze(target.pid).thaw()
        target.wait_for_call(IO_URING_ENTER)
    assert target.told() == 0


@pytest.mark.parametrize("target", ["cpu"], indirect=True)
def test_the_time_slept_is_not_taken_off_cpu_time(target: Target) -> None:
    target.wait_for_call(Nr.CLOCK_NANOSLEEP)
    memory = SleepMemory()
    for _ in range(2):  # the second shows restart_syscall
        time.sleep(0.1)
        captured = capture(target.pid, memory)
        sleep = captured.state.process.threads[0].sleep
        assert sleep is not None
        assert (sleep.nr, sleep.remaining_ns) == (Nr.CLOCK_NANOSLEEP, None)
        target.wait_for_call(Nr.CLOCK_NANOSLEEP, Nr.RESTART_SYSCALL)
    assert target.told() == 0


@pytest.mark.needs("root")
@pytest.mark.parametrize("action", ["kill", "errno"])
def test_a_filter_without_restart_syscall_does_no_harm(action: str, tmp_path: Path) -> None:
    """At a stop by anybody else the kernel makes that call for a sleeper, which the filter then ends."""
    program = tmp_path / "guarded"
    subprocess.run(["gcc", "-O1", "-o", program, lab.PROGRAMS / "inject_guarded.c"], check=True)
    target = lab.Target({"guarded": program}, "guarded", "", tmp_path, extra=(action, "219"))
    try:
        for n in range(40):
            with freeze(target.pid) as frozen:
                if n % 2:
                    with frozen.inject():
                        pass
            time.sleep(0.001)
        target.judge()
    finally:
        target.kill()
