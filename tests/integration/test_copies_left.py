# SPDX-License-Identifier: Apache-2.0
"""Nothing of a forked copy stays with the target, however a dump ends.

A copy that has died is a zombie without exit signal: the target's own waits do not see it, and it would stay, in sight
of every `ps`, for as long as the target runs.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpointd import tracepoint
from checkpointd.dump.dump import Dumper, DumpOptions
from checkpointd.errors import Cancelled, CheckpointError
from checkpointd.image.store import Store
from checkpointd.procfs import process
from checkpointd.target import fork

TARGET = """
import time
held = bytearray(64 << 20)
for at in range(0, len(held), 4096):
    held[at] = at >> 12 & 0xff | 1
print("ready", flush=True)
time.sleep(600)
"""
AGENT = """
import sys, time
from checkpointd import tracepoint
from checkpointd.dump.dump import Dumper, DumpOptions
pid, store, where = int(sys.argv[1]), sys.argv[2], sys.argv[3]
def wait(_):
    print("there", flush=True)
    time.sleep(600)
tracepoint.register(where, wait)
dumper = Dumper(pid)
print(dumper._worker.pid, flush=True)
dumper.dump(DumpOptions(store=store, read_mode="fork", compress="none"))
"""


@pytest.fixture
def pid() -> Iterator[int]:
    child = subprocess.Popen([sys.executable, "-c", TARGET], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    yield child.pid
    child.kill()
    child.wait()
    child.stdout.close()


@pytest.fixture
def store(tmp_path: Path) -> str:
    Store.open(tmp_path / "store", create=True)
    return str(tmp_path / "store")


def killed_agent(pid: int, store: str, where: str, *, worker_too: bool = False) -> None:
    """A dump whose agent is killed at a trace point."""
    agent = subprocess.Popen(
        [sys.executable, "-c", AGENT, str(pid), store, where],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert agent.stdout is not None
    worker = int(agent.stdout.readline())
    assert agent.stdout.readline() == b"there\n"
    assert process.children(pid)
    if worker_too:
        os.kill(worker, signal.SIGSTOP)
    agent.kill()
    agent.wait()
    agent.stdout.close()
    if worker_too:
        os.kill(worker, signal.SIGKILL)


def children_after(pid: int, timeout_s: float) -> list[int]:
    deadline = time.monotonic() + timeout_s
    while (found := process.children(pid)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def is_running(pid: int) -> bool:
    return process.read_stat(pid).state in "RS" and process.read_status(pid)["TracerPid"] == "0"


@pytest.mark.parametrize("where", ["fork.done", "dump.copied", "dump.thawed", "worker.piece_done"])
def test_a_dump_that_is_cancelled_leaves_no_copy(
    pid: int, store: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    if where == "worker.piece_done":  # in another process: as soon as it tells of its progress
        monkeypatch.setenv(tracepoint.ENVIRONMENT, f"{where}=sleep:100")
    dumper = Dumper(pid)
    try:
        if where == "worker.piece_done":
            dumper.cancelled = lambda: bool(seen)
            report = lambda _, done, total: seen.append(done) if 0 < done < total else None  # noqa: E731
        else:
            tracepoint.register(where, lambda _: setattr(dumper, "cancelled", lambda: True))
            report = lambda *_: None  # noqa: E731
        with pytest.raises(Cancelled):
            dumper.dump(DumpOptions(store=store, read_mode="fork", compress="none"), report)
        assert len(seen) == (where == "worker.piece_done")
        assert process.children(pid) == []
        assert is_running(pid)
        tracepoint.clear()
        dumper.cancelled = lambda: False
        dumper.dump(DumpOptions(store=store, read_mode="fork", compress="none"))
        assert process.children(pid) == []
    finally:
        tracepoint.clear()
        dumper.close()


@pytest.mark.parametrize("when", ["before it is read", "while it is read"])
def test_a_copy_that_is_killed_fails_the_dump_alone(pid: int, store: str, when: str, monkeypatch) -> None:
    """As the OOM killer does; the next dump is whole."""
    dumper = Dumper(pid)
    options = DumpOptions(store=store, incremental=True, read_mode="fork", compress="none")

    def kill_it(*_: object) -> None:
        (copy,) = process.children(pid)
        os.kill(copy, signal.SIGKILL)

    try:
        first = dumper.dump(options)
        if when == "before it is read":
            tracepoint.register("dump.thawed", kill_it)
        else:
            monkeypatch.setattr("checkpointd.dump.dump.check_complete", kill_it)
        with pytest.raises(CheckpointError, match=f"the forked copy of process {pid} was killed"):
            dumper.dump(options)
        tracepoint.clear()
        monkeypatch.undo()
        assert is_running(pid)
        assert process.children(pid) == []
        second = dumper.dump(options)
        assert second.parent_id == first.image_id
        assert [info.id for info in Store.open(store).images()] == [first.image_id, second.image_id]
    finally:
        tracepoint.clear()
        dumper.close()


@pytest.mark.parametrize("where", ["fork.done", "dump.copied", "dump.thawed", "fork.closed"])
def test_what_a_killed_agent_leaves_is_reaped_by_its_page_worker(pid: int, store: str, where: str) -> None:
    killed_agent(pid, store, where)
    assert children_after(pid, 10) == []
    deadline = time.monotonic() + 10  # it is still in the worker's hands when that has reaped
    while not is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_nobody_was_left_to_reap_is_reaped_by_the_next_dump(pid: int, store: str) -> None:
    killed_agent(pid, store, "dump.thawed", worker_too=True)
    deadline = time.monotonic() + 10
    while [process.read_stat(child).state for child in process.children(pid)] != ["Z"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    dumper = Dumper(pid)
    try:
        found = dumper.dump(DumpOptions(store=store, read_mode="stopped", compress="none"))
    finally:
        dumper.close()
    assert process.children(pid) == []
    assert not [warning for warning in found.warnings if "child" in warning]


OWN_CHILD = """
#define _GNU_SOURCE
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
static char stack[65536];
static int child(void *arg) { for (;;) pause(); }
int main(void) {
    memset(stack, 1, sizeof stack);
    int own = clone(child, stack + sizeof stack, CLONE_VM, 0), status;
    kill(own, SIGKILL);
    puts("+"); fflush(stdout); getchar();
    return waitpid(own, &status, __WALL) == own && WTERMSIG(status) == SIGKILL ? 0 : 1;
}
"""


def test_a_child_of_the_programs_own_stays_for_it_to_find(tmp_path: Path, store: str) -> None:
    """Without exit signal, killed before it had a page fault of its own: it shares the program's memory."""
    (tmp_path / "own.c").write_text(OWN_CHILD)
    subprocess.run(["gcc", "-O1", "-o", tmp_path / "own", tmp_path / "own.c"], check=True)
    program = subprocess.Popen([tmp_path / "own"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert program.stdout is not None
    assert program.stdout.readline() == b"+\n"
    own = process.children(program.pid)
    try:
        deadline = time.monotonic() + 10
        while process.read_stat(own[0]).state != "Z":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert fork.strays(program.pid, own, surely=False) == own  # it looks just like one of ours
        dumper = Dumper(program.pid)
        try:
            dumper.dump(DumpOptions(store=store, read_mode="fork", compress="none"))
            assert fork.reap_after_death(program.pid, 1) == 0
        finally:
            dumper.close()
        assert process.children(program.pid) == own
        program.communicate(b"\n", timeout=10)
        assert program.returncode == 0
    finally:
        program.kill()
        program.wait()
