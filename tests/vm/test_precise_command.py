# SPDX-License-Identifier: Apache-2.0
"""Precise soft-dirty tracking as a user gets it, by the command alone: check, run --precise, track --precise.

On a patched kernel the switch makes it, on a stock one the merge barrier.  The program changes five pages of 4,096 and
maps memory beside them: without precise tracking all of these would have to be read.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.service_harness import House, house_of_real_agents, is_gone, wait_until

KERNEL = os.environ.get("CHECKPOINTD_VM_KERNEL", "")
PATCHED = "-precise" in KERNEL
BACKEND = "precise-soft-dirty" if PATCHED else "barrier-soft-dirty"
PROGRAMS = Path(__file__).parents[1] / "programs"
LEDGER_PAGES = 4096
pytestmark = [
    pytest.mark.skipif(not KERNEL, reason="needs a kernel of the lab: run it with python -m tests.vm"),
    pytest.mark.needs("root", "ptrace", "soft_dirty", "merge_barrier", "set_tid"),
]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with house_of_real_agents(tmp_path_factory.mktemp("house")) as made:
        yield made


class Program:
    """precise_program.py, started by somebody or brought back."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.words = [sys.executable, str(PROGRAMS / "precise_program.py"), str(directory)]
        self.asked = 0
        self.pid = 0
        (directory / "asked").write_text("0")

    def wait(self) -> str:
        """Until it has done what it was asked; what it says of the switch."""
        done = self.directory / "done"

        def answer() -> str:
            words = done.read_text().split() if done.exists() else []
            assert words != ["broken"], "the program's memory is not what it wrote"
            return words[1] if words and int(words[0]) >= self.asked else ""

        return str(wait_until(answer, "the program"))

    def change(self) -> str:
        self.asked += 1
        part = self.directory / "asked.part"
        part.write_text(str(self.asked))
        part.rename(self.directory / "asked")
        return self.wait()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        wait_until(lambda: is_gone(self.pid), "its end")


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    made = Program(tmp_path)
    yield made
    if made.pid:
        made.kill()


def lines(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def dump(house: House, program: Program, *words: str) -> dict[str, Any]:
    """One dump, its summary; found by the precise backend."""
    found = lines(house.checkpoint("dump", "-p", str(program.pid), "--json", *words))[-1]
    assert found["backend"] == BACKEND, found["backend_reason"]
    return found


def assert_is_small(found: dict[str, Any], parent: dict[str, Any]) -> None:
    """Five pages, sixteen new ones, and what Python touches by running; hardly any page of the ledger was read."""
    assert found["incremental"] is True
    assert found["parent_id"] == parent["image_id"]
    assert 5 + 16 <= found["pages_written"] <= 5 + 16 + 200
    assert found["pages_skipped_parent"] >= LEDGER_PAGES - 5


def comes_back_and_goes_on(house: House, program: Program, parent: dict[str, Any]) -> None:
    restored = lines(house.checkpoint("restore", parent["image_id"], "--backend", BACKEND, "--json"))[-1]
    assert restored["pid"] == program.pid
    assert restored["tracking"] == BACKEND
    program.change()
    assert_is_small(dump(house, program, "--incremental"), parent)
    program.change()


def check(house: House) -> list[str]:
    """What `checkpoint check` prints about precise tracking: the line, and the hint behind it."""
    done = house.checkpoint("check")
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.splitlines()
    (at,) = (number for number, line in enumerate(said) if " precise soft-dirty: " in line)
    return said[at : at + 2]


def test_check_names_what_there_is_and_why(house: House) -> None:
    line, _ = check(house)
    expected = "ok      precise soft-dirty: " + ("patched: " if PATCHED else "emulated by a merge barrier: ")
    assert line.startswith(expected)
    assert len(line) > len(expected) + 10


def test_where_there_is_neither_check_says_why_and_precise_is_refused(house: House, program: Program) -> None:
    """The agent may not use what makes either of them."""
    poor = House(program.directory)
    poor.environ["CHECKPOINTD_AGENT"] = shlex.join(
        [sys.executable, str(PROGRAMS / "agent_without_precise.py")]
    )
    poor.serve()
    try:
        line, hint = check(poor)
        assert line.startswith("missing precise soft-dirty: neither: ")
        assert "userfaultfd" in line
        assert "only --precise needs it" in hint
        with subprocess.Popen(program.words) as process:
            program.pid = process.pid
            program.wait()
            refused = poor.checkpoint("track", "--precise", "-p", str(program.pid))
            assert refused.returncode == 6
            assert "precise soft-dirty tracking cannot be had: " in refused.stderr
            assert "leave --precise out" in refused.stderr
            program.change()
            program.kill()
    finally:
        poor.close()


def test_run_precise_from_the_first_instruction_to_the_dump_after_the_restore(
    house: House, program: Program
) -> None:
    running = house.begin("run", "--precise", "--json", "--", *program.words)
    assert running.stderr is not None
    try:
        tracked = json.loads(running.stderr.readline())
        assert tracked["message_type"] == "tracked"
        assert tracked["backend"] == BACKEND
        assert ("patched: " if PATCHED else "emulated: ") in tracked["backend_reason"]
        program.pid = tracked["pid"]
        assert program.wait() == ("True" if PATCHED else "None")
        first = dump(house, program)
        assert first["incremental"] is False
        program.change()
        second = dump(house, program, "--incremental")
        assert_is_small(second, first)
        program.change()
    finally:
        if program.pid:
            program.kill()
        running.communicate(timeout=120)
    assert running.returncode == 128 + signal.SIGKILL
    comes_back_and_goes_on(house, program, second)


def test_track_precise_of_a_running_process_until_untrack(house: House, program: Program) -> None:
    with subprocess.Popen(program.words) as process:
        program.pid = process.pid
        assert program.wait() == ("False" if PATCHED else "None")
        tracked = house.checkpoint_json("track", "--precise", "-p", str(program.pid))
        assert tracked["backend"] == BACKEND
        first = dump(house, program)
        assert program.change() == ("True" if PATCHED else "None")
        second = dump(house, program, "--incremental")
        assert_is_small(second, first)
        done = house.checkpoint("untrack", "-p", str(program.pid))
        assert done.returncode == 0, done.stderr
        assert program.change() == ("False" if PATCHED else "None")
        program.kill()
    comes_back_and_goes_on(house, program, second)
