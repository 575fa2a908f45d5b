# SPDX-License-Identifier: Apache-2.0
"""A Python program to be restored, for the tests of what a restore does to whole programs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

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
