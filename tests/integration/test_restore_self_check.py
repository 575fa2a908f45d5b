# SPDX-License-Identifier: Apache-2.0
"""Programs that prove to themselves that they came back whole: captured, killed, restored with the same ids."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from checkpointd.linux import capability as cap
from checkpointd.target.process import SleepMemory
from tests.programs.restore_harness import Captured, capture, kill_and_reap, restore

SOURCE = Path(__file__).parent.parent / "programs" / "restore_self_check.c"
pytestmark = pytest.mark.skipif(
    not cap.has(cap.effective(), cap.CAP_CHECKPOINT_RESTORE) or os.geteuid() != 0,
    reason="choosing process ids needs root",
)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The program, linked both ways."""
    directory = tmp_path_factory.mktemp("self-check")
    found = {}
    for name, flags in (("dynamic", ["-fPIE", "-pie"]), ("static", ["-static"])):
        found[name] = directory / f"self_check_{name}"
        subprocess.run(
            ["gcc", "-O1", "-w", "-D_GNU_SOURCE", *flags, "-o", found[name], SOURCE, "-lpthread"], check=True
        )
    return found


@dataclass
class Target:
    """One run of the program."""

    child: subprocess.Popen[bytes]
    directory: Path
    pid: int

    @property
    def log(self) -> list[str]:
        path = self.directory / "log"
        return path.read_text().splitlines() if path.exists() else []

    def wait_for(self, line: str, timeout_s: float = 40.0) -> None:
        deadline = time.monotonic() + timeout_s
        while line not in self.log:
            assert Path(f"/proc/{self.pid}").exists(), f"it died: {self.log}"
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
            assert state != "Z" or line in self.log, f"it died: {self.log}"
            assert time.monotonic() < deadline, self.log
            time.sleep(0.005)

    def go_on(self, dead_ns: int) -> None:
        staged = self.directory / "control.new"
        staged.write_text(str(dead_ns))
        staged.chmod(0o644)
        staged.rename(self.directory / "control")


@pytest.fixture
def start(programs: dict[str, Path]) -> Iterator[object]:
    started: list[Target] = []
    shared = Path(tempfile.mkdtemp(prefix="checkpointd-restore-"))  # other users cannot look into tmp_path
    shared.chmod(0o777)

    def run(group: str, *extra: str, linked: str = "dynamic") -> Target:
        child = subprocess.Popen(
            [programs[linked], group, shared / "log", shared / "control", *extra],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        target = Target(child, shared, child.pid)
        started.append(target)
        target.wait_for("ready")
        return target

    yield run
    for target in started:
        if target.child.poll() is None:
            kill_and_reap(target.child)
        if Path(f"/proc/{target.pid}").exists():
            kill_and_reap(target.pid)
    shutil.rmtree(shared)


def cycle(target: Target, memory: SleepMemory, nr: int, *, pause_s: float = 0.0) -> tuple[Captured, int]:
    """Capture, kill and restore `nr` times; the last capture and the nanoseconds it did not exist."""
    dead_ns = 0
    for n in range(nr):
        captured = capture(target.pid, memory, kill=True)
        died_ns = captured.state.process.host.monotonic_ns
        kill_and_reap(target.child if n == 0 else target.pid)
        time.sleep(pause_s)
        restored = restore(captured)
        dead_ns += time.monotonic_ns() - died_ns
        memory = restored.sleeps
        assert restored.pid == target.pid
        assert restored.tids == {thread.tid: thread.tid for thread in captured.state.process.threads}
    return captured, dead_ns


def check(target: Target, dead_ns: int) -> list[str]:
    target.go_on(dead_ns)
    target.wait_for("done")
    failures = [line for line in target.log if not line.startswith(("ok ", "ready", "done"))]
    assert not failures, "\n".join(failures)
    return target.log


@pytest.mark.parametrize("linked", ["dynamic", "static"])
@pytest.mark.parametrize("group", ["cpu", "threads", "signals", "timers", "identity", "switches"])
def test_group_comes_back_whole(start, group: str, linked: str) -> None:
    target = start(group, linked=linked)
    _, dead_ns = cycle(target, SleepMemory(), 1)
    log = check(target, dead_ns)
    assert sum(line.startswith("ok ") for line in log) >= 1


@pytest.mark.parametrize("group", ["cpu", "threads", "signals", "timers"])
def test_group_survives_many_cycles(start, group: str) -> None:
    target = start(group)
    _, dead_ns = cycle(target, SleepMemory(), 6)
    check(target, dead_ns)


@pytest.mark.parametrize("how", ["user", "caps"])
def test_credentials_come_back(start, how: str) -> None:
    target = start("identity", how)
    _, dead_ns = cycle(target, SleepMemory(), 2)
    check(target, dead_ns)


def test_memory_of_every_kind_comes_back(start, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    target = start("memory", str(tmp_path / "files"))
    _, dead_ns = cycle(target, SleepMemory(), 2)
    check(target, dead_ns)


@pytest.mark.parametrize("how", ["none", "future", "onfault"])
def test_locks_of_later_mappings_come_back(start, how: str) -> None:
    target = start("locks", how)
    _, dead_ns = cycle(target, SleepMemory(), 2)
    check(target, dead_ns)


def _has_nodes(monkeypatch: pytest.MonkeyPatch, *nodes: int) -> None:
    """On a machine of a single node nobody looks at policies."""
    monkeypatch.setattr("checkpointd.procfs.numa_maps.online_nodes", lambda: frozenset(nodes))


@pytest.mark.skipif(not Path("/proc/self/numa_maps").exists(), reason="no NUMA in this kernel")
@pytest.mark.parametrize("how", ["all", "mappings", "threads"])
def test_memory_policies_come_back(start, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    _has_nodes(monkeypatch, 0, 1)
    target = start("policies", how)
    _, dead_ns = cycle(target, SleepMemory(), 2)
    check(target, dead_ns)


def test_policy_for_a_node_that_is_not_here_is_warned_of(start, monkeypatch: pytest.MonkeyPatch) -> None:
    _has_nodes(monkeypatch, 0, 1)
    target = start("policies", "all")
    captured = capture(target.pid, kill=True)
    kill_and_reap(target.child)
    _has_nodes(monkeypatch, 7)
    restored = restore(captured)
    told = [warning for warning in restored.warnings if "memory policy" in warning]
    assert len(told) == 3, restored.warnings  # of mappings together, of each thread
    assert all("lacks nodes" in warning for warning in told)


@pytest.mark.needs("keys")
@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("none", ""),
        ("session", ""),
        ("session login", ""),
        ("session login key", "1 key(s) of its session keyring"),
        ("process key", "1 key(s) of its process keyring"),
    ],
)
def test_keyrings_are_left_and_lost_keys_told(start, how: str, told: str) -> None:
    target = start("keys", how)
    captured, dead_ns = cycle(target, SleepMemory(), 1)
    found = [warning for warning in captured.state.process.warnings if "key" in warning]
    assert [told in warning for warning in found] == ([True] if told else [])
    check(target, dead_ns)


OF_ONE_SESSION = """
import ctypes, subprocess, time
from tests.programs.restore_harness import capture
libc = ctypes.CDLL(None)
assert libc.syscall(250, 1, 0) > 0  # keyctl(KEYCTL_JOIN_SESSION_KEYRING)
assert libc.syscall(248, b"user", b"of-the-session", b"secret", 6, -3) > 0  # add_key
with subprocess.Popen(["sleep", "1000"]) as child:
    time.sleep(0.2)
    captured = capture(child.pid, kill=True)
    child.kill()
print([one for one in captured.state.process.warnings if "key" in one])
"""


@pytest.mark.needs("keys")
def test_keys_that_the_service_shares_are_told_too() -> None:
    """After the next boot there is another session."""
    done = subprocess.run(
        [sys.executable, "-c", OF_ONE_SESSION],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert (
        "1 key(s) of its session keyring come back only where the service is of the same session"
        in done.stdout
    )


RESTORER_WITH_KEYS = """
import ctypes, sys
from tests.programs.restore_harness import capture, kill_and_reap, restore
libc = ctypes.CDLL(None)
captured = capture(int(sys.argv[1]), kill=True)
print(flush=True)
sys.stdin.readline()
assert libc.syscall(250, 1, 0) > 0  # keyctl(KEYCTL_JOIN_SESSION_KEYRING)
assert libc.syscall(248, b"user", b"of-the-restorer", b"secret", 6, -3) > 0  # add_key
restore(captured)
"""


@pytest.mark.needs("keys")
@pytest.mark.parametrize("how", ["none", "session"])
def test_keys_of_the_restorer_stay_its_own(start, how: str) -> None:
    target = start("keys", how)
    restorer = subprocess.Popen(
        [sys.executable, "-c", RESTORER_WITH_KEYS, str(target.pid)],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert restorer.stdout is not None
    restorer.stdout.readline()
    kill_and_reap(target.child)
    restorer.communicate(b"\n", timeout=60)
    assert restorer.returncode == 0
    check(target, 0)


@pytest.mark.parametrize("nr_cycles", [1, 3])
def test_sleeps_go_on(start, nr_cycles: int) -> None:
    target = start("sleeps")
    captured, dead_ns = cycle(target, SleepMemory(), nr_cycles, pause_s=0.1)
    assert sum(thread.sleep is not None for thread in captured.state.process.threads) >= 6
    check(target, dead_ns)
