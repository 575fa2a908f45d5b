# SPDX-License-Identifier: Apache-2.0
"""Python programs: one to be restored, and one that writes pages, with its dumper and store."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpointd import tracepoint
from checkpointd.dump.dump import Dumper
from checkpointd.image.store import Store
from tests.programs.page_program import Target
from tests.programs.python_program import Program
from tests.programs.restore_harness import Captured, capture


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    found = Program(tmp_path, sys.executable)
    yield found
    found.kill()


@pytest.fixture
def killed(program: Program) -> Captured:
    """The capture of a program that is dead."""
    captured = capture(program.pid, kill=True)
    program.kill()
    return captured


@pytest.fixture
def target() -> Iterator[Target]:
    made = Target()
    yield made
    made.process.kill()
    made.process.wait()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store", create=True)


@pytest.fixture
def dumper(target: Target) -> Iterator[Dumper]:
    made = Dumper(target.pid)
    yield made
    tracepoint.clear()
    made.close()
