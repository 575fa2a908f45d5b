# SPDX-License-Identifier: Apache-2.0
"""Sessions and process groups of restored programs, and what belongs to a session."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from checkpointd.linux import capability as cap
from checkpointd.procfs.process import autogroup, cgroups, read_stat
from tests.abilities import cgroup_base
from tests.programs.python_program import PROGRAM, Program
from tests.programs.restore_harness import capture, kill_and_reap, restore, wait_gone

pytestmark = pytest.mark.skipif(
    not cap.has(cap.effective(), cap.CAP_CHECKPOINT_RESTORE) or os.geteuid() != 0,
    reason="choosing process ids needs root",
)


def test_session_of_a_dead_leader_is_made_again(tmp_path: Path) -> None:
    progress, pid_file = tmp_path / "progress", tmp_path / "pid"
    script = f'"{sys.executable}" "{PROGRAM}" "{progress}" </dev/null >"{tmp_path}/out" 2>&1 & echo $! >"{pid_file}"'
    leader = subprocess.Popen(["sh", "-c", script], start_new_session=True)
    leader.wait()
    pid = int(pid_file.read_text())
    deadline = time.monotonic() + 30
    while not progress.exists() or not progress.read_text().strip():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    captured = capture(pid, kill=True)
    wait_gone(pid)
    assert captured.state.process.sid == leader.pid
    restored = restore(captured)
    try:
        stat = read_stat(restored.pid)
        assert (restored.pid, stat.session, stat.pgrp) == (pid, leader.pid, leader.pid)
        assert not Path(f"/proc/{leader.pid}").exists()
    finally:
        kill_and_reap(restored.pid)


@pytest.mark.skipif(autogroup(os.getpid())[1] is None, reason="no autogroups in this kernel, or switched off")
def test_nice_value_of_the_session_comes_back(program: Program) -> None:
    ours = autogroup(os.getpid())
    Path(f"/proc/{program.pid}/autogroup").write_text("7")
    captured = capture(program.pid, kill=True)
    program.kill()
    restored = restore(captured)
    assert autogroup(restored.pid)[1] == 7
    assert autogroup(os.getpid()) == ours


def test_session_of_somebody_else_becomes_its_own(program: Program) -> None:
    # not our own session: in a container that has no id where we are
    other = subprocess.Popen(["sleep", "600"], start_new_session=True)
    try:
        captured = capture(program.pid, kill=True)
        program.kill()
        restored = restore(captured.changed(sid=other.pid, pgid=program.pid))
        assert any(f"session {other.pid}" in warning for warning in restored.warnings)
        assert read_stat(restored.pid).session == restored.pid
    finally:
        other.kill()
        other.wait()


def test_session_outside_of_the_pid_namespace_becomes_its_own(program: Program) -> None:
    captured = capture(program.pid, kill=True)
    program.kill()
    restored = restore(captured.changed(sid=0, pgid=0))
    assert any("session" in warning for warning in restored.warnings)
    assert read_stat(restored.pid).session == restored.pid


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A cgroup of our own."""
    made = cgroup_base() / f"checkpointd-test-{os.getpid()}"
    made.mkdir()
    yield made
    deadline = time.monotonic() + 30
    while (made / "cgroup.procs").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    made.rmdir()


@pytest.mark.needs("cgroup")
def test_another_cgroup_is_told(program: Program, cgroup: Path) -> None:
    """It is restored into ours; from another directory nobody knows what limits and freezers it had."""
    (cgroup / "cgroup.procs").write_text(str(program.pid))
    captured = capture(program.pid, kill=True)
    program.kill()
    assert [one for one in captured.state.process.host.cgroups if one.endswith(f"/{cgroup.name}")]
    restored = restore(captured)
    (told,) = [warning for warning in restored.warnings if "cgroup" in warning]
    assert f"/{cgroup.name} and runs in " in told
    assert str(restored.pid) not in (cgroup / "cgroup.procs").read_text().split()


def test_a_cgroup_of_another_host_is_told(program: Program) -> None:
    """Whether cgroups can be made here or not."""
    captured = capture(program.pid, kill=True)
    program.kill()
    host = replace(captured.state.process.host, cgroups=(":/theirs", "memory:/more"))
    (told,) = [one for one in restore(captured.changed(host=host)).warnings if "cgroup" in one]
    assert told.startswith("it ran in cgroup /theirs, memory:/more and runs in ")


def test_the_cgroup_it_was_in_is_not_told(program: Program) -> None:
    captured = capture(program.pid, kill=True)
    program.kill()
    assert captured.state.process.host.cgroups == cgroups(os.getpid())
    assert not [warning for warning in restore(captured).warnings if "cgroup" in warning]
